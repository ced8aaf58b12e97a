// sigmoid and tanh on vectors. Against the exact value: sigmoid within 2 units in the last place above -87 (float) or
// -708 (double) and within the smallest normal number below that; tanh within 2.5 units in the last place everywhere.
// NaN gives NaN, infinities their limits. tests/test_kernels.py measures all of it.
#pragma once

#include "simd.h"

namespace fusedrnn::FUSEDRNN_ISA {

// e^x = 2^n e^r with n = round(x / ln 2) and |r| <= ln(2) / 2; ln 2 is split in two so that n * high is exact.
template <class A>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float kLowest = -87.3f, kHighest = 89.0f;  // 2^n is normal, or infinite at the top
  static constexpr float kRound = 0x1.8p23f, kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr int kDegree = 7, kMantissa = 23, kBias = 127;
  static constexpr float kTanhIsOne = 9.1f;
};
template <>
struct ExpConstants<double> {
  static constexpr double kLowest = -708.3, kHighest = 710.0;
  static constexpr double kRound = 0x1.8p52, kLn2High = 0x1.62e42fefap-1, kLn2Low = 0x1.cf79abc9e3b3ap-40;
  static constexpr int kDegree = 13, kMantissa = 52, kBias = 1023;
  static constexpr double kTanhIsOne = 19.1;
};

// 1 / k!
struct InverseFactorials {
  double of[14];
  constexpr InverseFactorials() : of{} {
    double factorial = 1;
    for (int k = 0; k < 14; ++k) {
      factorial *= k < 2 ? 1 : k;
      of[k] = 1 / factorial;
    }
  }
};
static constexpr InverseFactorials kInverseFactorial;

template <class A>
struct ExpParts {
  Vec<A> scale;  // 2^n
  Vec<A> expm1;  // e^r - 1, to full relative precision
};

// x in [kLowest, kHighest] or NaN.
template <class A>
FUSEDRNN_INLINE ExpParts<A> exp_parts(Vec<A> x) {
  using C = ExpConstants<A>;
  constexpr A kLog2E = A(1.4426950408889634074);
  const Vec<A> shifted = x * kLog2E + C::kRound;
  const Vec<A> n = shifted - C::kRound;
  const Vec<A> r = (x - n * C::kLn2High) - n * C::kLn2Low;
  // Taylor: the first omitted term is below half a unit in the last place of e^r on this interval.
  Vec<A> p = broadcast<A>(A(kInverseFactorial.of[C::kDegree]));
#pragma GCC unroll 16
  for (int k = C::kDegree - 1; k >= 2; --k) p = p * r + A(kInverseFactorial.of[k]);
  p = p * (r * r) + r;
  const IntVec<A> exponent = bit_cast<IntVec<A>>(shifted) - bit_cast<IntVec<A>>(broadcast<A>(C::kRound)) + C::kBias;
  return {bit_cast<Vec<A>>(exponent << C::kMantissa), p};
}

template <class A>
FUSEDRNN_INLINE Vec<A> sigmoid(Vec<A> x) {
  using C = ExpConstants<A>;
  Vec<A> z = -x;
  z = z > C::kHighest ? broadcast<A>(C::kHighest) : z;  // comparisons are false for NaN, which stays
  z = z < C::kLowest ? broadcast<A>(C::kLowest) : z;
  const ExpParts<A> e = exp_parts<A>(z);
  return A(1) / (A(1) + e.scale * (A(1) + e.expm1));
}

template <class A>
FUSEDRNN_INLINE Vec<A> tanh(Vec<A> x) {
  using C = ExpConstants<A>;
  const IntVec<A> sign = bit_cast<IntVec<A>>(x) & bit_cast<IntVec<A>>(broadcast<A>(A(-0.0)));
  Vec<A> a = bit_cast<Vec<A>>(bit_cast<IntVec<A>>(x) ^ sign);
  a = a > C::kTanhIsOne ? broadcast<A>(C::kTanhIsOne) : a;
  const ExpParts<A> e = exp_parts<A>(a + a);
  const Vec<A> expm1 = e.scale * e.expm1 + (e.scale - A(1));
  return bit_cast<Vec<A>>(bit_cast<IntVec<A>>(expm1 / (expm1 + A(2))) | sign);
}

}  // namespace fusedrnn::FUSEDRNN_ISA
