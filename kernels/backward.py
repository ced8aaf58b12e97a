"""Backward of one layer, both directions, over all time steps, in one launch: the gradients of the gates' affine maps.

    dh_t = dy[t] + da_n @ w_hh        n is the step after t in the order of the forward; dhn instead at the last step
    dm_t = dh_t @ w_hr                with a projection; without one dm_t = dh_t
    da_t, dc = step_backward(...)     cells/; c is the carry of the cell

Maps that have a product with h lie side by side, from FIRST on, one for each gate, in the order of the rows of w_hh.
Gradients of x and of the weights are GEMMs over da after the launch; those of the units' parameters are summed over
time in here.

With noise (noise.py), v_h of dh_t goes past the cell to dh_{t-1}, and the product comes multiplied by v_r.

Grid, ownership and barriers are those of forward.py: a program owns UNITS hidden units, here columns of w_hh, and with
a projection COLUMNS of its outputs. da_t is exchanged through the result da, in global memory; with a projection dh_t
is exchanged as well, through dh_out, which the gradient of w_hr needs. dc stays in float32 registers. If one program
owns all units (CARRIED), da_t stays in registers, and there is no barrier. If the carry is h, the gradient of the
initial carry is added to dh0.

Steps run in reverse order. The gradient of the state entering a step is computed in the next iteration; that of the
initial state, dh0, in one extra iteration.

`begin`, `end`, PHASE and `carry`: see forward.py.
"""

import triton
import triton.language as tl

from .affine import load_weights, multiply, round_to_tf32
from .grid import arrive, wait
from .noise import load_multipliers, load_parameters

