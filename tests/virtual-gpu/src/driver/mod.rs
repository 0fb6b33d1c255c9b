//! The driver: the functions of `libcuda.so.1` for a device that does not exist.
//!
//! Work is queued and runs when something waits for it ([`queue`]), in an order constrained
//! only by streams and events. A caller's mistake is answered with the error code of a real
//! driver and recorded as a violation with a text ([`report`]). Tests control it through
//! [`control`].

pub mod api;
pub mod capture;
pub mod codes;
pub mod control;
pub mod counted;
mod execute;
pub mod handles;
pub mod launch;
pub mod memory;
pub mod objects;
pub mod queue;
pub mod report;
pub mod settings;
mod stream;

#[cfg(test)]
mod tests;

use crate::ptx;
use capture::Capture;
use codes::Code;
use handles::{Kind, Table};
use memory::{DeviceMemory, HostMemory};
use objects::{Context, Event, Exec, Function, Graph, Module, Stream, StreamRole};
use queue::Queue;
use report::Report;
use settings::{Schedule, Settings};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Error of the fallible methods of [`Driver`]: the code that the C function returns. Mistakes
/// of the caller have also been recorded as violations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure(pub Code);

/// The whole state of the driver. One lock guards it, which is held while kernels run.
pub struct Driver {
    /// Properties of the GPU that this pretends to be.
    pub settings: Settings,
    /// Violations, calls and statistics.
    pub report: Report,
    /// Whether `cuInit` was called.
    pub initialised: bool,
    function: &'static str,
    /// Live contexts.
    pub contexts: Table<Context>,
    /// Live streams, including default streams.
    pub streams: Table<Stream>,
    /// Live events.
    pub events: Table<Event>,
    /// Loaded modules.
    pub modules: Table<Module>,
    /// Functions of loaded modules.
    pub functions: Table<Function>,
    /// Captured graphs.
    pub graphs: Table<Graph>,
    /// Executable graphs.
    pub execs: Table<Exec>,
    /// Primary context of each device, with its retain count.
    pub primary: BTreeMap<i32, (u64, u64)>,
    /// Device memory.
    pub memory: DeviceMemory,
    /// Pinned host memory.
    pub host: HostMemory,
    /// Work that has not run yet.
    pub queue: Queue,
    captures: BTreeMap<u64, Capture>,
    next_capture: u64,
    images: HashMap<String, Arc<ptx::Module>>,
}

impl Driver {
    fn new() -> Self {
        let settings = Settings::from_environment();
        let mut driver = Self {
            settings: Settings::default(),
            report: Report::default(),
            initialised: false,
            function: "",
            contexts: Table::new(Kind::Context),
            streams: Table::new(Kind::Stream),
            events: Table::new(Kind::Event),
            modules: Table::new(Kind::Module),
            functions: Table::new(Kind::Function),
            graphs: Table::new(Kind::Graph),
            execs: Table::new(Kind::Exec),
            primary: BTreeMap::new(),
            memory: DeviceMemory::default(),
            host: HostMemory::default(),
            queue: Queue::default(),
            captures: BTreeMap::new(),
            next_capture: 1,
            images: HashMap::new(),
        };
        driver.apply(settings);
        control::inject_from_environment(&mut driver.report);
        driver
    }

    /// Applies new settings.
    pub fn apply(&mut self, settings: Settings) {
        if let Schedule::Shuffle(seed) = settings.schedule {
            self.queue.seed(seed);
        }
        self.settings = settings;
    }

    /// Records a violation of the running function.
    pub fn violation(&mut self, text: &str) {
        let text = format!("{}: {text}", self.function);
        self.report.violation(&text, self.settings.backtrace);
    }

    /// Records a violation and fails.
    pub fn refuse<T>(&mut self, code: Code, text: &str) -> Result<T, Failure> {
        let text = format!("{text}: {}", codes::display(code));
        self.violation(&text);
        Err(Failure(code))
    }

