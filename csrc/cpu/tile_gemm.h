// gemm.h's products by tiles: c = start + a @ b, or c += a @ b, of bfloat16 numbers with sums in float32.
//
// As there a worker takes kGemmRows rows of c at a time in blocks along K, so deep that half a panel stays in the
// first-level cache while the rows pass by. Rows that are contiguous are read as they lie; a transposed a is packed in
// tiles, [rows / 16][K / 32][16][32], and weights that are not packed panel by panel. Sums of more than one block along
// K are kept in c, or, where c is narrow or its rows are not whole tiles, in memory of the worker.
#pragma once

#include "tile_product.h"

namespace fusedrnn::FUSEDRNN_ISA {

class TileGemm {
 public:
  using V = Vec<float>;
  static constexpr int64_t kBlocks = 16;  // of 32 numbers, along K: half a panel is 32 KiB
  static constexpr int64_t kTileNumbers = kTileRowsMost * kTileDepth;
  static_assert(kGemmRows % kTileChunk == 0);

  explicit TileGemm(const GemmParams& params) : p_(params), blocks_(params.K / kTilePairs) {}

  // Bytes that run() needs for itself.
  int64_t scratch() const { return own_bytes() + (p_.also != nullptr ? TileGemm(*p_.also).sums_bytes() : 0); }

  // As Gemm::run.
  void run(int64_t m, int64_t m_end, int64_t half, int64_t half_end, void* own) const {
    if (m >= m_end) return;
    Tiles tiles;
    BFloat16* const packed = static_cast<BFloat16*>(own);  // of a, or of a panel's part of b
    char* const sums = static_cast<char*>(own) + packed_bytes();
    int64_t k = 0;
    do {  // also where K = 0, and c is what it starts with
      const int64_t depth = least(blocks_ - k, kBlocks);
      if (p_.a_transposed) pack(m, m_end, k, depth, packed);
      const int64_t halves = p_.panels != nullptr ? half_end - half : 2;  // at a time
      for (int64_t n = half; n < half_end; n += halves) {
        if (p_.panels == nullptr) p_.unpacked->pack(*p_.unpacked, n / 2, k * kTilePairs, depth * kTilePairs, packed);
        columns(tiles, m, m_end, n, least(n + halves, half_end), k, depth, packed, reinterpret_cast<float*>(sums));
      }
      if (p_.also != nullptr) {
        const TileGemm also(*p_.also);
        also.columns(tiles, m, m_end, 0, blocks_of(p_.also->N, kHalf), k, depth, packed,
                     reinterpret_cast<float*>(sums + sums_bytes()));
      }
      k += kBlocks;
    } while (k < blocks_);
  }

 private:
  static constexpr int64_t kHalf = 2 * kUnits<float>;  // columns of a half panel
  struct Target {
    float* at;
    int64_t stride;  // bytes from one row to the next
  };

  static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
  int64_t rows() const { return least(p_.M, kGemmRows); }
  // Of a, or of a panel's part of b.
  int64_t packed_bytes() const {
    if (p_.panels == nullptr) return kBlocks * kTilePairs * kWide<float> * int64_t{sizeof(Pair)};
    if (!p_.a_transposed) return 0;
    return blocks_of(rows(), kTileRowsMost) * least(blocks_, kBlocks) * kTileNumbers * int64_t{sizeof(BFloat16)};
  }
  int64_t sums_bytes() const {
    return sums_in_c() || blocks_ <= kBlocks ? 0 : rows() * blocks_of(p_.N, kHalf) * kHalf * int64_t{sizeof(float)};
  }
  int64_t own_bytes() const { return packed_bytes() + sums_bytes(); }

  // Whether tiles of sums can be kept in c.
  bool sums_in_c() const { return !p_.c_is_narrow && (p_.c_in_blocks || p_.N % kHalf == 0); }

  Target in_c(int64_t row, int64_t half) const {
    float* const c = static_cast<float*>(p_.c);
    if (!p_.c_in_blocks) return {c + row * p_.N + half * kHalf, p_.N * int64_t{sizeof(float)}};
    return {c + (half / 2 * p_.M + row) * kWide<float> + half % 2 * kHalf, kWide<float> * int64_t{sizeof(float)}};
  }

  // Blocks [k, k + depth) of inputs of rows [m, m_end) and these half panels: by two tiles of rows, and what is left by
  // single ones. Rows of c are written one after the other if all of b stays near.
  void columns(Tiles& tiles, int64_t m, int64_t m_end, int64_t half, int64_t half_end, int64_t k, int64_t depth,
               const BFloat16* packed, float* own) const {
    const int64_t whole = m_end - (m_end - m) % kTileChunk;
    const bool is_near = p_.panels != nullptr && depth * kTilePairs * p_.N <= kNearNumbers;
    const int64_t rows_at_a_time = is_near ? kTileChunk : whole - m;
    if (m < whole) tiles.configure(kTileRowsMost);
    for (int64_t first = m; first < whole; first += rows_at_a_time) {
      for (int64_t n = half; n < half_end; ++n) {
        for (int64_t row = first; row < first + rows_at_a_time; row += kTileChunk) {
          tile<true>(m, row, kTileRowsMost, n, k, depth, packed, own);
        }
      }
    }
    for (int64_t row = whole; row < m_end; row += kTileRowsMost) {
      const int64_t rows = least(m_end - row, kTileRowsMost);
      tiles.configure(rows);
      for (int64_t n = half; n < half_end; ++n) tile<false>(m, row, rows, n, k, depth, packed, own);
    }
  }

