"""The emulator of machine code (sass.py), on code that stands here; test_cuda_compile.py has it read nvcc's."""

import importlib.util
import sys
from pathlib import Path

import pytest


def load(name):
    """A module of this folder: with --import-mode=importlib it cannot be imported."""
    spec = importlib.util.spec_from_file_location(f"fusedrnn_tests_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


sass = load("sass")


def launched(code):
    """The warp after a launch of a function: a line is an instruction, which stalls for one clock, or a label."""
    lines = ["", ".text._Zmain:"]
    count = 0
    for line in code.strip().splitlines():
        if line.strip().endswith(":"):
            lines.append(line.strip())
            continue
        lines.append(f"        /*{16 * count:04x}*/    {line.strip()} ;  /* 0x{0:016x} */")
        lines.append(f"                                /* 0x{1 << 41 | 7 << 46 | 7 << 49:016x} */")
        count += 1
    (function,) = sass.functions("\n".join(lines))
    warp = sass.Warp(function, b"", thread=0, block=0, cluster=1, operand=0)
    warp.run(most=1000)
    return warp


def test_a_function_returns_to_where_it_was_called():
    """Behind the register that holds the address stands the function to which it is relative."""
    warp = launched("""
        MOV R4, 0x20
        CALL.REL.NOINC `($helper)
        VIADD R5, R5, 0x1
        EXIT
        $helper:
        MOV R5, 0x5
        RET.REL.NODEC R4 `(_Zmain)
    """)
    assert warp.reg("R5") == 6
    assert warp.count.calls == 1


# 1 / (1 + exp(-x)) as nvcc 13.0 compiles it for sm_90: where 1 + exp(-x) is not a usual number, a function is called.
SIGMOID = """
    MOV R1, {x}
    IMAD.MOV.U32 R2, RZ, RZ, 0x3bbb989d
    IMAD.MOV.U32 R3, RZ, RZ, 0x437c0000
    FFMA.SAT R2, -R1, R2, 0.5
    FFMA.RM R2, R2, R3, 12582913
    FADD R3, R2, -12583039
    IMAD.SHL.U32 R2, R2, 0x800000, RZ
    FFMA R3, -R1, 1.4426950216293334961, -R3
    FFMA R3, -R1, 1.925963033500011079e-08, R3
    MUFU.EX2 R3, R3
    FFMA R4, R2, R3, 1
    VIADD R2, R4, 0x1800000
    LOP3.LUT R2, R2, 0x7f800000, RZ, 0xc0, !PT
    ISETP.GT.U32.AND P0, PT, R2, 0x1ffffff, PT
    @P0 BRA `(.L_usual)
    CALL.REL.NOINC `($slow)
    .L_usual:
    MUFU.RCP R5, R4
    FFMA R2, R4, R5, -1
    FADD.FTZ R3, -R2, -RZ
    FFMA R5, R5, R3, R5
    EXIT
    $slow:
    EXIT
"""


@pytest.mark.parametrize(("x", "sigmoid"), [(0.0, 0.5), (1.0, 0.7310586), (-3.0, 0.0474259)])
def test_floating_point_numbers_are_computed(x, sigmoid):
    warp = launched(SIGMOID.format(x=f"{sass._bits(x):#x}"))
    assert warp.count.calls == 0
    assert sass._float(warp.reg("R5")) == pytest.approx(sigmoid, abs=1e-5)


def test_float64():
    """Constants are in two registers; of a reciprocal the hardware gives the upper half."""
    warp = launched("""
        MOV R2, RZ
        MOV R3, 0x40080000
        MUFU.RCP64H R5, R3
        MOV R4, RZ
        DFMA R6, -R2, R4, 1
        DFMA R6, R4, R6, R4
        DSETP.GT.AND P0, PT, |R6|, 0.25, PT
        @P0 DADD R6, R6, -R4
        EXIT
    """)
    assert sass._double(warp.wide("R4")) == pytest.approx(1 / 3, abs=1e-6)
    assert 0 < sass._double(warp.wide("R6")) < 1e-6


def test_a_constant_of_two_halves_is_the_number_that_its_bits_are():
    """So compilers load a small integer: here how often a loop runs."""
    warp = launched("""
        HFMA2.MMA R1, -RZ, RZ, 0, 1.78813934326171875e-07
        HFMA2.MMA R2, -RZ, RZ, 1.875, 0
        MOV R3, RZ
        .L_loop:
        VIADD R3, R3, 0x10
        VIADD R1, R1, 0xffffffff
        ISETP.NE.AND P0, PT, R1, RZ, PT
        @P0 BRA `(.L_loop)
        EXIT
    """)
    assert warp.reg("R3") == 3 * 16
    assert sass._float(warp.reg("R2")) == 1.0


def test_a_loop_over_the_values_of_a_warp_ends_with_the_only_one():
    """The predicate of R2UR: lanes whose value is another one."""
    warp = launched("""
        MOV R20, 0x30
        PLOP3.LUT P2, PT, PT, PT, PT, 0x80, 0x0
        .L_loop:
        VIADD R3, R3, 0x1
        PLOP3.LUT P1, PT, P1, P2, PT, 0xa2, 0x0
        @P2 R2UR P1, UR8, R20
        @P2 PLOP3.LUT P2, PT, P1, PT, PT, 0x80, 0x0
        @P2 BRA.U.ANY `(.L_loop)
        EXIT
    """)
    assert warp.reg("R3") == 1
    assert warp.reg("UR8") == 0x30


def test_code_that_does_not_end_is_told():
    with pytest.raises(RuntimeError, match="_Zmain does not end"):
        launched("""
            .L_loop:
            BRA `(.L_loop)
        """)
