"""The layers of the package: who may import whom, what C++ may include, and what `import fusedrnn` does and costs."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = sorted((ROOT / "fusedrnn").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
NATIVE = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu"))

# Each module of the package and the siblings that it may import. A new module has to be given its place here.
BELOW = {
    "cells.program": set(),
    "cells.spec": {"cells.program"},
    "cells.gru": {"cells.spec"},
    "cells.lstm": {"cells.spec"},
    "cells.lstm_variants": {"cells.lstm", "cells.spec"},
    "cells.own": {"cells.program", "cells.spec"},
    "cells.rnn": {"cells.spec"},
    "cells": {"cells.spec", "cells.gru", "cells.lstm", "cells.lstm_variants", "cells.own", "cells.rnn"},
    "layout": {"cells"},
    "packing": set(),
    "aten": {"cells"},
    "reference": {"cells", "layout", "packing"},
    "gpu": {"cells", "cells.spec", "reference", "layout"},
    "cuda_plan": {"cells", "kernels"},
    "cuda": {"cells", "cuda_plan", "kernels"},
    "onnx": {"cells", "reference", "layout"},
    "sources": set(),
    "flops": set(),
    "ops": {"cells", "flops", "gpu", "cuda", "onnx", "reference", "kernels", "layout", "sources"},
    "testing": {"aten", "cells", "ops"},
    "batching": {"cells", "layout", "reference"},
    "autograd": {"batching", "cells", "ops", "reference", "layout"},
    "second_derivative": set(),
    "version": set(),
    "tuning": set(),
    "tuning.machine": {"ops"},
    "tuning.profile": {"cells", "tuning.machine"},
    "tuning.choice": {"cells", "tuning.machine", "tuning.profile", "version"},
    "dispatch": {"cells", "gpu", "layout", "ops", "tuning.choice", "tuning.profile"},
    "precision": {"dispatch"},
    "sequence": {"dispatch", "packing"},
    "noise": {"cells", "ops", "reference", "sequence"},
    "validate": {"cells", "dispatch", "sequence"},
    "stack": {"autograd", "cells"},
    "fast_path": {"aten", "autograd", "cells", "dispatch", "ops", "sequence", "stack", "tuning.choice", "validate"},
    "forward": {
        "aten",
        "autograd",
        "cells",
        "dispatch",
        "fast_path",
        "noise",
        "precision",
        "second_derivative",
        "sequence",
        "stack",
        "validate",
    },
    "functional": {"cells", "forward", "noise"},
    "module": {"cells", "dispatch", "forward", "noise", "ops", "validate"},
    "convert": {"module"},
}
BELOW["check"] = {*BELOW}
# What measures the modules, with the benchmarks' means.
BELOW["tuning.grid"] = {"cells", "tuning.choice", "tuning.profile"}
BELOW["tuning.report"] = {"tuning.profile"}
BELOW["tuning.worker"] = {"benchmarks", "dispatch", "module", "tuning.profile"}
BELOW["tuning.session"] = {"benchmarks", "tuning.machine", "tuning.profile"}
_MEASURING = {f"tuning.{name}" for name in ("choice", "grid", "profile", "report", "session", "worker")}
BELOW["tuning.command"] = {"benchmarks", "cells", "testing", *_MEASURING}
BELOW["tuning.api"] = {"dispatch", "layout", *_MEASURING}
BELOW["cli"] = {*BELOW, "__init__", "benchmarks"}
BELOW["__main__"] = {"cli"}
BELOW["__init__"] = {"cells", "convert", "dispatch", "functional", "module", "tuning.api", "version"}


def place(path):
    """The name in BELOW of a file: of those in a package inside of this one with its name, which it has itself."""
    package = path.parent.name
    return path.stem if package == "fusedrnn" else package if path.stem == "__init__" else f"{package}.{path.stem}"


def package_of(path):
    """The full name of the package that a file is in."""
    return "fusedrnn" if path.parent.name == "fusedrnn" else f"fusedrnn.{path.parent.name}"


def imported(source, package):
    """The full names of all that a module of `package` imports, at its top and inside of functions.

    What stands behind `from a import` is a module or a name in one: both readings are returned where a is `package`.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            of_packages = base in ("fusedrnn", "fusedrnn.cells", "fusedrnn.tuning")
            names |= {f"{base}.{alias.name}" for alias in node.names} if of_packages else {base}
    return names


