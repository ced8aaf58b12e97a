"""The sources of each native library. setup.py runs this file alone: it must not import the package."""

import hashlib
from pathlib import Path


def digest(root: Path, name: str) -> str:
    """Digest of all sources of the library "cpu" or "cuda" in a checkout at `root`."""
    folders = (root / "csrc" / folder for folder in (name, "cells"))
    sources = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")]
    sources += [root / "fusedrnn" / "operators.def"] if name == "cpu" else []
    found = hashlib.sha256()
    for path in sorted(sources):
        found.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return found.hexdigest()
