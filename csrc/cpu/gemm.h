// The large matrix products around a launch: the input's affine map before it, the gradients of x and of the weights
// after it. c = start + a @ b, or c += a @ b, where b is packed in panels (panel.h) and a may be transposed.
//
// A worker computes at most kGemmRows rows of c at a time, in blocks of kGemmDepth along K. The rows of a block stay in
// the L2 cache; so does the part of a panel that a tile needs, with AVX2 half a panel in the L1 cache. A tile of sums
// stays in registers, as in panel.h. Rows are packed into slivers of kSliverRows rows, [K][rows]: transposed rows
// always, because each element is in another page, contiguous ones if there are enough rows and columns.
//
// Weights that a product reads once need not be packed before. A worker then packs a panel's part of kUnpackedDepth
// inputs in its first-level cache, multiplies its rows with it, and goes on to the next panel. For a few rows
// weight_rows.h packs nothing.
//
// The order of the sum over K does not depend on the tiles, so results do not depend on the number of threads.
#pragma once

#include "panel.h"

namespace fusedrnn::FUSEDRNN_ISA {

// Along K. With AVX-512 a tile reads 21 bytes of a panel a cycle, which the L2 cache delivers; a depth of 128, for
// which the panel's part stays in the L1 cache, costs more in loads and stores of c.
constexpr int64_t kGemmDepth = kNarrow ? 384 : 512;
static_assert(kGemmDepth >= kFusedInputs);
constexpr int64_t kUnpackedDepth = 128;  // of weights that are not packed before, to stay in the L1 cache

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
    const int64_t panel = p_.panels == nullptr ? kUnpackedDepth * kWide<A> : 0;
    return (slivers() + panel) * static_cast<int64_t>(sizeof(A));
  }

  // Rows [m, m_end) of c, at most kGemmRows of them, of the half panels [half, half_end), and of all of another product
  // with the same a. own: scratch() bytes.
  void run(int64_t m, int64_t m_end, int64_t half, int64_t half_end, void* memory) const {
    A* const own = static_cast<A*>(memory);
    const int64_t most = most_depth();
    int64_t k = 0;
    do {  // also where K = 0, and c all zeros
      const int64_t depth = p_.K - k < most ? p_.K - k : most;
      if (packs()) pack(m, m_end, k, depth, own);
      const A* const a = packs() ? own : nullptr;
      columns(m, m_end, half, half_end, k, depth, a, own + slivers());
      if (p_.also != nullptr) {
        Gemm(*p_.also).columns(m, m_end, 0, blocks_of(p_.also->N, 2 * kUnits<A>), k, depth, a, nullptr);
      }
      k += most;
    } while (k < p_.K);
  }

 private:
  // Inputs [k, k + depth) of a product.
  struct Block {
    const E* half(int64_t n) const {
      return panels + (n / 2 - first) * inputs * kWide<A> + in_panel<A>(inputs, 0, n % 2 * 2);
    }

    int64_t m, k, depth;
    const A* slivers;  // rows of a from m on; or null where they are read as they lie
    const E* panels;   // of b, from the first-th on, of so many inputs: these inputs
    int64_t first, inputs;
  };

  int64_t most_depth() const { return p_.panels != nullptr ? kGemmDepth : kUnpackedDepth; }

  // Numbers of all slivers of a block, in whole cache lines.
  int64_t slivers() const {
    if (!packs()) return 0;
    const int64_t rows = p_.M < kGemmRows ? p_.M : kGemmRows, depth = p_.K < most_depth() ? p_.K : most_depth();
    return blocks_of(blocks_of(rows, kSliverRows) * sliver(depth), 16) * 16;
  }

  // These rows and half panels of a block; own: memory for a panel of unpacked weights.
  void columns(int64_t m, int64_t m_end, int64_t half, int64_t half_end, int64_t k, int64_t depth, const A* slivers,
               A* own) const {
    if (p_.panels == nullptr) {
      for (int64_t n = half; n < half_end; n += 2) {
        p_.unpacked->pack(*p_.unpacked, n / 2, k, depth, own);
        const Block block{m, k, depth, slivers, reinterpret_cast<const E*>(own), n / 2, depth};
        halves(block, m, m_end, n, n + 2 < half_end ? n + 2 : half_end);
      }
      return;
    }
    const Block block{m, k, depth, slivers, static_cast<const E*>(p_.panels) + in_panel<A>(p_.K, k, 0), 0, p_.K};
    // Rows of c are written one after the other if all of b stays near.
    const bool is_near = depth * p_.N <= kNearNumbers && p_.N > 2 * kWide<A>;
    const int64_t rows = is_near ? kSliverRows : kGemmRows;
    for (int64_t row = m; row < m_end; row += rows) {
      halves(block, row, m_end - row < rows ? m_end : row + rows, half, half_end);
    }
  }

  void halves(const Block& block, int64_t row, int64_t row_end, int64_t half, int64_t half_end) const {
    for (int64_t n = half; n < half_end; n += kTileVectors / 2) {
      if (kTileVectors == 4 && n + 1 < half_end) {
        part<4>(block, row, row_end, n);
      } else {
        part<2>(block, row, row_end, n);
      }
    }
  }

  // Rows [begin, end) of kVectors vectors of c from the n-th half panel on.
  template <int kVectors>
  void part(const Block& block, int64_t begin, int64_t end, int64_t n) const {
    const int64_t stride = p_.a_stride / (kPairs ? 2 : 1);
    const E* const panel = block.half(n);
    for (int64_t row = begin; row < end; row += kTileRows) {
      with_rows<kTileRows>(end - row < kTileRows ? end - row : kTileRows, [&](auto R) {
        if (block.slivers != nullptr) {
          const int64_t at = row - block.m;
          const E* const sliver = reinterpret_cast<const E*>(block.slivers) +
                                  at / kSliverRows * this->sliver(block.depth) + at % kSliverRows;
          tile<R.kCount, kVectors>(Sliver<E>{sliver}, panel, block, row, n);
        } else {
          const E* const rows = static_cast<const E*>(p_.a) + row * stride + block.k;
          tile<R.kCount, kVectors>(StridedRows<E, R.kCount>(rows, stride), panel, block, row, n);
        }
      });
    }
  }

  template <int R, int kVectors, class Left>
  FUSEDRNN_INLINE void tile(const Left& left, const E* panel, const Block& block, int64_t row, int64_t half) const {
    const int64_t k = block.k, depth = block.depth, inputs = block.inputs;
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
      return add ? product<R, kVectors, true>(left, panel, inputs, depth, start, c, c_stride)
                 : product<R, kVectors, false>(left, panel, inputs, depth, start, c, c_stride);
    }
    A sums[R][kVectors * kUnits<A>];
    product<R, kVectors, false>(left, panel, inputs, depth, start, sums[0], kVectors * kUnits<A>);
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
  static __attribute__((noinline)) void product(const Left& left, const E* panel, int64_t inputs, int64_t depth,
                                                const A* start, A* c, int64_t c_stride) {
    accumulate<E, R, kVectors>(
        left, panel, inputs, depth, [&](int, int v) { return load(start + v * kUnits<A>); },
        [&](int r, int v, V sum) {
          A* const to = c + r * c_stride + v * kUnits<A>;
          store(to, kAdd ? sum + load(to) : sum);
        });
  }

  // With few rows or columns a sliver takes more time than it saves.
  bool packs() const {
    return p_.a_transposed ||
           (p_.M >= (p_.panels != nullptr ? kGemmRows : 2 * kSliverRows) && p_.N >= kColumnsToPackFor);
  }

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
