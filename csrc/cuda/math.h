// The arithmetic of the recurrent product: one K block of a tile of weights times the operand of eight batch rows.
//
// A tile is kSegments groups of eight output rows. Of a K block, lane 4 r + q holds 16 bytes for each segment: row r of
// the segment at bytes 16 q to 16 q + 15 of the block. These are at once the A fragments of two matrix instructions (of
// 16 rows, two segments, each), given that the inner index of the product may be taken in any order: what lane q reads
// of the operand with one 16-byte load is the B fragments for the same inner indices. So weights are packed the same
// way for every dtype, and no fragment is ever shuffled.
//
// If the number of segments is odd, the last one has an instruction of its own: rows 0 to 7 hold its inner indices of
// the first half, rows 8 to 15 those of the second half. It runs twice, with either half of the operand. The sums of
// the first half are then in rows 0 to 7 of one result, those of the second half in rows 8 to 15 of the other.
//
// Results: lane 4 r + q ends with row r of every segment at columns 2 q and 2 q + 1. In the forward the segments are
// maps of the cell, and a lane has those of one unit for two batch rows.
#pragma once

#include "cell.h"
#include "plan.h"

namespace fusedrnn::cuda {

// bfloat16 and float16 (m16n8k16) and TensorFloat-32 (m16n8k8) on the matrix unit, accumulated in float.
template <Operands kOperands, class S>
struct MatrixUnit {
  // kChains: 2 to sum either half of the K blocks apart, so that one has not to wait for the other. last: of a segment
  // without another, the halves in rows 0 to 7 of the first sum and 8 to 15 of the second.
  template <int kSegments, int kChains = 1>
  struct Accumulator {
    static constexpr int kPairs = kSegments / 2;
    float sum[kChains][kPairs > 0 ? kPairs : 1][4];
    float last[2][4];
  };

  template <int kSegments, int kChains>
  static FUSEDRNN_DEVICE void clear(Accumulator<kSegments, kChains>& into) {
    FUSEDRNN_UNROLL for (int k = 0; k < 4; ++k) {
      FUSEDRNN_UNROLL for (int c = 0; c < kChains; ++c) {
        FUSEDRNN_UNROLL for (int m = 0; m < kSegments / 2; ++m) into.sum[c][m][k] = 0;
      }
      FUSEDRNN_UNROLL for (int half = 0; half < 2; ++half) into.last[half][k] = 0;
    }
  }

  // Offset of a lane's first quad in an operand whose rows are `stride` bytes apart.
  static FUSEDRNN_DEVICE int first_byte(int stride, int lane) {
    return lane / 4 * stride + lane % 4 * static_cast<int>(sizeof(Quad));
  }

  // rows: the operand of eight batch rows at this K block, `stride` bytes apart, from the lane's first byte on.
  template <int kSegments, int kChains>
  static FUSEDRNN_DEVICE void add(Accumulator<kSegments, kChains>& into, const Quad (&w)[kSegments], const char* rows,
                                  int) {
    const Quad b = *reinterpret_cast<const Quad*>(rows);
    FUSEDRNN_UNROLL for (int half = 0; half < 2; ++half) {
      const int low = 2 * half, high = low + 1;
      FUSEDRNN_UNROLL for (int m = 0; m < kSegments / 2; ++m) {
        const Quad &upper = w[2 * m], &lower = w[2 * m + 1];
        mma<kOperands>(into.sum[half % kChains][m], upper.word[low], lower.word[low], upper.word[high],
                       lower.word[high], b.word[low], b.word[high]);
      }
      if constexpr (kSegments % 2 != 0) {
        const Quad& both = w[kSegments - 1];
        mma<kOperands>(into.last[half], both.word[0], both.word[2], both.word[1], both.word[3], b.word[low],
                       b.word[high]);
      }
    }
  }

  // z: of as many segments or more.
  template <int kSegments, int kChains, int kRoom>
  static FUSEDRNN_DEVICE void finish(const Accumulator<kSegments, kChains>& from, float (&z)[kRoom][2], int) {
    FUSEDRNN_UNROLL for (int s = 0; s < kSegments; ++s) {
      FUSEDRNN_UNROLL for (int j = 0; j < 2; ++j) {
        if (s % 2 == 0 && s + 1 == kSegments) {
          z[s][j] = from.last[0][j] + from.last[1][2 + j];
          continue;
        }
        z[s][j] = from.sum[0][s / 2][s % 2 * 2 + j];
        if constexpr (kChains == 2) z[s][j] += from.sum[1][s / 2][s % 2 * 2 + j];
      }
    }
  }
};

// IEEE float and double. A lane sums over its own quarter of the inner dimension, for all eight columns; the quarters
// come together in finish().
template <class A>
struct ScalarUnit {
  static constexpr int kPerQuad = sizeof(Quad) / sizeof(A);

