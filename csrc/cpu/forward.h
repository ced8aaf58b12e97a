// Forward of one layer, both directions: one launch over the whole sequence, or one for each chunk of time steps.
//
//   a_t = xg_t + h_{t-1} @ w_hh^T         m_t, carry_t, saved_t = cell(a_t, carry_{t-1})
//   h_t = m_t  or  m_t @ w_hr^T
//
// where a_t are the maps of the cell (csrc/cells); each map has the input projection xg, the recurrent product, or
// both.
//
// Work: a block is `lanes` hidden units; a chunk is one block or four, whose maps fill whole panels (params.h). The
// sums of a chunk stay in the L1 cache, the cells of a block in registers; h, the carry and, for training, the saved
// values are written once. The cells of several rows are interleaved to hide latency; for a single row, those of
// several blocks. Split by rows: each worker runs its rows through all steps, without synchronisation. Split by units:
// workers share the chunks of a step, with a barrier after it, and a second one with a projection (team.h). h_{t-1} and
// h_t are in two buffers, so that no block reads what another writes in the same step. For few rows and steps nothing
// is packed: the products are dot products along K. A single step of more rows reads weights once: a worker packs them
// in its cache (gemm.h). With AMX tiles (tile_product.h) a product is stored in the worker's
// scratch, and its cells run beside the next product. xg is computed before the launch, or in it, chunk by chunk
// (fuses_input in plan.h), with the same bits.
#pragma once

#include "activations.h"
#include "geometry.h"
#include "operands.h"
#include "panel.h"
#include "team.h"
#include "tile_product.h"

namespace fusedrnn::FUSEDRNN_ISA {

// Whether a product contributes to a map, and the block of rows of torch's weights for it.
constexpr FUSEDRNN_INLINE bool has_map(const MapWindow& window, int map) {
  return window.begin <= map && map < window.end;
}
constexpr FUSEDRNN_INLINE int64_t gate_of(const MapWindow& window, int map) { return window.gates[map - window.begin]; }

// The sum of the biases of a map's products for `count` units from `unit` on; zeros without biases.
template <class S>
FUSEDRNN_INLINE Vec<Compute<S>> sum_of_biases(const CellSpec& spec, int map, const void* b_ih, const void* b_hh,
                                              int64_t H, int64_t unit, int64_t count) {
  Vec<Compute<S>> sum{};
  if (b_ih == nullptr) return sum;
  const auto bias = [&](const MapWindow& window, const void* from) {
    return load(static_cast<const S*>(from) + gate_of(window, map) * H + unit, count);
  };
  if (has_map(spec.input, map)) sum = bias(spec.input, b_ih);
  if (has_map(spec.recurrent, map)) sum += bias(spec.recurrent, b_hh);
  return sum;
}

// See CellKernels.
template <class Cell, class S>
void add_biases(const void* b_ih, const void* b_hh, int64_t H, int begin, int end, bool in_chunks, void* to) {
  using A = Compute<S>;
  constexpr CellSpec kSpec = Cell::kSpec;
  constexpr int64_t kChunk = chunk_blocks(kSpec.gates);
  const SavedOrder<A> order(H, kSpec.saved);
  const int64_t blocks = blocks_of(blocks_of(H, kUnits<A>), kChunk) * kChunk;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t unit = block * kUnits<A>, count = H - unit;
    for (int map = begin; map < end; ++map) {
      const Vec<A> sum = count > 0 ? sum_of_biases<S>(kSpec, map, b_ih, b_hh, H, unit, count) : Vec<A>{};
      if (in_chunks) {
        const int64_t at = (block / kChunk * (end - begin) + map - begin) * kChunk + block % kChunk;
        store(static_cast<A*>(to) + at * kUnits<A>, sum);
      } else if (count > 0) {
        store(static_cast<A*>(to) + order(unit, map), sum, count);
      }
    }
  }
}

// The pointwise function of a variant. Not inlined: it takes much longer than a call, and long to compile.
template <class Cell, class A, int R>
__attribute__((noinline)) void forward_of_variant(Vec<A> (&a)[R][Cell::kSpec.maps], Vec<A> (&c)[R], Vec<A> (&m)[R],
                                                  const typename Cell::template Operands<VectorMath<A>>& operands) {
  Cell::template forward<VectorMath<A>, R>(a, c, m, operands);
}

// With operands that are pairs the state is stored in S.
template <class Cell, class S, Operands kOperands>
class Forward {
 public:
  using A = Compute<S>;
  using V = Vec<A>;
  static constexpr bool kPairs = kOperands != Operands::kNumbers, kTiles = kOperands == Operands::kTiles;
  using State = std::conditional_t<kPairs, S, A>;
  using E = std::conditional_t<kPairs, Pair, A>;

  explicit Forward(const ForwardParams& params)
      : p_(params), s_(params.sizes), order_(params.sizes.H, kSaved), blocks_at_a_time_(blocks_at_a_time()) {}

  void run(int index) const {
    Pipeline pipeline;
    if (p_.team.split == Team::Split::kRows) {
      for (int64_t d = 0; d < s_.D; ++d) {
        const OwnedRows rows = owned_rows(s_, p_.sequence, p_.team, index, d);
        if (rows.begin >= rows.end) continue;
        if (p_.begin == 0) start(d, rows.begin, rows.end);
        for (int64_t n = p_.begin; n < p_.end; ++n) {
          for (int64_t k = 0; k < unit_chunks(); ++k) {
            units(pipeline, n, d, in_turns(n - p_.begin, k, unit_chunks()), rows.begin, rows.end);
          }
          pipeline.finish();
          for (int64_t k = 0; k < output_blocks(); ++k) {
            outputs(n, d, in_turns(n, k, output_blocks()), rows.begin, rows.end);
          }
        }
      }
      return;
    }
    // One Worker serves phases of different chunk counts by using the larger one; the surplus chunks are empty.
    const int64_t chunks = unit_chunks();
    Worker worker(p_.team, s_.D * chunks, index, s_.B * blocks_at_a_time_ * kSpec.gates * kUnits<A> * s_.P);
    worker.phase([&](int64_t chunk) {
      if (chunk % chunks == 0 && p_.begin == 0) start(chunk / chunks, 0, s_.B);
    });
    for (int64_t n = p_.begin; n < p_.end; ++n) {
      prefetch_entering(n);
      worker.phase([&](int64_t chunk) { units(pipeline, n, chunk / chunks, chunk % chunks, 0, s_.B); },
                   [&] { pipeline.finish(); });
      if (!projected()) continue;
      worker.phase([&](int64_t chunk) {
        if (chunk % chunks < output_blocks()) outputs(n, chunk / chunks, chunk % chunks, 0, s_.B);
      });
    }
  }

