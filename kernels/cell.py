"""The LSTM cell on tiles: from the affine maps of the four gates to the new state, and the derivative of that.

Another cell with four gates would replace the two functions; the equations are in docs/lstm_math.md. Everything here
is elementwise, in float32, on tiles of one shape.
"""

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


@triton.jit
def cell(a_i, a_f, a_g, a_o, c):
    """The affine maps of the gates and c_{t-1} -> m_t = o * tanh(c_t), c_t, and the gates i, f, g, o."""
    i = sigmoid(a_i)
    f = sigmoid(a_f)
    g = tanh(a_g)
    o = sigmoid(a_o)
    c = f * c + i * g
    return o * tanh(c), c, i, f, g, o


@triton.jit
def cell_backward(i, f, g, o, c_in, c, dm, dc):
    """Gates, c_{t-1}, c_t, the gradient of m_t and that of c_t from elsewhere -> da_i, da_f, da_g, da_o, dc_{t-1}."""
    tanh_c = tanh(c)
    dc = dc + dm * o * (1.0 - tanh_c * tanh_c)
    da_i = dc * g * i * (1.0 - i)
    da_f = dc * c_in * f * (1.0 - f)
    da_g = dc * i * (1.0 - g * g)
    da_o = dm * tanh_c * o * (1.0 - o)
    return da_i, da_f, da_g, da_o, dc * f