# Phases of a step: both; the gradient of h; the cell.
BOTH, STATE, CELL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit(do_not_specialize=["T", "B", "begin", "end"])
def layer_backward(
    dy,  # [T, B, D*P], or None for zeros
    dhn,  # [D, B, P], or None for zeros
    dcn,  # [D, B, H], or None for zeros; so dc and dc0: only of a carry that is no other state
    dc,  # [T, B, D*H], or None for zeros
    w_hh0,  # [G*H, P] of the one direction and of the other
    w_hh1,
    w_hr0,  # [P, H], or None
    w_hr1,
    w_p0,  # [K*H], the parameters of the units of a cell that has K of them, or None
    w_p1,
    v_h,  # multipliers of noise, as in forward.py
    v_c,
    v_g,
    v_r,
    c0,  # [D, B, H], or None for zeros; of a cell whose carry is h it is h0
    lengths,  # [B] int64, or None
    reset,  # [T, B] bool, or None
    c,  # [T, B, D*H]; of a cell whose carry is h it is y; None without a carry
    saved,  # [D, T, B, S*H]
    da,  # [D, T, B, M*H], written
    dh_out,  # [D, T, B, P], written, with a projection; or None
    dh0,  # [D, B, P], written, or None
    dc0,  # [D, B, H], written, or None
    dp,  # [D, B, K*H] float32, written, the gradients of the parameters of each sequence; or None
    carry,  # [2, D, B, H] float32, or None where one launch covers all steps
    counters,  # [groups, 32] int32, zeros; or None without GRID_SYNC
    T,
    B,
    H,
    P,
    begin,
    end,  # T, or T + 1 where dh0 is wanted
    STEP: tl.constexpr,
    MAPS: tl.constexpr,
    FIRST: tl.constexpr,
    GATES: tl.constexpr,
    SAVED: tl.constexpr,
    CARRY: tl.constexpr,
    PARAMETERS: tl.constexpr,
    OPERANDS: tl.constexpr,
    ONCE: tl.constexpr,
    D: tl.constexpr,
    BATCH: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
    AHEAD: tl.constexpr,
    RESIDENT: tl.constexpr,
    STREAMED: tl.constexpr,
    RESIDENT_HR: tl.constexpr,
    PROGRAMS: tl.constexpr,
    CARRIED: tl.constexpr,
    PHASE: tl.constexpr,
    GRID_SYNC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = da.dtype.element_ty
    # This program's tile of dh: outputs of the projection, or the units themselves.
    OUTPUTS: tl.constexpr = COLUMNS if COLUMNS else UNITS
    group = tl.program_id(0) // PROGRAMS
    member = tl.program_id(0) % PROGRAMS
    counter = counters
    if GRID_SYNC:
        counter += group * 32
    arrivals = 0

    o_u = member * UNITS + tl.arange(0, UNITS)
    m_u = o_u < H
    o_p = member * OUTPUTS + tl.arange(0, OUTPUTS)
    m_p = o_p < P
    o_b = tl.arange(0, BATCH)
    zero = tl.zeros((BATCH,), tl.int64)  # makes of a step one for each row: masks are compared row by row
    o_saved = o_b[:, None] * (SAVED * H) + o_u[None, :]
    o_da = o_b[:, None] * (MAPS * H) + o_u[None, :]
    o_c = o_b[:, None] * (D * H) + o_u[None, :]  # of c; o_y: of y; o_out: of dh_out
    o_y = o_b[:, None] * (D * P) + o_p[None, :]
    o_out = o_b[:, None] * P + o_p[None, :]

    # num_stages=1: a loop over what is exchanged must not be pipelined, which would read it before it is there.
    for item in tl.range(group, D * tl.cdiv(B, BATCH), tl.num_programs(0) // PROGRAMS, num_stages=1):
        d = item % D
        w_hh = w_hh0
        w_hr = w_hr0
        if D == 2:
            w_hh = tl.where(d == 0, w_hh0, w_hh1)
            if COLUMNS:
                w_hr = tl.where(d == 0, w_hr0, w_hr1)
        w_p = w_p0
        if D == 2 and PARAMETERS:
            w_p = tl.where(d == 0, w_p0, w_p1)
        b_p = None
        if PARAMETERS:
            b_p = load_parameters(w_p, o_u, m_u, H, PARAMETERS)

        if CARRIED:
            resident_hh = ()
            for k in tl.static_range(GATES):
                resident_hh = resident_hh + load_weights(
                    w_hh + tl.cast(k * H, tl.int64) * P, o_p.to(tl.int64), m_p, P, H, 1, CHUNK, 1, PRECISION
                )
        else:
            resident_hh = load_weights(w_hh, o_p.to(tl.int64), m_p, P, GATES * H, RESIDENT, CHUNK, SPLIT, PRECISION)
        resident_hr = load_weights(w_hr, o_u.to(tl.int64), m_u, H, P, RESIDENT_HR, CHUNK, SPLIT, PRECISION)

        # 64-bit: where the item's rows begin in [B, ...] and in [D, B, ...]; what is added to that is small.
        b0 = tl.cast(item // D, tl.int64) * BATCH
        row0 = d * B + b0
        m_b = b0 + o_b < B
        if lengths is not None:
            length = tl.minimum(tl.maximum(tl.load(lengths + b0 + o_b, mask=m_b, other=0), 0), T).to(tl.int32)
        else:
            length = T
        m_c = m_b[:, None] & m_u[None, :]
        m_h = m_b[:, None] & m_p[None, :]
        p_c = row0 * H + o_b[:, None] * H + o_u[None, :]  # the tile's place in [D, B, H]; p_h: in [D, B, P]
        p_h = row0 * P + o_b[:, None] * P + o_p[None, :]

        b_dhn = tl.zeros((BATCH, OUTPUTS), tl.float32)
        if dhn is not None:
            b_dhn = tl.load(dhn + p_h, mask=m_h, other=0.0).to(tl.float32)
        b_dc = tl.zeros((BATCH, UNITS), tl.float32)  # of the state that leaves the step; so b_dh, used if CARRIED
        if dcn is not None:
            b_dc = tl.load(dcn + p_c, mask=m_c, other=0.0).to(tl.float32)
        b_dh = b_dhn
        if lengths is not None and dh0 is not None:  # sequences without a step
            tl.store(dh0 + p_h, b_dhn, mask=m_h & (length == 0)[:, None])
        b_kept = tl.zeros((BATCH, UNITS), tl.float32)  # of dh, what zoneout lets past the cell
        b_dp = ()
        for _k in tl.static_range(PARAMETERS):
            b_dp = b_dp + (tl.zeros((BATCH, UNITS), tl.float32),)
        o_dp = (row0 + o_b)[:, None] * (PARAMETERS * H) + o_u[None, :]
        if carry is not None and CARRY is not None and begin > 0:
            b_dc = tl.load(carry + p_c, mask=m_c, other=0.0)
            if v_h is not None:
                b_kept = tl.load(carry + D * B * H + p_c, mask=m_c, other=0.0)

        for s in tl.range(begin, end, num_stages=1):
            if D == 1:
                t = T - 1 - tl.cast(s, tl.int64)
                after = t + 1  # the step after t in the forward's order
                last = length - 1
                first = 0
            else:
                t = tl.cast(tl.where(d == 0, T - 1 - s, s), tl.int64)
                after = tl.where(d == 0, t + 1, t - 1)
                last = tl.where(d == 0, length - 1, 0)
                first = tl.where(d == 0, 0, length - 1)
            before = t + t - after
            in_time = m_b & (zero + t >= 0) & (zero + t < T)
            exists = in_time & (zero + t < length)
            not_reset = exists
            finds = m_b & (zero + after == first) & (zero + length > 0)  # the row's dh0
            passes = (exists & (zero + t != last)) | finds  # its gradient comes from step `after`
            if reset is not None:
                not_reset = exists & (tl.load(reset + t * B + b0 + o_b, mask=exists, other=1) == 0)
                passes = passes & (tl.load(reset + after * B + b0 + o_b, mask=passes, other=1) == 0)
            m_tile = exists[:, None] & m_u[None, :]
            p_da = ((d * T + t) * B + b0) * (MAPS * H) + o_da

            b_v_c = None
            b_v_g = None
            if v_h is not None:
                b_v_h = load_multipliers(v_h, t, b0, B, d, H, o_c, m_tile, D, ONCE)
            if v_c is not None:
                b_v_c = load_multipliers(v_c, t, b0, B, d, H, o_c, m_tile, D, ONCE)
            if v_g is not None:
                b_v_g = load_multipliers(v_g, t, b0, B, d, H, o_c, m_tile, D, ONCE)
            if v_r is not None:  # of the product that comes next
                if CARRIED:
                    b_v_r = load_multipliers(v_r, t, b0, B, d, P, o_y, m_tile, D, ONCE)
                else:
                    m_after = passes[:, None] & m_p[None, :]
                    b_v_r = load_multipliers(v_r, after, b0, B, d, P, o_y, m_after, D, ONCE)
            if PHASE != STATE:  # loads that do not depend on the exchange come first
                b_saved = ()
                p_saved = ((d * T + t) * B + b0) * (SAVED * H) + o_saved
                for k in tl.static_range(SAVED):
                    b_saved = b_saved + (tl.load(saved + p_saved + k * H, mask=m_tile, other=0.0).to(tl.float32),)
                b_c = b_dc  # zeros, if there is no carry
                c_in = b_dc
                dc_t = b_dc
                if CARRY is not None:
                    p_t = ((t * B + b0) * D + d) * H + o_c
                    b_c = tl.load(c + p_t, mask=m_tile, other=0.0).to(tl.float32)
                    p_before = ((before * B + b0) * D + d) * H + o_c
                    m_before = (not_reset & (zero + t != first))[:, None] & m_u[None, :]
                    c_in = tl.load(c + p_before, mask=m_before, other=0.0).to(tl.float32)
                    if c0 is not None:
                        m_first = (not_reset & (zero + t == first))[:, None] & m_u[None, :]
                        c_in += tl.load(c0 + p_c, mask=m_first, other=0.0).to(tl.float32)
                    if dc is not None:
                        dc_t += tl.load(dc + p_t, mask=m_tile, other=0.0).to(tl.float32)

            if PHASE != CELL:
                if dy is not None:
                    p_y = ((t * B + b0) * D + d) * P + o_y
                    b_dy = tl.load(dy + p_y, mask=exists[:, None] & m_p[None, :], other=0.0).to(tl.float32)
                if CARRIED:
                    b_dm = b_dh
                else:
                    wait(counter, arrivals, GRID_SYNC)
                    b_dm = multiply(
                        da + ((d * T + after) * B + b0) * (MAPS * H) + FIRST * H + o_b * (MAPS * H), passes, None, None,
                        GATES * H, resident_hh, w_hh, o_p.to(tl.int64), m_p, P,
                        BATCH, OUTPUTS, RESIDENT, STREAMED, CHUNK, SPLIT, AHEAD, PRECISION,
                    )  # fmt: skip
                    if v_r is not None:
                        b_dm *= b_v_r
                    if v_h is not None:
                        b_dm += tl.where(passes[:, None], b_kept, 0.0)
                    if dh0 is not None:
                        b_dh0 = b_dm
                        if CARRY == "hidden":
                            b_dh0 += b_dc
                        tl.store(dh0 + p_h, b_dh0, mask=m_h & finds[:, None])
                    b_dm += tl.where((exists & (zero + t == last))[:, None], b_dhn, 0.0)
                if dy is not None:
                    b_dm += b_dy
                if v_h is not None:
                    b_kept = b_v_h * b_dm
                    b_dm -= b_kept
                if COLUMNS:
                    p_out = ((d * T + t) * B + b0) * P + o_out
                    tl.store(dh_out + p_out, tl.where(exists[:, None], b_dm, 0.0), mask=m_h & in_time[:, None])
                    arrive(counter, GRID_SYNC)
                    arrivals += PROGRAMS

            if PHASE != STATE:
                if COLUMNS:
                    wait(counter, arrivals, GRID_SYNC)
                    b_dm = multiply(
                        dh_out + ((d * T + t) * B + b0) * P + o_b * P, exists, None, None, P,
                        resident_hr, w_hr, o_u.to(tl.int64), m_u, H,
                        BATCH, UNITS, RESIDENT_HR, STREAMED, CHUNK, SPLIT, AHEAD, PRECISION,
                    )  # fmt: skip
                if PARAMETERS:
                    da_exact, dc_in, dp_exact = STEP(b_saved, c_in, b_c, b_dm, dc_t, b_p, b_v_c, b_v_g)
                    if dp is not None:
                        sums = ()
                        for k in tl.static_range(PARAMETERS):
                            sums = sums + (b_dp[k] + tl.where(m_tile, dp_exact[k], 0.0),)
                        b_dp = sums
                elif OPERANDS:
                    da_exact, dc_in = STEP(b_saved, c_in, b_c, b_dm, dc_t, b_p, b_v_c, b_v_g)
                else:
                    da_exact, dc_in = STEP(b_saved, c_in, b_c, b_dm, dc_t)
                b_da = ()
                # Also of units that do not exist: times their zero weights, values that are not finite would be NaN.
                for k in tl.static_range(MAPS):
                    b_da = b_da + (tl.where(m_tile, da_exact[k], 0.0).to(dtype),)
                m_store = in_time[:, None] & m_u[None, :]
                for k in tl.static_range(MAPS):
                    tl.store(da + p_da + k * H, b_da[k], mask=m_store)
                if CARRIED:
                    dh_in = tl.zeros((BATCH, UNITS), tl.float32)
                    for k in tl.static_range(GATES):
                        operand = round_to_tf32(b_da[FIRST + k], PRECISION)
                        dh_in = tl.dot(operand, resident_hh[k], dh_in, input_precision=PRECISION)
                    if v_r is not None:
                        dh_in *= b_v_r
                    if v_h is not None:
                        dh_in += b_kept
                    b_dh = tl.where(exists[:, None], tl.where(not_reset[:, None], dh_in, 0.0), b_dh)
                else:
                    arrive(counter, GRID_SYNC)
                    arrivals += PROGRAMS
                if CARRY is not None:
                    b_dc = tl.where(exists[:, None], tl.where(not_reset[:, None], dc_in, 0.0), b_dc)

        if CARRIED and dh0 is not None:
            if CARRY == "hidden":
                b_dh += b_dc
            tl.store(dh0 + p_h, b_dh, mask=m_h)
        if PHASE != STATE:
            if dc0 is not None:
                tl.store(dc0 + p_c, b_dc, mask=m_c)
            if dp is not None:
                for k in tl.static_range(PARAMETERS):
                    b_sum = b_dp[k]
                    if carry is not None and begin > 0:
                        b_sum += tl.load(dp + o_dp + k * H, mask=m_c, other=0.0)
                    tl.store(dp + o_dp + k * H, b_sum, mask=m_c)
            if carry is not None and CARRY is not None:
                tl.store(carry + p_c, b_dc, mask=m_c)
                if v_h is not None:
                    tl.store(carry + D * B * H + p_c, b_kept, mask=m_c)
