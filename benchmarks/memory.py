"""The memory of this process: what becomes of it when it is freed, and how much of it a call takes."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import torch

from fusedrnn import testing

# Of glibc's malloc.h: what mallopt sets, and to what. By itself glibc begins with 128 KiB for both thresholds, and
# raises them with the largest piece that was ever freed.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
FREED = {
    "kept": {_TRIM_THRESHOLD: -1, _MMAP_MAX: 0},  # never goes back to the system
    "returned": {_TRIM_THRESHOLD: 128 * 1024, _MMAP_THRESHOLD: 128 * 1024},  # goes back as soon as it can
}


def settle(freed: str) -> str:
    """Says for the rest of this process what becomes of memory that is freed; only glibc lets itself be told.

    Left to itself it decides by all that was freed before: the same call then finds its memory again, or thousands of
    new pages, by which cells and contenders came before it.

    Args:
        freed: a name of `FREED`.

    Returns:
        The name, or "" where it could not be said.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return ""
    return freed if all(mallopt(what, value) for what, value in FREED[freed].items()) else ""


def peak_bytes(work: Callable[[], object], device: str) -> int | None:
    """How far one call raises the memory in use above what there was before it.

    On a GPU it is torch's allocator that counts. On the CPU it is the resident memory of the process, by whichever
    allocator, which Linux alone tells: None elsewhere.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    process = Path("/proc/self")
    try:
        # What was kept or freed goes back to the system, or using it again would not be seen.
        with testing.nothing_kept():
            pass
        ctypes.CDLL(None).malloc_trim(0)
        (process / "clear_refs").write_text("5")  # the peak starts anew from what is resident now
        before = _status_bytes(process, "VmRSS")
        work()
        return max(_status_bytes(process, "VmHWM") - before, 0)
    except (OSError, AttributeError):
        return None


def _status_bytes(process: Path, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", (process / "status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"the kernel does not tell {name}")
    return int(found[1]) * 1024
