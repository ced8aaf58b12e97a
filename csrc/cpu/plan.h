// The plan of a launch: number of threads, how they split the work, and what is packed before. The constants are
// measured: docs/cpu_performance.md.
#pragma once

#include <unistd.h>

#include <algorithm>

#include "params.h"

namespace fusedrnn {

constexpr double kSerialFlops = 5e5;             // below this a parallel region costs more than it saves
constexpr int64_t kSerialStep = 10000;           // multiply-adds of a step, below which it is shorter than a barrier
constexpr int64_t kSmallCacheBytes = 512 << 10;  // of a second-level cache
constexpr int64_t kEnoughRows = 4;               // of a worker, to read weights faster than it multiplies by them
constexpr int64_t kWideVector = 64;              // bytes, of AVX-512: few rows fill a tile
constexpr int64_t kShortStep = 25000;            // multiply-adds of a step, below which half of it is about a barrier
constexpr int64_t kChunkBytes = 8 << 20;         // chunk size of the input projection in inference
// Steps times batch rows, up to which packing weights costs more than it saves.
constexpr int64_t kUnpackedRows = 16;
// The same for pairs, whose dot products have no instruction for unpacked weights; inference caches packed weights.
constexpr int64_t kUnpackedTrainedPairs = 15, kUnpackedPairs = 3;
constexpr int64_t kDotStepRows = 32;  // rows of a single step, above which its weights are packed in cache

// Bytes of a core's second-level cache; a small one where the system does not tell.
inline int64_t l2_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t bytes = std::max<int64_t>(kSmallCacheBytes, sysconf(_SC_LEVEL2_CACHE_SIZE));
  return bytes;
#else
  return kSmallCacheBytes;
#endif
}

// Whether the weights are used unpacked, except those of a projection.
inline bool is_short(const Sizes& s, const Kernels& kernels, bool training) {
  return s.N <= (!kernels.take_pairs() ? kUnpackedRows : training ? kUnpackedTrainedPairs : kUnpackedPairs);
}

// Whether there are enough rows for full tiles of matrix instructions.
inline bool fills_tiles(const Sizes& s, const Kernels& kernels) {
  return kernels.operands == Operands::kTiles && s.B >= kernels.tile_rows / 2;
}

// Bytes of a number of packed weights.
inline int64_t weight_bytes(const Kernels& kernels, bool is_double) {
  return kernels.take_pairs() ? 2 : is_double ? 8 : 4;
}

// Whether the input projection is fused into the launch, so that its results are not written and read. With full tiles
// a separate GEMM is no faster. Otherwise it is, because it reads w_ih once for many steps: so w_ih has to stay in a
// core's cache beside w_hh, and a worker's rows have to fill a tile. Training writes and reads maps anyway. The bits
// are the same, so this may depend on the number of threads.
inline bool fuses_input(const Sizes& s, const CellSpec& cell, const Kernels& kernels, const Team& team, bool is_double,
                        bool training) {
  if (kernels.operands == Operands::kTiles) return fills_tiles(s, kernels);
  const int64_t bytes = cell.gates * s.H * s.I * weight_bytes(kernels, is_double);
  const int64_t rows = team.split == Team::Split::kUnits ? s.B : std::min(s.B, s.D * s.B / team.workers);
  const int64_t least = kernels.lanes * (is_double ? 8 : 4) == kWideVector ? kEnoughRows : kernels.tile_rows;
  return !training && rows >= least && s.I <= kFusedInputs && bytes <= l2_bytes() / 8;
}

// Number of chunks of units that workers share in a split by units: see ForwardParams.
inline int64_t shared_blocks(const Sizes& s, const CellSpec& cell, const Kernels& kernels) {
  return blocks_of(blocks_of(s.H, kernels.lanes), chunk_blocks(cell.gates));
}

// Rows of a single step up to which its products are sums along K, with the weights as they lie.
inline int64_t dot_rows(const Kernels& kernels) { return kernels.take_pairs() ? kUnpackedPairs : kDotStepRows; }

