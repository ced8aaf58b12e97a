"""Shared by the commands: arguments and their errors, output paths, and the end of an interrupted run."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from fusedrnn import dispatch

from . import results
from .results import Row

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


def converted(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """A type for argparse, which shows the message of an ArgumentTypeError only."""

    def parse(text: str) -> Any:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def whole(least: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ValueError(f"must be a whole number from {least}, got {text!r}")
        return int(text)

    return converted(convert)


def _number(text: str, least: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not least <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number from {least:g}, got {text!r}")
    return number


def seconds(text: str) -> float:
    return _number(text, 0.0)


def share(text: str) -> float:
    return _number(text, 0.0)


def backend(name: str) -> str:
    if name not in dispatch.TABLE:
        raise argparse.ArgumentTypeError(f"unknown backend {name!r}: expected one of {', '.join(dispatch.TABLE)}")
    reason = dispatch.backends()[name]
    if reason is not None:
        raise argparse.ArgumentTypeError(f"backend {name!r} is not available: {reason}")
    return name


def backend_or_auto(name: str) -> str:
    return name if name == "auto" else backend(name)


def folder(given: Path | None, kind: str) -> Path:
    return given or Path("out") / kind / datetime.datetime.now().strftime("%Y%m%d-%H%M%S")


def read(path: Path, parser: argparse.ArgumentParser) -> tuple[list[Row], dict[str, str]]:
    try:
        return results.read(path)
    except OSError as error:
        parser.error(f"{path}: {error.strerror}")
    except ValueError as error:
        parser.error(str(error))


# An exit status, and what was found.
Action = Callable[[argparse.Namespace, argparse.ArgumentParser], tuple[int, dict[str, Any]]]


def set_action(parser: argparse.ArgumentParser, action: Action) -> None:
    """Makes it the parser's action, with --json: what was found is printed then, and all else goes to stderr."""

    def run(options: argparse.Namespace, of_bench: argparse.ArgumentParser) -> int:
        if not options.json:
            return action(options, of_bench)[0]
        with redirect_stdout(sys.stderr):
            status, found = action(options, of_bench)
        print(json.dumps(found, indent=2))
        return status

    parser.add_argument("--json", action="store_true", help="print what was found as JSON, all else to stderr")
    parser.set_defaults(action=run)
