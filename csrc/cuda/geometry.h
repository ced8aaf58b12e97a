// Addresses of tensor elements, and the order of the time steps of a direction.
#pragma once

#include "params.h"

namespace fusedrnn::cuda {

// A bit for each of a lane's columns: two in every column tile. An array of bools would be as many registers.
class ColumnMask {
 public:
  FUSEDRNN_DEVICE bool operator()(int n, int j) const { return (bits_ >> (2 * n + j) & 1) != 0; }
  FUSEDRNN_DEVICE void set(int n, int j, bool value) {
    const uint32_t bit = 1u << (2 * n + j);
    bits_ = value ? bits_ | bit : bits_ & ~bit;
  }

 private:
  uint32_t bits_ = 0;
};

class Direction {
 public:
  FUSEDRNN_DEVICE Direction(const Sizes& sizes, const Sequence& sequence, int d)
      : T_(sizes.T), B_(sizes.B), sequence_(sequence), d_(d) {}

  // Time step of the n-th step of the direction, -1 or T outside of 0 <= n < T.
  FUSEDRNN_DEVICE int64_t at(int64_t n) const { return d_ == 1 ? T_ - 1 - n : n; }
  FUSEDRNN_DEVICE int64_t before(int64_t t) const { return d_ == 1 ? t + 1 : t - 1; }

  // Steps of sequence b that exist: t < length(b). None where b is outside of the batch.
  FUSEDRNN_DEVICE int length(int64_t b) const {
    if (b >= B_) return 0;
    if (sequence_.lengths == nullptr) return static_cast<int>(T_);
    const int64_t length = sequence_.lengths[b];
    return static_cast<int>(length < 0 ? 0 : length > T_ ? T_ : length);
  }
  // Whether step t, which may be -1, exists in a sequence of that length.
  static FUSEDRNN_DEVICE bool exists(int64_t t, int length) { return t >= 0 && t < length; }
  FUSEDRNN_DEVICE bool is_first(int64_t t, int length) const { return t == (d_ == 1 ? length - 1 : 0); }
  // Whether the state that enters step t of sequence b, which exists, is reset to zero.
  FUSEDRNN_DEVICE bool is_reset(int64_t t, int64_t b) const {
    return sequence_.reset != nullptr && sequence_.reset[t * B_ + b] != 0;
  }

  // Offset of [d][b][0] in a tensor [D][B][N], and of [d][t][b][0] in one [D][T][B][N].
  FUSEDRNN_DEVICE int64_t state(int64_t b, int64_t N) const { return (int64_t{d_} * B_ + b) * N; }
  FUSEDRNN_DEVICE int64_t step(int64_t t, int64_t b, int64_t N) const { return ((int64_t{d_} * T_ + t) * B_ + b) * N; }
  FUSEDRNN_DEVICE int64_t offset(const Strides& strides, int64_t t, int64_t b) const {
    return d_ * strides.d + t * strides.t + b * strides.b;
  }

 private:
  const int64_t &T_, &B_;
  const Sequence& sequence_;
  const int d_;
};

}  // namespace fusedrnn::cuda
