"""What the build leaves, and what it says when something is missing. Runs in a checkout, where building happens."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import fusedrnn
from fusedrnn import ops

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources, so that building changes nothing here."""
    for name in ("benchmarks", "fusedrnn", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "_build.json"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def setup(checkout, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.skipif(ops.cpu_unavailable is not None, reason=str(ops.cpu_unavailable))
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm of the binutils is not here")
def test_library_needs_only_the_stable_abi():
    """No C++ symbol of torch: such a symbol would tie the library to one version of torch."""
    (library,) = Path(fusedrnn.__file__).parent.glob("_cpu*.so")
    symbols = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in symbols.stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert not [name for name in names if name.startswith("_Z") and any(ns in name for ns in ("2at", "3c10", "5torch"))]


def test_build_information_names_what_it_was_built_with():
    info = ops.build_info()
    assert info["failures"] == {}
    assert "portable" in info["isa"]
    assert info["torch"].startswith("2.")


def test_without_torch_the_message_says_what_to_do(checkout, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError")
    result = setup(checkout, "build", PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert "--no-build-isolation" in result.stderr


def test_without_a_compiler_the_library_is_left_out(checkout):
    result = setup(checkout, "build", "--build-lib", "lib", CXX="/nonexistent/c++", FUSEDRNN_BUILD_CPU="")
    assert result.returncode == 0, result.stderr
    assert not list((checkout / "lib" / "fusedrnn").glob("*.so"))
    failures = json.loads((checkout / "lib" / "fusedrnn" / "_build.json").read_text())["failures"]
    assert "/nonexistent/c++ was not found" in failures["cpu"]


def test_without_a_compiler_a_library_that_was_asked_for_is_an_error(checkout):
    result = setup(checkout, "build", "--build-lib", "lib", CXX="/nonexistent/c++", FUSEDRNN_BUILD_CPU="1")
    assert result.returncode != 0
    assert "/nonexistent/c++ was not found" in result.stderr


def test_sdist_holds_what_a_build_needs_and_no_top_level_kernels_package_is_installed(checkout):
    assert setup(checkout, "sdist").returncode == 0
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    assert {"csrc/cpu_ops.cpp", "csrc/cpu/panel.h", "kernels/__init__.py", "fusedrnn/py.typed"} <= names
    built = setup(checkout, "build", "--build-lib", "lib", FUSEDRNN_BUILD_CPU="0")
    assert built.returncode == 0, built.stderr
    assert [path.name for path in (checkout / "lib").iterdir()] == ["fusedrnn"]
    assert (checkout / "lib" / "fusedrnn" / "kernels" / "__init__.py").is_file()
