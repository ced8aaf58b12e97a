// Vectors of one instruction set as compiler vector types. Each kernels_*.cpp sets FUSEDRNN_ISA (the namespace) and
// FUSEDRNN_VECTOR_BYTES and is compiled for that instruction set. Nothing here may have linkage outside of that
// namespace, standard library templates included: the linker would keep one copy for all instruction sets.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "params.h"

#define FUSEDRNN_INLINE inline __attribute__((always_inline))

namespace fusedrnn::FUSEDRNN_ISA {

template <class S>
struct Storage {
  using Compute = S;
};
template <>
struct Storage<BFloat16> {
  using Compute = float;
};
template <>
struct Storage<Float16> {
  using Compute = float;
};
// Two bfloat16 numbers next to each other, which a product takes as one where the processor has instructions for that.
// They are written as numbers and read as pairs.
struct __attribute__((may_alias)) Pair {
  uint32_t bits;
};
template <>
struct Storage<Pair> {
  using Compute = float;
};
template <class S>
using Compute = typename Storage<S>::Compute;

template <class A>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = int32_t;
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
};

// A register full of A, the integers of the same width, and how many there are.
template <class A>
struct Simd {
  using Int = typename IntegerOf<A>::type;
  static constexpr int kLanes = FUSEDRNN_VECTOR_BYTES / sizeof(A);
  typedef A Vec __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
  typedef Int IntVec __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
};
template <class A>
using Vec = typename Simd<A>::Vec;
template <class A>
using IntVec = typename Simd<A>::IntVec;

template <class To, class From>
FUSEDRNN_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class A>
FUSEDRNN_INLINE Vec<A> broadcast(A value) {
  return value - Vec<A>{};
}

// a < b ? a : b and a > b ? a : b: b where either is NaN. One instruction on x86, which the compiler does not find.
template <class A>
FUSEDRNN_INLINE Vec<A> smaller(Vec<A> a, Vec<A> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return __builtin_ia32_minps512_mask(a, b, Vec<A>{}, -1, 4);
  if constexpr (sizeof(A) == 8) return __builtin_ia32_minpd512_mask(a, b, Vec<A>{}, -1, 4);
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) return __builtin_ia32_minps256(a, b);
  if constexpr (sizeof(A) == 8) return __builtin_ia32_minpd256(a, b);
#endif
  return a < b ? a : b;
}
template <class A>
FUSEDRNN_INLINE Vec<A> larger(Vec<A> a, Vec<A> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return __builtin_ia32_maxps512_mask(a, b, Vec<A>{}, -1, 4);
  if constexpr (sizeof(A) == 8) return __builtin_ia32_maxpd512_mask(a, b, Vec<A>{}, -1, 4);
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) return __builtin_ia32_maxps256(a, b);
  if constexpr (sizeof(A) == 8) return __builtin_ia32_maxpd256(a, b);
#endif
  return a > b ? a : b;
}

typedef uint16_t NarrowVec __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES / 2)));
typedef uint32_t WordVec __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));

// bfloat16 is the upper half of a float; float16 by an instruction, or by the usual rebiasing of the exponent. Both are
// exact for subnormals.
FUSEDRNN_INLINE Vec<float> widen(NarrowVec narrow, BFloat16) {
  return bit_cast<Vec<float>>(__builtin_convertvector(narrow, WordVec) << 16);
}

// Pairs of bfloat16 numbers from two vectors that were widened from them.
FUSEDRNN_INLINE Vec<float> paired(Vec<float> first, Vec<float> second) {
  return bit_cast<Vec<float>>((bit_cast<WordVec>(first) >> 16) | (bit_cast<WordVec>(second) & 0xffff0000u));
}

