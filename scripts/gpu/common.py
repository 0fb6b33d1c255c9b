"""What the scripts of this folder share: the pack of programs that they run, on the
machine that built them or on one that has a GPU and no Rust.
"""

import datetime
import json
import os
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
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
# Parts that a transfer of limited size takes.
MODEL_PART = 32 << 20
# Of a whole script: what a lent machine runs a command for, and some to spare.
LIMIT_SECONDS = 570


def say(text):
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr, flush=True)


def manifest():
    """What the programs were built of. Unpacks them, or builds them where Rust is."""
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
    """Makes this checkout reachable where the programs expect it: they were built in a
    folder whose path is part of them."""
    try:
        if not built.exists():
            built.parent.mkdir(parents=True, exist_ok=True)
            built.symlink_to(ROOT)
    except OSError as error:
        sys.exit(f"the programs were built in {built}, which must be a link to {ROOT}: {error}")
    program = built / "target" / "debug" / "quell"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        program.symlink_to(PROGRAMS / "quell")


def model():
    """The path of the demo's model, put together of its parts if need be; or None."""
    parts = sorted(PACK.glob("model.*"))
    if not MODEL.exists() and parts:
        MODEL.parent.mkdir(exist_ok=True)
        with open(MODEL, "wb") as whole:
            for part in parts:
                whole.write(part.read_bytes())
    return MODEL if MODEL.exists() else None


def environment(virtual):
    """The environment in which the programs find the GPU that is meant."""
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
    """What the GPU is, by `quell inspect` and nvidia-smi; ends the script without one."""
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
    """The time that is left."""

    def __init__(self):
        self.begin = time.monotonic()

    def spent(self):
        return time.monotonic() - self.begin

    def left(self):
        return LIMIT_SECONDS - self.spent()


def run(command, variables, seconds):
    """Runs a program for at most so long; gives exit code (None if it took longer), output
    and errors, and time."""
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


def header(built, found):
    """What every result begins with."""
    return {
        "device": found,
        "commit": built["commit"],
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def write(path, results):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    say(f"results are in {path}")
