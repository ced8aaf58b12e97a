"""Runs every example with its defaults, draws its figure, and writes the gallery's page.

    python examples/gallery.py --docs docs                     # what `make gallery` does, some 20 minutes
    python examples/gallery.py --docs docs --only echo seq2seq # two of them
    python examples/gallery.py --docs docs --only              # none: the page alone

The page's text is the examples' docstrings. Exit status: 0; 1 if a claim of one of them failed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

import common

# In the order of the lectures.
NAMES = [
    "bptt_by_hand",
    "vanishing_gradients",
    "exploding_gradients",
    "truncated_bptt",
    "char_lm",
    "cells_of_text",
    "word_model",
    "temporal_order",
    "echo",
    "seq2seq",
    "reading_programs",
    "captioning",
    "tagging",
    "language_of_line",
    "chaotic_series",
    "lstm_variants",
    "memory_task",
]
HEAD = """# Gallery

What recurrent networks are, what goes wrong in them and what they can do: small programs, one file each, on fusedrnn's
layers. Each makes its own data or takes it from files that come with Python, torch and matplotlib, trains in less than
two minutes on two cores, and draws the figure shown here. `make gallery` runs all of them, draws the figures anew and
fails if one does not show what is said of it. `--help` lists the options of each, `--quick` takes seconds.
"""


def section(name: str) -> str:
    """An example on the page: the first line of its docstring, the figure, what it shows, how to run it."""
    title, _, text = importlib.import_module(name).__doc__.partition("\n")
    heading = title.rstrip(".")
    return (
        f"## {heading}\n\n![{heading}](gallery/{name}.png)\n\n{text.strip()}\n\n```\npython examples/{name}.py\n```\n"
    )


def page() -> str:
    """The gallery's page, in Markdown."""
    return "\n".join([HEAD, *map(section, NAMES)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--docs", type=Path, default=Path("docs"), help="folder of gallery.md and gallery/ (%(default)s)"
    )
    parser.add_argument("--only", nargs="*", choices=NAMES, default=NAMES, metavar="NAME", help="some of the examples")
    options = parser.parse_args()
    common.writable_folder(parser, options.docs / "gallery")
    failed = []
    for name in options.only:
        print(f"== {name}", flush=True)
        start, cpu = time.perf_counter(), time.process_time()
        example = importlib.import_module(name)
        if common.script(lambda example=example: example.main(["--out", str(options.docs / "gallery")])):
            failed.append(name)
        print(f"{time.perf_counter() - start:.0f} s, {time.process_time() - cpu:.0f} s of processors", flush=True)
    (options.docs / "gallery.md").write_text(page(), encoding="utf-8")
    if failed:
        print(f"claims failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
