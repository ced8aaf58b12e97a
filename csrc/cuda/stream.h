// Weights that a warp loads again at every step: a ring in shared memory, into which they are copied asynchronously,
// kStreamAhead K blocks ahead of the arithmetic.
//
// A K block is copied into the slot that was read before the one that is read next, whose numbers have been multiplied
// with by then. A lane reads what it has copied itself, so a ring needs no barrier; and a wait for copies that are
// older than the last few counts all copies of the thread, of whatever else it has on its way, which only makes it
// stricter.
#pragma once

#include "plan.h"

namespace fusedrnn::cuda {

template <int kSegments>
class WeightStream {
 public:
  // shared: the warp's ring, of kStreamSlots fragments.
  FUSEDRNN_DEVICE WeightStream(char* shared, int lane) : ring_(reinterpret_cast<Quad*>(shared) + lane) {}

  // Begins to copy the lane's quads of the next K block. Once for each K block that is read, and kStreamAhead times
  // before the first is; where there is none left, the count goes on without.
  FUSEDRNN_DEVICE void copy(const Quad* from, bool exists = true) {
    Quad* to = slot(copied_++);
    FUSEDRNN_UNROLL for (int s = 0; s < kSegments; ++s) copy_async_if(exists, to + s * kWarp, from + s * kWarp);
    commit_copies();
  }

  // The oldest K block that has not been read.
  FUSEDRNN_DEVICE void read(Quad (&w)[kSegments]) const {
    wait_copies_but<kStreamAhead - 1>("the thread's copies of weights");
    const Quad* from = slot(copied_ - kStreamAhead);
    FUSEDRNN_UNROLL for (int s = 0; s < kSegments; ++s) w[s] = from[s * kWarp];
  }

 private:
  static_assert(kStreamSlots == kStreamAhead + 1 && (kStreamSlots & kStreamAhead) == 0);
  FUSEDRNN_DEVICE Quad* slot(uint32_t k) const {
    return ring_ + static_cast<int>(k & (kStreamSlots - 1)) * kSegments * kWarp;
  }

  Quad* ring_;
  uint32_t copied_ = 0;
};

}  // namespace fusedrnn::cuda
