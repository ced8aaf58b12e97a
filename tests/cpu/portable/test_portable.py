"""The portable CPU kernels on other processors: cross-compiled without torch, run by QEMU, held to the reference.

`make kernels` runs these, where a cross compiler and QEMU are (Debian: g++-aarch64-linux-gnu and qemu-user).
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fusedrnn import reference, testing
from fusedrnn.cells import CELLS
from fusedrnn.layout import split_directions

pytestmark = pytest.mark.compiles

ROOT = Path(__file__).parents[3]
SOURCES = [Path(__file__).with_name("run_kernels.cpp"), ROOT / "csrc/cpu/kernels_portable.cpp"]
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-static", "-pthread"]
TARGETS = {"aarch64": ("aarch64-linux-gnu-g++", ["qemu-aarch64"])}  # a compiler, and what runs its programs
F32, F64, BF16, F16 = DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of Dtype
# T, B, I, H, D, packed weights, threads, lengths and resets
SIZES = [
    (3, 2, 5, 3, 1, False, 1, False),
    (7, 5, 9, 20, 2, True, 1, True),
    (9, 1, 8, 36, 1, True, 2, False),
    (6, 29, 17, 33, 2, True, 2, True),
]


@pytest.fixture(scope="module", params=TARGETS)
def run(request, tmp_path_factory):
    """Runs the program that was compiled for a processor: bytes in, bytes out."""
    compiler, emulator = TARGETS[request.param]
    missing = [tool for tool in (compiler, *emulator) if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not found")
    program = tmp_path_factory.mktemp("portable") / "run_kernels"
    sets = program.with_name("sets.cpp")
    sets.write_text(
        '#include "params.h"\nnamespace fusedrnn {\nextern const KernelTable kPortable;\n'
        "const Isa* const* instruction_sets() {\n"
        '  static const Isa portable = {"portable", [] { return true; }, &kPortable};\n'
        "  static const Isa* const all[] = {&portable, nullptr};\n  return all;\n}\n}\n"
    )
    command = [compiler, *FLAGS, f"-I{ROOT / 'csrc/cpu'}", *map(str, SOURCES), str(sets), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr

    def call(problem):
        done = subprocess.run([*emulator, str(program)], input=problem, capture_output=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    return call


def raw(*tensors):
    return b"".join(t.detach().contiguous().view(torch.uint8).numpy().tobytes() if t.numel() else b"" for t in tensors)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_against_the_reference(run, name, dtype, size):
    cell = CELLS[name]
    T, B, I, H, D, packs, threads, ragged = size
    G, C = len(cell.gates), cell.cell_size(H)
    computed = reference.compute_dtype(dtype)
    torch.manual_seed(1)

    def some(*sizes, scale=1.0):
        return (torch.randn(*sizes) * scale).to(dtype)

    x, h0, c0 = some(T, B, I), some(D, B, H, scale=0.3), some(D, B, C, scale=0.3)
    weights = [some(*size, scale=H**-0.5) for _ in range(D) for size in ((G * H, I), (G * H, H), (G * H,), (G * H,))]
    dy, dhn, dcn = some(T, B, D * H), some(D, B, H), some(D, B, C)
    lengths = torch.randint(0, T + 1, (B,)) if ragged else None
    reset = torch.rand(T, B) < 0.2 if ragged else None

    header = [DTYPES.index(dtype), list(CELLS).index(name), T, B, I, H, D, packs, threads, ragged, ragged]
    given = [x, x.to(computed), *weights, h0, c0, dy, dhn, dcn, *(t for t in (lengths, reset) if t is not None)]
    if lengths is not None:
        given[1] = reference.where_exists(given[1], reference.existing(T, lengths))
    out = run(raw(torch.tensor([int(n) for n in header]), *given))

    # What came back, in the order of the program.
    def taken(kind, *sizes):
        nonlocal out
        count = torch.Size(sizes).numel() * kind.itemsize
        piece, out = out[:count], out[count:]
        return torch.frombuffer(bytearray(piece), dtype=kind).view(sizes) if count else torch.empty(sizes, dtype=kind)

    ours = {"y": taken(dtype, T, B, D * H), "hn": taken(dtype, D, B, H), "cn": taken(dtype, D, B, C)}
    da = taken(computed, D, T * B, len(cell.maps) * H)
    ours |= {"dh0": taken(dtype, D, B, H), "dc0": taken(dtype, D, B, C)}
    assert not out
    exists = None if lengths is None else reference.existing(T, lengths)
    xs = reference.where_exists(x.to(computed), exists).flatten(0, 1)
    for d, w in enumerate(split_directions(weights, D == 2)):
        of_input, of_state = cell.rows_of(da[d], cell.input), cell.rows_of(da[d], cell.recurrent)
        ours |= {f"dw_ih{d}": of_input.T @ xs, f"db_ih{d}": of_input.sum(0), f"db_hh{d}": of_state.sum(0)}
        ours[f"dx{d}"] = of_input @ w.w_ih.to(computed)

    def expected(kind):
        given = [t.to(kind) for t in (x, h0, c0, dy, dhn, dcn)]
        x_, h0_, c0_, dy_, dhn_, dcn_ = given
        ws = [w.to(kind) for w in weights]
        y, hn, cn, c, saved = reference.layer(cell, x_, ws, D == 2, h0_, c0_ if C else None, lengths, reset)
        found = {"y": y, "hn": hn, "cn": cn}
        dx, dh0, dc0, dw = reference.layer_backward(
            cell,
            dy_,
            dhn_,
            dcn_ if C else None,
            None,
            x_,
            ws,
            D == 2,
            h0_,
            c0_ if C else None,
            lengths,
            reset,
            y,
            c,
            saved,
        )
        found |= {"dh0": dh0, "dc0": dc0, "dx": dx}
        for d in range(D):
            found |= {f"dw_ih{d}": dw[4 * d], f"db_ih{d}": dw[4 * d + 2], f"db_hh{d}": dw[4 * d + 3]}
        return found

    ours["dx"] = sum(ours.pop(f"dx{d}") for d in range(D)).view(T, B, I)
    exact, in_dtype = expected(torch.float64), expected(dtype)
    for key, values in ours.items():
        if values.numel():
            testing.assert_as_exact_as(key, values.to(dtype), in_dtype[key], exact[key])
