// The matrix product under everything: a tile of R batch rows times a panel.
//
// A panel holds the weights of one block of outputs for all K inputs, [K][4][lanes], so that its product with R rows
// stays in 4 * R vector registers while K runs, every panel element is loaded once per R rows, and every number of the
// rows is broadcast. In forward the four vectors are the gates of `lanes` hidden units; elsewhere they are
// 4 * lanes outputs next to each other. The sum over K runs in the same order whatever R is, so that a row's result
// does not depend on which rows it shares a tile with, and therefore not on the number of threads.
#pragma once

#include "cell.h"

namespace fusedrnn::FUSEDRNN_ISA {

// Rows of a tile: as many as the registers hold beside a panel row (32 registers with AVX-512, else 16).
#if FUSEDRNN_VECTOR_BYTES == 64
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 3;
#endif

template <class A>
constexpr int64_t kUnits = Simd<A>::kLanes;  // hidden units of a forward block
template <class A>
constexpr int64_t kWide = 4 * Simd<A>::kLanes;  // outputs of every other block

// sum[r][v] += sum over k of a[r][k] * panel[k][v]
template <class A, int R>
FUSEDRNN_INLINE void multiply(Vec<A> (&sum)[R][4], const A* a, int64_t stride, const A* panel, int64_t K) {
  for (int64_t k = 0; k < K; ++k) {
    const A* row = panel + k * kWide<A>;
    const Vec<A> w0 = load(row), w1 = load(row + kUnits<A>), w2 = load(row + 2 * kUnits<A>),
                 w3 = load(row + 3 * kUnits<A>);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const A scalar = a[r * stride + k];
      sum[r][0] += scalar * w0;
      sum[r][1] += scalar * w1;
      sum[r][2] += scalar * w2;
      sum[r][3] += scalar * w3;
    }
  }
}

template <class V, int R>
FUSEDRNN_INLINE void clear(V (&sum)[R][4]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = sum[r][2] = sum[r][3] = V{};
}

template <int R>
struct Rows {
  static constexpr int kCount = R;
};

// Calls f(Rows<R>, first row) for tiles that cover [begin, end), as even as possible.
template <class F>
FUSEDRNN_INLINE void for_each_tile(int64_t begin, int64_t end, const F& f) {
  const int64_t tiles = blocks_of(end - begin, kTileRows);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = begin + tile * (end - begin) / tiles;
    const int64_t next = begin + (tile + 1) * (end - begin) / tiles;
    switch (next - first) {
      case 1: f(Rows<1>{}, first); break;
      case 2: f(Rows<2>{}, first); break;
      case 3: f(Rows<3>{}, first); break;
#if FUSEDRNN_VECTOR_BYTES == 64
      case 4: f(Rows<4>{}, first); break;
      case 5: f(Rows<5>{}, first); break;
      case 6: f(Rows<6>{}, first); break;
#endif
    }
  }
}

// panel[block][k][gate][lane] = w[gate * H + block * lanes + lane][k] for w [4H][K]
template <class S>
void pack_gates(const void* w, int64_t rows, int64_t K, void* panel, int64_t begin, int64_t end) {
  using A = Compute<S>;
  const S* from = static_cast<const S*>(w);
  A* to = static_cast<A*>(panel);
  const int64_t H = rows / kGates;
  for (int64_t block = begin; block < end; ++block) {
    for (int64_t gate = 0; gate < kGates; ++gate) {
      for (int64_t lane = 0; lane < kUnits<A>; ++lane) {
        const int64_t unit = block * kUnits<A> + lane;
        A* column = to + block * K * kWide<A> + gate * kUnits<A> + lane;
        const S* row = from + (gate * H + unit) * K;
        for (int64_t k = 0; k < K; ++k) column[k * kWide<A>] = unit < H ? to_compute(row[k]) : A(0);
      }
    }
  }
}

// panel[block][k][lane] = w[block * 4 * lanes + lane][k] for w [N][K]
template <class S>
void pack_rows(const void* w, int64_t N, int64_t K, void* panel, int64_t begin, int64_t end) {
  using A = Compute<S>;
  const S* from = static_cast<const S*>(w);
  A* to = static_cast<A*>(panel);
  for (int64_t block = begin; block < end; ++block) {
    for (int64_t lane = 0; lane < kWide<A>; ++lane) {
      const int64_t n = block * kWide<A> + lane;
      A* column = to + block * K * kWide<A> + lane;
      for (int64_t k = 0; k < K; ++k) column[k * kWide<A>] = n < N ? to_compute(from[n * K + k]) : A(0);
    }
  }
}

// panel[block][k][lane] = w[k][block * 4 * lanes + lane] for w [K][N]
template <class S>
void pack_columns(const void* w, int64_t K, int64_t N, void* panel, int64_t begin, int64_t end) {
  using A = Compute<S>;
  const S* from = static_cast<const S*>(w);
  A* to = static_cast<A*>(panel);
  for (int64_t block = begin; block < end; ++block) {
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t v = 0; v < 4; ++v) {
        const int64_t first = block * kWide<A> + v * kUnits<A>;
        const Vec<A> values = first < N ? load(from + k * N + first, N - first) : Vec<A>{};
        store(to + (block * K + k) * kWide<A> + v * kUnits<A>, values);
      }
    }
  }
}

}  // namespace fusedrnn::FUSEDRNN_ISA
