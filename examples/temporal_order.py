"""Temporal order: which came first, long ago.

A sequence of a hundred symbols: B at the beginning, E at the end, noise a to d between them, and two places where X or
Y stands, one near step 15 and one near step 55. The class, Q, R, S or U, is their order: XX, XY, YX or YY. This is a
problem of Hochreiter and Schmidhuber (1997). Left: an LSTM of ten units learns it; a plain RNN of as many weights per
unit stays at guessing, because the gradient does not reach back. The sequences are not equally long. Padded on the
left they all end at the last step, and the layer reads the padding; with `lengths` it does not. Right: the cell states
of the ten units over one sequence. Most hold one value through the noise.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SYMBOLS = "BEabcdXY"
CLASSES = {"XX": "Q", "XY": "R", "YX": "S", "YY": "U"}


class Level(NamedTuple):
    """Lengths of the sequences and the places of the two symbols, each from and to."""

    length: tuple[int, int]
    first: tuple[int, int]
    second: tuple[int, int]


LEVELS = {
    "easy": Level((8, 10), (1, 3), (4, 6)),
    "normal": Level((30, 35), (5, 10), (15, 20)),
    "hard": Level((100, 110), (10, 20), (50, 60)),
}


def batch(level: Level, B: int, left: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences one-hot [T, B, 8], zero where they are padded, their lengths [B] and classes [B]."""
    T = level.length[1]
    lengths = torch.randint(level.length[0], T + 1, (B,))
    time, symbols = torch.arange(T)[:, None], torch.randint(2, 6, (T, B))
    symbols[0] = 0
    classes = torch.zeros(B, dtype=torch.int64)
    for low, high in (level.first, level.second):
        which = torch.randint(2, (B,))
        symbols = torch.where(time == torch.randint(low, high + 1, (B,)), 6 + which, symbols)
        classes = 2 * classes + which
    symbols = torch.where(time == lengths - 1, 1, symbols)
    x = F.one_hot(symbols, len(SYMBOLS)).float() * (time < lengths)[..., None]
    if left:
        x = torch.stack([x[:, b].roll(T - int(lengths[b]), 0) for b in range(B)], dim=1)
    return x, lengths, classes


class Classifier(nn.Module):
    """A recurrent layer and a linear one on its last state: [T, B, 8] -> [B, 4]."""

    def __init__(self, kind: str, H: int) -> None:
        super().__init__()
        self.layer = common.CELLS[kind](len(SYMBOLS), H)
        self.head = nn.Linear(H, len(CLASSES))

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        _, state = self.layer(x, lengths=lengths)
        return self.head(common.last_hidden(state))


def learn(kind: str, options, left: bool, label: str) -> tuple[Classifier, list[float]]:
    """A trained classifier, and the accuracy on each batch, before it was learnt from."""
    torch.manual_seed(options.seed)
    model = Classifier(kind, options.hidden)
    if kind == "lstm":
        common.open_forget_gate(model.layer, options.forget_bias)
    accuracies = []

    def next_loss() -> Tensor:
        x, lengths, classes = batch(LEVELS[options.level], 64, left)
        logits = model(x, None if left else lengths)
        accuracies.append((logits.argmax(1) == classes).float().mean().item())
        return F.cross_entropy(logits, classes)

    common.train(model, next_loss, options.steps, 1e-2, label)
    return model, accuracies


def main(argv: Sequence[str] | None = None) -> common.Result:
    parser = common.Parser(__doc__)
    parser.add_argument("--level", choices=LEVELS, default="hard", help="how long to remember (%(default)s)")
    parser.whole("--steps", 1000, "of training", 10)
    parser.whole("--hidden", 10, "H, the hidden units", 1, 1024)
    parser.add_argument("--forget-bias", type=float, default=4.0, help="of the LSTM as it starts (%(default)s)")
    options = common.parse(parser, argv, level="easy", steps=220)

    runs = {
        "LSTM, lengths": learn("lstm", options, False, "LSTM, lengths"),
        "LSTM, padded left": learn("lstm", options, True, "LSTM, padded left"),
        "RNN, lengths": learn("rnn", options, False, "RNN, lengths"),
    }
    model = runs["LSTM, lengths"][0]
    x, lengths, classes = batch(LEVELS[options.level], 1)
    _, _, states = model.layer(x, lengths=lengths, return_states=True)
    T = int(lengths)

    figure, (left, right) = common.figure_with(1, 2, (7.6, 3.2))
    styles = (common.LINES["lstm"], {"color": common.SKY, "linestyle": "--"}, common.LINES["rnn"])
    for (label, (_, accuracies)), style in zip(runs.items(), styles, strict=True):
        left.plot(common.smooth(accuracies, max(options.steps // 50, 1)), label=label, **style)
    left.axhline(0.25, color=common.GREY, linewidth=0.8)
    left.set(ylim=(0, 1.03), xlabel="step", ylabel="accuracy", title=f"Order of two symbols, level {options.level}")
    left.legend(loc="center right")
    cells = states.c[0][:T, 0].detach().tanh().T
    image = right.imshow(cells.numpy(), cmap="RdBu", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=right, label="tanh(c)")
    text = "".join(SYMBOLS[token] for token in x[:T, 0].argmax(1).tolist())
    marked = [t for t, symbol in enumerate(text) if symbol in "BEXY"]
    right.set_xticks(marked, [text[t] for t in marked])
    name = list(CLASSES.values())[int(classes)]
    right.set(xlabel=f"a sequence of class {name}", ylabel="unit", title="Cell states of the LSTM")

    tenth = max(options.steps // 10, 1)
    ends = {label: sum(accuracies[-tenth:]) / tenth for label, (_, accuracies) in runs.items()}
    lstm, padded, rnn = ends.values()
    return common.Result(
        common.save(figure, options, "temporal_order"),
        ends,
        {
            "the LSTM with lengths is right in 9 of 10": lstm > 0.9,
            "lengths do no worse than padding on the left": lstm > padded - 0.05,
        }
        | ({} if options.quick else {"the RNN is right in less than 6 of 10": rnn < 0.6}),
    )


if __name__ == "__main__":
    sys.exit(common.script(main))
