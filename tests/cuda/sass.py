"""Counts what a step of a CUDA kernel costs one warp, from the machine code of sm_90a: no GPU is needed.

One lane of one warp is emulated: integers, predicates and branches exactly, with the sizes, the plan and the pointers
in the constant bank as a launch has them, so that the path through the kernel is the one that this plan takes. What is
loaded is zero, and so is what matrix instructions give; other floating-point numbers are computed, since the range of a
denominator decides whether its reciprocal is called as a function. Waits for other blocks are over as soon as the time
model says. The clock advances by the stall counts
that the instructions carry, and waits where an instruction names a scoreboard (its bits 105 to 125). A step is the
difference of two launches of different length.

What is assumed, and not read from the code (Hopper; a guess of +- 25 %; no GPU has confirmed any of it):

    LATENCY        clocks from the issue of an instruction that sets a scoreboard to the release of that scoreboard
    OPERANDS_READ  clocks until an instruction has read its operands, where the next writer of them waits for that
    PIPES          clocks for which a pipe is taken, per warp of its quarter of a multiprocessor
    PUSH, PEER     clocks, and bytes per clock, from the last push of a warp to the end of everybody's operand: latency
                   and throughput of distributed shared memory on an H100, arXiv 2402.13499
    RELEASE, FLAG  clocks of a release through L2 and of seeing it
    BARRIER        clocks of a barrier of a block whose warps come at the same time

All warps of a block are taken to do the same at the same time; of each quarter, those that share it issue in turns, so
a step is no shorter than the instructions of all of them.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fusedrnn.cells import named

LATENCY = {"LDS": 30, "LDC": 45, "MUFU": 22, "LDG": 280, "SHFL": 25, "S2R": 25, "S2UR": 25, "LDSM": 33, "ATOMS": 60}
LATENCY |= {"F2F": 22, "F2I": 22, "I2F": 22, "R2UR": 12, "SYNCS": 25, "DMMA": 30, "DADD": 16, "DMUL": 16, "DFMA": 16}
OTHER = 20
OPERANDS_READ = 14
PIPES = {
    "HMMA": 8,
    "MUFU": 8,
    "F2FP": 2,
    "F2F": 8,
    "F2I": 8,
    "I2F": 8,
    "STAS": 4,
    "LDS": 2,
    "STS": 2,
    "LDG": 4,
    "STG": 4,
}
PIPES |= {"LDGSTS": 4, "DFMA": 2, "DADD": 2, "DMUL": 2}
PUSH, PEER = 200, 14
RELEASE, FLAG = 500, 600
BARRIER = 20
CLOCK = 1.755  # GHz, of an H200

SEEN = 0x3FFFFFFF  # of a flag: later than any step
PARAMETERS = 0x210  # of the constant bank, where a kernel's begin


@dataclass
class Instruction:
    name: str  # with its modifiers
    operands: list[str]
    predicate: str  # that it depends on, or ""
    stall: int
    write: int  # the scoreboard that it sets until its result is there, or 7
    read: int  # and until it has read its operands
    wait: int  # a mask of scoreboards
    parts: list[str] = field(default_factory=list)  # of the name

    def __post_init__(self) -> None:
        self.parts = self.name.split(".")


@dataclass(frozen=True)
class Function:
    name: str
    code: list[Instruction]
    labels: dict[str, int]  # index of the instruction behind a label


def functions(listing: str) -> Iterator[Function]:
    """Of what `nvdisasm -hex -c` prints."""
    for text in re.split(r"\n(?=\.text\.)", listing)[1:]:
        name = text[6 : text.index(":")]
        code: list[Instruction] = []
        labels = {name: 0}
        pending = None
        for line in text.splitlines()[1:]:
            if found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);?\s*/\* 0x([0-9a-f]{16}) \*/", line):
                pending = found[1].strip().rstrip(";").strip()
            elif pending is not None and (found := re.match(r"\s*/\* 0x([0-9a-f]{16}) \*/", line)):
                code.append(_instruction(pending, int(found[1], 16)))
                pending = None
            elif found := re.match(r"(\.L_\S+|\$\S+):", line):
                labels[found[1]] = len(code)
            elif line.startswith("\t.section") and code:
                break
        yield Function(name, code, labels)


def _instruction(text: str, high: int) -> Instruction:
    predicate = ""
    if text.startswith("@"):
        predicate, text = text[1:].split(None, 1)
    name, _, rest = text.partition(" ")
    operands = [operand.strip().replace(".reuse", "") for operand in rest.split(",")] if rest.strip() else []
    stall, write, read, wait = high >> 41 & 15, high >> 46 & 7, high >> 49 & 7, high >> 52 & 63
    return Instruction(name, operands, predicate, stall, write, read, wait)


@dataclass
class Count:
    """Of one step, or of one launch."""

    instructions: float = 0
    waits: float = 0  # for a scoreboard, that took time
    waited: float = 0  # clocks of these
    clocks: float = 0
    exchange: float = 0  # clocks of waits for other blocks, and barriers
    after: float = 0  # clocks from the last that is sent to the wait for what others send
    mma: float = 0
    loads: float = 0  # from global memory, asynchronous copies included
    stores: float = 0  # to global memory
    pushes: float = 0
    calls: float = 0  # of functions, which are what reciprocals and quotients of unusual numbers take

    def minus(self, other: Count, steps: int) -> Count:
        return Count(**{k: (v - getattr(other, k)) / steps for k, v in vars(self).items()})


class Warp:
    """The emulation of lane 0 of a warp; see above."""

    def __init__(self, function: Function, parameters: bytes, thread: int, block: int, cluster: int, operand: int):
        self.f = function
        self.bank = bytes(PARAMETERS) + parameters + bytes(256)
        self.thread, self.block, self.cluster, self.operand = thread, block, cluster, operand
        self.r: dict[str, int] = {}
        self.p: dict[str, bool] = {}
        self.ready = [0.0] * 6
        self.pipes: dict[str, float] = {}
        self.copies: list[float] = []  # when each group of asynchronous copies is there
        self.copying = 0.0
        self.sent = self.released = 0.0
        self.now = 0.0
        self.count = Count()

    # -------------------------------------------------------------------------------------------- operands

    def reg(self, name: str) -> int:
        return 0 if name in ("RZ", "URZ", "SRZ") else self.r.get(name, 0)

    def pred(self, text: str) -> bool:
        negated = text.startswith("!")
        name = text.lstrip("!")
        return (True if name in ("PT", "UPT") else self.p.get(name, False)) != negated

    def constant(self, text: str, size: int = 4) -> int:
        inner = re.match(r"c\[0x0\]\[(.*)\]", text)
        assert inner, text
        at = sum(self.reg(part) if part.startswith(("R", "U")) else int(part, 16) for part in inner[1].split("+"))
        at = _signed(at)
        return int.from_bytes(self.bank[at : at + size], "little") if 0 <= at < len(self.bank) else 0

    def value(self, text: str, floating: bool = False) -> int:
        """Of 32 bits."""
        if text.startswith("-") and not text[1:2].isdigit() and "INF" not in text and "QNAN" not in text:
            inner = self.value(text[1:], floating)
            return inner ^ 0x80000000 if floating else -inner & 0xFFFFFFFF
        if text.startswith("~"):
            return ~self.value(text[1:]) & 0xFFFFFFFF
        if text.startswith("|"):
            return self.value(text[1:-1]) & 0x7FFFFFFF
        if text.startswith("c["):
            return self.constant(text)
        if text.startswith("`("):
            return 16 * self.f.labels.get(text[2:-1], 0)
        if text[0] in "RU" or text == "SRZ":
            return self.reg(text.split(".")[0])
        if text.lstrip("-").startswith("0x"):
            return int(text, 16) & 0xFFFFFFFF
        try:
            return _bits(float(text.replace("+", "").replace("QNAN", "nan")))
        except ValueError:
            return 0

    def wide(self, text: str) -> int:
        """Of 64 bits: a pair of registers."""
        if text.startswith("-"):
            return -self.wide(text[1:]) & (1 << 64) - 1
        if text.startswith("c["):
            return self.constant(text, 8)
        name = text.split(".")[0]
        if name in ("RZ", "URZ"):
            return 0
        if name[0] not in "RU":
            return self.value(text)
        return self.reg(name) | self.reg(_next(name)) << 32

    def set(self, name: str, value: int) -> None:
        if name not in ("RZ", "URZ"):
            self.r[name] = value & 0xFFFFFFFF

    def set_wide(self, name: str, value: int) -> None:
        if name not in ("RZ", "URZ"):
            self.set(name, value)
            self.set(_next(name), value >> 32)

    def double(self, text: str) -> float:
        """A pair of registers, or a literal, as float64."""
        if text.startswith("-") and not text[1].isdigit():
            return -self.double(text[1:])
        if text.startswith("|"):
            return abs(self.double(text[1:-1]))
        return _double(self.wide(text)) if text[0] in "RUc" else float(text.replace("QNAN", "nan"))

    def set_float(self, name: str, value: float, parts: list[str]) -> None:
        if "SAT" in parts:
            value = min(max(value, 0.0), 1.0)
        self.set(name, _bits(value))

    def set_pred(self, name: str, value: bool) -> None:
        if name not in ("PT", "UPT"):
            self.p[name] = value

    # -------------------------------------------------------------------------------------------- running

    def run(self, most: int = 2_000_000) -> Count:
        """To the end of the launch."""
        at, code = 0, self.f.code
        for _ in range(most):
            i = code[at]
            executed = not i.predicate or self.pred(i.predicate)
            self._time(i, executed)
            if executed:
                if i.parts[0] == "EXIT":
                    self.count.clocks = self.now
                    return self.count
                if i.parts[0] in ("BRA", "JMP"):
                    taken = (
                        all(self.pred(o) for o in i.operands[:-1] if not o.startswith(("~", "`"))) or "DIV" in i.parts
                    )
                    if taken and "DIV" not in i.parts:
                        at = self.f.labels[i.operands[-1][2:-1]]
                        self.now += 8  # the fetch behind a branch that is taken
                        continue
                elif i.parts[0] == "CALL":
                    self.count.calls += 1
                    at = self.f.labels[i.operands[-1][2:-1]]
                    continue
                elif i.parts[0] == "RET":
                    at = self.reg(i.operands[0].split()[0]) // 16  # R32 `(the function)
                    continue
                else:
                    self._execute(i)
            at += 1
        raise RuntimeError(f"{self.f.name} does not end")

    def _time(self, i: Instruction, executed: bool) -> None:
        begin = self.now
        for k in range(6):
            if i.wait >> k & 1:
                self.now = max(self.now, self.ready[k])
        name = i.parts[0]
        pipe = next((p for p in PIPES if name.startswith(p)), None) if executed else None
        self.count.instructions += 1
        if self.now > begin:
            self.count.waits += 1
            self.count.waited += self.now - begin
        if pipe is not None:
            self.now = max(self.now, self.pipes.get(pipe, 0.0))
            self.pipes[pipe] = self.now + PIPES[pipe]
        issue = self.now
        if executed:
            self._synchronise(i, name)
        self.now += max(i.stall, 1)
        if not executed:
            return
        if name == "LDGSTS":
            self.copying = max(self.copying, issue + LATENCY["LDG"])
        elif name == "LDGDEPBAR":
            self.copies.append(self.copying)
            self.copying = 0.0
            return  # its scoreboard is the groups'
        if i.write != 7:
            self.ready[i.write] = max(self.ready[i.write], issue + LATENCY.get(name, OTHER))
        if i.read != 7:
            self.ready[i.read] = max(self.ready[i.read], issue + OPERANDS_READ)
        self.count.mma += name in ("HMMA", "DMMA")
        self.count.loads += name in ("LDG", "LDGSTS")
        self.count.stores += name == "STG"
        self.count.pushes += name == "STAS" or name == "UBLKCP"

    def _synchronise(self, i: Instruction, name: str) -> None:
        """What takes as long as others need."""
        begin = self.now
        if name in ("STAS", "UBLKCP"):
            self.sent = self.now
        elif name == "SYNCS" and "PHASECHK" in i.parts:
            self.count.after += self.now - self.sent if self.sent else 0
            self.now = max(self.now, self.sent + PUSH + self.operand / PEER if self.sent else 0)
        elif name == "DEPBAR":
            left = int(i.operands[1], 16)
            due = self.copies[: len(self.copies) - left] if left else self.copies
            self.now = max([self.now, *due])
            self.count.waits += self.now > begin
            self.count.waited += self.now - begin
            return
        elif name == "MEMBAR" and "GPU" in i.parts:
            self.now += RELEASE
            self.released = self.now
        elif name == "LDG" and "STRONG" in i.parts:
            self.count.after += self.now - self.released
            self.now = max(self.now, self.released + FLAG)
        elif name in ("BAR", "UCGABAR_WAIT"):
            self.now += BARRIER
        self.count.exchange += self.now - begin

    # -------------------------------------------------------------------------------------------- instructions

    def _execute(self, i: Instruction) -> None:
        name = i.parts[0]
        handler = getattr(self, "_" + name.removeprefix("U").lower(), None)  # U: on uniform registers
        if handler is not None:
            handler(i.operands, i.parts)
        elif name in ZERO and i.operands and i.operands[0].startswith("R"):
            self.set(i.operands[0], 0)  # its value decides nothing
        elif name not in IGNORED:
            raise NotImplementedError(f"{i.name} {', '.join(i.operands)}")

    def _mov(self, o: list[str], parts: list[str]) -> None:
        self.set(o[0], self.value(o[1]))

    def _r2ur(self, o: list[str], parts: list[str]) -> None:
        """A predicate in front says which lanes have another value than the one that was taken: not this one."""
        if re.fullmatch(r"P\d", o[0]):
            self.set_pred(o[0], False)
        self._mov(o[-2:], parts)

    def _cs2r(self, o: list[str], parts: list[str]) -> None:
        self.set(o[0], int(self.now))
        if "32" not in parts:
            self.set_wide(o[0], 0 if o[1] == "SRZ" else int(self.now))

    def _s2r(self, o: list[str], parts: list[str]) -> None:
        special = {"SR_TID.X": self.thread, "SR_CTAID.X": self.block, "SR_CgaCtaId": self.block % self.cluster}
        special |= {"SR_LANEID": self.thread % 32}
        self.set(o[0], special.get(o[1], 0))

    _s2ur = _s2r

    def _ldc(self, o: list[str], parts: list[str]) -> None:
        if "64" in parts:
            self.set_wide(o[0], self.constant(o[1], 8))
        else:
            self.set(o[0], self.constant(o[1]))

    def _lds(self, o: list[str], parts: list[str]) -> None:
        self._loaded(o[0], parts, 0)

    def _ldg(self, o: list[str], parts: list[str]) -> None:
        self._loaded(o[0], parts, SEEN if "STRONG" in parts else 0)  # what is polled has come

    def _loaded(self, name: str, parts: list[str], word: int) -> None:
        for _ in range(4 if "128" in parts else 2 if "64" in parts else 1):
            self.set(name, word)
            name = _next(name) if name != "RZ" else name

    def _syncs(self, o: list[str], parts: list[str]) -> None:
        if "PHASECHK" in parts:
            self.set_pred(o[0], True)

    def _iadd3(self, o: list[str], parts: list[str]) -> None:
        outs, ins, carries = self._split(o)
        total = sum(self._addend(x) for x in ins)
        if "X" in parts:
            total += sum(self.pred(c) for c in carries)
        self.set(o[0], total)
        if outs:
            self.set_pred(outs[0], total >> 32 >= 1)
            if len(outs) > 1:  # of three addends, whose carry is up to 2
                self.set_pred(outs[1], total >> 32 >= 2)

    def _addend(self, text: str) -> int:
        """-x as ~x + 1, of 33 bits, so that the carry of a subtraction is the hardware's."""
        if text.startswith("-") and not text[1:].startswith("0x"):
            return (~self.value(text[1:]) & 0xFFFFFFFF) + 1
        return self.value(text)

    @staticmethod
    def _split(o: list[str]) -> tuple[list[str], list[str], list[str]]:
        """Predicates that are written, values, predicates that are read."""
        rest = o[1:]
        outs = []
        while rest and re.fullmatch(r"U?P[T\d]", rest[0]):
            outs.append(rest.pop(0))
        carries = []
        while rest and re.fullmatch(r"!?U?P[T\d]", rest[-1]):
            carries.insert(0, rest.pop())
        return outs, rest, carries

    def _viadd(self, o: list[str], parts: list[str]) -> None:
        self.set(o[0], self.value(o[1]) + self.value(o[2]))

    def _imad(self, o: list[str], parts: list[str]) -> None:
        outs, ins, carries = self._split(o)
        a, b = self.value(ins[0]), self.value(ins[1])
        if "U32" not in parts or "MOV" in parts:
            a, b = _signed(a), _signed(b)
        if "WIDE" in parts or "HI" in parts:
            total = a * b + self.wide(ins[2])
            if "HI" in parts:
                self.set(o[0], total >> 32)
            else:
                self.set_wide(o[0], total)
                if outs:
                    self.set_pred(outs[0], total >> 64 != 0)
            return
        if "X" in parts:
            total = self.value(ins[0]) * self.value(ins[1]) + self.value(ins[2]) + sum(map(self.pred, carries))
        else:
            total = a * b + self.value(ins[2])
        self.set(o[0], total)

    def _lea(self, o: list[str], parts: list[str]) -> None:
        outs, ins, carries = self._split(o)
        carry = sum(map(self.pred, carries)) if "X" in parts else 0
        if "HI" not in parts:
            total = (self.value(ins[0]) << int(ins[2], 16) & 0xFFFFFFFF) + self.value(ins[1]) + carry
        elif "SX32" in parts:
            low = _signed(self.value(ins[0])) << int(ins[2], 16)
            total = (low >> 32 & 0xFFFFFFFF) + self.value(ins[1]) + carry
        else:
            both = self.value(ins[0]) | self.value(ins[2]) << 32
            total = (both << int(ins[3], 16) >> 32 & 0xFFFFFFFF) + self.value(ins[1]) + carry
        self.set(o[0], total)
        if outs:
            self.set_pred(outs[0], total >> 32 != 0)

    def _shf(self, o: list[str], parts: list[str]) -> None:
        low, by, high = self.value(o[1]), self.value(o[2]), self.value(o[3])
        wraps = "W" in parts
        if parts[-1] in ("U64", "S64") or "U64" in parts or "S64" in parts:
            both, by = low | high << 32, by & 63 if wraps else min(by, 64)
            if "L" in parts:
                both <<= by
                result = both >> 32 if "HI" in parts else both
            else:
                if "S64" in parts:
                    both = both - (1 << 64) if both >> 63 else both
                both >>= by
                result = both >> 32 if "HI" in parts else both
        elif "L" in parts:
            by = by & 31 if wraps else min(by, 32)
            both = (low | high << 32) << by if "HI" in parts else low << by
            result = both >> 32 if "HI" in parts else both
        else:
            by = by & 31 if wraps else min(by, 32)
            if "HI" in parts:
                top = _signed(high) if "S32" in parts else high
                result = top >> by
            else:
                result = (low | high << 32) >> by
        self.set(o[0], result)

    def _lop3(self, o: list[str], parts: list[str]) -> None:
        outs = [o[0]] if re.fullmatch(r"U?P[T\d]", o[0]) else []
        rest = o[len(outs) :]
        a, b, c = (self.value(x) for x in rest[1:4])
        table = int(rest[4], 16)
        result = 0
        for k in range(8):
            if table >> k & 1:
                result |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
        result &= 0xFFFFFFFF
        self.set(rest[0], result)
        if outs:
            self.set_pred(outs[0], result != 0)

    def _plop3(self, o: list[str], parts: list[str]) -> None:
        a, b, c = (self.pred(x) for x in o[2:5])
        index = 4 * a + 2 * b + c
        self.set_pred(o[0], bool(int(o[5], 16) >> index & 1))
        if len(o) > 6:
            self.set_pred(o[1], bool(int(o[6], 16) >> index & 1))

    def _isetp(self, o: list[str], parts: list[str]) -> None:
        unsigned = "U32" in parts
        a, b = self.value(o[2]), self.value(o[3])
        if not unsigned:
            a, b = _signed(a), _signed(b)
        extended = "EX" in parts
        low = self.pred(o[5]) if extended and len(o) > 5 else False
        compare = parts[1]
        if extended and a == b and compare != "NE":  # then the comparison of the low words decides
            result = low
        else:
            result = {"EQ": a == b, "NE": a != b, "LT": a < b, "LE": a <= b, "GT": a > b, "GE": a >= b}[compare]
            result = result or (extended and compare == "NE" and low)
        other = self.pred(o[4])
        self._combined(o, parts, result, other)

    def _combined(self, o: list[str], parts: list[str], result: bool, other: bool) -> None:
        for name, value in ((o[0], result), (o[1], not result)):
            both = value and other if "AND" in parts else value or other if "OR" in parts else value != other
            self.set_pred(name, both)

    def _fsetp(self, o: list[str], parts: list[str]) -> None:
        a, b = (_float(self.value(x, True)) for x in o[2:4])
        self._combined(o, parts, _compared(parts[1], a, b), self.pred(o[4]))

    def _fadd(self, o: list[str], parts: list[str]) -> None:
        a, b = (_float(self.value(x, True)) for x in o[1:3])
        self.set_float(o[0], a + b, parts)

    def _fmul(self, o: list[str], parts: list[str]) -> None:
        a, b = (_float(self.value(x, True)) for x in o[1:3])
        self.set_float(o[0], a * b, parts)

    def _ffma(self, o: list[str], parts: list[str]) -> None:
        a, b, c = (_float(self.value(x, True)) for x in o[1:4])
        self.set_float(o[0], a * b + c, parts)

    def _fmnmx(self, o: list[str], parts: list[str]) -> None:
        a, b = (_float(self.value(x, True)) for x in o[1:3])
        self.set_float(o[0], min(a, b) if self.pred(o[3]) else max(a, b), parts)

    def _dadd(self, o: list[str], parts: list[str]) -> None:
        self.set_wide(o[0], _wide_bits(self.double(o[1]) + self.double(o[2])))

    def _dmul(self, o: list[str], parts: list[str]) -> None:
        self.set_wide(o[0], _wide_bits(self.double(o[1]) * self.double(o[2])))

    def _dfma(self, o: list[str], parts: list[str]) -> None:
        self.set_wide(o[0], _wide_bits(self.double(o[1]) * self.double(o[2]) + self.double(o[3])))

    def _dsetp(self, o: list[str], parts: list[str]) -> None:
        self._combined(o, parts, _compared(parts[1], self.double(o[2]), self.double(o[3])), self.pred(o[4]))

    def _f2f(self, o: list[str], parts: list[str]) -> None:
        if parts[-2:] == ["F64", "F32"]:
            self.set_wide(o[0], _wide_bits(_float(self.value(o[1], True))))
        else:
            self.set(o[0], _bits(self.double(o[1])) if parts[-2:] == ["F32", "F64"] else 0)

    def _hfma2(self, o: list[str], parts: list[str]) -> None:
        """As compilers use it: 0 * 0 + two halves, to load a constant."""
        halves = o[3:5] if o[1:3] == ["-RZ", "RZ"] and len(o) == 5 else ["0", "0"]
        self.set(o[0], int.from_bytes(struct.pack("<ee", float(halves[1]), float(halves[0])), "little"))

    def _sel(self, o: list[str], parts: list[str]) -> None:
        floating = parts[0] == "FSEL"
        self.set(o[0], self.value(o[1] if self.pred(o[3]) else o[2], floating))

    _fsel = _sel

    def _vimnmx(self, o: list[str], parts: list[str]) -> None:
        a, b = self.value(o[1]), self.value(o[2])
        if "U32" not in parts:
            a, b = _signed(a), _signed(b)
        self.set(o[0], min(a, b) if self.pred(o[3]) else max(a, b))

    _imnmx = _vimnmx

    def _viaddmnmx(self, o: list[str], parts: list[str]) -> None:
        a, b = self.value(o[1]) + self.value(o[2]) & 0xFFFFFFFF, self.value(o[3])
        if "U32" not in parts:
            a, b = _signed(a), _signed(b)
        self.set(o[0], min(a, b) if self.pred(o[4]) else max(a, b))

    def _iabs(self, o: list[str], parts: list[str]) -> None:
        self.set(o[0], abs(_signed(self.value(o[1]))))

    def _prmt(self, o: list[str], parts: list[str]) -> None:
        both = self.value(o[1]) | self.value(o[3]) << 32
        control, result = self.value(o[2]), 0
        for k in range(4):
            selector = control >> 4 * k & 15
            byte = both >> 8 * (selector & 7) & 255
            result |= (byte if selector < 8 else 255 * (byte >> 7)) << 8 * k
        self.set(o[0], result)

    def _p2r(self, o: list[str], parts: list[str]) -> None:
        bits = sum(self.p.get(f"P{k}", False) << k for k in range(7))
        mask = self.value(o[3])
        self.set(o[0], (self.value(o[2]) & ~mask) | (bits & mask))

    def _r2p(self, o: list[str], parts: list[str]) -> None:
        for k in range(7):
            if self.value(o[2]) >> k & 1:
                self.p[f"P{k}"] = bool(self.value(o[1]) >> k & 1)

    def _i2f(self, o: list[str], parts: list[str]) -> None:
        if "U64" in parts or "S64" in parts:
            value = self.wide(o[1])
        else:
            value = self.value(o[1]) if "U32" in parts else _signed(self.value(o[1]))
        self.set(o[0], _bits(float(value)))

    def _f2i(self, o: list[str], parts: list[str]) -> None:
        value = int(_float(self.value(o[1], True)))
        if "U64" in parts or "S64" in parts:
            self.set_wide(o[0], value)
        else:
            self.set(o[0], min(max(value, 0), 0xFFFFFFFF))

    def _mufu(self, o: list[str], parts: list[str]) -> None:
        if "RCP64H" in parts:  # of the upper half of a number, the upper half of its reciprocal
            self.set(o[0], _wide_bits(_reciprocal(_double(self.value(o[1], True) << 32))) >> 32)
            return
        value = _float(self.value(o[1], True))
        results = {"RCP": _reciprocal(value), "EX2": 2.0 ** min(value, 128.0), "TANH": math.tanh(value)}
        self.set(o[0], _bits(results.get(parts[1], 0.0)))

    def _shfl(self, o: list[str], parts: list[str]) -> None:
        """As if all lanes had the same."""
        self.set(o[1], self.value(o[2]))

    def _popc(self, o: list[str], parts: list[str]) -> None:
        self.set(o[0], self.value(o[1]).bit_count())

    def _shfl(self, o: list[str], parts: list[str]) -> None:
        """As if all lanes had the same."""
        self.set_pred(o[0], True)
        self.set(o[1], self.value(o[2]))

    def _vote(self, o: list[str], parts: list[str]) -> None:
        """As if all lanes had the same."""
        if o[0].startswith("R"):
            self.set(o[0], 0xFFFFFFFF if self.pred(o[-1]) else 0)
        else:
            self.set_pred(o[0], self.pred(o[-1]))

    _voteu = _vote


