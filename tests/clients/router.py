"""Tests two replicas of `quell serve` behind vllm-router: what must hold when scaling out.

Takes the program from QUELL and the model from MODEL. Prints one line per check. Exits with
code 1 and the reason at the first check that fails.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path

# Time limit in seconds for everything; generous, for a machine that is busy with other work.
TIME = 600
NAME = "model"
# No proxy for connections of this machine to itself.
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}


class Failed(Exception):
    """A check that does not hold."""


def stop(number, _):
    """Signal handler that interrupts whatever the main thread waits for."""
    raise Failed("out of time" if number == signal.SIGALRM else "told to stop")


def check(holds, otherwise):
    if not holds:
        raise Failed(otherwise)


def until(what, holds):
    """Polls until the condition holds, and returns its value."""
    try:
        while not (answer := holds()):
            time.sleep(0.02)
        return answer
    except Failed as failed:
        raise Failed(f"{failed}, waiting until {what}") from failed


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Program:
    """A program that answers HTTP on a port of this machine."""

    started = []

    def spawn(self, command, **how):
        self.process = subprocess.Popen(command, env=ENVIRONMENT, **how)
        Program.started.append(self.process)

    def connection(self):
        return HTTPConnection("127.0.0.1", self.port)

    def ask(self, method, path, body=None):
        """Returns the status and the text of the answer, or (0, reason) if there is none."""
        connection = self.connection()
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except (OSError, HTTPException) as error:
            return 0, repr(error)
        finally:
            connection.close()

    def get(self, path):
        return self.ask("GET", path)

    def complete(self, max_tokens=4):
        return self.ask("POST", "/v1/completions", question(max_tokens))


def question(max_tokens, **extra):
    """Returns a request whose answer always has the same `max_tokens` tokens."""
    return {
        "model": NAME,
        "prompt": "The quick brown fox",
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        **extra,
    }


class Replica(Program):
    def __init__(self, log):
        self.log = log
        self.port = 0
        self.start()

    def start(self):
        """Starts the replica, on its previous port if it had one."""
        # Another program's connection may briefly occupy that port.
        for _ in range(10):
            if self.listens():
                return
        raise Failed(f"quell serve does not listen, the last time on port {self.port}")

    def listens(self):
        command = [os.environ["QUELL"], "serve", "--model", os.environ["MODEL"], "--device", "cpu"]
        command += ["--threads", "1", "--port", str(self.port), "--served-model-name", NAME]
        # Longer than this test: a drain must not cut off any request.
        command += ["--drain-timeout", "3600"]
        self.spawn(command, stdout=subprocess.PIPE, stderr=self.log, text=True)
        line = self.process.stdout.readline()
        found = re.fullmatch(r"listening on http://127\.0\.0\.1:(\d+)\n", line)
        if not found:
            self.process.wait()
            return False
        self.port = int(found[1])
        self.url = f"http://127.0.0.1:{self.port}"
        return True

    def metric(self, name, **labels):
        """Returns the sum over the series with this name and these labels."""
        status, text = self.get("/metrics")
        check(status == 200, f"/metrics of {self.url} answers {status}: {text}")
        values = []
        for line in text.splitlines():
            key, _, value = line.rpartition(" ")
            of, _, having = key.partition("{")
            if of == name and all(f'{label}="{is_}"' in having for label, is_ in labels.items()):
                values.append(float(value))
        check(values, f"/metrics has no {name} with {labels}")
        return sum(values)

    def succeeded(self):
        return self.metric("quell_request_success_total")

    def running(self):
        return self.metric("quell_num_requests_running")

    def holds_nothing(self):
        return not (
            self.running()
            or self.metric("quell_num_requests_waiting")
            or self.metric("quell_kv_blocks", state="active")
            or self.metric("quell_kv_blocks", state="deferred")
        )

    def disconnects(self):
        return self.metric("quell_request_outcomes_total", outcome="cancelled", reason="disconnect")


class Router(Program):
    def __init__(self, replicas, log):
        self.port = free_port()
        # The command of deploy/README.md, with shorter times.
        command = [str(Path(sys.executable).parent / "vllm-router"), "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--prometheus-port", str(free_port())]
        command += ["--policy", "round_robin", "--worker-startup-check-interval", "1"]
        command += ["--health-check-endpoint", "/ready", "--health-check-interval-secs", "1"]
        command += ["--health-failure-threshold", "2", "--health-success-threshold", "1"]
        command += ["--cb-failure-threshold", "2", "--cb-timeout-duration-secs", "5"]
        command += ["--health-check-timeout-secs", "30", "--worker-urls"]
        command += [replica.url for replica in replicas]
        self.spawn(command, stdout=log, stderr=log)

    def has_ended(self):
        return self.process.poll() is not None

    def serves(self):
        return self.get("/workers")[0] == 200

    def uses(self, replica):
        """Returns whether the router considers the replica healthy."""
        status, text = self.get("/workers")
        check(status == 200, f"/workers answers {status}: {text}")
        well = {worker["url"]: worker["is_healthy"] for worker in json.loads(text)["workers"]}
        return well[replica.url]


class Stream:
    """An answer that is being read by its own thread."""

    def __init__(self, server, tokens):
        self.tokens = tokens
        self.text = ""
        self.usage = None
        self.whole = False  # whether it ended with [DONE], like a complete answer
        self.problem = None
        self.begun = threading.Event()
        self.connection = server.connection()
        options = {"stream": True, "stream_options": {"include_usage": True}}
        self.body = json.dumps(question(tokens, **options))
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        try:
            kind = {"Content-Type": "application/json"}
            self.connection.request("POST", "/v1/completions", self.body, kind)
            answer = self.connection.getresponse()
            if answer.status != 200:
                self.problem = f"{answer.status}: {answer.read().decode()}"
                return
            for line in answer:
                data = line.decode().removeprefix("data:").strip()
                if data == "[DONE]":
                    self.whole = True
                elif data:
                    self.event(json.loads(data))
        except (OSError, HTTPException, ValueError, AttributeError) as error:
            # The last two occur if the connection is closed while it is being read.
            self.problem = repr(error)
        finally:
            self.begun.set()

    def event(self, event):
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices", []):
            self.text += choice["text"]
            if self.text:
                self.begun.set()

    def has_begun(self):
        self.begun.wait()
        check(self.text, f"a stream brings no text: {self.problem}")

    def ended(self):
        return not self.reader.is_alive()

    def join(self):
        self.reader.join()

    def is_complete(self):
        return self.whole and self.usage and self.usage["completion_tokens"] == self.tokens

    def cut(self):
        """Closes the connection in the middle of the answer."""
        if self.connection.sock:
            self.connection.sock.shutdown(socket.SHUT_RDWR)
        self.join()
        self.connection.close()


def streams_in_flight(router, replicas, count, lengths=(600, 1800, 3600)):
    """Returns `count` streams that have all begun, none of which has ended, and which the
    replicas count as running; they must run nothing else. Tries longer answers if needed."""

    def counted():
        # A token may arrive before the gauge counts its request.
        return sum(replica.running() for replica in replicas) == count

    for tokens in lengths:
        streams = [Stream(router, tokens) for _ in range(count)]
        for stream in streams:
            stream.has_begun()

        def one_has_ended():
            return any(stream.ended() for stream in streams)

        until("the streams are counted", lambda: one_has_ended() or counted())
        if not one_has_ended():
            return streams
        for stream in streams:
            stream.join()
    raise Failed("streams end before the last one of them has begun")


def traffic_spreads(router, replicas):
    before = [replica.succeeded() for replica in replicas]
    for _ in range(8):
        status, text = router.complete()
        check(status == 200, f"{status}: {text}")

    def shares():
        now = [replica.succeeded() - was for replica, was in zip(replicas, before)]
        return now if sum(now) == 8 else None

    shares = until("8 requests are counted", shares)
    check(min(shares) >= 2, f"of 8 requests the replicas had {shares}")
    return f"8 requests, by replica {shares}"


def streaming_works(router, replicas):
    direct = json.loads(replicas[0].complete(48)[1])["choices"][0]["text"]
    stream = Stream(router, 48)
    stream.join()
    check(stream.is_complete(), f"the stream is not whole: {stream.problem}")
    check(stream.text == direct, f"streamed {stream.text!r}, expected {direct!r}")
    return "48 tokens, the same as from a replica itself"


def a_disconnect_frees_the_blocks(router, replicas):
    def disconnects():
        return sum(replica.disconnects() for replica in replicas)

    def all_hold_nothing():
        return all(replica.holds_nothing() for replica in replicas)

    before = disconnects()
    # None of these streams ends by itself.
    for stream in streams_in_flight(router, replicas, 4, [7200]):
        stream.cut()
    until("the cut streams hold nothing", all_hold_nothing)
    until("4 disconnects are counted", lambda: disconnects() == before + 4)

    # A client that disconnects before there is anything to read.
    connection = router.connection()
    kind = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(question(7200)), kind)
    until("it runs", lambda: any(replica.running() for replica in replicas))
    connection.close()
    until("its replica holds nothing", all_hold_nothing)
    until("5 disconnects are counted", lambda: disconnects() == before + 5)
    return "4 streams and one answer in one piece, no block is held"


def a_killed_replica_loses_only_its_own(router, replicas):
    victim, other = replicas
    streams = streams_in_flight(router, replicas, 6)
    running = victim.running()
    check(0 < running < 6, f"the replica to be killed runs {running} of 6 streams")
    # No part of a non-streamed answer has been sent yet, so the router can retry.
    answers = []
    ask = [
        threading.Thread(target=lambda: answers.append(router.complete(400)), daemon=True)
        for _ in replicas
    ]
    for asking in ask:
        asking.start()
    until("it runs one of these, too", lambda: answers or victim.running() > running)
    victim.process.kill()
    victim.process.wait()
    for ending in [*streams, *ask]:
        ending.join()
    lost = sum(not stream.is_complete() for stream in streams)
    # Fewer streams are lost if one ended just before.
    check(0 < lost <= running, f"it ran {running} of 6 streams, {lost} are not whole")
    for status, text in answers:
        check(status == 200, f"an answer in one piece is lost: {status}: {text}")
    until("the router has noticed", lambda: not router.uses(victim))
    for _ in range(6):
        status, text = router.complete()
        check(status == 200, f"after a replica has died: {status}: {text}")
    until("the other replica holds nothing", other.holds_nothing)
    return f"{lost} of 6 streams lost, no answer in one piece, then none of 6 requests"


def a_replica_that_comes_back_is_used(router, replicas):
    back = replicas[0]
    back.start()
    until("the router has noticed", lambda: router.uses(back))

    def is_asked():
        status, text = router.complete()
        check(status == 200, f"after a replica has come back: {status}: {text}")
        return back.succeeded() > 0

    until("it is asked", is_asked)
    return "on its old address"


def a_drain_loses_nothing(router, replicas):
    leaving, staying = replicas
    refused = []
    asked = 0
    over = threading.Event()

    def keep_asking():
        nonlocal asked
        while not over.is_set():
            status, text = router.complete()
            asked += 1
            if status != 200:
                refused.append(f"{status}: {text}")

    streams = streams_in_flight(router, replicas, 4)
    others = threading.Thread(target=keep_asking, daemon=True)
    others.start()
    until("others ask, too", lambda: asked)
    leaving.process.send_signal(signal.SIGTERM)
    until("/ready says no", lambda: leaving.get("/ready")[0] == 503)
    check(leaving.get("/health")[0] == 200, "/health must not fail while it drains")
    check(leaving.running() > 0, "it runs nothing, although its streams have not ended")

    before = staying.succeeded()
    for _ in range(6):
        status, text = router.complete()
        check(status == 200, f"while a replica drains: {status}: {text}")
    until("the other replica has had them", lambda: staying.succeeded() >= before + 6)
    for stream in streams:
        stream.join()
        check(stream.is_complete(), f"a stream was cut off by the drain: {stream.problem}")
    code = leaving.process.wait()
    check(code == 0, f"the drained replica ends with {code}")
    until("the router has noticed", lambda: not router.uses(leaving))
    over.set()
    others.join()
    check(asked > 0 and not refused, f"{len(refused)} of {asked} were refused: {refused[:3]}")
    return f"4 streams whole, none of {asked + 6} requests refused, ended with 0"


CHECKS = [
    traffic_spreads,
    streaming_works,
    a_disconnect_frees_the_blocks,
    a_killed_replica_loses_only_its_own,
    a_replica_that_comes_back_is_used,
    a_drain_loses_nothing,
]


def start(log):
    replicas = [Replica(log) for _ in range(2)]
    for _ in range(3):
        router = Router(replicas, log)
        until("the router serves", lambda: router.has_ended() or router.serves())
        # The router exits if another program has taken its port in the meantime.
        if not router.has_ended():
            until("it uses both", lambda: all(router.uses(replica) for replica in replicas))
            return router, replicas
    raise Failed(f"vllm-router ends with {router.process.returncode}")


def run(log):
    router, replicas = start(log)
    for holds in CHECKS:
        name = holds.__name__.replace("_", " ")
        try:
            print(f"ok: {name}: {holds(router, replicas)}", flush=True)
        except Failed as failed:
            raise Failed(f"{name}: {failed}") from failed
    last = replicas[1].process
    last.send_signal(signal.SIGTERM)
    check(last.wait() == 0, f"the last replica ends with {last.returncode}")


def main():
    for number in [signal.SIGALRM, signal.SIGTERM]:
        signal.signal(number, stop)
    signal.alarm(TIME)
    with tempfile.TemporaryFile("w+") as log:
        try:
            run(log)
        except Failed as failed:
            log.seek(0)
            print("".join(log.readlines()[-60:]), file=sys.stderr)
            sys.exit(f"failed: {failed}")
        finally:
            for process in Program.started:
                process.kill()
                process.wait()


if __name__ == "__main__":
    main()