def siblings(source, package="fusedrnn"):
    """The modules of fusedrnn, without its name, that `source` imports; "__init__" for its public names."""
    found, places = set(), (*BELOW, "kernels", "benchmarks")
    for name in imported(source, package):
        top, _, rest = name.partition(".")
        if top == "fusedrnn":
            module = next((name for name in (".".join(rest.split(".")[:2]), rest.split(".")[0]) if name in places), "")
            found.add(module or "__init__")
    return found


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("import torch.nn as nn", "fusedrnn", {"torch.nn"}),
        ("from torch import nn", "fusedrnn", {"torch"}),
        ("from . import ops, reference", "fusedrnn", {"fusedrnn.ops", "fusedrnn.reference"}),
        ("from .layout import GATES", "fusedrnn", {"fusedrnn.layout"}),
        ("from fusedrnn import ops", "fusedrnn", {"fusedrnn.ops"}),
        ("def f():\n    from .module import LSTM", "fusedrnn", {"fusedrnn.module"}),
        ("from .cell import step", "fusedrnn.kernels", {"fusedrnn.kernels.cell"}),
        ("from ..ops import NAMESPACE", "fusedrnn.kernels", {"fusedrnn.ops"}),
        ("from .. import ops", "fusedrnn.kernels", {"fusedrnn.ops"}),
    ],
    ids=["import", "from", "sibling", "in-sibling", "absolute", "in-function", "in-kernels", "above", "from-above"],
)
def test_every_form_of_import_is_seen(source, package, expected):
    assert imported(source, package) == expected


def test_public_names_stand_for_the_whole_package():
    assert siblings("from fusedrnn import LSTM, ops") == {"__init__", "ops"}


def test_every_module_has_its_place():
    assert PACKAGE
    assert {place(path) for path in PACKAGE} <= BELOW.keys()


@pytest.mark.parametrize("path", PACKAGE, ids=place)
def test_imports_go_down(path):
    assert siblings(path.read_text(), package_of(path)) <= BELOW[place(path)]


def test_the_table_has_no_way_back_up():
    order = list(BELOW)
    for module, below in BELOW.items():
        if module not in ("cli", "__main__", "__init__"):
            assert all(order.index(name) < order.index(module) for name in below - {"kernels", "benchmarks"})


@pytest.mark.parametrize(
    "path",
    [path for path in PACKAGE if place(path) not in ("check", "cli", "tuning.command")],
    ids=lambda path: place(path),
)
def test_all_but_the_command_line_needs_only_torch(path):
    external = {name.split(".")[0] for name in imported(path.read_text(), package_of(path))} - {"fusedrnn"}
    assert external - sys.stdlib_module_names <= {"torch"}


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_triton_kernels_import_torch_triton_each_other_and_the_cells(path):
    package = ".".join(("fusedrnn", *path.relative_to(ROOT).parent.parts))
    for name in imported(path.read_text(), package):
        top = name.split(".")[0]
        allowed = {"torch", "triton", *sys.stdlib_module_names} | ({"numpy"} if path.stem == "interpreter" else set())
        own = name.startswith(("fusedrnn.kernels.", "fusedrnn.cells.")) or name == "fusedrnn.kernels"
        assert own or top in allowed, name


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_benchmarks_use_what_users_and_checks_use(path):
    found = siblings(path.read_text(), "fusedrnn.benchmarks")
    # Of the kernels only the planners, which are arithmetic: what they predict is compared with what was measured. On a
    # GPU launches are timed by themselves, and libraries looked at.
    below = {"gpu", "ops", "sources"} if path.stem in ("smoke", "session") else set()
    assert found <= {"__init__", "benchmarks", "cells", "dispatch", "testing", "kernels", "cuda_plan", "cuda", *below}
    planner = {name for name in imported(path.read_text(), "fusedrnn.benchmarks") if "fusedrnn.kernels" in name}
    assert planner <= {"fusedrnn.kernels", "fusedrnn.kernels.device", "fusedrnn.kernels.plan"}


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_benchmarks_load_only_torch_until_they_draw_or_meet_a_peer(path):
    at_the_top = "".join(ast.unparse(node) + "\n" for node in ast.parse(path.read_text()).body if not is_block(node))
    external = {name.split(".")[0] for name in imported(at_the_top, "fusedrnn.benchmarks")} - {"fusedrnn"}
    assert external - sys.stdlib_module_names <= {"torch"}


