// The LSTM cell: what happens between the affine map of the gates and the new state, and its derivative. The only place
// that knows it; another cell with four gates would replace this struct. docs/lstm_math.md derives both.
#pragma once

#include "activations.h"

namespace fusedrnn::FUSEDRNN_ISA {

constexpr int kGates = 4;  // in the order i, f, g, o

template <class A>
struct LstmCell {
  using V = Vec<A>;

  // gates: the affine maps on entry, the gates on exit. Returns m = o * tanh(c) and replaces c_{t-1} by c_t.
  static FUSEDRNN_INLINE V forward(V (&gates)[kGates], V& c) {
    gates[0] = sigmoid<A>(gates[0]);
    gates[1] = sigmoid<A>(gates[1]);
    gates[2] = tanh<A>(gates[2]);
    gates[3] = sigmoid<A>(gates[3]);
    c = gates[1] * c + gates[0] * gates[2];
    return gates[3] * tanh<A>(c);
  }

  // gates: the gates on entry, the gradients of their affine maps on exit. dm is the gradient of m; dc that of c_t from
  // everywhere else on entry and that of c_{t-1} on exit. Returns m.
  static FUSEDRNN_INLINE V backward(V (&gates)[kGates], V c_in, V c, V dm, V& dc) {
    const V i = gates[0], f = gates[1], g = gates[2], o = gates[3];
    const V tanh_c = tanh<A>(c);
    const V dc_t = dc + dm * o * (A(1) - tanh_c * tanh_c);
    gates[0] = dc_t * g * i * (A(1) - i);
    gates[1] = dc_t * c_in * f * (A(1) - f);
    gates[2] = dc_t * i * (A(1) - g * g);
    gates[3] = dm * tanh_c * o * (A(1) - o);
    dc = dc_t * f;
    return o * tanh_c;
  }
};

}  // namespace fusedrnn::FUSEDRNN_ISA
