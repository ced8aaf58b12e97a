// The large matrix products around a launch: the input's affine map before it, the gradients of x and of the weights
// after it. c = start + a @ b, or c += a @ b, where b is packed in panels (panel.h) and a may be transposed.
//
// A worker computes at most kGemmRows rows of c at a time, in blocks of kGemmDepth along K. The rows of a block stay in
// the L2 cache; so does the part of a panel that a tile needs, with AVX2 half a panel in the L1 cache. A tile of sums
// stays in registers, as in panel.h. Rows are packed into slivers of kSliverRows rows, [K][rows]: transposed rows
// always, because each element is in another page, contiguous ones if there are enough rows and columns.
//
// The order of the sum over K does not depend on the tiles, so results do not depend on the number of threads.
#pragma once

#include "panel.h"

namespace fusedrnn::FUSEDRNN_ISA {

// Along K. With AVX-512 a tile reads 21 bytes of a panel a cycle, which the L2 cache delivers; a depth of 128, for
// which the panel's part stays in the L1 cache, costs more in loads and stores of c.
constexpr int64_t kGemmDepth = kNarrow ? 384 : 512;

template <class E>
class Gemm {
 public:
  using A = Compute<E>;
  using V = Vec<A>;
  static_assert(kGemmRows % kSliverRows == 0 && kSliverRows % kTileRows == 0);
  static constexpr bool kPairs = !std::is_same_v<E, A>;

  // Numbers of a sliver: the store of a whole vector at its last input stays inside of it.
  static constexpr int64_t sliver(int64_t depth) { return depth * kSliverRows + kUnits<A>; }
  explicit Gemm(const GemmParams& params) : p_(params) {}

  // Bytes that run() needs for itself.
  int64_t scratch() const {
    if (!packs()) return 0;
    const int64_t rows = p_.M < kGemmRows ? p_.M : kGemmRows, depth = p_.K < kGemmDepth ? p_.K : kGemmDepth;
    return blocks_of(rows, kSliverRows) * sliver(depth) * static_cast<int64_t>(sizeof(A));
  }

  // Rows [m, m_end) of c, at most kGemmRows of them, of the half panels [half, half_end), and of all of another product
  // with the same a. own: scratch() bytes.
  void run(int64_t m, int64_t m_end, int64_t half, int64_t half_end, void* memory) const {
    A* const own = static_cast<A*>(memory);
    const bool packed = packs();
    int64_t k = 0;
    do {  // also where K = 0, and c all zeros
      const int64_t depth = p_.K - k < kGemmDepth ? p_.K - k : kGemmDepth;
      if (packed) pack(m, m_end, k, depth, own);
      columns(m, m_end, half, half_end, k, depth, packed ? own : nullptr);
      if (p_.also != nullptr) {
        const int64_t halves = blocks_of(p_.also->N, 2 * kUnits<A>);
        Gemm(*p_.also).columns(m, m_end, 0, halves, k, depth, packed ? own : nullptr);
      }
      k += kGemmDepth;
    } while (k < p_.K);
  }

 private:
  // Inputs [k, k + depth) of these rows and half panels; slivers is null where the rows are read as they lie.
  void columns(int64_t m, int64_t m_end, int64_t half, int64_t half_end, int64_t k, int64_t depth,
               const A* slivers) const {
    for (int64_t n = half; n < half_end; n += kTileVectors / 2) {
      if (kTileVectors == 4 && n + 1 < half_end) {
        part<4>(m, m_end, n, k, depth, slivers);
      } else {
        part<2>(m, m_end, n, k, depth, slivers);
      }
    }
  }

  // Rows [m, m_end) of kVectors vectors of c from the n-th half panel on.
  template <int kVectors>
  void part(int64_t m, int64_t m_end, int64_t n, int64_t k, int64_t depth, const A* slivers) const {
    const E* const panel = static_cast<const E*>(p_.panels) + n / 2 * p_.K * kWide<A> + in_panel<A>(p_.K, k, n % 2 * 2);
    const int64_t stride = p_.a_stride / (kPairs ? 2 : 1);
    for (int64_t row = m; row < m_end; row += kTileRows) {
      with_rows<kTileRows>(m_end - row < kTileRows ? m_end - row : kTileRows, [&](auto R) {
        if (slivers != nullptr) {
          const E* const sliver = reinterpret_cast<const E*>(slivers) + (row - m) / kSliverRows * this->sliver(depth) +
                                  (row - m) % kSliverRows;
          tile<R.kCount, kVectors>(Sliver<E>{sliver}, panel, k, depth, row, n);
        } else {
          const E* const rows = static_cast<const E*>(p_.a) + row * stride + k;
          tile<R.kCount, kVectors>(StridedRows<E, R.kCount>(rows, stride), panel, k, depth, row, n);
        }
      });
    }
  }

  template <int R, int kVectors, class Left>
  FUSEDRNN_INLINE void tile(const Left& left, const E* panel, int64_t k, int64_t depth, int64_t row,
                            int64_t half) const {
    const int64_t column = half * 2 * kUnits<A>, columns = p_.N - column;
    const int64_t c_stride = p_.c_in_blocks ? kWide<A> : p_.N;
    A* const c = static_cast<A*>(p_.c) +
                 (p_.c_in_blocks ? (half / 2 * p_.M + row) * kWide<A> + half % 2 * 2 * kUnits<A> : row * p_.N + column);
    const bool add = k > 0 || p_.accumulate;
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(c + r * c_stride + v * kUnits<A>, 1);
    }
    const A* const start = k == 0 && p_.start != nullptr ? static_cast<const A*>(p_.start) + column : kZeros;
    if (columns >= kVectors * kUnits<A>) {
      return add ? product<R, kVectors, true>(left, panel, p_.K, depth, start, c, c_stride)
                 : product<R, kVectors, false>(left, panel, p_.K, depth, start, c, c_stride);
    }
    A sums[R][kVectors * kUnits<A>];
    product<R, kVectors, false>(left, panel, p_.K, depth, start, sums[0], kVectors * kUnits<A>);
    for (int r = 0; r < R; ++r) {
      for (int64_t n = 0; n < columns; n += kUnits<A>) {
        A* const to = c + r * c_stride + n;
        const V sum = load(sums[r] + n);
        store(to, add ? sum + load(to, columns - n) : sum, columns - n);
      }
    }
  }

