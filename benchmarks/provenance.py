"""The provenance of a result. Nothing in it names the machine's owner, its network or its folders."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

import torch

import fusedrnn

_ROOT = Path(__file__).resolve().parents[1]
_NOTE = Path("build") / "checkout.json"
_PACKAGES = ("torch", "triton", "onnxruntime", "flashrnn", "haste_pytorch")


def collect(device: str) -> dict[str, str]:
    """Names and values; "" for missing ones."""
    commit, changes = _checkout()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": changes,
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": str(torch.multiprocessing.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "isa": _instruction_set(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "",
        "driver": _nvidia_smi("driver_version") if device == "cuda" else "",
        "clocks": _nvidia_smi("clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem") if device == "cuda" else "",
        "cuda": torch.version.cuda or "",
        "cudnn": str(torch.backends.cudnn.version() or ""),
        "python": platform.python_version(),
        "fusedrnn": fusedrnn.__version__,
        **{package: _version(package) for package in _PACKAGES},
    }


def remember() -> Path:
    """Notes commit and changes in build/checkout.json, for a copy of the tree that has no history.

    Raises:
        RuntimeError: this is no checkout with a history either.
    """
    commit, changes = _from_git()
    if not commit:
        raise RuntimeError("this is not a checkout with its history, so there is no commit to note")
    path = _ROOT / _NOTE
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"commit": commit, "dirty": changes, "digest": _digest()}) + "\n", encoding="utf-8")
    return path


def _checkout() -> tuple[str, str]:
    """The commit, and "yes" or "no" for changes in the tree; "" where this is not a checkout, nor a copy of one."""
    if not (_ROOT / "setup.py").is_file():
        return "", ""
    commit, changes = _from_git()
    if commit or not (_ROOT / _NOTE).is_file():
        return commit, changes
    note = json.loads((_ROOT / _NOTE).read_text(encoding="utf-8"))
    return note["commit"], note["dirty"] if note["digest"] == _digest() else "yes"


def _from_git() -> tuple[str, str]:
    commit = _output("git", "rev-parse", "HEAD", folder=_ROOT)
    changes = _output("git", "--no-optional-locks", "status", "--porcelain", folder=_ROOT)
    return commit or "", "" if changes is None else "yes" if changes else "no"


def _digest() -> str:
    """A digest of all sources of the package."""
    digest = hashlib.sha256()
    for folder in ("fusedrnn", "kernels", "benchmarks", "csrc"):
        for path in sorted((_ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
                digest.update(path.relative_to(_ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str:
    if package == "torch":
        return str(torch.__version__)  # with its build, +cu130 or +cpu, which the name of its package may be without
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _instruction_set() -> str:
    if fusedrnn.backends()["cpu"] is not None:
        return ""
    return torch.ops.fusedrnn.cpu_isa(None)


def _nvidia_smi(query: str) -> str:
    """Facts about the first GPU, from the driver."""
    found = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    return found.splitlines()[0] if found else ""


def _output(*command: str, folder: Path | None = None) -> str | None:
    """The output of a program, or None if it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
