"""Conversion between padded sequences and the rows of a PackedSequence."""

from __future__ import annotations

import torch
from torch import Tensor


class PackedRows:
    """The index of each row of a PackedSequence in the padded sequences.

    Rows are ordered by time step, and within a step by decreasing sequence length. Differentiable to any order.

    Args:
        lengths: [B] int64, each in 0..T.
        T: time steps of the padded sequences; the longest sequence may have less.
        batch_first: whether padded sequences are [B, T, ...] and not [T, B, ...].

    Attributes:
        lengths: [B], in decreasing order; sequences of length 0 have no rows.
        steps: length of the longest sequence.
        order: [B], index of each of these sequences in the padded batch.
        rows: [N], index of each row in [T * B], or [B * T].
    """

    def __init__(self, lengths: Tensor, T: int, batch_first: bool = False):
        self.lengths, self.order = lengths.sort(descending=True, stable=True)
        self.steps = int(self.lengths[0])
        exists = torch.arange(T, device=lengths.device).unsqueeze(1) < self.lengths
        t, b = exists.nonzero(as_tuple=True)
        b, B = self.order[b], len(lengths)
        self.sizes = (B, T) if batch_first else (T, B)
        self.rows = b * T + t if batch_first else t * B + b

    def packed(self, padded: Tensor) -> Tensor:
        """[..., T, B, size], or [..., B, T, size] -> [..., N, size]."""
        return padded.flatten(-3, -2).index_select(-2, self.rows)

    def padded(self, packed: Tensor) -> Tensor:
        """[..., N, size] -> [..., T, B, size], or [..., B, T, size], with zeros where there is no row."""
        T, B = self.sizes
        zeros = packed.new_zeros(*packed.shape[:-2], T * B, packed.shape[-1])
        return zeros.index_copy_(-2, self.rows, packed).unflatten(-2, self.sizes)
