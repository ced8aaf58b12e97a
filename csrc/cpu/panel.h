// The inner matrix product of all kernels: batch rows times a panel.
//
// A panel holds the weights of one block of outputs for all K inputs: four vectors for each input, in two halves,
// [2][K][2][lanes]. In forward the outputs are the maps of a chunk of hidden units (params.h), elsewhere 4 * lanes
// adjacent outputs. The sums of a tile of R rows and V of the four vectors stay in R * V registers while K runs: every
// panel element is loaded once per tile, and every element of the rows is broadcast. With 16 registers V is 2 for many
// rows, so that half a panel of depth kDepth stays in the L1 cache for all tiles, and 4 for so few rows that the panel
// is read only once. With 32 registers V is always 4.
//
// With pairs of 16-bit operands an input of a panel is two inputs of the matrix, padded with zeros.
//
// The order of the sum over K does not depend on the tile, so the result of a row depends neither on the other rows of
// its tile nor on the number of threads.
#pragma once

#include "geometry.h"

namespace fusedrnn::FUSEDRNN_ISA {

template <class A>
constexpr int64_t kUnits = Simd<A>::kLanes;  // hidden units of a block
template <class A>
constexpr int64_t kWide = 4 * Simd<A>::kLanes;  // outputs of a panel

// The tile size: as many rows by vectors as fit into registers beside their operands (32 registers with AVX-512, else
// 16). For 24 sums, 6 by 4 takes 37 instructions per input and 12 by 2 takes 42, slower on a core shared by two
// threads.
constexpr bool kNarrow = FUSEDRNN_VECTOR_BYTES < 64;
constexpr int kTileRows = 6, kTileVectors = kNarrow ? 2 : 4;
// Number of rows up to which a tile has all four vectors, and K is not blocked.
constexpr int kFewRows = kNarrow ? 3 : 6;
// Steps along K for which a tile's part of a panel takes half of a first-level cache of 32 KiB, or two thirds of 48.
constexpr int64_t kDepth = kNarrow ? 16384 / (2 * FUSEDRNN_VECTOR_BYTES) : 32768 / (4 * FUSEDRNN_VECTOR_BYTES);
// With AVX2 and its 16 registers a tile has 20 instructions for 12 multiply-adds. On a core shared with another
// process, which then issues three instructions a cycle, the others matter: pointer arithmetic, which unrolling by four
// inputs reduces, and prefetches.
constexpr int kInputsARound = kNarrow ? 4 : 1;
// Number of rows whose sums are stored between the product and its consumer.
constexpr int64_t kRowsAtATime = kNarrow ? 24 : 48;
// Vectors along K, and rows of weights, that packing prefetches ahead.
constexpr int64_t kPackAhead = 4, kPackRowsAhead = 16;
// Numbers, or pairs, of a block of panels that stay in the L2 cache with rows of a and c.
constexpr int64_t kNearNumbers = 32 << 10;
// Rows of a packed sliver: a multiple of a tile's rows.
constexpr int64_t kSliverRows = kNarrow ? 6 : 12;

// Inputs of a panel of K inputs of a matrix.
template <Operands kOperands>
constexpr int64_t panel_inputs(int64_t K) {
  constexpr int64_t kAtATime = inputs_at_a_time(kOperands);
  return blocks_of(K, kAtATime) * kAtATime / (kOperands == Operands::kNumbers ? 1 : 2);
}

// Offset of the v-th vector of input k in a panel of K inputs.
template <class A>
FUSEDRNN_INLINE int64_t in_panel(int64_t K, int64_t k, int64_t v) {
  return (v / 2 * K * 2 + k * 2 + v % 2) * kUnits<A>;
}

// Element k of row r of the left matrix, of R rows: strided rows, `stride` apart, or a sliver, [K][kSliverRows].
template <class E, int R>
struct StridedRows {
  StridedRows(const E* rows, int64_t stride) : stride(stride) {
    for (int r = 0; r < R; r += kOfPointer) at[r / kOfPointer] = rows + r * stride;
  }

