"""Forward of one layer, both directions, over all time steps, in one launch.

    a = xg[t] + h_{t-1} @ w_hh^T      xg = x @ w_ih^T + b_ih + b_hh, by a GEMM before, or here (RESIDENT_IH > 0)
    m_t, c_t = step(a, c_{t-1})       cells/; c is the carry of the cell
    h_t = m_t @ w_hr^T                with a projection; without one h_t = m_t

A map of a is the sum of both products, one of them (INPUT, RECURRENT: fusedrnn/cells/spec.py), or padding that makes
the number of maps a power of 2. Columns of xg are in the order of the weights' rows. The bias b_hh of a map without
input is added here.

Grid: groups of PROGRAMS programs. A group computes one item after another; an item is a direction and BATCH batch rows,
and items are independent.

A program owns UNITS hidden units with all their maps and, with a projection, COLUMNS of its outputs. Its rows of w_hh,
w_hr and w_ih stay on the chip over all steps; in a streamed plan those of w_hh and w_hr are read at each step
(affine.py). c stays in float32 registers. H is limited to UNITS * PROGRAMS, so by the number of resident programs.

h_t is exchanged through y itself, in global memory: a step has a barrier of the group (grid.py), and a second one with
a projection, where m is exchanged first. If one program owns all units (CARRIED), h does not leave its registers, and
there is no barrier. Noise (noise.py) changes what h_t is, or what of it is exchanged.

Row b exists at step t if t < lengths[b]. The initial state is h0 at its first step, which is t = 0, or lengths[b] - 1
in the reverse direction; the state after its last step is hn.

Under Triton's interpreter, which runs one program after another, programs cannot wait for each other. There a launch
covers the steps from `begin` to `end` and one PHASE of them, and c goes from launch to launch in `carry`, and so does h
for zoneout.
"""

import triton
import triton.language as tl

from .affine import load_weights, multiply, round_to_tf32
from .grid import arrive, wait
from .noise import load_multipliers, load_parameters

# Phases of a step: both; up to the cell; the projection.
BOTH, CELL, PROJECTION = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def rows_of(o_map, first, o_unit, H, BLOCKS: tl.constexpr):
    """The row of the weights for each column, and a mask.

    Column n belongs to map o_map[n] and unit first + o_unit[n]; BLOCKS has the gate of each map, or None.
    """
    o_gate = o_map
    for k in tl.static_range(len(BLOCKS)):
        if BLOCKS[k] is not None and BLOCKS[k] != k:
            o_gate = tl.where(o_map == k, BLOCKS[k], o_gate)
    o_row = o_gate * H + first + o_unit
    m_row = first + o_unit < H
    for k in tl.static_range(len(BLOCKS)):
        if BLOCKS[k] is None:
            m_row = m_row & (o_map != k)
    return o_row, m_row


@triton.jit
def split_maps(acc, BATCH: tl.constexpr, UNITS: tl.constexpr, MAPS: tl.constexpr):
    """[BATCH, MAPS * UNITS], the maps of a unit side by side -> the maps, each [BATCH, UNITS]."""
    if MAPS == 1:
        return (acc,)
    else:
        even, odd = tl.split(tl.reshape(acc, (BATCH, UNITS, 2, 2)))
        map0, map2 = tl.split(even)
        map1, map3 = tl.split(odd)
        return map0, map1, map2, map3


