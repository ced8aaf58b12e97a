"""The language of a line: many characters in, one answer out.

Lines of Python, C++, CMake, JavaScript, YAML and English, all from files that come with Python, torch and matplotlib.
An LSTM reads a line character by character, and its last state says which language it is. Training cuts every line
short at a random place, by `lengths`, so the model learns to judge from a beginning as well. Left, what it says of
held-out lines of each language. Right, its belief while it reads one line: the layer's output has the state of every
step.
"""

from __future__ import annotations

import importlib
import random
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedrnn

SHORTEST, LONGEST = 12, 64


def files(package: str, pattern: str) -> Iterable[str]:
    """The text of a package's files."""
    for path in sorted(Path(importlib.import_module(package).__file__).parent.glob(pattern)):
        yield path.read_text(encoding="utf-8", errors="replace")


def modules() -> Iterable[str]:
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        yield path.read_text(encoding="utf-8", errors="replace")


LANGUAGES = {
    "Python": modules,
    "C++": lambda: files("torch", "include/ATen/*.h"),
    "CMake": lambda: files("torch", "share/cmake/**/*.cmake"),
    "JavaScript": lambda: files("matplotlib", "backends/web_backend/js/*.js"),
    "YAML": lambda: files("torchgen", "packaged/**/*.yaml"),
    "English": topics.values,  # the reference manual of Python, as help() shows it
}
COLOURS = (common.BLUE, common.RED, common.GREEN, common.SKY, common.PINK, "black")
STYLES = ("-", "--", "-.", ":", "-", "--")


def lines_of(texts: Iterable[str], most: int) -> list[str]:
    """Different lines of ASCII, shuffled; each without its indentation, and cut where it is long."""
    lines: dict[str, None] = {}
    for text in texts:
        for line in map(str.strip, text.splitlines()):
            if len(line) >= SHORTEST and line.isascii():
                lines[line[:LONGEST]] = None
        if len(lines) >= 3 * most:
            break
    shuffled = list(lines)
    random.Random(0).shuffle(shuffled)
    return shuffled[:most]


class Reader(nn.Module):
    """Embedding, LSTM, linear: characters [T, B] -> logits of every step [T, B, languages] and of the last."""

    def __init__(self, H: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 24)
        self.lstm = fusedrnn.LSTM(24, H)
        self.head = nn.Linear(H, len(LANGUAGES))

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        y, (h, _) = self.lstm(self.embedding(x), lengths=lengths)
        return self.head(y), self.head(h[-1])


def collate(lines: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Padded characters [T, B] and lengths [B]."""
    codes = [torch.tensor([ord(character) for character in line]) for line in lines]
    return nn.utils.rnn.pad_sequence(codes), torch.tensor([len(line) for line in lines])


def main(argv: Sequence[str] | None = None) -> common.Result:
    parser = common.Parser(__doc__)
    parser.whole("--steps", 1500, "of training", 2)
    parser.whole("--hidden", 96, "H, the hidden units", 1, 1024)
    parser.whole("--lines", 3000, "of each language, at most", 100)
    options = common.parse(parser, argv, steps=80, hidden=24, lines=400)

    lines = [lines_of(texts(), options.lines) for texts in LANGUAGES.values()]
    held_out = [some[: len(some) // 5] for some in lines]
    training = [some[len(some) // 5 :] for some in lines]
    model = Reader(options.hidden)

    def next_loss() -> Tensor:
        languages = torch.randint(len(LANGUAGES), (64,))
        picks = [training[k][int(torch.randint(len(training[k]), ()))] for k in languages.tolist()]
        x, lengths = collate(picks)
        begun = (torch.rand(64) * lengths).long() + 1  # at least one character, at most all
        return F.cross_entropy(model(x, begun)[1], languages)

    common.train(model, next_loss, options.steps, 5e-3, "languages")
    confusion = torch.zeros(len(LANGUAGES), len(LANGUAGES))
    with torch.no_grad():
        for k, some in enumerate(held_out):
            confusion[k] = model(*collate(some))[1].argmax(1).bincount(minlength=len(LANGUAGES)) / len(some)
        line = max(held_out[0], key=lambda line: line.startswith("def ") * len(line) * (len(line) < 45))
        belief = model(*collate([line]))[0][:, 0].softmax(1)

    names = list(LANGUAGES)
    figure, (left, right) = common.figure_with(1, 2, (8.2, 3.3))
    left.imshow(confusion.numpy(), cmap="Blues", vmin=0, vmax=1)
    for row, column in torch.cartesian_prod(torch.arange(len(names)), torch.arange(len(names))).tolist():
        share = confusion[row, column].item()
        if share >= 0.005:
            colour = "white" if share > 0.5 else "black"
            left.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour, size=8)
    left.set_xticks(range(len(names)), names, rotation=35, ha="right")
    left.set_yticks(range(len(names)), names)
    left.set(xlabel="said", ylabel="is", title="Held-out lines, %")
    for name, colour, style, values in zip(names, COLOURS, STYLES, belief.T, strict=True):
        right.plot(values, style, color=colour, label=name)
    right.set_xticks(range(len(line)), list(line), family="monospace", size=6)
    right.set(ylim=(0, 1.02), xlabel="read so far", ylabel="belief")
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

    shares = dict(zip(names, confusion.diagonal().tolist(), strict=True))
    least = 0.5 if options.quick else 0.85
    mean = sum(shares.values()) / len(shares)
    return common.Result(
        common.save(figure, options, "language_of_line"),
        {"shares": shares, "belief": belief},
        {f"of all languages together, more than {100 * least:.0f} % of the lines are recognised": mean > least}
        | {"more characters help: the last one leaves it surer than the first": bool(belief[-1, 0] > belief[0, 0])},
    )


if __name__ == "__main__":
    sys.exit(common.script(main))
