"""Shared code of the scripts in this folder: the pack of programs that they run, on the
machine that built it or on one that has a GPU but no Rust.
"""

import datetime
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PACK = ROOT / "target" / "gpu"
PROGRAMS = PACK / "bin"
ARCHIVE = PACK / "pack.tar.xz"
MANIFEST = PROGRAMS / "manifest.json"
# Where the tests write the results of the kernels.
RECORDED = PACK / "recorded"
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
# Size of the parts of the model, for transfers with a size limit.
MODEL_PART = 32 << 20
# Time limit of a whole script: what a borrowed machine allows per command, minus a margin.
LIMIT_SECONDS = 570


def say(text):
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr, flush=True)


def manifest():
    """Returns the manifest of the programs. Unpacks them, or builds them if Rust is
    installed."""
    if ARCHIVE.exists() and (not MANIFEST.exists() or ARCHIVE.stat().st_mtime > MANIFEST.stat().st_mtime):
        say(f"unpacking {ARCHIVE.relative_to(ROOT)}")
        shutil.rmtree(PROGRAMS, ignore_errors=True)
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(PACK, filter="data")
        MANIFEST.touch()
    if not MANIFEST.exists():
        if not shutil.which("cargo"):
            sys.exit("the programs are missing: run scripts/gpu/pack where Rust is, and bring target/gpu along")
        subprocess.run([sys.executable, Path(__file__).parent / "pack"], check=True)
    found = json.loads(MANIFEST.read_text())
    adopt(Path(found["root"]))
    return found


def adopt(built):
    """Makes this checkout available at the path where the programs were built, since that
    path is compiled into them."""
    try:
        if not built.exists():
            built.parent.mkdir(parents=True, exist_ok=True)
            built.symlink_to(ROOT)
    except OSError as error:
        sys.exit(f"the programs were built in {built}, which must be a link to {ROOT}: {error}")


def model():
    """Returns the path of the demo's model, joined from its parts if necessary, or None."""
    parts = sorted(PACK.glob("model.*"))
    if not MODEL.exists() and parts:
        MODEL.parent.mkdir(exist_ok=True)
        with open(MODEL, "wb") as whole:
            for part in parts:
                whole.write(part.read_bytes())
    return MODEL if MODEL.exists() else None


def environment(virtual):
    """Returns an environment in which the programs find the chosen GPU."""
    variables = dict(os.environ, QUELL_TEST_GPU="virtual" if virtual else "real")
    variables["RUST_BACKTRACE"] = "0"
    if found := model():
        variables["QUELL_TEST_MODEL"] = str(found)
    if virtual:
        folder = PACK / "virtual"
        folder.mkdir(exist_ok=True)
        for name in ["libcuda.so", "libcuda.so.1"]:
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(PROGRAMS / "libvirtual_gpu.so")
        variables["LD_LIBRARY_PATH"] = str(folder)
    return variables


def device(variables, virtual):
    """Describes the GPU, using `quell inspect` and nvidia-smi. Exits if there is none."""
    command = [PROGRAMS / "quell", "inspect", "--device", "cuda", "--format", "json"]
    result = subprocess.run(command, env=variables, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{Path(sys.argv[0]).name}: there is no GPU to use: {result.stderr.strip()}")
    found = {"virtual": virtual, **json.loads(result.stdout)["device_details"]}
    if not virtual and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
        found["nvidia_smi"] = lines[0] if lines else None
    return found


class Clock:
    """Measures the time spent and the time left of `limit` seconds."""

    def __init__(self, limit=LIMIT_SECONDS):
        self.begin, self.limit = time.monotonic(), limit

    def spent(self):
        return time.monotonic() - self.begin

    def left(self):
        return self.limit - self.spent()


def run(command, variables, seconds):
    """Runs a program for at most `seconds`. Returns its exit code (None after a timeout),
    its output, its error output, and the time taken."""
    begin = time.monotonic()
    try:
        result = subprocess.run(
            list(map(str, command)), env=variables, capture_output=True, text=True, timeout=max(seconds, 1)
        )
        code, out, error = result.returncode, result.stdout, result.stderr
    except subprocess.TimeoutExpired as expired:
        text = lambda data: (data or b"").decode(errors="replace") if not isinstance(data, str) else data
        code, out, error = None, text(expired.stdout), text(expired.stderr)
    return code, out, error, time.monotonic() - begin


def outcome(code, out, seconds):
    """Returns the result of a module of tests, which must have run a test and failed none."""
    counts = re.search(r"test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored", out)
    passed, failed, ignored = map(int, counts.groups()) if counts else (0, 0, 0)
    if code is None:
        state = "out of time"
    else:
        state = "passed" if code == 0 and passed > 0 and ignored == 0 else "failed"
    return {"state": state, "passed": passed, "failed": failed, "seconds": round(seconds, 1)}


def pack_recorded(folder):
    """Writes recorded.tar, the recorded results of the kernels, and returns their number."""
    files = sorted(RECORDED.glob("*.f32"))
    with tarfile.open(folder / "recorded.tar", "w") as archive:
        for file in files:
            archive.add(file, f"gpu/{file.name}")
    return len(files)


def bench_model(settings, weights, arguments, small, repetitions):
    """Returns the command that measures a model with random weights. `settings` is a name that
    `quell bench` knows, or a config.json of this checkout."""
    model = ROOT / settings if settings.endswith(".json") else settings
    command = [PROGRAMS / "quell", "bench", "--random-weights", model, "--weights-format", weights]
    command += ["--device", "cuda", "--format", "json", *arguments]
    if small:
        return command + ["--repetitions", "1", "--max-batch-tokens", "64", "--context", "128", "--kv-cache-mib", "4"]
    return command + ["--repetitions", str(repetitions), "--max-batch-tokens", "2048", "--context", "4096"]


def add_text(archive, name, text):
    """Adds a file with this text to a tar archive."""
    data = text.encode()
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def header(built, found):
    """Returns the fields that every result begins with."""
    return {
        "device": found,
        "commit": built["commit"],
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def write(path, results):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    say(f"results are in {path}")
