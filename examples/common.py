"""What the examples of the gallery share: options, a training loop, text to learn from, and the look of the figures.

Each example has `main(argv) -> Result`. The result holds what the example found and, for each claim of the gallery's
page, whether the numbers of this run bear it out; a script whose claims fail ends with exit status 1.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import fusedrnn

CELLS = {"rnn": fusedrnn.RNN, "gru": fusedrnn.GRU, "lstm": fusedrnn.LSTM}
LABELS = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM"}

# The palette of Okabe and Ito, which colour-blind people can tell apart; the lines differ in their dashes too.
ORANGE, GREEN, BLUE, PINK, RED, SKY, YELLOW, GREY = (
    "#E69F00", "#009E73", "#0072B2", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#777777",
)  # fmt: skip
LINES: dict[str, dict[str, Any]] = {
    "rnn": {"color": ORANGE, "linestyle": ":", "linewidth": 2.0},
    "gru": {"color": GREEN, "linestyle": "--"},
    "lstm": {"color": BLUE, "linestyle": "-"},
}
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "font.size": 9,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "savefig.dpi": 110,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}
PALETTE = 128  # colours of a saved figure, which keeps it small


@dataclass
class Result:
    """What an example found."""

    figure: Path
    numbers: dict[str, Any]  # by name; what the claims are about
    claims: dict[str, bool]  # what the page says of the figure, and whether it held in this run


def script(main: Callable[[], Result]) -> int:
    """Runs an example and prints its claims. The exit status: 0, or 1 where a claim failed or training diverged."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        result = main()
    except ArithmeticError as error:
        print(error, file=sys.stderr)
        return 1
    for claim, holds in result.claims.items():
        print(f"{'yes' if holds else 'NO '}  {claim}")
    print(f"figure: {result.figure}")
    return 0 if all(result.claims.values()) else 1


def whole(low: int, high: int) -> Callable[[str], int]:
    """A type for argparse: a whole number in low..high."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number in {low}..{high}, got {text!r}")
        return number

    return parse


def positive(high: float) -> Callable[[str], float]:
    """A type for argparse: a number above 0, up to high."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not 0 < number <= high:
            raise argparse.ArgumentTypeError(f"must be a number > 0 and <= {high:g}, got {text!r}")
        return number

    return parse


class Parser(argparse.ArgumentParser):
    """A parser with the options that every example has. The first line of its docstring is the description."""

    def __init__(self, doc: str) -> None:
        super().__init__(usage="%(prog)s [options]", description=doc.splitlines()[0])
        self.add_argument("--quick", action="store_true", help="a run of seconds, on a smaller problem")
        self.whole("--seed", 0, "of weights and data", 0, 2**63 - 1)
        self.add_argument("--out", type=Path, default=Path("out"), help="folder for the figure (%(default)s)")

    def options(self, argv: Sequence[str] | None, **quick: Any) -> argparse.Namespace:
        """Parses argv, sys.argv's by default; `quick` are defaults that replace others where --quick is given."""
        if self.parse_args(argv).quick:
            self.set_defaults(**quick)
        return self.parse_args(argv)

    def whole(self, name: str, default: int, what: str, low: int = 1, high: int = 10**6) -> None:
        """Adds an option for a whole number."""
        self.add_argument(name, type=whole(low, high), default=default, help=f"{what} (%(default)s)")

    def positive(self, name: str, default: float, what: str, high: float) -> None:
        """Adds an option for a number above 0."""
        self.add_argument(name, type=positive(high), default=default, help=f"{what} (%(default)s)")


def parse(parser: Parser, argv: Sequence[str] | None, **quick: Any) -> argparse.Namespace:
    """Parses, seeds torch and makes the folder.

    Args:
        parser: knows the options.
        argv: the arguments, sys.argv's by default.
        quick: defaults that take the place of others where --quick is given.

    Raises:
        SystemExit: with status 2, if an argument cannot be used; a line on stderr says why.
    """
    options = parser.options(argv, **quick)
    writable_folder(parser, options.out)
    torch.manual_seed(options.seed)
    return options


