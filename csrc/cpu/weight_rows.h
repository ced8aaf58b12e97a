// Products of a few rows with weights that are read once, and not packed: dh0 and dx of a single step. c = a @ w, or
// c += a @ w, for rows of torch's weights w.
//
// A panel takes a few cache lines of each row of w, and the next row is in another page. Here rows of w, each times a
// number of a, are added up in the first-level cache, so that memory is read in the order in which it lies.
//
// Every sum has the order of the rows of w, so results do not depend on the number of threads.
#pragma once

#include "panel.h"

namespace fusedrnn::FUSEDRNN_ISA {

// Rows of c, up to which rows of weights are added up. Fewer where others are multiplied in pairs: these are widened.
template <Operands kOperands>
constexpr int kFewProductRows = kOperands == Operands::kNumbers ? 8 : 3;

// As Gemm::run, for all rows of c, at most kFewProductRows, and rows of weights that are not packed. a has numbers,
// whatever the products of more rows take.
template <class S, Operands kOperands>
class WeightRows {
 public:
  using A = Compute<S>;
  using V = Vec<A>;
  using Number = std::conditional_t<kOperands == Operands::kNumbers, A, S>;  // of a

  explicit WeightRows(const GemmParams& params) : p_(params) {}

  void run(int64_t half, int64_t half_end) const {
    const int64_t columns = p_.unpacked->columns;  // those of c may fill a panel
    const int64_t end = half_end * 2 * kUnits<A> < columns ? half_end * 2 * kUnits<A> : columns;
    for (int64_t column = half * 2 * kUnits<A>; column < end; column += kPiece) {
      piece(column, end - column < kPiece ? end - column : kPiece);
    }
  }

 private:
  static constexpr int64_t kPiece = 2048 / sizeof(A);  // columns whose sums stay in the first-level cache
  static constexpr int kTogether = 4;                  // rows of weights, and rows of c, in registers
  static constexpr int64_t kAhead = 2 * kTogether;     // rows of weights that are prefetched
  using Sums = V[kPiece / kUnits<A>];

  // So many columns of all rows.
  void piece(int64_t column, int64_t count) const {
    const MapWeights& weights = p_.unpacked->weights;
    MapRows row(weights);
    Sums sums[kFewProductRows<kOperands>] = {};
    int64_t k = weights.skips;
    const int64_t end = k + weights.numbers();
    for (; k + kTogether <= end; k += kTogether) add_each<kTogether>(k, row, column, count, sums);
    for (; k < end; ++k) add_each<1>(k, row, column, count, sums);
    for (int64_t r = 0; r < p_.M; ++r) {
      for (int64_t n = 0; n < count; n += kUnits<A>) finish(r, column + n, count - n, sums[r][n / kUnits<A>]);
    }
  }

  // sums[r] += numbers [k, k + C) of row r times the rows of weights that they are multiplied with.
  template <int C>
  FUSEDRNN_INLINE void add_each(int64_t k, MapRows& row, int64_t column, int64_t count, Sums* sums) const {
    const UnpackedWeights& from = *p_.unpacked;
    const S* rows[C];
    for (int i = 0; i < C; ++i) {
      rows[i] = static_cast<const S*>(from.weights.w) + row(k + i) * from.columns + column;
    }
    const int64_t parts = blocks_of(p_.M, kTogether);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = part * p_.M / parts;
      with_rows<kTogether>((part + 1) * p_.M / parts - first,
                           [&](auto R) { add<R.kCount, C>(first, k, rows, count, sums + first); });
    }
  }

  // The same for R rows from `first` on. Not inlined: its loop has the registers for itself.
  template <int R, int C>
  __attribute__((noinline)) void add(int64_t first, int64_t k, const S* const (&rows)[C], int64_t count,
                                     Sums* sums) const {
    V numbers[R][C];
    for (int r = 0; r < R; ++r) {
      const Number* const from = static_cast<const Number*>(p_.a) + (first + r) * p_.a_stride + k;
      V own{};
#pragma GCC unroll 4
      for (int i = 0; i < C; ++i) {
        if (i % kUnits<A> == 0) own = load(from + i, C - i);
        numbers[r][i] = broadcast<A>(own[i % kUnits<A>]);
      }
    }
    const int64_t ahead = kAhead * p_.unpacked->columns, whole = count - count % kUnits<A>;
    const auto vector = [&](int64_t n, auto... partial) __attribute__((always_inline)) {
      V w[C];
#pragma GCC unroll 4
      for (int i = 0; i < C; ++i) {
        w[i] = load(rows[i] + n, partial...);
        __builtin_prefetch(rows[i] + ahead + n);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        V sum = sums[r][n / kUnits<A>];
#pragma GCC unroll 4
        for (int i = 0; i < C; ++i) sum = add_product_in_place<A>(sum, w[i], numbers[r][i]);
        sums[r][n / kUnits<A>] = sum;
      }
    };
    for (int64_t n = 0; n < whole; n += kUnits<A>) vector(n);
    if (whole < count) vector(whole, count - whole);
  }

  void finish(int64_t r, int64_t column, int64_t count, V sum) const {
    A* const c = static_cast<A*>(p_.c);
    if (p_.c_is_narrow) return store(static_cast<S*>(p_.c) + r * p_.N + column, sum, count);
    if (p_.c_in_blocks) return store(c + (column / kWide<A> * p_.M + r) * kWide<A> + column % kWide<A>, sum);
    A* const to = c + r * p_.N + column;
    store(to, p_.accumulate ? sum + load(to, count) : sum, count);
  }

  const GemmParams& p_;
};

}  // namespace fusedrnn::FUSEDRNN_ISA
