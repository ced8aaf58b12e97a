"""A word model: two layers, tied weights, dropout, and words suggested while one types.

The text is the English of Python's reference manual, as help() shows it. Two LSTM layers with dropout predict the next
word, and one matrix serves as embedding and as output layer (tied weights): the model is smaller, and no worse for it.
Left, the perplexity on held-out text with tied and with separate weights, after each pass. Right, what the model
suggests after each word of a sentence, from its state alone.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pydoc_data.topics import topics

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedrnn

UNKNOWN = "<rare>"
TYPED = "if the value is not a"


def words_of_manual() -> list[str]:
    """Words and marks of the topics in the order of their names, in lower case; without tables and code."""
    paragraphs = [
        paragraph for _, text in sorted(topics.items()) for paragraph in text.split("\n\n") if "::=" not in paragraph
    ]
    return [word for paragraph in paragraphs for word in re.findall(r"[a-z]+(?:'[a-z]+)?|[.,:;()]", paragraph.lower())]


class WordModel(nn.Module):
    """Embedding, two layers of LSTM, linear: words [T, B] and a state -> logits [T, B, V] and the state."""

    def __init__(self, V: int, H: int, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, H)
        self.dropout = nn.Dropout(0.3)
        self.lstm = fusedrnn.LSTM(H, H, num_layers=2, dropout=0.3)
        self.head = nn.Linear(H, V)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, words: Tensor, state=None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, state = self.lstm(self.dropout(self.embedding(words)), state)
        return self.head(self.dropout(y)), state


@torch.no_grad()
def perplexity(model: WordModel, streams: Tensor) -> float:
    """exp of the mean loss over streams [N, B] from end to end; the model is in eval mode meanwhile."""
    model.eval()
    logits, _ = model(streams[:-1])
    model.train()
    return F.cross_entropy(logits.flatten(0, 1), streams[1:].flatten()).exp().item()


def learn(streams: Tensor, held_out: Tensor, V: int, tied: bool, options) -> tuple[WordModel, list[float]]:
    """Returns the model and the perplexity on held-out text before training and after each pass."""
    torch.manual_seed(options.seed)
    model = WordModel(V, options.hidden, tied)
    measured, chunk, at, state = [], 20, 0, None

    def next_loss() -> Tensor:
        nonlocal at, state
        logits, last = model(streams[at : at + chunk], state)
        loss = F.cross_entropy(logits.flatten(0, 1), streams[at + 1 : at + chunk + 1].flatten())
        at, state = at + chunk, common.detached(last)
        if at + chunk >= len(streams):
            at, state = 0, None
        return loss

    common.train(
        model,
        next_loss,
        options.passes * ((len(streams) - 1) // chunk),
        6e-3,
        "tied weights" if tied else "separate weights",
        anneal=True,
        measure=lambda: measured.append(perplexity(model, held_out)),
        parts=options.passes,
    )
    return model, measured


@torch.no_grad()
def suggestions(model: WordModel, typed: list[str], vocabulary: list[str], count: int) -> list[list[tuple[str, float]]]:
    """For each typed word the likeliest words to follow, and how likely; one step at a time, the state handed on."""
    model.eval()
    index, state, found = {word: token for token, word in enumerate(vocabulary)}, None, []
    for word in typed:
        logits, state = model(torch.tensor([[index.get(word, 0)]]), state)
        chances, tokens = logits[0, 0, 1:].softmax(0).topk(count)  # never the rare one
        pairs = zip(chances.tolist(), tokens.tolist(), strict=True)
        found.append([(vocabulary[token + 1], chance) for chance, token in pairs])
    return found


def some_words(text: str) -> list[str]:
    """A type for argparse: words, as many as the figure has room for, in lower case."""
    words = text.lower().split()
    if not 1 <= len(words) <= 8:
        raise argparse.ArgumentTypeError(f"must be 1 to 8 words, got {len(words)}: {text!r}")
    return words


def main(argv: Sequence[str] | None = None) -> common.Result:
    parser = common.Parser(__doc__)
    parser.whole("--passes", 7, "over the text", 1, 1000)
    parser.whole("--hidden", 128, "H, the hidden units, and size of the embedding", 1, 4096)
    parser.whole("--words", 80_000, "of the text, at most", 3000, 10**7)
    parser.add_argument("--typed", type=some_words, default=TYPED.split(), help=f"what one types ({TYPED})")
    options = common.parse(parser, argv, passes=1, hidden=32, words=12_000)

    words = words_of_manual()[: options.words]
    counts = Counter(words)
    vocabulary = [UNKNOWN, *sorted(word for word, count in counts.items() if count >= 3)]
    index = {word: token for token, word in enumerate(vocabulary)}
    tokens = torch.tensor([index.get(word, 0) for word in words])
    streams = tokens[: len(tokens) // 20 * 20].view(20, -1).T.contiguous()
    training, held_out = streams[: -len(streams) // 10], streams[-len(streams) // 10 :]
    runs = {name: learn(training, held_out, len(vocabulary), name == "tied", options) for name in ("tied", "separate")}
    found = suggestions(runs["tied"][0], options.typed, vocabulary, 4)

    frequencies = tokens[: len(tokens) * 9 // 10].bincount(minlength=len(vocabulary)).float() + 1
    unigram = F.cross_entropy(frequencies.log().expand(held_out.numel(), -1), held_out.flatten()).exp().item()

    figure, (left, right) = common.figure_with(1, 2, (8.0, 3.2), width_ratios=[2, 3])
    styles = ({"color": common.BLUE, "marker": "o"}, {"color": common.RED, "marker": "x", "linestyle": "--"})
    for (name, (model, values)), style in zip(runs.items(), styles, strict=True):
        size = sum(parameter.numel() for parameter in model.parameters())
        left.semilogy(values, label=f"{name}, {size / 1e6:.2f} M weights", **style)
    left.axhline(unigram, color=common.GREY, linestyle=":", label="frequency of the words alone")
    left.set_yticks([100, 200, 500, 1000], ["100", "200", "500", "1000"])
    left.minorticks_off()
    left.set(xlabel="passes over the text", ylabel="perplexity, held-out text", title="Word model")
    left.legend()
    for column, (word, follow) in enumerate(zip(options.typed, found, strict=True)):
        right.text(column, -1, word, ha="center", weight="bold")
        for row, (suggestion, chance) in enumerate(follow):
            taken = options.typed[column + 1 : column + 2] == [suggestion]
            colour = common.BLUE if taken else "black"
            right.text(
                column, row, f"{suggestion}\n{100 * chance:.0f} %", ha="center", va="center", color=colour, size=8
            )
    right.set(
        xlim=(-0.6, len(options.typed) - 0.4), ylim=(3.6, -1.5), title="Suggested after each word (blue: typed next)"
    )
    right.axis("off")

    ends = {name: values[-1] for name, (_, values) in runs.items()}
    sizes = {name: sum(parameter.numel() for parameter in model.parameters()) for name, (model, _) in runs.items()}
    claims = {"every model is better than it began": all(values[-1] < values[0] / 2 for _, values in runs.values())}
    claims["tied weights make the model smaller"] = sizes["tied"] < sizes["separate"]
    if not options.quick:
        claims["tied weights are no worse: not a twentieth more perplexity"] = ends["tied"] < 1.05 * ends["separate"]
        claims["the perplexity is less than half of what the frequency of the words gives"] = ends["tied"] < unigram / 2
    numbers = {"perplexity": ends, "unigram": unigram, "sizes": sizes, "suggestions": found}
    return common.Result(common.save(figure, options, "word_model"), numbers, claims)


if __name__ == "__main__":
    sys.exit(common.script(main))
