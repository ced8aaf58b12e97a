"""The plain recurrent cell of Elman 1990, as in nn.RNN: h = tanh(a), or relu(a)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .spec import Cell


def _rnn(
    name: str,
    function: Callable[[Tensor], Tensor],
    in_place: Callable[[Tensor], Tensor],
    derivative: Callable[[Tensor], Tensor],
) -> Cell:
    """derivative: the derivative of `function` as a function of its value."""

    def step(a: Tensor, carry: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = function(a)
        return h, carry, h

    def activate_(a: Tensor) -> None:
        in_place(a)

    def step_backward(
        saved: Tensor, carry_in: Tensor, carry: Tensor, dm: Tensor, dcarry: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return dm * derivative(saved), dcarry, saved

    return Cell(
        name=name,
        gates=("h",),
        maps=("h",),
        input=(0,),
        recurrent=(0,),
        saved=("h",),
        carry=None,
        step=step,
        activate_=activate_,
        step_backward=step_backward,
    )


RNN_TANH = _rnn("rnn_tanh", Tensor.tanh, Tensor.tanh_, lambda h: 1 - h * h)
RNN_RELU = _rnn("rnn_relu", Tensor.relu, Tensor.relu_, lambda h: (h > 0).to(h.dtype))
