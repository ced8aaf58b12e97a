"""Cells of one's own: each a pointwise function, with everything else about a recurrent layer from fusedrnn.

    python examples/own_cell.py

Some of the variants that searches over cells have tried, on the adding problem: each sequence has numbers, of which two
are marked, and the target is their sum. A function gets the affine maps of the input, x, and of the state, u, by gate.
"""

import torch
from torch import Tensor, nn

import fusedrnn


@fusedrnn.cell(gates=("f", "g", "o"), state="c")
def no_input_gate(x, u, c: Tensor):
    """Greff et al. 2017: an LSTM without input gate."""
    c = torch.sigmoid(x.f + u.f) * c + torch.tanh(x.g + u.g)
    return torch.sigmoid(x.o + u.o) * torch.tanh(c), c


@fusedrnn.cell(gates=("i", "g", "o"), state="c", parameters=("pi", "po"))
def coupled_with_peepholes(x, u, c: Tensor, p):
    """Greff et al. 2017: f = 1 - i, and gates that see c; each unit has its own pi and po."""
    i = torch.sigmoid(x.i + u.i + p.pi * c)
    c = (1 - i) * c + i * torch.tanh(x.g + u.g)
    return torch.sigmoid(x.o + u.o + p.po * c) * torch.tanh(c), c


@fusedrnn.cell(gates=("z", "r", "n"), state="h")
def mutant(x, u, h: Tensor):
    """After Jozefowicz et al. 2015, MUT1, with the reset gate behind the product: the update gate sees x alone."""
    z, r = torch.sigmoid(x.z), torch.sigmoid(x.r + u.r)
    return z * torch.tanh(torch.tanh(x.n) + r * u.n) + (1 - z) * h


def adding_problem(steps: int, batch: int) -> tuple[Tensor, Tensor]:
    numbers, marks = torch.rand(steps, batch), torch.zeros(steps, batch)
    for half in (0, steps // 2):
        marks.scatter_(0, torch.randint(half, half + steps // 2, (1, batch)), 1.0)
    return torch.stack([numbers, marks], dim=-1), (numbers * marks).sum(0)


def train(cell, steps: int = 20, updates: int = 300) -> float:
    torch.manual_seed(0)
    layer, read = fusedrnn.Recurrent(cell, 2, 32), nn.Linear(32, 1)
    optimizer = torch.optim.Adam([*layer.parameters(), *read.parameters()], lr=0.01)
    for _ in range(updates):
        x, target = adding_problem(steps, 64)
        loss = nn.functional.mse_loss(read(layer(x)[0][-1]).squeeze(-1), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


if __name__ == "__main__":
    for cell in (no_input_gate, coupled_with_peepholes, mutant):
        print(f"{cell.__name__:24} error {train(cell):.4f}; a constant has 0.1667")
