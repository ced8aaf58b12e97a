// Index computations: the order of the time steps of a direction, which steps exist, their rows, and offsets into
// tensors.
#pragma once

#include "simd.h"

namespace fusedrnn::FUSEDRNN_ISA {

// Placeholder for members that only variants of a cell have.
struct Nothing {};

// One direction of a layer: its n-th step is time step at(n); tells which steps of a sequence exist, and their rows.
class Direction {
 public:
  Direction() = default;  // of nothing
  Direction(const Sizes& sizes, const Sequence& sequence, int64_t d)
      : T_(sizes.T), B_(sizes.B), sequence_(&sequence), reverse_(d == 1) {}

  int64_t at(int64_t n) const { return reverse_ ? T_ - 1 - n : n; }

  // The row of a step of a sequence, and how many sequences, the first ones, have a row at step t.
  int64_t row(int64_t t, int64_t b) const { return (is_packed() ? sequence_->offsets[t] : t * B_) + b; }
  int64_t rows(int64_t t) const { return is_packed() ? sequence_->offsets[t + 1] - sequence_->offsets[t] : B_; }
  bool is_packed() const { return sequence_->offsets != nullptr; }
  // The step of a row.
  int64_t step_of(int64_t row) const {
    if (!is_packed()) return row / B_;
    int64_t first = 0;  // binary search: the last step that begins at this row or before
    for (int64_t end = T_; end - first > 1;) {
      const int64_t middle = (first + end) / 2;
      (sequence_->offsets[middle] <= row ? first : end) = middle;
    }
    return first;
  }
  // The end of those of sequences [.., end) that have a row at step t.
  int64_t clipped(int64_t t, int64_t end) const { return end < rows(t) ? end : rows(t); }

  // Whether a step may not exist, or be reset, for some sequences.
  bool ragged() const { return sequence_->lengths != nullptr || sequence_->reset != nullptr; }

  int64_t length(int64_t b) const {
    if (sequence_->lengths == nullptr) return T_;
    const int64_t length = sequence_->lengths[b];
    return length < 0 ? 0 : length > T_ ? T_ : length;
  }
  bool exists(int64_t t, int64_t b) const { return t >= 0 && t < length(b); }
  bool any_exists(int64_t t, int64_t b, int64_t rows) const {
    if (sequence_->lengths == nullptr) return true;
    bool any = false;
    for (int64_t r = 0; r < rows; ++r) any |= exists(t, b + r);
    return any;
  }
  // Whether the state entering step t is reset to zero.
  bool is_reset(int64_t t, int64_t b) const {
    return sequence_->reset != nullptr && exists(t, b) && sequence_->reset[t * B_ + b] != 0;
  }
  int64_t first(int64_t b) const { return reverse_ ? length(b) - 1 : 0; }
  bool is_first(int64_t t, int64_t b) const { return t == first(b); }
  bool is_last(int64_t t, int64_t b) const { return t == (reverse_ ? 0 : length(b) - 1); }
  // The step whose state enters step t, and the one that step t's state enters.
  int64_t before(int64_t t) const { return reverse_ ? t + 1 : t - 1; }
  int64_t after(int64_t t) const { return reverse_ ? t - 1 : t + 1; }

 private:
  int64_t T_ = 0, B_ = 0;
  const Sequence* sequence_ = nullptr;
  bool reverse_ = false;
};

// Offset of [row][d][0] in a tensor [N][D][size], of [d][row][0] in one [D][N][size], and of [d][b][0] in one
// [D][B][size].
FUSEDRNN_INLINE int64_t time_major(const Sizes& s, int64_t row, int64_t d, int64_t size) {
  return (row * s.D + d) * size;
}
FUSEDRNN_INLINE int64_t direction_major(const Sizes& s, int64_t d, int64_t row, int64_t size) {
  return (d * s.N + row) * size;
}
FUSEDRNN_INLINE int64_t state(const Sizes& s, int64_t d, int64_t b, int64_t size) { return (d * s.B + b) * size; }

// The multiplier of a unit at step t of a sequence, and of those that follow; null where there are none.
template <class A>
FUSEDRNN_INLINE const A* noise_at(const Sizes& s, const NoiseParams& noise, Noise kind, const Direction& direction,
                                  int64_t t, int64_t d, int64_t b, int64_t unit) {
  const A* const all = static_cast<const A*>(noise.of[static_cast<size_t>(kind)]);
  if (all == nullptr) return nullptr;
  const int64_t size = kind == Noise::kR ? s.P : s.H;
  return all + time_major(s, noise.by_sequence ? b : direction.row(t, b), d, size) + unit;
}

// Offset of the k-th saved value of units from `unit` on, a multiple of `lanes`, in a row of S*H saved values. With
// `saved_in_blocks` the layout is [H / lanes][S][lanes], so that a step touches one range per row and block; otherwise
// it is [S][H].
template <class A>
class SavedOrder {
 public:
  SavedOrder() = default;  // of nothing
  SavedOrder(int64_t H, int64_t saved)
      : value_(saved_in_blocks(H, saved, Simd<A>::kLanes) ? Simd<A>::kLanes : H), unit_(value_ == H ? 1 : saved) {}

  int64_t operator()(int64_t unit, int64_t k = 0) const { return unit * unit_ + k * value_; }

 private:
  int64_t value_ = 0, unit_ = 0;
};

// The first of the D * B sequences of a worker; every worker has about the same number of steps.
inline int64_t first_owned(const Sizes& s, const Sequence& sequence, const Team& team, int worker) {
  const int64_t all = s.D * s.B;
  if (sequence.lengths == nullptr || worker == 0 || worker == team.workers) return worker * all / team.workers;
  const Direction direction(s, sequence, 0);
  int64_t steps = 0, before = 0, first = 0;
  for (int64_t b = 0; b < s.B; ++b) steps += s.D * direction.length(b);
  for (; first < all; ++first) {
    const int64_t length = direction.length(first % s.B);
    if (2 * before + length >= 2 * steps * worker / team.workers) break;
    before += length;
  }
  return first;
}

// The sequences of one direction that a worker owns.
struct OwnedRows {
  int64_t begin, end;
};
inline OwnedRows owned_rows(const Sizes& s, const Sequence& sequence, const Team& team, int worker, int64_t d) {
  const int64_t begin = first_owned(s, sequence, team, worker) - d * s.B;
  const int64_t end = first_owned(s, sequence, team, worker + 1) - d * s.B;
  return {begin < 0 ? 0 : begin, end > s.B ? s.B : end};
}

}  // namespace fusedrnn::FUSEDRNN_ISA