def is_block(node):
    return isinstance(node, (ast.FunctionDef, ast.ClassDef))


@pytest.mark.parametrize("path", NATIVE, ids=lambda path: path.name)
def test_kernels_include_nothing_of_torch(path):
    included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), re.MULTILINE)
    of_torch = [name for name in included if re.match(r"(torch|ATen|c10|pybind11)/|Python\.h", name)]
    assert included or path.name == "spec.h"  # what makes a cell needs nothing else
    assert not of_torch or path.parent.name == "torch", of_torch


def test_the_operators_are_among_the_native_sources():
    assert {"cpu/torch/ops.cpp", "cuda/torch/ops.cpp"} <= {str(path.relative_to(ROOT / "csrc")) for path in NATIVE}


@pytest.fixture(scope="module")
def imports(report, tmp_path_factory):
    """Four fresh imports: what each loaded beside torch, and the CPU seconds it took after torch's own.

    The first one writes bytecode for the others, as pip does when it installs: without it a test run with
    PYTHONDONTWRITEBYTECODE would time Python's compiler.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    code = f"""
import json, sys, time
import torch
sys.dont_write_bytecode, sys.pycache_prefix = False, {str(folder / "bytecode")!r}
before, start = set(sys.modules), time.process_time()
import fusedrnn
seconds = time.process_time() - start
print(json.dumps({{"seconds": seconds, "modules": sorted(set(sys.modules) - before)}}))
"""
    return [report(code, folder) for _ in range(4)]


def test_import_loads_little(imports):
    loaded = {name.split(".")[0] for name in imports[0]["modules"]}
    assert "fusedrnn" in loaded
    assert not loaded & {"triton", "matplotlib", "tqdm", "numpy", "onnx", "onnxscript"}
    late = {"torch._dynamo", "torch._inductor", "torch.onnx", "fusedrnn.kernels", "fusedrnn.cuda", "fusedrnn.testing"}
    late |= {"fusedrnn.benchmarks", "fusedrnn.tuning.worker"}
    assert not late & set(imports[0]["modules"])


def test_import_is_quick(imports):
    # Others on the processor only add to the time, so the least of the three counts.
    assert min(one["seconds"] for one in imports[1:]) < 0.1


def test_import_leaves_torch_as_it_was(report, tmp_path):
    code = """
import json
import torch, torch._dynamo
def state():
    return {
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "grad": [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()],
        "rng": torch.get_rng_state().sum().item(),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": [torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory],
        "backends": [torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32],
        "dynamo": {k: str(v) for k, v in torch._dynamo.config.get_config_copy().items()},
        "classes": [str(torch.nn.LSTM), str(torch.nn.LSTMCell), torch.nn.LSTM.forward.__module__],
    }
before = state()
import fusedrnn
print(json.dumps([before, state()]))
"""
    before, after = report(code, tmp_path)
    assert "allow_rnn" in before["dynamo"]
    assert after == before
