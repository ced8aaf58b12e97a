// The table of one instruction set. Included once by each kernels_*.cpp.
#pragma once

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/lstm_variants.h"
#include "../cells/rnn.h"
#include "activations.h"
#include "backward.h"
#include "fingerprint.h"
#include "forward.h"
#include "masks.h"

namespace fusedrnn::FUSEDRNN_ISA {

template <class Cell, class S>
constexpr CellKernels cell_kernels() {
  using CellForward = Forward<Cell, S, kOperands<S>>;
  CellKernels kernels = {
      Cell::kSpec,
      [](const ForwardParams& params, int worker) { CellForward(params).run(worker); },
      add_biases<Cell, S>,
      [](const ForwardParams& params) { CellForward(params).step_start(); },
      [](const ForwardParams& params, int64_t begin, int64_t end) { CellForward(params).step(begin, end); },
      [](const ForwardParams& params, int64_t begin, int64_t end, int64_t row, int64_t row_end, void* own) {
        CellForward(params).step_of_batch(begin, end, row, row_end, own);
      },
      nullptr,
      [](const BackwardParams& params, int worker) { Backward<Cell, S, kOperands<S>>(params).run(worker); },
  };
  if constexpr (Cell::kSpec.projects) {
    kernels.step_project = [](const ForwardParams& params, int64_t begin, int64_t end) {
      CellForward(params).step_project(begin, end);
    };
  }
  return kernels;
}

template <class S>
constexpr Kernels kernels_for() {
  return {
      kOperands<S>,
      {cell_kernels<Lstm, S>(), cell_kernels<Gru, S>(), cell_kernels<RnnTanh, S>(), cell_kernels<RnnRelu, S>(),
       cell_kernels<LstmVariant<false>, S>(), cell_kernels<LstmVariant<true>, S>()},
      [](const BackwardParams& params, int64_t begin, int64_t end) {
        EnteringStates<S, kOperands<S>>(params).run(begin, end);
      },
      [](const GemmParams& params, int64_t m, int64_t m_end, int64_t half, int64_t half_end, void* own) {
        if (params.panels == nullptr && params.M <= kFewProductRows<kOperands<S>>) {
          return WeightRows<S, kOperands<S>>(params).run(half, half_end);
        }
        GemmOf<S>(params).run(m, m_end, half, half_end, own);
      },
      [](const GemmParams& params) { return GemmOf<S>(params).scratch(); },
      pack_maps<S, kOperands<S>>,
      pack_weight_rows<S, kOperands<S>>,
      pack_rows<S>,
      pack_columns<S>,
      [](const void* first, const void* second, int64_t N, void* panels, int64_t inputs, int64_t k) {
        auto* const to = static_cast<Compute<S>*>(panels);
        if constexpr (kOperands<S> != Operands::kNumbers) {
          pack_input(static_cast<const S*>(first), static_cast<const S*>(second), N, to, inputs, k);
        } else {
          pack_input(static_cast<const S*>(first), N, to, inputs, k);
        }
      },
      fingerprint,
      fill_masks<Compute<S>>,
      Simd<Compute<S>>::kLanes,
      kOperands<S> == Operands::kTiles ? static_cast<int>(kTileChunk) : kTileRows,
  };
}

#if !defined(FUSEDRNN_PAIRS)
// In the order of Dtype.
constexpr KernelTable kKernels = {kernels_for<float>(), kernels_for<double>(), kernels_for<BFloat16>(),
                                  kernels_for<Float16>()};
#endif

}  // namespace fusedrnn::FUSEDRNN_ISA