    /// Returns the context that is current to this thread.
    pub fn current(&mut self) -> Result<u64, Failure> {
        let handle = current_context();
        if handle == 0 {
            return self.refuse(
                codes::INVALID_CONTEXT,
                "no context is current to this thread",
            );
        }
        if self.contexts.get(handle).is_none() {
            let text = format!("the current context: {}", self.contexts.explain(handle));
            return self.refuse(codes::CONTEXT_IS_DESTROYED, &text);
        }
        Ok(handle)
    }

    /// Fails if an earlier fault has broken the context.
    pub fn sound(&self, context: u64) -> Result<(), Failure> {
        match self
            .contexts
            .get(context)
            .and_then(|context| context.sticky)
        {
            Some(code) => Err(Failure(code)),
            None => Ok(()),
        }
    }

    /// Checks what a function needs. Returns the error of the current context if it is broken.
    fn enter(&mut self, need: Need) -> Result<Option<Failure>, Failure> {
        if need.init && !self.initialised {
            return self.refuse(codes::NOT_INITIALIZED, "cuInit was not called");
        }
        if !need.context {
            return Ok(None);
        }
        let context = self.current()?;
        Ok(self.sound(context).err())
    }

    fn inject(&mut self, code: Code) {
        if codes::is_sticky(code) {
            let context = current_context();
            self.break_context(context, code);
        }
    }

    /// Breaks a context: queued work in it is dropped, its captures end, and every later call
    /// fails.
    fn break_context(&mut self, context: u64, code: Code) {
        if let Some(found) = self.contexts.get_mut(context) {
            found.sticky.get_or_insert(code);
        }
        self.queue.drop_context(context);
        // Nothing can end a capture in a broken context.
        self.drop_captures(context);
        for stream in self.streams.values_mut() {
            if stream.context == context {
                stream.capture = None;
            }
        }
    }
}

macro_rules! lookups {
    ($($name:ident, $name_mut:ident, $table:ident, $object:ty;)*) => {
        impl Driver {
            $(
                /// Returns the object behind a handle. It must belong to the current context.
                pub fn $name(&mut self, handle: u64) -> Result<&$object, Failure> {
                    self.$name_mut(handle).map(|object| &*object)
                }

                /// Returns the object behind a handle. It must belong to the current context.
                pub fn $name_mut(&mut self, handle: u64) -> Result<&mut $object, Failure> {
                    match self.$table.get(handle) {
                        None => {
                            let text = self.$table.explain(handle);
                            return self.refuse(codes::INVALID_HANDLE, &text);
                        }
                        Some(object) => {
                            let (mine, current) = (object.context, current_context());
                            if current != 0 && mine != current {
                                let text = format!("{handle:#x} belongs to another context, not the current one");
                                return self.refuse(codes::INVALID_HANDLE, &text);
                            }
                        }
                    }
                    self.$table.get_mut(handle).ok_or(Failure(codes::INVALID_HANDLE))
                }
            )*
        }
    };
}

lookups! {
    stream, stream_mut, streams, Stream;
    event, event_mut, events, Event;
    module, module_mut, modules, Module;
    graph, graph_mut, graphs, Graph;
    exec, exec_mut, execs, Exec;
}

impl Driver {
    /// Returns the function behind a handle. It must belong to the current context and to a
    /// module that is still loaded.
    pub fn kernel(&mut self, handle: u64) -> Result<&mut Function, Failure> {
        let Some(found) = self.functions.get(handle) else {
            let text = self.functions.explain(handle);
            return self.refuse(codes::INVALID_HANDLE, &text);
        };
        let (context, module) = (found.context, found.module);
        if self.modules.get(module).is_none() {
            let text = format!("function {} of a module that is unloaded", found.name());
            return self.refuse(codes::INVALID_HANDLE, &text);
        }
        if context != current_context() {
            let text = format!("{handle:#x} belongs to another context, not the current one");
            return self.refuse(codes::INVALID_HANDLE, &text);
        }
        self.functions
            .get_mut(handle)
            .ok_or(Failure(codes::INVALID_HANDLE))
    }

