"""Whole models as people write them around nn.LSTM, and what they are trained on.

Each has a method `loss`: from a batch, and the state that the batch before left, to the loss and the next state. The
text is the source of Python's standard library.
"""

from __future__ import annotations

import builtins
import keyword
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fusedrnn

_CHARACTERS = 400_000


class CharacterModel(nn.Module):
    """The model of examples/char_lm.py: embedding, three LSTM layers, linear; chunks [T + 1, B], the state carried."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.lstm = nn.LSTM(hidden, hidden, num_layers=3)
        self.head = nn.Linear(hidden, vocabulary)

    def loss(self, chunk: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.lstm(self.embedding(chunk[:-1]), state)
        return F.cross_entropy(self.head(y).flatten(0, 1), chunk[1:].flatten()), state


class WordModel(nn.Module):
    """Two LSTM layers between an embedding and a linear layer that is the embedding transposed; chunks [T + 1, B]."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.lstm = nn.LSTM(hidden, hidden, num_layers=2)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def loss(self, chunk: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.lstm(self.embedding(chunk[:-1]), state)
        logits = F.linear(y, self.embedding.weight, self.bias)
        return F.cross_entropy(logits.flatten(0, 1), chunk[1:].flatten()), state


class Tagger(nn.Module):
    """A bidirectional LSTM that tells the kind of every word of a line; a batch is packed lines, and packed tags."""

    KINDS = 4  # keyword, builtin, number, anything else

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.lstm = nn.LSTM(hidden, hidden, bidirectional=True)
        self.head = nn.Linear(2 * hidden, self.KINDS)

    def loss(self, batch: tuple[PackedSequence, PackedSequence], _: Any) -> tuple[Tensor, None]:
        words, tags = batch
        y, _ = self.lstm(words._replace(data=self.embedding(words.data)))
        return F.cross_entropy(self.head(y.data), tags.data), None


