"""Captioning: a picture in, a sentence out, and where the model looks at each word.

Pictures of two coloured shapes, drawn by this program; a small convolutional network reads a picture and an LSTM
writes what is on it: "a red circle above a blue square". The first model gives the LSTM one vector of the whole
picture to start from. The second keeps the 8 x 8 places of the picture apart and lets the LSTM's output attend to them
at every word (soft attention, as Xu et al. 2015). Top, a picture and the attention at each of its words. Bottom, how
often the whole sentence is right on pictures that combine shapes and colours as none in training does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedrnn

COLOURS = {"red": (0.9, 0.2, 0.1), "green": (0.1, 0.65, 0.3), "blue": (0.1, 0.3, 0.9), "yellow": (0.95, 0.85, 0.1)}
SHAPES = ("circle", "square", "triangle")
WORDS = ["<end>", "a", *COLOURS, *SHAPES, "above", "beside"]
SIZE, CELL = 32, 10  # pixels of a picture, and of the part of it that a shape is in
T = 8  # a red circle above a blue square <end>


def outline(shape: str) -> Tensor:
    """Which pixels of its part a shape covers [CELL, CELL]."""
    y, x = torch.meshgrid(torch.arange(CELL) - 4.5, torch.arange(CELL) - 4.5, indexing="ij")
    if shape == "circle":
        return x.square() + y.square() < 18
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) < 4
    return (y < 4) & (x.abs() < (y + 5) / 2)


OUTLINES = {shape: outline(shape) for shape in SHAPES}
Thing = tuple[int, int]  # a colour and a shape, by their numbers


def held_out(first: Thing, second: Thing) -> bool:
    """Whether two things are together in no picture for training: one pair in six is not."""
    return (first[0] + 2 * first[1] + 3 * second[0] + 4 * second[1]) % 6 == 0


def picture(test: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A picture [3, 32, 32], its sentence [T], and which thing covers each of 8 x 8 places [2, 8, 8]."""
    while True:
        numbers = torch.randint(12, (2,)).tolist()
        things = [(number // 3, number % 3) for number in numbers]
        if held_out(*things) == test:
            break
    below, line = torch.rand(()) < 0.5, int(torch.randint(3, ()))
    other = torch.randperm(3)[:2].sort().values.tolist()  # the upper one or the left one is the first
    image, masks, sentence = torch.full((3, SIZE, SIZE), 0.95), torch.zeros(2, SIZE, SIZE), []
    for k, (colour, shape) in enumerate(things):
        row, column = (other[k], line) if below else (line, other[k])
        top, left = (row * CELL + int(torch.randint(3, ())), column * CELL + int(torch.randint(3, ())))
        covered = OUTLINES[SHAPES[shape]]
        part = image[:, top : top + CELL, left : left + CELL]
        part[:, covered] = torch.tensor(list(COLOURS.values())[colour])[:, None]
        masks[k, top : top + CELL, left : left + CELL] = covered.float()
        sentence += ["a", list(COLOURS)[colour], SHAPES[shape], "above" if below else "beside"]
    words = torch.tensor([WORDS.index(word) for word in [*sentence[:-1], "<end>"]])
    return image, words, F.max_pool2d(masks, SIZE // 8)


def pictures(count: int, test: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures [B, 3, 32, 32], sentences [T, B], places [B, 2, 8, 8]."""
    images, words, places = zip(*(picture(test) for _ in range(count)), strict=True)
    return torch.stack(images), torch.stack(words, dim=1), torch.stack(places)


class Captioner(nn.Module):
    """A convolutional network, an LSTM, and attention of its output over the 8 x 8 places or none."""

    def __init__(self, H: int, attention: bool) -> None:
        super().__init__()
        self.eyes = nn.Sequential(
            nn.Conv2d(3, 24, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(24, H, 3, stride=2, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.places = nn.Parameter(torch.randn(64, H) * 0.1)
        self.start = nn.Linear(H if attention else 64 * H, H)
        self.embedding = nn.Embedding(len(WORDS), 32)
        self.lstm = fusedrnn.LSTM(32, H)
        self.query = nn.Linear(H, H) if attention else None
        self.head = nn.Linear(2 * H if attention else H, len(WORDS))

    def look(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What is at each place [B, 64, H], and the state to start from."""
        seen = self.eyes(images).flatten(2).transpose(1, 2) + self.places
        h = torch.tanh(self.start(seen.flatten(1) if self.query is None else seen.mean(1)))[None]
        return seen, (h, torch.zeros_like(h))

    def decode(self, given: Tensor, state, seen: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
        """Words before [S, B] -> logits [S, B, V], the state, and the attention [S, B, 64]."""
        y, state = self.lstm(self.embedding(given), state)
        if self.query is None:
            return self.head(y), state, None
        weights = torch.einsum("sbh,bph->sbp", self.query(y), seen).softmax(2)
        context = torch.einsum("sbp,bph->sbh", weights, seen)
        return self.head(torch.cat([y, context], 2)), state, weights

    @torch.no_grad()
    def write(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The likeliest word each time [T, B], and the attention at each [T, B, 64]."""
        seen, state = self.look(images)
        word, words, looked = torch.zeros(1, len(images), dtype=torch.int64), [], []
        for _ in range(T):
            logits, state, weights = self.decode(word, state, seen)
            word = logits.argmax(2)
            words.append(word)
            looked.append(weights)
        return torch.cat(words), None if self.query is None else torch.cat(looked)


def learn(attention: bool, test: tuple[Tensor, Tensor, Tensor], options, label: str) -> tuple[Captioner, list, list]:
    """Returns the model, its losses, and eleven times over the training the share of right sentences in the test."""
    torch.manual_seed(options.seed)
    model = Captioner(options.hidden, attention)

    def next_loss() -> Tensor:
        images, words, _ = pictures(32, test=False)
        seen, state = model.look(images)
        given = torch.cat([torch.zeros_like(words[:1]), words[:-1]])  # <end> stands for the beginning, too
        return F.cross_entropy(model.decode(given, state, seen)[0].flatten(0, 1), words.flatten())

    def right() -> float:
        return (model.write(test[0])[0] == test[1]).all(0).float().mean().item()

    losses, shares, parts = [], [right()], 10
    for k in range(parts):
        losses += common.train(model, next_loss, options.steps // parts, 4e-3 * 0.85**k, f"{label}, {k + 1}/{parts}")
        shares.append(right())
    return model, losses, shares


def main(argv: Sequence[str] | None = None) -> common.Result:
    parser = common.Parser(__doc__)
    parser.whole("--steps", 1000, "of training", 10)
    parser.whole("--hidden", 64, "H, the hidden units and the channels", 1, 1024)
    options = common.parse(parser, argv, steps=60, hidden=24)

    test = pictures(60 if options.quick else 300, test=True)
    runs = {name: learn(name != "without", test, options, name) for name in ("with attention", "without")}
    model = runs["with attention"][0]
    written, attention = model.write(test[0])

    # The attention at the words for the colour and the shape of a thing, on the places that the thing covers.
    covered = test[2].flatten(2)
    first, second = attention[1:3].mean(0), attention[5:7].mean(0)
    on_shape = ((first * covered[:, 0]).sum(1) + (second * covered[:, 1]).sum(1)).mean().item() / 2
    by_chance = covered.mean().item()

    figure, _ = common.figure_with(1, 1, (8.4, 3.6))
    figure.clear()
    grid = figure.add_gridspec(2, T, height_ratios=[1, 1.5])
    for k in range(T):
        axes = figure.add_subplot(grid[0, k])
        axes.axis("off")
        if k == 0:
            axes.imshow(test[0][0].permute(1, 2, 0).numpy())
            continue
        axes.imshow((0.5 + test[0][0].permute(1, 2, 0) / 2).numpy())
        seen = attention[k - 1, 0].view(1, 1, 8, 8)
        axes.imshow(F.interpolate(seen, SIZE, mode="bilinear")[0, 0].numpy(), cmap="Greys", alpha=0.6)
        axes.set_title(WORDS[int(written[k - 1, 0])])
    axes = figure.add_subplot(grid[1, 1:-1])
    styles = ({"color": common.BLUE, "marker": "o"}, {"color": common.RED, "marker": "x", "linestyle": "--"})
    for (name, (_, _, shares)), style in zip(runs.items(), styles, strict=True):
        axes.plot([k * (options.steps // 10) for k in range(len(shares))], shares, label=name, **style)
    axes.set(ylim=(-0.03, 1.03), xlabel="step", ylabel="right sentences", title="Pairs of things never seen together")
    axes.legend()

    ends = {name: shares[-1] for name, (_, _, shares) in runs.items()}
    losses = runs["with attention"][1]
    claims = {"the loss falls to less than half": losses[-1] < losses[0] / 2}
    if not options.quick:
        claims["words look at the thing that they are about, twice as much as by chance"] = on_shape > 2 * by_chance
        claims["with attention 8 of 10 sentences are right"] = ends["with attention"] > 0.8
        claims["with attention more are right than without"] = ends["with attention"] > ends["without"]
    numbers = {"right": ends, "on shape": on_shape, "by chance": by_chance, "losses": losses}
    return common.Result(common.save(figure, options, "captioning"), numbers, claims)


if __name__ == "__main__":
    sys.exit(common.script(main))