  E operator()(int r, int k) const { return place(r)[k]; }
  const E* place(int r) const { return at[r / kOfPointer] + r % kOfPointer * stride; }
  void advance(int k) {
    for (int r = 0; r < R; r += kOfPointer) at[r / kOfPointer] += k;
  }

  // Rows that are found from one pointer. A processor adds once or twice the stride on its own; every other multiple
  // and every other k would take a register in a loop of more than one input.
  static constexpr int kOfPointer = kInputsARound > 1 ? 3 : R;
  const E* at[(R + kOfPointer - 1) / kOfPointer];
  int64_t stride;
};
template <class E>
struct Sliver {
  const E* at;

  E operator()(int r, int k) const { return at[k * kSliverRows + r]; }
  void advance(int k) { at += k * kSliverRows; }
};

// finish(r, v, start(r, v) + sum over k < depth of left(r, k) * panel[k][v]) for R rows and V vectors of a panel of K
// inputs, of which each round of the loop takes `kRound`. The rest is as in accumulate.
template <class E, int R, int V, int Chains, bool kNext, int kRound, class Left, class Start, class Finish>
FUSEDRNN_INLINE void accumulate_rounds(Left left, const E* panel, int64_t K, int64_t depth, const Start& start,
                                       const Finish& finish, const E* next) {
  using A = Compute<E>;
  static_assert(sizeof(E) == sizeof(A) && kRound % Chains == 0);
  Vec<A> acc[Chains][R][V];
#pragma GCC unroll 2
  for (int chain = 0; chain < Chains; ++chain) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[chain][r][v] = chain == 0 ? start(r, v) : Vec<A>{};
    }
  }
  const auto step = [&](int k, int chain) {
    const auto weights = [&](int v) { return load(reinterpret_cast<const A*>(panel + in_panel<A>(K, k, v))); };
    if constexpr (R == 1 && !kNarrow) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) __builtin_prefetch(panel + in_panel<A>(K, k + 16, v));
    }
    if constexpr (kNext) __builtin_prefetch(next + k * 2 * kUnits<A>);
    // The smaller of the two operands stays in registers.
    if constexpr (R < V) {
      E numbers[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) numbers[r] = left(r, k);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vec<A> w = weights(v);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          acc[chain][r][v] = multiply_add(acc[chain][r][v], numbers[r], w);
        }
      }
    } else {
      Vec<A> w[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) w[v] = weights(v);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const E number = left(r, k);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[chain][r][v] = multiply_add_in_place<A>(acc[chain][r][v], number, w[v]);
      }
    }
  };
  for (; depth >= kRound; depth -= kRound) {
#pragma GCC unroll 4
    for (int k = 0; k < kRound; ++k) step(k, k % Chains);
    left.advance(kRound);
    panel += kRound * 2 * kUnits<A>;
    if constexpr (kNext) next += kRound * 2 * kUnits<A>;
  }
  if constexpr (kRound == Chains && Chains > 1) {
    if (depth > 0) step(0, 0);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Vec<A> all = acc[0][r][v];
      for (int chain = 1; chain < Chains; ++chain) all += acc[chain][r][v];
      finish(r, v, all);
    }
  }
}

// finish(r, v, start(r, v) + sum over k < depth of left(r, k) * panel[k][v]) for R rows and V vectors of a panel of K
// inputs. With two Chains, even and odd k are summed apart: a single row has too few sums to hide the latency of an
// addition. Memory is asked for what comes: `next`, a cache line for each k of what is needed after this product, where
// there is kNext; and by a single row, which waits for nothing but the panel, for the panel itself.
// Left is StridedRows or Sliver of E, which is A, or Pair.
template <class E, int R, int V, int Chains = 1, bool kNext = false, class Left, class Start, class Finish>
FUSEDRNN_INLINE void accumulate(const Left& left, const E* panel, int64_t K, int64_t depth, const Start& start,
                                const Finish& finish, const E* next = nullptr) {
  if constexpr (kInputsARound > Chains && R != 2) {  // two rows wait for the panel, and not for instructions
    if (depth % kInputsARound == 0) {
      return accumulate_rounds<E, R, V, Chains, kNext, kInputsARound>(left, panel, K, depth, start, finish, next);
    }
  }
  accumulate_rounds<E, R, V, Chains, kNext, Chains>(left, panel, K, depth, start, finish, next);
}

