"""Layouts of a batch of sequences: that of the input, that of the computation, and conversions between them.

A layer takes [T, B, ...], or the rows of a PackedSequence, [N, ...]. An input may also be batch_first or unbatched, and
padded sequences with lengths are packed where that is faster.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from . import dispatch
from .packing import PackedRows

_PACKING_FLOPS = 5e7  # least work on padding for which packing is faster


class Form(NamedTuple):
    """The layout of an input, and that of its computation."""

    T: int
    B: int
    unbatched: bool = False
    batch_first: bool = False
    rows: bool = False  # the input is the data of a PackedSequence
    batch_sizes: Tensor | None = None  # of the PackedSequence, if its sequences have different lengths
    padded: bool = False  # whether packed input is padded for the computation
    packing: PackedRows | None = None  # packs padded input for the computation

    def enter(self, input: Tensor) -> Tensor:
        """Converts x to the layout of a layer: [T, B, I], or packed rows, [N, I]."""
        if self.packing is not None:
            return self.packing.packed(input)
        if self.batch_sizes is not None:
            return pad_packed_sequence(PackedSequence(input, self.batch_sizes))[0] if self.padded else input
        if self.rows:  # all sequences have the same length: packed rows are [T, B, I]
            return input.unflatten(0, (self.T, self.B))
        if self.unbatched:
            return input.unsqueeze(1)
        return input.transpose(0, 1) if self.batch_first else input

    def leave(self, y: Tensor) -> Tensor:
        """The inverse of `enter`."""
        if self.packing is not None:
            return self.packing.padded(y)
        if self.batch_sizes is not None:
            return pack_padded_sequence(y, self._packed_lengths()).data if self.padded else y
        if self.rows:
            return y.flatten(0, 1)
        if self.unbatched:
            return y.squeeze(1)
        return y.transpose(0, 1) if self.batch_first else y

    def enter_rows(self, values: Tensor) -> Tensor:
        """[..., T, B, size], or of a PackedSequence [..., N, size], whatever the layout of the input -> as `enter`."""
        if self.packing is not None:
            return self.packing.packed(values.transpose(-3, -2) if self.batch_first else values)
        if self.padded and self.batch_sizes is not None:
            return PackedRows(self._packed_lengths().to(values.device), self.T).padded(values)
        return values

    def sort(
        self,
        h0: Tensor | None,
        c0: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        device: torch.device,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Sorts h0, c0, lengths and reset into the order of the computation."""
        if self.batch_sizes is not None:
            return h0, c0, self._packed_lengths().to(device), reset
        if self.packing is None:
            return h0, c0, lengths, reset
        h0, c0, reset = (None if t is None else t.index_select(1, self.packing.order) for t in (h0, c0, reset))
        return h0, c0, self.packing.lengths, None if reset is None else reset[: self.packing.steps]

    def unsort(self, hn: Tensor, cn: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `sort`, for the last states."""
        if self.packing is None:
            return hn, cn
        back = self.packing.order.argsort()
        return hn.index_select(1, back), cn.index_select(1, back)

    def _packed_lengths(self) -> Tensor:
        """[B] int64 on the CPU."""
        assert self.batch_sizes is not None
        return (self.batch_sizes.unsqueeze(1) > torch.arange(self.B, device="cpu")).sum(0)


def form_of(input: Tensor, batch_first: bool, batch_sizes: Tensor | None) -> Form:
    """The form of a valid input."""
    if batch_sizes is not None:
        if dispatch.is_recorded():
            B: Any = batch_sizes[0]  # a tensor, as sizes are in a trace
            return Form(batch_sizes.shape[0], B, rows=True, batch_sizes=batch_sizes)
        sizes = batch_sizes.tolist()
        return Form(len(sizes), sizes[0], rows=True, batch_sizes=batch_sizes if sizes[-1] < sizes[0] else None)
    if input.dim() == 2:
        return Form(input.shape[0], 1, unbatched=True)
    if batch_first:
        return Form(input.shape[1], input.shape[0], batch_first=True)
    return Form(input.shape[0], input.shape[1])


def packing(form: Form, lengths: Tensor, flops: float) -> PackedRows | None:
    """How to pack padded sequences, or None if padding is faster; flops: per row, a step of one sequence."""
    if not dispatch.is_eager():
        return None
    padding = form.T * form.B - int(lengths.sum())
    if padding == form.T * form.B or padding * flops < _PACKING_FLOPS:
        return None
    return PackedRows(lengths, form.T, form.batch_first)
