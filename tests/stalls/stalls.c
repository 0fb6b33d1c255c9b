/* Stalls random threads, to make tests face what a busy machine does, only far more often.
 *
 * When preloaded (LD_PRELOAD) into a program below target/debug, it makes some calls of the
 * C library wait: before memory is allocated, before and after bytes are read or written,
 * around every call of syscall() (including futex), and before the clock is read.
 * QUELL_STALLS sets how often a call waits, per 100,000 calls. QUELL_STALL_BITS sets the
 * maximum duration: a stall lasts 2^n microseconds, where n is uniformly random between 0
 * and QUELL_STALL_BITS. Requires glibc.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#define OWN __thread __attribute__((tls_model("initial-exec")))

extern void *__libc_malloc(size_t size);

static int often = -1; /* not yet initialised */
static int bits = 16;
static OWN uint64_t state;
static OWN int inside;

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

/* Declares `next` as the original function, to which the call is passed on. */
#define REAL(name) \
    static __typeof__(&name) next; \
    if (!next) next = (__typeof__(&name))real(#name)

static int number(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

static void begin(void) {
    char program[4096];
    ssize_t length = readlink("/proc/self/exe", program, sizeof program - 1);
    program[length < 0 ? 0 : length] = 0;
    bits = number("QUELL_STALL_BITS", 16);
    often = strstr(program, "/target/debug/") ? number("QUELL_STALLS", 100) : 0;
}

static void maybe_stall(void) {
    if (often == 0 || inside) return;
    int error = errno;
    inside = 1;
    if (often < 0) begin();
    if (!state) state = ((uintptr_t)&state ^ (uint64_t)getpid() << 32) | 1;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    if (often > 0 && state % 100000 < (uint64_t)often) {
        uint64_t microseconds = UINT64_C(1) << (state >> 20) % (bits + 1);
        struct timespec time = {microseconds / 1000000, microseconds % 1000000 * 1000};
        nanosleep(&time, NULL);
    }
    inside = 0;
    errno = error;
}

void *malloc(size_t size) {
    maybe_stall();
    return __libc_malloc(size);
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    REAL(clock_gettime);
    maybe_stall();
    return next(clock, time);
}

#define AROUND(call) \
    maybe_stall(); \
    __auto_type result = call; \
    maybe_stall(); \
    return result

ssize_t read(int file, void *bytes, size_t count) {
    REAL(read);
    AROUND(next(file, bytes, count));
}

ssize_t write(int file, const void *bytes, size_t count) {
    REAL(write);
    AROUND(next(file, bytes, count));
}

ssize_t recv(int socket, void *bytes, size_t count, int flags) {
    REAL(recv);
    AROUND(next(socket, bytes, count, flags));
}

ssize_t send(int socket, const void *bytes, size_t count, int flags) {
    REAL(send);
    AROUND(next(socket, bytes, count, flags));
}

long syscall(long which, ...) {
    REAL(syscall);
    va_list rest;
    va_start(rest, which);
    long a = va_arg(rest, long), b = va_arg(rest, long), c = va_arg(rest, long);
    long d = va_arg(rest, long), e = va_arg(rest, long), f = va_arg(rest, long);
    va_end(rest);
    AROUND(next(which, a, b, c, d, e, f));
}