template <class A>
FUSEDRNN_INLINE Vec<A> zero(int, int) {
  return Vec<A>{};
}

template <int R>
struct Rows {
  static constexpr int kCount = R;
};

// f(Rows<rows>), for rows from 1 to Most.
template <int Most, class F>
FUSEDRNN_INLINE void with_rows(int64_t rows, const F& f) {
  if constexpr (Most > 1) {
    if (rows < Most) return with_rows<Most - 1>(rows, f);
  }
  f(Rows<Most>{});
}

// Products of a few shapes, not inlined: the code is shared, and the compiler keeps the sums in registers, which it
// spills if it inlines the loop into large functions. tests/cpu/test_spills.py checks the loops.

// sum[r] += R rows @ kTileVectors of a panel, `stride` numbers apart; sum is that of the first of these vectors.
template <class E, int R, bool kNext>
__attribute__((noinline)) void add_tile(const E* rows, int64_t stride, const E* panel, int64_t K, int64_t depth,
                                        Vec<Compute<E>> (*sum)[4], const E* next) {
  using V = Vec<Compute<E>>;
  accumulate<E, R, kTileVectors, 1, kNext>(
      StridedRows<E, R>(rows, stride), panel, K, depth, [&](int r, int v) { return sum[r][v]; },
      [&](int r, int v, V value) { sum[r][v] = value; }, next);
}

// sum[r] += R rows @ a panel.
template <class E, int R>
__attribute__((noinline)) void wide_tile(const E* rows, int64_t stride, const E* panel, int64_t K,
                                         Vec<Compute<E>> (*sum)[4]) {
  using V = Vec<Compute<E>>;
  accumulate<E, R, 4>(
      StridedRows<E, R>(rows, stride), panel, K, K, [&](int r, int v) { return sum[r][v]; },
      [&](int r, int v, V value) { sum[r][v] = value; });
}

// sum[0] = the only row @ a panel.
template <class E>
__attribute__((noinline)) void single_row_product(const E* row, const E* panel, int64_t K, Vec<Compute<E>> (*sum)[4]) {
  using V = Vec<Compute<E>>;
  accumulate<E, 1, 4, 2>(StridedRows<E, 1>(row, 0), panel, K, K, zero<Compute<E>>,
                         [&](int r, int v, V value) { sum[r][v] = value; });
}

// Predicate: whether any of `count` rows from b + first on exists at step t, so that their product is needed.
struct WantedRows {
  bool operator()(int64_t first, int64_t count) const { return any && direction->any_exists(t, b + first, count); }

  const Direction* direction;
  int64_t t, b;
  bool any = true;
};

// sum[r] += a[r] @ panel for r in [0, rows), rows at most kRowsAtATime. Tiles with wanted(first, count) false are
// skipped.
template <class E>
__attribute__((noinline)) void add_rows(Vec<Compute<E>> (*sum)[4], const E* a, int64_t stride, const E* panel,
                                        int64_t K, int64_t rows, const WantedRows& wanted) {
  using A = Compute<E>;
  if (rows <= kFewRows) {
    if (!wanted(0, rows)) return;
    return with_rows<kFewRows>(rows, [&](auto R) { wide_tile<E, R.kCount>(a, stride, panel, K, sum); });
  }
  const int64_t tiles = blocks_of(rows, kTileRows);
  for (int64_t k = 0; k < K; k += kDepth) {
    const int64_t depth = K - k < kDepth ? K - k : kDepth;
    for (int first_vector = 0; first_vector < 4; first_vector += kTileVectors) {
      const E* part = panel + in_panel<A>(K, k, first_vector);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = tile * rows / tiles, count = (tile + 1) * rows / tiles - first;
        if (!wanted(first, count)) continue;
        auto* const own = reinterpret_cast<Vec<A>(*)[4]>(&sum[first][first_vector]);
        const E* const left = a + first * stride + k;
        with_rows<kTileRows>(count, [&](auto R) {
          // The first ones prefetch one vector each of the next panel, which may be in the next block.
          if (!kNarrow && tile < kTileVectors) {
            const E* const next = k + kDepth < K ? panel + in_panel<A>(K, k + kDepth, tile)
                                                 : panel + K * kWide<A> + in_panel<A>(K, 0, tile);
            add_tile<E, R.kCount, true>(left, stride, part, K, depth, own, next);
          } else {
            add_tile<E, R.kCount, false>(left, stride, part, K, depth, own, nullptr);
          }
        });
      }
    }
  }
}

