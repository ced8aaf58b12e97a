// The definition of instances.h, for the files that compile the kernels.
#pragma once

#include <type_traits>

#include "../backward.h"
#include "../forward.h"
#include "../instances.h"
#include "../scatter.h"

namespace fusedrnn::cuda {

extern __shared__ Quad shared_memory[];

// Kernel: Forward or Backward. Clusters do not exist before sm_90, and the launch refuses to use them there.
template <class Kernel, class Channel, class Params>
__global__ void __launch_bounds__(kMaxThreads, 1) recurrence(const __grid_constant__ Params params) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if constexpr (!std::is_same_v<Channel, ClusterExchange>) Kernel::run(params, reinterpret_cast<char*>(shared_memory));
#else
  Kernel::run(params, reinterpret_cast<char*>(shared_memory));
#endif
}

template <Math kMath, class C, class Channel, int kColumnTiles, bool kProjected>
void add(Instances& to, Exchange exchange, int variant) {
  const int at = static_cast<int>(exchange);
  to.kernel[static_cast<int>(Pass::kForward)][at][variant] = reinterpret_cast<const void*>(
      &recurrence<Forward<kMath, C, Channel, kColumnTiles, kProjected>, Channel, ForwardParams>);
  if constexpr (gathers(Pass::kBackward, Channel::kExchange, kProjected)) {
    to.kernel[static_cast<int>(Pass::kBackward)][at][variant] = reinterpret_cast<const void*>(
        &recurrence<Backward<kMath, C, Channel, kColumnTiles, kProjected>, Channel, BackwardParams>);
  }
}

template <Math kMath, class C, class Channel>
void add(Instances& to, Exchange exchange) {
  add<kMath, C, Channel, 1, false>(to, exchange, 0);
  if constexpr (max_rows(kMath) > kMmaN) add<kMath, C, Channel, 2, false>(to, exchange, 1);
  if constexpr (C::kSpec.projects) add<kMath, C, Channel, 1, true>(to, exchange, 2);
}

template <Math kMath, class C>
void add_chunked(Instances& to) {
  constexpr int kColumnTiles = max_rows(kMath) / kMmaN;
  add<kMath, C, ChunkedExchange, kColumnTiles, false>(to, Exchange::kChunked, kColumnTiles - 1);
  if constexpr (C::kSpec.projects) add<kMath, C, ChunkedExchange, 1, true>(to, Exchange::kChunked, 2);
}

template <Math kMath, class C, int kColumnTiles>
void add_scatter(Instances& to) {
  to.kernel[static_cast<int>(Pass::kBackward)][static_cast<int>(Exchange::kScatter)][kColumnTiles - 1] =
      reinterpret_cast<const void*>(
          &recurrence<BackwardScatter<kMath, C, kColumnTiles>, ClusterExchange, BackwardParams>);
}

template <Math kMath, class C>
Instances instances() {
  Instances all{};
  add<kMath, C, GridExchange>(all, Exchange::kGrid);
  add<kMath, C, ClusterExchange>(all, Exchange::kCluster);
  add_chunked<kMath, C>(all);
  add_scatter<kMath, C, 1>(all);
  if constexpr (max_rows(kMath) > kMmaN) add_scatter<kMath, C, 2>(all);
  return all;
}

}  // namespace fusedrnn::cuda