class Policy(nn.Module):
    """A recurrent policy for a task of memory: a cue is shown when an episode begins, and is to be named ever after.

    A batch is what was seen [T, B, 2 + A], whether an episode begins [T, B], what was done [T, B] and what it earned
    [T, B]. The actions were drawn uniformly, so that A pi(action) is their importance weight, and the loss is minus the
    expected reward: it has no random draw that a rounding could turn over.
    """

    ACTIONS = 4

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2 + self.ACTIONS, hidden)
        self.head = nn.Linear(hidden, self.ACTIONS)

    def forward(self, seen: Tensor, begins: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Probabilities of the actions [T, B, A] and the state; the state entering step t is zero where begins[t]."""
        if isinstance(self.lstm, fusedrnn.LSTM):
            y, state = self.lstm(seen, state, reset=begins)
            return self.head(y).softmax(-1), state
        outputs = []
        for x, keep in zip(seen.unsqueeze(1), (~begins).unsqueeze(-1).to(seen.dtype), strict=True):
            if state is not None:  # the way it is written around nn.LSTM, which has no resets
                state = tuple(s * keep for s in state)
            y, state = self.lstm(x, state)
            outputs.append(y)
        return self.head(torch.cat(outputs)).softmax(-1), state

    def loss(self, batch: tuple[Tensor, ...], state: Any) -> tuple[Tensor, Any]:
        seen, begins, actions, rewards = batch
        probabilities, state = self(seen, begins, state)
        chosen = probabilities.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        return -(self.ACTIONS * chosen * rewards).mean(), state


@dataclass(frozen=True)
class Task:
    """A model and what it is trained on."""

    name: str
    unit: str
    build: Callable[[], nn.Module]
    batches: Sequence[Any]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    units: int  # in one training step; on average, where batches differ
    acting: Any = None  # x, where the model is also stepped through time, one call for each step

    @property
    def lstm(self) -> nn.LSTM:
        """The one in the model."""
        return next(module for module in self.build().modules() if isinstance(module, nn.LSTM))


def tasks(shrink: int = 1) -> list[Task]:
    """The four of them; `shrink` divides the sizes, for a run that only goes through every step."""

    def size(full: int) -> int:
        return max(full // shrink, 2)

    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=4e-3)

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1.0)

    made = []
    text = _text(_CHARACTERS // shrink)
    characters, count = _indices(list(text), len(set(text)))
    chunks = _chunks(characters, size(64), size(32))
    made.append(
        Task("character model", "character", lambda: CharacterModel(count, size(128)), chunks, adam, _per(chunks))
    )

    words = re.findall(r"\w+|[^\w\s]", text)
    tokens, vocabulary = _indices(words, 5000 // shrink)
    sequences = _chunks(tokens, size(35), size(20))
    made.append(Task("word model", "word", lambda: WordModel(vocabulary, size(650)), sequences, sgd, _per(sequences)))

    lines, lines_units = _tagged_lines(text, size(64), vocabulary, dict(zip(words, tokens.tolist(), strict=True)))
    made.append(Task("tagger", "word", lambda: Tagger(vocabulary, size(256)), lines, adam, lines_units))

    episodes = _episodes(size(64), size(32), 16)
    acting = torch.randn(1, 1, 2 + Policy.ACTIONS)
    made.append(Task("policy", "step", lambda: Policy(size(128)), episodes, adam, size(64) * size(32), acting))
    return made


@cache
def _text(characters: int) -> str:
    text = ""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if len(text) >= characters:
            break
        text += path.read_text(encoding="utf-8", errors="replace")
    return text[:characters]


def _indices(items: list[str], most: int) -> tuple[Tensor, int]:
    """Every item as a number below the second result; 0 stands for all that are not among the most frequent."""
    known = {item: k for k, (item, _) in enumerate(Counter(items).most_common(most), 1)}
    return torch.tensor([known.get(item, 0) for item in items]), len(known) + 1


def _chunks(tokens: Tensor, T: int, B: int) -> list[Tensor]:
    """[T + 1, B] each, the last step of one being the first of the next: B streams side by side."""
    streams = tokens[: len(tokens) // B * B].view(B, -1).T.contiguous()
    return [streams[start : start + T + 1] for start in range(0, len(streams) - T, T)]


def _per(chunks: Sequence[Tensor]) -> int:
    return chunks[0][1:].numel()


def _tagged_lines(text: str, B: int, vocabulary: int, index: dict[str, int]) -> tuple[list[Any], int]:
    def kind(word: str) -> int:
        if keyword.iskeyword(word):
            return 0
        return 1 if hasattr(builtins, word) else 2 if word[0].isdigit() else 3

    lines = [words for line in text.splitlines() if (words := re.findall(r"\w+|[^\w\s]", line))]
    batches, units = [], 0
    for start in range(0, len(lines) - B, B):
        group = lines[start : start + B]
        words = [torch.tensor([index.get(word, 0) for word in line]) for line in group]
        tags = [torch.tensor([kind(word) for word in line]) for line in group]
        batches.append((pack_sequence(words, enforce_sorted=False), pack_sequence(tags, enforce_sorted=False)))
        units += len(batches[-1][0].data)
    return batches, units // len(batches)


def _episodes(T: int, B: int, count: int) -> list[tuple[Tensor, ...]]:
    """Observations, actions and rewards of a uniformly random player in `count` chunks of the memory task."""
    random, A = torch.Generator().manual_seed(0), Policy.ACTIONS
    cues, batches = torch.zeros(B, dtype=torch.int64), list[tuple[Tensor, ...]]()
    for chunk in range(count):
        begins = torch.rand(T, B, generator=random) < 0.1
        begins[0] |= chunk == 0
        actions = torch.randint(A, (T, B), generator=random)
        seen, rewards = torch.zeros(T, B, 2 + A), torch.zeros(T, B)
        for t in range(T):
            cues = torch.where(begins[t], torch.randint(A, (B,), generator=random), cues)
            shown = F.one_hot(cues, A) * begins[t].unsqueeze(-1)
            seen[t] = torch.cat([begins[t].unsqueeze(-1), torch.rand(B, 1, generator=random), shown], dim=-1)
            rewards[t] = (actions[t] == cues).float()
        batches.append((seen, begins, actions, rewards))
    return batches
