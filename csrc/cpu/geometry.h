// Where things lie: the order of the time steps of a direction, the steps that exist, and offsets into the tensors.
#pragma once

#include "simd.h"

namespace fusedrnn::FUSEDRNN_ISA {

// One direction of a layer: its n-th step is time step at(n), and which steps of which row exist.
class Direction {
 public:
  Direction(const Sizes& sizes, const Sequence& sequence, int64_t d)
      : T_(sizes.T), B_(sizes.B), sequence_(sequence), reverse_(d == 1) {}

  int64_t at(int64_t n) const { return reverse_ ? T_ - 1 - n : n; }

  // Whether a step may not exist, or be reset, for some rows.
  bool ragged() const { return sequence_.lengths != nullptr || sequence_.reset != nullptr; }

  int64_t length(int64_t b) const {
    if (sequence_.lengths == nullptr) return T_;
    const int64_t length = sequence_.lengths[b];
    return length < 0 ? 0 : length > T_ ? T_ : length;
  }
  bool exists(int64_t t, int64_t b) const { return t >= 0 && t < length(b); }
  bool any_exists(int64_t t, int64_t b, int64_t rows) const {
    if (sequence_.lengths == nullptr) return true;
    bool any = false;
    for (int64_t r = 0; r < rows; ++r) any |= exists(t, b + r);
    return any;
  }
  // Whether the state entering step t is cut to zero.
  bool is_reset(int64_t t, int64_t b) const {
    return sequence_.reset != nullptr && sequence_.reset[t * B_ + b] != 0 && exists(t, b);
  }
  bool is_first(int64_t t, int64_t b) const { return t == (reverse_ ? length(b) - 1 : 0); }
  bool is_last(int64_t t, int64_t b) const { return t == (reverse_ ? 0 : length(b) - 1); }
  // The step whose state enters step t, and the one that step t's state enters.
  int64_t before(int64_t t) const { return reverse_ ? t + 1 : t - 1; }
  int64_t after(int64_t t) const { return reverse_ ? t - 1 : t + 1; }

 private:
  int64_t T_, B_;
  const Sequence& sequence_;
  bool reverse_;
};

// Offset of [t][b][d][0] in a tensor [T][B][D][N], and of [d][t][b][0] in one [D][T][B][N].
FUSEDRNN_INLINE int64_t time_major(const Sizes& s, int64_t t, int64_t b, int64_t d, int64_t N) {
  return ((t * s.B + b) * s.D + d) * N;
}
FUSEDRNN_INLINE int64_t direction_major(const Sizes& s, int64_t d, int64_t t, int64_t b, int64_t N) {
  return ((d * s.T + t) * s.B + b) * N;
}
// Offset of [d][b][0] in a tensor [D][B][N].
FUSEDRNN_INLINE int64_t state(const Sizes& s, int64_t d, int64_t b, int64_t N) { return (d * s.B + b) * N; }

// Where the gates of hidden units lie in a row of 4H: gate `gate` of units from `unit` on, a multiple of `lanes`. Block
// after block, as in a panel, where H is a multiple of `lanes`, so that a step touches one place for each row and
// block; else as in nn.LSTM, gate after gate.
template <class A>
class GateOrder {
 public:
  explicit GateOrder(int64_t H)
      : gate_(gates_in_blocks(H, Simd<A>::kLanes) ? Simd<A>::kLanes : H), unit_(gate_ == H ? 1 : 4) {}

  int64_t operator()(int64_t unit, int64_t gate = 0) const { return unit * unit_ + gate * gate_; }

 private:
  int64_t gate_, unit_;
};

// The rows of one direction that a worker owns, of D * B rows shared evenly.
struct OwnedRows {
  int64_t begin, end;
};
FUSEDRNN_INLINE OwnedRows owned_rows(const Sizes& s, const Team& team, int worker, int64_t d) {
  const int64_t all = s.D * s.B;
  const int64_t begin = worker * all / team.workers - d * s.B, end = (worker + 1) * all / team.workers - d * s.B;
  return {begin < 0 ? 0 : begin, end > s.B ? s.B : end};
}

}  // namespace fusedrnn::FUSEDRNN_ISA
