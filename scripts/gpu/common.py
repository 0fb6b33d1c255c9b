"""Shared code of the scripts in this folder.

`Pack` is the set of programs that the scripts run, on the machine that built it or on one that
has a GPU but no Rust. `Session` runs these programs, each with a time limit, and writes the
results after each of them.
"""

import datetime
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
TARGET = ROOT / "target" / "gpu"
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
# Size of the parts of the model, for transfers with a size limit.
MODEL_PART = 32 << 20
# Seconds: an item with less time left is skipped, and a script reserves as much for itself.
LEAST = 2
# Seconds to wait for a killed program to end.
KILLED = 5
# Limit in seconds of the plot.
ROOFLINE = 30
# Characters that are kept of the beginning, and of the end, of the output of a program that failed.
KEPT = 64 << 10


def name():
    """Returns the name of the running script."""
    return Path(sys.argv[0]).name


def say(text):
    print(f"{name()}: {text}", file=sys.stderr, flush=True)


class Pack:
    """The programs that scripts/gpu/pack builds, in a folder."""

    def __init__(self, folder=TARGET):
        self.folder = folder
        self.programs = folder / "bin"
        self.archive = folder / "pack.tar.xz"
        self.file = self.programs / "manifest.json"
        # Where the tests write the results of the kernels.
        self.recorded = folder / "recorded"

    def manifest(self):
        """Returns the manifest of the programs, after unpacking them or, if Rust is installed,
        building them."""
        newer = lambda: self.archive.stat().st_mtime > self.file.stat().st_mtime
        if self.archive.exists() and (not self.file.exists() or newer()):
            say(f"unpacking {self.archive}")
            shutil.rmtree(self.programs, ignore_errors=True)
            with tarfile.open(self.archive) as archive:
                archive.extractall(self.folder, filter="data")
            self.file.touch()
        if not self.file.exists():
            if not shutil.which("cargo") or self.folder != TARGET:
                sys.exit(
                    f"{name()}: there are no programs in {self.programs}: run scripts/gpu/pack "
                    "where Rust is, and bring target/gpu along"
                )
            subprocess.run([sys.executable, Path(__file__).parent / "pack"], check=True)
        found = json.loads(self.file.read_text())
        adopt(Path(found["root"]))
        return found

    def model(self):
        """Returns the path of the demo's model, or None. Joins the model from its parts if necessary."""
        parts = sorted(self.folder.glob("model.*"))
        if not MODEL.exists() and parts:
            MODEL.parent.mkdir(exist_ok=True)
            with open(MODEL, "wb") as whole:
                for part in parts:
                    whole.write(part.read_bytes())
        return MODEL if MODEL.exists() else None

    def environment(self, virtual):
        """Returns an environment in which the programs find the chosen GPU."""
        variables = dict(os.environ, QUELL_TEST_GPU="virtual" if virtual else "real")
        variables["RUST_BACKTRACE"] = "0"
        # The driver's cache of what it compiles from PTX. By default it is in the home folder, which
        # may not be writable.
        cache = Path(variables.setdefault("CUDA_CACHE_PATH", str(self.folder / "cache")))
        try:
            cache.mkdir(parents=True, exist_ok=True)
            if not os.access(cache, os.W_OK | os.X_OK):
                raise OSError("no permission")
        except OSError as error:
            say(f"the driver keeps nothing that it compiles, because {cache} cannot be written: {error}")
            variables["CUDA_CACHE_DISABLE"] = "1"
        if found := self.model():
            variables["QUELL_TEST_MODEL"] = str(found)
        if virtual:
            folder = self.folder / "virtual"
            folder.mkdir(exist_ok=True)
            for library in ["libcuda.so", "libcuda.so.1"]:
                (folder / library).unlink(missing_ok=True)
                (folder / library).symlink_to(self.programs / "libvirtual_gpu.so")
            variables["LD_LIBRARY_PATH"] = str(folder)
        return variables


def adopt(built):
    """Makes this checkout available at the path where the programs were built, because that
    path is compiled into them."""
    try:
        if not built.exists():
            built.parent.mkdir(parents=True, exist_ok=True)
            built.symlink_to(ROOT)
    except OSError as error:
        sys.exit(f"{name()}: the programs were built in {built}, which must be a link to {ROOT}: {error}")


