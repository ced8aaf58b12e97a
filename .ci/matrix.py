"""make matrix: which Python, torch and Triton this tree runs with, found by running it; writes docs/versions.md.

One CPU library, fusedrnn/_cpu.abi3.so of this tree, serves all of them: it is not built again.

    python .ci/matrix.py                                  every torch below with this Python, each in a new environment
    python .ci/matrix.py --python python3.10 python3.14   with these
    python .ci/matrix.py --torch 2.10.0 --compile         only this torch; Triton kernels are compiled as well
    python .ci/matrix.py --environment .venv/bin/python   environments that are there already, and nothing is installed
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "versions.md"
TORCH = ("2.10.0", "2.11.0", "2.12.0", "2.13.0", "2.14.1", "2.15.0")
VERSIONS = """
import json, platform, fusedrnn, torch
try:
    from triton import __version__ as triton
except ImportError:
    triton = None
print(json.dumps([platform.python_version(), torch.__version__, triton, fusedrnn.backends()["cpu"]]))
"""
CHECK = ("-m", "fusedrnn", "check", "--quick", "--device", "cpu")
RUNS = {  # a column of the table: the arguments of Python, and the environment
    "CPU kernels": ((*CHECK, "--backend", "cpu", "--limit", "24"), {}),
    "Triton kernels, interpreted": ((*CHECK, "--backend", "triton", "--limit", "3"), {"TRITON_INTERPRET": "1"}),
}
COMPILE = {
    "Triton kernels, compiled": (
        ("-W", "ignore", "-m", "fusedrnn.kernels.compile", "--quick", "--device", "NVIDIA H200"),
        {},
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", default=[sys.executable], metavar="PYTHON")
    parser.add_argument("--torch", nargs="+", default=TORCH, metavar="VERSION")
    parser.add_argument("--index", help="a package index to take torch from")
    parser.add_argument("--environment", nargs="+", metavar="PYTHON", help="run in these, and install nothing")
    parser.add_argument("--compile", action="store_true", help="compile the Triton kernels as well: a minute each")
    parser.add_argument("--jobs", type=int, default=1, help="environments that run at a time")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page to write")
    options = parser.parse_args()
    runs = RUNS | (COMPILE if options.compile else {})
    with tempfile.TemporaryDirectory() as folder:
        package = linked(Path(folder))
        given = [os.path.abspath(python) for python in options.environment or ()]
        pythons = given or environments(options, Path(folder))
        with ThreadPoolExecutor(options.jobs) as pool:
            rows = list(pool.map(partial(row, package=package, runs=runs), pythons))
    options.out.write_text(page(runs, rows))
    print(options.out.read_text())
    return 0 if all(cell.startswith("yes") for r in rows for cell in r[3:]) else 1


def linked(folder: Path) -> Path:
    """A folder to import this tree from, as it would be installed."""
    package = folder / "links" / "fusedrnn"
    package.mkdir(parents=True)
    for path in (*(ROOT / "fusedrnn").iterdir(), ROOT / "benchmarks", ROOT / "kernels"):
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    return package.parent


def environments(options: argparse.Namespace, folder: Path) -> list[str]:
    """A new one for each Python and torch. What cannot be installed, as a torch for a Python, is left out by name."""
    made = []
    index = ["--index-url", options.index] if options.index else []
    for python in options.python:
        for version in options.torch:
            place = folder / f"{Path(python).name}-{version}"
            subprocess.run([python, "-m", "venv", place], check=True)
            own = str(place / "bin" / "python")
            command = [own, "-m", "pip", "install", "-q", *index, f"torch=={version}", "numpy"]
            if subprocess.run(command, check=False).returncode == 0:
                made.append(own)
            else:
                print(f"left out: torch {version} cannot be installed for {python}", file=sys.stderr)
    return made


def row(python: str, package: Path, runs: dict[str, tuple[tuple[str, ...], dict[str, str]]]) -> list[str]:
    """Versions, and for each run "yes" or why not."""
    environment = {**os.environ, "PYTHONPATH": str(package)}

    def run(arguments: tuple[str, ...], more: dict[str, str]) -> subprocess.CompletedProcess[str]:
        command, variables = [python, *arguments], environment | more
        return subprocess.run(command, cwd=package, env=variables, capture_output=True, text=True, check=False)

    found = run(("-c", VERSIONS), {})
    if found.returncode != 0:
        return [python, "", "", *["no: " + last_line(found.stderr)] * len(runs)]
    *versions, _ = json.loads(found.stdout.splitlines()[-1])
    results = []
    for name, (arguments, more) in runs.items():
        if name.startswith("Triton") and versions[2] is None:
            results.append("no: Triton is not installed")
            continue
        done = run(arguments, more)
        results.append("yes" if done.returncode == 0 else "no: " + last_line(done.stderr or done.stdout))
    print("Python {}, torch {}, Triton {}:".format(*versions), "; ".join(results), file=sys.stderr, flush=True)
    return [*(version or "none" for version in versions), *results]


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


def page(runs: dict[str, object], rows: list[list[str]]) -> str:
    head = ["Python", "torch", "Triton", *runs]
    table = [head, ["---"] * len(head), *rows]
    lines = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in table)
    return f"""# Versions

What was run, and whether it passed: `make matrix` writes this page. One CPU library serves every row.

{lines}

A row is one environment, in which fusedrnn was imported and computed on a CPU. CPU kernels: 24 jobs of
`python -m fusedrnn check --quick`, taken from all over (derivatives, and results against torch's own). Triton kernels,
interpreted: 3 jobs by Triton's interpreter. Triton kernels, compiled: no kernel of
`python -m fusedrnn.kernels.compile --quick --device "NVIDIA H200"` spills; `make kernels` does this for every
generation of GPUs, with the oldest and the installed Triton. No row was run on a GPU, and what is not in the table was
not run.
"""


if __name__ == "__main__":
    sys.exit(main())