FUSEDRNN_INLINE Vec<float> widen(NarrowVec narrow, Float16) {
#if defined(__AVX512F__) && FUSEDRNN_VECTOR_BYTES == 64
  return bit_cast<Vec<float>>(_mm512_cvtph_ps(bit_cast<__m256i>(narrow)));
#elif defined(__F16C__) && FUSEDRNN_VECTOR_BYTES == 32
  return bit_cast<Vec<float>>(_mm256_cvtph_ps(bit_cast<__m128i>(narrow)));
#else
  const WordVec bits = __builtin_convertvector(narrow, WordVec);
  const WordVec magnitude = (bits & 0x7fffu) << 13;
  const WordVec exponent = magnitude & 0x0f800000u;
  const WordVec normal = magnitude + ((127u - 15u) << 23);
  const WordVec special = normal + ((128u - 16u) << 23);                         // infinities and NaNs
  const Vec<float> tiny = bit_cast<Vec<float>>(normal + (1u << 23)) - 0x1p-14f;  // zeros and subnormals
  WordVec result = exponent == 0x0f800000u ? special : normal;
  result = exponent == 0u ? bit_cast<WordVec>(tiny) : result;
  return bit_cast<Vec<float>>(result | (bits & 0x8000u) << 16);
#endif
}

// Both round to nearest, ties to even, and keep NaN a NaN. The instruction takes denormal numbers for zero, as those do
// that multiply pairs.
FUSEDRNN_INLINE NarrowVec narrow(Vec<float> value, BFloat16) {
#if defined(__AVX512BF16__)
  return bit_cast<NarrowVec>(_mm512_cvtneps_pbh(bit_cast<__m512>(value)));
#else
  const WordVec bits = bit_cast<WordVec>(value);
  const WordVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const WordVec nan = (bits >> 16) | 0x40u;
  return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded, NarrowVec);
#endif
}

