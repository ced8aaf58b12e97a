"""The identity of a machine in profiles of measured times."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from .. import ops

_VENDORS = {"GenuineIntel": "intel", "AuthenticAMD": "amd"}


@dataclass(frozen=True)
class Machine:
    """A CPU or a GPU, and its class: devices that are expected to perform alike."""

    device: str  # a device type, "cpu" or "cuda"
    family: (
        str  # the class: vendor and instruction set of a CPU ("intel-amx"), the card of a GPU ("nvidia-h100-80gb-hbm3")
    )
    model: str  # the class with a CPU's family and model number ("intel-amx-6-207")
    name: str  # the vendor's name


def here(device: str) -> Machine:
    """The machine of this process; of "cuda" the current GPU.

    The instruction set of a CPU is that of the `cpu` backend, so FUSEDRNN_CPU_ISA changes the class.
    """
    if device == "cuda":
        name = torch.cuda.get_device_name()
        return Machine(device, slug(name), slug(name), name)
    return _cpu(os.environ.get("FUSEDRNN_CPU_ISA", ""))


@cache
def _cpu(_: str) -> Machine:
    facts = _cpuinfo()
    vendor = _VENDORS.get(facts.get("vendor_id", ""), "") or slug(facts.get("vendor_id", "") or platform.machine())
    family = f"{vendor}-{instruction_set() or 'none'}"
    numbers = [facts[key] for key in ("cpu family", "model") if key in facts]
    return Machine("cpu", family, "-".join([family, *numbers]), facts.get("model name", "") or platform.processor())


def instruction_set() -> str | None:
    """The instruction set of the cpu backend; None if it is not available."""
    if ops.cpu_unavailable is not None:
        return None
    try:
        return torch.ops.fusedrnn.cpu_isa(None)
    except RuntimeError:  # FUSEDRNN_CPU_ISA names one that is not available
        return None


def slug(name: str) -> str:
    """A name with characters that are safe in file names."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def _cpuinfo() -> dict[str, str]:
    """/proc/cpuinfo of the first processor; empty if not on Linux."""
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}