# Whose results are taken to be zero.
ZERO = {"F2FP", "HMMA", "DMMA", "HADD2", "HMUL2", "FCHK", "DMNMX", "LDSM", "LDL", "MAPA"}
IGNORED = {
    "NOP",
    "STS",
    "BSSY",
    "BSYNC",
    "WARPSYNC",
    "BAR",
    "STG",
    "STAS",
    "LDGSTS",
    "LDGDEPBAR",
    "DEPBAR",
    "CCTL",
    "YIELD",
}
IGNORED |= {"MEMBAR", "ERRBAR", "CGAERRBAR", "FENCE", "UCGABAR_ARV", "UCGABAR_WAIT", "ENDCOLLECTIVE", "BREAK", "BMOV"}
IGNORED |= {"ST", "STL", "NANOSLEEP", "UBLKCP", "ELECT", "ULDS", "RPCMOV"}


def _next(name: str) -> str:
    found = re.fullmatch(r"(U?R)(\d+)", name)
    assert found, name
    return f"{found[1]}{int(found[2]) + 1}"


def _signed(value: int) -> int:
    return value - (1 << 32) if value & 0x80000000 else value


def _bits(value: float) -> int:
    """float32, rounded to nearest, whatever the instruction says."""
    try:
        return struct.unpack("<I", struct.pack("<f", value))[0]
    except OverflowError:
        return 0x7F800000 if value > 0 else 0xFF800000


