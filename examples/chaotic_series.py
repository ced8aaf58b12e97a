"""A chaotic series: one step ahead, and running free.

The Mackey-Glass equation is a feedback with a delay, and chaotic: what differs a little ends up somewhere else. An
LSTM learns to predict its next value from the ones before. Then it warms up on 300 values it has not seen and runs
free, each prediction fed back as the next input, one step at a time (T = 1) with the state handed on. Top, one such
run: it follows the series for a while and then goes its own way, in the same manner. Bottom, the error over many runs:
tiny for one step, growing while it runs, and in the end of the size of the series itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import common
import torch
from torch import Tensor, nn

import fusedrnn

DELAY = 17


def mackey_glass(steps: int, B: int) -> Tensor:
    """B series [steps, B] of dx/dt = 0.2 x(t-17) / (1 + x(t-17)^10) - 0.1 x, with mean 0 and deviation 1.

    Each starts from values of its own; a value is ten steps of Euler's method, and the first 200 are left out.
    """
    substeps = 10
    values = list((1.2 + 0.2 * torch.randn(B)).clamp(0.2, 2.0) + 0.1 * torch.randn(DELAY * substeps, B))
    for _ in range((steps + 200) * substeps):
        x, delayed = values[-1], values[-DELAY * substeps]
        values.append(x + (0.2 * delayed / (1 + delayed.abs() ** 10) - 0.1 * x) / substeps)
    series = torch.stack(values[-steps * substeps :: substeps])
    return (series - series.mean()) / series.std()


class Predictor(nn.Module):
    """An LSTM and a linear layer that predict the change: values [T, B] -> the next values [T, B] and the state."""

    def __init__(self, H: int) -> None:
        super().__init__()
        self.lstm = fusedrnn.LSTM(1, H)
        self.head = nn.Linear(H, 1)

    def forward(self, x: Tensor, state=None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, state = self.lstm(x[..., None], state)
        return x + self.head(y).squeeze(2), state

    @torch.no_grad()
    def run_free(self, x: Tensor, steps: int) -> Tensor:
        """Reads x [T, B], and goes on alone for some steps [steps, B]."""
        predicted, state = self(x)
        value, values = predicted[-1:], [predicted[-1:]]
        for _ in range(steps - 1):
            value, state = self(value, state)
            values.append(value)
        return torch.cat(values)


@torch.no_grad()
def streamed(model: Predictor, x: Tensor) -> Tensor:
    """The predictions for x [T, B], value after value as they come in, with the state handed on."""
    state, predictions = None, []
    for value in x:
        prediction, state = model(value[None], state)
        predictions.append(prediction)
    return torch.cat(predictions)


def main(argv: Sequence[str] | None = None) -> common.Result:
    parser = common.Parser(__doc__)
    parser.whole("--steps", 1000, "of training", 2)
    parser.whole("--hidden", 48, "H, the hidden units", 1, 1024)
    parser.whole("--free", 400, "values to predict alone", 20, 10_000)
    options = common.parse(parser, argv, steps=150, hidden=24, free=200)

    warm_up, B = 300, 64
    series = mackey_glass(400 if options.quick else 1000, B)
    unseen = mackey_glass(warm_up + options.free, B)
    model = Predictor(options.hidden)

    def next_loss() -> Tensor:
        start = int(torch.randint(len(series) - 151, ()))
        x = series[start : start + 151]
        predicted, _ = model(x[:-1])
        return (predicted - x[1:])[20:].square().mean()  # the first values are too few to know the state

    common.train(model, next_loss, options.steps, 3e-3, "one step ahead", clip=0.1)
    with torch.no_grad():
        predicted, _ = model(unseen[:-1])
    one_step = (predicted - unseen[1:])[warm_up - 1 :].square().mean().sqrt().item()
    difference = (streamed(model, unseen[:-1]) - predicted).abs().max().item()
    truth, free = unseen[warm_up:], model.run_free(unseen[:warm_up], options.free)
    errors = (free - truth).square().mean(1).sqrt()

    figure, (top, bottom) = common.figure_with(2, 1, (7.2, 4.0), sharex=True)
    top.plot(range(-60, options.free), unseen[warm_up - 60 :, 0], color="black", label="the series")
    top.plot(free[:, 0], color=common.RED, linestyle="--", label="LSTM, running free")
    top.axvline(0, color=common.GREY, linewidth=0.8)
    top.set(ylabel="value", ylim=(-2.5, 2.9))
    top.set_title("Mackey-Glass series", loc="left")
    top.legend(loc="upper right", ncols=2)
    bottom.semilogy(range(1, options.free + 1), errors, color=common.BLUE, label="running free")
    bottom.axhline(one_step, color=common.GREEN, linestyle="--", label="one step ahead")
    bottom.axhline(1, color=common.GREY, linestyle=":", label="deviation of the series")
    bottom.set(xlabel="steps since the warm-up", ylabel="error (RMS)")
    bottom.legend(loc="lower right", frameon=True)

    last = errors[-len(errors) // 4 :].mean().item()
    claims = {
        "one step ahead the error is below a tenth of the deviation": one_step < 0.1,
        "running free the error grows: to more than ten times that of one step": last > 10 * one_step,
        "value by value gives what the whole series at once gives": difference < 1e-4,
    }
    if not options.quick:
        claims["in the end a free run is off by more than a third of the deviation"] = last > 1 / 3
        claims["the first 20 steps of a free run are off by less than a fifth"] = errors[:20].max().item() < 0.2
    numbers = {"one step": one_step, "errors": errors, "last": last, "difference": difference}
    return common.Result(common.save(figure, options, "chaotic_series"), numbers, claims)


if __name__ == "__main__":
    sys.exit(common.script(main))
