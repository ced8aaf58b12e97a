"""Sequence to sequence: a number read, and written backwards.

An encoder reads the digits of a number, a decoder writes them in reverse order (or, with `--task add`, the sum of two
numbers). In training the decoder is given the right digit before each one (teacher forcing), so a whole answer is one
call; afterwards it writes alone, one step at a time, with its state handed on. Without attention all it gets is the
encoder's last state, which has to hold the whole number, and long ones come out wrong. With attention it looks back at
every step at what the encoder said of each digit. Right: where it looks. For the reversed number that is a diagonal,
from the last digit to the first, and nobody told it so.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedrnn

SYMBOLS = "0123456789+"
NOTHING = -100  # a target that cross_entropy leaves out


def problem(task: str, digits: int) -> tuple[str, str]:
    """A question and its answer."""
    number = "".join(map(str, torch.randint(10, (digits,)).tolist()))
    if task == "reverse":
        return number, number[::-1]
    other = "".join(map(str, torch.randint(10, (digits,)).tolist()))
    return f"{number}+{other}", str(int(number) + int(other))


def collate(pairs: Sequence[tuple[str, str]], symbols: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Questions [T, B], their lengths [B], what the decoder is given [S, B] and what it should say [S, B].

    The decoder's start and end have the two tokens after those of the symbols.
    """
    start, end = len(symbols), len(symbols) + 1
    lengths = torch.tensor([len(question) for question, _ in pairs])
    questions = torch.zeros(int(lengths.max()), len(pairs), dtype=torch.int64)
    targets = torch.full((max(len(answer) for _, answer in pairs) + 1, len(pairs)), NOTHING)
    for b, (question, answer) in enumerate(pairs):
        questions[: len(question), b] = torch.tensor([symbols.index(symbol) for symbol in question])
        targets[: len(answer) + 1, b] = torch.tensor([*(symbols.index(symbol) for symbol in answer), end])
    given = torch.cat([torch.full((1, len(pairs)), start), targets[:-1].clamp(min=0)])
    return questions, lengths, given, targets


class Writer(nn.Module):
    """An encoder and a decoder, with attention of the decoder's output over the encoder's or without."""

    def __init__(self, symbols: str, H: int, attention: bool) -> None:
        super().__init__()
        self.start = len(symbols)
        self.embedding = nn.Embedding(len(symbols) + 2, 32)
        self.encoder = fusedrnn.LSTM(32, H)
        self.decoder = fusedrnn.LSTM(32, H)
        self.query = nn.Linear(H, H, bias=False) if attention else None
        self.head = nn.Linear(2 * H if attention else H, len(symbols) + 2)

    def decode(self, given: Tensor, state, memory: Tensor, lengths: Tensor) -> tuple[Tensor, object, Tensor | None]:
        """given [S, B] -> logits [S, B, V], the state, and the attention [S, B, T]."""
        y, state = self.decoder(self.embedding(given), state)
        if self.query is None:
            return self.head(y), state, None
        scores = torch.einsum("sbh,tbh->sbt", self.query(y), memory)
        beyond = torch.arange(memory.shape[0]) >= lengths[:, None]
        weights = scores.masked_fill(beyond, -torch.inf).softmax(2)
        context = torch.einsum("sbt,tbh->sbh", weights, memory)
        return self.head(torch.cat([y, context], 2)), state, weights

    def forward(self, questions: Tensor, lengths: Tensor, given: Tensor) -> Tensor:
        memory, state = self.encoder(self.embedding(questions), lengths=lengths)
        return self.decode(given, state, memory, lengths)[0]

    @torch.no_grad()
    def write(self, questions: Tensor, lengths: Tensor, steps: int) -> tuple[Tensor, Tensor | None]:
        """What it writes alone [steps, B], the likeliest symbol each time, and its attention [steps, B, T]."""
        memory, state = self.encoder(self.embedding(questions), lengths=lengths)
        token, written, looked = torch.full((1, questions.shape[1]), self.start), [], []
        for _ in range(steps):
            logits, state, weights = self.decode(token, state, memory, lengths)
            token = logits.argmax(2)
            written.append(token)
            looked.append(weights)
        return torch.cat(written), None if self.query is None else torch.cat(looked)


