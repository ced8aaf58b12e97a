// Packing of w_hh, w_hr and w_ih into the fragments that math.h describes: [D][tile][K block][segment][lane] of 16
// bytes.
//
//   product            output row r of segment s of a tile       index k of K
//   forward, w_hh      unit 8 tile + r, gate of the s-th map     output k
//   forward, w_hr      output 16 tile + 8 s + r                  unit k
//   forward, w_ih      as w_hh                                   number k of x
//   backward, w_hh     output 16 tile + 8 s + r                  of every eight units, gate after gate, map after map
//   backward, w_hr     unit 16 tile + 8 s + r                    output k
//
// The maps are those that the product fills. Of a plan that scatters, the units of each block begin with a K block. An
// output is a number of h: a unit, without a projection. What lies outside of the matrix is zero. Numbers are
// rounded to what the matrix unit takes. Grid: any; a thread packs every (number of threads)-th quad. Reads and writes
// global memory only.
#pragma once

#include <type_traits>

#include "math.h"
#include "params.h"

namespace fusedrnn::cuda {

struct PackParams {
  Sizes sizes;
  Plan plan;
  Pass pass;
  Stage stage;
  const void* w[2];    // S, one for each direction: w_hh, [GH] rows of [P]; w_hr, [P] rows of [H]; or w_ih, [GH] of [I]
  int64_t row_stride;  // elements between rows; both directions
  void* packed;        // packed_bytes() of plan.h, aligned to 16
  int64_t threads;     // of the launch
};

// Numbers next to each other.
template <class Bits>
struct alignas(2 * sizeof(Bits)) Pair {
  Bits number[2];
};
template <class Bits>
union PackedQuad {
  Quad quad;
  Bits number[sizeof(Quad) / sizeof(Bits)];
};

// The block of H rows that the k-th map of a product has. Of a runtime cell, so without an array to index.
FUSEDRNN_DEVICE int gate_of(const CellSpec& cell, Stage stage, int k) {
  const MapWindow& maps = stage == Stage::kInput ? cell.input : cell.recurrent;
  int gate = maps.gates[0];
  FUSEDRNN_UNROLL for (int m = 1; m < kMostMaps; ++m) gate = k == m ? maps.gates[m] : gate;
  return gate;
}

// The quads of one lane in a fragment, of a product whose K runs along the rows of the matrix: in the forward.
template <Stage kStage, class Bits>
class AlongRows {
 public:
  FUSEDRNN_DEVICE AlongRows(const PackParams& p)
      : cell_(spec_of(p.plan.cell)),
        H_(static_cast<int>(p.sizes.H)),
        rows_(static_cast<int>(p.sizes.P)),
        columns_(static_cast<int>(kStage == Stage::kRecurrent    ? p.sizes.P
                                  : kStage == Stage::kProjection ? p.sizes.H
                                                                 : p.sizes.I)),
        stride_(p.row_stride),
        aligned_(
            (p.row_stride * sizeof(Bits) | reinterpret_cast<uintptr_t>(p.w[0]) | reinterpret_cast<uintptr_t>(p.w[1])) %
                sizeof(Quad) ==
            0) {}

  // f(segment, lane, quad) for each.
  template <class F>
  FUSEDRNN_DEVICE void for_each(const Bits* w, int tile, int block, int lane, const F& f) const {
    constexpr int kPerQuad = sizeof(Quad) / sizeof(Bits), kMost = kStage == Stage::kProjection ? 2 : kMostMaps;
    const int k = (block * 4 + lane % 4) * kPerQuad, left = columns_ - k;
    const int count = segments(cell_, Pass::kForward, kStage);
    PackedQuad<Bits> of[kMost];
    FUSEDRNN_UNROLL for (int s = 0; s < kMost; ++s) {
      const int unit = tile * 8 + lane / 4, output = tile * 16 + s * 8 + lane / 4;
      const bool exists = s < count && (kStage == Stage::kProjection ? output < rows_ : unit < H_);
      const int row = kStage == Stage::kProjection ? output : gate_of(cell_, kStage, s) * H_ + unit;
      const Bits* from = w + row * stride_ + k;
      of[s].quad = Quad{{0, 0, 0, 0}};
      if (exists && aligned_ && left >= kPerQuad) {
        of[s].quad = *reinterpret_cast<const Quad*>(from);
      } else if (exists) {
        FUSEDRNN_UNROLL for (int e = 0; e < kPerQuad; ++e) of[s].number[e] = e < left ? from[e] : Bits{0};
      }
    }
    FUSEDRNN_UNROLL for (int s = 0; s < kMost; ++s) {
      if (s < count) f(s, lane, of[s].quad);
    }
  }

