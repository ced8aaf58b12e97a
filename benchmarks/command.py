"""The command line of `python -m fusedrnn bench`."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from fusedrnn import dispatch, testing
from fusedrnn.cells import CELLS, LSTM

from . import (
    arguments,
    busy,
    cases,
    compare,
    contenders,
    memory,
    models,
    on_a_gpu,
    plot,
    progress,
    provenance,
    report,
    results,
    run,
    training,
    variants,
)
from .cases import BenchmarkCase
from .ceilings import Ceilings
from .results import Row
from .timing import clock

_SUITES = (*cases.SUITES, "models")


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark, or one of its tools.

    Args:
        argv: what follows `bench`.

    Returns:
        The exit status: 0; 1 if fusedrnn was wrong or failed somewhere, or `compare` found a regression; 130 after
        Ctrl-C, with everything that was measured kept.

    Raises:
        SystemExit: with status 2 for arguments that are wrong, with status 0 after --help.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    return options.action(options, parser)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusedrnn bench",
        description="Measure fusedrnn against torch.nn.LSTM and its peers, in turns in one process, after checking "
        "every result.",
    )
    parser.set_defaults(action=_bench)
    add = parser.add_argument
    add(
        "--suite",
        action="append",
        choices=_SUITES,
        metavar="NAME",
        help=f"what to measure: {', '.join(_SUITES)}; more than one if given again (quick, unless there is a --shape)",
    )
    add(
        "--shape",
        action="append",
        type=arguments.converted(cases.parse_shape),
        default=[],
        metavar="T,B,I,H[,L[,D]]",
        help="measure this: time steps, batch, input size, hidden size, layers, directions; may be given again",
    )
    _add_choice(parser, "--mode", cases.MODES, "instead of those of the suite; for a --shape, all")
    _add_choice(parser, "--dtype", tuple(cases.DTYPES), "instead of those of the suite; for a --shape, float32")
    _add_choice(parser, "--cell", tuple(CELLS), "which cells' layers; the LSTM's by default")
    _add_choice(parser, "--variant", cases.VARIANTS, "what a --shape is given as input; plain by default")
    add(
        "--backend",
        action="append",
        type=arguments.backend_or_auto,
        metavar="NAME",
        help=f"measure this one of auto, {', '.join(dispatch.TABLE)}; by default all available that have kernels",
    )
    _add_choice(parser, "--baseline", tuple(contenders.BASELINES), "measure against these; by default against all")
    add("--device", choices=testing.devices(), help="by default the GPU, if there is one")
    add("--threads", type=arguments.whole(1), help="of the CPU; by default as many as torch takes")
    add("--out", type=Path, metavar="FOLDER", help="where results.csv and all else goes; by default out/bench/DATE")
    settings = run.Settings()
    add("--rounds", type=arguments.whole(2), default=settings.rounds, help="samples of each contender (%(default)s)")
    add(
        "--time-budget",
        type=arguments.seconds,
        default=settings.budget,
        metavar="SECONDS",
        help="for the rounds of one cell; when it is over, five rounds have to do (%(default)s)",
    )
    add("--busy", action="store_true", help="time all once more while another process has one core busy; on the CPU")
    add(
        "--memory",
        choices=tuple(memory.FREED),
        default="kept",
        help="what becomes of memory that is freed, on the CPU: the process keeps it, without new page faults, or "
        "it is returned to the system at once (%(default)s)",
    )
    add("--steps", type=arguments.whole(2), default=10, help="over which losses of a model are compared (%(default)s)")
    add("--time-wrong", action="store_true", help="time also what was found wrong; it stays marked as such")
    add(
        "--shrink",
        type=arguments.whole(1),
        default=1,
        metavar="N",
        help="divide T, B, I and H, to try everything out quickly",
    )
    add("--limit", type=arguments.whole(1), metavar="N", help="measure only the first N cells, models among them")
    add("--json", action="store_true", help="print the results as JSON, as in results.json, and not as a table")
    add(
        "--resume",
        action="store_true",
        help="go on in the FOLDER of --out, with the cells that are not in it yet",
    )

    actions = parser.add_subparsers(title="instead of measuring", metavar="TOOL", prog="python -m fusedrnn bench")
    what = "A.csv B.csv: what became faster or slower, beyond the noise"
    comparing = actions.add_parser("compare", help=what, description=compare.__doc__)
    comparing.add_argument("before", type=Path, metavar="A.csv")
    comparing.add_argument("after", type=Path, metavar="B.csv")
    comparing.add_argument(
        "--threshold", type=arguments.share, default=0.05, help="of a median that has to have moved (%(default)s)"
    )
    comparing.add_argument("--relative", action="store_true", help="compare times over those of nn.LSTM")
    comparing.add_argument("--json", action="store_true", help="print every change as JSON")
    comparing.set_defaults(action=_compare)
    what = "RESULTS.csv: draw the pictures and write the report again"
    plotting = actions.add_parser("plot", help=what, description=what)
    plotting.add_argument("results", type=Path, metavar="RESULTS.csv")
    plotting.set_defaults(action=_plot)
    variants.add_action(actions)
    on_a_gpu.add_actions(actions)
    return parser


def _add_choice(parser: argparse.ArgumentParser, name: str, known: tuple[str, ...], help: str) -> None:
    parser.add_argument(
        name, action="append", choices=known, metavar="NAME", help=f"{', '.join(known)}; {help}; may be given again"
    )


def _cells(options: argparse.Namespace, device: str) -> list[tuple[str, BenchmarkCase]]:
    """Suite and cell, in order; what was asked for by --mode and --dtype takes the place of what a suite has."""
    return [entry for kind in options.cell or [LSTM.name] for entry in _cells_of(kind, options, device)]


def _cells_of(kind: str, options: argparse.Namespace, device: str) -> list[tuple[str, BenchmarkCase]]:
    """The cases of one cell."""
    found = []
    suites = options.suite or ([] if options.shape else ["quick"])
    for name in suites:
        for cell in cases.suite(name, device) if name in cases.SUITES else []:
            case = cell.case
            shape = (case.T, case.B, case.I, case.H, case.layers, cell.D)
            for dtype in options.dtype or [cell.dtype]:
                for mode in options.mode or [cell.mode]:
                    found.append((name, cases.cell(shape, mode, dtype, cell.variant, device, kind)))
    for shape in options.shape:
        for variant in options.variant or ["plain"]:
            for dtype in options.dtype or ["float32"]:
                for mode in options.mode or cases.MODES:
                    found.append(("shape", cases.cell(shape, mode, dtype, variant, device, kind)))
    if options.shrink > 1:
        found = [(name, cases.shrunk(cell, options.shrink)) for name, cell in found]
    seen = {cell: name for name, cell in reversed(found)}
    return [(seen[cell], cell) for cell in dict.fromkeys(cell for _, cell in found)]


def _bench(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    device = options.device or testing.devices()[-1]
    if device == "cpu":
        if "gpu" in (options.suite or []) and options.shrink == 1:
            parser.error("argument --suite: gpu needs a GPU, and this would run on the CPU")
        if "tf32" in (options.dtype or []):
            parser.error("argument --dtype: tf32 is what a GPU computes in, and this would run on the CPU")
        if options.busy and (reason := busy.unavailable()):
            parser.error(f"argument --busy: {reason}")
    elif options.busy:
        parser.error("argument --busy: it is a core of the CPU that is busy, and this would run on a GPU")
    if options.resume and (options.out is None or "models" in (options.suite or [])):
        parser.error("argument --resume: it needs the --out of the run before, and the suite models cannot be resumed")
    if options.threads:
        torch.set_num_threads(options.threads)
    folder = arguments.folder(options.out, "bench")
    rows: list[Row] = []
    curves: list[training.Curve] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not options.resume:
            (folder / "losses.csv").unlink(missing_ok=True)  # of a run before, which the pictures must not show
        facts = provenance.collect(device) | {"memory": memory.settle(options.memory) if device == "cpu" else ""}
        writer = results.Writer(folder / "results.csv", facts, options.resume)
        if options.resume:
            rows, _ = results.read(folder / "results.csv")
    except OSError as error:
        parser.error(f"argument --out: {folder}: {error.strerror}")
    except ValueError as error:
        parser.error(f"argument --resume: {error}")

    def keep(more: Sequence[Row]) -> None:
        rows.extend(more)
        writer.write(more)

    interrupted = False
    try:
        with busy.process() if options.busy else nullcontext() as computing:
            _measure(options, device, keep, curves, {(row.case, row.mode, row.device) for row in rows}, computing)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        writer.close()
    (folder / "results.json").write_text(results.as_json(rows, facts) + "\n")
    if curves:
        _write_curves(folder / "losses.csv", curves)
    if options.json:
        print(results.as_json(rows, facts))
    else:
        print("\n".join([*results.table(rows), *results.summary(rows)]))
    _illustrate(rows, facts, folder)
    files = f"results: {folder / 'results.csv'}; report: {folder / 'report.md'}"
    print(files, file=sys.stderr if options.json else sys.stdout)
    if interrupted:
        print("interrupted: what is above was measured before", file=sys.stderr)
        return arguments.INTERRUPTED
    return 1 if any(row.ours and row.status in ("wrong", "failed") for row in rows) else 0


def _measure(
    options: argparse.Namespace,
    device: str,
    keep: Callable[[Sequence[Row]], None],
    curves: list[training.Curve],
    done: set[tuple[str, str, str]],
    computing: Callable[[], AbstractContextManager[None]] | None,
) -> None:
    """Measures all cells but those that are `done`: case, mode and device; with `computing` in that context as well."""
    kinds = dict.fromkeys([*(options.cell or [LSTM.name]), LSTM.name])
    entered = {kind: contenders.entered(options.backend, options.baseline, kind) for kind in kinds}
    if not done:
        everyone = {c.name: c for kind in options.cell or [LSTM.name] for c in entered[kind]}.values()
        keep([Row("", c.name, "unavailable", c.unavailable) for c in everyone if c.unavailable is not None])
    settings = run.Settings(options.rounds, options.time_budget, options.time_wrong, computing)
    ticking = clock(device)
    ceilings = Ceilings(ticking)
    whole = [("models", task) for task in models.tasks(options.shrink)] if "models" in (options.suite or []) else []
    every: list[tuple[str, Any]] = [*_cells(options, device), *whole][: options.limit]
    left = [
        (suite, item)
        for suite, item in every
        if not isinstance(item, BenchmarkCase) or (item.id, item.mode, item.device) not in done
    ]
    for suite, item in progress.shown(left, "cell", _label):
        if isinstance(item, BenchmarkCase):
            keep(run.measure(suite, item, entered[item.case.cell], ticking, ceilings, settings))
        else:
            made, losses = training.measure(item, entered[LSTM.name], device, ticking, settings, options.steps)
            curves += losses
            keep(made)


def _label(entry: tuple[str, Any]) -> str:
    _, item = entry
    return f"{item.id} {item.mode}" if isinstance(item, BenchmarkCase) else item.name


def _write_curves(path: Path, curves: Sequence[training.Curve]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(("model", "contender", "step", "loss"))
        for curve in curves:
            lines.writerows((curve.model, curve.contender, k, loss) for k, loss in enumerate(curve.losses, 1))


def _illustrate(rows: Sequence[Row], facts: dict[str, str], folder: Path) -> None:
    """Pictures and the report; without matplotlib the report alone."""
    reason, pictures = plot.missing(), list[Path]()
    if reason is None:
        pictures = plot.draw(rows, facts, folder)
        losses = folder / "losses.csv"
        if losses.is_file():
            pictures.append(plot.draw_losses(losses))
    else:
        print(f"no pictures: {reason}", file=sys.stderr)
    report.write(rows, facts, pictures, folder / "report.md")


def _plot(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    rows, facts = arguments.read(options.results, parser)
    _illustrate(rows, facts, options.results.parent)
    print(f"report: {options.results.parent / 'report.md'}")
    return 0


def _compare(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    (before, old), (after, new) = (arguments.read(path, parser) for path in (options.before, options.after))
    for name in ("cpu", "gpu", "threads", "torch", "memory"):
        if old.get(name, "") != new.get(name, ""):
            note = f"note: {name} is {old.get(name)!r} in A and {new.get(name)!r} in B"
            print(note, file=sys.stderr if options.json else sys.stdout)
    changes = compare.compare(before, after, options.threshold, options.relative)
    print(compare.as_json(changes) if options.json else "\n".join(compare.lines(changes, options.relative)))
    return 1 if any(change.regression for change in changes) else 0