def learn(attention: bool, options, label: str) -> Writer:
    torch.manual_seed(options.seed)
    model = Writer(SYMBOLS, options.hidden, attention)

    def next_loss() -> Tensor:
        digits = torch.randint(1, options.digits + 1, (64,)).tolist()
        questions, lengths, given, targets = collate([problem(options.task, n) for n in digits], SYMBOLS)
        return F.cross_entropy(model(questions, lengths, given).flatten(0, 1), targets.flatten())

    common.train(model, next_loss, options.steps, 4e-3, label, anneal=True)
    return model


def right_answers(model: Writer, pairs: Sequence[tuple[str, str]], symbols: str) -> Tensor:
    """Whether each answer [B] that the model writes is right in every symbol."""
    questions, lengths, _, targets = collate(pairs, symbols)
    written, _ = model.write(questions, lengths, len(targets))
    return ((written == targets) | (targets == NOTHING)).all(0)


def main(argv: Sequence[str] | None = None) -> common.Result:
    parser = common.Parser(__doc__)
    parser.add_argument("--task", choices=("reverse", "add"), default="reverse", help="(%(default)s)")
    parser.whole("--steps", 1500, "of training", 2)
    parser.whole("--digits", 12, "of the longest number", 2, 100)
    parser.whole("--hidden", 64, "H, the hidden units", 1, 1024)
    options = common.parse(parser, argv, steps=250, digits=4, hidden=32)

    models = {"with attention": learn(True, options, "with attention"), "without": learn(False, options, "without")}
    digits = range(1, options.digits + 1)
    tests = [[problem(options.task, n) for _ in range(100)] for n in digits]
    right = {
        name: [right_answers(model, test, SYMBOLS).float().mean().item() for test in tests]
        for name, model in models.items()
    }
    question, answer = problem(options.task, options.digits)
    questions, lengths, _, _ = collate([(question, answer)], SYMBOLS)
    written, attention = models["with attention"].write(questions, lengths, len(answer))
    attention = attention[:, 0]
    text = "".join((*SYMBOLS, "?", ".")[token] for token in written[:, 0].tolist())

    figure, (left, middle) = common.figure_with(1, 2, (7.2, 3.4))
    styles = ({"color": common.BLUE, "marker": "o"}, {"color": common.RED, "marker": "x", "linestyle": "--"})
    for (name, values), style in zip(right.items(), styles, strict=True):
        left.plot(digits, values, label=name, **style)
    left.set(ylim=(-0.03, 1.03), xlabel="digits", ylabel="share of right answers", title=f"Task: {options.task}")
    left.legend(loc="lower left")
    image = middle.imshow(attention.numpy(), cmap="Blues", vmin=0, vmax=1)
    middle.set_xticks(range(len(question)), list(question))
    middle.set_yticks(range(len(text)), list(text))
    middle.set(xlabel="read", ylabel="written", title="Attention")
    figure.colorbar(image, ax=middle)

    places = attention @ torch.arange(len(question)).float()  # the mean place where it looks at each step
    off = (places - torch.arange(len(question) - 1, -1, -1)).abs().mean().item() if options.task == "reverse" else None
    overall = {name: sum(values) / len(values) for name, values in right.items()}
    claims = {"attention answers more questions": overall["with attention"] > overall["without"]}
    if not options.quick:
        claims["with attention 9 of 10 answers are right"] = overall["with attention"] > 0.9
    if off is not None:
        claims["it looks at the digit to be written, within one place in the mean"] = off < 1
    return common.Result(common.save(figure, options, "seq2seq"), {"right": right, "off": off}, claims)


if __name__ == "__main__":
    sys.exit(common.script(main))
