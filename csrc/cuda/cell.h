// The cells of csrc/cells, as the kernels take them.
#pragma once

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/lstm_variants.h"
#include "../cells/rnn.h"
#include "device.h"

namespace fusedrnn::cuda {

// In the order of fusedrnn/cuda_plan.py. The last two are the variants of the LSTM: every one with a forget gate, and
// every one with coupled gates; a launch says what else it has.
enum class CellKind : int32_t { kLstm, kGru, kRnnTanh, kRnnRelu, kLstmPeephole, kLstmCoupled };
constexpr int kCellKinds = 6;

// Cells of one spec, which share their kernels: the first of these kinds, and those behind it. kind: whose function it
// is; more: of a variant, what it takes besides.
template <CellKind kFirst, class First, class... Others>
struct CellsAlike {
  static constexpr CellSpec kSpec = First::kSpec;

  template <class F, int R, class... More>
  static FUSEDRNN_DEVICE void forward(CellKind kind, typename F::V (&a)[R][kSpec.maps], typename F::V (&carry)[R],
                                      typename F::V (&m)[R], const More&... more) {
    if constexpr (sizeof...(Others) == 0) {
      First::template forward<F, R>(a, carry, m, more...);
    } else if (kind == kFirst) {
      First::template forward<F, R>(a, carry, m);
    } else {
      Rest<Others...>::template forward<F, R>(kind, a, carry, m);
    }
  }

  template <class F, class... More>
  static FUSEDRNN_DEVICE typename F::V backward(CellKind kind, typename F::V (&a)[kSpec.maps], typename F::V carry_in,
                                                typename F::V carry, typename F::V dm, typename F::V& dcarry,
                                                More&... more) {
    if constexpr (sizeof...(Others) == 0) {
      return First::template backward<F>(a, carry_in, carry, dm, dcarry, more...);
    } else {
      if (kind == kFirst) return First::template backward<F>(a, carry_in, carry, dm, dcarry);
      return Rest<Others...>::template backward<F>(kind, a, carry_in, carry, dm, dcarry);
    }
  }

 private:
  template <class... C>
  using Rest = CellsAlike<static_cast<CellKind>(static_cast<int>(kFirst) + 1), C...>;
};

using LstmCells = CellsAlike<CellKind::kLstm, Lstm>;
using GruCells = CellsAlike<CellKind::kGru, Gru>;
using RnnCells = CellsAlike<CellKind::kRnnTanh, RnnTanh, RnnRelu>;
using LstmPeepholeCells = CellsAlike<CellKind::kLstmPeephole, LstmVariant<false>>;
using LstmCoupledCells = CellsAlike<CellKind::kLstmCoupled, LstmVariant<true>>;

template <class Cells>
FUSEDRNN_BOTH constexpr CellSpec spec_of() {
  constexpr CellSpec spec = Cells::kSpec;
  return spec;
}
FUSEDRNN_BOTH constexpr CellSpec spec_of(CellKind kind) {
  switch (kind) {
    case CellKind::kLstm: return spec_of<LstmCells>();
    case CellKind::kGru: return spec_of<GruCells>();
    case CellKind::kLstmPeephole: return spec_of<LstmPeepholeCells>();
    case CellKind::kLstmCoupled: return spec_of<LstmCoupledCells>();
    default: return spec_of<RnnCells>();
  }
}

// Maps that a product fills.
FUSEDRNN_BOTH constexpr int width(const MapWindow& maps) { return maps.end - maps.begin; }
FUSEDRNN_BOTH constexpr bool has_cell_state(const CellSpec& cell) { return cell.carry == Carry::kCell; }
// Whether it takes peepholes and noise: extras.h.
FUSEDRNN_BOTH constexpr bool is_variant(const CellSpec& cell) { return cell.parameters > 0; }

// ---------------------------------------------------------------------------------------------- nonlinear functions

// To the accuracy of the device's library.
template <class A>
struct LibMath {
  static FUSEDRNN_DEVICE A sigmoid(A x) { return A(1) / (A(1) + exponential(-x)); }
  static FUSEDRNN_DEVICE A tanh(A x) { return hyperbolic_tangent(x); }
};

// Absolute errors of some 1e-7, for results that are stored in 16 bits.
struct FastMath {
  static FUSEDRNN_DEVICE float sigmoid(float x) { return quick_divide(1.0f, 1.0f + quick_exponential(-x)); }
  static FUSEDRNN_DEVICE float tanh(float x) { return 1.0f - quick_divide(2.0f, 1.0f + quick_exponential(x + x)); }
};

// For results of 8 bits: the hardware's tanh, whose relative error of 2^-11 is less than they round to. Not where
// errors add up: a sigmoid by that instruction would make a forget gate of 0.9997 wrong by as much as it forgets in
// every step, and the backward has 1 - tanh^2, which of a large c would be wrong by half.
struct HardwareTanh : FastMath {
  static FUSEDRNN_DEVICE float tanh(float x) { return rough_tangent(x); }
};

// The math F that cells are instantiated with here: on single numbers.
template <class A, class Nonlinear>
struct NumberMath {
  using Number = A;
  using V = A;
  struct Sigmoid {
    static FUSEDRNN_DEVICE A of(A x) { return Nonlinear::sigmoid(x); }
  };
  struct Tanh {
    static FUSEDRNN_DEVICE A of(A x) { return Nonlinear::tanh(x); }
  };

  template <class... G>
  static FUSEDRNN_DEVICE void apply(A (&x)[sizeof...(G)]) {
    int k = 0;
    ((x[k] = G::of(x[k]), ++k), ...);
  }
  template <int N>
  static FUSEDRNN_DEVICE void sigmoid(A (&x)[N]) {
    FUSEDRNN_UNROLL for (int k = 0; k < N; ++k) x[k] = Nonlinear::sigmoid(x[k]);
  }
  template <int N>
  static FUSEDRNN_DEVICE void tanh(A (&x)[N]) {
    FUSEDRNN_UNROLL for (int k = 0; k < N; ++k) x[k] = Nonlinear::tanh(x[k]);
  }
  static FUSEDRNN_DEVICE A relu(A x) { return x < A(0) ? A(0) : x; }  // NaN stays
  static FUSEDRNN_DEVICE A where_positive(A x, A value) { return x > A(0) ? value : A(0); }
};

}  // namespace fusedrnn::cuda
