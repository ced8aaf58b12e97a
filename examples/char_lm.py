"""A character model: three layers of LSTM on source code, converted to fusedrnn half way.

The model begins on torch.nn.LSTM, with truncated backpropagation through time: the text runs by in chunks, the state
is carried from each to the next, and the gradient stops at the border. Half way, one line, `fusedrnn.convert(model)`,
puts fusedrnn's LSTM where torch's was. Outputs and gradients are the same, the same optimizer trains on, and the
script prints how fast each of the two is. Left, the loss, with the conversion marked. Right, what the model writes: a
temperature divides the logits, so a low one keeps to what is likely, and a high one dares more. `--file novel.txt
--seconds 600 --hidden 256` learns from another text, for longer.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import common
import torch
import torch.nn.functional as F
from common import BadTextError
from torch import Tensor, nn
from tqdm import tqdm

import fusedrnn

State = tuple[Tensor, Tensor]

# float32 rounds to 6e-8. The same sums done in another order, through three layers and a chunk of steps, end up about
# 1e-6 of the largest value apart; a wrong gate or a lost step shows as 1e-2 and more.
TOLERANCE = 1e-4
NOTHING = 1e-20  # gradients of saturated gates fade to where float32 runs out of digits; no optimizer sees this much
MAX_GRADIENT_NORM = 1.0
HELD_OUT = 25_000  # characters, at most
OUTPUTS = ("logits", "h_n", "c_n")
ROUNDS = 21  # of measuring, at most: after three, time may run out as well
MEASURING = 6.0  # seconds


class CharLM(nn.Module):
    """Embedding, three layers of LSTM, linear: tokens [T, B] -> logits [T, B, V] for the token that comes next."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.lstm = nn.LSTM(hidden, hidden, num_layers=3)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        y, state = self.lstm(self.embedding(tokens), state)
        return self.head(y), state


