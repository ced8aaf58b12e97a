"""Exploding gradients: a wall in the loss, and clipping by norm.

Left, the loss of a single unit that runs 50 steps, over its weight and its bias: flat land and a wall. Gradient
descent that reaches the wall gets a huge gradient and is thrown far away; with the gradient clipped by its norm it
takes a step of a sensible size and stays. Right, the same in earnest: an RNN with relu on the adding problem (the sum
of the two marked numbers of a sequence). Without clipping one of the first gradients throws the weights away: the loss
jumps by orders of magnitude, and what is left of the network never does better than answering 1 every time. With
clipping the same RNN, on the same data, learns.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import common
import torch
from torch import Tensor, nn

import fusedrnn

UNIT_STEPS = 50
TARGET = 0.7
GUESS = 1 / 6  # the mean square error of who always answers 1, the mean of the sum
START = (4.6, -2.55)  # weight and bias, below the wall


def unit_loss(weight: Tensor, bias: Tensor) -> Tensor:
    """The loss of one unit h = sigmoid(w h + b) after 50 steps, for each pair of weight and bias."""
    h = torch.full_like(weight, 0.5)
    for _ in range(UNIT_STEPS):
        h = torch.sigmoid(weight * h + bias)
    return (h - TARGET).square()


def descend(clip: float, steps: int = 40, lr: float = 0.4) -> Tensor:
    """The path of gradient descent over weight and bias [steps + 1, 2]."""
    at = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    path = [at.detach().clone()]
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(unit_loss(at[0], at[1]), at)
        gradient *= min(1.0, clip / gradient.norm().item())
        at = (at - lr * gradient).detach().requires_grad_()
        path.append(at.detach().clone())
    return torch.stack(path)


class Adder(nn.Module):
    """An RNN with relu that starts as the identity, and a linear layer: [T, B, 2] -> [B]."""

    def __init__(self, H: int) -> None:
        super().__init__()
        self.rnn = fusedrnn.RNN(2, H, nonlinearity="relu")
        self.head = nn.Linear(H, 1)
        nn.init.eye_(self.rnn.weight_hh_l0)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        return self.head(y[-1]).squeeze(-1)


def adding_problem(T: int, B: int = 32) -> tuple[Tensor, Tensor]:
    """Pairs (number, mark) [T, B, 2], of which two are marked, and the sums of the marked numbers [B]."""
    numbers, marks = torch.rand(T, B), torch.zeros(T, B)
    for b in range(B):
        marks[torch.randperm(T)[:2], b] = 1.0
    return torch.stack([numbers, marks], dim=2), (numbers * marks).sum(0)


def learn(clip: float, T: int, H: int, steps: int, lr: float, seed: int, label: str) -> tuple[list[float], list[float]]:
    """Trains by gradient descent with momentum; returns the loss and the gradient's norm at each step."""
    torch.manual_seed(seed)
    model = Adder(H)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses, norms = [], []
    for _ in common.progress(steps, label):
        x, sums = adding_problem(T)
        loss = (model(x) - sums).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def main(argv: Sequence[str] | None = None) -> common.Result:
    parser = common.Parser(__doc__)
    parser.whole("--steps", 1500, "of training", 10)
    parser.whole("--length", 20, "T, of the sequences", 2, 1000)
    parser.whole("--hidden", 64, "H, the hidden units", 1, 1024)
    parser.positive("--lr", 0.01, "the learning rate", 10.0)
    parser.positive("--clip", 1.0, "largest norm of the gradient", 1e6)
    options = common.parse(parser, argv, steps=150)

    runs = {}
    for label, clip in (("with clipping", options.clip), ("without", math.inf)):
        runs[label] = learn(clip, options.length, options.hidden, options.steps, options.lr, options.seed, label)
    paths = {"with clipping": descend(0.25), "without": descend(math.inf)}

    figure, (left, right) = common.figure_with(1, 2, (7.8, 3.3))
    weights, biases = torch.linspace(3, 6, 300).double(), torch.linspace(-4, -1.5, 300).double()
    surface = unit_loss(*torch.meshgrid(weights, biases, indexing="xy"))
    colours = left.pcolormesh(weights, biases, surface, cmap="Greys", vmin=0, vmax=0.9, rasterized=True)
    figure.colorbar(colours, ax=left)
    styles = {"with clipping": {"color": common.BLUE}, "without": {"color": common.RED, "linestyle": "--"}}
    for label, path in paths.items():
        left.plot(path[:, 0], path[:, 1], marker=".", markersize=4, linewidth=1, label=label, **styles[label])
    left.set(xlim=(3, 6), ylim=(-4, -1.5), xlabel="weight", ylabel="bias", title="Loss of one unit after 50 steps")
    left.legend(loc="upper right")
    for label, (losses, _) in runs.items():
        right.semilogy(common.smooth(losses, 20), label=label, **styles[label])
    right.axhline(GUESS, color=common.GREY, linestyle=":", label="always 1")
    right.set(xlabel="step", ylabel="loss", title="RNN with relu, adding problem")
    right.legend(loc="upper right")

    losses, norms = runs["with clipping"]
    unclipped, tenth = runs["without"][0], max(options.steps // 10, 1)
    ends = {label: sum(losses[-tenth:]) / tenth for label, (losses, _) in runs.items()}
    jump = max((loss if math.isfinite(loss) else math.inf) for loss in unclipped) / unclipped[0]
    claims = {
        "without clipping the loss jumps to more than a thousand times what it is at first": jump > 1000,
        "with clipping it never exceeds that by half": max(losses) < 1.5 * losses[0],
        "there are gradients ten times as long as what is let through": max(norms) > 10 * options.clip,
    }
    if not options.quick:
        claims["with clipping the loss in the end is lower"] = not ends["without"] < ends["with clipping"]
        claims["with clipping it learns, to less than half the loss of always 1"] = ends["with clipping"] < GUESS / 2
        claims["without it does not"] = not ends["without"] < GUESS / 2
    numbers = {"ends": ends, "jump": jump, "largest": max(norms), "paths": paths}
    return common.Result(common.save(figure, options, "exploding_gradients"), numbers, claims)


if __name__ == "__main__":
    sys.exit(common.script(main))
