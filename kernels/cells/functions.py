"""Nonlinearities, in float32, on tiles."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(a):
    return 1.0 / (1.0 + tl.exp(-a))


@triton.jit
def tanh(a):
    """Within 2 units in the last place, as far as `tl.exp` is exact; a NaN stays one.

    Near 0 a minimax polynomial of tanh(a) / a in a^2: 1 - 2 / (e^2a + 1) would lose there what it subtracts.
    """
    magnitude = tl.abs(a)
    u = a * a
    p = -0.006269119679927826
    p = p * u + 0.021110959351062775
    p = p * u - 0.053873948752880096
    p = p * u + 0.13332915306091309
    p = p * u - 0.3333333134651184
    far = 1.0 - 2.0 / (tl.exp(2.0 * magnitude) + 1.0)
    return tl.where(magnitude < 0.6, a + a * u * p, tl.where(a < 0, -far, far))