  // One tile of `rows` rows from `first` on, or kTwo of them; a worker's rows begin with m.
  template <bool kTwo>
  void tile(int64_t m, int64_t first, int64_t rows, int64_t n, int64_t k, int64_t depth, const BFloat16* packed,
            float* own) const {
    const int64_t second = first + kTileRowsMost;
    const int64_t own_stride = blocks_of(p_.N, kHalf) * kHalf;
    const auto kept = [&](int64_t row) {
      if (sums_in_c()) return in_c(row, n);
      return Target{own + (row - m) * own_stride + n * kHalf, own_stride * int64_t{sizeof(float)}};
    };
    const Target at = kept(first), at_second = kept(second);
    if (k > 0 || (p_.accumulate && sums_in_c())) {
      start<0>(at.at, at.stride);
      if (kTwo) start<2>(at_second.at, at_second.stride);
    } else {
      const float* const from = p_.start == nullptr ? nullptr : static_cast<const float*>(p_.start) + n * kHalf;
      start<0>(from, 0);
      if (kTwo) start<2>(from, 0);
    }
    add_half<kTwo>(operand(first, second, m, n, k, depth, packed), n % 2 * 2, [] {});
    if (k + depth < blocks_ || sums_in_c()) {
      store<0>(at.at, at.stride);
      if (kTwo) store<2>(at_second.at, at_second.stride);
    } else {
      finish<0>(first, rows, n);
      if (kTwo) finish<2>(second, rows, n);
    }
  }

  template <int kSum>
  static FUSEDRNN_INLINE void start(const float* from, int64_t stride) {
    start_tile<kSum>(from, 0, stride);
    start_tile<kSum + 1>(from, 1, stride);
  }
  template <int kSum>
  static FUSEDRNN_INLINE void store(float* to, int64_t stride) {
    store_tile<kSum>(to, stride);
    store_tile<kSum + 1>(to + kUnits<float>, stride);
  }

  TileOperand operand(int64_t first, int64_t second, int64_t m, int64_t n, int64_t k, int64_t depth,
                      const BFloat16* packed) const {
    // Inputs of the panel, and the block of them to begin with.
    const bool unpacked = p_.panels == nullptr;
    const int64_t inputs = unpacked ? depth * kTilePairs : p_.K, begin = unpacked ? 0 : k;
    const Pair* const panel = unpacked ? reinterpret_cast<const Pair*>(packed)
                                       : static_cast<const Pair*>(p_.panels) + n / 2 * inputs * kWide<float>;
    if (p_.a_transposed) {
      const auto at = [&](int64_t row) { return packed + (row - m) / kTileRowsMost * depth * kTileNumbers; };
      return {at(first), at(second), kTileBytes, kTileNumbers * int64_t{sizeof(BFloat16)}, panel, inputs, begin, depth};
    }
    const auto at = [&](int64_t row) {
      return static_cast<const BFloat16*>(p_.a) + row * p_.a_stride + k * kTileDepth;
    };
    return {at(first), at(second), p_.a_stride * int64_t{sizeof(BFloat16)}, kTileBytes, panel, inputs, begin, depth};
  }

  // Writes the complete sums of a tile of rows to c.
  template <int kSum>
  FUSEDRNN_INLINE void finish(int64_t row, int64_t rows, int64_t n) const {
    V sums[kTileRowsMost][2];
    store<kSum>(reinterpret_cast<float*>(sums), sizeof(sums[0]));
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t v = 0; v < 2; ++v) {
        const int64_t column = n * kHalf + v * kUnits<float>, count = p_.N - column, at = (row + r) * p_.N + column;
        if (count <= 0) break;
        if (p_.accumulate) sums[r][v] += load(static_cast<float*>(p_.c) + at, count);  // which is not narrow then
        if (p_.c_is_narrow) {
          fusedrnn::FUSEDRNN_ISA::store(static_cast<BFloat16*>(p_.c) + at, sums[r][v], count);
        } else {
          fusedrnn::FUSEDRNN_ISA::store(static_cast<float*>(p_.c) + at, sums[r][v], count);
        }
      }
    }
  }

  // Columns [m, m_end) of memory, which are rows of a, of blocks [k, k + depth): 32 numbers of each by 16 at a time, of
  // which two that follow each other are a pair.
  void pack(int64_t m, int64_t m_end, int64_t k, int64_t depth, BFloat16* to) const {
    for (int64_t block = k; block < k + depth; ++block) {
      for (int64_t row = m; row < m_end; row += kTileRowsMost) {
        BFloat16* const tile = to + ((row - m) / kTileRowsMost * depth + block - k) * kTileNumbers;
        V pairs[kTilePairs];
        for (int64_t i = 0; i < kTilePairs; ++i) {
          const auto numbers = [&](int64_t step) {
            if (step >= p_.a_rows) return V{};
            return load(static_cast<const BFloat16*>(p_.a) + step * p_.a_stride + row, m_end - row);
          };
          const int64_t step = block * kTileDepth + 2 * i;
          pairs[i] = paired(numbers(step), numbers(step + 1));
        }
        transpose<float>(pairs);
        for (int64_t r = 0; r < kTileRowsMost; ++r) {
          fusedrnn::FUSEDRNN_ISA::store(reinterpret_cast<float*>(tile) + r * kTilePairs, pairs[r]);
        }
      }
    }
  }

  const GemmParams& p_;
  const int64_t blocks_;  // of 32 numbers along K
};

}  // namespace fusedrnn::FUSEDRNN_ISA