@triton.jit(do_not_specialize=["T", "B", "begin", "end"])
def layer_forward(
    x,  # [T, B, I], read if RESIDENT_IH; so the next four
    w_ih0,  # [G*H, I] of the one direction and of the other
    w_ih1,
    b_ih0,  # [G*H], or None
    b_ih1,
    b_hh0,  # the same; read as well where a map has no input
    b_hh1,
    xg,  # [D, T, B, G*H], read unless RESIDENT_IH; may be the memory of saved where S = G
    w_hh0,  # [G*H, P]
    w_hh1,
    w_hr0,  # [P, H], or None
    w_hr1,
    w_p0,  # [K*H], the parameters of the units of a cell that has K of them, or None
    w_p1,
    v_h,  # the multipliers of zoneout of h, [T, B, D*H], or with ONCE [1, B, D*H]; None without
    v_c,  # the same of zoneout of c
    v_g,  # of dropout of the candidate
    v_r,  # of dropout of the state, P in place of H
    h0,  # [D, B, P], or None for zeros
    fed0,  # [D, B, P], h0 as its product is given it, where there are v_r, h0 and exchange; or None
    c0,  # [D, B, H], or None for zeros; of a cell whose carry is h it is h0
    lengths,  # [B] int64, or None
    reset,  # [T, B] bool, or None
    y,  # [T, B, D*P], written
    hn,  # [D, B, P], written
    cn,  # [D, B, H], written, or None
    c,  # [T, B, D*H], written, or None
    saved,  # [D, T, B, S*H], written, or None
    m,  # [D, B, H], scratch of the projection, or None
    fed,  # [T, B, D*P], scratch, y as the products are given it, where there are v_r and exchange; or None
    carry,  # [2, D, B, H] float32, or None where one launch covers all steps
    counters,  # [groups, 32] int32, zeros; or None without GRID_SYNC
    T,
    B,
    I,
    H,
    P,
    begin,
    end,
    STEP: tl.constexpr,
    INPUT: tl.constexpr,
    RECURRENT: tl.constexpr,
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
    RESIDENT_IH: tl.constexpr,
    PROGRAMS: tl.constexpr,
    CARRIED: tl.constexpr,
    PHASE: tl.constexpr,
    GRID_SYNC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    MAPS: tl.constexpr = len(INPUT)
    N: tl.constexpr = MAPS * UNITS
    dtype: tl.constexpr = y.dtype.element_ty
    group = tl.program_id(0) // PROGRAMS
    member = tl.program_id(0) % PROGRAMS
    counter = counters
    if GRID_SYNC:
        counter += group * 32
    arrivals = 0  # of the whole group: the target of the barrier

    o_u = member * UNITS + tl.arange(0, UNITS)
    m_u = o_u < H
    # The columns of the products: unit after unit, its maps side by side, so that `split_maps` finds them.
    o_n = tl.arange(0, N)
    o_ih, m_ih = rows_of(o_n % MAPS, member * UNITS, o_n // MAPS, H, INPUT)
    o_hh, m_hh = rows_of(o_n % MAPS, member * UNITS, o_n // MAPS, H, RECURRENT)
    o_p = member * COLUMNS + tl.arange(0, COLUMNS if COLUMNS else 1)
    m_p = o_p < P
    o_b = tl.arange(0, BATCH)
    zero = tl.zeros((BATCH,), tl.int64)  # makes of a step one for each row: masks are compared row by row
    o_xg = o_b[:, None] * (GATES * H) + o_u[None, :]
    o_saved = o_b[:, None] * (SAVED * H) + o_u[None, :]
    o_c = o_b[:, None] * (D * H) + o_u[None, :]  # of c; o_y: of y
    if COLUMNS:
        o_y = o_b[:, None] * (D * P) + o_p[None, :]
    else:
        o_y = o_c

    # num_stages=1: a loop over what is exchanged must not be pipelined, which would read states before they are there.
    for item in tl.range(group, D * tl.cdiv(B, BATCH), tl.num_programs(0) // PROGRAMS, num_stages=1):
        d = item % D
        w_ih = w_ih0
        w_hh = w_hh0
        w_hr = w_hr0
        b_ih = b_ih0
        b_hh = b_hh0
        if D == 2:
            w_hh = tl.where(d == 0, w_hh0, w_hh1)
            if COLUMNS:
                w_hr = tl.where(d == 0, w_hr0, w_hr1)
            if RESIDENT_IH:
                w_ih = tl.where(d == 0, w_ih0, w_ih1)
            if b_ih0 is not None:
                b_ih = tl.where(d == 0, b_ih0, b_ih1)
            if b_hh0 is not None:
                b_hh = tl.where(d == 0, b_hh0, b_hh1)
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
                    w_hh, (k * H + o_u).to(tl.int64) * P, m_u, 1, P, 1, CHUNK, 1, PRECISION
                )
        else:
            resident_hh = load_weights(w_hh, o_hh.to(tl.int64) * P, m_hh, 1, P, RESIDENT, CHUNK, SPLIT, PRECISION)
        resident_ih = load_weights(w_ih, o_ih.to(tl.int64) * I, m_ih, 1, I, RESIDENT_IH, CHUNK, SPLIT, PRECISION)
        resident_hr = load_weights(w_hr, o_p.to(tl.int64) * H, m_p, 1, H, RESIDENT_HR, CHUNK, SPLIT, PRECISION)
        bias = tl.zeros((N,), tl.float32)
        if RESIDENT_IH and b_ih0 is not None:
            bias = tl.load(b_ih + o_ih, mask=m_ih, other=0.0).to(tl.float32)
            bias += tl.load(b_hh + o_hh, mask=m_hh, other=0.0).to(tl.float32)
        biases = ()  # of each map: b_hh, where it is not in xg
        for k in tl.static_range(MAPS):
            if RESIDENT_IH or INPUT[k] is not None:
                biases = biases + (0,)  # not used
            elif b_hh0 is None or RECURRENT[k] is None:
                biases = biases + (tl.zeros((BATCH, UNITS), tl.float32),)
            else:
                b_bias = tl.load(b_hh + RECURRENT[k] * H + o_u, mask=m_u, other=0.0).to(tl.float32)
                biases = biases + (tl.broadcast_to(b_bias[None, :], (BATCH, UNITS)),)

        # 64-bit: where the item's rows begin in [B, ...] and in [D, B, ...]; what is added to that is small.
        b0 = tl.cast(item // D, tl.int64) * BATCH
        row0 = d * B + b0
        m_b = b0 + o_b < B
        if lengths is not None:
            length = tl.minimum(tl.maximum(tl.load(lengths + b0 + o_b, mask=m_b, other=0), 0), T).to(tl.int32)
        else:
            length = T
        m_c = m_b[:, None] & m_u[None, :]
        p_c = row0 * H + o_b[:, None] * H + o_u[None, :]  # the tile's place in [D, B, H]; p_h: in [D, B, P]
        if COLUMNS:
            m_h = m_b[:, None] & m_p[None, :]
            p_h = row0 * P + o_b[:, None] * P + o_p[None, :]
        else:
            m_h = m_c
            p_h = p_c

        b_c = tl.zeros((BATCH, UNITS), tl.float32)
        if c0 is not None:
            b_c = tl.load(c0 + p_c, mask=m_c, other=0.0).to(tl.float32)
        b_h = tl.zeros((BATCH, UNITS), dtype)  # used if CARRIED, or with zoneout
        if (CARRIED or v_h is not None) and h0 is not None:
            b_h = tl.load(h0 + p_h, mask=m_h, other=0.0)
        if lengths is not None:  # sequences without a step
            ended = (length + begin == 0)[:, None]
            if cn is not None:
                tl.store(cn + p_c, b_c, mask=m_c & ended)
            if h0 is not None:
                tl.store(hn + p_h, tl.load(h0 + p_h, mask=m_h & ended, other=0.0), mask=m_h & ended)
            else:
                tl.store(hn + p_h, tl.zeros_like(p_h).to(dtype), mask=m_h & ended)
        if carry is not None and CARRY is not None and begin > 0:
            b_c = tl.load(carry + p_c, mask=m_c, other=0.0)
            if v_h is not None:
                b_h = tl.load(carry + D * B * H + p_c, mask=m_c, other=0.0).to(dtype)

        for s in tl.range(begin, end, num_stages=1):
            if D == 1:
                t = tl.cast(s, tl.int64)
                before = t - 1
                first = 0
                last = length - 1
            else:
                t = tl.cast(tl.where(d == 0, s, T - 1 - s), tl.int64)
                before = tl.where(d == 0, t - 1, t + 1)
                first = tl.where(d == 0, 0, length - 1)
                last = tl.where(d == 0, length - 1, 0)
            exists = m_b & (zero + t < length)
            leaves = (exists & (zero + t == last))[:, None]
            enters = exists
            if reset is not None:
                enters = exists & (tl.load(reset + t * B + b0 + o_b, mask=exists, other=1) == 0)

            m_tile = exists[:, None] & m_u[None, :]
            b_v_c = None
            b_v_g = None
            if v_h is not None:
                b_v_h = load_multipliers(v_h, t, b0, B, d, H, o_c, m_tile, D, ONCE)
            if v_c is not None:
                b_v_c = load_multipliers(v_c, t, b0, B, d, H, o_c, m_tile, D, ONCE)
            if v_g is not None:
                b_v_g = load_multipliers(v_g, t, b0, B, d, H, o_c, m_tile, D, ONCE)
            if v_r is not None:
                if CARRIED:
                    b_v_r = load_multipliers(v_r, t, b0, B, d, P, o_y, m_tile, D, ONCE)
                else:  # of the step that takes the state
                    next = t + t - before
                    m_next = m_h & ((zero + next >= 0) & (zero + next < T))[:, None]
                    b_v_r = load_multipliers(v_r, next, b0, B, d, P, o_y, m_next, D, ONCE)

            if PHASE != PROJECTION:
                if RESIDENT_IH:
                    acc = multiply(
                        x + (t * B + b0) * I + o_b * I, exists, None, None, I, resident_ih, w_ih, o_ih, m_ih, 1,
                        BATCH, N, RESIDENT_IH, False, CHUNK, SPLIT, AHEAD, PRECISION,
                    )  # fmt: skip
                    for k in tl.static_range(MAPS):
                        if INPUT[k] is None:  # 0 * inf is NaN
                            acc = tl.where((o_n % MAPS != k)[None, :], acc, 0.0)
                    a = split_maps(acc + bias[None, :], BATCH, UNITS, MAPS)
                else:
                    a = ()
                    p_xg = ((d * T + t) * B + b0) * (GATES * H) + o_xg
                    for k in tl.static_range(MAPS):
                        if INPUT[k] is None:
                            a = a + (biases[k],)
                        else:
                            a = a + (tl.load(xg + p_xg + INPUT[k] * H, mask=m_tile, other=0.0).to(tl.float32),)

                if CARRIED:
                    h_in = tl.where(enters[:, None], b_h, 0.0).to(dtype)
                    if v_r is not None:
                        h_in = (h_in.to(tl.float32) * b_v_r).to(dtype)
                    h_in = round_to_tf32(h_in, PRECISION)
                    with_h = ()
                    for k in tl.static_range(MAPS):
                        if RECURRENT[k] is None:
                            with_h = with_h + (a[k],)
                        else:
                            with_h = with_h + (
                                tl.dot(h_in, resident_hh[RECURRENT[k]], a[k], input_precision=PRECISION),
                            )
                else:
                    wait(counter, arrivals, GRID_SYNC)
                    exchanged = y
                    exchanged0 = h0
                    if v_r is not None:
                        exchanged = fed
                        exchanged0 = fed0
                    p_before = exchanged + ((before * B + b0) * D + d) * P
                    p_rows = p_before + o_b * (D * P)
                    m_rows = enters
                    p_others = None
                    m_others = None
                    if h0 is None:
                        m_rows = enters & (zero + t != first)
                    elif lengths is None:  # all rows begin at the same step
                        p_rows = tl.where(t == first, exchanged0 + row0 * P, p_before)
                        p_rows += o_b * tl.where(t == first, P, D * P)
                    else:
                        p_others = exchanged0 + row0 * P + o_b * P
                        m_others = zero + t == first
                    acc = multiply(
                        p_rows, m_rows, p_others, m_others, P, resident_hh, w_hh, o_hh.to(tl.int64) * P, m_hh, 1,
                        BATCH, N, RESIDENT, STREAMED, CHUNK, SPLIT, AHEAD, PRECISION,
                    )  # fmt: skip
                    of_h = split_maps(acc, BATCH, UNITS, MAPS)
                    with_h = ()
                    for k in tl.static_range(MAPS):
                        if RECURRENT[k] is None:
                            with_h = with_h + (a[k],)
                        else:
                            with_h = with_h + (a[k] + of_h[k],)

                c_in = b_c
                if CARRY is not None:
                    c_in = tl.where(enters[:, None], b_c, 0.0)
                if OPERANDS:
                    b_m, c_out, b_saved = STEP(with_h, c_in, b_p, b_v_c, b_v_g)
                else:
                    b_m, c_out, b_saved = STEP(with_h, c_in)
                if CARRY is not None:
                    b_c = tl.where(exists[:, None], c_out, b_c)
                if v_h is not None:
                    b_m = b_v_h * tl.where(enters[:, None], b_h, 0.0).to(tl.float32) + (1.0 - b_v_h) * b_m
                # Units that do not exist stay out of the next product, whose zero weights would not: 0 * inf is NaN.
                b_m = tl.where(m_tile, b_m, 0.0).to(dtype)
                if COLUMNS:
                    tl.store(m + p_c, b_m, mask=m_c)
                else:
                    b_h = tl.where(exists[:, None], b_m, b_h)
                    tl.store(y + ((t * B + b0) * D + d) * P + o_y, b_m, mask=m_c)
                    if v_r is not None and not CARRIED:
                        b_fed = (b_m.to(tl.float32) * b_v_r).to(dtype)
                        tl.store(fed + ((t * B + b0) * D + d) * P + o_y, b_fed, mask=m_c)
                if not CARRIED:
                    arrive(counter, GRID_SYNC)
                    arrivals += PROGRAMS
                # From here on, stores that no other program reads during the launch.
                if not COLUMNS:
                    tl.store(hn + p_h, b_m, mask=m_h & leaves)
                if cn is not None:
                    tl.store(cn + p_c, c_out, mask=m_c & leaves)
                if c is not None:
                    p_t = ((t * B + b0) * D + d) * H + o_c
                    tl.store(c + p_t, tl.where(exists[:, None], c_out, 0.0), mask=m_c)
                if saved is not None:
                    p_saved = ((d * T + t) * B + b0) * (SAVED * H) + o_saved
                    for k in tl.static_range(SAVED):
                        tl.store(saved + p_saved + k * H, tl.where(exists[:, None], b_saved[k], 0.0), mask=m_c)

            if COLUMNS and PHASE != CELL:
                wait(counter, arrivals, GRID_SYNC)
                acc = multiply(
                    m + row0 * H + o_b * H, exists, None, None, H, resident_hr, w_hr, o_p.to(tl.int64) * H, m_p, 1,
                    BATCH, COLUMNS, RESIDENT_HR, STREAMED, CHUNK, SPLIT, AHEAD, PRECISION,
                )  # fmt: skip
                tl.store(y + ((t * B + b0) * D + d) * P + o_y, acc, mask=m_h)
                if v_r is not None:
                    b_fed = (acc.to(dtype).to(tl.float32) * b_v_r).to(dtype)
                    tl.store(fed + ((t * B + b0) * D + d) * P + o_y, b_fed, mask=m_h)
                arrive(counter, GRID_SYNC)
                arrivals += PROGRAMS
                tl.store(hn + p_h, acc, mask=m_h & leaves)

        if carry is not None and CARRY is not None and PHASE != PROJECTION:
            tl.store(carry + p_c, b_c, mask=m_c)
            if v_h is not None:
                tl.store(carry + D * B * H + p_c, b_h.to(tl.float32), mask=m_c)
