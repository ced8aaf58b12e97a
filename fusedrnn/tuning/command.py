"""The command line of `python -m fusedrnn tune`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import testing
from ..benchmarks import arguments, progress
from ..benchmarks.cases import DTYPES, parse_shape
from ..cells import CELLS
from . import choice, grid, profile, report, session, worker
from .profile import Key

_QUICK_SECONDS = 40.0


def main(argv: Sequence[str]) -> int:
    """Verifies and measures the backends on this machine, and saves a profile for later calls.

    Args:
        argv: the arguments after `tune`.

    Returns:
        The exit status: 0; 1 if a backend failed, or nothing could be measured; 130 after Ctrl-C, which keeps the
        measurements made so far.

    Raises:
        SystemExit: with status 2 for arguments that are wrong, with status 0 after --help.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = options.device or testing.devices()[-1]
    dtypes = options.dtype or list(grid.DTYPES[device])
    if device == "cpu" and "tf32" in dtypes:
        parser.error("argument --dtype: tf32 is what a GPU computes in, and this would run on the CPU")
    backends = options.backend or worker.supported(device)
    unable = [name for name in backends if name not in worker.supported(device)]
    if unable or not backends:
        parser.error(
            f"there is nothing to measure on {device}: {', '.join(unable) or 'no backend'} cannot compute there"
        )
    try:
        keeper = session.Keeper(device, options.out)
        profile.save(keeper.profile, keeper.path)
    except (OSError, RuntimeError) as error:
        parser.error(f"the profile cannot be written: {error}; --out or {profile.CACHE_VARIABLE} names another place")
    keys = _keys(options, device, dtypes)
    known = keeper.profile.measurements
    if options.undecided:
        keys = [key for key in keys if key in known and not all(r.decided for r in known[key].ratios.values())]
    elif options.resume:
        keys = [key for key in keys if key not in known]
    seconds = options.seconds or (_QUICK_SECONDS if options.quick else None)
    return _tune(keys, device, backends, keeper, options, None if seconds is None else time.monotonic() + seconds)


def _parser() -> argparse.ArgumentParser:
    settings = session.Settings()
    parser = argparse.ArgumentParser(
        prog="python -m fusedrnn tune",
        description="Check the backends on this machine against torch's own layers, measure them against it, and save "
        "the times as a profile, from which `auto` knows what is fastest here. It is saved in "
        f"{profile.CACHE_VARIABLE}, or the platform's folder for caches. All of it runs in a process of its own: a "
        "kernel that hangs or crashes is a line in the table. Without arguments it takes some fifteen minutes; the "
        "machine should do nothing else meanwhile.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="the most important sizes only, in less than a minute")
    add(
        "--shape",
        action="append",
        type=arguments.converted(parse_shape),
        default=[],
        metavar="T,B,I,H[,L[,D]]",
        help="measure this: time steps, batch, input size, hidden size, layers, directions; may be given again",
    )
    add("--device", choices=testing.devices(), help="by default the GPU, if there is one")
    add(
        "--dtype",
        action="append",
        choices=tuple(DTYPES),
        metavar="NAME",
        help=f"{', '.join(DTYPES)}; by default float32 (on a GPU tf32 and float16) and bfloat16; may be given again",
    )
    add(
        "--cell",
        action="append",
        choices=(*CELLS, *grid.VARIANTS),
        metavar="NAME",
        help=f"{', '.join(CELLS)}; and, for all variants of the LSTM, {', '.join(grid.VARIANTS)}. By default "
        f"{', '.join(grid.CELLS)}, on a GPU those variants too; for --quick or --shape lstm. May be given again",
    )
    add("--backend", action="append", type=arguments.backend, metavar="NAME", help="by default all that have kernels")
    add("--threads", type=arguments.whole(1), help="of the CPU; by default as many as torch takes")
    add("--seconds", type=arguments.seconds, help="begin nothing new after this time; --resume then goes on")
    add("--json", action="store_true", help="print what was measured as JSON, and not as a table")
    add("--resume", action="store_true", help="leave out what is in the profile already")
    add("--undecided", action="store_true", help="measure again what the noise left undecided in the profile")
    add("--rounds", type=arguments.whole(2), default=settings.rounds, help="samples of each backend (%(default)s)")
    add(
        "--time-budget",
        type=arguments.seconds,
        default=settings.budget,
        metavar="SECONDS",
        help="for the rounds of one size; when it is over, five rounds have to do (%(default)s)",
    )
    add(
        "--time-limit",
        type=arguments.seconds,
        default=settings.limit,
        metavar="SECONDS",
        help="for checking and timing one size: what takes longer hangs (%(default)s)",
    )
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"instead of the cache folder; use it by {profile.PROFILE_VARIABLE}=FILE",
    )
    return parser


def _keys(options: argparse.Namespace, device: str, dtypes: list[str]) -> list[Key]:
    cells = options.cell or (["lstm"] if options.quick or options.shape else list(grid.cells_on(device)))
    return [key for cell in cells for key in _keys_of(cell, options, device, dtypes)]


def _keys_of(cell: str, options: argparse.Namespace, device: str, dtypes: list[str]) -> list[Key]:
    if options.shape:
        return grid.shapes(options.shape, dtypes, cell=cell)
    return grid.quick(dtypes, cell) if options.quick else grid.standard(device, dtypes, cell)


def _tune(
    keys: list[Key],
    device: str,
    backends: list[str],
    keeper: session.Keeper,
    options: argparse.Namespace,
    until: float | None,
) -> int:
    budget = min(options.time_budget, 0.3) if options.quick else options.time_budget
    settings = session.Settings(options.rounds, budget, options.time_limit)
    interrupted = False
    try:
        session.measure(
            progress.shown(keys, "size", lambda key: key.label), device, backends, keeper.keep, settings, until
        )
    except KeyboardInterrupt:
        interrupted = True
    choice.forget()
    made = keeper.made
    begun = {m.key for m in made}
    left = sum(key not in begun for key in keys)
    if options.json:
        found = {"profile": str(keeper.path), "measurements": [profile.to_line(m) for m in made], "left": left}
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(report.table(made)))
        if left:
            print(f"{left} of {len(keys)} were not measured; --resume goes on with them")
        print(f"profile: {keeper.path}")
    if interrupted:
        print("interrupted: what is above was measured before, and is kept", file=sys.stderr)
        return arguments.INTERRUPTED
    return 1 if any(m.failures for m in made) or (keys and not made and until is None) else 0
