"""The plain RNN by hand: backpropagation through time in ten lines.

A character model on the source of Python's standard library, trained three times from the same weights: with the
forward and backward pass written out step by step, with torch's autograd through that forward pass, and with
`fusedrnn.RNN`, whose kernel does all steps in one launch each way. Left, three losses on top of each other. Right, how
far each gradient is from autograd's, relative to its largest value: nothing but the rounding of float64.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import common
import torch
import torch.nn.functional as F
from torch import Tensor

import fusedrnn

NAMES = ("w_ih", "w_hh", "b_ih", "b_hh", "w_out", "b_out")
LEARNING_RATE = 0.3
TOLERANCE = 1e-12  # float64 rounds to 1e-16; sums of 25 steps in another order end up some 1e-15 apart


@dataclass
class Weights:
    """h_t = tanh(w_ih x_t + b_ih + w_hh h_{t-1} + b_hh), logits_t = w_out h_t + b_out."""

    w_ih: Tensor  # [H, V]
    w_hh: Tensor  # [H, H]
    b_ih: Tensor  # [H]
    b_hh: Tensor  # [H]
    w_out: Tensor  # [V, H]
    b_out: Tensor  # [V]


def forward(p: Weights, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x one-hot [T, B, V], targets [T, B] -> the loss, every h [T + 1, B, H] and the logits [T, B, V]."""
    h = [torch.zeros(x.shape[1], p.w_hh.shape[0], dtype=x.dtype)]
    for x_t in x:
        h.append(torch.tanh(x_t @ p.w_ih.T + p.b_ih + h[-1] @ p.w_hh.T + p.b_hh))
    hs = torch.stack(h)
    logits = hs[1:] @ p.w_out.T + p.b_out
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), hs, logits


def backward(p: Weights, x: Tensor, targets: Tensor, h: Tensor, logits: Tensor) -> list[Tensor]:
    """Backpropagation through time: the gradient of each of the weights, in the order of NAMES."""
    dlogits = (logits.softmax(2) - F.one_hot(targets, logits.shape[2])) / targets.numel()
    dw_ih, dw_hh, db = torch.zeros_like(p.w_ih), torch.zeros_like(p.w_hh), torch.zeros_like(p.b_ih)
    dh = torch.zeros_like(h[0])
    for t in reversed(range(len(x))):
        dh = dh + dlogits[t] @ p.w_out  # from this step's output, and from the step after
        da = dh * (1 - h[t + 1].square())  # through the tanh
        dw_ih += da.T @ x[t]
        dw_hh += da.T @ h[t]
        db += da.sum(0)
        dh = da @ p.w_hh  # to the step before
    dw_out = torch.einsum("tbv,tbh->vh", dlogits, h[1:])
    return [dw_ih, dw_hh, db, db.clone(), dw_out, dlogits.sum((0, 1))]


def by_hand(p: Weights, x: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
    loss, h, logits = forward(p, x, targets)
    return loss, backward(p, x, targets, h, logits)


def by_autograd(p: Weights, x: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [getattr(p, name).requires_grad_() for name in NAMES]
    loss, _, _ = forward(p, x, targets)
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


def by_kernel(p: Weights, x: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [getattr(p, name).requires_grad_() for name in NAMES]
    y, _ = fusedrnn.functional.rnn(x, leaves[:4])
    loss = F.cross_entropy((y @ p.w_out.T + p.b_out).flatten(0, 1), targets.flatten())
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


WAYS = {"by hand": by_hand, "autograd": by_autograd, "fusedrnn": by_kernel}


def initial_weights(V: int, H: int) -> Weights:
    sizes = {"w_ih": (H, V), "w_hh": (H, H), "b_ih": (H,), "b_hh": (H,), "w_out": (V, H), "b_out": (V,)}
    return Weights(
        **{name: torch.empty(size, dtype=torch.float64).uniform_(-(H**-0.5), H**-0.5) for name, size in sizes.items()}
    )


def main(argv: Sequence[str] | None = None) -> common.Result:
    parser = common.Parser(__doc__)
    parser.whole("--steps", 500, "of training", 2)
    parser.whole("--hidden", 64, "H, the hidden units", 1, 1024)
    options = common.parse(parser, argv, steps=15, hidden=16)

    T, B = 25, 32
    text = common.standard_library(200_000)
    vocabulary = "".join(sorted(set(text)))
    tokens = common.encode(text, vocabulary)
    initial = initial_weights(len(vocabulary), options.hidden)
    weights = {way: Weights(**{name: getattr(initial, name).clone() for name in NAMES}) for way in WAYS}
    losses: dict[str, list[float]] = {way: [] for way in WAYS}
    differences = {}
    for step in common.progress(options.steps, "three ways"):
        starts = torch.randint(len(tokens) - T - 1, (B,)).tolist()
        batch = torch.stack([tokens[start : start + T + 1] for start in starts], dim=1)
        x, targets = F.one_hot(batch[:-1], len(vocabulary)).double(), batch[1:]
        gradients = {}
        for way, compute in WAYS.items():
            loss, gradients[way] = compute(weights[way], x, targets)
            losses[way].append(loss.item())
            for name, gradient in zip(NAMES, gradients[way], strict=True):
                getattr(weights[way], name).detach().sub_(LEARNING_RATE * gradient)
        if step == 0:
            exact = gradients.pop("autograd")
            for way, values in gradients.items():
                pairs = zip(NAMES, values, exact, strict=True)
                differences[way] = {name: ((a - b).abs().max() / b.abs().max()).item() for name, a, b in pairs}

    figure, (left, right) = common.figure_with(1, 2, width_ratios=[3, 2])
    styles = (
        {"color": common.ORANGE, "linewidth": 5},
        {"color": "black", "linewidth": 2},
        {"color": "white", "linestyle": ":"},
    )
    for (way, values), style in zip(losses.items(), styles, strict=True):
        left.plot(common.smooth(values, 10), label=way, **style)
    left.set(xlabel="step", ylabel="loss, nats per character", title="The same training three times")
    left.legend(facecolor="#bbbbbb", frameon=True)
    for (way, values), marker, colour in zip(differences.items(), "os", (common.ORANGE, common.BLUE), strict=True):
        right.plot(list(values), [max(value, 1e-18) for value in values.values()], marker, color=colour, label=way)
    right.axhline(2**-53, color=common.GREY, linestyle="--", linewidth=1, label="rounding of float64")
    right.set(yscale="log", ylim=(1e-18, 1e-12), title="Gradient's distance from autograd's")
    right.legend(loc="upper right")

    largest = {way: max(values.values()) for way, values in differences.items()}
    apart = max(
        abs(a - b) for way in ("by hand", "fusedrnn") for a, b in zip(losses[way], losses["autograd"], strict=True)
    )
    return common.Result(
        common.save(figure, options, "bptt_by_hand"),
        {"differences": differences, "losses": losses, "apart": apart},
        {
            "the gradient by hand is autograd's but for rounding": largest["by hand"] < TOLERANCE,
            "the kernel's gradient is autograd's but for rounding": largest["fusedrnn"] < TOLERANCE,
            "the three losses stay within a millionth of each other": apart < 1e-6,
            "the loss falls": losses["by hand"][-1] < losses["by hand"][0],
        },
    )


if __name__ == "__main__":
    sys.exit(common.script(main))
