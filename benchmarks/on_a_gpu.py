"""The commands `bench micro`, `plans`, `predict` and `gpu`."""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fusedrnn.kernels import plan as planner

from fusedrnn import testing

from . import arguments, micro, plans, predict, provenance, results, session


def add_actions(actions: Any) -> None:
    """Adds them to the subparsers of `bench`."""
    what = "hold every plan that a backend chooses, or could, to the rule: forward, and all gradients"
    trying = actions.add_parser("plans", help=what, description=what)
    add = trying.add_argument
    add("--backend", type=arguments.backend, required=True, metavar="NAME", help="whose plans")
    add("--device", choices=testing.devices(), help="by default the GPU, if there is one")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="where results.csv goes, and may be",
    )
    add("--shrink", type=arguments.whole(1), default=1, metavar="N", help="divide B and H")
    add("--limit", type=arguments.whole(1), metavar="N", help="only N of the plans, spread over all of them")
    add("--jobs", type=arguments.whole(1), metavar="N", help="processes that share the device")
    arguments.set_action(trying, _plans)
    what = "RESULTS.csv: what the planners predicted, next to what was measured"
    predicting = actions.add_parser("predict", help=what, description=what)
    predicting.add_argument("results", type=Path, metavar="RESULTS.csv")
    predicting.add_argument(
        "--device",
        choices=[d.name for d in planner.DEVICES],
        help="instead of the one in the file",
    )
    arguments.set_action(predicting, _predict)
    what = "everything there is to find out on a machine with a GPU, in order of importance, within a time"
    everything = actions.add_parser("gpu", help=what, description=what)
    add = everything.add_argument
    add("--out", type=Path, metavar="FOLDER", help="where everything goes; by default out/gpu/DATE")
    add("--budget", type=arguments.seconds, metavar="SECONDS", help="for all of it (540; of a dry run 3600)")
    add("--archive", type=Path, metavar="FILE", help="keep the folder in this .tar.gz too; --resume unpacks it")
    add("--smoke", action="store_true", help="the first parts alone, in 200 seconds unless --budget says otherwise")
    add("--only", action="append", default=[], metavar="PART", help="do this part, done before or not; again for more")
    add("--resume", action="store_true", help="go on in the FOLDER with what is not done")
    add("--list", action="store_true", help="say what the parts are, and what is skipped here")
    add("--dry-run", action="store_true", help="the same steps in tiny sizes on the CPU")
    add("--prepare", action="store_true", help="on a machine with nvcc: build what the parts need, and note the commit")
    arguments.set_action(everything, _gpu)
    what = "microbenchmarks of the GPU: what the planners' cost models assume, measured"
    smallest = actions.add_parser(
        "micro",
        help=what,
        description=what,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_micro_names(),
    )
    add = smallest.add_argument
    add("names", nargs="*", metavar="NAME", help="measure this; by default everything")
    add("--out", type=Path, metavar="FOLDER", help="where micro.csv and all else goes; by default out/micro/DATE")
    add(
        "--samples",
        type=arguments.whole(1),
        default=30,
        help="launches that are timed of each (%(default)s)",
    )
    add(
        "--seconds",
        type=arguments.seconds,
        default=micro.TIMEOUT,
        help="for all measurements of a NAME (%(default)s)",
    )
    add("--build", action="store_true", help="build the program and print its path; needs nvcc and no GPU")
    add("--report", type=Path, metavar="FILE", help="measure nothing, and write micro.md anew from this micro.jsonl")
    add("--host", action="store_true", help="run the kernels' logic on the host, where times mean nothing")
    arguments.set_action(smallest, _micro)


def _micro_names() -> str:
    return "\n".join(["measurements:", *(f"  {name:17} {what}" for name, what in micro.NAMES.items())])