// As add_rows, from zeros. `alone`: the layer has a single row, which needs no tile.
template <class E>
FUSEDRNN_INLINE void multiply(Vec<Compute<E>> (*sum)[4], const E* a, int64_t stride, const E* panel, int64_t K,
                              int64_t rows, bool alone, const WantedRows& wanted) {
  for (int64_t r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = sum[r][2] = sum[r][3] = Vec<Compute<E>>{};
  if (!alone) return add_rows<E>(sum, a, stride, panel, K, rows, wanted);
  if (wanted(0, 1)) single_row_product(a, panel, K, sum);
}

// f(first row, rows) for parts of at most kMost rows that cover [begin, end), as even as possible.
template <int64_t kMost = kRowsAtATime, class F>
FUSEDRNN_INLINE void for_each_part(int64_t begin, int64_t end, const F& f) {
  const int64_t chunks = blocks_of(end - begin, kMost);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = begin + chunk * (end - begin) / chunks;
    f(first, begin + (chunk + 1) * (end - begin) / chunks - first);
  }
}

// to[k * 2 * lanes + lane] = w[lane][begin + k] for w [units][K] and k in [0, inputs), and 0 for lanes from units on;
// units may be more than lanes.
template <class S>
FUSEDRNN_INLINE void transpose_into(const S* w, int64_t units, int64_t K, int64_t begin, int64_t inputs,
                                    Compute<S>* to) {
  using A = Compute<S>;
  w += begin;
  for (int64_t k = 0; k < inputs; k += kUnits<A>) {
    Vec<A> square[kUnits<A>];
    for (int64_t u = 0; u < kUnits<A>; ++u) {
      square[u] = u < units ? load(w + u * K + k, inputs - k) : Vec<A>{};
      __builtin_prefetch(w + u * K + k + kPackAhead * kUnits<A>);
    }
    transpose<A>(square);
    const int64_t count = inputs - k < kUnits<A> ? inputs - k : kUnits<A>;
    for (int64_t u = 0; u < count; ++u) store(to + (k + u) * 2 * kUnits<A>, square[u]);
  }
}

// As transpose_into, for pairs: to[k * 2 * lanes + lane] = w[lane][2 * (begin + k)], w[lane][2 * (begin + k) + 1].
FUSEDRNN_INLINE void transpose_pairs_into(const BFloat16* w, int64_t units, int64_t K, int64_t begin, int64_t inputs,
                                          float* to) {
  constexpr int64_t kPairs = kUnits<float>;
  w += 2 * begin;
  for (int64_t k = 0; k < inputs; k += kPairs) {
    const int64_t numbers = K - 2 * (begin + k);
    Vec<float> square[kPairs];
    for (int64_t u = 0; u < kPairs; ++u) {
      square[u] = Vec<float>{};
      if (u >= units || numbers <= 0) continue;
      const BFloat16* const from = w + u * K + 2 * k;
      if (numbers >= 2 * kPairs) {
        std::memcpy(&square[u], from, sizeof(square[u]));
      } else {
        std::memcpy(&square[u], from, numbers * sizeof(BFloat16));
      }
      __builtin_prefetch(w + u * K + 2 * (k + kPackAhead * kPairs));
    }
    transpose<float>(square);
    const int64_t count = inputs - k < kPairs ? inputs - k : kPairs;
    for (int64_t u = 0; u < count; ++u) store(to + (k + u) * 2 * kPairs, square[u]);
  }
}

