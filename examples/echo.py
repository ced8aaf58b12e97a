"""Echo: repeat what came k steps ago, on a stream that never ends.

Random bits stream in, and the layer has to say at every step which bit came k steps before. It reads the stream in
chunks of 20 and hands its state on from chunk to chunk, its values without their history: the gradient is cut there,
the memory is not. The figure has the share of right bits after the same short training for each k. Up to eight steps
back every cell repeats all of them, with the state that is handed on; an LSTM that starts every chunk from zeros can
only guess the first k bits of it (grey line). Further back this training is too short: at 12 steps the plain RNN alone
repeats every bit, at 16 none does. Gates are no help here, where the task asks for a shift register.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Echo(nn.Module):
    """A recurrent layer and a linear one at every step: bits [T, B] and a state -> logits [T, B] and the state."""

    def __init__(self, kind: str, H: int) -> None:
        super().__init__()
        self.layer = common.CELLS[kind](1, H)
        self.head = nn.Linear(H, 1)

    def forward(self, bits: Tensor, state=None) -> tuple[Tensor, object]:
        y, state = self.layer(bits[..., None] - 0.5, state)
        return self.head(y).squeeze(2), state


def learn(kind: str, k: int, hand_on: bool, options) -> float:
    """Trains on one stream, chunk after chunk; returns the share of right bits in the last fifth of it."""
    torch.manual_seed(options.seed)
    model = Echo(kind, options.hidden)
    state, before = None, torch.randint(2, (k, 32)).float()
    right = []

    def next_loss() -> Tensor:
        nonlocal state, before
        bits = torch.randint(2, (options.chunk, 32)).float()
        heard = torch.cat([before, bits])
        logits, last = model(bits, state)
        state, before = common.detached(last) if hand_on else None, heard[options.chunk :]
        answers = heard[: options.chunk]
        right.append(((logits > 0) == answers.bool()).float().mean().item())
        return F.binary_cross_entropy_with_logits(logits, answers)

    common.train(model, next_loss, options.steps, 1e-2, f"{common.LABELS[kind]}, k = {k}")
    last = right[-max(options.steps // 5, 1) :]
    return sum(last) / len(last)


def distances(text: str) -> list[int]:
    """A type for argparse: numbers of steps, separated by commas."""
    return [common.whole(1, 100)(part) for part in text.split(",")]


def main(argv: Sequence[str] | None = None) -> common.Result:
    parser = common.Parser(__doc__)
    parser.add_argument("--k", type=distances, default=[2, 5, 8, 12, 16], help="how far back (2,5,8,12,16)")
    parser.whole("--steps", 600, "of training", 5)
    parser.whole("--chunk", 20, "steps of one chunk", 1, 1000)
    parser.whole("--hidden", 32, "H, the hidden units", 1, 1024)
    options = common.parse(parser, argv, k=[2, 3], steps=150, chunk=10)

    accuracy = {kind: [learn(kind, k, True, options) for k in options.k] for kind in common.CELLS}
    zeros = [learn("lstm", k, False, options) for k in options.k]

    figure, axes = common.figure_with(1, 1, (5.6, 3.3))
    for (kind, values), marker in zip(accuracy.items(), "v^o", strict=True):
        axes.plot(options.k, values, marker=marker, label=common.LABELS[kind], **common.LINES[kind])
    axes.plot(options.k, zeros, "-.", marker="x", color=common.SKY, label="LSTM, from zeros at every chunk")
    most = [
        1 - min(k / options.chunk, 1) / 2 for k in options.k
    ]  # all bits but the first k of a chunk, which it guesses
    axes.plot(options.k, most, color=common.GREY, linewidth=0.8, label="the most that is possible from zeros")
    axes.axhline(0.5, color=common.GREY, linewidth=0.8)
    axes.set(ylim=(0.45, 1.02), xlabel="k, steps back", ylabel="share of right bits", title="Repeating a bit stream")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 0.1))

    near = [k for k, distance in enumerate(options.k) if distance <= 8]
    claims = {
        "every cell repeats what is up to 8 steps old": all(v[k] > 0.95 for v in accuracy.values() for k in near),
        "without its state the LSTM cannot": all(zeros[k] < accuracy["lstm"][k] for k in near),
    }
    if not options.quick:
        reach = {
            kind: max((k for k, v in zip(options.k, values, strict=True) if v > 0.95), default=0)
            for kind, values in accuracy.items()
        }
        claims["the plain RNN repeats from furthest back"] = reach["rnn"] > max(reach["gru"], reach["lstm"])
        claims["none repeats what is furthest back"] = max(reach.values()) < max(options.k)
    return common.Result(common.save(figure, options, "echo"), accuracy | {"zeros": zeros}, claims)


if __name__ == "__main__":
    sys.exit(common.script(main))