FUSEDRNN_INLINE NarrowVec narrow(Vec<float> value, Float16) {
#if defined(__AVX512F__) && FUSEDRNN_VECTOR_BYTES == 64
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return bit_cast<NarrowVec>(_mm512_cvtps_ph(bit_cast<__m512>(value), kNearest));
#elif defined(__F16C__) && FUSEDRNN_VECTOR_BYTES == 32
  return bit_cast<NarrowVec>(_mm256_cvtps_ph(bit_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
#else
  const WordVec bits = bit_cast<WordVec>(value);
  const WordVec sign = (bits & 0x80000000u) >> 16;
  const WordVec magnitude = bits & 0x7fffffffu;
  // Subnormal results: adding 0.5 shifts the mantissa to where the float unit rounds it.
  const WordVec tiny = bit_cast<WordVec>(bit_cast<Vec<float>>(magnitude) + 0.5f) - (126u << 23);
  const WordVec odd = (magnitude >> 13) & 1u;
  const WordVec normal = (magnitude - ((127u - 15u) << 23) + 0x0fffu + odd) >> 13;
  WordVec result = magnitude < (113u << 23) ? tiny : normal;
  result = magnitude >= (143u << 23) ? WordVec{} + 0x7c00u : result;  // 65536 and above overflow
  result = magnitude > 0x7f800000u ? WordVec{} + 0x7e00u : result;
  return __builtin_convertvector(result | sign, NarrowVec);
#endif
}

template <class S>
FUSEDRNN_INLINE Vec<Compute<S>> load(const S* from) {
  if constexpr (sizeof(S) == 2) {
    NarrowVec bits;
    std::memcpy(&bits, from, sizeof(bits));
    return widen(bits, S{});
  } else {
    Vec<S> value;
    std::memcpy(&value, from, sizeof(value));
    return value;
  }
}

template <class S>
FUSEDRNN_INLINE void store(S* to, Vec<Compute<S>> value) {
  if constexpr (sizeof(S) == 2) {
    const NarrowVec bits = narrow(value, S{});
    std::memcpy(to, &bits, sizeof(bits));
  } else {
    std::memcpy(to, &value, sizeof(value));
  }
}

// The first n lanes only, 0 <= n; the rest of what is loaded is zero. n may be kLanes or more, which means all. What
// follows the test for that is kept small: it is compiled wherever a block of units may not be full.
#if defined(__AVX512BW__) && defined(__AVX512VL__) && FUSEDRNN_VECTOR_BYTES == 64
template <class S>
FUSEDRNN_INLINE Vec<Compute<S>> load(const S* from, int64_t n) {
  if (__builtin_expect(n >= Simd<Compute<S>>::kLanes, 1)) return load(from);
  const uint32_t mask = (1u << n) - 1;
  if constexpr (sizeof(S) == 2) return widen(bit_cast<NarrowVec>(_mm256_maskz_loadu_epi16(mask, from)), S{});
  if constexpr (sizeof(S) == 4) return bit_cast<Vec<float>>(_mm512_maskz_loadu_ps(mask, from));
  if constexpr (sizeof(S) == 8) return bit_cast<Vec<double>>(_mm512_maskz_loadu_pd(mask, from));
}

template <class S>
FUSEDRNN_INLINE void store(S* to, Vec<Compute<S>> value, int64_t n) {
  if (__builtin_expect(n >= Simd<Compute<S>>::kLanes, 1)) return store(to, value);
  const uint32_t mask = (1u << n) - 1;
  if constexpr (sizeof(S) == 2) _mm256_mask_storeu_epi16(to, mask, bit_cast<__m256i>(narrow(value, S{})));
  if constexpr (sizeof(S) == 4) _mm512_mask_storeu_ps(to, mask, bit_cast<__m512>(value));
  if constexpr (sizeof(S) == 8) _mm512_mask_storeu_pd(to, mask, bit_cast<__m512d>(value));
}
#else
template <int kStep, class S>
FUSEDRNN_INLINE void copy_first(S* to, const S* from, int64_t n) {
  if constexpr (kStep > 0) {
    const int64_t more = n & kStep;
    if (more != 0) std::memcpy(to, from, kStep * sizeof(S));
    copy_first<kStep / 2>(to + more, from + more, n);
  }
}

template <class S>
FUSEDRNN_INLINE Vec<Compute<S>> load(const S* from, int64_t n) {
  constexpr int kLanes = Simd<Compute<S>>::kLanes;
  if (__builtin_expect(n >= kLanes, 1)) return load(from);
  S lanes[kLanes] = {};
  copy_first<kLanes / 2>(lanes, from, n);
  return load<S>(lanes);
}

template <class S>
FUSEDRNN_INLINE void store(S* to, Vec<Compute<S>> value, int64_t n) {
  constexpr int kLanes = Simd<Compute<S>>::kLanes;
  if (__builtin_expect(n >= kLanes, 1)) return store(to, value);
  S lanes[kLanes];
  store<S>(lanes, value);
  copy_first<kLanes / 2>(to, lanes, n);
}
#endif

template <class S>
FUSEDRNN_INLINE Compute<S> to_compute(S value) {
  if constexpr (sizeof(S) == 2) {
    return widen(NarrowVec{value.bits}, S{})[0];
  } else {
    return value;
  }
}

// The value after rounding to S, the storage type.
template <class S>
FUSEDRNN_INLINE Vec<Compute<S>> rounded(Vec<Compute<S>> value) {
  if constexpr (sizeof(S) == 2) {
    return widen(narrow(value, S{}), S{});
  } else {
    return value;
  }
}

// sum + number * operands, where a number, and a lane of operands, may be a pair: the sum of both products then.
#if defined(__FMA__) && FUSEDRNN_VECTOR_BYTES == 32
// Rounded once, as in multiply_add_in_place, however little the compiler optimises: tiles have to agree to the bit.
FUSEDRNN_INLINE Vec<float> multiply_add(Vec<float> sum, float number, Vec<float> operands) {
  return __builtin_ia32_vfmaddps256(broadcast<float>(number), operands, sum);
}
FUSEDRNN_INLINE Vec<double> multiply_add(Vec<double> sum, double number, Vec<double> operands) {
  return __builtin_ia32_vfmaddpd256(broadcast<double>(number), operands, sum);
}
#else
FUSEDRNN_INLINE Vec<float> multiply_add(Vec<float> sum, float number, Vec<float> operands) {
  return sum + number * operands;
}
FUSEDRNN_INLINE Vec<double> multiply_add(Vec<double> sum, double number, Vec<double> operands) {
  return sum + number * operands;
}
#endif
#if defined(__AVX512BF16__)
FUSEDRNN_INLINE Vec<float> multiply_add(Vec<float> sum, Pair number, Vec<float> operands) {
  return _mm512_dpbf16_ps(sum, bit_cast<__m512bh>(operands), bit_cast<__m512bh>(WordVec{} + number.bits));
}
#else
FUSEDRNN_INLINE Vec<float> multiply_add(Vec<float> sum, Pair number, Vec<float> operands) {
  const WordVec left = WordVec{} + number.bits, right = bit_cast<WordVec>(operands);
  const auto low = [](WordVec pairs) { return bit_cast<Vec<float>>(pairs << 16); };
  const auto high = [](WordVec pairs) { return bit_cast<Vec<float>>(pairs & 0xffff0000u); };
  return sum + high(left) * high(right) + low(left) * low(right);
}
#endif

// sum + a * b and multiply_add, where the register of the sum stays its register: with 16 of them the compiler, which
// is free to put a sum where an operand ends, moves or spills some of the twelve of a tile.
template <class A>
FUSEDRNN_INLINE Vec<A> add_product_in_place(Vec<A> sum, Vec<A> a, Vec<A> b) {
#if defined(__FMA__) && FUSEDRNN_VECTOR_BYTES == 32
  if constexpr (sizeof(A) == 4) {
    __asm__("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  } else {
    __asm__("vfmadd231pd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  }
  return sum;
#else
  return sum + a * b;
#endif
}
template <class A, class E>
FUSEDRNN_INLINE Vec<A> multiply_add_in_place(Vec<A> sum, E number, Vec<A> operands) {
#if defined(__FMA__) && FUSEDRNN_VECTOR_BYTES == 32
  return add_product_in_place<A>(sum, broadcast<A>(number), operands);
#else
  return multiply_add(sum, number, operands);
#endif
}

// Lane l of the result is the sum of lanes l & ~step and l | step of a where l & step is 0, and of b where it is not.
template <class A, int step>
FUSEDRNN_INLINE Vec<A> add_neighbours(Vec<A> a, Vec<A> b) {
  constexpr int kLanes = Simd<A>::kLanes;
#if defined(__GNUC__) && !defined(__clang__)
  IntVec<A> first, second;
  for (int l = 0; l < kLanes; ++l) {
    first[l] = (l & step ? kLanes : 0) + (l & ~step);
    second[l] = (l & step ? kLanes : 0) + (l | step);
  }
  return __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, second);
#else
  Vec<A> sum;
  for (int l = 0; l < kLanes; ++l) sum[l] = l & step ? b[l & ~step] + b[l] : a[l] + a[l | step];
  return sum;
#endif
}

// Lane l of the result is the sum of all lanes of values[l], in a fixed order. Writes over values.
template <class A, int step = 1>
FUSEDRNN_INLINE Vec<A> sum_each(Vec<A>* values) {
  if constexpr (step == Simd<A>::kLanes) {
    return values[0];
  } else {
#pragma GCC unroll 16
    for (int k = 0; k < Simd<A>::kLanes / step; k += 2) {
      values[k / 2] = add_neighbours<A, step>(values[k], values[k + 1]);
    }
    return sum_each<A, 2 * step>(values);
  }
}

// Lane l of rows[k] for lane k of rows[l].
template <class A, int step = 1>
FUSEDRNN_INLINE void transpose(Vec<A> (&rows)[Simd<A>::kLanes]) {
  constexpr int kLanes = Simd<A>::kLanes;
  if constexpr (step < kLanes) {
#pragma GCC unroll 16
    for (int k = 0; k < kLanes; ++k) {
      if (k & step) continue;
      const Vec<A> a = rows[k], b = rows[k | step];
#if defined(__GNUC__) && !defined(__clang__)
      IntVec<A> first, second;
      for (int l = 0; l < kLanes; ++l) {
        first[l] = l & step ? kLanes + (l ^ step) : l;
        second[l] = l & step ? kLanes + l : l ^ step;
      }
      rows[k] = __builtin_shuffle(a, b, first);
      rows[k | step] = __builtin_shuffle(a, b, second);
#else
      for (int l = 0; l < kLanes; ++l) {
        rows[k][l] = l & step ? b[l ^ step] : a[l];
        rows[k | step][l] = l & step ? b[l] : a[l ^ step];
      }
#endif
    }
    transpose<A, 2 * step>(rows);
  }
}

// Sum of all lanes, in a fixed order.
template <class A>
FUSEDRNN_INLINE A horizontal_sum(Vec<A> value) {
  A lanes[Simd<A>::kLanes];
  store(lanes, value);
  for (int half = Simd<A>::kLanes / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  }
  return lanes[0];
}

}  // namespace fusedrnn::FUSEDRNN_ISA