  // A tile of c, or what is added to it. A function of its own: inlined into what calls it, the compiler spills sums in
  // every round of its loop.
  template <int R, int kVectors, bool kAdd, class Left>
  static __attribute__((noinline)) void product(const Left& left, const E* panel, int64_t K, int64_t depth,
                                                const A* start, A* c, int64_t c_stride) {
    accumulate<E, R, kVectors>(
        left, panel, K, depth, [&](int, int v) { return load(start + v * kUnits<A>); },
        [&](int r, int v, V sum) {
          A* const to = c + r * c_stride + v * kUnits<A>;
          store(to, kAdd ? sum + load(to) : sum);
        });
  }

  // With few rows a sliver would be more memory than it is time.
  bool packs() const { return p_.a_transposed || (p_.M >= kGemmRows && p_.N >= kColumnsToPackFor); }

  // Rows [m, m_end) of a, inputs [k, k + depth), in slivers.
  void pack(int64_t m, int64_t m_end, int64_t k, int64_t depth, A* to) const {
    if (!p_.a_transposed) {
      rows_to_slivers(m, m_end, k, depth, to);
    } else if constexpr (kPairs) {
      paired_columns_to_slivers(m, m_end, k, depth, to);
    } else {
      columns_to_slivers(m, m_end, k, depth, to);
    }
  }

  // Contiguous rows, by squares transposed in registers. What a store writes beyond a sliver's rows is written over by
  // the next one.
  void rows_to_slivers(int64_t m, int64_t m_end, int64_t k, int64_t depth, A* to) const {
    constexpr int64_t kSquares = blocks_of(kSliverRows, kUnits<A>);
    const int64_t stride = p_.a_stride / (kPairs ? 2 : 1);
    for (int64_t row = m; row < m_end; row += kSliverRows, to += sliver(depth)) {
      const int64_t rows = m_end - row < kSliverRows ? m_end - row : kSliverRows;
      const A* const from = static_cast<const A*>(p_.a) + row * stride + k;
      for (int64_t i = 0; i < depth; i += kUnits<A>) {
        V squares[kSquares][kUnits<A>];
        for (int64_t s = 0; s < kSquares; ++s) {
          for (int64_t r = 0; r < kUnits<A>; ++r) {
            const int64_t at = s * kUnits<A> + r;
            squares[s][r] = at < rows ? load(from + at * stride + i, depth - i) : V{};
          }
          transpose<A>(squares[s]);
        }
        const int64_t count = depth - i < kUnits<A> ? depth - i : kUnits<A>;
        for (int64_t u = 0; u < count; ++u) {
          for (int64_t s = 0; s < kSquares; ++s) store(to + (i + u) * kSliverRows + s * kUnits<A>, squares[s][u]);
        }
      }
    }
  }

  // Rows that are columns of memory.
  void columns_to_slivers(int64_t m, int64_t m_end, int64_t k, int64_t depth, A* to) const {
    for (int64_t first = 0; first < depth; first += kInputsAtATime) {
      const int64_t end = depth - first < kInputsAtATime ? depth : first + kInputsAtATime;
      for (int64_t row = m; row < m_end; row += kSliverRows) {
        A* at = to + (row - m) / kSliverRows * sliver(depth) + first * kSliverRows;
        const A* from = static_cast<const A*>(p_.a) + (k + first) * p_.a_stride + row;
        for (int64_t i = first; i < end; ++i, at += kSliverRows, from += p_.a_stride) {
          for (int64_t v = 0; v < kSliverRows; v += kUnits<A>) store(at + v, load(from + v, rows_from(row + v)));
        }
      }
    }
  }

  // As columns_to_slivers, for pairs from two rows of a; the last row may be missing.
  void paired_columns_to_slivers(int64_t m, int64_t m_end, int64_t k, int64_t depth, A* to) const {
    for (int64_t i = 0; i < depth; ++i) {
      const BFloat16* first = static_cast<const BFloat16*>(p_.a) + 2 * (k + i) * p_.a_stride;
      const bool is_whole = 2 * (k + i) + 1 < p_.a_rows;
      for (int64_t row = m; row < m_end; row += kSliverRows) {
        A* at = to + (row - m) / kSliverRows * sliver(depth) + i * kSliverRows;
        for (int64_t v = 0; v < kSliverRows; v += kUnits<A>) {
          const int64_t column = row + v, count = rows_from(column);
          const V low = load(first + column, count), high = is_whole ? load(first + p_.a_stride + column, count) : V{};
          store(at + v, paired(low, high));
        }
      }
    }
  }

  // The rows of a from `row` on; the last sliver may be wider.
  int64_t rows_from(int64_t row) const { return row < p_.M ? p_.M - row : 0; }

  static constexpr A kZeros[4 * kUnits<A>] = {};
  static constexpr int64_t kColumnsToPackFor = 128;
  static constexpr int64_t kInputsAtATime = 16;  // of all slivers, so that the next ones find their lines in the cache

  const GemmParams& p_;
};

}  // namespace fusedrnn::FUSEDRNN_ISA
