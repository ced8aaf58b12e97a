"""torch.func.vmap over a layer: all elements run as one batch, with separate weight gradients for each element.

A merged batch has B*V rows, with the V elements of vmap innermost, so that packed rows stay sorted by length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .cells import CELLS, Cell, named
from .layout import DirectionWeights, split_directions

_ROWS = {"dy", "dc", "x", "y", "c"}  # [T, B, ...], or packed [N, ...]


def _batch_dim(name: str, x: Tensor) -> int:
    """The batch dimension of the tensor of this name: rows, reset, states [D, B, ...], or lengths [B]."""
    return 0 if name == "lengths" or (name in _ROWS and x.dim() == 2) else 1


def merged(
    names: Sequence[str], tensors: Sequence[Tensor | None], in_dims: Sequence[int | None], V: int
) -> dict[str, Tensor | None]:
    """Merges the vmap dimension of each tensor, at its in_dim or expanded, into its batch dimension."""
    found = dict(zip(names, zip(tensors, in_dims, strict=False), strict=False))
    x, dim = found["x"]
    assert x is not None
    one = x if dim is None else x.select(dim, 0)
    batch = {name: _batch_dim(name, one) for name in names}
    noise, dim = found.get("noise", (None, None))
    if noise is not None:  # [K, T, B, D*H], or packed [K, N, D*H]
        batch["noise"] = noise.dim() - (2 if dim is None else 3)
    return {name: _merged(*found[name], batch[name], V) for name in names}


def _merged(tensor: Tensor | None, in_dim: int | None, batch: int, V: int) -> Tensor | None:
    if tensor is None:
        return None
    if in_dim is not None:
        return tensor.movedim(in_dim, batch + 1).flatten(batch, batch + 1)
    sizes = [*tensor.shape[: batch + 1], V, *tensor.shape[batch + 1 :]]
    return tensor.unsqueeze(batch + 1).expand(sizes).flatten(batch, batch + 1)


def split(
    names: Sequence[str], tensors: Sequence[Tensor], x: Tensor | None, V: int
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The inverse of `merged`: the tensors and their vmap dimensions."""
    assert x is not None
    dims = [_batch_dim(name, x) for name in names]
    each = tuple(t.unflatten(dim, (t.shape[dim] // V, V)) for t, dim in zip(tensors, dims, strict=True))
    return each, tuple(dim + 1 for dim in dims)


def elements(tensors: Sequence[Any], in_dims: Sequence[int | None], k: int) -> list[Any]:
    """Element k of vmap of each tensor."""
    return [t if dim is None else t.select(dim, k) for t, dim in zip(tensors, in_dims, strict=True)]


class MergedLayer:
    """The backward of a merged batch.

    Args:
        cell, bidirectional, weights: those of the layer.
        tensors: the arguments of backward, merged: x [T, B*V, I], or packed rows, and so on.
        V: number of elements of vmap.
    """

    def __init__(
        self,
        cell: str,
        bidirectional: bool,
        tensors: dict[str, Tensor | None],
        weights: Sequence[Tensor],
        V: int,
    ) -> None:
        self._cell, self._tensors, self._weights, self._V = named(cell), tensors, weights, V
        self._directions = split_directions(weights, bidirectional, self._cell)

    def has_weight_gradients(self) -> bool:
        """Whether `backward` supports per-element weight gradients: torch's cells, no packed rows, no projection."""
        return self._cell.name in CELLS and self._x.dim() == 3 and all(w.w_hr is None for w in self._directions)

    def backward(
        self, run: Callable[[list[bool], Tensor, Sequence[Tensor]], Sequence[Tensor]], needs: list[bool]
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        """The gradients of x, h0, c0 and each weight, with their vmap dimensions.

        run: (needs, x, weights) -> gradients, the backward of a layer.
        """
        if any(needs[3:]):
            inputs, weights = self._with_affine_map_outside()
            da, *states = run([True, *needs[1:3], *[False] * len(weights)], inputs, weights)[:3]
            dx, dweights = self._gradients(da)
        else:
            dx, *states = run(needs, self._x, self._weights)[:3]
            dweights = list(self._weights)
        results: list[tuple[Tensor, int | None]] = []
        for name, need, grad in zip(("x", "h0", "c0"), needs, (dx, *states), strict=False):
            (apart,), (dim,) = split((name,), (grad,), self._x, self._V) if need else ((dx.new_empty(0),), (None,))
            results.append((apart, dim))
        results += [
            (grad, 0) if need else (dx.new_empty(0), None) for need, grad in zip(needs[3:], dweights, strict=True)
        ]
        grads, dims = zip(*results, strict=True)
        return grads, dims

    @property
    def _x(self) -> Tensor:
        x = self._tensors["x"]
        assert x is not None
        return x

    def _with_affine_map_outside(self) -> tuple[Tensor, list[Tensor]]:
        """An equivalent layer with input x w_ih^T [T, B*V, D*G*H] and the identity as w_ih.

        The gradient of its input is da, the gradient of the affine maps.
        """
        inputs = torch.cat([self._x @ w.w_ih.T for w in self._directions], dim=-1)
        identity = torch.eye(inputs.shape[-1], dtype=inputs.dtype, device=inputs.device)
        blocks = identity.chunk(len(self._directions))
        weights = [w._replace(w_ih=block) for w, block in zip(self._directions, blocks, strict=True)]
        return inputs, [part for w in weights for part in w if part is not None]

    def _gradients(self, da: Tensor) -> tuple[Tensor, list[Tensor]]:
        """dx [T, B*V, I] and dw [V, ...] of each weight: products of da with x and with the states entering a step."""
        h0, reset, y = (self._tensors[name] for name in ("h0", "reset", "y"))
        assert y is not None
        exists = reference.existing(len(da), self._tensors["lengths"])
        x = reference.where_exists(self._x, exists)
        D = len(self._directions)
        dx, dweights = torch.zeros_like(x), list[Tensor]()
        for d, (of_input, y_d, w) in enumerate(zip(da.chunk(D, -1), y.chunk(D, -1), self._directions, strict=True)):
            first = y_d.new_zeros(y_d.shape[1:]) if h0 is None else h0[d]
            h_in = reference.entering(y_d, first, exists, reset, d == 1)
            of_state = _of_state(self._cell, of_input, x, h_in, w)
            dx = dx + of_input @ w.w_ih
            dweights += [self._products(of_input, x), self._products(of_state, h_in)]
            if w.b_ih is not None:
                dweights += [self._apart(rows).sum((0, 1)) for rows in (of_input, of_state)]
        return dx, dweights

    def _apart(self, rows: Tensor) -> Tensor:
        """[T, B*V, N] -> [T, B, V, N]"""
        return rows.unflatten(1, (rows.shape[1] // self._V, self._V))

    def _products(self, da: Tensor, rows: Tensor) -> Tensor:
        """[V, G*H, N]: for each element the sum over time and batch, by one batched GEMM."""
        return torch.einsum("tbvg,tbvn->vgn", self._apart(da), self._apart(rows))


def _of_state(cell: Cell, of_input: Tensor, x: Tensor, h_in: Tensor, w: DirectionWeights) -> Tensor:
    """Gradients of the affine maps of the state [.., G*H], from those of the input's maps.

    They are equal where the cell adds the two maps. In a GRU's candidate the state's map is multiplied by r first.
    """
    if cell.input == cell.recurrent:
        return of_input
    H = w.hidden_size
    r = x @ w.w_ih[:H].T + h_in @ w.w_hh[:H].T
    if w.b_ih is not None and w.b_hh is not None:
        r = r + w.b_ih[:H] + w.b_hh[:H]
    da_r, da_z, da_n = of_input.chunk(3, dim=-1)
    return torch.cat([da_r, da_z, da_n * r.sigmoid()], dim=-1)