// Inputs [begin, begin + inputs) of a panel of the maps of a product, for w [gates][H][K], as a panel of so many
// inputs. `panel` counts those of a chunk, chunk after chunk; see params.h.
template <class S, Operands kOperands>
void pack_maps_of(const MapWeights& weights, int64_t K, int64_t panel, int64_t begin, int64_t inputs, void* to) {
  using A = Compute<S>;
  const MapWindow& window = *weights.maps;
  const int64_t H = weights.H, maps = window.end - window.begin, blocks = chunk_blocks(maps);
  for (int64_t v = 0; v < 4; ++v) {
    const int64_t of_chunk = maps * blocks / 4;
    const int64_t index = panel % of_chunk * 4 + v;  // among the vectors of a chunk: map after map, block after block
    const int64_t unit = (panel / of_chunk * blocks + index % blocks) * kUnits<A>, units = H - unit;
    const S* const rows =
        static_cast<const S*>(weights.w) + (window.gates[index / blocks] * H + (units > 0 ? unit : 0)) * K;
    A* const part = static_cast<A*>(to) + in_panel<A>(inputs, 0, v);
    if constexpr (kOperands != Operands::kNumbers) {
      transpose_pairs_into(rows, units, K, begin, inputs, part);
    } else {
      transpose_into(rows, units, K, begin, inputs, part);
    }
  }
}

// Panels [begin, end) of the maps of a product, whole. Of pairs there are as many inputs as kOperands take.
template <class S, Operands kOperands>
void pack_maps(const void* w, const MapWindow& window, int64_t H, int64_t K, void* panels, int64_t begin, int64_t end) {
  const int64_t inputs = panel_inputs<kOperands>(K);
  for (int64_t panel = begin; panel < end; ++panel) {
    auto* const to = static_cast<Compute<S>*>(panels) + panel * inputs * kWide<Compute<S>>;
    pack_maps_of<S, kOperands>({w, &window, H}, K, panel, 0, inputs, to);
  }
}

// As UnpackedWeights::pack, for maps.
template <class S, Operands kOperands>
void pack_weight_maps(const UnpackedWeights& from, int64_t panel, int64_t begin, int64_t inputs, void* to) {
  const MapWindow& window = *from.weights.maps;
  const int64_t maps = window.end - window.begin, of_chunk = maps * chunk_blocks(maps) / 4;
  const int64_t chunk = from.first_chunk + panel % from.chunks;
  pack_maps_of<S, kOperands>(from.weights, from.columns, chunk * of_chunk + panel / from.chunks, begin, inputs, to);
}

// For each block: the v-th vector of input k, lane by lane, = w[(block * 4 + v) * lanes + lane][k], for w [N][K]
template <class S>
void pack_rows(const void* w, int64_t N, int64_t K, void* panel, int64_t begin, int64_t end) {
  using A = Compute<S>;
  const S* from = static_cast<const S*>(w);
  A* to = static_cast<A*>(panel);
  for (int64_t block = begin; block < end; ++block) {
    for (int64_t v = 0; v < 4; ++v) {
      const int64_t n = block * kWide<A> + v * kUnits<A>;
      transpose_into(from + n * K, N - n, K, 0, K, to + block * K * kWide<A> + in_panel<A>(K, 0, v));
    }
  }
}

// Input k of panels of K inputs: for all N outputs row[0..N), or zeros where row is null.
template <class S>
FUSEDRNN_INLINE void pack_input(const S* row, int64_t N, Compute<S>* panels, int64_t K, int64_t k) {
  using A = Compute<S>;
  for (int64_t block = 0; block < blocks_of(N, kWide<A>); ++block) {
    for (int64_t v = 0; v < 4; ++v) {
      const int64_t first = block * kWide<A> + v * kUnits<A>;
      const Vec<A> values = row != nullptr && first < N ? load(row + first, N - first) : Vec<A>{};
      store(panels + block * K * kWide<A> + in_panel<A>(K, k, v), values);
    }
  }
}

