// The plan of a launch: number of threads, how they split the work, and what is packed before. The constants are
// measured: docs/cpu_performance.md.
#pragma once

#include <algorithm>

#include "params.h"

namespace fusedrnn {

constexpr double kSerialFlops = 5e5;        // below this a parallel region costs more than it saves
constexpr int64_t kSerialStep = 10000;      // multiply-adds of a step, below which it is shorter than a barrier
constexpr int64_t kCacheBytes = 512 << 10;  // bytes of weights that stay in a core's cache between steps
constexpr int64_t kChunkBytes = 8 << 20;    // chunk size of the input projection in inference
// Steps times batch rows, up to which packing weights costs more than it saves.
constexpr int64_t kUnpackedRows = 16;
// The same for pairs, whose dot products have no instruction for unpacked weights; inference caches packed weights.
constexpr int64_t kUnpackedTrainedPairs = 15, kUnpackedPairs = 3;

// Whether the weights are used unpacked, except those of a projection.
inline bool is_short(const Sizes& s, const Kernels& kernels, bool training) {
  return s.N <= (!kernels.take_pairs() ? kUnpackedRows : training ? kUnpackedTrainedPairs : kUnpackedPairs);
}

// Whether the input projection is fused into the launch: with full tiles a separate GEMM is no faster, and it would
// write and read the results.
inline bool fuses_input(const Sizes& s, const Kernels& kernels) {
  return kernels.operands == Operands::kTiles && s.B >= kernels.tile_rows / 2;
}

// Number of chunks of units that workers share in a split by units: see ForwardParams.
inline int64_t shared_blocks(const Sizes& s, const CellSpec& cell, const Kernels& kernels) {
  return blocks_of(blocks_of(s.H, kernels.lanes), chunk_blocks(cell.gates));
}

// A split by rows needs no synchronisation. A split by units is used with fewer rows than threads, if a step is long
// compared with a barrier; and if the weights do not fit a core's cache, so that each core streams only its part. The
// limit is half the cache where a worker's rows do not fill a tile, because the tile then waits for loads. A split by
// units needs several blocks for each worker for balance; with fewer, rows that fill tiles are better.
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
