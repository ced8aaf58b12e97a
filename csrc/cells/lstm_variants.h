// Variants of the long short-term memory, as fusedrnn/cells/lstm_variants.py defines them: with a forget gate (maps and
// saved values i, f, g, o) or with coupled gates (i, g, o; f = 1 - i). Peepholes, dropout of the candidate and zoneout
// of c are optional operands. The carry is c.
#pragma once

#include "spec.h"

namespace fusedrnn {

// Optional operands of a variant, of R units; null if absent.
template <class V, int kPeepholes>
struct LstmOperands {
  V (*p)[kPeepholes] = nullptr;  // peepholes, of i, f and o, or of i and o
  const V* g = nullptr;          // multiplier of the candidate
  const V* c = nullptr;          // zoneout weight of the old c
};

template <bool kCoupled>
struct LstmVariant {
  static constexpr CellSpec kSpec =
      kCoupled ? CellSpec{"lstm_coupled", 3, 3, 3, {0, 3, {0, 1, 2}}, {0, 3, {0, 1, 2}}, Carry::kCell, true, 2}
               : CellSpec{"lstm_peephole", 4, 4, 4, {0, 4, {0, 1, 2, 3}}, {0, 4, {0, 1, 2, 3}}, Carry::kCell, true, 3};
  static constexpr int kMaps = kSpec.maps, kI = 0, kF = 1, kG = kCoupled ? 1 : 2, kO = kG + 1;
  static constexpr int kPeepholes = kSpec.parameters, kOfO = kPeepholes - 1;
  template <class F>
  using Operands = LstmOperands<typename F::V, kPeepholes>;

  // O: Operands, or what can be compared with null and indexed in the place of its pointers.
  template <class F, int R, class O>
  static FUSEDRNN_CELL void forward(typename F::V (&a)[R][kMaps], typename F::V (&c)[R], typename F::V (&m)[R],
                                    const O& operands) {
    using A = typename F::Number;
    using V = typename F::V;
    V old[R];
    for (int r = 0; r < R; ++r) {
      old[r] = c[r];
      if (operands.p != nullptr) {
        a[r][kI] += operands.p[r][0] * c[r];
        if constexpr (!kCoupled) a[r][kF] += operands.p[r][1] * c[r];
      }
      V first[kO];  // o waits for c
      for (int k = 0; k < kO; ++k) first[k] = a[r][k];
      if constexpr (kCoupled) {
        F::template apply<typename F::Sigmoid, typename F::Tanh>(first);
      } else {
        F::template apply<typename F::Sigmoid, typename F::Sigmoid, typename F::Tanh>(first);
      }
      for (int k = 0; k < kO; ++k) a[r][k] = first[k];
      const V forget = kCoupled ? A(1) - a[r][kI] : a[r][kF];
      const V candidate = operands.g == nullptr ? a[r][kG] : a[r][kG] * operands.g[r];
      m[r] = c[r] = forget * c[r] + a[r][kI] * candidate;
    }
    V o[R];
    for (int r = 0; r < R; ++r) o[r] = operands.p == nullptr ? a[r][kO] : a[r][kO] + operands.p[r][kOfO] * c[r];
    F::sigmoid(o);
    for (int r = 0; r < R; ++r) a[r][kO] = o[r];
    F::tanh(m);
    for (int r = 0; r < R; ++r) m[r] *= a[r][kO];
    if (operands.c == nullptr) return;
    for (int r = 0; r < R; ++r) c[r] = operands.c[r] * old[r] + (A(1) - operands.c[r]) * c[r];
  }

  // dp: the gradients of the peepholes; only where they are given.
  template <class F, class O>
  static FUSEDRNN_CELL typename F::V backward(typename F::V (&a)[kMaps], typename F::V c_in, typename F::V c,
                                              typename F::V dm, typename F::V& dc, const O& operands,
                                              typename F::V (&dp)[kPeepholes]) {
    using A = typename F::Number;
    using V = typename F::V;
    const V i = a[kI], g = a[kG], o = a[kO], f = kCoupled ? A(1) - i : a[kF];
    const V candidate = operands.g == nullptr ? g : g * operands.g[0];
    if (operands.c != nullptr) c = f * c_in + i * candidate;  // what m is made of
    V tanh_c[1] = {c};
    F::tanh(tanh_c);
    const V da_o = dm * tanh_c[0] * o * (A(1) - o);
    V kept{}, dc_t = dc;
    if (operands.c != nullptr) {
      kept = operands.c[0] * dc;
      dc_t -= kept;
    }
    dc_t += dm * o * (A(1) - tanh_c[0] * tanh_c[0]);
    if (operands.p != nullptr) dc_t += da_o * operands.p[0][kOfO];
    const V da_i = dc_t * (kCoupled ? candidate - c_in : candidate) * i * (A(1) - i);
    const V da_f = dc_t * c_in * f * (A(1) - f);
    const V da_g = dc_t * i * (A(1) - g * g);
    dc = dc_t * f;
    if (operands.c != nullptr) dc += kept;
    if (operands.p != nullptr) {
      dc += da_i * operands.p[0][0];
      dp[0] = da_i * c_in;
      if constexpr (!kCoupled) {
        dc += da_f * operands.p[0][1];
        dp[1] = da_f * c_in;
      }
      dp[kOfO] = da_o * c;
    }
    a[kI] = da_i;
    if constexpr (!kCoupled) a[kF] = da_f;
    a[kG] = operands.g == nullptr ? da_g : da_g * operands.g[0];
    a[kO] = da_o;
    return o * tanh_c[0];
  }
};

}  // namespace fusedrnn