// As pack_input above, for pairs from two rows of 16-bit numbers; either row may be null.
template <class S>
FUSEDRNN_INLINE void pack_input(const S* first, const S* second, int64_t N, float* panels, int64_t K, int64_t k) {
  for (int64_t block = 0; block < blocks_of(N, kWide<float>); ++block) {
    for (int64_t v = 0; v < 4; ++v) {
      const int64_t column = block * kWide<float> + v * kUnits<float>, count = N - column;
      const Vec<float> zeros{};
      const Vec<float> low = first != nullptr && count > 0 ? load(first + column, count) : zeros;
      const Vec<float> high = second != nullptr && count > 0 ? load(second + column, count) : zeros;
      store(panels + block * K * kWide<float> + in_panel<float>(K, k, v), paired(low, high));
    }
  }
}

// For inputs k in [begin, end): the v-th vector of a block, lane by lane, = w[k][(block * 4 + v) * lanes + lane], for
// w [K][N]; zeros where w is null.
template <class S>
void pack_columns(const void* w, int64_t K, int64_t N, void* panel, int64_t begin, int64_t end) {
  const S* from = static_cast<const S*>(w);
  for (int64_t k = begin; k < end; ++k) {
    pack_input(from == nullptr ? nullptr : from + k * N, N, static_cast<Compute<S>*>(panel), K, k);
  }
}

// As UnpackedWeights::pack, for rows of weights.
template <class S, Operands kOperands>
void pack_weight_rows(const UnpackedWeights& from, int64_t panel, int64_t begin, int64_t inputs, void* to) {
  using A = Compute<S>;
  constexpr bool kPairs = kOperands != Operands::kNumbers;
  const int64_t N = from.columns, column = panel * kWide<A>;
  MapRows rows(from.weights);
  const auto row = [&](int64_t k) {
    const int64_t index = rows(k);
    return index < 0 ? nullptr : static_cast<const S*>(from.weights.w) + index * N + column;
  };
  A* at = static_cast<A*>(to);
  for (int64_t k = 0; k < inputs; ++k, at += 2 * kUnits<A>) {
    const S *first = nullptr, *second = nullptr;
    if constexpr (kPairs) {
      first = row(2 * (begin + k));
      second = row(2 * (begin + k) + 1);
    } else {
      first = row(begin + k);
    }
    for (int64_t v = 0; v < 4; ++v) {
      const int64_t count = N - column - v * kUnits<A>;
      const auto numbers = [&](const S* from) {
        if (from == nullptr || count <= 0) return Vec<A>{};
        __builtin_prefetch(from + kPackRowsAhead * N + v * kUnits<A>);
        return load(from + v * kUnits<A>, count);
      };
      Vec<A> values = numbers(first);
      if constexpr (kPairs) values = paired(values, numbers(second));
      store(at + in_panel<A>(inputs, 0, v), values);
    }
  }
}

// Products with weights as they lie: tiles of rows by units, whose sums are vectors along K. Weights are read once and
// never packed; every sum takes an addition of all its lanes at the end.
//
// The order of a sum does not depend on the tile here either.

// Rows of a tile, and its units for one row, two rows, and more: for few rows more of them, because more streams of
// weights hide more latency.
constexpr int kDotRows = 6;
template <class A>
constexpr int dot_units(int rows) {
  const int most = rows == 1 ? 8 : (rows == 2 ? 8 : 4) / (kNarrow ? 2 : 1);
  return kUnits<A> < most ? kUnits<A> : most;
}
constexpr int64_t kDotRowsAtATime = 24;  // whose sums stay in the first-level cache

