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

// Of e^x = 2^n e^r.
template <class A>
struct ExpParts {
  Vec<A> scale;  // 2^n
  Vec<A> expm1;  // e^r - 1, to full relative precision
};

// The larger, or smaller, of a limit and x; NaN stays.
template <class A>
FUSEDRNN_INLINE Vec<A> at_least(A limit, Vec<A> x) {
  return larger<A>(broadcast<A>(limit), x);
}
template <class A>
FUSEDRNN_INLINE Vec<A> at_most(A limit, Vec<A> x) {
  return smaller<A>(broadcast<A>(limit), x);
}

template <class A>
FUSEDRNN_INLINE IntVec<A> sign_of(Vec<A> x) {
  return bit_cast<IntVec<A>>(x) & bit_cast<IntVec<A>>(broadcast<A>(A(-0.0)));
}

// 1 / (1 + e^-x)
struct Sigmoid {
  template <class A>
  static FUSEDRNN_INLINE Vec<A> exponent(Vec<A> x) {
    using C = ExpConstants<A>;
    return at_least<A>(C::kLowest, at_most<A>(C::kHighest, -x));
  }
  template <class A>
  static FUSEDRNN_INLINE Vec<A> result(Vec<A>, const ExpParts<A>& e) {
    return A(1) / (A(1) + e.scale * (A(1) + e.expm1));
  }
};

// (e^2a - 1) / (e^2a + 1) for a = |x|, with the sign of x
struct Tanh {
  template <class A>
  static FUSEDRNN_INLINE Vec<A> exponent(Vec<A> x) {
    const Vec<A> a = at_most<A>(ExpConstants<A>::kTanhIsOne, bit_cast<Vec<A>>(bit_cast<IntVec<A>>(x) ^ sign_of<A>(x)));
    return a + a;
  }
  template <class A>
  static FUSEDRNN_INLINE Vec<A> result(Vec<A> x, const ExpParts<A>& e) {
    const Vec<A> expm1 = e.scale * e.expm1 + (e.scale - A(1));
    return bit_cast<Vec<A>>(bit_cast<IntVec<A>>(expm1 / (expm1 + A(2))) | sign_of<A>(x));
  }
};

// x[k] = F_k(x[k]) for the k-th of the functions. One of them is a chain of some twenty dependent operations: the steps
// of all of them are taken in turns, so that the processor has others to do while it waits.
template <class A, class... F>
FUSEDRNN_INLINE void apply(Vec<A> (&x)[sizeof...(F)]) {
  using C = ExpConstants<A>;
  constexpr int N = sizeof...(F);
  constexpr A kLog2E = A(1.4426950408889634074);
  Vec<A> e[N], r[N], p[N];  // exponents in [kLowest, kHighest] or NaN
  IntVec<A> n[N];
  int k = 0;
  ((e[k] = F::template exponent<A>(x[k]), ++k), ...);
#pragma GCC unroll 8
  for (int k = 0; k < N; ++k) {
    const Vec<A> shifted = e[k] * kLog2E + C::kRound;
    n[k] = bit_cast<IntVec<A>>(shifted) - bit_cast<IntVec<A>>(broadcast<A>(C::kRound)) + C::kBias;
    r[k] = e[k] - (shifted - C::kRound) * C::kLn2High;
    r[k] = r[k] - (shifted - C::kRound) * C::kLn2Low;
    p[k] = broadcast<A>(A(kInverseFactorial.of[C::kDegree]));
  }
  // Taylor: the first omitted term is below half a unit in the last place of e^r on this interval.
#pragma GCC unroll 16
  for (int degree = C::kDegree - 1; degree >= 2; --degree) {
#pragma GCC unroll 8
    for (int k = 0; k < N; ++k) p[k] = p[k] * r[k] + A(kInverseFactorial.of[degree]);
  }
#pragma GCC unroll 8
  for (int k = 0; k < N; ++k) p[k] = p[k] * (r[k] * r[k]) + r[k];
  k = 0;
  ((x[k] = F::template result<A>(x[k], ExpParts<A>{bit_cast<Vec<A>>(n[k] << C::kMantissa), p[k]}), ++k), ...);
}

}  // namespace fusedrnn::FUSEDRNN_ISA
