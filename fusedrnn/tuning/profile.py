"""Profiles: measured times of every backend and of torch's own layer on one device. Format and locations.

A profile is a JSON file, one measurement a line; docs/tuning.md describes it. An invalid file is a `ProfileError` with
a reason, which `find` returns for `explain` and `info`: no file can make an import or a call fail.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..cells import CELLS
from .machine import Machine

FORMAT = "fusedrnn profile"
VERSION = 1
PROFILE_VARIABLE = "FUSEDRNN_PROFILE"  # "none", or files, separated as in PATH
CACHE_VARIABLE = "FUSEDRNN_CACHE_DIR"
SHIPPED = Path(__file__).with_name("profiles")
BASELINE = "aten"  # torch's own layer
AHEAD = 1.03  # least ratio that counts as faster: two runs differ by more than the noise within one
_SIZES = ("T", "B", "I", "H", "L", "D")


class Key(NamedTuple):
    """One problem: what a measurement is of, or what a call needs."""

    dtype: str  # "float32", "bfloat16", ...; on a GPU "tf32" for float32 whose products are in TensorFloat-32
    train: bool  # forward and backward; False: inference
    T: int
    B: int
    I: int
    H: int
    L: int = 1
    D: int = 1
    step: bool = False  # a cell module such as LSTMCell; T is 1
    packed: bool = False  # a PackedSequence with sequences of different lengths
    projected: bool = False
    cell: str = "lstm"

    @property
    def kind(self) -> tuple[Any, ...]:
        """The part that must be equal for two keys to be comparable. A single time step is a separate kind."""
        return self.cell, self.dtype, self.train, self.step, self.packed, self.projected, self.T == 1

    @property
    def label(self) -> str:
        """Human-readable: the cell unless LSTM, sizes, and options that are not the default."""
        parts = [] if self.cell == "lstm" else [self.cell]
        parts += [f"{name} {getattr(self, name)}" for name in _SIZES[:4]]
        parts += [f"{self.L} layers"] if self.L > 1 else []
        parts += ["both directions"] if self.D > 1 else []
        parts += ["one step"] if self.step else []
        parts += [name for name in ("packed", "projected") if getattr(self, name)]
        return ", ".join([*parts, self.dtype, "training" if self.train else "inference"])


def baseline(cell: str) -> str:
    """The baseline: torch's own layer, or the reference for a cell that torch lacks."""
    return BASELINE if cell in CELLS else "reference"


class Ratio(NamedTuple):
    """The time of the baseline over that of a backend: above 1 the backend is faster."""

    low: float  # lower end of the confidence interval of the median
    median: float

    @property
    def decided(self) -> bool:
        """Whether all of that interval is on one side of `AHEAD`."""
        return self.low >= AHEAD or self.median**2 < AHEAD * self.low  # symmetric as a logarithm


@dataclass(frozen=True)
class Measurement:
    """The result for one key."""

    key: Key
    ms: dict[str, float] = field(default_factory=dict)  # backend -> the median time of a call; includes the baseline
    ratios: dict[str, Ratio] = field(
        default_factory=dict
    )  # backend -> the median of the ratios of neighbouring samples
    failures: dict[str, str] = field(default_factory=dict)  # backend -> wrong result, error, crash or hang
    samples: int = 0


@dataclass(frozen=True)
class Profile:
    """The measurements of one device; the last one of a key counts."""

    machine: Machine
    threads: int | None  # torch's, on a CPU
    provenance: dict[str, str]
    measurements: dict[Key, Measurement] = field(default_factory=dict)

    def with_added(self, more: Iterable[Measurement]) -> Profile:
        """A copy with more measurements, which replace those of the same keys."""
        merged = self.measurements | {m.key: m for m in more}
        return Profile(self.machine, self.threads, self.provenance, merged)


class ProfileError(ValueError):
    """A file is not a profile, or not one for this machine; the message says why."""


@dataclass(frozen=True)
class Source:
    """A profile and its origin."""

    profile: Profile
    path: Path
    origin: str  # "pinned", "own" or "shipped"
    note: str = ""  # differences: another thread count, another torch

    def __str__(self) -> str:
        what = {"pinned": "the profile given", "own": "measured on this machine", "shipped": "shipped with fusedrnn"}
        machine, threads = self.profile.machine, self.profile.threads
        count = f", {threads} thread{'s' if threads != 1 else ''}" if threads else ""
        note = f" ({self.note})" if self.note else ""
        return f"{self.path.name}: {what[self.origin]}, {machine.family}{count}{note}"


# Reading and writing.


