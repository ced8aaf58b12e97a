"""Reading programs: what does this print?

An LSTM reads the text of a small Python program character by character and writes what the program prints, without
ever running one (after Zaremba and Sutskever 2014). There are four kinds: a sum, a sum with a variable, with two
variables in either order, and with a second assignment that changes one of them. Left, the share of right answers for
each kind as training goes on, for pairs of numbers that never occurred in training. Right, some programs and what the
model says. For a thousand steps it gets almost nothing right; in the end nine of ten answers are, also those to
programs that assign a variable twice. It uses the encoder and decoder of seq2seq.py, attention included.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import common
import torch
import torch.nn.functional as F
from seq2seq import Writer, collate, right_answers
from torch import Tensor

SYMBOLS = "0123456789+=();abcdefprint"
NAMES = "abcdef"
KINDS = {
    "sum": "print({x}+{y})",
    "variable": "{a}={x};print({a}+{y})",
    "two variables": "{a}={x};{b}={y};print({b}+{a})",
    "reassignment": "{a}={z};{b}={y};{a}={x};print({a}+{b})",
}
LARGEST = 29


def held_out(x: int, y: int) -> bool:
    """Whether this pair of numbers is kept from training: one in eight is."""
    return (7 * x + 3 * y) % 8 == 0


def program(kind: str, test: bool) -> tuple[str, str]:
    """A program and what it prints."""
    while True:
        x, y, z = torch.randint(LARGEST + 1, (3,)).tolist()
        if held_out(x, y) == test:
            break
    a, b = (NAMES[k] for k in torch.randperm(len(NAMES))[:2].tolist())
    return KINDS[kind].format(a=a, b=b, x=x, y=y, z=z), str(x + y)


def programs(count: int, test: bool) -> list[tuple[str, str]]:
    """Programs of all kinds in turn."""
    kinds = list(KINDS)
    return [program(kinds[k % len(kinds)], test) for k in range(count)]


def main(argv: Sequence[str] | None = None) -> common.Result:
    parser = common.Parser(__doc__)
    parser.whole("--steps", 4000, "of training", 10)
    parser.whole("--hidden", 128, "H, the hidden units", 1, 1024)
    options = common.parse(parser, argv, steps=120, hidden=24)

    model = Writer(SYMBOLS, options.hidden, attention=True)
    tests = {kind: [program(kind, test=True) for _ in range(150)] for kind in KINDS}
    shares: dict[str, list[float]] = {kind: [] for kind in KINDS}

    def next_loss() -> Tensor:
        questions, lengths, given, targets = collate(programs(64, test=False), SYMBOLS)
        return F.cross_entropy(model(questions, lengths, given).flatten(0, 1), targets.flatten())

    def measure() -> None:
        for kind, test in tests.items():
            shares[kind].append(right_answers(model, test, SYMBOLS).float().mean().item())

    losses = common.train(model, next_loss, options.steps, 4e-3, "reading programs", anneal=True, measure=measure)

    figure, (left, right) = common.figure_with(1, 2, (8.0, 3.2), width_ratios=[3, 4])
    looks = zip("osv^", ("-", "--", "-.", ":"), (common.BLUE, common.GREEN, common.ORANGE, common.PINK), strict=True)
    for (kind, values), (marker, dashes, colour) in zip(shares.items(), looks, strict=True):
        steps = [k * options.steps / (len(values) - 1) for k in range(len(values))]
        left.plot(steps, values, marker=marker, linestyle=dashes, color=colour, label=kind)
    left.set(ylim=(-0.03, 1.03), xlabel="step", ylabel="share of right answers", title="Unseen pairs of numbers")
    left.legend()
    shown = [test[k] for k in range(2) for test in tests.values()]
    questions, lengths, _, _ = collate(shown, SYMBOLS)
    written, _ = model.write(questions, lengths, 3)
    for row, ((text, answer), tokens) in enumerate(zip(shown, written.T.tolist(), strict=True)):
        said = "".join(SYMBOLS[token] for token in tokens if token < len(SYMBOLS))
        right.text(0.0, row, text, family="monospace", size=8, va="center")
        colour, mark = (common.BLUE, "") if said == answer else (common.RED, f"  not {answer}")
        right.text(0.84, row, f"{said}{mark}", family="monospace", size=8, va="center", color=colour, weight="bold")
    right.set(ylim=(len(shown) - 0.5, -0.7), title="Read, and written")
    right.axis("off")

    ends = {kind: values[-1] for kind, values in shares.items()}
    claims = {"the loss falls by more than a quarter": losses[-1] < 0.75 * losses[0]}
    if not options.quick:
        claims["three quarters of the answers to each kind are right"] = min(ends.values()) > 0.75
        claims["of all answers 17 in 20 are right"] = sum(ends.values()) / len(ends) > 0.85
    return common.Result(common.save(figure, options, "reading_programs"), {"shares": shares, "losses": losses}, claims)


if __name__ == "__main__":
    sys.exit(common.script(main))
