// Packing of w_hh, w_hr and w_ih into the fragments that math.h describes: [D][tile][K block][segment][lane] of 16
// bytes.
//
//   product            output row r of segment s of a tile       index k of K
//   forward, w_hh      unit 8 tile + r, gate s                   output k
//   forward, w_hr      output 16 tile + 8 s + r                  unit k
//   forward, w_ih      as w_hh                                   number k of x
//   backward, w_hh     output 16 tile + 8 s + r                  of every eight units, their gates i, then f, g, o
//   backward, w_hr     unit 16 tile + 8 s + r                    output k
//
// An output is a number of h: a unit, without a projection. What lies outside of the matrix is zero.
// Grid: any; a thread packs every (number of threads)-th quad. Reads and writes global memory only.
#pragma once

#include "params.h"

namespace fusedrnn::cuda {

struct PackParams {
  Sizes sizes;
  Math math;
  Pass pass;
  Stage stage;
  const void* w[2];    // S, one for each direction: w_hh, [4H] rows of [P]; w_hr, [P] rows of [H]; or w_ih, [4H] of [I]
  int64_t row_stride;  // elements between rows; both directions
  void* packed;        // packed_bytes() of plan.h, aligned to 16
  int64_t threads;     // of the launch
};

struct Place {
  int64_t row, column;
};

// Where the number at index k of K for output row `row` of segment `segment` of a tile comes from; outside of the
// matrix for none.
template <Pass kPass, Stage kStage>
FUSEDRNN_DEVICE Place place(const Sizes& sizes, int64_t tile, int segment, int row, int64_t k) {
  const int64_t wide = tile * 16 + segment * 8 + row;
  if constexpr (kStage == Stage::kProjection) return kPass == Pass::kForward ? Place{wide, k} : Place{k, wide};
  const int64_t gate = kPass == Pass::kForward ? segment : k / 8 % 4;
  const int64_t unit = kPass == Pass::kForward ? tile * 8 + row : k / 32 * 8 + k % 8;
  return {unit < sizes.H ? gate * sizes.H + unit : 4 * sizes.H, kPass == Pass::kForward ? k : wide};
}

template <Pass kPass, Stage kStage, class Bits>
FUSEDRNN_DEVICE void pack(const PackParams& p, int64_t first) {
  constexpr int kPerQuad = sizeof(Quad) / sizeof(Bits);
  const Product product = cuda::product(kPass, kStage, p.sizes, p.math);
  const int64_t blocks = product.operand.blocks(), all = p.sizes.D * product.packed_quads();
  const int64_t rows = kStage == Stage::kProjection ? p.sizes.P : 4 * p.sizes.H;
  const int64_t columns = kStage == Stage::kRecurrent    ? p.sizes.P
                          : kStage == Stage::kProjection ? p.sizes.H
                                                         : p.sizes.I;
  for (int64_t n = first; n < all; n += p.threads) {
    const int lane = static_cast<int>(n % kWarp), segment = static_cast<int>(n / kWarp % product.segments);
    const int64_t fragment = n / kWarp / product.segments, block = fragment % blocks;
    const int64_t tile = fragment / blocks % product.tiles, d = fragment / blocks / product.tiles;
    const Bits* w = static_cast<const Bits*>(p.w[d]);
    union {
      Quad quad;
      Bits numbers[kPerQuad];
    };
    FUSEDRNN_UNROLL for (int e = 0; e < kPerQuad; ++e) {
      const int64_t k = (block * 4 + lane % 4) * kPerQuad + e;
      const Place from = place<kPass, kStage>(p.sizes, tile, segment, lane / 4, k);
      numbers[e] = from.row < rows && from.column < columns ? w[from.row * p.row_stride + from.column] : Bits{0};
    }
    static_cast<Quad*>(p.packed)[n] = quad;
  }
}

template <Pass kPass, Stage kStage>
FUSEDRNN_DEVICE void pack(const PackParams& p, int64_t first) {
  switch (storage_bytes(p.math)) {
    case 2: return pack<kPass, kStage, uint16_t>(p, first);
    case 4: return pack<kPass, kStage, uint32_t>(p, first);
    default: return pack<kPass, kStage, uint64_t>(p, first);
  }
}

// `first` is the index of the thread in the launch.
FUSEDRNN_DEVICE void pack(const PackParams& p, int64_t first) {
  const bool recurrent = p.stage == Stage::kRecurrent;
  if (p.stage == Stage::kInput) {
    pack<Pass::kForward, Stage::kInput>(p, first);
  } else if (p.pass == Pass::kForward) {
    recurrent ? pack<Pass::kForward, Stage::kRecurrent>(p, first) : pack<Pass::kForward, Stage::kProjection>(p, first);
  } else {
    recurrent ? pack<Pass::kBackward, Stage::kRecurrent>(p, first)
              : pack<Pass::kBackward, Stage::kProjection>(p, first);
  }
}

}  // namespace fusedrnn::cuda