    /// Creates a context for a device.
    pub fn make_context(&mut self, device: i32, primary: bool, flags: u32) -> u64 {
        let handle = self.contexts.insert(Context {
            device,
            primary,
            flags,
            sticky: None,
            legacy: 0,
            per_thread: HashMap::new(),
            limits: HashMap::new(),
            cache: 0,
        });
        let legacy = self.streams.insert(Stream {
            context: handle,
            role: StreamRole::Legacy,
            blocking: true,
            priority: 0,
            tail: None,
            last_kernel: None,
            capture: None,
            asked: None,
        });
        if let Some(context) = self.contexts.get_mut(handle) {
            context.legacy = legacy;
        }
        handle
    }

    /// Lists the objects of a context that have not been freed, one per line.
    pub fn leaks(&self, context: u64) -> Vec<String> {
        let mut found = Vec::new();
        let allocations = self
            .memory
            .iter()
            .filter(|a| a.context == context && !a.of_module);
        found.extend(allocations.map(|a| format!("device memory {:#x}: {}", a.base, a.label)));
        let pinned = self.host.iter().filter(|(_, p)| p.context == context);
        found.extend(pinned.map(|(at, p)| format!("pinned host memory {at:#x} ({} bytes)", p.len)));
        let made =
            |stream: &Stream| stream.context == context && stream.role == StreamRole::Created;
        let mut handles = |what: &str, of: Vec<u64>| {
            found.extend(of.iter().map(|handle| format!("{what} {handle:#x}")))
        };
        handles("stream", self.streams.handles(made));
        handles(
            "event",
            self.events.handles(|event| event.context == context),
        );
        handles(
            "module",
            self.modules.handles(|module| module.context == context),
        );
        handles(
            "graph",
            self.graphs.handles(|graph| graph.context == context),
        );
        handles(
            "executable graph",
            self.execs.handles(|exec| exec.context == context),
        );
        found
    }

    /// Destroys a context: queued work runs first, and anything that is left over is a leak.
    pub fn end_context(&mut self, context: u64) {
        // A fault in the remaining work is recorded as a violation; the context is destroyed
        // anyway.
        let _ = self.run_context(context);
        self.queue.drop_context(context);
        for leak in self.leaks(context) {
            self.violation(&format!("leaked: {leak}"));
        }
        for handle in self.streams.handles(|stream| stream.context == context) {
            self.streams.remove(handle);
        }
        for handle in self.events.handles(|event| event.context == context) {
            self.events.remove(handle);
        }
        for handle in self.modules.handles(|module| module.context == context) {
            self.modules.remove(handle);
        }
        for handle in self
            .functions
            .handles(|function| function.context == context)
        {
            self.functions.remove(handle);
        }
        for handle in self.graphs.handles(|graph| graph.context == context) {
            self.graphs.remove(handle);
        }
        for handle in self.execs.handles(|exec| exec.context == context) {
            self.execs.remove(handle);
        }
        let left: Vec<u64> = self
            .memory
            .iter()
            .filter(|a| a.context == context)
            .map(|a| a.base)
            .collect();
        for base in left {
            self.memory.free(base);
        }
        let left: Vec<usize> = self
            .host
            .iter()
            .filter(|(_, p)| p.context == context)
            .map(|(at, _)| at)
            .collect();
        for address in left {
            self.host.free(address);
        }
        self.drop_captures(context);
        self.contexts.remove(context);
    }
}

/// Preconditions of a driver function.
#[derive(Clone, Copy, Debug, Default)]
pub struct Need {
    init: bool,
    context: bool,
    release: bool,
}