def text_file(path: Path, characters: int) -> str:
    """The first characters of a file of text."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(characters)
    except UnicodeDecodeError as error:
        raise BadTextError(f"it is not UTF-8 text: {error.reason}, 0x{error.object[error.start]:02x}") from error
    except OSError as error:
        raise BadTextError(error.strerror) from error
    if not text:
        raise BadTextError("the file is empty")
    if "\0" in text:
        raise BadTextError("it is not text: it contains a NUL character")
    return text


def split_streams(tokens: Tensor, batch: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Text to train on and held-out text, tokens [N] -> [N', B] each: B streams side by side, time downwards.

    Raises:
        BadTextError: a stream to train on is shorter than one chunk and its last target.
    """
    held_out = max(min(len(tokens) // 10, HELD_OUT), 2 * batch)
    training = len(tokens) - held_out
    if training < (chunk + 1) * batch:
        raise BadTextError(
            f"it is too short: of its {len(tokens)} characters {max(training, 0)} are left to train on, "
            f"and one chunk of (--chunk {chunk} + 1) x --batch {batch} takes {(chunk + 1) * batch}"
        )
    parts = tokens.split([training, held_out])
    return tuple(part[: len(part) // batch * batch].view(batch, -1).T.contiguous() for part in parts)


def endless_chunks(streams: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Inputs and targets [chunk, B] along the streams, again and again, and whether they are at the beginning."""
    while True:
        for start in range(0, len(streams) - chunk, chunk):
            yield streams[start : start + chunk], streams[start + 1 : start + chunk + 1], start == 0


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, targets: Tensor, state: State | None
) -> tuple[float, State]:
    """One chunk of truncated backpropagation through time.

    Returns:
        The loss in bits per character, and the state for the next chunk: its values without its history, which is where
        the gradient is cut.
    """
    logits, (h, c) = model(x, state)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
    optimizer.step()
    return loss.item() / math.log(2), (h.detach(), c.detach())


@dataclass
class Training:
    """What is kept from chunk to chunk, whichever LSTM computes."""

    model: CharLM
    optimizer: torch.optim.Optimizer
    chunks: Iterator[tuple[Tensor, Tensor, bool]]
    state: State | None = None
    losses: list[float] = field(default_factory=list)  # bits per character

    def run(self, steps: int | None, seconds: float, label: str) -> None:
        """Trains for a number of steps or, without one, for some seconds.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        begin, done, progress = time.perf_counter(), 0, 0.0
        bar_format = "{desc} {percentage:3.0f}%|{bar:30}|{postfix}"
        with tqdm(total=1.0, desc=label, mininterval=0.5, disable=None, bar_format=bar_format) as bar:
            while progress < 1:
                x, targets, at_beginning = next(self.chunks)
                state = None if at_beginning else self.state
                loss, self.state = train_step(self.model, self.optimizer, x, targets, state)
                if not math.isfinite(loss):
                    raise FloatingPointError(f"the loss is {loss} at step {len(self.losses)}: try a smaller --lr")
                self.losses.append(loss)
                done += 1
                progress = done / steps if steps else (time.perf_counter() - begin) / seconds
                bar.set_postfix_str(f"step {len(self.losses)}, {loss:.2f} bits per character", refresh=False)
                bar.update(min(progress, 1.0) - bar.n)


@torch.no_grad()
def bits_per_character(model: nn.Module, streams: Tensor, chunk: int) -> float:
    """The loss on streams [N, B] from end to end, the state carried."""
    state, total, last = None, 0.0, len(streams) - 1
    for start in range(0, last, chunk):
        end = min(start + chunk, last)
        logits, state = model(streams[start:end], state)
        total += F.cross_entropy(logits.flatten(0, 1), streams[start + 1 : end + 1].flatten(), reduction="sum").item()
    return total / (last * streams.shape[1]) / math.log(2)


def values_and_gradients(model: CharLM, x: Tensor, targets: Tensor, state: State | None) -> dict[str, Tensor]:
    """What one chunk computes: logits, state and the gradient of every parameter, by name."""
    # On a GPU torch's LSTM multiplies in TF32 unless told otherwise; this comparison is about float32.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        logits, (h, c) = model(x, state)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, parameters)
    return dict(zip((*OUTPUTS, *names), (logits, h, c, *gradients), strict=True))


def relative_differences(ours: dict[str, Tensor], baseline: dict[str, Tensor]) -> dict[str, float]:
    """For each value the largest absolute difference, over the largest absolute value that torch has."""
    return {
        name: ((ours[name] - value).abs().max() / value.abs().max().clamp(min=NOTHING)).item()
        for name, value in baseline.items()
    }


def seconds_in_turn(model: nn.Module, work: Callable[[], object]) -> tuple[list[float], list[float]]:
    """Seconds that `work` takes with torch's LSTM in the model, and with fusedrnn's, round by round.

    They are interleaved, and alternate in going first, so that both see the same machine. The first round is a warm-up.
    """
    seconds: dict[Callable[..., nn.Module], list[float]] = {fusedrnn.revert: [], fusedrnn.convert: []}
    start = time.perf_counter()
    for k in range(1 + ROUNDS):
        if k > 3 and time.perf_counter() - start > MEASURING:
            break
        for swap in list(seconds)[:: 1 if k % 2 else -1]:
            swap(model)
            begin = time.perf_counter()
            work()  # has to end with its numbers on the host, so that nothing is left running on a device
            seconds[swap].append(time.perf_counter() - begin)
    baseline, ours = (measured[1:] for measured in seconds.values())
    return baseline, ours


@torch.no_grad()
def sample(model: nn.Module, vocabulary: str, length: int, temperature: float, seed: int, prompt: str = "\n") -> str:
    """Lets the model write: one step at a time, each character drawn and fed back, the state passed on.

    Args:
        vocabulary: the character of each token.
        length: how many characters.
        temperature: divides the logits: below 1 safer, above 1 bolder.
        seed: the same seed draws the same characters.
        prompt: what the model reads before it writes; characters that are not in the vocabulary are left out.

    Returns:
        What it writes, without the prompt.

    Raises:
        ValueError: temperature is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    tokens, state, text = [vocabulary.index(character) for character in prompt if character in vocabulary], None, ""
    for _ in range(length):
        logits, state = model(torch.tensor(tokens or [0], device=device)[:, None], state)
        logits = logits[-1, 0].double().cpu()
        probabilities = ((logits - logits.max()) / temperature).softmax(0)
        tokens = [int(torch.multinomial(probabilities, 1, generator=generator))]
        text += vocabulary[tokens[0]]
    return text


def usable_device(text: str) -> torch.device:
    """A type for argparse: a device that can hold numbers here."""
    try:
        device = torch.device(text)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {reason}") from error
    return device


def command_line() -> common.Parser:
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--file", type=Path, help="UTF-8 text to learn from (the source of Python's standard library)")
    parser.whole("--characters", 1_500_000, "how many to read at most", 1, 10**9)
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--seconds", type=common.positive(1e9), default=45.0, help="how long to train (%(default)s)")
    budget.add_argument(
        "--steps", type=common.whole(2, 10**9), help="how many chunks to train on, instead of --seconds"
    )
    parser.whole("--hidden", 128, "size of each LSTM layer", 1, 8192)
    parser.whole("--batch", 32, "streams of text side by side")
    parser.whole("--chunk", 32, "steps after which the gradient is cut")
    parser.positive("--lr", 4e-3, "Adam's learning rate", 1.0)
    parser.positive("--temperature", 0.7, "of the sampled text: bolder above 1", 1e6)
    parser.whole("--length", 400, "characters to sample")
    add("--device", type=usable_device, default="cpu", help="cpu, cuda, cuda:1, ... (%(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> common.Result:
    parser = command_line()
    args = parser.options(argv, characters=60_000, steps=60, hidden=32, length=60)
    source = args.file or "the source of Python's standard library"
    try:
        text = text_file(args.file, args.characters) if args.file else common.standard_library(args.characters)
        vocabulary = "".join(sorted(set(text)))
        tokens = common.encode(text, vocabulary).to(args.device)
        streams, held_out = split_streams(tokens, args.batch, args.chunk)
    except BadTextError as error:
        parser.error(f"{source}: {error}")
    common.writable_folder(parser, args.out)
    print(f"{source}: {streams.numel():,} characters to train on, {held_out.numel():,} held out")
    return demonstrate(args, vocabulary, streams, held_out)


def demonstrate(args: argparse.Namespace, vocabulary: str, streams: Tensor, held_out: Tensor) -> common.Result:
    """Trains, converts, trains on, measures, writes.

    Raises:
        ArithmeticError: the two LSTMs disagree, or the loss is not finite.
    """
    torch.manual_seed(args.seed)
    model = CharLM(len(vocabulary), args.hidden).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    training = Training(model, optimizer, endless_chunks(streams, args.chunk))
    validation = {}  # bits per character of the held-out text, by step

    def validate(what: str) -> None:
        step = len(training.losses)
        validation[step] = bits_per_character(model, held_out, args.chunk)
        print(f"{what}: {validation[step]:.3f} bits per character of held-out text (step {step})")

    validate("before training")
    before, after = (args.steps // 2, args.steps - args.steps // 2) if args.steps else (None, None)
    training.run(before, args.seconds / 2, "torch.nn.LSTM")
    validate("trained with torch.nn.LSTM")

    x, targets = streams[: args.chunk], streams[1 : args.chunk + 1]
    parameters = list(model.parameters())
    baseline = values_and_gradients(model, x, targets, training.state)
    half = len(training.losses)

    fusedrnn.convert(model)

    ours = values_and_gradients(model, x, targets, training.state)
    print(f"converted; computed by {fusedrnn.explain(model.lstm, model.embedding(x), training.state)}")
    differences = relative_differences(ours, baseline)
    report_agreement(differences)
    same = all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    training.run(after, args.seconds / 2, "fusedrnn     ")
    validate("trained on with fusedrnn")

    report_speed(model, optimizer, x, targets, vocabulary)
    prompt = "\n" if args.file else "\ndef "
    written = {
        temperature: prompt[1:] + sample(model, vocabulary, args.length, temperature, args.seed, prompt)
        for temperature in (args.temperature / 1.4, args.temperature, 2 * args.temperature)
    }
    print(f"text written at temperature {args.temperature:g}:")
    print(written[args.temperature])
    bits = list(validation.values())
    return common.Result(
        draw(args, training.losses, half, validation, written),
        {"bits": bits, "differences": differences},
        {
            "outputs and gradients are those of torch.nn.LSTM": max(differences.values()) <= TOLERANCE,
            "the parameters are still the optimizer's own": same,
            "the loss on held-out text falls with torch.nn.LSTM, and on with fusedrnn": bits[0] > bits[1] > bits[2],
        },
    )


def report_agreement(differences: dict[str, float]) -> None:
    """Prints how far fusedrnn is from torch.

    Raises:
        ArithmeticError: further than the rounding of float32 explains.
    """
    print("largest difference from torch.nn.LSTM on one chunk, relative to torch's largest value:")
    for kind, names in (("outputs", OUTPUTS), ("gradients", differences.keys() - OUTPUTS)):
        name = max(names, key=lambda name: differences[name])
        print(f"  {kind:10}{differences[name]:.1e} at most ({name})")
    if not all(difference <= TOLERANCE for difference in differences.values()):
        raise ArithmeticError(f"they disagree: {TOLERANCE:.0e} is the most that float32 explains")
    print(f"  they agree (tolerance {TOLERANCE:.0e})")


def report_speed(model: CharLM, optimizer: torch.optim.Optimizer, x: Tensor, targets: Tensor, vocabulary: str) -> None:
    """Prints the characters per second of training and of sampling, with torch's LSTM and with fusedrnn's."""
    model, optimizer = copy.deepcopy((model, optimizer))  # measuring trains, and must not train the model
    T, B = x.shape

    def train_one_chunk() -> None:
        train_step(model, optimizer, x, targets, None)

    def sample_one_chunk() -> None:
        sample(model, vocabulary, T, 1.0, seed=0)

    print(f"characters per second, taking turns; torch threads: {torch.get_num_threads()}")
    measured = (("training", train_one_chunk, T * B, x), ("sampling", sample_one_chunk, T, x[:1, :1]))
    for label, work, characters, tokens in measured:
        rounds = seconds_in_turn(model, work)
        baseline, ours = (median(seconds) for seconds in rounds)
        backend = fusedrnn.explain(model.lstm, model.embedding(tokens)).backend
        rates = f"torch.nn.LSTM {characters / baseline:,.0f}, fusedrnn ({backend}) {characters / ours:,.0f}"
        print(f"  {label}: {rates}, ratio {baseline / ours:.2f}x (medians of {len(rounds[0])})")


def draw(
    args: argparse.Namespace,
    losses: Sequence[float],
    converted: int,
    validation: dict[int, float],
    written: dict[float, str],
) -> Path:
    """The loss of every chunk and of the held-out text, the step of the conversion, and text at three temperatures."""
    figure, (left, right) = common.figure_with(1, 2, (8.4, 3.6))
    left.plot(range(1, len(losses) + 1), losses, linewidth=0.8, color=common.BLUE, label="training, each chunk")
    left.plot(list(validation), list(validation.values()), "o", color="black", label="held-out text")
    left.axvline(converted + 0.5, color=common.RED, linestyle="--", label="fusedrnn.convert(model)")
    left.set(xlabel="step", ylabel="bits per character", ylim=(0, None), title="Three-layer character LSTM")
    left.legend()
    for row, (temperature, text) in enumerate(written.items()):
        top = 1.0 - row / len(written)
        shown = "".join(character if character == "\n" or " " <= character <= "~" else "?" for character in text)
        excerpt = "\n".join(line[:54] for line in shown.split("\n") if line.strip())
        lines = "\n".join(excerpt.split("\n")[:6])
        right.text(0, top, f"temperature {temperature:g}", va="top", weight="bold", size=8)
        style = {"family": "monospace", "size": 6.5, "va": "top", "parse_math": False, "in_layout": False}
        right.text(0, top - 0.06, lines, **style)
    right.axis("off")
    return common.save(figure, args, "char_lm")


if __name__ == "__main__":
    sys.exit(common.script(main))