def writable_folder(parser: argparse.ArgumentParser, folder: Path) -> None:
    """Makes the folder for figures, or ends the program with a line that says why it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {folder}: {error.strerror}")
    if not os.access(folder, os.W_OK):
        parser.error(f"argument --out: {folder}: nothing can be written there")


def last_hidden(state: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """h_n [B, H] of the last layer, from the second output of an LSTM, a GRU or an RNN."""
    return (state[0] if isinstance(state, tuple) else state)[-1]


def open_forget_gate(lstm: nn.LSTM, bias: float) -> None:
    """Sets the bias of the first layer's forget gate; a large one lets the cell keep its state from the start."""
    H = lstm.hidden_size
    with torch.no_grad():
        lstm.bias_ih_l0[H : 2 * H] = bias
        lstm.bias_hh_l0[H : 2 * H] = 0.0


def detached(state: Any) -> Any:
    """The values of a state without their history: the gradient is cut here."""
    return tuple(part.detach() for part in state) if isinstance(state, tuple) else state.detach()


def train(
    model: nn.Module,
    next_loss: Callable[[], Tensor],
    steps: int,
    lr: float,
    label: str,
    clip: float = 1.0,
    anneal: bool = False,
    measure: Callable[[], object] | None = None,
    parts: int = 10,
) -> list[float]:
    """Trains with Adam and clipping by norm, and shows a progress bar.

    Args:
        model: what is trained.
        next_loss: computes the loss of one batch.
        steps: how many batches.
        lr: the learning rate.
        label: stands in front of the bar.
        clip: the largest norm of the gradient.
        anneal: whether the learning rate rises over the first tenth of the steps, and falls to zero after it.
        measure: called before the first step and after each of `parts` equal parts of the training.
        parts: how many there are.

    Returns:
        The loss of every step.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: annealing(step, steps) if anneal else 1.0)
    losses: list[float] = []
    if measure:
        measure()
    bar = progress(steps, label)
    for step in bar:
        loss = next_loss()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"{label}: the loss is {losses[-1]} at step {step}")
        bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
        if measure and (step + 1) * parts // steps > step * parts // steps:
            measure()
    return losses


def annealing(step: int, steps: int) -> float:
    """The factor of the learning rate: rises linearly over a tenth of the steps, then falls as a cosine to zero."""
    rise = max(steps // 10, 1)
    if step < rise:
        return (step + 1) / rise
    return (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1))) / 2


def progress(steps: int, label: str) -> tqdm:
    """A progress bar over range(steps), on a terminal only."""
    return tqdm(
        range(steps),
        desc=f"{label:18}",
        mininterval=0.3,
        disable=None,
        bar_format="{desc}{percentage:3.0f}%|{bar:30}|{postfix}",
    )


def smooth(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and the ones before it, `width` in all."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[k + 1] - sums[max(k + 1 - width, 0)]) / min(k + 1, width) for k in range(len(values))]


class BadTextError(Exception):
    """The text cannot be used; the message says why."""


def standard_library(characters: int) -> str:
    """The modules of Python's standard library one after the other, in the order of their names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = ""
    for path in sorted(folder.glob("*.py")):
        text += path.read_text(encoding="utf-8", errors="replace")
        if len(text) >= characters:
            break
    if not text:
        raise BadTextError(f"there is none in {folder}")
    return text[:characters]


def encode(text: str, vocabulary: str) -> Tensor:
    """The token [N] of each character: its place in the vocabulary, or the last place where it has none."""
    index = {character: token for token, character in enumerate(vocabulary)}
    return torch.tensor([index.get(character, len(vocabulary) - 1) for character in text])


def figure_with(rows: int, columns: int, size: tuple[float, float] = (7.2, 3.2), **layout: Any) -> tuple[Figure, Any]:
    """A figure and its axes, in the gallery's style."""
    matplotlib.rcParams.update(STYLE)
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, **layout)


def save(figure: Figure, options: argparse.Namespace, name: str) -> Path:
    """Writes the figure as PNG with a palette."""
    path = options.out / f"{name}.png"
    figure.savefig(path)
    with Image.open(path) as image:
        image.convert("RGB").quantize(PALETTE).save(path, optimize=True)
    return path