impl Need {
    /// Nothing: the function works before `cuInit`.
    pub const NOTHING: Need = Need {
        init: false,
        context: false,
        release: false,
    };
    /// `cuInit` was called.
    pub const INIT: Need = Need {
        init: true,
        context: false,
        release: false,
    };
    /// A current context that is not broken.
    pub const CONTEXT: Need = Need {
        init: true,
        context: true,
        release: false,
    };
    /// A current context. The function releases something: it does so even if the context is
    /// broken or a failure is injected, and then returns the error.
    pub const RELEASE: Need = Need {
        init: true,
        context: true,
        release: true,
    };
    /// `cuInit` was called. The function releases something, even if a failure is injected.
    pub const INIT_RELEASE: Need = Need {
        init: true,
        context: false,
        release: true,
    };
}

thread_local! {
    static CURRENT: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
    static IN_HOST_FUNCTION: Cell<bool> = const { Cell::new(false) };
}

/// Driver calls made by host functions, which must not make any. They are kept outside of
/// [`Driver`], which is locked while host functions run.
static CALLED_BY_HOST_FUNCTION: Mutex<Vec<&'static str>> = Mutex::new(Vec::new());

/// Returns the context that is current to this thread, or 0.
pub fn current_context() -> u64 {
    CURRENT.with_borrow(|stack| stack.last().copied().unwrap_or(0))
}

/// Replaces the current context of this thread; 0 means none.
pub fn set_current_context(context: u64) {
    CURRENT.with_borrow_mut(|stack| {
        stack.pop();
        if context != 0 {
            stack.push(context);
        }
    });
}

/// Pushes a context onto this thread's context stack.
pub fn push_current_context(context: u64) {
    CURRENT.with_borrow_mut(|stack| stack.push(context));
}

/// Pops the current context from this thread's context stack.
pub fn pop_current_context() -> u64 {
    CURRENT.with_borrow_mut(Vec::pop).unwrap_or(0)
}

/// Locks the driver. Also records the violations of host functions that called it meanwhile.
pub fn lock() -> MutexGuard<'static, Driver> {
    static DRIVER: OnceLock<Mutex<Driver>> = OnceLock::new();
    let driver = DRIVER.get_or_init(|| {
        control::at_exit();
        Mutex::new(Driver::new())
    });
    let mut driver = driver.lock().unwrap_or_else(PoisonError::into_inner);
    let mut calls = CALLED_BY_HOST_FUNCTION
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    for function in calls.drain(..) {
        driver.function = function;
        driver.violation("called by a host function, which may not call the driver");
    }
    drop(calls);
    driver
}

/// Runs a driver function: counts the call, applies injected failures, checks the
/// preconditions, and runs `body`. Never unwinds.
pub fn call(
    name: &'static str,
    need: Need,
    body: impl FnOnce(&mut Driver) -> Result<(), Failure>,
) -> Code {
    if IN_HOST_FUNCTION.get() {
        CALLED_BY_HOST_FUNCTION
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(name);
        return codes::NOT_PERMITTED;
    }
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let mut driver = lock();
        driver.function = name;
        let injected = driver.report.called(name);
        if let Some(code) = injected {
            driver.inject(code);
        }
        let broken = driver.enter(need)?;
        match injected.map(Failure).or(broken) {
            None => body(&mut driver),
            Some(failure) => {
                if need.release {
                    // The caller only sees the earlier failure.
                    let _ = body(&mut driver);
                }
                Err(failure)
            }
        }
    }));
    match outcome {
        Ok(Ok(())) => codes::SUCCESS,
        Ok(Err(Failure(code))) => code,
        Err(panic) => {
            let text = panic_text(&*panic);
            let mut driver = lock();
            driver.function = name;
            driver.violation(&format!("the virtual GPU itself failed: {text}"));
            codes::UNKNOWN
        }
    }
}

/// Returns the message of a panic.
fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (_, Some(text)) => text,
        _ => "a panic without text",
    }
}
