"""The product of the states with a program's columns of a weight, in float32.

    acc[b, n] = sum_k s[b, k] * w[k, n]        element (k, n) of the weight lies at w + o_n[n] + k * stride_k

K is split into chunks of CHUNK. RESIDENT chunks of the weight are loaded once, by `load_weights`, before the loop over
time, and stay on the chip: the compiler keeps them in shared memory. STREAMED chunks are loaded from L2 at every step,
overlapped with the arithmetic. The planner makes all chunks resident, or all streamed.

With few rows the columns cannot keep all warps busy: then each chunk is split into SPLIT parts of K, one for each warp,
which multiplies all columns, and the parts are reduced. With SPLIT = 1 the warps share the columns instead.
"""

import triton
import triton.language as tl


@triton.jit
def round_to_tf32(operand, PRECISION: tl.constexpr):
    """Rounds an operand of a TF32 product to 10 bits of mantissa, as cuDNN does; other operands are unchanged.

    The tensor cores would truncate: up to twice the error, and biased.
    """
    if PRECISION == "tf32" and operand.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [operand], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return operand


@triton.jit
def load_weights(
    w,
    o_n,
    m_n,
    stride_k,
    K,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The first CHUNKS chunks of a weight, a tuple of [CHUNK, N] tiles ([SPLIT, CHUNK // SPLIT, N] if split)."""
    chunks = ()
    for i in tl.static_range(CHUNKS):
        chunks = chunks + (_weights(w, o_n, m_n, stride_k, K, i * CHUNK, CHUNK, SPLIT, PRECISION),)
    return chunks


@triton.jit
def multiply(
    p_rows,
    m_rows,
    p_others,
    m_others,
    K,
    chunks,
    w,
    o_n,
    m_n,
    stride_k,
    BATCH: tl.constexpr,
    N: tl.constexpr,
    RESIDENT: tl.constexpr,
    STREAMED: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
    AHEAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BATCH, N] float32: the weight times the states whose rows begin at p_rows [BATCH], masked by m_rows.

    Rows with m_others begin at p_others instead; None: no such rows. AHEAD is the number of chunks of the states that
    are loaded before the first product. STREAMED: whether some chunks are not resident.
    """
    # Every chunk is at a constant offset from the first: one address register instead of one per chunk. The start of a
    # row is selected per element: after a selection per row, Triton 3.8 does not vectorise the load.
    if SPLIT == 1:
        acc = tl.zeros((BATCH, N), tl.float32)
        o_k = tl.arange(0, CHUNK)[None, :]
        p_states = p_rows[:, None] + o_k
        if m_others is not None:
            p_states = tl.where(m_others[:, None], p_others[:, None] + o_k, p_states)
        mask = m_rows[:, None]
    else:
        acc = tl.zeros((SPLIT, BATCH, N), tl.float32)
        o_k = _parts(CHUNK, SPLIT)[:, None, :]
        p_states = p_rows[None, :, None] + o_k
        if m_others is not None:
            p_states = tl.where(m_others[None, :, None], p_others[None, :, None] + o_k, p_states)
        mask = m_rows[None, :, None]
    states = ()
    for i in tl.static_range(RESIDENT + AHEAD):
        if i < RESIDENT:
            if i == RESIDENT - 1 and not STREAMED:
                states = states + (_states(p_states + i * CHUNK, mask & (o_k < K - i * CHUNK), PRECISION),)
            else:
                states = states + (_states(p_states + i * CHUNK, mask, PRECISION),)
        if i >= AHEAD:
            acc = tl.dot(states[i - AHEAD], chunks[i - AHEAD], acc, input_precision=PRECISION)
    if STREAMED:
        for k in tl.range(RESIDENT * CHUNK, K, CHUNK):
            b_s = _states(p_states + k, mask & (o_k < K - k), PRECISION)
            b_w = _weights(w, o_n, m_n, stride_k, K, k, CHUNK, SPLIT, PRECISION)
            acc = tl.dot(b_s, b_w, acc, input_precision=PRECISION)
    if SPLIT > 1:
        acc = tl.sum(acc, axis=0)
    return acc


@triton.jit
def _parts(CHUNK: tl.constexpr, SPLIT: tl.constexpr):
    """[SPLIT, CHUNK // SPLIT]: the elements of a chunk in each part."""
    # With one reshaped `arange`, Triton 3.6 and 3.7 do not recognise contiguous rows, and do not vectorise the load.
    return tl.arange(0, SPLIT)[:, None] * (CHUNK // SPLIT) + tl.arange(0, CHUNK // SPLIT)[None, :]


@triton.jit
def _states(p_states, mask, PRECISION: tl.constexpr):
    # Cache in L2 only: each is read once. The barrier (grid.py) makes the stores of other programs visible, not this.
    return round_to_tf32(tl.load(p_states, mask=mask, other=0.0, cache_modifier=".cg"), PRECISION)


@triton.jit
def _weights(w, o_n, m_n, stride_k, K, k, CHUNK: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    if SPLIT == 1:
        o_k = k + tl.arange(0, CHUNK)
        mask = m_n[None, :] & (o_k < K)[:, None]
        p_weights = w + o_n[None, :] + o_k.to(tl.int64)[:, None] * stride_k
    else:
        o_k = k + _parts(CHUNK, SPLIT)
        mask = m_n[None, None, :] & (o_k < K)[:, :, None]
        p_weights = w + o_n[None, None, :] + o_k.to(tl.int64)[:, :, None] * stride_k
    return round_to_tf32(tl.load(p_weights, mask=mask, other=0.0), PRECISION)