  template <int kSegments, int kChains = 1>
  struct Accumulator {
    A sum[kSegments][kMmaN];
  };

  template <int kSegments, int kChains>
  static FUSEDRNN_DEVICE void clear(Accumulator<kSegments, kChains>& into) {
    FUSEDRNN_UNROLL for (int s = 0; s < kSegments; ++s) {
      FUSEDRNN_UNROLL for (int n = 0; n < kMmaN; ++n) into.sum[s][n] = 0;
    }
  }

  static FUSEDRNN_DEVICE int first_byte(int, int lane) { return lane % 4 * static_cast<int>(sizeof(Quad)); }

  template <int kSegments, int kChains>
  static FUSEDRNN_DEVICE void add(Accumulator<kSegments, kChains>& into, const Quad (&w)[kSegments], const char* rows,
                                  int stride) {
    FUSEDRNN_UNROLL for (int n = 0; n < kMmaN; ++n) {
      const Quad b = *reinterpret_cast<const Quad*>(rows + n * stride);
      FUSEDRNN_UNROLL for (int s = 0; s < kSegments; ++s) {
        FUSEDRNN_UNROLL for (int k = 0; k < kPerQuad; ++k) { into.sum[s][n] += element<A>(w[s], k) * element<A>(b, k); }
      }
    }
  }

  // Two exchanges: in each, a lane of a pair sends the other lane half of its columns and adds what it receives to the
  // rest.
  template <int kSegments, int kChains, int kRoom>
  static FUSEDRNN_DEVICE void finish(const Accumulator<kSegments, kChains>& from, A (&z)[kRoom][2], int lane) {
    const bool upper = (lane & 2) != 0, odd = (lane & 1) != 0;
    FUSEDRNN_UNROLL for (int s = 0; s < kSegments; ++s) {
      A four[4];
      FUSEDRNN_UNROLL for (int n = 0; n < 4; ++n) {
        const A low = from.sum[s][n], high = from.sum[s][n + 4];
        four[n] = (upper ? high : low) + shuffle_xor(upper ? low : high, 2);
      }
      FUSEDRNN_UNROLL for (int n = 0; n < 2; ++n) {
        z[s][n] = (odd ? four[n + 2] : four[n]) + shuffle_xor(odd ? four[n] : four[n + 2], 1);
      }
    }
  }
};

// All that depends on the dtype.
template <Math kMath>
struct Arithmetic;

template <Math kMath_, class S, class A, class Unit_, class Nonlinear, class BackwardNonlinear = Nonlinear>
struct ArithmeticOf {
  static constexpr Math kMath = kMath_;
  static_assert(sizeof(S) == storage_bytes(kMath) && sizeof(A) == compute_bytes(kMath));
  using Storage = S;
  using Compute = A;
  using Unit = Unit_;
  using ForwardMath = NumberMath<A, Nonlinear>;
  using BackwardMath = NumberMath<A, BackwardNonlinear>;

  // Numbers of storage as the unit takes them.
  static constexpr bool kRoundsOperands = false;
  static FUSEDRNN_DEVICE S operand(A value) { return to_storage<S>(value); }
  static FUSEDRNN_DEVICE Quad operands(const Quad& quad) { return quad; }
};

template <>
struct Arithmetic<Math::kBFloat16> : ArithmeticOf<Math::kBFloat16, BFloat16, float,
                                                  MatrixUnit<Operands::kBFloat16, BFloat16>, HardwareTanh, FastMath> {};
template <>
struct Arithmetic<Math::kFloat16>
    : ArithmeticOf<Math::kFloat16, Float16, float, MatrixUnit<Operands::kFloat16, Float16>, FastMath> {};
template <>
struct Arithmetic<Math::kFloat32> : ArithmeticOf<Math::kFloat32, float, float, ScalarUnit<float>, LibMath<float>> {};
template <>
struct Arithmetic<Math::kFloat64> : ArithmeticOf<Math::kFloat64, double, double, ScalarUnit<double>, LibMath<double>> {
};
// Both operands are rounded where they enter the product; everything else is float.
template <>
struct Arithmetic<Math::kTf32>
    : ArithmeticOf<Math::kTf32, float, float, MatrixUnit<Operands::kTf32, float>, LibMath<float>> {
  static constexpr bool kRoundsOperands = true;
  static FUSEDRNN_DEVICE float operand(float value) { return to_tf32(value); }
  static FUSEDRNN_DEVICE Quad operands(const Quad& quad) {
    Quad rounded;
    FUSEDRNN_UNROLL for (int k = 0; k < 4; ++k) rounded.word[k] = as_word(to_tf32(element<float>(quad, k)));
    return rounded;
  }
};

}  // namespace fusedrnn::cuda
