"""Variants of the LSTM: peephole connections, coupled gates, zoneout and recurrent dropout, in any combination.

    i = sigmoid(a_i + p_i c')     f = sigmoid(a_f + p_f c'), or 1 - i     g = tanh(a_g)     o = sigmoid(a_o + p_o c)
    c = f c' + i (v_g g)          m = o tanh(c)                           c_t = v_c c' + (1 - v_c) c

where c' is the previous cell state and c_t the new one. Without zoneout c_t = c; without peepholes p = 0; without
dropout of the candidate v_g = 1.

Peepholes: Gers and Schmidhuber 2000; coupled gates: Greff et al. 2017 (arXiv 1503.04069), CIFG; zoneout: Krueger et al.
2017 (arXiv 1606.01305), where m sees the new cell state before zoneout; dropout of the candidate: Semeniuta et al. 2016
(arXiv 1603.05118); dropout of the state: Gal and Ghahramani 2016 (arXiv 1512.05287).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .lstm import LSTM
from .spec import Cell


def lstm_variant(peephole: bool = False, coupled: bool = False, noise: tuple[str, ...] = ()) -> Cell:
    """The LSTM with these options; the plain one for none.

    Args:
        peephole: one parameter per unit for each of i, f and o, or of i and o if coupled.
        coupled: no forget gate, f = 1 - i; gates i, g, o.
        noise: names of `NOISE`, in its order.
    """
    return _ALL[peephole, coupled, noise]


def _variant(peephole: bool, coupled: bool, noise: tuple[str, ...]) -> Cell:
    gates = ("i", "g", "o") if coupled else ("i", "f", "g", "o")
    peepholes = tuple(gate for gate in gates if gate != "g") if peephole else ()

    def step(
        a: Tensor, c_in: Tensor, p: Tensor | None = None, v: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        maps, v = dict(zip(gates, a.chunk(len(gates), dim=-1), strict=True)), v or {}
        ps = _by_gate(p, peepholes)
        i = (maps["i"] + ps["i"] * c_in if ps else maps["i"]).sigmoid()
        f = 1 - i if coupled else (maps["f"] + ps["f"] * c_in if ps else maps["f"]).sigmoid()
        g = maps["g"].tanh()
        c = f * c_in + i * (g * v["g"] if "g" in v else g)
        o = (maps["o"] + ps["o"] * c if ps else maps["o"]).sigmoid()
        c_out = v["c"] * c_in + (1 - v["c"]) * c if "c" in v else c
        return o * c.tanh(), c_out, torch.cat([i, g, o] if coupled else [i, f, g, o], dim=-1)

    def activate_(a: Tensor) -> None:
        if peepholes:
            raise NotImplementedError("gates of peepholes are functions of c as well, and are always kept")
        for gate, rows in zip(gates, a.chunk(len(gates), dim=-1), strict=True):
            rows.tanh_() if gate == "g" else rows.sigmoid_()

    def step_backward(
        saved: Tensor,
        c_in: Tensor,
        c_out: Tensor,
        dm: Tensor,
        dc_out: Tensor,
        p: Tensor | None = None,
        v: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        of, v = dict(zip(gates, saved.chunk(len(gates), dim=-1), strict=True)), v or {}
        i, g, o = of["i"], of["g"], of["o"]
        f = 1 - i if coupled else of["f"]
        ps = _by_gate(p, peepholes)
        candidate = g * v["g"] if "g" in v else g
        c = before_zoneout(saved, c_in, c_out, v)
        tanh_c = c.tanh()
        da_o = dm * tanh_c * o * (1 - o)
        dc = dm * o * (1 - tanh_c * tanh_c) + (dc_out * (1 - v["c"]) if "c" in v else dc_out)
        if ps:
            dc = dc + da_o * ps["o"]
        da_i = dc * (candidate - c_in if coupled else candidate) * i * (1 - i)
        da_f = dc * c_in * f * (1 - f)  # with coupled gates a part of da_i
        da_g = dc * i * (1 - g * g) * v.get("g", 1)
        dc_in = dc * f + (dc_out * v["c"] if "c" in v else 0)
        da = [da_i, da_g, da_o] if coupled else [da_i, da_f, da_g, da_o]
        results = torch.cat(da, dim=-1), dc_in, o * tanh_c
        if not ps:
            return (*results, None) if cell.has_operands else results  # type: ignore[return-value]
        dc_in = dc_in + da_i * ps["i"] + (0 if coupled else da_f * ps["f"])
        return results[0], dc_in, results[2], peepholes_backward(results[0], c_in, c)

    def peepholes_backward(da: Tensor, c_in: Tensor, c: Tensor) -> Tensor:
        """c: what o sees, and m is made of."""
        each = dict(zip(gates, da.chunk(len(gates), dim=-1), strict=True))
        return torch.cat([each[gate] * (c if gate == "o" else c_in) for gate in peepholes], dim=-1)

    def parameters_backward(da: Tensor, saved: Tensor, c_in: Tensor, c_out: Tensor, v: dict[str, Tensor]) -> Tensor:
        return peepholes_backward(da, c_in, before_zoneout(saved, c_in, c_out, v))

    def before_zoneout(saved: Tensor, c_in: Tensor, c_out: Tensor, v: dict[str, Tensor]) -> Tensor:
        """The cell state that m is made of."""
        if "c" not in v:
            return c_out
        of = dict(zip(gates, saved.chunk(len(gates), dim=-1), strict=True))
        f = 1 - of["i"] if coupled else of["f"]
        return f * c_in + of["i"] * (of["g"] * v["g"] if "g" in v else of["g"])

    blocks = tuple(range(len(gates)))
    kind = LSTM.name + "_peephole" * peephole + "_coupled" * coupled
    cell = Cell(
        name=f"{kind}+{''.join(noise)}" if noise else kind,  # such as "lstm_peephole_coupled+hcg"
        gates=gates,
        maps=gates,
        input=blocks,
        recurrent=blocks,
        saved=gates,
        carry="cell",
        step=step,
        activate_=activate_,
        step_backward=step_backward,
        parameters=peepholes,
        noise=noise,
        parameters_backward=parameters_backward if peepholes else None,
    )
    return cell


def _by_gate(p: Tensor | None, gates: tuple[str, ...]) -> dict[str, Tensor]:
    """Peepholes [K*H] by gate; empty without peepholes."""
    return {} if p is None else dict(zip(gates, p.chunk(len(gates), dim=-1), strict=True))


_NOISES = [tuple("".join(kinds)) for kinds in itertools.product(("", "h"), ("", "c"), ("", "g", "r"))]
_ALL = {
    options: _variant(*options) if any(options) else LSTM
    for options in itertools.product((False, True), (False, True), _NOISES)
}
VARIANTS = {cell.name: cell for cell in _ALL.values() if cell is not LSTM}
