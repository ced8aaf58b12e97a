// x, where the launch takes it: from global memory to the shared memory of every block that multiplies with w_ih.
//
// The warps of a block that have a tile copy the rows of the slice, a step ahead, into one of two buffers. With
// operands counted 0, 1, 2, ... over all steps and slices of the launch:
//
//   receive operand k, the only barrier      begin to copy operand k + 1      product with operand k
//
// Operand k + 1 takes the buffer of operand k - 1, with which everybody has multiplied before that barrier.
#pragma once

#include "params.h"
#include "product.h"

namespace fusedrnn::cuda {

// kRows: of a slice.
template <class M, int kRows>
class Inputs {
 public:
  using S = typename M::Storage;

  // shared: two buffers of kRows rows.
  FUSEDRNN_DEVICE Inputs(const ForwardParams& p, const Role& role, char* shared)
      : p_(p), role_(role), shared_(shared) {}

  // Begins to copy x of time step t, batch rows from first_row on. Behind a row come zeros to the end of the K block,
  // which meet weights that are zero; rows outside of the batch are left as they are, and nobody reads their results.
  FUSEDRNN_DEVICE void copy(int64_t t, int64_t first_row) {
    const int64_t I = p_.sizes.I;
    const Strides& strides = p_.x_strides;
    const S* x = static_cast<const S*>(p_.x) + role_.direction * strides.d + t * strides.t;
    const bool aligned = rows_are_aligned();
    for_each_quad([&](int row, int k, Quad& to) {
      if (first_row + row >= p_.sizes.B) return;
      const int64_t first = int64_t{k} * kPerQuad;
      const S* from = x + (first_row + row) * strides.b + first;
      if (aligned && first + kPerQuad <= I) {
        copy_async(&to, from);
      } else {
        to = numbers(from, I - first);
      }
    });
  }

  // The operand in shared memory, copied before. What is copied next is the next one.
  FUSEDRNN_DEVICE const char* receive() {
    wait_copies("the thread's copies of the input");
    if constexpr (M::kRoundsOperands) {
      for_each_quad([](int, int, Quad& copied) { copied = M::operands(copied); });
    }
    sync_threads(kBarrier, warps() * kWarp, "the input has come");
    return buffer(received_++);
  }

 private:
  static constexpr int kPerQuad = sizeof(Quad) / sizeof(S);
  static constexpr int kBarrier = 15;  // behind those of WarpProduct

  // All of this is computed again where it is needed, while others wait, and takes no registers in between.
  FUSEDRNN_DEVICE Product product() const { return cuda::product(Pass::kForward, Stage::kInput, p_.sizes, M::kMath); }
  FUSEDRNN_DEVICE char* buffer(uint32_t k) const {
    return shared_ + static_cast<int>(k & 1) * kRows * product().operand.stride();
  }
  // Warps of the block that have a tile.
  FUSEDRNN_DEVICE int warps() const {
    const int64_t tiles = product().tiles - int64_t{role_.rank} * p_.plan.tiles;
    return static_cast<int>(tiles < p_.plan.tiles ? tiles : p_.plan.tiles) * p_.plan.splits;
  }

  // Whether all rows begin at multiples of 16 bytes.
  FUSEDRNN_DEVICE bool rows_are_aligned() const {
    const Strides& strides = p_.x_strides;
    const uint64_t bytes = static_cast<uint64_t>(strides.d | strides.t | strides.b) * sizeof(S);
    return (reinterpret_cast<uintptr_t>(p_.x) | bytes) % sizeof(Quad) == 0;
  }

  // f(row, k, quad) for quads k of the rows of the operand that comes next: those that this thread copies.
  template <class F>
  FUSEDRNN_DEVICE void for_each_quad(const F& f) const {
    const Operand operand = product().operand;
    const int quads = operand.blocks() * (kBlockBytes / static_cast<int>(sizeof(Quad))), step = warps();
    char* at = buffer(received_);
    FUSEDRNN_NO_UNROLL for (int row = role_.warp; row < kRows; row += step) {
      FUSEDRNN_NO_UNROLL for (int k = role_.lane; k < quads; k += kWarp) {
        f(row, k, reinterpret_cast<Quad*>(at + row * operand.stride())[k]);
      }
    }
  }

  static FUSEDRNN_DEVICE Quad numbers(const S* from, int64_t count) {
    union {
      Quad quad;
      S number[kPerQuad];
    };
    FUSEDRNN_UNROLL for (int e = 0; e < kPerQuad; ++e) number[e] = e < count ? from[e] : S{};
    return quad;
  }

  const ForwardParams& p_;
  const Role& role_;
  char* shared_;
  uint32_t received_ = 0;
};

}  // namespace fusedrnn::cuda
