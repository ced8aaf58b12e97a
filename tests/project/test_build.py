"""What the build leaves, and what it says when something is missing. Runs in a checkout, where building happens."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import fusedrnn
from fusedrnn import ops

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources, so that building changes nothing here; without what other processes may be writing."""
    left_out = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for name in ("benchmarks", "fusedrnn", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=left_out)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def setup(checkout, *arguments, timeout=200, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=checkout,
        env={**os.environ, "FUSEDRNN_BUILD_CUDA": "0", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def undefined_symbols(library):
    symbols = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    return [line.split()[-1] for line in symbols.stdout.splitlines()]


def of_torchs_cxx(names):
    """Those that would tie a library to one version of torch."""
    return [name for name in names if name.startswith("_Z") and any(ns in name for ns in ("2at", "3c10", "5torch"))]


def nvcc():
    folders = [os.environ.get("PATH", ""), "/usr/local/cuda/bin", *[f"{os.environ.get('CUDA_HOME', '')}/bin"]]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


@pytest.mark.skipif(ops.cpu_unavailable is not None, reason=str(ops.cpu_unavailable))
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm of the binutils is not here")
def test_library_needs_only_the_stable_abi():
    (library,) = Path(fusedrnn.__file__).parent.glob("_cpu*.so")
    names = undefined_symbols(library)
    assert any(name.startswith("aoti_torch_") for name in names)
    assert not of_torchs_cxx(names)


def test_build_information_names_what_it_was_built_with():
    info = ops.build_info()
    assert "cpu" not in info["failures"]
    assert "portable" in info["isa"]
    assert info["torch"].startswith("2.")


def test_a_library_of_other_sources_is_noticed(checkout, monkeypatch):
    """By what the build noted of them. A library that was installed, without sources beside it, is never old."""
    package = checkout / "fusedrnn"
    (package / "_cuda.abi3.so").touch()
    monkeypatch.setattr(ops, "__file__", str(package / "ops.py"))

    def noted(digest):
        monkeypatch.setattr(ops, "build_info", lambda: {"sources": {"cuda": digest}})

    noted(ops.sources.digest(checkout, "cuda"))
    assert ops.stale("cuda") is None
    assert ops.stale("cpu") is None  # of which there is no library
    header = checkout / "csrc" / "cuda" / "cell.h"
    header.write_text(header.read_text() + "// changed\n")
    assert "_cuda was built from other sources" in ops.stale("cuda")
    (checkout / "csrc" / "cpu" / "cell.h").touch()
    noted(ops.sources.digest(checkout, "cuda"))
    (checkout / "csrc" / "cpu" / "torch" / "ops.cpp").write_text("")
    assert ops.stale("cuda") is None  # it is not made of that
    shutil.rmtree(checkout / "csrc")
    assert ops.stale("cuda") is None


def test_another_library_can_be_named(tmp_path, monkeypatch):
    monkeypatch.setenv(ops.CUDA_LIBRARY_VARIABLE, str(tmp_path / "debug.so"))
    assert "debug.so cannot be loaded" in ops._load("cuda")


def test_without_torch_the_message_says_what_to_do(checkout, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError")
    result = setup(checkout, "build", PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    for words in ("Install torch first", "pip install --no-build-isolation .", "uv pip", "--no-isolation"):
        assert words in result.stderr


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


def failures(checkout):
    return json.loads((checkout / "lib" / "fusedrnn" / "_build.json").read_text())["failures"]


def build(checkout, **environment):
    """Builds everything but the CPU library, unless told."""
    return setup(checkout, "build", "--build-lib", "lib", **{"FUSEDRNN_BUILD_CPU": "0", **environment})


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_torch_without_cuda_leaves_the_cuda_library_out(checkout):
    assert build(checkout, FUSEDRNN_BUILD_CUDA="").returncode == 0
    assert "is without CUDA" in failures(checkout)["cuda"]
    reason = ops._load("cuda")
    if reason is not None:
        assert "_cuda" in reason


def test_the_cuda_library_can_be_left_out(checkout):
    assert build(checkout, FUSEDRNN_BUILD_CUDA="0").returncode == 0
    assert failures(checkout) == {"cpu": "FUSEDRNN_BUILD_CPU was 0", "cuda": "FUSEDRNN_BUILD_CUDA was 0"}


def test_a_cuda_library_that_was_asked_for_without_nvcc_is_an_error(checkout):
    result = build(checkout, FUSEDRNN_BUILD_CUDA="1", CUDA_HOME="/nonexistent")
    assert result.returncode != 0
    assert "nvcc was not found" in result.stderr


@pytest.mark.skipif(nvcc() is None, reason="nvcc is not here")
@pytest.mark.parametrize(
    ("named", "message"),
    [("7.0;7.5", "need an architecture of 8.0 or later"), ("Hopper", "has 'Hopper': expected numbers")],
)
def test_architectures_that_cannot_be_built_for(checkout, named, message):
    result = build(checkout, FUSEDRNN_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST=named)
    assert result.returncode != 0
    assert message in result.stderr


NVCC_THAT_REFUSES = """#!/bin/sh
case "$*" in
  *--list-gpu-arch*) echo compute_80 compute_90 {known};;
  *) echo "no more disk" >&2; exit 1;;
esac
"""


@pytest.mark.parametrize(
    ("known", "environment", "expected"),
    [
        ("compute_100", {}, ["code=[sm_80]", "code=[sm_90a]", "code=[sm_100,compute_100]"]),
        ("", {}, ["code=[sm_80]", "code=[sm_90,compute_90]"]),
        ("", {"TORCH_CUDA_ARCH_LIST": "7.5 8.9;9.0a+PTX"}, ["code=[sm_89]", "code=[sm_90a,compute_90a]"]),
        ("", {"FUSEDRNN_CUDA_DEBUG": "1"}, ["code=[sm_80]", "code=[sm_90,compute_90]", "-DFUSEDRNN_CUDA_TIMEOUT="]),
    ],
    ids=["default", "older-nvcc", "list", "debug"],
)
def test_what_nvcc_is_told(checkout, tmp_path, known, environment, expected):
    """And what becomes of its failure."""
    program = tmp_path / "toolkit" / "bin" / "nvcc"
    program.parent.mkdir(parents=True)
    program.write_text(NVCC_THAT_REFUSES.format(known=known))
    program.chmod(0o755)
    asked = {"TORCH_CUDA_ARCH_LIST": "", **environment, "CUDA_HOME": str(tmp_path / "toolkit")}
    result = build(checkout, FUSEDRNN_BUILD_CUDA="1", **asked)
    assert result.returncode != 0
    assert "no more disk" in result.stderr
    told = next(line for line in result.stderr.splitlines() if f"{program} -std" in line)
    assert set(re.findall(r"code=\[[^]]*\]|-DFUSEDRNN_CUDA_TIMEOUT=", told)) == set(expected)


STUB = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }'
WITH_STUB = """
import ctypes, sys
import torch, fusedrnn
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
torch.ops.load_library(sys.argv[2])
assert torch.ops.fusedrnn.cuda_device_type() == "cuda"
print(torch.ops.fusedrnn.cuda_obstacle(0))
"""


def obstacle_without_a_gpu(library):
    """What the library says, loaded by a torch without CUDA to which the one symbol that it lacks is given."""
    stub = library.with_name("stub.so")
    compile = [os.environ.get("CXX", "c++"), "-shared", "-fPIC", "-x", "c++", "-", "-o", stub]
    subprocess.run(compile, input=STUB, text=True, check=True)
    command = [sys.executable, "-c", WITH_STUB, str(stub), str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.compiles
@pytest.mark.skipif(nvcc() is None, reason="nvcc is not here: the CUDA library is not built")
@pytest.mark.timeout(900)
def test_the_cuda_library(checkout):
    """Built without a GPU: for what was asked, of the stable ABI, with the CUDA runtime inside and hidden."""
    result = build(checkout, timeout=850, FUSEDRNN_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="7.5 9.0a+PTX")
    assert result.returncode == 0, result.stderr
    info = json.loads((checkout / "lib" / "fusedrnn" / "_build.json").read_text())
    assert info["sources"] == {name: ops.sources.digest(ROOT, name) for name in ("cpu", "cuda")}
    assert info["cuda"]["architectures"] == ["90a+PTX"]
    (library,) = (checkout / "lib" / "fusedrnn").glob("_cuda*.so")
    assert library.name == "_cuda.abi3.so"
    names = undefined_symbols(library)
    assert "aoti_torch_get_current_cuda_stream" in names
    assert not of_torchs_cxx(names)
    assert not [name for name in names if name.startswith("cuda")]
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    assert "libtorch.so" in needed  # through which torch's CUDA part is found
    assert not [name for name in needed if "cuda" in name]
    assert not re.search("RPATH|RUNPATH", dynamic)
    if torch.version.cuda is None:
        code = "import fusedrnn, json; print(json.dumps(fusedrnn.backends()['cuda']))"
        path = str(checkout / "lib")
        loaded = subprocess.run(
            [sys.executable, "-c", code], cwd=path, env={**os.environ, "PYTHONPATH": path},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "undefined symbol: aoti_torch_get_current_cuda_stream" in loaded.stdout
        assert torch.__version__ in loaded.stdout
        assert "no NVIDIA driver" in obstacle_without_a_gpu(library)


def test_sdist_holds_what_a_build_needs_and_its_tests(checkout):
    for name in ("docs", "examples", "tests"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "_build"))
    assert setup(checkout, "sdist").returncode == 0
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    assert {"csrc/cpu/torch/ops.cpp", "csrc/cpu/panel.h", "csrc/cuda/torch/ops.cpp", "csrc/cuda/launch.cu"} <= names
    assert {"kernels/__init__.py", "fusedrnn/py.typed"} <= names
    assert {"tests/conftest.py", "tests/cuda/conftest.py", "docs/math.md", "examples/char_lm.py"} <= names


def test_what_is_installed(checkout):
    """One package, without results of benchmarks."""
    built = setup(checkout, "build", "--build-lib", "lib", FUSEDRNN_BUILD_CPU="0")
    assert built.returncode == 0, built.stderr
    assert [path.name for path in (checkout / "lib").iterdir()] == ["fusedrnn"]
    package = checkout / "lib" / "fusedrnn"
    for name in ("kernels/__init__.py", "kernels/cells/lstm.py", "benchmarks/cuda/micro.cu", "py.typed"):
        assert (package / name).is_file()
    assert not (package / "benchmarks" / "results").exists()
    profiles = Path("tuning") / "profiles"
    assert {path.name for path in (package / profiles).iterdir()} == {
        path.name for path in (checkout / "fusedrnn" / profiles).glob("*.json")
    }


def test_setuptools_that_are_too_old_are_named(checkout, tmp_path):
    old = tmp_path / "old" / "setuptools"
    old.mkdir(parents=True)
    (old / "__init__.py").write_text("__version__ = '68.1.2'\n\ndef setup(**options):\n    raise AssertionError\n")
    result = setup(checkout, "build", PYTHONPATH=str(old.parent))
    assert result.returncode != 0
    assert "setuptools 77 or later, this is 68.1.2" in result.stderr
    assert "Traceback" not in result.stderr
