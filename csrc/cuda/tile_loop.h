// Several tiles per warp: with more tiles than warps in a group, a warp owns those of the same index modulo the number
// of warps, and computes a step of one after another, a turn each.
//
// The state of a tile between steps, the carry and h or their gradients, is in global memory, behind the exchanges.
// Only the thread that wrote it reads it.
#pragma once

#include "params.h"
#include "product.h"

namespace fusedrnn::cuda {

// kNumbers: size of a thread's state of a tile.
template <class A, int kNumbers>
class TileLoop {
 public:
  FUSEDRNN_DEVICE TileLoop(const CellSpec& cell, const Sizes& sizes, const Plan& plan, Pass pass,
                           const Workspace& workspace)
      : plan_(plan),
        first_(
            reinterpret_cast<A*>(static_cast<char*>(workspace.exchanged) + exchanged_bytes(cell, pass, sizes, plan)) +
            block_index() * int64_t{turns(ceil_div(sizes.H, tile_units(pass)), plan)} * each() +
            thread_index() * kNumbers) {}

  // Calls f() for every turn, with the warp's tile of that turn in `role`.
  template <class F>
  FUSEDRNN_DEVICE void for_each(int64_t tiles, Role& role, const F& f) {
    FUSEDRNN_NO_UNROLL for (turn_ = 0; turn_ < turns(tiles, plan_); ++turn_) {
      role.tile = (turn_ * plan_.blocks + role.rank) * plan_.tiles + role.local_tile;
      f();
    }
  }

  // Whether this is the first turn.
  FUSEDRNN_DEVICE bool is_first() const { return turn_ == 0; }

  // One number of the thread's state of the current tile.
  FUSEDRNN_DEVICE A& operator[](int k) const { return first_[turn_ * each() + k]; }

 private:
  FUSEDRNN_DEVICE int64_t each() const { return int64_t{kNumbers} * threads(plan_); }

  const Plan& plan_;
  A* const first_;
  int turn_ = 0;
};

}  // namespace fusedrnn::cuda