// Whether a product reads its weights as they lie, and workers pack them in their caches: each weight is read once
// then. Not by the number of threads, on which no bit may depend: blocks along K are others.
inline bool packs_in_cache(int64_t rows) { return rows <= kGemmRows; }
inline bool packs_in_cache(const Sizes& s) { return s.T == 1 && !s.projected && packs_in_cache(s.B); }

// Parts of such a product's rows, if its panels or chunks are fewer than threads: each part packs the weights again.
inline int64_t row_parts(int64_t rows, int64_t panels, int64_t threads) {
  constexpr int64_t kRowsOfPart = 24;
  return std::max<int64_t>(1, std::min(threads / panels, rows / kRowsOfPart));
}

// A split by rows needs no synchronisation. A split by units is used with fewer rows than threads, if a step is long
// compared with a barrier; and if the weights do not stay in a core's cache between steps, so that each core reads only
// its part. They may take half of the second-level cache, beside the rows; of a small one all, if each worker's
// rows fill a tile; and where a worker has so few rows that it waits for the weights, they have to be fewer.
// A split by units needs several blocks for each worker for balance; with fewer, rows that fill tiles are better.
inline Team plan_team(const Sizes& s, const CellSpec& cell, const Kernels& kernels, bool is_double, int64_t threads) {
  const int64_t G = cell.gates;
  const double flops = 2.0 * s.N * s.D * s.H * (G * s.P + (s.projected ? s.P : 0));
  if (flops < kSerialFlops) threads = 1;
  const int64_t rows = s.D * s.B, units = s.D * shared_blocks(s, cell, kernels);
  if (rows * G * s.H * s.P < kSerialStep) threads = std::min(threads, rows);
  const int64_t weights = G * s.H * s.P * (is_double ? 8 : 4), half = l2_bytes() / 2;
  const bool fill_tiles = rows >= threads * kernels.tile_rows, are_few = units < 4 * threads;
  const int64_t most = std::max(kSmallCacheBytes, half);
  // With matrix instructions a few rows cost as much as a tile: fewer units for each worker are better.
  const bool enough = kernels.operands != Operands::kTiles && rows >= threads * kEnoughRows;
  const bool are_near = are_few      ? fill_tiles || weights <= most
                        : fill_tiles ? weights <= most
                                     : weights < (enough ? half : kSmallCacheBytes / 2);
  const bool by_rows = threads == 1 || (rows >= threads && are_near);
  return {by_rows ? Team::Split::kRows : Team::Split::kUnits,
          static_cast<int>(std::min(threads, by_rows ? rows : units)), nullptr};
}

// Steps of a layer that a worker computes at a time where layers of a stack are computed at the same time: long enough
// to be begun for, and few, because at first and at the end workers wait.
inline int64_t pipelined_steps(const Sizes& s, const CellSpec& cell) {
  constexpr int64_t kLeastSteps = 8, kMostParts = 24;
  const double flops = 2.0 * s.B * cell.gates * s.H * (s.I + s.P);
  const auto enough = static_cast<int64_t>(kSerialFlops / std::max(flops, 1.0));
  return std::max({kLeastSteps, blocks_of(s.T, kMostParts), enough});
}

// Whether that is faster for a stack of one direction than layer after layer, each by the whole team: where a step is
// shared by units, but is about as short as a barrier; or by rows, of which a worker has too few for the weights that
// it reads. The weights of a layer, all of which a worker then reads, have to stay in its cache.
inline bool pipelines_layers(const Sizes& s, const CellSpec& cell, const Kernels& kernels, const Team& team,
                             bool is_double, int64_t layers, int64_t threads) {
  if (layers < 2 || s.D > 1 || threads < 2 || team.workers > layers || s.T < 2 * pipelined_steps(s, cell)) return false;
  if (is_short(s, kernels, false) || fills_tiles(s, kernels)) return false;
  const int64_t maps = cell.gates * s.H;
  if (maps * (s.I + s.P) * weight_bytes(kernels, is_double) > std::max(kSmallCacheBytes, l2_bytes() / 2)) return false;
  return team.split == Team::Split::kUnits ? s.B * maps * s.P < kShortStep : s.B <= kEnoughRows * team.workers;
}

}  // namespace fusedrnn
