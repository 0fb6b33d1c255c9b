"""Fetches NVIDIA's compilers from pinned PyPI wheels, for the scripts here and in the folder above.

No CUDA toolkit has to be installed. A wheel is downloaded once into target/, checked
against its SHA-256, and unpacked there. A broken or interrupted download is fetched
again. Works on Linux on x86-64 only, for which the wheels below are built.
"""

import hashlib
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
TARGET = ROOT / "target"


# Prefix, in an image, of an instruction that only newer GPUs have; see `for_architecture`.
NEWER = "// sm_90: "


class Wheel(NamedTuple):
    """A file on PyPI: the requirement that names it, and its SHA-256."""

    requirement: str
    sha256: str


# Compiles CUDA C++ to PTX ISA 8.4, which drivers since 550 support.
NVRTC = [
    Wheel("nvidia-cuda-nvrtc-cu12==12.4.127", "a178759ebb095827bd30ef56598ec182b85547f1508941a3d560eb7ea1fbf338"),
    Wheel("nvidia-cuda-runtime-cu12==12.4.127", "64403288fa2136ee8e467cdc9c9427e0434110899d07c779f25b5c068934faa5"),
]

# ptxas, the assembler, without the rest of nvcc.
PTXAS = [
    Wheel("nvidia-cuda-nvcc==13.0.88", "56fe502eb77625a12f25172caa3cdddb4e4c8ba2c8c17dba44b164761b380f03"),
]

# The disassembler, which counts of instructions need.
NVDISASM = [
    Wheel("nvidia-cuda-nvdisasm==13.2.86", "53606e719ecae07a2335f95902d5a1393a0cc1c317499ee7ffcf628a44385f2c"),
]


def say(text):
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)


def unpacked(wheels, folder):
    """Returns the folder target/FOLDER/nvidia with the contents of `wheels`, which are fetched if
    necessary."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        found = f"{sys.platform} on {platform.machine()}"
        sys.exit(f"{Path(sys.argv[0]).name}: the compilers are for Linux on x86-64; this is {found}")
    home = TARGET / folder
    for wheel in wheels:
        # Written last, to show that the wheel has been unpacked completely.
        done = home / f"{wheel.sha256[:16]}.unpacked"
        if not done.exists():
            archive = fetch(wheel, home / "download")
            with zipfile.ZipFile(archive) as contents:
                for member in contents.infolist():
                    path = contents.extract(member, home)
                    if (mode := member.external_attr >> 16) and not member.is_dir():
                        Path(path).chmod(mode & 0o777 | 0o600)
            shutil.rmtree(home / "download")
            done.touch()
    return home / "nvidia"


def fetch(wheel, folder):
    """Downloads and checks a wheel, and returns its path."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    say(f"downloading {wheel.requirement} from PyPI")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--platform", "manylinux2014_x86_64", "--dest", str(folder)]
    if subprocess.run(command + [wheel.requirement], stdout=sys.stderr).returncode != 0:
        sys.exit(f"{Path(sys.argv[0]).name}: {wheel.requirement} could not be downloaded; run this again")
    [archive] = folder.glob("*.whl")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != wheel.sha256:
        sys.exit(f"{Path(sys.argv[0]).name}: {archive.name} has SHA-256 {digest}, but must have {wheel.sha256}")
    return archive


def for_architecture(ptx, architecture):
    """Returns the text of an image as it is to be assembled for an architecture such as sm_90.

    The loader (src/device/cuda/overlap.rs) does the same.
    """
    if int(re.fullmatch(r"sm_(\d+)a?", architecture)[1]) < 90:
        return ptx
    return ptx.replace(NEWER, "").replace(".target sm_80", ".target sm_90", 1)


def ptxas():
    """Returns the path of ptxas."""
    return unpacked(PTXAS, "nvcc") / "cu13" / "bin" / "ptxas"


def nvdisasm():
    """Returns the path of nvdisasm."""
    return unpacked(NVDISASM, "nvdisasm") / "cu13" / "bin" / "nvdisasm"
