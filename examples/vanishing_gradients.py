"""Vanishing gradients: how much the last step still knows of the earlier ones.

A layer reads 128 random vectors. The gradient of its last output with respect to each input says how much that input
could still change the answer, and so how well it can be learnt. In a plain RNN every step back multiplies the gradient
by the recurrent weights, and it fades exponentially. An LSTM as torch initialises it is little better: its forget gate
is half closed, and the cell halves at every step. A bias of 1 on the forget gate opens it. The right panel turns that
knob further: the gradient over all 128 steps grows by many orders of magnitude, and so it does in a GRU whose update
gate gets the bias, until the gate lets hardly anything new in.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise

import common
import torch
from torch import Tensor, nn

GATE = {"lstm": 1, "gru": 1}  # the place of the forget gate among i, f, g, o, and of the update gate among r, z, n
BIASES = range(7)


def open_gate(layer: nn.Module, kind: str, bias: float) -> None:
    """Adds a bias to the gate that keeps the old state."""
    H = layer.hidden_size
    with torch.no_grad():
        layer.bias_ih_l0[GATE[kind] * H : (GATE[kind] + 1) * H] += bias


def gradient_norms(kind: str, bias: float, x: Tensor, H: int, seed: int) -> Tensor:
    """The norm of d(last output) / d(x_t) for each t [T], the mean over the batch. x is [T, B, I]."""
    torch.manual_seed(seed)
    layer = common.CELLS[kind](x.shape[2], H, dtype=x.dtype)
    if bias:
        open_gate(layer, kind, bias)
    x = x.clone().requires_grad_()
    y, _ = layer(x)
    direction = torch.randn(H, dtype=x.dtype)
    (gradient,) = torch.autograd.grad((y[-1] @ direction).sum(), x)
    return gradient.norm(dim=2).mean(dim=1)


def main(argv: Sequence[str] | None = None) -> common.Result:
    parser = common.Parser(__doc__)
    parser.whole("--steps", 128, "T, the length of the sequence", 2, 1000)
    parser.whole("--hidden", 64, "H, the hidden units", 1, 1024)
    options = common.parse(parser, argv, steps=48, hidden=16)

    T, H = options.steps, options.hidden
    x = torch.randn(T, 16, 16, dtype=torch.float64)  # float32 runs out of digits at 1e-38

    def norms(kind: str, bias: float = 0.0) -> Tensor:
        return gradient_norms(kind, bias, x, H, options.seed)

    curves = {kind: norms(kind) for kind in common.CELLS}
    curves["lstm, forget bias 1"] = norms("lstm", 1.0)
    sweep = {kind: [norms(kind, bias)[0].item() for bias in BIASES] for kind in GATE}

    figure, (left, right) = common.figure_with(1, 2)
    back = range(T - 1, -1, -1)
    for name, curve in curves.items():
        style = common.LINES.get(name, {"color": common.SKY, "linestyle": "-."})
        left.semilogy(back, curve, label=common.LABELS.get(name, "LSTM, forget-gate bias 1"), **style)
    left.set(xlabel="steps back from the last one", ylabel="norm of the gradient", title="Weights as initialised")
    left.legend()
    for kind, marker in (("lstm", "o"), ("gru", "s")):
        label = "LSTM, forget gate" if kind == "lstm" else "GRU, update gate"
        right.semilogy(BIASES, sweep[kind], marker=marker, label=label, **common.LINES[kind])
    right.axhline(curves["rnn"][0], color=common.LINES["rnn"]["color"], linestyle=":")
    right.annotate("RNN", (5.4, curves["rnn"][0]), va="bottom", color=common.LINES["rnn"]["color"])
    right.set(xlabel="bias of the gate", ylabel=f"norm after {T} steps back", title="Opening the gate")
    right.legend()

    first = {name: curve[0].item() for name, curve in curves.items()}
    return common.Result(
        common.save(figure, options, "vanishing_gradients"),
        {"first": first, "last": {name: curve[-1].item() for name, curve in curves.items()}, "sweep": sweep},
        {
            "the gradient of the plain RNN fades by more than a million": curves["rnn"][-1] > 1e6 * curves["rnn"][0],
            "a forget-gate bias of 1 keeps a thousand times more": first["lstm, forget bias 1"] > 1e3 * first["lstm"],
            "up to a bias of 3 each step opens the gate further": all(
                a < b for values in sweep.values() for a, b in pairwise(values[:4])
            ),
        },
    )


if __name__ == "__main__":
    sys.exit(common.script(main))
