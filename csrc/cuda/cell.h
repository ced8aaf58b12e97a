// The LSTM cell: what happens between the affine map of the gates and the new state, and its derivative. The only place
// that knows it; another cell with four gates would replace this struct. docs/math.md derives both.
#pragma once

#include "device.h"

namespace fusedrnn::cuda {

constexpr int kGates = 4;  // in the order i, f, g, o

// To the accuracy of the device's library.
template <class A>
struct Precise {
  static FUSEDRNN_DEVICE A sigmoid(A x) { return A(1) / (A(1) + exponential(-x)); }
  static FUSEDRNN_DEVICE A tanh(A x) { return hyperbolic_tangent(x); }
};

// Absolute errors of some 1e-7, for results that are stored in 16 bits.
struct Quick {
  static FUSEDRNN_DEVICE float sigmoid(float x) { return quick_divide(1.0f, 1.0f + quick_exponential(-x)); }
  static FUSEDRNN_DEVICE float tanh(float x) { return 1.0f - quick_divide(2.0f, 1.0f + quick_exponential(x + x)); }
};

// For results of 8 bits: the hardware's tanh, whose relative error of 2^-11 is less than they round to. Not where
// errors add up: a sigmoid by that instruction would make a forget gate of 0.9997 wrong by as much as it forgets in
// every step, and the backward has 1 - tanh^2, which of a large c would be wrong by half.
struct Rough : Quick {
  static FUSEDRNN_DEVICE float tanh(float x) { return rough_tangent(x); }
};

// Nonlinear: of the forward.
template <class A, class Nonlinear, class BackwardNonlinear>
struct LstmCell {
  // gates: the affine maps on entry, the gates on exit. Returns m = o * tanh(c) and replaces c_{t-1} by c_t.
  static FUSEDRNN_DEVICE A forward(A (&gates)[kGates], A& c) {
    gates[0] = Nonlinear::sigmoid(gates[0]);
    gates[1] = Nonlinear::sigmoid(gates[1]);
    gates[2] = Nonlinear::tanh(gates[2]);
    gates[3] = Nonlinear::sigmoid(gates[3]);
    c = gates[1] * c + gates[0] * gates[2];
    return gates[3] * Nonlinear::tanh(c);
  }

  // gates: the gates on entry, the gradients of their affine maps on exit. dm is the gradient of m; dc that of c_t from
  // everywhere else on entry and that of c_{t-1} on exit. Returns m.
  static FUSEDRNN_DEVICE A backward(A (&gates)[kGates], A c_in, A c, A dm, A& dc) {
    const A i = gates[0], f = gates[1], g = gates[2], o = gates[3];
    const A tanh_c = BackwardNonlinear::tanh(c);
    const A dc_t = dc + dm * o * (A(1) - tanh_c * tanh_c);
    gates[0] = dc_t * g * i * (A(1) - i);
    gates[1] = dc_t * c_in * f * (A(1) - f);
    gates[2] = dc_t * i * (A(1) - g * g);
    gates[3] = dm * tanh_c * o * (A(1) - o);
    dc = dc_t * f;
    return o * tanh_c;
  }
};

}  // namespace fusedrnn::cuda
