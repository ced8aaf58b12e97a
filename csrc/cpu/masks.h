// Random masks. Each number takes 16 bits of Threefry-2x32 with 20 rounds (J. Salmon et al., "Parallel Random Numbers:
// As Easy as 1, 2, 3", SC 2011), whose key is the seed and whose counter is the place: masks depend neither on the
// instruction set nor on the number of threads.
#pragma once

#include "params.h"
#include "simd.h"

namespace fusedrnn::FUSEDRNN_ISA {

// words[0..kMaskBlock / 2): the random words of counters (16 * block + [0, 16), stream), the first ones before the
// second ones.
inline void threefry(uint64_t seed, uint32_t block, uint32_t stream, uint32_t* words) {
  constexpr int kCounters = kMaskBlock / 4, kLanes = sizeof(WordVec) / 4, kVectors = kCounters / kLanes;
  constexpr int kRotations[8] = {13, 15, 26, 6, 17, 29, 16, 24};
  constexpr uint32_t kParity = 0x1bd11bda;
  const uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  const uint32_t key[3] = {low, high, kParity ^ low ^ high};
  WordVec first[kVectors], second[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    for (int lane = 0; lane < kLanes; ++lane) first[v][lane] = kCounters * block + kLanes * v + lane;
    first[v] += key[0];
    second[v] = WordVec{} + (stream + key[1]);
  }
#pragma GCC unroll 20
  for (int round = 0; round < 20; ++round) {
    const int left = kRotations[round % 8];
    for (int v = 0; v < kVectors; ++v) {
      first[v] += second[v];
      second[v] = ((second[v] << left) | (second[v] >> (32 - left))) ^ first[v];
    }
    if (round % 4 < 3) continue;
    const uint32_t injection = round / 4 + 1;
    for (int v = 0; v < kVectors; ++v) {
      first[v] += key[injection % 3];
      second[v] += key[(injection + 1) % 3] + injection;
    }
  }
  std::memcpy(words, first, sizeof(first));
  std::memcpy(words + kCounters, second, sizeof(second));
}

// Blocks [begin, end) of a mask.
template <class A>
void fill_masks(const MaskParams& params, int64_t begin, int64_t end) {
  const int32_t limit = params.limit;
  const A value = static_cast<A>(params.value);
  for (int64_t block = begin; block < end; ++block) {
    alignas(64) uint32_t words[kMaskBlock / 2];
    threefry(params.seed, static_cast<uint32_t>(block), params.stream, words);
    alignas(64) A masks[kMaskBlock];
    const int64_t count = params.numbers - block * kMaskBlock;
    A* const to = static_cast<A*>(params.to) + block * kMaskBlock;
    A* const out = count < kMaskBlock ? masks : to;
    for (int k = 0; k < kMaskBlock / 2; ++k) {
      out[k] = static_cast<int32_t>(words[k] & 0xffff) < limit ? value : A(0);
      out[kMaskBlock / 2 + k] = static_cast<int32_t>(words[k] >> 16) < limit ? value : A(0);
    }
    if (count < kMaskBlock) std::memcpy(to, masks, count * sizeof(A));
  }
}

}  // namespace fusedrnn::FUSEDRNN_ISA
