"""Reinforcement learning with a memory: the T-maze.

At the entrance of a corridor a sign says left or right; at its end is a junction, where the agent has to turn the way
the sign said (Bakker 2002). In between it sees nothing of use: it has to remember. A policy with an LSTM learns by
trial and error, from the reward alone, in 64 mazes at once. When a maze is through, the next begins in the middle of
the sequence; `reset` sets the state to zero there, so a whole roll-out is one call. The same policy with `reset` at
every step has no memory, and turns the right way half of the time. Right, the cell state that tells the two signs
apart, on the way to the junction.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedrnn

SEES = {"left": 0, "right": 1, "corridor": 2, "junction": 3}
LEFT, RIGHT, FORWARD = range(3)
DISCOUNT = 0.97


class Mazes:
    """B corridors; at the end of each, turn as the sign at the entrance said.

    Going forward costs nothing. Turning in the corridor, or going forward at the junction, changes nothing and costs
    0.1. A turn at the junction ends the episode, with a reward of 1 if it is right and -1 if it is wrong.
    """

    def __init__(self, B: int, corridor: int) -> None:
        self.corridor = corridor
        self.place = torch.zeros(B, dtype=torch.int64)
        self.sign = torch.randint(2, (B,))

    def see(self) -> Tensor:
        """What is in sight, one-hot [B, 4]."""
        seen = torch.where(self.place == 0, self.sign, SEES["corridor"])
        seen = torch.where(self.place == self.corridor, SEES["junction"], seen)
        return F.one_hot(seen, len(SEES)).float()

    def act(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Takes a step in each maze; returns the rewards [B] and which of them ended [B], where a new one has begun."""
        at_junction, forward = self.place == self.corridor, actions == FORWARD
        ended = at_junction & ~forward
        rewards = torch.where(ended, torch.where(actions == self.sign, 1.0, -1.0), 0.0)
        rewards -= 0.1 * (at_junction == forward)
        self.place = torch.where(ended, 0, self.place + (forward & ~at_junction).long())
        self.sign = torch.where(ended, torch.randint(2, self.sign.shape), self.sign)
        return rewards, ended


class Policy(nn.Module):
    """An LSTM, and from its state the logits of the actions and the expected return."""

    def __init__(self, H: int, remembers: bool) -> None:
        super().__init__()
        self.lstm = fusedrnn.LSTM(len(SEES), H)
        common.open_forget_gate(self.lstm, 2.0)
        self.actor = nn.Linear(H, 3)
        self.critic = nn.Linear(H, 1)
        self.remembers = remembers

    def forward(self, seen: Tensor, begins: Tensor, state=None) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """seen [T, B, 4], begins [T, B] where an episode begins -> logits [T, B, 3], values [T, B], the state."""
        reset = begins if self.remembers else torch.ones_like(begins)
        y, state = self.lstm(seen, state, reset=reset)
        return self.actor(y), self.critic(y).squeeze(2), state


def returns_of(rewards: Tensor, ended: Tensor, value: Tensor) -> Tensor:
    """Discounted returns [T, B]; `value` [B] stands for what comes after the last step."""
    returns = []
    for reward, end in zip(rewards.flip(0), ended.flip(0), strict=True):
        value = reward + DISCOUNT * torch.where(end, 0.0, value)
        returns.append(value)
    return torch.stack(returns[::-1])


def learn(remembers: bool, options, label: str) -> tuple[Policy, list[float]]:
    """Advantage actor-critic; returns the policy and the share of right turns in each roll-out."""
    torch.manual_seed(options.seed)
    policy, mazes = Policy(options.hidden, remembers), Mazes(64, options.corridor)
    begins, state = torch.ones(64, dtype=torch.bool), None
    shares: list[float] = []

    def next_loss() -> Tensor:
        nonlocal begins, state
        first, steps = state, []
        with torch.no_grad():
            for _ in range(4 * options.corridor):
                seen = mazes.see()
                logits, _, state = policy(seen[None], begins[None], state)
                actions = torch.multinomial(logits[0].softmax(1), 1).squeeze(1)
                rewards, ended = mazes.act(actions)
                steps.append((seen, begins, actions, rewards, ended))
                begins = ended
            _, value, _ = policy(mazes.see()[None], begins[None], state)
        seen, began, actions, rewards, ended = map(torch.stack, zip(*steps, strict=True))
        shares.append(((rewards == 1).sum() / ended.sum().clamp(min=1)).item())

        logits, values, _ = policy(seen, began, first)  # the whole roll-out, with episodes that begin within it
        returns = returns_of(rewards, ended, value[0])
        chosen = logits.log_softmax(2).gather(2, actions[..., None]).squeeze(2)
        entropy = -(logits.softmax(2) * logits.log_softmax(2)).sum(2).mean()
        advantage = (returns - values).detach()
        return -(chosen * advantage).mean() + 0.5 * (returns - values).square().mean() - 0.01 * entropy

    common.train(policy, next_loss, options.steps, 3e-3, label)
    return policy, shares


@torch.no_grad()
def cells_on_the_way(policy: Policy, corridor: int) -> Tensor:
    """tanh(c) on the way to the junction, for either sign: [T, 2, H]."""
    seen = torch.full((corridor + 1, 2), SEES["corridor"])
    seen[0], seen[-1] = torch.tensor([SEES["left"], SEES["right"]]), SEES["junction"]
    _, _, states = policy.lstm(F.one_hot(seen, len(SEES)).float(), return_states=True)
    return states.c[0].tanh()


def main(argv: Sequence[str] | None = None) -> common.Result:
    parser = common.Parser(__doc__)
    parser.whole("--steps", 400, "of training", 10)
    parser.whole("--corridor", 8, "length of the corridor", 1, 1000)
    parser.whole("--hidden", 24, "H, the hidden units", 1, 1024)
    options = common.parse(parser, argv, steps=120, corridor=3)

    remembering, right = learn(True, options, "with memory")
    _, half = learn(False, options, "without")
    cells = cells_on_the_way(remembering, options.corridor)
    unit = int((cells[1:, 0] - cells[1:, 1]).abs().mean(0).argmax())

    figure, (left, middle) = common.figure_with(1, 2)
    width = max(options.steps // 40, 1)
    left.plot(common.smooth(right, width), color=common.BLUE, label="LSTM")
    left.plot(common.smooth(half, width), color=common.RED, linestyle="--", label="LSTM, reset at every step")
    left.axhline(0.5, color=common.GREY, linewidth=0.8)
    title = f"T-maze, corridor of {options.corridor}"
    left.set(ylim=(0, 1.03), xlabel="step", ylabel="share of right turns", title=title)
    left.legend(loc="lower right")
    for sign, colour, dashes in (("left", common.ORANGE, "-"), ("right", common.GREEN, "--")):
        middle.plot(cells[:, SEES[sign], unit], dashes, marker=".", color=colour, label=f"sign: {sign}")
    middle.set(
        ylim=(-1.05, 1.05),
        xlabel="steps from the entrance",
        ylabel=f"tanh(c) of unit {unit}",
        title="What it remembers",
    )
    middle.legend()

    tenth = max(options.steps // 10, 1)
    ends = {"with memory": sum(right[-tenth:]) / tenth, "without": sum(half[-tenth:]) / tenth}
    least = 0.8 if options.quick else 0.95
    return common.Result(
        common.save(figure, options, "memory_task"),
        ends,
        {
            f"with memory more than {100 * least:.0f} % of the turns are right": ends["with memory"] > least,
            "without it about half": abs(ends["without"] - 0.5) < 0.1,
        },
    )


if __name__ == "__main__":
    sys.exit(common.script(main))
