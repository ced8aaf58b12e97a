"""LSTM, GRU and plain RNN side by side: which of them remembers.

    python examples/cells.py                       # half a minute
    python examples/cells.py --steps 2000 --length 100

The adding problem of Hochreiter and Schmidhuber (1997): a sequence of pairs (a number in 0..1, a mark), of which two
are marked; the answer is the sum of the two marked numbers. Who forgets the first one answers 1 and is off by 0.167 in
the mean square. Sequences are of several lengths, so `lengths` says where each ends, and no padding is read.

Prints for each module how many parameters it has, what computes it here, and the error it ends with.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import fusedrnn

MODULES = {
    "LSTM": lambda H: fusedrnn.LSTM(2, H),
    "GRU": lambda H: fusedrnn.GRU(2, H),
    "RNN, tanh": lambda H: fusedrnn.RNN(2, H),
    "RNN, relu": lambda H: fusedrnn.RNN(2, H, nonlinearity="relu"),
}


def batch(length: int, B: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences [T, B, 2], their lengths [B], at least 2, and the answers [B]."""
    lengths = torch.randint(max(length // 2, 2), length + 1, (B,))
    numbers, marks = torch.rand(length, B), torch.zeros(length, B)
    for b, T in enumerate(lengths.tolist()):
        marks[torch.randperm(T)[:2], b] = 1.0
    return torch.stack([numbers, marks], dim=-1), lengths, (numbers * marks).sum(0)


def train(layer: nn.Module, H: int, length: int, steps: int) -> float:
    """Trains a layer and a linear layer behind it; returns the mean square error of the last tenth of the steps."""
    head = nn.Linear(H, 1)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=3e-3)
    losses = []
    for _ in range(steps):
        x, lengths, answers = batch(length)
        _, last = layer(x, lengths=lengths)
        h = last[0] if isinstance(last, tuple) else last  # of an LSTM (h_n, c_n)
        loss = (head(h[-1]).squeeze(-1) - answers).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    tail = losses[-max(steps // 10, 1) :]
    return sum(tail) / len(tail)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains all of them on the same sequences."""
    parser = argparse.ArgumentParser(description="LSTM, GRU and RNN on the adding problem.")
    parser.add_argument("--length", type=int, default=30, help="of the longest sequences (30)")
    parser.add_argument("--steps", type=int, default=300, help="of training (300)")
    parser.add_argument("--hidden", type=int, default=32, help="H (32)")
    options = parser.parse_args(argv)
    if options.length < 2 or options.steps < 1 or options.hidden < 1:
        parser.error("--length must be 2 or more, --steps and --hidden 1 or more")
    print(f"{'module':10}  {'parameters':>10}  {'computed by':11}  mean square error")
    for name, build in MODULES.items():
        torch.manual_seed(0)
        layer = build(options.hidden)
        x, lengths, _ = batch(options.length)
        runs = fusedrnn.explain(layer, x, lengths=lengths).backend
        parameters = sum(p.numel() for p in layer.parameters())
        error = train(layer, options.hidden, options.length, options.steps)
        print(f"{name:10}  {parameters:10}  {runs or 'nothing':11}  {error:.4f}", flush=True)


if __name__ == "__main__":
    main()
