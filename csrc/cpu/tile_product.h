// Matrix products by tiles: rows of bfloat16 times panels of pairs (panel.h), whose layout a tile reads as it lies: 16
// pairs of inputs, two vectors apart, of the 16 outputs of one vector.
//
// Up to 32 rows are two left operands, and a half panel two right ones: four products for four loads. Up to 16 rows are
// one left operand with all four vectors. Where rows do not fill the last tile it begins earlier, and computes some
// rows a second time, to the same bits: nothing beyond the rows is read or written.
//
// While the matrix unit works the processor has time for other instructions: `between` is called after each block of 32
// inputs, and does some of what follows the product before this one.
#pragma once

#include "panel.h"
#include "tiles.h"

namespace fusedrnn::FUSEDRNN_ISA {

constexpr int64_t kTileChunk = 2 * kTileRowsMost;  // rows of a product

// A left operand and the panel it is multiplied with. The rows of a block of inputs lie `stride` bytes apart, and the
// next block `step` bytes further. `second` is the row that the second tile begins with.
struct TileOperand {
  const void* first;
  const void* second;
  int64_t stride, step;
  const Pair* panel;
  int64_t inputs;         // pairs of a panel
  int64_t begin, blocks;  // blocks of 16 pairs, from this one on
};

// Initial values of the sums: 64 numbers for each row, rows `stride` bytes apart (0: the same for all); null for zeros.
struct TileStart {
  const float* first;
  const float* second;
  int64_t stride;
};

template <int kSum>
FUSEDRNN_INLINE void start_tile(const float* from, int64_t v, int64_t stride) {
  if (from == nullptr) return zero_tile<kSum>();
  load_tile<kSum>(from + v * kUnits<float>, stride);
}

constexpr int64_t kPairBytes = 2 * kUnits<float> * sizeof(Pair);  // from one pair of a half panel to the next

FUSEDRNN_INLINE const char* tile_of_panel(const TileOperand& operand, int64_t v) {
  return reinterpret_cast<const char*>(operand.panel + in_panel<float>(operand.inputs, operand.begin * kTilePairs, v));
}

// Sums 0 and 1, of the first tile of rows, and 2 and 3, of the second where there are kTwo, += rows @ a half panel.
template <bool kTwo, class Between>
FUSEDRNN_INLINE void add_half(const TileOperand& operand, int64_t half, const Between& between) {
  const char *first = static_cast<const char*>(operand.first), *second = static_cast<const char*>(operand.second);
  const char* panel = tile_of_panel(operand, half);
  for (int64_t k = 0; k < operand.blocks; ++k) {
    load_tile<4>(first, operand.stride);
    load_tile<6>(panel, kPairBytes);
    multiply_tiles<0, 4, 6>();
    load_tile<7>(panel + kTileBytes, kPairBytes);
    multiply_tiles<1, 4, 7>();
    if constexpr (kTwo) {
      load_tile<5>(second, operand.stride);
      multiply_tiles<2, 5, 6>();
      multiply_tiles<3, 5, 7>();
      second += operand.step;
    }
    between();
    first += operand.step;
    panel += kTilePairs * kPairBytes;
  }
}

// Sums 0 to 3, of the only tile of rows, += rows @ both halves of a panel.
template <class Between>
FUSEDRNN_INLINE void add_whole(const TileOperand& operand, const Between& between) {
  const char* first = static_cast<const char*>(operand.first);
  const char *low = tile_of_panel(operand, 0), *high = tile_of_panel(operand, 2);
  for (int64_t k = 0; k < operand.blocks; ++k) {
    load_tile<4>(first, operand.stride);
    load_tile<6>(low, kPairBytes);
    multiply_tiles<0, 4, 6>();
    load_tile<7>(low + kTileBytes, kPairBytes);
    multiply_tiles<1, 4, 7>();
    load_tile<6>(high, kPairBytes);
    multiply_tiles<2, 4, 6>();
    load_tile<7>(high + kTileBytes, kPairBytes);
    multiply_tiles<3, 4, 7>();
    between();
    first += operand.step;
    low += kTilePairs * kPairBytes;
    high += kTilePairs * kPairBytes;
  }
}

// sum[r] = start + rows @ panel, added up for all operands, for r in [0, rows), rows at most kTileChunk; `tiles` is
// configured for as many rows, or 16.
template <class Between>
inline void multiply_by_tiles(Vec<float> (*sum)[4], const TileStart& start, const TileOperand* operands, int count,
                              int64_t rows, const Between& between) {
  constexpr int64_t kStride = sizeof(sum[0]);
  float* const to = reinterpret_cast<float*>(sum);
  if (rows <= kTileRowsMost) {
    start_tile<0>(start.first, 0, start.stride);
    start_tile<1>(start.first, 1, start.stride);
    start_tile<2>(start.first, 2, start.stride);
    start_tile<3>(start.first, 3, start.stride);
    for (int k = 0; k < count; ++k) add_whole(operands[k], between);
    store_tile<0>(to, kStride);
    store_tile<1>(to + kUnits<float>, kStride);
    store_tile<2>(to + 2 * kUnits<float>, kStride);
    store_tile<3>(to + 3 * kUnits<float>, kStride);
    return;
  }
  float* const second = reinterpret_cast<float*>(sum + (rows - kTileRowsMost));
  for (int64_t half = 0; half < 4; half += 2) {
    start_tile<0>(start.first, half, start.stride);
    start_tile<1>(start.first, half + 1, start.stride);
    start_tile<2>(start.second, half, start.stride);
    start_tile<3>(start.second, half + 1, start.stride);
    for (int k = 0; k < count; ++k) add_half<true>(operands[k], half, between);
    store_tile<0>(to + half * kUnits<float>, kStride);
    store_tile<1>(to + (half + 1) * kUnits<float>, kStride);
    store_tile<2>(second + half * kUnits<float>, kStride);
    store_tile<3>(second + (half + 1) * kUnits<float>, kStride);
  }
}

// The products of some panels that are computed, and what follows those before: a Rest has so many groups() of rows
// left, and step() does one.
template <class Rest, int64_t kPanels>
class TilePipeline {
 public:
  Tiles tiles;

  // Where the sums of the next products go, panel after panel.
  Vec<float> (*sums()) [kTileChunk][4] { return sums_[next_]; }

  // Runs multiply(between), products in `blocks` blocks, into sums(); `rest` follows it.
  template <class Multiply>
  FUSEDRNN_INLINE void run(int64_t blocks, const Multiply& multiply, const Rest& rest) {
    int64_t due = 0;
    const int64_t groups = rest_.groups();
    multiply([&] {
      due += groups;
      if (due >= blocks) {
        due -= blocks;
        rest_.step();
      }
    });
    finish();
    rest_ = rest;
    next_ = 1 - next_;
  }

  void finish() {
    while (rest_.groups() > 0) rest_.step();
  }

 private:
  Vec<float> sums_[2][kPanels][kTileChunk][4];
  int next_ = 0;
  Rest rest_;
};

// Where there are no tiles.
struct NoPipeline {
  void finish() {}
};

}  // namespace fusedrnn::FUSEDRNN_ISA