class Ran(NamedTuple):
    """How a run of a program ended."""

    # None if it was killed because it exceeded its time limit.
    code: int | None
    out: str
    error: str
    seconds: float

    def state(self):
        if self.code is None:
            return "out of time"
        if self.code < 0:
            return f"ended by {signal.Signals(-self.code).name}"
        return "done" if self.code == 0 else f"exit code {self.code}"


def run(command, variables, seconds):
    """Runs a program for at most `seconds`, and then kills its children, too."""
    begin = time.monotonic()
    # Files instead of pipes, because a remaining child would keep a pipe open.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
        process = subprocess.Popen(
            list(map(str, command)),
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=error,
            start_new_session=True,
        )
        try:
            code = process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            code = None
        # The group also holds the children that a crashed program leaves behind.
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        if code is None:
            try:
                process.wait(KILLED)
            except subprocess.TimeoutExpired:
                error.write(b"\nit could not be killed: the driver may hang\n")
        out.seek(0)
        error.seek(0)
        text = [file.read().decode(errors="replace") for file in (out, error)]
    return Ran(code, *text, time.monotonic() - begin)


def outcome(ran):
    """Returns the result of a module of tests. It passes if at least one test ran and none failed."""
    counts = re.search(r"test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored", ran.out)
    passed, failed, ignored = map(int, counts.groups()) if counts else (0, 0, 0)
    good = ran.code == 0 and passed > 0 and ignored == 0
    state = "passed" if good else "out of time" if ran.code is None else "failed"
    found = {"state": state, "passed": passed, "failed": failed, "seconds": round(ran.seconds, 1)}
    if names := re.findall(r"^test (\S+) \.\.\. FAILED$", ran.out, re.MULTILINE):
        found["failures"] = names
    return found


