"""Variants of the LSTM: which of its parts matter, one left out at a time.

Greff et al. (2017) compared the LSTM with variants that have one thing more or one less; this is such a study in small.
Each is trained as a character model on the source of Python's standard library, with the same data, learning rate and
number of steps. Peepholes and coupled gates (f = 1 - i) are options of `fusedrnn.LSTM` (blue); each of the others is a
function of a few lines, a cell for `fusedrnn.Recurrent` (orange). Dots are runs from different weights, bars their
mean. The forget gate is what cannot go: without it the cell adds up whatever it has read, chunk after chunk. Peepholes
and coupled gates change little; coupled gates do with three quarters of the weights. In training as short as this the
layer without the tanh of its output is ahead; in the long training of the study it was among the worst.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedrnn

INPUTS, BATCH, CHUNK = 32, 32, 25


@fusedrnn.cell(gates=("f", "g", "o"), state="c")
def no_input_gate(x, u, c: Tensor):
    c = torch.sigmoid(x.f + u.f) * c + torch.tanh(x.g + u.g)
    return torch.sigmoid(x.o + u.o) * torch.tanh(c), c


@fusedrnn.cell(gates=("i", "g", "o"), state="c")
def no_forget_gate(x, u, c: Tensor):
    c = c + torch.sigmoid(x.i + u.i) * torch.tanh(x.g + u.g)
    return torch.sigmoid(x.o + u.o) * torch.tanh(c), c


@fusedrnn.cell(gates=("i", "f", "g"), state="c")
def no_output_gate(x, u, c: Tensor):
    c = torch.sigmoid(x.f + u.f) * c + torch.sigmoid(x.i + u.i) * torch.tanh(x.g + u.g)
    return torch.tanh(c), c


@fusedrnn.cell(gates=("i", "f", "g", "o"), state="c")
def no_input_tanh(x, u, c: Tensor):
    c = torch.sigmoid(x.f + u.f) * c + torch.sigmoid(x.i + u.i) * (x.g + u.g)
    return torch.sigmoid(x.o + u.o) * torch.tanh(c), c


@fusedrnn.cell(gates=("i", "f", "g", "o"), state="c")
def no_output_tanh(x, u, c: Tensor):
    c = torch.sigmoid(x.f + u.f) * c + torch.sigmoid(x.i + u.i) * torch.tanh(x.g + u.g)
    return torch.sigmoid(x.o + u.o) * c, c


VARIANTS: dict[str, Callable[[int], nn.Module]] = {
    "LSTM": lambda H: fusedrnn.LSTM(INPUTS, H),
    "peepholes": lambda H: fusedrnn.LSTM(INPUTS, H, peephole=True),
    "coupled gates": lambda H: fusedrnn.LSTM(INPUTS, H, coupled=True),
    "no input gate": lambda H: fusedrnn.Recurrent(no_input_gate, INPUTS, H),
    "no forget gate": lambda H: fusedrnn.Recurrent(no_forget_gate, INPUTS, H),
    "no output gate": lambda H: fusedrnn.Recurrent(no_output_gate, INPUTS, H),
    "no tanh of the input": lambda H: fusedrnn.Recurrent(no_input_tanh, INPUTS, H),
    "no tanh of the output": lambda H: fusedrnn.Recurrent(no_output_tanh, INPUTS, H),
}


class CharacterModel(nn.Module):
    """Embedding, a recurrent layer, linear: tokens [T, B] and a state -> logits [T, B, V] and the state."""

    def __init__(self, V: int, H: int, layer: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, INPUTS)
        self.layer = layer
        self.head = nn.Linear(H, V)

    def forward(self, tokens: Tensor, state=None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, state = self.layer(self.embedding(tokens), state)
        return self.head(y), state

    def bits(self, tokens: Tensor, state=None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss on tokens [T + 1, B], in bits per character, and the state."""
        logits, state = self(tokens[:-1], state)
        return F.cross_entropy(logits.flatten(0, 1), tokens[1:].flatten()) / math.log(2), state


def learn(variant: str, seed: int, training: Tensor, held_out: Tensor, V: int, options) -> float:
    """Trains a variant from its own weights, chunk after chunk; returns its bits per character of held-out text."""
    torch.manual_seed(seed)
    model = CharacterModel(V, options.hidden, VARIANTS[variant](options.hidden))
    at, state = 0, None

    def next_loss() -> Tensor:
        nonlocal at, state
        if at + CHUNK >= len(training):
            at, state = 0, None
        loss, state = model.bits(training[at : at + CHUNK + 1], state)
        at, state = at + CHUNK, common.detached(state)
        return loss

    common.train(model, next_loss, options.steps, 1e-2, f"{variant}, {seed}", anneal=True)
    with torch.no_grad():
        return model.bits(held_out)[0].item()


def main(argv: Sequence[str] | None = None) -> common.Result:
    parser = common.Parser(__doc__)
    parser.whole("--steps", 250, "of training", 10)
    parser.whole("--hidden", 64, "H, the hidden units", 1, 1024)
    parser.whole("--runs", 2, "of each variant, from different weights", 1, 100)
    options = common.parse(parser, argv, steps=40, hidden=24, runs=1)

    text = common.standard_library(BATCH * (CHUNK * options.steps + 1) * 11 // 10)
    vocabulary = "".join(sorted(set(text)))
    tokens = common.encode(text, vocabulary)
    streams = tokens[: len(tokens) // BATCH * BATCH].view(BATCH, -1).T.contiguous()
    training, held_out = streams.tensor_split([len(streams) * 10 // 11])
    held_out = held_out[:500]
    seeds = range(options.seed, options.seed + options.runs)
    found = {
        variant: [learn(variant, seed, training, held_out, len(vocabulary), options) for seed in seeds]
        for variant in VARIANTS
    }
    mean = {variant: sum(bits) / len(bits) for variant, bits in found.items()}
    more = {variant: bits - mean["LSTM"] for variant, bits in mean.items()}

    figure, axes = common.figure_with(1, 1, (6.4, 3.3))
    colours = [common.BLUE if row < 3 else common.ORANGE for row in range(len(more))]
    axes.barh(list(more), list(more.values()), color=colours, height=0.6, alpha=0.6)
    for row, bits in enumerate(found.values()):
        axes.plot([run - mean["LSTM"] for run in bits], [row] * len(bits), "o", color="black", markersize=3)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set(
        xlabel=f"bits per character more than the LSTM's {mean['LSTM']:.2f}; further left is better",
        title=f"Held-out text after {options.steps} steps",
    )

    claims = {"every variant learns: less than 5 bits per character": max(mean.values()) < 5}
    if not options.quick:
        claims["what costs most is to leave out the forget gate"] = max(more, key=more.get) == "no forget gate"
        claims["peepholes and coupled gates make less than 0.1 bits of difference"] = all(
            abs(more[variant]) < 0.1 for variant in ("peepholes", "coupled gates")
        )
        claims["without the tanh of the output it is ahead"] = min(more, key=more.get) == "no tanh of the output"
    return common.Result(common.save(figure, options, "lstm_variants"), {"bits": found, "more": more}, claims)


if __name__ == "__main__":
    sys.exit(common.script(main))