def _float(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFFFFFF))[0]


def _wide_bits(value: float) -> int:
    return struct.unpack("<Q", struct.pack("<d", value))[0]


def _double(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<Q", bits))[0]


def _reciprocal(value: float) -> float:
    return 1.0 / value if value else math.copysign(math.inf, value)


def _compared(how: str, a: float, b: float) -> bool:
    """LT, LTU, ...: those that end with U hold for NaN too."""
    if math.isnan(a) or math.isnan(b):
        return how.endswith("U") or how == "NAN"
    return {"EQ": a == b, "NE": a != b, "LT": a < b, "LE": a <= b, "GT": a > b, "GE": a >= b}.get(how[:2], how == "NUM")


# -------------------------------------------------------------------------------------------- steps of the kernels


@dataclass(frozen=True)
class Step:
    """What a step of a plan costs."""

    count: Count
    issue: float  # clocks to issue the instructions of the warps that share a quarter of a multiprocessor

    @property
    def microseconds(self) -> float:
        return max(self.count.clocks, self.issue) / (1000 * CLOCK)


def step(kernels: dict[str, Function], structs: Any, pass_: str, shape: Any, plan: Any, operand: int) -> Step:
    """A step of the first warp of a launch with whole slices, every output and gradient, no lengths and no resets.

    Args:
        kernels: by their mangled names.
        structs: has the mirrors of the structs of csrc/cuda (conftest.py).
        pass_: "forward" or "backward".
        shape, plan: of fusedrnn.cuda_plan.
        operand: bytes that a block receives in a step.
    """
    columns = plan.rows // 8
    wanted = rf"{pass_.capitalize()}I.*{plan.exchange.capitalize()}ExchangeELi{columns}ELb{int(shape.projected)}E"
    if plan.exchange == "scatter":
        wanted = rf"BackwardScatterI.*ELi{columns}E"
    function = next(f for name, f in kernels.items() if re.search(wanted, name))
    cluster = plan.blocks if plan.exchange in ("cluster", "scatter") else 1
    short, long = (
        Warp(function, bytes(_parameters(structs, pass_, shape, plan, T)), 0, 0, cluster, operand).run()
        for T in (_STEPS, 2 * _STEPS)
    )
    slices = -(-shape.B // (plan.rows * plan.groups))  # that a group takes one after another
    count = long.minus(short, _STEPS * slices)
    return Step(count, count.instructions * max(1.0, plan.threads / 128))


_STEPS = 8


def _parameters(structs: Any, pass_: str, shape: Any, plan: Any, T: int) -> Any:
    """Of a launch: pointers to anywhere, since nothing is loaded."""
    B, H, P, D, I = shape.B, shape.H, shape.P, shape.D, shape.I
    address = iter(range(1 << 36, 1 << 44, 1 << 36))
    sizes = structs.Sizes(T=T, B=B, H=H, P=P, D=D, projected=int(shape.projected), I=I)
    names = [name for name, _ in structs.PlanStruct._fields_]
    given = {"sizes": sizes, "plan": structs.PlanStruct(**dict(zip(names, plan.fields, strict=True)))}
    given["workspace"] = structs.Workspace(exchanged=next(address), flags=next(address))

    def strides(N: int) -> Any:
        return structs.Strides(d=N, t=B * D * N, b=D * N)

    cell = named(shape.cell)
    pointers = [
        "w_hh",
        "h0",
        "y",
        "hn",
        "saved",
        *(["c0"] if cell.carry else []),
        *(["c", "cn"] if cell.has_cell_state else []),
    ]
    if pass_ == "backward":
        pointers = ["w_hh", "dy", "dhn", "saved", "da", "dh0", *(["c", "c0"] if cell.carry else [])]
        pointers += ["dcn", "dc0"] if cell.has_cell_state else []
        given |= {"dy_strides": strides(P), "c_strides": strides(H)}
    else:
        given |= {"y_strides": strides(P), "c_strides": strides(H)}
        pointers += ["x", "w_ih"] if plan.fuse_input else ["xg"]
        if plan.fuse_input:
            pair = structs.P * 2
            given |= {name: pair(next(address), next(address)) for name in ("b_ih", "b_hh")}
            given["x_strides"] = structs.Strides(d=0, t=B * I, b=I)
        else:
            xg = len(cell.gates) * H
            given |= {"xg_wide": 0, "xg_strides": structs.Strides(d=T * B * xg, t=B * xg, b=xg)}
    if shape.projected:
        pointers += ["w_hr", *(["dh_out", "m"] if pass_ == "backward" else [])]
    given |= {name: next(address) for name in pointers}
    w_p = [next(address) for _ in range(D)] if cell.parameters else []
    given["extras"] = structs.extras(w_p, {kind: next(address) for kind in cell.noise}, 0, strides(H))
    return (structs.ForwardParams if pass_ == "forward" else structs.BackwardParams)(**given)
