"""Operands of a unit beside its maps: its parameters, and the multipliers of noise (fusedrnn/cells/spec.py).

Multipliers are [T, B, D*W] in float32, or with ONCE [1, B, D*W], the same at all steps; W is H, or P where they are
about the hidden state of a projection. Nobody waits for them: they are on their way before the states are.

Zoneout of h keeps some of the state that entered, which the program that owns the unit has in registers. Dropout of the
state multiplies what enters the product: whoever computes h_t writes v_r h_t beside it, for all that multiply it.
"""

import triton
import triton.language as tl


@triton.jit
def load_parameters(w, o_u, m_u, H, COUNT: tl.constexpr):
    """COUNT parameters of each unit, w [COUNT * H], as a tuple of rows [1, UNITS] in float32."""
    rows = ()
    for k in tl.static_range(COUNT):
        rows = rows + (tl.load(w + k * H + o_u, mask=m_u, other=0.0).to(tl.float32)[None, :],)
    return rows


@triton.jit
def load_multipliers(v, t, b0, B, d, W, offsets, mask, D: tl.constexpr, ONCE: tl.constexpr):
    """The multipliers of step t, rows from b0 on, and one direction; offsets are those of a tile in [B, D*W]."""
    row = b0
    if not ONCE:
        row = t * B + b0
    return tl.load(v + (row * D + d) * W + offsets, mask=mask, other=0.0)
