// The tile registers of AMX: eight of them, each of up to 16 rows of 64 bytes, and the product of two of bfloat16.
//
// With FUSEDRNN_EMULATE_TILES the same functions are loops over arrays of each thread, so that kernels written with
// them run, and can be checked for what they read and write, on any processor. A product then adds in the order of the
// processor, even and odd inputs apart, but rounds as the compiler's target does, and keeps denormal numbers, which the
// processor takes for zero.
#pragma once

#include "simd.h"

namespace fusedrnn::FUSEDRNN_ISA {

constexpr int64_t kTileBytes = 64;              // of a row
constexpr int64_t kTileRowsMost = 16;           // rows of a tile
constexpr int64_t kTileDepth = 32;              // bfloat16 numbers of a row
constexpr int64_t kTilePairs = kTileDepth / 2;  // rows of a right operand: each is a pair for 16 outputs
constexpr int kSums = 4, kLefts = 2;            // registers: 0 to 3, and 4 and 5; 6 and 7 are right operands

#if defined(FUSEDRNN_EMULATE_TILES)

struct TileRegisters {
  uint32_t words[8][kTileRowsMost][16];
  int64_t rows[8];
};
inline thread_local TileRegisters tile_registers{};

FUSEDRNN_INLINE void configure_tiles(int64_t rows) {
  std::memset(&tile_registers, 0, sizeof(tile_registers));
  for (int k = 0; k < 8; ++k) tile_registers.rows[k] = k < kSums + kLefts ? rows : kTilePairs;
}
FUSEDRNN_INLINE void release_tiles() { std::memset(&tile_registers, 0, sizeof(tile_registers)); }

template <int kTo>
FUSEDRNN_INLINE void zero_tile() {
  std::memset(tile_registers.words[kTo], 0, sizeof(tile_registers.words[kTo]));
}

template <int kTo>
FUSEDRNN_INLINE void load_tile(const void* from, int64_t stride) {
  for (int64_t r = 0; r < tile_registers.rows[kTo]; ++r) {
    std::memcpy(tile_registers.words[kTo][r], static_cast<const char*>(from) + r * stride, kTileBytes);
  }
}

template <int kFrom>
FUSEDRNN_INLINE void store_tile(void* to, int64_t stride) {
  for (int64_t r = 0; r < tile_registers.rows[kFrom]; ++r) {
    std::memcpy(static_cast<char*>(to) + r * stride, tile_registers.words[kFrom][r], kTileBytes);
  }
}

template <int kSum, int kLeft, int kRight>
FUSEDRNN_INLINE void multiply_tiles() {
  TileRegisters& t = tile_registers;
  const auto low = [](WordVec pairs) { return bit_cast<Vec<float>>(pairs << 16); };
  const auto high = [](WordVec pairs) { return bit_cast<Vec<float>>(pairs & 0xffff0000u); };
  for (int64_t r = 0; r < t.rows[kSum]; ++r) {
    Vec<float> even{}, odd{};
    for (int64_t k = 0; k < kTilePairs; ++k) {
      const WordVec left = WordVec{} + t.words[kLeft][r][k], right = bit_cast<WordVec>(t.words[kRight][k]);
      even += low(left) * low(right);
      odd += high(left) * high(right);
    }
    const Vec<float> sum = bit_cast<Vec<float>>(t.words[kSum][r]) + (even + odd);
    std::memcpy(t.words[kSum][r], &sum, sizeof(sum));
  }
}

#else

// Sums and left operands of `rows` rows; all registers become zero.
FUSEDRNN_INLINE void configure_tiles(int64_t rows) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int k = 0; k < 8; ++k) {
    config.row_bytes[k] = kTileBytes;
    config.rows[k] = static_cast<uint8_t>(k < kSums + kLefts ? rows : kTilePairs);
  }
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
}
FUSEDRNN_INLINE void release_tiles() { __asm__ volatile("tilerelease"); }

template <int kTo>
FUSEDRNN_INLINE void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTo));
}

// Rows lie `stride` bytes apart.
template <int kTo>
FUSEDRNN_INLINE void load_tile(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTo) : "memory");
}

template <int kFrom>
FUSEDRNN_INLINE void store_tile(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kFrom) : "memory");
}

// sum += left @ right, in float32: left [rows][32], right [16 pairs of inputs][16 outputs][2].
template <int kSum, int kLeft, int kRight>
FUSEDRNN_INLINE void multiply_tiles() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
}

#endif

// Keeps the tile registers of this thread configured while it lives.
class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() {
    if (rows_ > 0) release_tiles();
  }

  // For sums of so many rows, at most 16. The registers are zero afterwards, if it was another number before.
  FUSEDRNN_INLINE void configure(int64_t rows) {
    if (__builtin_expect(rows == rows_, 1)) return;
    configure_tiles(rows);
    rows_ = rows;
  }

 private:
  int64_t rows_ = 0;
};

}  // namespace fusedrnn::FUSEDRNN_ISA
