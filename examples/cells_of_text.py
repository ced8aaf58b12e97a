"""What single cells do: the LSTM's units that keep track of quotes, lines, brackets and indentation.

A character model learns the source of Python's standard library; nobody tells it what a string or a bracket is. Then
the cell states of all units over held-out text, from `return_states`, are compared with four things one can count:
whether the character is in a string, how far it is into its line, how many brackets are open, and how far the line is
indented. The figure shows for each the unit that follows it best, by correlation, and colours the text by tanh(c) of
that unit (Karpathy, Johnson and Li 2015 looked for such cells first). Few units stand for one thing alone, and none for
the indentation. The best sum of all units, fitted to half of the text and tried on the other half, follows each of the
four more closely.
"""

from __future__ import annotations

import io
import math
import sys
import textwrap
import tokenize
from collections.abc import Sequence
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from torch import Tensor, nn

import fusedrnn

COLUMNS = 88


class CharacterModel(nn.Module):
    """Embedding, LSTM, linear: tokens [T, B] and a state -> logits [T, B, V] and the state."""

    def __init__(self, V: int, H: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, 32)
        self.lstm = fusedrnn.LSTM(32, H)
        self.head = nn.Linear(H, V)

    def forward(self, tokens: Tensor, state=None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, state = self.lstm(self.embedding(tokens), state)
        return self.head(y), state

    @torch.no_grad()
    def cells(self, tokens: Tensor) -> Tensor:
        """tanh(c) of every unit while it reads tokens [T]: [T, H]."""
        _, _, states = self.lstm(self.embedding(tokens[:, None]), return_states=True)
        return states.c[0][:, 0].tanh()


def features(text: str) -> dict[str, Tensor]:
    """What can be counted in a program up to and with each of its characters [N]."""
    lines = text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    quoted, brackets = torch.zeros(len(text)), torch.zeros(len(text))
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            begin = starts[token.start[0] - 1] + token.start[1]
            if "STRING" in tokenize.tok_name[token.type]:  # f-strings are several tokens from Python 3.12 on
                quoted[begin : starts[token.end[0] - 1] + token.end[1] - 1] = 1.0
            elif token.string in tuple("([{"):
                brackets[begin:] += 1
            elif token.string in tuple(")]}"):
                brackets[begin:] -= 1
    except (tokenize.TokenError, SyntaxError):
        pass  # the text ends in the middle of something
    place, indentation = [], []
    for line in lines:
        depth = len(line) - len(line.lstrip(" "))
        for column, character in enumerate(line, start=1):
            place.append(0.0 if character == "\n" else float(column))
            indentation.append(min(place[-1], float(depth)))
    return {
        "in a string": quoted,
        "place in the line": torch.tensor(place),
        "open brackets": brackets,
        "indentation": torch.tensor(indentation),
    }


def correlations(cells: Tensor, feature: Tensor) -> Tensor:
    """The correlation of each unit [H] with a feature [N]; cells are [N, H]."""
    cells, feature = cells - cells.mean(0), feature - feature.mean()
    return (cells * feature[:, None]).sum(0) / (cells.norm(dim=0) * feature.norm()).clamp(min=1e-9)


def linear_probe(cells: Tensor, feature: Tensor) -> float:
    """The correlation of a feature [N] with the best sum of the cells [N, H]: fitted to one half, on the other."""
    half = len(feature) // 2
    inputs = torch.cat([cells, torch.ones(len(cells), 1)], dim=1)
    weights = torch.linalg.lstsq(inputs[:half], feature[:half, None]).solution
    return correlations(inputs[half:] @ weights, feature[half:]).item()


def excerpt(feature: Tensor, text: str, rows: int) -> slice:
    """Consecutive lines of the text, none too long, over which the feature changes the most."""
    ends = [-1] + [k for k, character in enumerate(text) if character == "\n"]
    windows = [slice(a + 1, b) for a, b in zip(ends, ends[rows:], strict=False)]
    fitting = []
    for window in windows:
        lines = text[window].split("\n")
        if all(lines) and max(map(len, lines)) < COLUMNS:
            fitting.append(window)
    return max(fitting or windows, key=lambda w: feature[w].std().item())


def draw(axes, text: str, values: Tensor, title: str) -> None:
    """The text, with the background of each character by its value in -1..1."""
    colours, row, column = colormaps["RdBu"], 0, 0
    for character, value in zip(text, values.tolist(), strict=True):
        if character == "\n":
            row, column = row + 1, 0
            continue
        axes.fill_between([column, column + 1], row, row + 1, color=colours((value + 1) / 2), linewidth=0)
        if column < COLUMNS:
            dark = "white" if abs(value) > 0.7 else "black"
            style = {"color": dark, "family": "monospace", "size": 6.5, "ha": "center", "va": "center"}
            axes.text(column + 0.5, row + 0.55, character, in_layout=False, **style)
        column += 1
    axes.set(xlim=(0, COLUMNS), ylim=(row + 1, 0))
    axes.set_title(title, loc="left")
    axes.axis("off")


def main(argv: Sequence[str] | None = None) -> common.Result:
    parser = common.Parser(__doc__)
    parser.whole("--steps", 3000, "of training", 2)
    parser.whole("--hidden", 128, "H, the units", 1, 4096)
    options = common.parse(parser, argv, steps=60, hidden=32)

    text = common.standard_library(1_500_000)
    vocabulary = "".join(sorted(set(text)))
    tokens = common.encode(text, vocabulary)
    streams = tokens[: len(tokens) // 32 * 32].view(32, -1).T.contiguous()
    model = CharacterModel(len(vocabulary), options.hidden)
    at, state, chunk = 0, None, 50

    def next_loss() -> Tensor:
        nonlocal at, state
        if at + chunk >= len(streams):
            at, state = 0, None
        logits, state = model(streams[at : at + chunk], state)
        state, at = common.detached(state), at + chunk
        return F.cross_entropy(logits.flatten(0, 1), streams[at - chunk + 1 : at + 1].flatten())

    losses = common.train(model, next_loss, options.steps, 4e-3, "character model", anneal=True)

    held_out = Path(textwrap.__file__).read_text(encoding="utf-8")  # the text to learn from ends long before it
    cells = model.cells(common.encode(held_out, vocabulary))
    best, together, followed = {}, {}, features(held_out)
    for name, feature in followed.items():
        together[name] = linear_probe(cells, feature)
        correlation = correlations(cells, feature)
        unit = int(correlation.abs().argmax())
        best[name] = (unit, correlation[unit].item())

    figure, axes = common.figure_with(4, 1, (7.2, 5.2))
    for axis, (name, (unit, correlation)) in zip(axes, best.items(), strict=True):
        part = excerpt(followed[name], held_out, 5)
        sign = math.copysign(1.0, correlation)  # blue is more, whichever sign the unit has
        title = f"{name}: unit {unit}, correlation {abs(correlation):.2f}; all units together {together[name]:.2f}"
        draw(axis, held_out[part], sign * cells[part, unit], title)

    found = {name: abs(correlation) for name, (_, correlation) in best.items()}
    least = 0.2 if options.quick else 0.5
    claims = {f"a unit follows the place in the line, correlation over {least}": found["place in the line"] > least}
    if not options.quick:
        claims["for three of the four there is a unit over 0.3"] = sorted(found.values())[1] > 0.3
        claims["all units together follow each more closely"] = all(together[name] > found[name] for name in found)
    numbers = {"correlation": found, "together": together, "loss": losses[-1]}
    return common.Result(common.save(figure, options, "cells_of_text"), numbers, claims)


if __name__ == "__main__":
    sys.exit(common.script(main))