def load(path: Path) -> Profile:
    """Reads a profile.

    Raises:
        ProfileError: the file cannot be read, is damaged, is not a profile, or has an unknown version.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f"it cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # neither UTF-8 nor JSON
        raise ProfileError(f"it is damaged: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ProfileError(f'it is no profile: "format" is not {FORMAT!r}')
    if document.get("version") != VERSION:
        raise ProfileError(f"it is of version {document.get('version')!r} of the format, and this reads {VERSION}")
    try:
        threads = document["threads"]
        measurements = [from_line(line) for line in document["measurements"]]
        return Profile(
            Machine(**{name: str(document["machine"][name]) for name in Machine.__dataclass_fields__}),
            None if threads is None else _count(threads),
            {str(name): str(value) for name, value in document["provenance"].items()},
            {m.key: m for m in measurements},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProfileError(f"it is damaged: {type(error).__name__}: {error}") from error


def save(profile: Profile, path: Path) -> None:
    """Writes a profile atomically.

    Raises:
        OSError: it cannot be written.
    """
    head = {
        "format": FORMAT,
        "version": VERSION,
        "machine": asdict(profile.machine),
        "threads": profile.threads,
        "provenance": profile.provenance,
    }
    lines = ",\n".join("  " + json.dumps(to_line(m)) for m in sorted(profile.measurements.values(), key=_order))
    text = json.dumps(head, indent=1).removesuffix("\n}") + f',\n "measurements": [\n{lines}\n ]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _order(measurement: Measurement) -> tuple[Any, ...]:
    key = measurement.key
    return (*key.kind, key)


def to_line(measurement: Measurement) -> dict[str, Any]:
    """A measurement as a JSON object of a profile."""
    key = measurement.key
    line: dict[str, Any] = {"cell": key.cell, "dtype": key.dtype, "mode": "train" if key.train else "infer"}
    line |= {name: True for name in ("step", "packed", "projected") if getattr(key, name)}
    line |= {name: getattr(key, name) for name in _SIZES}
    line |= {"samples": measurement.samples, "ms": {name: _rounded(ms) for name, ms in measurement.ms.items()}}
    line["ratio"] = {name: [_rounded(part) for part in ratio] for name, ratio in measurement.ratios.items()}
    return line | ({"failures": measurement.failures} if measurement.failures else {})


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def from_line(line: dict[str, Any]) -> Measurement:
    """The inverse of `to_line`; raises KeyError, TypeError, ValueError or AttributeError for an invalid line."""
    if line["mode"] not in ("train", "infer"):
        raise ValueError(f"mode {line['mode']!r}")
    flags = {name: bool(line.get(name, False)) for name in ("step", "packed", "projected")}
    sizes: dict[str, Any] = {name: _count(line[name]) for name in _SIZES}
    key = Key(str(line["dtype"]), line["mode"] == "train", **sizes, **flags, cell=str(line["cell"]))
    return Measurement(
        key,
        {str(name): _positive(ms) for name, ms in line["ms"].items()},
        {str(name): Ratio(*map(_positive, ratio)) for name, ratio in line["ratio"].items()},
        {str(name): str(reason) for name, reason in line.get("failures", {}).items()},
        int(line.get("samples", 0)),
    )


def _count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"expected a whole number from 1, got {value!r}")
    return value


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"expected a positive number, got {value!r}")
    return float(value)


# Locations.


def cache_folder() -> Path:
    """The folder of the user's profiles: `profiles` in $FUSEDRNN_CACHE_DIR, or in the platform's cache folder."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]) / "profiles"
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "fusedrnn" / "profiles"


def file_name(machine: Machine, threads: int | None) -> str:
    """The file name of a machine's profile in the cache folder."""
    return f"{machine.model}{'' if threads is None else f'-{threads}-threads'}.json"


def find(machine: Machine, threads: int | None, versions: dict[str, str]) -> tuple[list[Source], dict[str, str]]:
    """The profiles for a machine by precedence, and for each ignored file the reason.

    With FUSEDRNN_PROFILE these are the files that it names, from any machine, or none. Otherwise they are the user's
    own for this model of machine and this version of fusedrnn, and the shipped ones of its class, ordered by the
    distance of their number of threads, at equal distance the user's own first.

    Args:
        machine: the machine of this process.
        threads: torch's number of threads, on a CPU.
        versions: of "fusedrnn" and "torch".
    """
    pinned = os.environ.get(PROFILE_VARIABLE, "")
    if pinned == "none":
        return [], {}
    if pinned:
        places = [("pinned", Path(part)) for part in pinned.split(os.pathsep) if part]
    else:
        places = [("own", path) for path in _listed(cache_folder)] + [("shipped", path) for path in _listed(SHIPPED)]
    found, ignored = list[Source](), dict[str, str]()
    for origin, path in places:
        try:
            profile = load(path)
            if _is_for(profile, origin, machine):
                _check_version(profile, origin, versions["fusedrnn"])
                found.append(Source(profile, path, origin, _note(profile, origin, machine, threads, versions)))
        except ProfileError as error:
            ignored[str(path)] = str(error)
    found.sort(key=lambda source: (_apart(source.profile.threads, threads), source.origin != "own", str(source.path)))
    return found, ignored


def _listed(folder: Any) -> list[Path]:
    try:
        return sorted((folder() if callable(folder) else folder).glob("*.json"))
    except (OSError, RuntimeError):  # not readable, or there is no home directory
        return []


def _is_for(profile: Profile, origin: str, machine: Machine) -> bool:
    theirs = profile.machine
    alike = {"pinned": True, "own": theirs.model == machine.model, "shipped": theirs.family == machine.family}
    return theirs.device == machine.device and alike[origin]


def _check_version(profile: Profile, origin: str, version: str) -> None:
    """Rejects the user's profile of another version of fusedrnn: its times and verdicts do not apply."""
    measured = profile.provenance.get("fusedrnn")
    if origin == "own" and measured != version:
        raise ProfileError(
            f"it was measured with fusedrnn {measured}, and this is {version}: run python -m fusedrnn tune again"
        )


def _note(profile: Profile, origin: str, machine: Machine, threads: int | None, versions: dict[str, str]) -> str:
    notes = []
    if origin == "pinned" and profile.machine.family != machine.family:
        notes.append(f"this is {machine.family}")
    if profile.threads != threads:
        notes.append(f"this process computes with {threads}")
    if profile.provenance.get("torch") != versions["torch"]:
        notes.append(f"with torch {profile.provenance.get('torch')}, and this is {versions['torch']}")
    return "; ".join(notes)


def _apart(one: int | None, other: int | None) -> float:
    """The absolute logarithm of the ratio of two numbers of threads."""
    return abs(math.log(one / other)) if one and other else 0.0