  // T = 1: before step(), the state of the rows.
  void step_start() const {
    for (int64_t d = 0; d < s_.D; ++d) start(d, 0, s_.B);
  }

  // T = 1: blocks [begin, end) of D * unit_blocks(), for all rows.
  void step(int64_t begin, int64_t end) const {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t d = block / unit_blocks(), rows = Direction(s_, p_.sequence, d).rows(0);
      dot_units(0, d, block % unit_blocks(), 0, rows);
    }
  }

  // T = 1: chunks [begin, end) of D * all chunks, for rows [row, row_end), at most kGemmRows. own: memory of the
  // worker.
  void step_of_batch(int64_t begin, int64_t end, int64_t row, int64_t row_end, void* own) const {
    const int64_t chunks = blocks_of(unit_blocks(), kChunk);
    for (int64_t d = 0; d < s_.D; ++d) {
      const Direction direction(s_, p_.sequence, d);
      const int64_t first = begin > d * chunks ? begin - d * chunks : 0;
      const int64_t last = end < (d + 1) * chunks ? end - d * chunks : chunks;
      const int64_t rows = direction.clipped(0, row_end) - row;
      if (first < last && rows > 0) batch_units(direction, d, first, last - first, row, rows, own);
    }
  }

  // T = 1 with a projection: outputs [begin, end) of D * P, for all rows.
  void step_project(int64_t begin, int64_t end) const {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t d = n / s_.P, output = n % s_.P;
      const Direction direction(s_, p_.sequence, d);
      const S* w_hr = static_cast<const S*>(p_.w_hr[d]) + output * s_.H;
      const A* m = static_cast<const A*>(p_.m) + state(s_, d, 0, s_.H);
      for (int64_t b = 0; b < direction.rows(0); ++b) {
        V sum{};
        for (int64_t k = 0; k < s_.H; k += kUnits<A>)
          sum += load(w_hr + k, s_.H - k) * load(m + b * s_.H + k, s_.H - k);
        Outputs(*this, direction, 0, d, b, output).template write<true>(0, broadcast<A>(horizontal_sum<A>(sum)), 1);
      }
    }
  }

 private:
  static constexpr CellSpec kSpec = Cell::kSpec;
  static constexpr int kMaps = kSpec.maps, kSaved = kSpec.saved, kInputMaps = kSpec.input.end - kSpec.input.begin;
  static constexpr bool kHasCarry = kSpec.carry != Carry::kNone, kHasCell = kSpec.carry == Carry::kCell;
  static constexpr bool kVariant = kSpec.parameters > 0;
  static constexpr int kParameters = kVariant ? kSpec.parameters : 1;
  static_assert(kSaved <= kMaps && kSpec.input.begin == 0 && kInputMaps == kSpec.gates);
  static_assert(kSpec.recurrent.end == kMaps && kMaps - kSpec.recurrent.begin == kSpec.gates);

  // Panels of a chunk, of all maps; and of each product, among these.
  static constexpr int64_t kChunk = chunk_blocks(kSpec.gates), kPanels = kMaps * kChunk / 4;
  static constexpr int64_t kInputPanels = kInputMaps * kChunk / 4;
  static constexpr int64_t kRecurrentPanels = kSpec.gates * kChunk / 4, kFirstRecurrent = kPanels - kRecurrentPanels;
  static_assert(kChunk == 4 || kPanels == 1);
  // Rows of the sums of a chunk: fewer where it has more panels, so that they stay in the first-level cache.
  static constexpr int64_t kSumRows = kTiles ? kTileChunk : kPanels > 1 ? 24 : kRowsAtATime;
  using PanelSums = V (*)[kSumRows][4];

  static constexpr int kTogether = 4;  // rows, or blocks of a single one, whose cells are computed at the same time

  struct Rest;
  using Pipeline = std::conditional_t<kTiles, TilePipeline<Rest, kPanels>, NoPipeline>;

  bool projected() const { return kSpec.projects && s_.projected; }
  int64_t unit_blocks() const { return blocks_of(s_.H, kUnits<A>); }
  int64_t unit_chunks() const { return blocks_of(unit_blocks(), blocks_at_a_time_); }

  // Number of blocks that a worker takes at a time: a chunk; or, for a single row, the largest number that does not
  // increase the busiest worker's load.
  int64_t blocks_at_a_time() const {
    if (kChunk > 1 || s_.B > 1) return kChunk;
    const int64_t workers = p_.team.split == Team::Split::kUnits ? p_.team.workers : 1;
    int64_t best = 1, least = blocks_of(s_.D * unit_blocks(), workers);
    for (int64_t count = 2; count <= kTogether; ++count) {
      const int64_t most = blocks_of(s_.D * blocks_of(unit_blocks(), count), workers) * count;
      if (most <= least) best = count;
    }
    return best;
  }

  // No more than there are chunks of units.
  int64_t output_blocks() const { return projected() ? blocks_of(s_.P, kWide<A>) : 0; }

  // Whether the state entering the n-th step may be nonzero.
  bool enters(int64_t n) const { return n > 0 || p_.h0 != nullptr; }

  // The state entering the n-th step; its rows, and the inputs of its product.
  State* h(int64_t n, int64_t d) const { return static_cast<State*>(p_.h) + ((n & 1) * s_.D + d) * s_.B * h_stride(); }
  int64_t h_stride() const { return padded(s_.P); }
  static int64_t padded(int64_t K) { return blocks_of(K, inputs_at_a_time(kOperands)) * inputs_at_a_time(kOperands); }
  static int64_t inputs(int64_t K) { return padded(K) / (kPairs ? 2 : 1); }

  // The input projection of a row: the first map of a block; see ForwardParams::xg.
  struct Maps {
    const A* at = nullptr;
    int64_t row = 0, block = 0, map = 0;  // strides; that of blocks within a chunk
  };
  Maps maps(const Direction& direction, int64_t d, int64_t t, int64_t b, int64_t block) const {
    const A* const all = static_cast<const A*>(p_.xg[d]);
    if (all == nullptr) return {};
    const int64_t first = d == 0 ? p_.begin : s_.T - p_.end, row = direction.row(t, b) - direction.row(first, 0);
    if (p_.xg_rows[d] == 0) {
      const int64_t of_row = kSaved * s_.H, of_block = order_(kUnits<A>);
      return {all + row * of_row + block * of_block, of_row, of_block, order_(0, 1)};
    }
    const int64_t panel = p_.xg_rows[d] * kWide<A>;
    const A* const at = all + row * kWide<A> + block / kChunk * kInputPanels * panel + block % kChunk * kUnits<A>;
    if constexpr (kChunk == 1) return {at, kWide<A>, panel, kUnits<A>};
    return {at, kWide<A>, kUnits<A>, panel};
  }

  // Sums of a block, for each row; or, for a single row, for each block of a chunk.
  struct Sums {
    V& operator()(int64_t r, int64_t map) const { return kChunk == 1 ? at[r * 4 + map] : at[r * row + map * of_map]; }

    V* at;
    int64_t row = 4, of_map = kChunk == 1 ? 1 : 4 * kSumRows;  // strides
  };

  // Prefetches. They must be inlined: the compiler removes a call of a function without other effects.
  static FUSEDRNN_INLINE void prefetch_maps(const Maps& maps, int64_t row) {
    for (int64_t k = 0; k < kInputMaps; ++k) __builtin_prefetch(maps.at + row * maps.row + k * maps.map);
  }
  // A state of few cache lines, some just written by other cores: prefetching overlaps the misses.
  FUSEDRNN_INLINE void prefetch_entering(int64_t n) const {
    const char* const from = reinterpret_cast<const char*>(h(n, 0));
    const int64_t bytes = s_.D * s_.B * h_stride() * static_cast<int64_t>(sizeof(State));
    constexpr int64_t kLine = sizeof(Line), kFewLines = 64;
    if (bytes > kFewLines * kLine) return;
    for (int64_t k = 0; k < bytes; k += kLine) __builtin_prefetch(from + k);
  }
  // The destination of a block of a single row: the barrier has to wait for ownership of these lines.
  FUSEDRNN_INLINE void prefetch_written(const Direction& direction, int64_t n, int64_t d, int64_t unit) const {
    if (projected()) return;
    __builtin_prefetch(static_cast<S*>(p_.y) + time_major(s_, direction.row(direction.at(n), 0), d, s_.P) + unit, 1);
    __builtin_prefetch(h(n + 1, d) + unit, 1);
  }

  // The carry of a block of units, given its first unit: `lanes` numbers for each row.
  A* carry(int64_t d, int64_t unit) const {
    return static_cast<A*>(p_.carry) + (d * unit_blocks() * kUnits<A> + unit) * s_.B;
  }

  // The initial state, and the final state of rows without steps.
  void start(int64_t d, int64_t row_begin, int64_t row_end) const {
    const Direction direction(s_, p_.sequence, d);
    for (int64_t b = row_begin; b < row_end; ++b) {
      const S* h0 = static_cast<const S*>(p_.h0);
      const S* c0 = static_cast<const S*>(kHasCell ? p_.c0 : p_.h0);  // of the size of a carry
      const bool is_reset = direction.is_reset(direction.first(b), b);
      const A* dropped = nullptr;
      if constexpr (kVariant) {
        if (direction.length(b) > 0) dropped = noise_at<A>(s_, p_.noise, Noise::kR, direction, 0, d, b, 0);
      }
      for (int64_t k = 0; k < s_.P; k += kUnits<A>) {
        V value = h0 == nullptr ? V{} : load(h0 + state(s_, d, b, s_.P) + k, s_.P - k);
        if (kVariant && dropped != nullptr) value *= load(dropped + k, s_.P - k);
        store(h(0, d) + b * h_stride() + k, is_reset ? V{} : value, s_.P - k);
        // In packed input no earlier step copies the state to the first existing one.
        if (direction.is_packed()) store(h(1, d) + b * h_stride() + k, is_reset ? V{} : value, s_.P - k);
      }
      for (int64_t n = 0; n < 2; ++n) {
        std::memset(h(n, d) + b * h_stride() + s_.P, 0, (h_stride() - s_.P) * sizeof(State));
      }
      for (int64_t k = 0; kHasCarry && k < s_.H; k += kUnits<A>) {
        const V value = c0 == nullptr ? V{} : load(c0 + state(s_, d, b, s_.H) + k, s_.H - k);
        store(carry(d, k) + b * kUnits<A>, value);
      }
      if (direction.length(b) > 0) continue;
      copy_state(static_cast<S*>(p_.hn), h0, state(s_, d, b, s_.P), s_.P);
      if (kHasCell) copy_state(static_cast<S*>(p_.cn), c0, state(s_, d, b, s_.H), s_.H);
    }
  }

  static void copy_state(S* to, const S* from, int64_t offset, int64_t size) {
    if (from == nullptr) {
      std::memset(to + offset, 0, size * sizeof(S));
    } else {
      std::memcpy(to + offset, from + offset, size * sizeof(S));
    }
  }

  // Units of a block.
  int64_t count(int64_t block) const {
    const int64_t units = s_.H - block * kUnits<A>;
    return units < kUnits<A> ? units : kUnits<A>;
  }

  // The n-th step of a chunk of hidden units, for rows [row_begin, row_end).
  void units(Pipeline& pipeline, int64_t n, int64_t d, int64_t chunk, int64_t row_begin, int64_t row_end) const {
    const Direction direction(s_, p_.sequence, d);
    const int64_t begin = chunk * blocks_at_a_time_, after = begin + blocks_at_a_time_;
    const int64_t end = after < unit_blocks() ? after : unit_blocks(), t = direction.at(n);
    if (s_.B == 1) return single_row(direction, n, d, begin, end);
    row_end = direction.clipped(t, row_end);
    if (p_.panel_hh == nullptr) {
      for (int64_t block = begin; block < end; ++block) dot_units(n, d, block, row_begin, row_end);
      return;
    }
    if constexpr (kTiles) {
      for (int64_t b = row_begin; b < row_end; b += kTileChunk) {
        tiled_units(pipeline, direction, n, d, chunk, row_begin, b,
                    row_end - b < kTileChunk ? row_end - b : kTileChunk);
      }
    } else {
      const bool fused = p_.panel_ih != nullptr;
      for_each_part<kSumRows>(row_begin, row_end, [&](int64_t b, int64_t rows) {
        V of_input[kInputPanels][kSumRows][4], sums[kPanels][kSumRows][4];
        const auto maps_of = [&](int64_t block) -> Maps {
          if (!fused) return maps(direction, d, t, b, block);
          const A* const at = reinterpret_cast<const A*>(&of_input[0][0][block - begin]);
          return {at, kWide<A>, 0, kChunk == 1 ? kUnits<A> : kSumRows * kWide<A>};
        };
        if (fused) {
          project(of_input, direction, t, d, chunk, b, rows);
        } else {
          for (int64_t block = begin; block < end; ++block) {
            const Maps own = maps_of(block);
            for (int64_t r = 0; r < rows; ++r) prefetch_maps(own, r);  // while the product runs
          }
        }
        for (int64_t k = 0; k < kRecurrentPanels; ++k) {
          multiply<E>(sums[kFirstRecurrent + k], entering(n, d, b), inputs(s_.P), recurrent_panel(d, chunk, k),
                      inputs(s_.P), rows, false, {&direction, t, b, enters(n)});
        }
        for (int64_t block = begin; block < end; ++block) {
          Cells(*this, direction, n, d, b, block, maps_of(block))
              .all(0, rows, count(block), {&sums[0][0][block - begin]});
        }
      });
    }
  }

  // The input's maps of a chunk at step t, with their biases, for rows [b, b + rows).
  void project(V (*to)[kSumRows][4], const Direction& direction, int64_t t, int64_t d, int64_t chunk, int64_t b,
               int64_t rows) const {
    const State* const x = static_cast<const State*>(p_.x_padded) + direction.row(t, b) * p_.x_stride;
    for (int64_t k = 0; k < kInputPanels; ++k) {
      V biases[4]{};
      if (p_.biases[d] != nullptr) {
        std::memcpy(biases, static_cast<const A*>(p_.biases[d]) + (chunk * kPanels + k) * kWide<A>, sizeof(biases));
      }
      for (int64_t r = 0; r < rows; ++r) std::memcpy(to[k][r], biases, sizeof(biases));
      add_rows<E>(to[k], reinterpret_cast<const E*>(x), inputs(s_.I),
                  panel(p_.panel_ih, d, chunk * kInputPanels + k, kInputPanels, s_.I), inputs(s_.I), rows,
                  {&direction, t, b});
    }
  }

  // As units, for rows [b, b + rows), at most kTileChunk, of a worker's rows from row_begin on: the recurrent product
  // by tiles, also the input projection if fused, interleaved with the cells of the previous chunk.
  void tiled_units(Pipeline& pipeline, const Direction& direction, int64_t n, int64_t d, int64_t chunk,
                   int64_t row_begin, int64_t b, int64_t rows) const {
    const int64_t t = direction.at(n), end = b + rows;
    // A tile has 16 rows if possible: it overlaps the previous one.
    const int64_t first = rows < kTileRowsMost && row_begin + kTileRowsMost <= end ? end - kTileRowsMost : b;
    const int64_t all = end - first, second = all > kTileRowsMost ? end - kTileRowsMost : first;
    pipeline.tiles.configure(all < kTileRowsMost ? all : kTileRowsMost);
    const bool exists = direction.any_exists(t, b, rows), fused = p_.panel_ih != nullptr;
    const bool by_input = exists && fused, by_state = exists && enters(n);
    const auto operand = [&](const S* left, int64_t stride, const E* panel, int64_t K) {
      const int64_t blocks = inputs(K) / kTilePairs;
      return TileOperand{left + first * stride,
                         left + second * stride,
                         stride * int64_t{sizeof(S)},
                         kTileBytes,
                         panel,
                         inputs(K),
                         0,
                         blocks};
    };
    const auto of_input = [&](int64_t k) {
      const S* const x = static_cast<const S*>(p_.x_padded) + direction.row(t, 0) * p_.x_stride;
      return operand(x, p_.x_stride, panel(p_.panel_ih, d, chunk * kInputPanels + k, kInputPanels, s_.I), s_.I);
    };
    const auto of_state = [&](int64_t k) {
      return operand(h(n, d), h_stride(), recurrent_panel(d, chunk, k - kFirstRecurrent), s_.P);
    };
    // Panels with their biases, and with xg if it was computed before.
    const Maps before = maps(direction, d, t, first, chunk * kChunk);
    const auto start = [&](int64_t k) -> TileStart {
      if (!fused && k < kInputPanels) {
        const A* const at = before.at + k * before.map;
        return {at, at + (second - first) * before.row, before.row * int64_t{sizeof(A)}};
      }
      if (p_.biases[d] == nullptr) return {};
      const int64_t panel = fused ? chunk * kPanels + k : chunk * (kPanels - kInputPanels) + k - kInputPanels;
      const A* const biases = static_cast<const A*>(p_.biases[d]) + panel * kWide<A>;
      return {biases, biases, 0};
    };
    const PanelSums sums = pipeline.sums();
    const auto multiply = [&](const auto& between) {
      for (int64_t k = 0; k < kPanels; ++k) {
        TileOperand operands[2];
        int count = 0;
        if (by_input && k < kInputPanels) operands[count++] = of_input(k);
        if (by_state && k >= kFirstRecurrent) operands[count++] = of_state(k);
        multiply_by_tiles(sums[k], start(k), operands, count, all, between);
      }
    };
    const int64_t blocks =
        (by_input ? kInputPanels * inputs(s_.I) : 0) + (by_state ? kRecurrentPanels * inputs(s_.P) : 0);
    const int64_t first_block = chunk * kChunk, after = first_block + kChunk;
    pipeline.run(blocks / kTilePairs * (all > kTileRowsMost ? 2 : 1), multiply,
                 {Cells(*this, direction, n, d, b, first_block, {}), this, direction, n, d, b, first_block,
                  after < unit_blocks() ? after : unit_blocks(), rows, &sums[0][b - first][0]});
  }

  // The n-th step of blocks [begin, end), at most kTogether, of a single row.
  void single_row(const Direction& direction, int64_t n, int64_t d, int64_t begin, int64_t end) const {
    const int64_t t = direction.at(n), full = end * kUnits<A> <= s_.H ? end : end - 1;
    V sums[kChunk == 1 ? kTogether : kMaps][4];
    Sums all{&sums[0][0]};
    if (kChunk > 1) all.row = 1, all.of_map = 4;
    const Sums of_last{all.at + (full - begin) * all.row, all.row, all.of_map};
    const auto product = [&](V(*to)[4], const E* panel) {
      multiply<E>(to, entering(n, d, 0), inputs(s_.P), panel, inputs(s_.P), 1, true, {&direction, t, 0, enters(n)});
    };
    for (int64_t k = 0; k < end - begin; ++k) {
      const int64_t block = begin + in_turns(n - p_.begin, k, end - begin);
      if (p_.panel_hh == nullptr) {
        dots({&all(block - begin, 0), all.row, all.of_map}, n, d, block, 0, 1);
        continue;
      }
      prefetch_maps(maps(direction, d, t, 0, block), 0);
      prefetch_written(direction, n, d, block * kUnits<A>);
      if constexpr (kChunk == 1) product(sums + (block - begin), recurrent_panel(d, block, 0));
    }
    if (kChunk > 1 && p_.panel_hh != nullptr) {
      for (int64_t k = 0; k < kRecurrentPanels; ++k) {
        const int64_t own = in_turns(n - p_.begin, k, kRecurrentPanels);
        product(sums + kFirstRecurrent + own, recurrent_panel(d, begin / kChunk, own));
      }
    }
    const auto cells = [&](int64_t block) {
      return Cells(*this, direction, n, d, 0, block, maps(direction, d, t, 0, block), true);
    };
    if (begin < full) cells(begin).all(0, full - begin, kUnits<A>, all);
    if (full < end) cells(full).all(0, 1, count(full), of_last);
  }

  // Rows of the state entering a step; a panel with K inputs of a chunk; and a panel of the recurrent product.
  const E* entering(int64_t n, int64_t d, int64_t b) const {
    return reinterpret_cast<const E*>(h(n, d) + b * h_stride());
  }
  const E* panel(const void* panels, int64_t d, int64_t index, int64_t of_chunk, int64_t K) const {
    const int64_t of_direction = blocks_of(unit_blocks(), kChunk) * of_chunk;
    return static_cast<const E*>(panels) + (d * of_direction + index) * inputs(K) * kWide<A>;
  }
  const E* recurrent_panel(int64_t d, int64_t chunk, int64_t k) const {
    return panel(p_.panel_hh, d, chunk * kRecurrentPanels + k, kRecurrentPanels, s_.P);
  }

  // The n-th step of a block of projected outputs.
  void outputs(int64_t n, int64_t d, int64_t block, int64_t row_begin, int64_t row_end) const {
    const Direction direction(s_, p_.sequence, d);
    row_end = direction.clipped(direction.at(n), row_end);
    const A* panel = static_cast<const A*>(p_.panel_hr) + (d * output_blocks() + block) * s_.H * kWide<A>;
    for_each_part(row_begin, row_end, [&](int64_t b, int64_t rows) {
      V sum[kRowsAtATime][4];
      multiply<A>(sum, static_cast<const A*>(p_.m) + state(s_, d, b, s_.H), s_.H, panel, s_.H, rows, s_.B == 1,
                  {&direction, direction.at(n), b});
      for (int v = 0; v < 4; ++v) {
        const int64_t output = block * kWide<A> + v * kUnits<A>;
        if (output >= s_.P) break;
        const Outputs outputs(*this, direction, n, d, b, output);
        for (int64_t r = 0; r < rows; ++r) outputs.template write<true>(r, sum[r][v], s_.P - output);
      }
    });
  }

  // Multipliers of the state entering the next step, or null.
  struct Dropped {
    const A* at = nullptr;
    int64_t step = 0;
  };

  // Destinations of outputs of rows from b on, or of blocks of one row, at the n-th step: y, the state entering the
  // next step, and the final state.
  struct Outputs {
    Outputs() = default;  // of nothing
    Outputs(const Forward& forward, const Direction& direction, int64_t n, int64_t d, int64_t b, int64_t output,
            bool blocks = false)
        : direction(direction),
          t(direction.at(n)),
          next(direction.at(n + 1)),
          b(b),
          row_step(blocks ? 0 : 1),
          y_step(blocks ? kUnits<A> : forward.s_.D * forward.s_.P),
          hn_step(blocks ? kUnits<A> : forward.s_.P),
          h_step(blocks ? kUnits<A> : forward.h_stride()),
          final(n + 1 == forward.s_.T),
          y(static_cast<S*>(forward.p_.y) + time_major(forward.s_, direction.row(t, b), d, forward.s_.P) + output),
          hn(static_cast<S*>(forward.p_.hn) + state(forward.s_, d, b, forward.s_.P) + output),
          h_in(forward.h(n, d) + b * forward.h_stride() + output),
          h_out(forward.h(n + 1, d) + b * forward.h_stride() + output) {
      if constexpr (kVariant) {
        dropped.at = noise_at<A>(forward.s_, forward.p_.noise, Noise::kR, direction, t, d, b, output);
        dropped.step = blocks ? kUnits<A> : forward.s_.D * forward.s_.P;
      }
    }

    template <bool kRagged>
    FUSEDRNN_INLINE void write(int64_t r, V value, int64_t count) const {
      const int64_t row = b + r * row_step;
      const bool exists = !kRagged || direction.exists(t, row);
      store(y + r * y_step, exists ? value : V{}, count);
      if (exists && (kRagged ? direction.is_last(t, row) : final)) store(hn + r * hn_step, value, count);
      if (final) return;
      V after = exists ? rounded<S>(value) : load(h_in + r * h_step, count);
      if constexpr (kVariant) {
        if (exists && dropped.at != nullptr) after *= load(dropped.at + r * dropped.step, count);
      }
      store(h_out + r * h_step, kRagged && direction.is_reset(next, row) ? V{} : after, count);
    }

    Direction direction;
    int64_t t, next, b, row_step, y_step, hn_step, h_step;
    bool final;
    S *y, *hn;
    const State* h_in;
    State* h_out;
    [[no_unique_address]] std::conditional_t<kVariant, Dropped, Nothing> dropped;
  };

  // Additional operands of a variant, for a block of hidden units of rows from b on; or for blocks of a single row.
  struct Extra {
    Extra() = default;  // of nothing
    Extra(const Forward& forward, const Direction& direction, int64_t n, int64_t d, int64_t b, int64_t unit,
          bool blocks) {
      const Sizes& s = forward.s_;
      const ForwardParams& p = forward.p_;
      const int64_t t = direction.at(n), before = direction.before(t), H = s.H;
      const auto noise = [&](Noise kind) { return noise_at<A>(s, p.noise, kind, direction, t, d, b, unit); };
      units = H;
      noise_step = blocks ? kUnits<A> : s.D * H;
      weights_step = blocks ? kUnits<A> : 0;
      state_step = blocks ? kUnits<A> : H;
      if (p.w_p[d] != nullptr) weights = static_cast<const S*>(p.w_p[d]) + unit;
      g = noise(Noise::kG);
      c = noise(Noise::kC);
      h = noise(Noise::kH);
      if (h == nullptr) return;
      if (0 <= before && before < s.T) {
        h_before = static_cast<const S*>(p.y) + time_major(s, direction.row(before, b), d, H) + unit;
      }
      if (p.h0 != nullptr) h_first = static_cast<const S*>(p.h0) + state(s, d, b, H) + unit;
    }

    // The hidden state entering step t of a row, if it was not reset.
    V entered(int64_t r, bool is_first, int64_t count) const {
      if (!is_first) return load(h_before + r * noise_step, count);  // y has the rows of the noise
      return h_first == nullptr ? V{} : load(h_first + r * state_step, count);
    }

    const S *weights = nullptr, *h_before = nullptr, *h_first = nullptr;
    const A *g = nullptr, *c = nullptr, *h = nullptr;
    int64_t units = 0, noise_step = 0, weights_step = 0, state_step = 0;  // units: H
  };

  // Cells of a block of hidden units at the n-th step, for rows from b on; or, for a single row, of the blocks of a
  // chunk. maps: of these rows, if the sums are those of the recurrent product alone.
  struct Cells {
    Cells(const Forward& forward, const Direction& direction, int64_t n, int64_t d, int64_t b, int64_t block,
          const Maps& maps, bool blocks = false)
        : outputs(forward, direction, n, d, b, block * kUnits<A>, blocks), order(forward.order_), maps(maps) {
      const Sizes& s = forward.s_;
      const ForwardParams& p = forward.p_;
      const int64_t t = direction.at(n), H = s.H, row = direction.row(t, b), unit = block * kUnits<A>;
      state_step = blocks ? kUnits<A> : H;
      if (blocks) this->maps.row = maps.block;
      bias_step = blocks ? kUnits<A> : 0;
      saved_step = blocks ? order(kUnits<A>) : kSaved * H;
      c_step = blocks ? kUnits<A> : s.D * H;
      if (p.saved != nullptr) {
        saved = static_cast<S*>(p.saved) + direction_major(s, d, row, kSaved * H) + order(unit);
      }
      if (kMaps > kInputMaps && p.biases[d] != nullptr) {
        const int64_t first = p.panel_ih == nullptr ? kInputMaps : 0;  // of those that there are
        const int64_t at = (block / kChunk * (kMaps - first) + kInputMaps - first) * kChunk + block % kChunk;
        biases = static_cast<const A*>(p.biases[d]) + at * kUnits<A>;
      }
      if (kHasCell && p.c != nullptr) c_all = static_cast<S*>(p.c) + time_major(s, row, d, H) + unit;
      if (kHasCarry) carry = forward.carry(d, unit) + b * kUnits<A>;
      if (forward.projected()) m_all = static_cast<A*>(p.m) + state(s, d, b, H) + unit;
      if (kHasCell) cn = static_cast<S*>(p.cn) + state(s, d, b, H) + unit;
      if constexpr (kVariant) extra = Extra(forward, direction, n, d, b, unit, blocks);
    }

    Cells() = default;  // of nothing

    // Computes and stores the cells [begin, end) from their sums. Compile-time flags avoid tests per row.
    FUSEDRNN_INLINE void all(int64_t begin, int64_t end, int64_t count, Sums sums) const {
      if (count < kUnits<A> || outputs.direction.ragged()) {
        each<true>(begin, end, count, sums);
      } else {
        each<false>(begin, end, kUnits<A>, sums);
      }
    }

   private:
    template <bool kRagged>
    void each(int64_t begin, int64_t end, int64_t count, Sums sums) const {
      if constexpr (kVariant) {
        each_of_variant<kRagged>(begin, end, count, sums);
      } else {
        for (int64_t r = begin; r < end; r += kTogether) {
          with_rows<kTogether>(end - r < kTogether ? end - r : kTogether,
                               [&](auto R) { some<kRagged, R.kCount>(r, count, sums); });
        }
      }
    }

    // Not inlined: fewer copies, each of which takes long to compile.
    template <bool kRagged>
    __attribute__((noinline, noclone)) void each_of_variant(int64_t begin, int64_t end, int64_t count,
                                                            Sums sums) const {
      if constexpr (!kRagged) count = kUnits<A>;
      for (; begin + kTogether <= end; begin += kTogether) some<kRagged, kTogether>(begin, count, sums);
      for (; begin < end; ++begin) some<kRagged, 1>(begin, count, sums);
    }

    // R cells from the first-th on.
    template <bool kRagged, int R>
    FUSEDRNN_INLINE void some(int64_t first, int64_t count, Sums sums) const {
      const Direction& direction = outputs.direction;
      const auto row = [&](int64_t r) { return outputs.b + r * outputs.row_step; };
      // Common case of inference, only the state is written: one test per row.
      const bool more = kRagged || c_all != nullptr || saved != nullptr || m_all != nullptr || outputs.final;
      V a[R][kMaps], c[R], m[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const bool is_reset = kRagged && direction.is_reset(outputs.t, row(first + r));
        c[r] = !kHasCarry || is_reset ? V{} : load(carry + (first + r) * kUnits<A>);
      }
      load_maps(a, first, count, sums);
      if constexpr (kVariant) {
        variant<kRagged, R>(a, c, m, first, count);
      } else {
        Cell::template forward<VectorMath<A>, R>(a, c, m);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const int64_t at = first + r;
        const bool exists = !kRagged || direction.exists(outputs.t, row(at));
        if (kHasCarry && exists) store(carry + at * kUnits<A>, c[r]);
        if (more) {
          if (c_all != nullptr) store(c_all + at * c_step, exists ? c[r] : V{}, count);
          for (int k = 0; saved != nullptr && k < kSaved; ++k) {
            store(saved + at * saved_step + order(0, k), exists ? a[r][k] : V{}, count);
          }
          if (kHasCell && exists && (kRagged ? direction.is_last(outputs.t, row(at)) : outputs.final)) {
            store(cn + at * state_step, c[r], count);
          }
          if (kSpec.projects && m_all != nullptr) {
            if (exists) store(m_all + at * state_step, m[r], count);
            continue;
          }
        }
        outputs.template write<kRagged>(at, m[r], count);
      }
    }

    // The cells of a variant, with its additional operands and zoneout of h.
    template <bool kRagged, int R>
    FUSEDRNN_INLINE void variant(V (&a)[R][kMaps], V (&c)[R], V (&m)[R], int64_t first, int64_t count) const {
      V p[R][kParameters], of_g[R], of_c[R];
      typename Cell::template Operands<VectorMath<A>> operands;
      if (extra.weights != nullptr) {
#pragma GCC unroll 1
        for (int r = 0; r < R; ++r) {
          const S* const own = extra.weights + (first + r) * extra.weights_step;
          for (int k = 0; k < kParameters; ++k) p[r][k] = load(own + k * extra.units, count);
        }
        operands.p = p;
      }
      const auto take = [&](const A* from, V(&to)[R]) {
#pragma GCC unroll 1
        for (int r = 0; r < R; ++r) {
          const A* const own = from + (first + r) * extra.noise_step;
          to[r] = load(own, count);
          __builtin_prefetch(own + kTogether * extra.noise_step);
        }
        return to;
      };
      if (extra.g != nullptr) operands.g = take(extra.g, of_g);
      if (extra.c != nullptr) operands.c = take(extra.c, of_c);
      forward_of_variant<Cell, A, R>(a, c, m, operands);
      if (extra.h == nullptr) return;
      const Direction& direction = outputs.direction;
#pragma GCC unroll 1
      for (int r = 0; r < R; ++r) {
        const int64_t at = first + r, row = outputs.b + at * outputs.row_step;
        if (kRagged && !direction.exists(outputs.t, row)) continue;
        const V kept = load(extra.h + at * extra.noise_step, count);
        __builtin_prefetch(extra.h + (at + kTogether) * extra.noise_step);
        const bool is_reset = kRagged && direction.is_reset(outputs.t, row);
        const V old = is_reset ? V{} : extra.entered(at, direction.is_first(outputs.t, row), count);
        m[r] = kept * old + (A(1) - kept) * m[r];
      }
    }

    // Complete maps: sums plus the input projection, if there is one.
    template <int R>
    FUSEDRNN_INLINE void load_maps(V (&a)[R][kMaps], int64_t first, int64_t count, Sums sums) const {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int k = kSpec.recurrent.begin; k < kMaps; ++k) a[r][k] = sums(first + r, k);
      }
      if (maps.at == nullptr) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          for (int k = 0; k < kSpec.recurrent.begin; ++k) a[r][k] = sums(first + r, k);
        }
        return;
      }
      const A* row = maps.at + first * maps.row;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r, row += maps.row) {
#pragma GCC unroll 4
        for (int k = 0; k < kInputMaps; ++k) {
          const V x = load(row + k * maps.map, count);
          a[r][k] = k < kSpec.recurrent.begin ? x : a[r][k] + x;
        }
        for (int k = kInputMaps; biases != nullptr && k < kMaps; ++k) {
          a[r][k] += load(biases + (k - kInputMaps) * kChunk * kUnits<A> + (first + r) * bias_step);
        }
        if (outputs.row_step > 0) prefetch_maps(maps, first + r + kTogether);
      }
    }

    Outputs outputs;
    [[no_unique_address]] std::conditional_t<kVariant, Extra, Nothing> extra;
    SavedOrder<A> order;
    int64_t state_step, saved_step, c_step, bias_step;  // strides
    Maps maps;
    const A* biases = nullptr;  // of maps without an input product
    S *saved = nullptr, *c_all = nullptr, *cn = nullptr;
    A *carry = nullptr, *m_all = nullptr;
  };

  // Pending cells of a chunk whose tile product is complete: blocks [block, end), rows from b on.
  struct Rest {
    int64_t groups() const {
      return blocks_of(rows - at, kTogether) +
             (kChunk > 1 && end > block ? (end - block - 1) * blocks_of(rows, kTogether) : 0);
    }
    void step() {
      const int64_t begin = at;
      at = rows - at < kTogether ? rows : at + kTogether;
      cells.all(begin, at, forward->count(block), {sums});
      if (kChunk == 1 || at < rows || block + 1 == end) return;
      ++block;
      at = 0;
      sums += 1;
      cells = Cells(*forward, direction, n, d, b, block, {});
    }

    Cells cells;
    const Forward* forward = nullptr;
    Direction direction;
    int64_t n = 0, d = 0, b = 0, block = 0, end = 0, rows = 0;
    V* sums = nullptr;
    int64_t at = 0;
  };

  // The n-th step of a block of hidden units, for rows [row_begin, row_end): dot products with unpacked weights.
  void dot_units(int64_t n, int64_t d, int64_t block, int64_t row_begin, int64_t row_end) const {
    const Direction direction(s_, p_.sequence, d);
    for_each_part<kSumRows>(row_begin, row_end, [&](int64_t b, int64_t rows) {
      V sums[kPanels][kSumRows][4];
      const Sums own{&sums[0][0][0]};
      dots(own, n, d, block, b, rows);
      Cells(*this, direction, n, d, b, block, {}).all(0, rows, count(block), own);
    });
  }

  // The complete maps of rows, with biases.
  void dots(Sums all, int64_t n, int64_t d, int64_t block, int64_t b, int64_t rows) const {
    const Direction direction(s_, p_.sequence, d);
    const int64_t unit = block * kUnits<A>, count = this->count(block);
    const S* const x = static_cast<const S*>(p_.x) + direction.row(direction.at(n), 0) * s_.I;
    const auto weights = [&](const void* w, const MapWindow& window, int map, int64_t K) -> const S* {
      return has_map(window, map) ? static_cast<const S*>(w) + (gate_of(window, map) * s_.H + unit) * K : nullptr;
    };
    for (int map = 0; map < kMaps; ++map) {
      const V bias = sum_of_biases<S>(kSpec, map, p_.b_ih[d], p_.b_hh[d], s_.H, unit, count);
      const S* const w_ih = weights(p_.w_ih[d], kSpec.input, map, s_.I);
      const S* const w_hh = enters(n) ? weights(p_.w_hh[d], kSpec.recurrent, map, s_.P) : nullptr;
      for (int64_t r = 0; r < rows; r += kDotRowsAtATime) {
        // Resets were applied when the state was written.
        const State* const state = h(n, d) + (b + r) * h_stride();
        dots_of_units<S, State>({w_ih, x + (b + r) * s_.I, s_.I, s_.I}, {w_hh, state, h_stride(), s_.P},
                                rows - r < kDotRowsAtATime ? rows - r : kDotRowsAtATime, count, &all(r, map), all.row);
      }
      for (int64_t r = 0; r < rows; ++r) all(r, map) += bias;
    }
  }

  // The only step of some chunks of hidden units, for rows from b on. own: the sums, A [kPanels][chunks][rows][4]
  // vectors, and what the products need.
  void batch_units(const Direction& direction, int64_t d, int64_t first_chunk, int64_t chunks, int64_t b, int64_t rows,
                   void* own) const {
    const int64_t begin = first_chunk * kChunk, after = begin + chunks * kChunk;
    const int64_t end = after < unit_blocks() ? after : unit_blocks();
    V(*const sums)[4] = static_cast<V(*)[4]>(own);
    void* const rest = sums + kPanels * chunks * rows;
    const auto add = [&](const MapWindow& window, const void* w, int64_t K, int64_t first_panel, int64_t panels,
                         const State* left, int64_t stride) {
      const UnpackedWeights weights{pack_weight_maps<S, kOperands>, {w, &window, s_.H}, K, first_chunk, chunks};
      const GemmParams product{.M = rows,
                               .N = panels * chunks * kWide<A>,
                               .K = inputs(K),
                               .a = left + b * stride,
                               .a_stride = stride,
                               .panels = nullptr,
                               .unpacked = &weights,
                               .c = sums + first_panel * chunks * rows,
                               .c_in_blocks = true,
                               .accumulate = true};
      GemmOf<S>(product).run(0, rows, 0, 2 * panels * chunks, rest);
    };
    for (int64_t panel = 0; panel < kPanels * chunks; ++panel) {
      V biases[4];
      for (int64_t v = 0; v < 4; ++v) {
        const int64_t map = kChunk == 1 ? v : panel / chunks, of_chunk = kChunk == 1 ? 0 : v;
        const int64_t block = begin + panel % chunks * kChunk + of_chunk;
        biases[v] = block < end ? sum_of_biases<S>(kSpec, static_cast<int>(map), p_.b_ih[d], p_.b_hh[d], s_.H,
                                                   block * kUnits<A>, count(block))
                                : V{};
      }
      for (int64_t r = 0; r < rows; ++r) std::memcpy(sums[panel * rows + r], biases, sizeof(biases));
    }
    add(kSpec.input, p_.w_ih[d], s_.I, 0, kInputPanels, static_cast<const State*>(p_.x_padded), p_.x_stride);
    if (enters(0)) add(kSpec.recurrent, p_.w_hh[d], s_.P, kFirstRecurrent, kRecurrentPanels, h(0, d), h_stride());
    for (int64_t block = begin; block < end; ++block) {
      V* const own_sums = &sums[(block - begin) / kChunk * rows][(block - begin) % kChunk];
      Cells(*this, direction, 0, d, b, block, {})
          .all(0, rows, count(block), {own_sums, 4, kChunk == 1 ? 1 : 4 * chunks * rows});
    }
  }

  const ForwardParams& p_;
  const Sizes& s_;
  const SavedOrder<A> order_;
  const int64_t blocks_at_a_time_;
};

}  // namespace fusedrnn::FUSEDRNN_ISA
