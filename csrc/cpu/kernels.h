// The table of one instruction set. Included once by each kernels_*.cpp.
#pragma once

#include "backward.h"
#include "forward.h"

namespace fusedrnn::FUSEDRNN_ISA {

template <class S>
constexpr Kernels kernels_for() {
  return {
      [](const ForwardParams& params, int worker) { Forward<S>(params).run(worker); },
      [](const ForwardParams& params) { Forward<S>(params).step_start(); },
      [](const ForwardParams& params, int64_t begin, int64_t end) { Forward<S>(params).step(begin, end); },
      [](const ForwardParams& params, int64_t begin, int64_t end) { Forward<S>(params).step_project(begin, end); },
      [](const BackwardParams& params, int worker) { Backward<S>(params).run(worker); },
      [](const BackwardParams& params, int64_t begin, int64_t end) { Backward<S>(params).entering_states(begin, end); },
      pack_gates<S>,
      pack_rows<S>,
      pack_columns<S>,
      Simd<Compute<S>>::kLanes,
      kTileRows,
  };
}

// In the order of Dtype.
constexpr KernelTable kKernels = {kernels_for<float>(), kernels_for<double>(), kernels_for<BFloat16>(),
                                  kernels_for<Float16>()};

}  // namespace fusedrnn::FUSEDRNN_ISA
