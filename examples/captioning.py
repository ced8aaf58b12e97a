"""Captioning: a picture in, a sentence out, and where the model looks at each word.

Pictures of one or two coloured shapes, drawn by this program: a small convolutional network reads a picture and an LSTM
writes what is on it, as "a red ring above a blue square". One model hands the LSTM a vector of the whole picture to
start from, and no more. In the other the LSTM's output attends to the 5 x 5 places of the picture at every word as well
(soft attention, after Xu et al. 2015). Top, a picture, and on it as light the attention at each word: at a colour or a
shape it lies on the thing that is named, and nobody told it so. Bottom, how many sentences are right in every word, on
pictures with pairs of things that no picture in training has: with attention nearly all, and they are so sooner.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedrnn

COLOURS = {"red": (0.9, 0.2, 0.1), "green": (0.1, 0.65, 0.3), "blue": (0.1, 0.3, 0.9), "yellow": (0.95, 0.85, 0.1)}
SHAPES = ("ring", "square", "cross")
WORDS = ["<end>", "a", *COLOURS, *SHAPES, "above", "beside"]
END, A, COLOUR, SHAPE, ABOVE = 0, 1, 2, 2 + len(COLOURS), 2 + len(COLOURS) + len(SHAPES)
SIZE, PLACES = 20, 5  # pixels along a side of the picture, and places along it that the attention tells apart
T = 8  # a red ring above a blue square <end>


class Pictures(NamedTuple):
    """B pictures, what is on them, and where."""

    images: Tensor  # [B, 3, SIZE, SIZE]
    sentences: Tensor  # [T, B]; <end> fills up those about one thing
    covered: Tensor  # [2, B, PLACES * PLACES], 1 where a place has a part of the first thing, of the second


def outlines(y: Tensor, x: Tensor) -> Tensor:
    """Whether each shape covers the points at (y, x) from its centre [..., SIZE, SIZE]: [SHAPES, ..., SIZE, SIZE]."""
    square = torch.maximum(y.abs(), x.abs()) < 3.5
    ring = square & ((y.square() + x.square() - 8.5).abs() < 5)
    cross = square & (torch.minimum(y.abs(), x.abs()) < 1.5)
    return torch.stack([ring, square, cross])


def held_out(colours: Tensor, shapes: Tensor) -> Tensor:
    """Whether two things [2, B] are together in no picture for training: one pair in six is not."""
    return (colours[0] + 2 * shapes[0] + 3 * colours[1] + 4 * shapes[1]) % 6 == 0


def pictures(count: int, test: bool) -> Pictures:
    """Random pictures: for training a third with one thing, for the test all with pairs that training does not have."""
    candidates = 16 * count + 100
    colours, shapes = torch.randint(len(COLOURS), (2, candidates)), torch.randint(len(SHAPES), (2, candidates))
    chosen = (held_out(colours, shapes) == test).nonzero()[:count, 0]
    colours, shapes = colours[:, chosen], shapes[:, chosen]
    two, above = torch.rand(count) < (1.0 if test else 2 / 3), torch.rand(count) < 0.5

    # The centres [2, B] along the line on which the things lie, the first before the second, and across it.
    along = torch.stack([torch.randint(3, 7, (count,)), torch.randint(13, 17, (count,))])
    across = torch.randint(4, 16, (count,)) + torch.randint(-1, 2, (2, count))
    centre_y, centre_x = torch.where(above, along, across), torch.where(above, across, along)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    all_shapes = outlines(y - centre_y[..., None, None], x - centre_x[..., None, None])
    pixels = all_shapes.gather(0, shapes[None, ..., None, None].expand(1, -1, -1, SIZE, SIZE))[0]
    pixels[1] &= two[:, None, None]

    paint = torch.tensor(list(COLOURS.values()))[colours]  # [2, B, 3]
    images = torch.full((count, 3, SIZE, SIZE), 0.95)
    for k in range(2):
        images = torch.where(pixels[k, :, None], paint[k, :, :, None, None], images)
    a, end = torch.full((count,), A), torch.full((count,), END)
    first, second = zip(COLOUR + colours, SHAPE + shapes, strict=True)
    sentences = torch.stack([a, *first, ABOVE + (~above).long(), a, *second, end])
    sentences[3:, ~two] = END
    return Pictures(images, sentences, F.max_pool2d(pixels.float(), SIZE // PLACES).flatten(2))


class Captioner(nn.Module):
    """A convolutional network, an LSTM, and attention of its output over the places of the picture or none."""

    def __init__(self, H: int, attention: bool) -> None:
        super().__init__()
        self.eyes = nn.Sequential(
            nn.Conv2d(5, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, H, 1), nn.BatchNorm2d(H), nn.ReLU(),
        )  # fmt: skip
        self.start = nn.Linear(PLACES * PLACES * H, 2 * H)
        self.embedding = nn.Embedding(len(WORDS), 32)
        self.lstm = fusedrnn.LSTM(32, H)
        self.query = nn.Linear(H, H) if attention else None
        self.head = nn.Sequential(nn.Linear(2 * H if attention else H, H), nn.ReLU(), nn.Linear(H, len(WORDS)))

    def look(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What is at each place [B, P, H], and the state to start from. The network sees colours and coordinates."""
        line = torch.linspace(-1, 1, SIZE).expand(len(images), 1, SIZE, SIZE)
        seen = self.eyes(torch.cat([images, line, line.mT], 1)).flatten(2).mT
        h, c = self.start(seen.flatten(1))[None].chunk(2, 2)
        return seen, (torch.tanh(h), c.contiguous())

    def decode(self, given: Tensor, state, seen: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
        """Words before [S, B] -> logits [S, B, V], the state, and the attention [S, B, P]."""
        y, state = self.lstm(self.embedding(given), state)
        if self.query is None:
            return self.head(y), state, None
        weights = torch.einsum("sbh,bph->sbp", self.query(y), seen).softmax(2)
        context = torch.einsum("sbp,bph->sbh", weights, seen)
        return self.head(torch.cat([y, context], 2)), state, weights

    def forward(self, images: Tensor, sentences: Tensor) -> Tensor:
        """The logits [T, B, V], each word given the right ones before it; <end> stands for the beginning, too."""
        seen, state = self.look(images)
        return self.decode(torch.cat([torch.zeros_like(sentences[:1]), sentences[:-1]]), state, seen)[0]

    @torch.no_grad()
    def write(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The likeliest word each time [T, B], and the attention at each [T, B, P]; in eval mode meanwhile."""
        self.eval()
        seen, state = self.look(images)
        word, words, looked = torch.full((1, len(images)), END), [], []
        for _ in range(T):
            logits, state, weights = self.decode(word, state, seen)
            word = logits.argmax(2)
            words.append(word)
            looked.append(weights)
        self.train()
        return torch.cat(words), None if self.query is None else torch.cat(looked)


def right(model: Captioner, test: Pictures) -> float:
    """The share of sentences that are right in every word."""
    return (model.write(test.images)[0] == test.sentences).all(0).float().mean().item()


def learn(attention: bool, test: Pictures, options, label: str) -> tuple[Captioner, list[float]]:
    """Returns the model and, eleven times over the training, the share of right sentences in the test."""
    torch.manual_seed(options.seed)
    model, shares = Captioner(options.hidden, attention), []

    def next_loss() -> Tensor:
        batch = pictures(32, test=False)
        return F.cross_entropy(model(batch.images, batch.sentences).flatten(0, 1), batch.sentences.flatten())

    common.train(
        model, next_loss, options.steps, 4e-3, label, anneal=True, measure=lambda: shares.append(right(model, test))
    )
    return model, shares


def draw_attention(axes: Sequence, image: Tensor, words: Sequence[int], attention: Tensor) -> None:
    """The picture [3, SIZE, SIZE], and for each word the attention [PLACES * PLACES] as light on the picture."""
    axes[0].imshow(image.permute(1, 2, 0).numpy())
    axes[0].set_title("picture")
    for axis, word, weights in zip(axes[1:], words, attention, strict=False):
        light = F.interpolate(weights.view(1, 1, PLACES, PLACES), SIZE, mode="bilinear")[0] / weights.max()
        axis.imshow((image * (0.25 + 0.75 * light)).permute(1, 2, 0).numpy())
        axis.set_title(WORDS[word])
    for axis in axes:
        axis.axis("off")


def main(argv: Sequence[str] | None = None) -> common.Result:
    parser = common.Parser(__doc__)
    parser.whole("--steps", 800, "of training", 10)
    parser.whole("--hidden", 64, "H, the hidden units and the channels", 1, 1024)
    options = common.parse(parser, argv, steps=240)

    test = pictures(100 if options.quick else 500, test=True)
    runs = {name: learn(name != "without", test, options, name) for name in ("with attention", "without")}
    model = runs["with attention"][0]
    written, attention = model.write(test.images)

    # The attention at the words for the colour and the shape of a thing, on the places that have a part of it.
    named = torch.stack([attention[1:3].mean(0), attention[5:7].mean(0)])
    on_thing, by_chance = (named * test.covered).sum(2).mean().item(), test.covered.mean().item()

    figure, _ = common.figure_with(1, 1, (8.4, 3.8))
    figure.clear()
    grid = figure.add_gridspec(2, T, height_ratios=[1, 1.8])
    axes = [figure.add_subplot(grid[0, k]) for k in range(T)]
    draw_attention(axes, test.images[0], written[:, 0].tolist(), attention[:, 0])
    below = figure.add_subplot(grid[1, 1:-1])
    styles = ({"color": common.BLUE, "marker": "o"}, {"color": common.RED, "marker": "x", "linestyle": "--"})
    for (name, (_, shares)), style in zip(runs.items(), styles, strict=True):
        below.plot([options.steps * k / 10 for k in range(len(shares))], shares, label=name, **style)
    below.set(ylim=(-0.03, 1.03), xlabel="step", ylabel="right sentences", title="Pairs of things never seen together")
    below.legend()

    ends = {name: shares[-1] for name, (_, shares) in runs.items()}
    claims = {"words look at the thing that they name, twice as much as by chance": on_thing > 2 * by_chance}
    if not options.quick:
        claims["with attention 19 of 20 sentences are right in every word"] = ends["with attention"] > 0.95
        claims["nine tenths of the attention lie on the thing that is named"] = on_thing > 0.9
        claims["with attention they are right sooner"] = sum(runs["with attention"][1]) > sum(runs["without"][1])
    numbers = {"right": ends, "on thing": on_thing, "by chance": by_chance}
    return common.Result(common.save(figure, options, "captioning"), numbers, claims)


if __name__ == "__main__":
    sys.exit(common.script(main))
