"""Zoneout and recurrent dropout: the multipliers of a layer (cells.NOISE), and how they are drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .cells import Cell, lstm_variant
from .reference import compute_dtype
from .sequence import Form

MODES = {"candidate": "g", "state": "r"}  # recurrent_dropout_mode -> name of its multiplier


class Noise(NamedTuple):
    """The probabilities of zoneout and recurrent dropout of an LSTM."""

    zoneout_h: float
    zoneout_c: float
    dropout: float
    mode: str  # in MODES

    def kinds(self, training: bool) -> tuple[str, ...]:
        """The names of the multipliers. In evaluation zoneout takes its expectation, and nothing is dropped."""
        kinds = ["h"] if self.zoneout_h else []
        kinds += ["c"] if self.zoneout_c else []
        kinds += [MODES[self.mode]] if self.dropout and training else []
        return tuple(kinds)

    def cell(self, cell: Cell, training: bool) -> Cell:
        """The LSTM `cell` with this noise."""
        return lstm_variant(bool(cell.parameters), len(cell.gates) == 3, self.kinds(training))

    def draw(self, cell: Cell, training: bool, form: Form, D: int, sizes: tuple[int, int], like: Tensor) -> Tensor:
        """Draws the noise of one layer for `reference.layer`, from torch's generator.

        Masks are drawn for [T, B], independent of the layout of the input, or for the rows of a PackedSequence.

        Args:
            cell: the cell with this noise.
            sizes: H and P.
            like: a tensor of the device and dtype of the input.
        """
        width = D * sizes[1 if cell.noise == ("r",) else 0]
        rows = (like.shape[0],) if form.batch_sizes is not None else (form.T, form.B)
        once = not training or cell.noise == ("r",)
        shape = (1, form.B, width) if once else (*rows, width)
        options: Any = {"dtype": compute_dtype(like.dtype), "device": like.device}

        ones = {"h": self.zoneout_h, "c": self.zoneout_c, "g": 1 - self.dropout}
        if not training:
            noise = torch.full((len(cell.noise), *shape), ones[cell.noise[0]], **options)
            if len(cell.noise) == 2 and self.zoneout_h != self.zoneout_c:
                noise[1] = self.zoneout_c
            return noise
        scale = 1 / (1 - self.dropout) if self.dropout < 1 else 1.0  # as by dropout
        masks = []
        by_step = [kind for kind in cell.noise if kind != "r"]
        if by_step:
            values = [scale if kind == "g" else 1.0 for kind in by_step]
            masks.append(_masks([ones[kind] for kind in by_step], values, shape, options))
        if "r" in cell.noise:
            kept = _masks([1 - self.dropout], [scale], (form.B, width), options)[0]
            masks.append((_of_rows(kept, form) if len(shape) == 2 else kept).expand(1, *shape))
        noise = torch.cat(masks) if len(masks) > 1 else masks[0]
        return noise if once else form.enter_rows(noise)


def _masks(p: list[float], values: list[float], shape: Sequence[int], options: dict[str, Any]) -> Tensor:
    """[K, *shape]: values[k] with probability p[k], exact to 2^-16, otherwise 0.

    On a CPU drawing by torch's generator takes up to a fifth of a training step: there it only seeds our operator.
    """
    numbers = math.prod(shape)
    if options["device"].type == "cpu" and ops.cpu_unavailable is None:
        seed = torch.randint(2**63 - 1, (1,))
        return ops.cpu_masks(seed, numbers, p, values, options["dtype"] == torch.float64).view(len(p), *shape)
    bits = torch.randint(2**16, (len(p), *shape), dtype=torch.int32, device=options["device"])
    kinds = zip(bits, p, values, strict=True)
    return torch.stack([(b < round(one * 2**16)).to(options["dtype"]).mul_(value) for b, one, value in kinds])


def _of_rows(masks: Tensor, form: Form) -> Tensor:
    """Expands the masks of sequences [B, W] to the rows of a PackedSequence, [N, W]."""
    assert form.batch_sizes is not None
    return torch.cat([masks[:size] for size in form.batch_sizes.tolist()])


def noise_of(zoneout: Any, recurrent_dropout: Any, mode: Any, projected: bool) -> Noise | None:
    """The noise of an LSTM with these options; None for none.

    Raises:
        TypeError, ValueError: an option has a wrong type or value, or zoneout is combined with a projection.
    """
    if isinstance(zoneout, (tuple, list)):
        if len(zoneout) != 2:
            raise ValueError(f"zoneout must be a probability, or two, of h and of c, got {len(zoneout)} of them")
        zoneout_h, zoneout_c = _probability("zoneout", zoneout[0]), _probability("zoneout", zoneout[1])
    else:
        zoneout_h = zoneout_c = _probability("zoneout", zoneout)
    dropout = _probability("recurrent_dropout", recurrent_dropout)
    if mode not in MODES:
        raise ValueError(f"recurrent_dropout_mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    if (zoneout_h or zoneout_c) and projected:
        raise ValueError("zoneout must be 0 with a projection (proj_size): h and c then have different units")
    return Noise(zoneout_h, zoneout_c, dropout, mode) if zoneout_h or zoneout_c or dropout else None


def _probability(name: str, value: Any) -> float:
    if type(value) is float and 0 <= value <= 1:
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be a probability in 0..1, got {value}")
    return float(value)
