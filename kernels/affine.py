"""The product of states with a weight, of which this program owns some columns, in float32.

    acc[b, n] = sum_k s[b, k] * w[k, n]        element (k, n) of the weight lies at w + o_n[n] + k * stride_k

K is cut into chunks of CHUNK. RESIDENT chunks of the weight are loaded once, by `load_weights`, before the loop over
time: as operands of every step's product they stay on the chip, where the compiler keeps them in shared memory. What is
STREAMED comes from L2 at every step, behind the arithmetic. The planner chooses the one for all chunks, or the other.

Few rows cannot keep all warps of a program busy: then each chunk is cut into SPLIT parts, one for a warp, which
multiplies all columns, and the parts are summed up. With SPLIT = 1 the warps share the columns instead.
"""

import triton
import triton.language as tl


@triton.jit
def round_to_tf32(operand, PRECISION: tl.constexpr):
    """The operand of a product in TF32, rounded to its 10 bits of mantissa as cuDNN does; any other as it is.

    The matrix unit cuts the other bits off, which is up to twice the error, and to one side.
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
    """[BATCH, N] float32: the states whose rows begin at p_rows [BATCH], zero where not m_rows, with the weight.

    Rows of m_others begin at p_others instead; None: none do.
    AHEAD is how many chunks of the states are on their way before the first of them is multiplied. STREAMED says
    whether there are chunks that are not resident.
    """
    # Every chunk is read at a constant distance from the first: one register for its address, not one for each chunk.
    # Where rows begin is chosen for each element: after a choice for each row, Triton 3.8 loads element by element.
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
    """[SPLIT, CHUNK // SPLIT]: which elements of a chunk each part has."""
    # Of one `arange` that is reshaped, Triton 3.6 and 3.7 do not see that a row is contiguous, and load by the element.
    return tl.arange(0, SPLIT)[:, None] * (CHUNK // SPLIT) + tl.arange(0, CHUNK // SPLIT)[None, :]


@triton.jit
def _states(p_states, mask, PRECISION: tl.constexpr):
    # From L2: each is read once. What other programs wrote is seen because of the wait before (grid.py), not of this.
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
