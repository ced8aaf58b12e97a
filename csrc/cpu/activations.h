// sigmoid and tanh on vectors. Against the exact value: sigmoid within 2 units in the last place above -87 (float) or
// -708 (double) and within the smallest normal number below that; tanh within 2.5 units in the last place everywhere.
// NaN gives NaN, infinities their limits. tests/cpu/test_kernels.py measures all of it.
#pragma once

#include "simd.h"

namespace fusedrnn::FUSEDRNN_ISA {

// e^q = 2^n e^r with n = round(q / ln 2) and |r| <= ln(2) / 2; ln 2 is split in two so that n * high is exact. Of all
// e^r = 1 + r + r^2 P(r) with as many terms, P[0] + P[1] r + ..., this one has the least error of e^r - 1 where it is
// largest, relative to it: 1.3e-8 and 1.8e-17, by Remez' exchange.
template <class A>
struct Exp;
template <>
struct Exp<float> {
  static constexpr float kLowest = -87.3f, kHighest = 89.0f;  // of q: 2^n is normal, or infinite at the top
  // A sum with this one is a whole number whose lowest bits are n + 127, an exponent.
  static constexpr float kShift = 0x1.8p23f + 127;
  static constexpr int kMantissa = 23;
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float P[] = {0x1.fffffep-2f, 0x1.5554bp-3f, 0x1.555674p-5f, 0x1.122776p-7f, 0x1.6bec06p-10f};
  static constexpr float kTanhIsOne = 9.1f;
};
template <>
struct Exp<double> {
  static constexpr double kLowest = -708.3, kHighest = 710.0;
  static constexpr double kShift = 0x1.8p52 + 1023;
  static constexpr int kMantissa = 52;
  static constexpr double kLn2High = 0x1.62e42fefap-1, kLn2Low = 0x1.cf79abc9e3b3ap-40;
  static constexpr double P[] = {0x1.0000000000005p-1,  0x1.5555555555539p-3,  0x1.55555555522b8p-5,
                                 0x1.1111111118fa9p-7,  0x1.6c16c17edba42p-10, 0x1.a01a017515664p-13,
                                 0x1.a019a76f56f91p-16, 0x1.71de88058d787p-19, 0x1.28a1dfeb6446cp-22,
                                 0x1.ae6ba9c908993p-26};
  static constexpr double kTanhIsOne = 19.1;
};

// a / b for b from 2^-126 on, infinity included. Beside tiles, which only processors of Intel have and which compute
// 16-bit numbers, it is a times an estimate of 1 / b to 14 bits and Newton's step: 27 bits in five short instructions,
// where the divider there holds a port for 16 cycles. AMD's divides beside everything else.
template <class A>
FUSEDRNN_INLINE Vec<A> quotient(Vec<A> a, Vec<A> b) {
#if defined(FUSEDRNN_TILES) && defined(__AVX512F__)
  static_assert(sizeof(A) == 4);
  const Vec<A> estimate = __builtin_ia32_rcp14ps512_mask(b, Vec<A>{}, -1);
  const Vec<A> error = smaller<A>(A(1) - b * estimate, broadcast<A>(1));  // where b is infinite NaN, that becomes 1
  return a * (estimate + estimate * error);
#else
  return a / b;
#endif
}

// Both functions are of e^(f x) = 2^n e^(f r), for x = n ln(2) / f + r and a factor f that is a power of two or its
// negative, so that constants times f, or over it, are as exact. result() is of scale = 2^n, r and
// p = f (P[0] + P[1] f r + ...), so that (e^(f r) - 1) / f = r + r^2 p.

// 1 / (1 + e^-x)
template <class A>
struct Sigmoid {
  static constexpr A kFactor = -1, kLowest = -Exp<A>::kHighest, kHighest = -Exp<A>::kLowest;

  static FUSEDRNN_INLINE Vec<A> result(Vec<A> scale, Vec<A> r, Vec<A> p) {
    return quotient<A>(broadcast<A>(1), A(1) + scale * (A(1) - r * (A(1) + r * p)));
  }
};

// (e^2x - 1) / (e^2x + 1), both halved
template <class A>
struct Tanh {
  static constexpr A kFactor = 2, kLowest = -Exp<A>::kTanhIsOne, kHighest = Exp<A>::kTanhIsOne;