 private:
  const CellSpec cell_;
  int H_, rows_, columns_;
  int64_t stride_;
  bool aligned_;
};

// Packs a matrix with K along its columns, for the backward. A lane loads two columns of all rows of a quad, which
// become two quads of other lanes.
template <Stage kStage, class Bits>
class AlongColumns {
 public:
  FUSEDRNN_DEVICE AlongColumns(const PackParams& p)
      : cell_(spec_of(p.plan.cell)),
        gates_(width(cell_.recurrent)),
        units_(p.plan.exchange == Exchange::kScatter ? p.plan.tiles * 16 : INT32_MAX / 8),
        blocks_(p.plan.exchange == Exchange::kScatter ? scatter_blocks(cell_, p.plan.math, p.plan.tiles) : INT32_MAX),
        H_(static_cast<int>(p.sizes.H)),
        rows_(static_cast<int>(p.sizes.P)),
        columns_(static_cast<int>(kStage == Stage::kRecurrent ? p.sizes.P : p.sizes.H)),
        stride_(p.row_stride),
        aligned_(
            (p.row_stride * sizeof(Bits) | reinterpret_cast<uintptr_t>(p.w[0]) | reinterpret_cast<uintptr_t>(p.w[1])) %
                sizeof(Pair<Bits>) ==
            0) {}

  template <class F>
  FUSEDRNN_DEVICE void for_each(const Bits* w, int tile, int block, int lane, const F& f) const {
    constexpr int kPerQuad = sizeof(Quad) / sizeof(Bits);
    // A quad is less than eight units of one gate, or as many numbers of h.
    int row = (block * 4 + lane % 4) * kPerQuad, left = rows_ - row;
    if constexpr (kStage == Stage::kRecurrent) {
      const int section = block / blocks_, k = row - section * blocks_ * (4 * kPerQuad), of_section = k / 8;
      const int unit = of_section / gates_ * 8 + k % 8;
      row = gate_of(cell_, kStage, of_section % gates_) * H_ + section * units_ + unit;
      left = unit < units_ ? H_ - section * units_ - unit : 0;
    }
    const int first = lane / 4 * 2, column = tile * 16 + first;
    const Bits* from = w + row * stride_ + column;
    PackedQuad<Bits> of[2];
    FUSEDRNN_UNROLL for (int e = 0; e < kPerQuad; ++e, from += stride_) {
      Pair<Bits> both = {{0, 0}};
      if (e < left && aligned_ && column + 1 < columns_) {
        both = *reinterpret_cast<const Pair<Bits>*>(from);
      } else if (e < left) {
        FUSEDRNN_UNROLL for (int j = 0; j < 2; ++j) both.number[j] = column + j < columns_ ? from[j] : Bits{0};
      }
      FUSEDRNN_UNROLL for (int j = 0; j < 2; ++j) of[j].number[e] = both.number[j];
    }
    FUSEDRNN_UNROLL for (int j = 0; j < 2; ++j) { f((first + j) / 8, (first + j) % 8 * 4 + lane % 4, of[j].quad); }
  }

 private:
  const CellSpec cell_;
  int gates_, units_, blocks_;  // units of a block that scatters, and their K blocks; or more than there are
  int H_, rows_, columns_;
  int64_t stride_;
  bool aligned_;
};

template <Pass kPass, Stage kStage, class Bits>
FUSEDRNN_DEVICE void pack(const PackParams& p, int64_t first) {
  const Product product = packed_product(kPass, kStage, p.sizes, p.plan);
  const auto blocks = static_cast<uint32_t>(product.operand.blocks()), tiles = static_cast<uint32_t>(product.tiles);
  const int64_t all = p.sizes.D * product.tiles * blocks * kWarp;
  const std::conditional_t<kPass == Pass::kForward, AlongRows<kStage, Bits>, AlongColumns<kStage, Bits>> lanes(p);
  for (int64_t n = first; n < all; n += p.threads) {
    // A fragment is 1 KiB or more, so that 32 bits number all that a device has memory for.
    const auto fragment = static_cast<uint32_t>(n / kWarp), row = fragment / blocks, block = fragment - row * blocks;
    const int d = row >= tiles ? 1 : 0;
    Quad* to = static_cast<Quad*>(p.packed) + fragment * product.fragment_quads();
    lanes.for_each(static_cast<const Bits*>(p.w[d]), static_cast<int>(row - d * tiles), static_cast<int>(block),
                   static_cast<int>(n % kWarp), [&](int segment, int lane, const Quad& quad) {
                     const bool rounds = sizeof(Bits) == 4 && p.plan.math == Math::kTf32;
                     to[segment * kWarp + lane] = rounds ? Arithmetic<Math::kTf32>::operands(quad) : quad;
                   });
  }
}

template <Pass kPass, Stage kStage>
FUSEDRNN_DEVICE void pack(const PackParams& p, int64_t first) {
  switch (storage_bytes(p.plan.math)) {
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
