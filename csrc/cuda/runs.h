// Sixteen bytes that a thread moves at every step, from or to the same place of each step's tensor: a running address
// in the place of products of strides, and one access in the place of several.
#pragma once

#include "device.h"

namespace fusedrnn::cuda {

// Runs of a lane, for eight rows of `quads` runs each.
constexpr int runs_of_lane(int quads) { return (quads * 8 + kWarp - 1) / kWarp; }

// Up to 16 bytes of global memory: fewer at the end of a row. Moved 32 bits at a time unless all steps begin at
// multiples of 16 bytes.
class Run {
 public:
  FUSEDRNN_DEVICE Run() : at_(0), step_(0), halves_(0) {}
  // address: of the first step; step: to the next, in bytes; left: bytes from there to the end of the row, 0 or less
  // for nothing.
  FUSEDRNN_DEVICE Run(const void* address, int64_t step, int64_t left)
      : at_(reinterpret_cast<uintptr_t>(address)), step_(step) {
    halves_ = static_cast<int>(left < 0 ? 0 : left < kQuad ? left / 2 : kQuad / 2);
    if ((at_ | static_cast<uint64_t>(step)) % kQuad != 0) halves_ = -halves_;
  }

  // Whether it is neither 16 bytes nor nothing.
  FUSEDRNN_DEVICE bool is_ragged() const { return halves_ != 0 && halves_ != kQuad / 2; }

  // Begins to copy into shared memory, and goes on to the next step. kRagged: for those that may be ragged.
  template <bool kRagged>
  FUSEDRNN_DEVICE void copy(char* to) {
    copy_async_if(halves_ == kQuad / 2, to, reinterpret_cast<const void*>(at_));
    if (kRagged && is_ragged()) {
      const auto* from = reinterpret_cast<const uint16_t*>(at_);
      FUSEDRNN_NO_UNROLL for (int k = 0; k < count(); ++k) reinterpret_cast<uint16_t*>(to)[k] = from[k];
    }
    at_ += step_;
  }

  template <bool kRagged>
  FUSEDRNN_DEVICE void store(const Quad& quad) {
    store_global_if(halves_ == kQuad / 2, reinterpret_cast<void*>(at_), quad);
    if (kRagged && is_ragged()) {
      auto* to = reinterpret_cast<uint16_t*>(at_);
      FUSEDRNN_UNROLL for (int k = 0; k < kQuad / 2; ++k) {
        if (k < count()) to[k] = static_cast<uint16_t>(quad.word[k / 2] >> (k % 2 * 16));
      }
    }
    at_ += step_;
  }

 private:
  static constexpr int kQuad = sizeof(Quad);
  FUSEDRNN_DEVICE int count() const { return halves_ < 0 ? -halves_ : halves_; }

  uint64_t at_;   // of the step that comes
  int64_t step_;  // from it to the next
  int halves_;    // negative if they are moved one at a time
};

}  // namespace fusedrnn::cuda