class Session:
    """A run of a script, which runs programs one after the other within its time limit. After each
    program, the results are written to NAME.json, and the output of failed programs to logs.tar."""

    def __init__(self, arguments, usual):
        self.pack = Pack(arguments.pack)
        built = self.pack.manifest()
        # The time for building the programs is not part of the limit.
        self.begin, self.limit = time.monotonic(), arguments.seconds
        self.usual = usual
        self.folder, self.virtual, self.small = arguments.out, arguments.virtual, arguments.small
        if self.folder is None:
            self.folder = self.pack.folder / "results"
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in ["logs.tar", "roofline.svg"]:
            (self.folder / old).unlink(missing_ok=True)
        self.file = self.folder / f"{name()}.json"
        self.built = built
        self.variables = self.pack.environment(self.virtual)
        self.logs = {}
        self.results = {
            "commit": built["commit"],
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "optimised": built["optimised"],
            # Stays false until the script has ended, because the machine may go away at any time.
            "finished": False,
            "ok": False,
            "items": [],
            "left_out": [],
            "problems": [],
        }
        self.write()

    def spent(self):
        return time.monotonic() - self.begin

    def left(self):
        """Returns the seconds that a program may still run."""
        return self.limit - self.spent() - LEAST

    def scaled(self, seconds):
        """Returns the limit of a part in proportion to the script's limit. `seconds` is for the usual one."""
        return max(seconds * self.limit / self.usual, 2 * LEAST)

    def end(self, seconds):
        """Returns the value of `spent` at which a part that may take `seconds` must end."""
        return self.spent() + self.scaled(seconds)

    def item(self, what, seconds, command, variables=None, may_fail=False, end=float("inf")):
        """Runs a program for at most `seconds`, but not beyond `end`. Returns None if no time is
        left. Records a problem if the program fails or does not end in time."""
        allowed = min(self.scaled(seconds), self.left(), end - self.spent())
        if allowed < LEAST:
            self.leave_out(what, "no time was left")
            return None
        try:
            ran = run(command, variables or self.variables, allowed)
        except OSError as error:
            ran = Ran(127, "", str(error), 0.0)
        state = "not available" if may_fail and ran.code != 0 else ran.state()
        entry = {"name": what, "state": state, "seconds": round(ran.seconds, 1)}
        self.results["items"].append(entry)
        say(f"{what}: {state}, {ran.seconds:.1f} s")
        if ran.code != 0:
            self.log(what, ran.out + ran.error)
            if not may_fail:
                last = (ran.error.strip().splitlines() or ["it said nothing"])[-1]
                self.results["problems"].append(f"{what}: {state}: {last[:300]}")
        self.write()
        return ran

    def json(self, what, seconds, command, end=float("inf")):
        """Runs a program that prints JSON, and returns the parsed JSON or None."""
        ran = self.item(what, seconds, command, end=end)
        if ran is None or ran.code is None:
            return None
        try:
            return json.loads(ran.out)
        except json.JSONDecodeError as error:
            if ran.code == 0:
                self.problem(f"{what}: its output is not JSON: {error}")
                self.log(what, ran.out + ran.error)
            return None

    def leave_out(self, what, reason):
        self.results["left_out"].append(f"{what}: {reason}")
        say(self.results["left_out"][-1])
        self.write()

    def problem(self, text):
        self.results["problems"].append(text)
        say(text)
        self.write()

    def log(self, what, text):
        if len(text) > 2 * KEPT:
            text = f"{text[:KEPT]}\n[…]\n{text[-KEPT:]}"
        self.logs[what] = text

    def part(self, work, *arguments):
        """Runs a part of the script. If it raises an exception, the other parts still run."""
        try:
            work(*arguments)
        except Exception as error:  # the results so far must not be lost, whatever the error
            self.log(f"{work.__name__} of {name()}", traceback.format_exc())
            self.problem(f"{work.__name__}: {type(error).__name__}: {error}")

    def write(self):
        """Writes the results so far."""
        self.results["seconds"] = round(self.spent())
        write_file(self.file, json.dumps(self.results, indent=1) + "\n")
        if self.logs:
            with tarfile.open(self.folder / "logs.tar", "w") as archive:
                for what, text in self.logs.items():
                    add_text(archive, re.sub(r"[^\w.]+", "-", what) + ".log", text)

    def describe_device(self, seconds):
        """Describes the GPU. Ends the script if that fails, because then there is no usable GPU."""
        command = [self.pack.programs / "quell", "inspect", "--device", "cuda", "--format", "json"]
        found = self.json("description of the GPU", seconds, command)
        if found is None:
            self.finish(False)
        self.results["device"] = {"virtual": self.virtual, **found["device_details"]}
        if not self.virtual and shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
            ran = self.item("nvidia-smi", seconds, query, may_fail=True)
            if ran and ran.code == 0 and ran.out:
                self.results["device"]["nvidia_smi"] = ran.out.splitlines()[0]
        self.write()

    def test(self, module, seconds, variables=None, end=float("inf")):
        """Runs a module of the CUDA tests."""
        command = [self.pack.programs / "cuda", f"{module}::"]
        ran = self.item(f"test {module}", seconds, command, variables, end=end)
        if ran:
            found = outcome(ran)
            if ran.code == 0 and found["state"] == "failed":
                self.problem(f"test {module}: no test ran, or some were ignored")
            self.results.setdefault("tests", []).append({"name": module, **found})
            self.write()

    def record(self, seconds):
        """Records the results of the kernels, and packs them in recorded.tar."""
        shutil.rmtree(self.pack.recorded, ignore_errors=True)
        self.test("recorded", seconds, dict(self.variables, QUELL_RECORD=str(self.pack.recorded)))
        files = sorted(self.pack.recorded.glob("*.f32"))
        with tarfile.open(self.folder / "recorded.tar", "w") as archive:
            for file in files:
                archive.add(file, f"gpu/{file.name}")
        self.results["recorded"] = len(files)
        if not files:
            self.problem("nothing was recorded")
        self.write()

    def kernels(self, seconds, arguments):
        """Measures kernels. If the time runs out, keeps what was measured before."""
        file = self.folder / "kernels.json"
        file.unlink(missing_ok=True)
        # The program stops by itself after three quarters of the time, unless a kernel hangs.
        command = [self.pack.programs / "kernels", "--write", file, *arguments]
        command += ["--seconds", str(round(self.scaled(seconds) * 3 / 4))] + ["--small"] * self.small
        self.item("kernels", seconds, command)
        self.results["kernels"] = []
        if file.exists():
            report = json.loads(file.read_text())
            file.unlink()
            self.results |= {key: report[key] for key in ("copy_tb_per_s", "kernels")}
            self.results["kernels_left_out"] = report["left_out"]
        self.write()

    def model(self, settings, weights, arguments, seconds, repetitions, end=float("inf")):
        """Measures a model with random weights, for at most `seconds`. `settings` is the name of a
        model that is built into `quell bench`, or a config.json of this checkout."""
        what = ROOT / settings if settings.endswith(".json") else settings
        command = [self.pack.programs / "quell", "bench", "--random-weights", what, "--weights-format", weights]
        command += ["--device", "cuda", "--format", "json", *arguments]
        if self.small:
            command += ["--repetitions", "1", "--max-batch-tokens", "64", "--context", "128", "--kv-cache-mib", "4"]
        else:
            command += ["--repetitions", str(repetitions), "--max-batch-tokens", "2048", "--context", "4096"]
        shown = {"model": settings, "weights": weights, "arguments": " ".join(arguments)}
        if report := self.json(" ".join(shown.values()), seconds, command, end):
            self.results.setdefault("models", []).append(shown | {"figures": report["figures"]})
            self.write()

    def peers(self, what, kernels, seconds):
        """Measures the limits of the GPU, and the operations of `kernels`, in PyTorch. Returns
        `kernels` with the times added."""
        asked = self.folder / "asked.json"
        asked.write_text(json.dumps(kernels))
        limit = min(self.scaled(seconds), self.left())
        script = Path(__file__).parent / "peers.py"
        # Measuring a single equivalent takes seconds, and starting PyTorch takes some more.
        report = self.json(what, seconds, [sys.executable, script, asked, str(limit * 2 / 3)])
        asked.unlink()
        if report is None:
            return kernels
        if "left_out" in report:
            self.leave_out(what, report["left_out"])
            return kernels
        self.results["pytorch"] = report["pytorch"]
        return report["kernels"]

    def compare(self, seconds):
        """Adds PyTorch's limits and times to the kernels."""
        self.results["kernels"] = self.peers("the same kernels in PyTorch", self.results.get("kernels", []), seconds)
        self.write()

    def plot(self):
        """Draws the kernels on the roofline of the GPU, unless it is the virtual GPU."""
        if self.virtual:
            self.leave_out("roofline", "the virtual GPU's times say nothing about a GPU")
            return
        script = Path(__file__).parent / "roofline"
        self.item("roofline", ROOFLINE, [sys.executable, script, self.file, self.folder / "roofline.svg"])

    def finish(self, good):
        """Writes the last results and ends the script. It succeeds if `good` and if there was no
        problem."""
        self.results["ok"] = good and not self.results["problems"]
        self.results["finished"] = True
        self.write()
        say(f"results are in {self.folder}")
        if not self.results["ok"]:
            problems = self.results["problems"] or self.results["left_out"]
            sys.exit(f"{name()}: failed: " + ("; ".join(problems) or "nothing was measured"))
        sys.exit()


def arguments(parser, seconds):
    """Adds the arguments that all scripts have to a parser, and parses the command line."""
    parser.add_argument("--out", type=Path, help="folder for the results [results/ in the folder of the programs]")
    parser.add_argument("--pack", type=Path, default=TARGET, help="folder of the programs [target/gpu]")
    parser.add_argument("--seconds", type=float, default=seconds, help=f"time limit of the whole script [{seconds}]")
    parser.add_argument("--virtual", action="store_true", help="run on the virtual GPU")
    parser.add_argument("--small", action="store_true", help="run only items that take seconds on the virtual GPU")
    parsed = parser.parse_args()
    parsed.pack = parsed.pack.resolve()
    return parsed


def write_file(path, text):
    """Writes a file atomically, so that it is never seen half written."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.replace(path)


def add_text(archive, member, text):
    """Adds a file with this text to a tar archive."""
    data = text.encode()
    entry = tarfile.TarInfo(member)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))
