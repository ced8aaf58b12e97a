// The LSTM cell: what happens between the affine map of the gates and the new state, and its derivative. The only place
// that knows it; another cell with four gates would replace this struct. docs/lstm_math.md derives both.
#pragma once

#include "activations.h"

namespace fusedrnn::FUSEDRNN_ISA {

constexpr int kGates = 4;  // in the order i, f, g, o

template <class A>
struct LstmCell {
  using V = Vec<A>;

  // For R rows: gates holds the affine maps on entry and the gates on exit, c holds c_{t-1} and then c_t; m becomes
  // o * tanh(c_t).
  template <int R>
  static FUSEDRNN_INLINE void forward(V (*gates)[kGates], V (&c)[R], V (&m)[R]) {
    for (int r = 0; r < R; ++r) {
      apply<A, Sigmoid<A>, Sigmoid<A>, Tanh<A>, Sigmoid<A>>(gates[r]);
      m[r] = c[r] = gates[r][1] * c[r] + gates[r][0] * gates[r][2];
    }
    if constexpr (R == 4) {
      apply<A, Tanh<A>, Tanh<A>, Tanh<A>, Tanh<A>>(m);
    } else {
      for (int r = 0; r < R; ++r) apply<A, Tanh<A>>(reinterpret_cast<V(&)[1]>(m[r]));
    }
    for (int r = 0; r < R; ++r) m[r] *= gates[r][3];
  }

  // gates: the gates on entry, the gradients of their affine maps on exit. dm is the gradient of m; dc that of c_t from
  // everywhere else on entry and that of c_{t-1} on exit. Returns m.
  static FUSEDRNN_INLINE V backward(V (&gates)[kGates], V c_in, V c, V dm, V& dc) {
    const V i = gates[0], f = gates[1], g = gates[2], o = gates[3];
    V tanh_c[1] = {c};
    apply<A, Tanh<A>>(tanh_c);
    const V dc_t = dc + dm * o * (A(1) - tanh_c[0] * tanh_c[0]);
    gates[0] = dc_t * g * i * (A(1) - i);
    gates[1] = dc_t * c_in * f * (A(1) - f);
    gates[2] = dc_t * i * (A(1) - g * g);
    gates[3] = dm * tanh_c[0] * o * (A(1) - o);
    dc = dc_t * f;
    return o * tanh_c[0];
  }
};

}  // namespace fusedrnn::FUSEDRNN_ISA