  static FUSEDRNN_INLINE Vec<A> result(Vec<A> scale, Vec<A> r, Vec<A> p) {
    const Vec<A> half = scale * (r + r * r * p) + (scale * A(0.5) - A(0.5));
    return quotient<A>(half, half + A(1));
  }
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
constexpr A power(A base, int exponent) {
  return exponent == 0 ? A(1) : base * power(base, exponent - 1);
}

// x[k] = F_k(x[k]) for the k-th of the functions. One of them is a chain of some twenty dependent operations: the steps
// of all of them are taken in turns, so that the processor has others to do while it waits.
template <class A, class... F>
FUSEDRNN_INLINE void apply(Vec<A> (&x)[sizeof...(F)]) {
  using E = Exp<A>;
  constexpr int N = sizeof...(F), kTerms = sizeof(E::P) / sizeof(A);
  constexpr A kLog2E = A(1.4426950408889634074);
  constexpr A factor[] = {F::kFactor...}, lowest[] = {F::kLowest...}, highest[] = {F::kHighest...};
  Vec<A> r[N], p[N], scale[N];
#pragma GCC unroll 8
  for (int k = 0; k < N; ++k) {
    const Vec<A> limited = at_least<A>(lowest[k], at_most<A>(highest[k], x[k]));
    const Vec<A> shifted = limited * (factor[k] * kLog2E) + E::kShift, n = shifted - E::kShift;
    r[k] = limited - n * (E::kLn2High / factor[k]);
    r[k] = r[k] - n * (E::kLn2Low / factor[k]);
    scale[k] = bit_cast<Vec<A>>(bit_cast<IntVec<A>>(shifted) << E::kMantissa);
    p[k] = broadcast<A>(E::P[kTerms - 1] * power(factor[k], kTerms));
  }
#pragma GCC unroll 16
  for (int term = kTerms - 2; term >= 0; --term) {
#pragma GCC unroll 8
    for (int k = 0; k < N; ++k) p[k] = p[k] * r[k] + E::P[term] * power(factor[k], term + 1);
  }
  int k = 0;
  ((x[k] = F::result(scale[k], r[k], p[k]), ++k), ...);
}

// The F of the cells in csrc/cells, for vectors; nonlinearities interleave up to four of them.
template <class A>
struct VectorMath {
  using Number = A;
  using V = Vec<A>;
  using Sigmoid = FUSEDRNN_ISA::Sigmoid<A>;
  using Tanh = FUSEDRNN_ISA::Tanh<A>;

  template <class... G>
  static FUSEDRNN_INLINE void apply(V (&x)[sizeof...(G)]) {
    FUSEDRNN_ISA::apply<A, G...>(x);
  }
  template <int N>
  static FUSEDRNN_INLINE void sigmoid(V (&x)[N]) {
    each<Sigmoid>(x);
  }
  template <int N>
  static FUSEDRNN_INLINE void tanh(V (&x)[N]) {
    each<Tanh>(x);
  }
  static FUSEDRNN_INLINE V relu(V x) { return at_least<A>(0, x); }
  static FUSEDRNN_INLINE V where_positive(V x, V value) { return x > V{} ? value : V{}; }

 private:
  template <class G, int N>
  static FUSEDRNN_INLINE void each(V (&x)[N]) {
    if constexpr (N == 1) {
      apply<G>(x);
    } else if constexpr (N == 2) {
      apply<G, G>(x);
    } else if constexpr (N == 3) {
      apply<G, G, G>(x);
    } else if constexpr (N == 4) {
      apply<G, G, G, G>(x);
    } else {
      each<G>(reinterpret_cast<V(&)[4]>(x[0]));
      each<G>(reinterpret_cast<V(&)[N - 4]>(x[4]));
    }
  }
};

}  // namespace fusedrnn::FUSEDRNN_ISA
