"""Truncated backpropagation through time: cut the gradient, keep the state.

A long text is read in chunks of 25 characters, and the gradient goes no further back than the chunk. The state can go
on all the same: each chunk starts from where the one before it ended. Left, a character model on the source of
Python's standard library, trained with the state carried and with a state of zeros at every chunk. Right, why the
first is better: the loss by the place within the chunk on held-out text. Who starts from nothing has to guess the
first characters; after a few of them most of the gap is closed, but never all of it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedrnn

WAYS = {"state carried": True, "zeros at every chunk": False}


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


def learn(streams: Tensor, carry: bool, V: int, options, label: str) -> tuple[CharacterModel, list[float]]:
    """Trains on streams [N, B] chunk by chunk; returns the model and the loss of each chunk in bits."""
    torch.manual_seed(options.seed)
    model = CharacterModel(V, options.hidden)
    at, state = 0, None

    def next_loss() -> Tensor:
        nonlocal at, state
        if at + options.chunk >= len(streams):
            at, state = 0, None
        x, targets = streams[at : at + options.chunk], streams[at + 1 : at + options.chunk + 1]
        logits, last = model(x, state if carry else None)
        at, state = at + options.chunk, common.detached(last)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    losses = common.train(model, next_loss, options.steps, 4e-3, label)
    return model, [loss / math.log(2) for loss in losses]


@torch.no_grad()
def bits_by_place(model: CharacterModel, streams: Tensor, carry: bool, chunk: int) -> Tensor:
    """The loss at each place of a chunk [chunk], the mean over held-out streams [N, B]."""
    state, bits = None, []
    for at in range(0, len(streams) - chunk, chunk):
        logits, state = model(streams[at : at + chunk], state if carry else None)
        targets = streams[at + 1 : at + chunk + 1]
        bits.append(F.cross_entropy(logits.permute(0, 2, 1), targets, reduction="none").mean(1))
    return torch.stack(bits).mean(0) / math.log(2)


def main(argv: Sequence[str] | None = None) -> common.Result:
    parser = common.Parser(__doc__)
    parser.whole("--steps", 800, "of training", 2)
    parser.whole("--chunk", 25, "steps of one chunk", 2, 1000)
    parser.whole("--hidden", 128, "H, the hidden units", 1, 4096)
    options = common.parse(parser, argv, steps=120, hidden=48)

    text = common.standard_library(1_000_000)
    vocabulary = "".join(sorted(set(text)))
    streams = common.encode(text, vocabulary)[: len(text) // 32 * 32].view(32, -1).T.contiguous()
    held_out = len(streams) // 20
    training, validation = streams[:-held_out], streams[-held_out:]
    losses, places = {}, {}
    for way, carry in WAYS.items():
        model, losses[way] = learn(training, carry, len(vocabulary), options, way)
        places[way] = bits_by_place(model, validation, carry, options.chunk)

    figure, (left, right) = common.figure_with(1, 2)
    styles = ({"color": common.BLUE}, {"color": common.RED, "linestyle": "--"})
    for way, style in zip(WAYS, styles, strict=True):
        left.plot(common.smooth(losses[way], 20), label=way, **style)
        right.plot(range(1, options.chunk + 1), places[way], marker=".", label=way, **style)
    left.set(xlabel="step", ylabel="bits per character", title="Training")
    right.set(ylim=(0, None), xlabel="place within the chunk", title="Held-out text")
    left.legend()
    right.legend(loc="lower right")

    carried, zeros = places.values()
    gap = zeros - carried
    least = 0.1 if options.quick else 1.0
    return common.Result(
        common.save(figure, options, "truncated_bptt"),
        {"carried": carried.mean().item(), "zeros": zeros.mean().item(), "places": places},
        {
            "with the state carried the loss is lower": bool(carried.mean() < zeros.mean()),
            f"at the first place of a chunk it is lower by more than {least} bits": bool(gap[0] > least),
            "the difference shrinks towards the end of the chunk": bool(
                (zeros - carried)[-1] < (zeros - carried)[0] / 2
            ),
        },
    )


if __name__ == "__main__":
    sys.exit(common.script(main))
