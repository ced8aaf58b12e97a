"""Tagging: what every character of a line of Python belongs to.

A label for every step: keyword, name, number, string, comment or operator, for each character of a line of source,
with the labels from Python's own tokenize module. At the `f` of `for` a layer that reads from left to right cannot
know whether this will be `for` or `format`; a bidirectional layer knows what follows as well. Left, held-out lines
coloured by what either says, mistakes marked. Right, the share of wrong characters for each kind: both directions make
fewer mistakes over all, and less than half as many at keywords and names. Lines are of all lengths: the layer takes
them padded, with `lengths`, and gives the same values as a PackedSequence, without the packing.
"""

from __future__ import annotations

import io
import keyword
import sys
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn

COLOURS = {
    "keyword": common.BLUE,
    "name": "black",
    "number": common.PINK,
    "string": common.GREEN,
    "comment": common.GREY,
    "operator": common.ORANGE,
}
TAGS = list(COLOURS)
SPACE = -100  # the label of what is not judged: cross_entropy leaves it out
LONGEST = 72
Line = tuple[str, list[int]]


def tag_of(token: tokenize.TokenInfo) -> int:
    name = tokenize.tok_name[token.type]
    if name == "NAME":
        return TAGS.index("keyword" if keyword.iskeyword(token.string) else "name")
    if "STRING" in name:  # f-strings are several tokens from Python 3.12 on
        name = "STRING"
    tag = {"NUMBER": "number", "STRING": "string", "COMMENT": "comment", "OP": "operator"}.get(name)
    return TAGS.index(tag) if tag else SPACE


def tagged_lines(source: str) -> list[Line]:
    """The lines of a program, and for each character its tag."""
    lines = source.splitlines()
    tags = [[SPACE] * len(line) for line in lines]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        tag, (first, start), (last, end) = tag_of(token), token.start, token.end
        for row in range(first, min(last, len(lines)) + 1):
            line = lines[row - 1]
            for column in range(start if row == first else 0, min(end, len(line)) if row == last else len(line)):
                if not line[column].isspace():
                    tags[row - 1][column] = tag
    return list(zip(lines, tags, strict=True))


def library_lines(count: int) -> list[Line]:
    """Lines of the standard library that are neither empty nor long."""
    lines: list[Line] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        found = tagged_lines(path.read_text(encoding="utf-8"))
        lines += [(line, tags) for line, tags in found if line.strip() and len(line) <= LONGEST and line.isascii()]
        if len(lines) >= count:
            break
    return lines[:count]


def collate(lines: Sequence[Line]) -> tuple[Tensor, Tensor, Tensor]:
    """Padded characters [T, B], lengths [B], padded tags [T, B]."""
    lengths = torch.tensor([len(line) for line, _ in lines])
    x, tags = torch.zeros(int(lengths.max()), len(lines), dtype=torch.int64), None
    tags = torch.full_like(x, SPACE)
    for b, (line, labels) in enumerate(lines):
        x[: len(line), b] = torch.tensor([ord(character) for character in line])
        tags[: len(line), b] = torch.tensor(labels)
    return x, lengths, tags


class Tagger(nn.Module):
    """Embedding, LSTM in one direction or both, linear: characters [T, B] -> logits [T, B, tags]."""

    def __init__(self, H: int, bidirectional: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 32)
        self.lstm = fusedrnn.LSTM(32, H, bidirectional=bidirectional)
        self.head = nn.Linear(2 * H if bidirectional else H, len(TAGS))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y, _ = self.lstm(self.embedding(x), lengths=lengths)
        return self.head(y)


def batches(lines: Sequence[Line], B: int) -> Iterator[list[Line]]:
    while True:
        yield [lines[k] for k in torch.randint(len(lines), (B,)).tolist()]


def learn(lines: Sequence[Line], H: int, bidirectional: bool, options, label: str) -> Tagger:
    torch.manual_seed(options.seed)
    model, source = Tagger(H, bidirectional), batches(lines, 64)

    def next_loss() -> Tensor:
        x, lengths, tags = collate(next(source))
        return F.cross_entropy(model(x, lengths).flatten(0, 1), tags.flatten())

    common.train(model, next_loss, options.steps, 5e-3, label, anneal=True)
    return model


