// The LSTM cell: what happens between the affine map of the gates and the new state, and its derivative. The only place
// that knows it; another cell with four gates would replace this struct. docs/lstm_math.md derives both.
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
  static FUSEDRNN_DEVICE float tanh(float x) {
    const float e = quick_exponential(x < 0 ? x + x : -x - x);
    const float magnitude = quick_divide(1.0f - e, 1.0f + e);
    return x < 0 ? -magnitude : magnitude;
  }
};

// Relative errors of 2^-11 of tanh, for results that are stored in 8 bits: one instruction for each.
struct Rough {
  static FUSEDRNN_DEVICE float sigmoid(float x) { return 0.5f * rough_tangent(0.5f * x) + 0.5f; }
  static FUSEDRNN_DEVICE float tanh(float x) { return rough_tangent(x); }
};

template <class A, class Nonlinear>
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
    const A tanh_c = Nonlinear::tanh(c);
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
