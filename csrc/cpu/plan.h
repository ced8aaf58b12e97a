// How many threads share one launch, and how, and what is done before it. docs/cpu_performance.md has the measurements
// behind the constants.
#pragma once

#include <algorithm>

#include "params.h"

namespace fusedrnn {

constexpr double kSerialFlops = 5e5;        // below this a parallel region costs more than it brings
constexpr int64_t kSerialStep = 10000;      // multiply-adds of a step, below which it takes less than to meet after it
constexpr int64_t kCacheBytes = 512 << 10;  // what a core keeps of the weights from one step to the next
constexpr int64_t kChunkBytes = 8 << 20;    // of the input's affine maps, where they need not be kept
// Steps times batch rows, up to which packing weights costs more than it brings.
constexpr int64_t kUnpackedRows = 16;
// The same for pairs, where dot products of numbers have no instruction: in inference packed weights are kept.
constexpr int64_t kUnpackedTrainedPairs = 15, kUnpackedPairs = 3;

// Whether the weights are read as they lie, and nothing is packed but a projection.
inline bool is_short(const Sizes& s, const Kernels& kernels, bool training) {
  return s.N <= (!kernels.take_pairs() ? kUnpackedRows : training ? kUnpackedTrainedPairs : kUnpackedPairs);
}

// Whether the input's affine maps belong into the launch: tiles that are full there would be no faster before it, and
// the maps would have to be written and read.
inline bool fuses_input(const Sizes& s, const Kernels& kernels) {
  return kernels.operands == Operands::kTiles && s.B >= kernels.tile_rows / 2;
}

// Blocks of `lanes` units that a worker takes at a time, where units are shared: see ForwardParams.
inline int64_t shared_blocks(const Sizes& s, const CellSpec& cell, const Kernels& kernels) {
  return blocks_of(blocks_of(s.H, kernels.lanes), chunk_blocks(cell.gates));
}

// Rows need no synchronisation; units are shared where there are fewer rows than threads, and steps long enough to meet
// after each; or where a core would read the weights from afar, of which each then streams its part alone: those that
// do not fit its cache, and half as many where its rows do not fill a tile, which then waits for what it reads. That
// takes some blocks of units for each of them, to share evenly; with fewer, rows that fill tiles are better.
inline Team plan_team(const Sizes& s, const CellSpec& cell, const Kernels& kernels, bool is_double, int64_t threads) {
  const int64_t G = cell.gates;
  const double flops = 2.0 * s.N * s.D * s.H * (G * s.P + (s.projected ? s.P : 0));
  if (flops < kSerialFlops) threads = 1;
  const int64_t rows = s.D * s.B, units = s.D * shared_blocks(s, cell, kernels);
  if (rows * G * s.H * s.P < kSerialStep) threads = std::min(threads, rows);
  const int64_t weights = G * s.H * s.P * (is_double ? 8 : 4);
  const bool fill_tiles = rows >= threads * kernels.tile_rows, are_few = units < 4 * threads;
  const bool are_near = are_few      ? fill_tiles || weights <= kCacheBytes
                        : fill_tiles ? weights <= kCacheBytes
                                     : weights < kCacheBytes / 2;
  const bool by_rows = threads == 1 || (rows >= threads && are_near);
  return {by_rows ? Team::Split::kRows : Team::Split::kUnits,
          static_cast<int>(std::min(threads, by_rows ? rows : units)), nullptr};
}

}  // namespace fusedrnn