// sums[r][u] += rows[r] * w[u], lane by lane along K; `next` is weights of which one cache line is prefetched for each
// vector.
template <class A, int R, int U, class S, class Operand>
FUSEDRNN_INLINE void add_dots(Vec<A> (&sums)[R][U], const S* const (&w)[U], StridedRows<Operand, R> rows, int64_t K,
                              const S* next) {
  const auto add = [&](int64_t k, auto... count) __attribute__((always_inline)) {
    const auto number = [&](int r) { return load(rows.place(r), count...); };
    const auto weight = [&](int u) { return load(w[u] + k, count...); };
    // The smaller of the two operands stays in registers.
    if constexpr (R < U) {
      Vec<A> numbers[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) numbers[r] = number(r);
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
        const Vec<A> value = weight(u);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[r][u] = add_product_in_place<A>(sums[r][u], value, numbers[r]);
      }
    } else {
      Vec<A> weights[U];
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) weights[u] = weight(u);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec<A> value = number(r);
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) sums[r][u] = add_product_in_place<A>(sums[r][u], value, weights[u]);
      }
    }
  };
  const int64_t whole = K - K % kUnits<A>;
  for (int64_t k = 0; k < whole; k += kUnits<A>) {
    if constexpr (R > 2) __builtin_prefetch(next + k);
    add(k);
    rows.advance(kUnits<A>);
  }
  if (whole < K) add(whole, K - whole);
}

// The operands of one product of dots_of_units: weights [units][K], or null for none, and rows of them.
template <class S, class Operand>
struct DotOperand {
  const S* w;
  const Operand* rows;
  int64_t stride, K;
};

// all[row][unit], lane by lane along K: both products of R rows from `first` on and U units from `unit` on. Units that
// are not there are computed as the last one is. Tile after tile prefetches a unit of the next ones. Not inlined, as
// the products above.
template <int R, int U, class A, class S, class State>
__attribute__((noinline)) void dot_tile(const DotOperand<S, S>& input, const DotOperand<S, State>& recurrent,
                                        int64_t first, int64_t unit, int64_t units, int64_t tile, Vec<A>* all) {
  Vec<A> sums[R][U];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) sums[r][u] = Vec<A>{};
  }
  const auto add = [&](const auto& operand) __attribute__((always_inline)) {
    if (operand.w == nullptr) return;
    const S* w[U];
    for (int u = 0; u < U; ++u) w[u] = operand.w + (unit + u < units ? unit + u : units - 1) * operand.K;
    const StridedRows<std::remove_cvref_t<decltype(*operand.rows)>, R> rows(operand.rows + first * operand.stride,
                                                                            operand.stride);
    const int64_t after = unit + U + tile;
    const S* const next = operand.w + (tile < U && after < units ? after : unit) * operand.K;
    add_dots<A, R, U>(sums, w, rows, operand.K, next);
  };
  add(input);
  add(recurrent);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) all[(first + r) * kUnits<A> + unit + u] = sums[r][u];
  }
}

// to[r * to_stride], lane u: the sum of both products of row r and unit u. At most kDotRowsAtATime rows; the lanes from
// `units` on are not defined. A function of its own, which all cells share.
template <class S, class State>
__attribute__((noinline)) void dots_of_units(const DotOperand<S, S>& input, const DotOperand<S, State>& recurrent,
                                             int64_t rows, int64_t units, Vec<Compute<S>>* to, int64_t to_stride) {
  using A = Compute<S>;
  Vec<A> all[kDotRowsAtATime * kUnits<A>];
  const int64_t tiles = blocks_of(rows, kDotRows);
  const auto for_units_of = [&](auto Count) {  // tiles of so many rows, or of three to so many
    constexpr int kMost = decltype(Count)::kCount, U = dot_units<A>(kMost);
    for (int64_t unit = 0; unit < units; unit += U) {
      if constexpr (kMost < 3) {
        dot_tile<kMost, U, A>(input, recurrent, 0, unit, units, U, all);
        continue;
      }
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = tile * rows / tiles;
        with_rows<kMost>((tile + 1) * rows / tiles - first,
                         [&](auto R) { dot_tile<R.kCount, U, A>(input, recurrent, first, unit, units, tile, all); });
      }
    }
  };
  if (rows == 1) {
    for_units_of(Rows<1>{});
  } else if (rows == 2) {
    for_units_of(Rows<2>{});
  } else {
    for_units_of(Rows<kDotRows>{});
  }
  for (int64_t r = 0; r < rows; ++r) to[r * to_stride] = sum_each<A>(all + r * kUnits<A>);
}

}  // namespace fusedrnn::FUSEDRNN_ISA