@torch.no_grad()
def packing_difference(model: Tagger, x: Tensor, lengths: Tensor) -> float:
    """The largest difference between the LSTM's output with `lengths` and that of a PackedSequence."""
    embedded = model.embedding(x)
    ours, _ = model.lstm(embedded, lengths=lengths)
    packed = pack_padded_sequence(embedded, lengths, enforce_sorted=False)
    theirs, _ = pad_packed_sequence(model.lstm(packed)[0])
    return (ours - theirs).abs().max().item()


def draw(axes, lines: Sequence[Line], said: Tensor, title: str) -> None:
    """Each character in the colour of its tag, and a mark under those that are wrong."""
    for row, (line, tags) in enumerate(lines):
        for column, (character, tag) in enumerate(zip(line, tags, strict=True)):
            if tag == SPACE:
                continue
            answer = int(said[column, row])
            colour = COLOURS[TAGS[answer]]
            axes.text(column, row, character, color=colour, family="monospace", size=7, in_layout=False, va="center")
            if answer != tag:
                axes.plot([column, column + 0.8], [row + 0.42] * 2, color=common.RED, linewidth=2)
    axes.set(xlim=(0, 60), ylim=(len(lines) - 0.4, -0.6), xticks=[], yticks=[], title=title)
    for spine in axes.spines.values():
        spine.set_visible(False)


def excerpt(lines: Sequence[Line], rows: int) -> list[Line]:
    """Consecutive short lines with as many kinds in them as there are, and few long strings."""
    windows = [lines[k : k + rows] for k in range(len(lines) - rows)]
    windows = [window for window in windows if max(len(line) for line, _ in window) <= 58]
    return max(windows, key=lambda window: sum(len({*tags, SPACE}) + len(line) / 30 for line, tags in window))


def main(argv: Sequence[str] | None = None) -> common.Result:
    parser = common.Parser(__doc__)
    parser.whole("--steps", 1000, "of training", 2)
    parser.whole("--hidden", 48, "H, the hidden units of each direction", 1, 1024)
    options = common.parse(parser, argv, steps=60, hidden=16)

    lines = library_lines(1500 if options.quick else 12_000)
    training, held_out = lines[: -len(lines) // 6], lines[-len(lines) // 6 :]
    models = {
        "left to right": learn(training, 2 * options.hidden, False, options, "left to right"),
        "both directions": learn(training, options.hidden, True, options, "both directions"),
    }
    x, lengths, tags = collate(held_out)
    right, said = {}, {}
    for name, model in models.items():
        said[name] = model(x, lengths).argmax(2)
        right[name] = {tag: (said[name] == k)[tags == k].float().mean().item() for k, tag in enumerate(TAGS)}
        right[name]["all"] = (said[name] == tags)[tags != SPACE].float().mean().item()
    difference = packing_difference(models["both directions"], x, lengths)

    figure, axes = common.figure_with(2, 2, (8.2, 3.8), width_ratios=[5, 4])
    shown = excerpt(held_out, 8)
    for k, (name, model) in enumerate(models.items()):
        x, lengths, _ = collate(shown)
        draw(axes[k][0], shown, model(x, lengths).argmax(2), f"LSTM, {name}")
    grid = axes[0][1].get_gridspec()
    for axis in axes[:, 1]:
        axis.remove()
    bars = figure.add_subplot(grid[:, 1])
    for shift, (name, colour) in enumerate(zip(models, (common.SKY, common.BLUE), strict=True)):
        places = [k + 0.4 * shift - 0.2 for k in range(len(right[name]))]
        bars.barh(places, [1 - share for share in right[name].values()], height=0.38, color=colour, label=name)
    bars.set_yticks(range(len(TAGS) + 1), [*TAGS, "all"])
    for label in bars.get_yticklabels()[: len(TAGS)]:
        label.set_color(COLOURS[label.get_text()])
    bars.invert_yaxis()
    bars.set(xlabel="share of wrong characters, held-out lines")
    bars.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)

    one, both = right.values()
    claims = {
        "both directions are right more often than one": both["all"] > one["all"],
        "lengths and a PackedSequence give the same values": difference < 1e-5,
    }
    if not options.quick:
        claims["both directions make less than half as many mistakes at keywords and names"] = all(
            1 - both[tag] < (1 - one[tag]) / 2 for tag in ("keyword", "name")
        )
    numbers = {"right": right, "difference": difference}
    return common.Result(common.save(figure, options, "tagging"), numbers, claims)


if __name__ == "__main__":
    sys.exit(common.script(main))
