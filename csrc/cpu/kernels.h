// The table of one instruction set. Included once by each kernels_*.cpp.
#pragma once

#include "backward.h"
#include "fingerprint.h"
#include "forward.h"
#include "gemm.h"

namespace fusedrnn::FUSEDRNN_ISA {

#if defined(FUSEDRNN_PAIRS)
template <class S>
constexpr bool kPairs = std::is_same_v<S, BFloat16>;
#else
template <class S>
constexpr bool kPairs = false;
#endif

template <class S>
constexpr auto gemm_pairs() -> decltype(Kernels::gemm_pairs) {
  if constexpr (kPairs<S>) {
    return [](const GemmParams& params, int64_t m, int64_t m_end, int64_t half, int64_t half_end, void* own) {
      Gemm<Pair>(params).run(m, m_end, half, half_end, static_cast<float*>(own));
    };
  }
  return nullptr;
}

template <class S>
constexpr auto pack_pairs() -> decltype(Kernels::pack_pair) {
  if constexpr (kPairs<S>) {
    return [](const void* first, const void* second, int64_t N, void* panels, int64_t K, int64_t k) {
      pack_pair(static_cast<const S*>(first), static_cast<const S*>(second), N, static_cast<float*>(panels), K, k);
    };
  }
  return nullptr;
}

template <class S>
constexpr Kernels kernels_for() {
  return {
      [](const ForwardParams& params, int worker) {
        if constexpr (kPairs<S>) {
          if (params.pairs) return Forward<S, true>(params).run(worker);
        }
        Forward<S>(params).run(worker);
      },
      add_biases<S>,
      [](const ForwardParams& params) { Forward<S>(params).step_start(); },
      [](const ForwardParams& params, int64_t begin, int64_t end) { Forward<S>(params).step(begin, end); },
      [](const ForwardParams& params, int64_t begin, int64_t end) { Forward<S>(params).step_project(begin, end); },
      [](const BackwardParams& params, int worker) { Backward<S, kPairs<S>>(params).run(worker); },
      [](const BackwardParams& params, int64_t begin, int64_t end) {
        Backward<S, kPairs<S>>(params).entering_states(begin, end);
      },
      [](const GemmParams& params, int64_t m, int64_t m_end, int64_t half, int64_t half_end, void* own) {
        using A = Compute<S>;
        Gemm<A>(params).run(m, m_end, half, half_end, static_cast<A*>(own));
      },
      gemm_pairs<S>(),
      [](const GemmParams& params) {
        using A = Compute<S>;
        return Gemm<A>(params).scratch() * static_cast<int64_t>(sizeof(A));
      },
      pack_gates<S>,
      pack_rows<S>,
      pack_columns<S>,
      pack_pairs<S>(),
      fingerprint,
      Simd<Compute<S>>::kLanes,
      kTileRows,
  };
}

#if !defined(FUSEDRNN_PAIRS)
// In the order of Dtype.
constexpr KernelTable kKernels = {kernels_for<float>(), kernels_for<double>(), kernels_for<BFloat16>(),
                                  kernels_for<Float16>()};
#endif

}  // namespace fusedrnn::FUSEDRNN_ISA
