// A hash of memory, as wide as a vector: equal for equal bytes, and for different ones with a probability of 2^-64.
//
// Each lane takes 64 bits at a time: state ^= bits, then one step of a multiply-with-carry generator (G. Marsaglia,
// 1994), state = lower half * kFactor + upper half. It detects modified weights; it is not cryptographic.
#pragma once

#include "simd.h"

namespace fusedrnn::FUSEDRNN_ISA {

typedef uint64_t LongVec __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));

// The lower half of each lane of a, times that of b: one instruction on x86, which the compiler does not find.
FUSEDRNN_INLINE LongVec times_lower(LongVec a, LongVec b) {
#if defined(__AVX512F__)
  typedef int Ints __attribute__((vector_size(64)));
  return (LongVec)__builtin_ia32_pmuludq512_mask((Ints)a, (Ints)b, (__attribute__((vector_size(64))) long long){}, -1);
#elif defined(__AVX2__)
  typedef int Ints __attribute__((vector_size(32)));
  return (LongVec)__builtin_ia32_pmuludq256((Ints)a, (Ints)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

FUSEDRNN_INLINE LongVec mixed(LongVec state, LongVec bits) {
  constexpr uint64_t kFactor = 4294957665;  // kFactor * 2^32 - 1 is a safe prime
  state ^= bits;
  return times_lower(state, LongVec{} + kFactor) + (state >> 32);
}

// to[0..8) from the first `bytes` bytes of `from`.
inline void fingerprint(const void* from, int64_t bytes, uint64_t* to) {
  constexpr int kStates = 8;  // as many as hide the latency of a step
  constexpr int64_t kWidth = sizeof(LongVec);
  const char* at = static_cast<const char*>(from);
  LongVec states[kStates];
  for (int k = 0; k < kStates; ++k) states[k] = LongVec{} + static_cast<uint64_t>(k + 1);
  LongVec bits;
  for (; bytes >= kStates * kWidth; bytes -= kStates * kWidth) {
#pragma GCC unroll 8
    for (int k = 0; k < kStates; ++k, at += kWidth) {
      std::memcpy(&bits, at, kWidth);
      states[k] = mixed(states[k], bits);
    }
  }
  for (int k = 0; bytes > 0; ++k, at += kWidth, bytes -= kWidth) {
    bits = LongVec{};
    std::memcpy(&bits, at, bytes < kWidth ? bytes : kWidth);
    states[k] = mixed(states[k], bits);
  }
  LongVec all = states[0];
  for (int k = 1; k < kStates; ++k) all = mixed(all, states[k]);
  std::memset(to, 0, 8 * sizeof(uint64_t));
  std::memcpy(to, &all, kWidth);
}

}  // namespace fusedrnn::FUSEDRNN_ISA
