// The large matrix products around a launch: the input's affine map before it, the gradients of x and of the weights
// after it. c = a @ b, or c += a @ b, where b is packed in panels (panel.h) and a may be transposed.
//
// A worker computes kGemmRows rows of c at a time, in blocks of kGemmDepth along K: half a panel of that depth stays in
// the first-level cache while the rows pass by, the rows in the second level, and a tile of them in registers, as in
// panel.h. A row that is contiguous is read as it lies. A transposed one is packed first, in slivers of kTileRows rows,
// [K][rows], because its numbers lie in as many pages as there are.
//
// The sum over K runs in one order wherever a tile begins and ends, so that the result does not depend on the number of
// threads.
#pragma once

#include "panel.h"

namespace fusedrnn::FUSEDRNN_ISA {

template <class E>
class Gemm {
 public:
  using A = Compute<E>;
  using V = Vec<A>;
  static_assert(kGemmRows % kTileRows == 0);
  static constexpr bool kPairs = !std::is_same_v<E, A>;

  // Numbers of a sliver: the store of a whole vector at its last input stays inside of it.
  static constexpr int64_t sliver(int64_t depth) { return depth * kTileRows + kUnits<A>; }
  static constexpr int64_t kScratch = kGemmRows / kTileRows * sliver(kGemmDepth);

  explicit Gemm(const GemmParams& params) : p_(params) {}

  // Rows [m, m_end) of c, at most kGemmRows of them, of the half panels [half, half_end). scratch: kScratch numbers,
  // used where a is transposed.
  void run(int64_t m, int64_t m_end, int64_t half, int64_t half_end, A* scratch) const {
    const E* a = static_cast<const E*>(p_.a);
    int64_t k = 0;
    do {  // also where K = 0, and c all zeros
      const int64_t depth = p_.K - k < kGemmDepth ? p_.K - k : kGemmDepth;
      if (p_.a_transposed) {
        if constexpr (kPairs) {
          pack_paired_slivers(m, m_end, k, depth, scratch);
        } else {
          pack_slivers(m, m_end, k, depth, scratch);
        }
      }
      for (int64_t n = half; n < half_end; ++n) {
        const E* panel = static_cast<const E*>(p_.panels) + n / 2 * p_.K * kWide<A> + in_panel<A>(p_.K, k, n % 2 * 2);
        for (int64_t row = m; row < m_end; row += kTileRows) {
          with_rows<kTileRows>(m_end - row < kTileRows ? m_end - row : kTileRows, [&](auto R) {
            if (p_.a_transposed) {
              tile<R.kCount>(reinterpret_cast<const E*>(scratch) + (row - m) / kTileRows * sliver(depth), 1, kTileRows,
                             panel, k, depth, row, n);
            } else {
              tile<R.kCount>(a + row * p_.K + k, p_.K, 1, panel, k, depth, row, n);
            }
          });
        }
      }
      k += kGemmDepth;
    } while (k < p_.K);
  }

 private:
  template <int R>
  FUSEDRNN_INLINE void tile(const E* a, int64_t row_stride, int64_t k_stride, const E* panel, int64_t k, int64_t depth,
                            int64_t row, int64_t half) const {
    const int64_t column = half * 2 * kUnits<A>, columns = p_.N - column;
    A* c = static_cast<A*>(p_.c) + row * p_.N + column;
    const bool add = k > 0 || p_.accumulate;
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < 2; ++v) __builtin_prefetch(c + r * p_.N + v * kUnits<A>, 1);
    }
    accumulate<E, R, 2>(a, row_stride, k_stride, panel, p_.K, depth, zero<A>, [&](int r, int v, V value) {
      const int64_t count = columns - v * kUnits<A>;
      if (count <= 0) return;
      A* to = c + r * p_.N + v * kUnits<A>;
      store(to, add ? value + load(to, count) : value, count);
    });
  }

  // Rows [m, m_end) of a, which are columns of memory, inputs [k, k + depth).
  void pack_slivers(int64_t m, int64_t m_end, int64_t k, int64_t depth, A* to) const {
    for (int64_t i = 0; i < depth; ++i) {
      const A* from = static_cast<const A*>(p_.a) + (k + i) * p_.M;
      for (int64_t row = m; row < m_end; row += kTileRows) {
        A* at = to + (row - m) / kTileRows * sliver(depth) + i * kTileRows;
        for (int64_t v = 0; v < kTileRows; v += kUnits<A>) store(at + v, load(from + row + v, p_.M - row - v));
      }
    }
  }

  // The same of pairs: of two rows of a each, where the last one may be missing.
  void pack_paired_slivers(int64_t m, int64_t m_end, int64_t k, int64_t depth, A* to) const {
    for (int64_t i = 0; i < depth; ++i) {
      const BFloat16* first = static_cast<const BFloat16*>(p_.a) + 2 * (k + i) * p_.M;
      const bool is_whole = k + i + 1 < p_.K || !p_.is_odd;
      for (int64_t row = m; row < m_end; row += kTileRows) {
        A* at = to + (row - m) / kTileRows * sliver(depth) + i * kTileRows;
        for (int64_t v = 0; v < kTileRows; v += kUnits<A>) {
          const int64_t column = row + v, count = p_.M - column;
          const V low = load(first + column, count), high = is_whole ? load(first + p_.M + column, count) : V{};
          store(at + v, paired(low, high));
        }
      }
    }
  }

  const GemmParams& p_;
};

}  // namespace fusedrnn::FUSEDRNN_ISA
