// The definition of bodies.h, for the files that compile the kernels.
#pragma once

#include <type_traits>

#include "../../cuda/backward.h"
#include "../../cuda/forward.h"
#include "../../cuda/scatter.h"
#include "bodies.h"

namespace fusedrnn::cuda {

template <class Kernel, class Params>
void body(const void* p, char* shared) {
  Kernel::run(*static_cast<const Params*>(p), shared);
}

template <template <Math, class, class, int, bool> class Kernel, class Params, Math kMath, class C, class Channel>
Body body_of(const Sizes& sizes, const Plan& plan) {
  if constexpr (C::kSpec.projects) {
    if (sizes.projected != 0) return body<Kernel<kMath, C, Channel, 1, true>, Params>;
  }
  if constexpr (uses_matrix_unit(kMath)) {
    if (plan.rows == 2 * kMmaN) return body<Kernel<kMath, C, Channel, 2, false>, Params>;
  }
  return body<Kernel<kMath, C, Channel, 1, false>, Params>;
}

template <template <Math, class, class, int, bool> class Kernel, class Params, Math kMath, class C>
Body body_of(const Sizes& sizes, const Plan& plan) {
  if constexpr (std::is_same_v<Params, BackwardParams>) {
    if (plan.exchange == Exchange::kScatter) {
      if constexpr (uses_matrix_unit(kMath)) {
        if (plan.rows == 2 * kMmaN) return body<BackwardScatter<kMath, C, 2>, Params>;
      }
      return body<BackwardScatter<kMath, C, 1>, Params>;
    }
  }
  if (plan.exchange == Exchange::kChunked) {
    constexpr int kColumnTiles = max_rows(kMath) / kMmaN;
    if constexpr (C::kSpec.projects) {
      if (sizes.projected != 0) return body<Kernel<kMath, C, ChunkedExchange, 1, true>, Params>;
    }
    return body<Kernel<kMath, C, ChunkedExchange, kColumnTiles, false>, Params>;
  }
  if (plan.exchange == Exchange::kGrid) return body_of<Kernel, Params, kMath, C, GridExchange>(sizes, plan);
  if constexpr (std::is_same_v<Params, ForwardParams>) {
    return body_of<Kernel, Params, kMath, C, ClusterExchange>(sizes, plan);
  } else if constexpr (C::kSpec.projects) {
    return body<Kernel<kMath, C, ClusterExchange, 1, true>, Params>;  // others scatter
  }
  return nullptr;
}

template <template <Math, class, class, int, bool> class Kernel, class Params, class C>
Body body_of(const Sizes& sizes, const Plan& plan) {
#if !defined(FUSEDRNN_HOST_FEW)  // the sanitized build compiles one of each unit, and so it is of variants
  if constexpr (!is_variant(C::kSpec)) {
    if (plan.math == Math::kFloat16) return body_of<Kernel, Params, Math::kFloat16, C>(sizes, plan);
    if (plan.math == Math::kFloat32) return body_of<Kernel, Params, Math::kFloat32, C>(sizes, plan);
  }
#endif
  switch (plan.math) {
#if !defined(FUSEDRNN_HOST_FEW)
    case Math::kTf32: return body_of<Kernel, Params, Math::kTf32, C>(sizes, plan);
#endif
    case Math::kBFloat16: return body_of<Kernel, Params, Math::kBFloat16, C>(sizes, plan);
    case Math::kFloat64: return body_of<Kernel, Params, Math::kFloat64, C>(sizes, plan);
    default: return nullptr;
  }
}

template <class C>
Body body_of(Pass pass, const Sizes& sizes, const Plan& plan) {
  return pass == Pass::kForward ? body_of<Forward, ForwardParams, C>(sizes, plan)
                                : body_of<Backward, BackwardParams, C>(sizes, plan);
}

}  // namespace fusedrnn::cuda