def _micro(options: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[int, dict[str, Any]]:
    unknown = [name for name in options.names if name not in micro.NAMES]
    if unknown:
        parser.error(f"argument NAME: unknown {', '.join(unknown)}: expected some of {', '.join(micro.NAMES)}")
    if options.report:
        try:
            read = micro.read(options.report)
            return _conclude(*read, options.report.parent), _found(*read)
        except (OSError, ValueError) as error:
            parser.error(f"argument --report: {error}")
    try:
        program = micro.program(options.host)
    except micro.UnavailableError as error:
        parser.error(str(error))
    if options.build:
        print(program)
        return 0, {"program": str(program)}
    all_names = [name for name in micro.NAMES if not (options.host and name == "launch")]
    folder = arguments.folder(options.out, "micro")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writer = micro.Writer(folder, provenance.collect(testing.devices()[-1]))
    except OSError as error:
        parser.error(f"argument --out: {folder}: {error.strerror}")
    device: dict[str, Any] = {}
    measurements: list[micro.Measurement] = []
    interrupted = False
    try:
        for line in micro.run(
            program, list(dict.fromkeys(options.names)) or all_names, options.samples, options.seconds
        ):
            if "device" in line:
                device = line
                writer.device(line)
            else:
                writer.write(line)
                measurements.append(micro.measurement(line))
                print("  ".join(micro.table(measurements[-1:])[1]).rstrip(), flush=True)
    except micro.UnavailableError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        interrupted = True
    finally:
        writer.close()
    status = _conclude(device, measurements, folder)
    return arguments.INTERRUPTED if interrupted else status, _found(device, measurements)


def _conclude(device: dict[str, Any], measurements: list[micro.Measurement], folder: Path) -> int:
    micro.write_report(device, measurements, folder / "micro.md")
    print("\n".join("  ".join(line) for line in micro.assumptions(device, measurements)))
    if row := micro.device_row(device, measurements):
        print(f"for the table of devices in kernels/device.py: {row}")
    print(f"results: {folder / 'micro.csv'}; report: {folder / 'micro.md'}")
    return 1 if any(measured.status == "failed" for measured in measurements) else 0


def _found(device: dict[str, Any], measurements: list[micro.Measurement]) -> dict[str, Any]:
    return {"device": device, "measurements": [measured.row() for measured in measurements]}


def _plans(options: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[int, dict[str, Any]]:
    device = options.device or testing.devices()[-1]
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        writer = results.Writer(options.out / "results.csv", provenance.collect(device), append=True)
        rows = results.read(options.out / "results.csv")[0]
    except (OSError, ValueError) as error:
        parser.error(f"argument --out: {error}")
    found = plans.trials(options.backend, device, options.shrink)
    if options.limit:
        found = found[:: max(1, -(-len(found) // options.limit))]
    done = {(row.contender, row.case, row.ran) for row in rows}
    todo = [trial for trial in found if trial.key not in done]
    if len(found) == 0:
        parser.error(f"argument --backend: {options.backend} computes none of the problems on {device}")
    try:
        for trial, row in plans.run(todo, options.jobs or plans.processes(device)):
            writer.write([row])
            rows.append(row)
            print(
                f"{row.status:6} {row.excess or 0:5.2f}  {trial.cell.id}: {trial.plan} {row.reason}".rstrip(),
                flush=True,
            )
    except KeyboardInterrupt:
        print("interrupted: what is above was tried before", file=sys.stderr)
        return arguments.INTERRUPTED, {"plans": [asdict(row) for row in rows]}
    finally:
        writer.close()
    failed = sum(row.status != "ok" for row in rows)
    left = len(todo) - sum(trial.key in {(row.contender, row.case, row.ran) for row in rows} for trial in todo)
    print(f"{len(found)} plans: {len(rows) - failed} passed, {failed} failed, {left} without an outcome")
    return int(failed > 0 or left > 0), {"plans": [asdict(row) for row in rows]}


def _predict(options: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[int, dict[str, Any]]:
    rows, facts = arguments.read(options.results, parser)
    try:
        device = predict.device_named(options.device or facts.get("gpu", ""))
    except ValueError as error:
        parser.error(str(error))
    found = predict.predictions(rows, device)
    predict.write(found, device, options.results.parent)
    without = predict.without_model(rows)
    for name in without:
        print(f"no model: {name}")
    print(f"{len(found)} predictions: {options.results.parent / 'predictions.md'}")
    predictions = [dict(zip(predict.COLUMNS, one.cells(), strict=True)) for one in found]
    return 0, {"device": device.name, "predictions": predictions, "without_model": without}


def _gpu(options: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[int, dict[str, Any]]:
    if options.prepare:
        try:
            built = [str(path) for path in (micro.program(), provenance.remember())]
        except (micro.UnavailableError, RuntimeError) as error:
            parser.error(f"argument --prepare: {error}")
        print("\n".join(built))
        return 0, {"built": built}
    if not (options.dry_run or options.list) and "cuda" not in testing.devices():
        parser.error("gpu needs a GPU, and torch finds none; --dry-run goes through the same steps on the CPU")
    folder = arguments.folder(options.out, "gpu").absolute()
    todo = [part for part in session.parts(folder, options.dry_run) if part.smoke or not options.smoke]
    names = [part.name for part in todo]
    if unknown := [name for name in options.only if name not in names]:
        parser.error(f"argument --only: unknown {', '.join(unknown)}: expected some of {', '.join(names)}")
    if options.list:
        for part in todo:
            print(f"{part.name:18} {part.seconds:4.0f} s  {part.what}{f'; skipped: {part.skip}' if part.skip else ''}")
        listed = [{"name": p.name, "what": p.what, "seconds": p.seconds, "skipped": p.skip or None} for p in todo]
        return 0, {"parts": listed}
    before: list[session.Outcome] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        archive = None if options.archive is None else options.archive.absolute()
        if archive is not None:
            archive.parent.mkdir(parents=True, exist_ok=True)
            if options.resume and archive.is_file() and not (folder / "session.json").is_file():
                session.unpack(archive, folder)
        if (folder / "session.json").is_file():
            if not (options.resume or options.only):
                parser.error(f"argument --out: {folder} has a session: add --resume, or name another")
            before, was_dry = session.read(folder)
            if was_dry != options.dry_run:
                parser.error(f"argument --out: the session in {folder} is {'' if was_dry else 'not '}a dry run")
        made = session.Session(folder, todo, options.dry_run, before, archive)
    except (OSError, ValueError) as error:
        parser.error(f"argument --out: {error}")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    interrupted = False
    try:
        usual = 3600.0 if options.dry_run else 200.0 if options.smoke else 540.0
        made.run(options.budget or usual, options.only)
    except KeyboardInterrupt:
        interrupted = True
    for outcome in made.outcomes.values():
        print(f"{outcome.name:18} {outcome.status:12} {outcome.seconds:5.0f} s  {outcome.reason}".rstrip())
    print(f"summary: {folder / 'summary.md'}\n\n{made.digest()}")
    status = arguments.INTERRUPTED if interrupted else 1 if made.failed else 0
    return status, {"summary": str(folder / "summary.md"), "parts": [asdict(one) for one in made.outcomes.values()]}
