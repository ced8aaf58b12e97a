// Forward of one layer, both directions: one launch over the whole sequence, or a few over parts of it.
//
//   a_t = xg_t + h_{t-1} @ w_hh^T         i, f, o = sigmoid(a_i, a_f, a_o)     g = tanh(a_g)
//   c_t = f * c_{t-1} + i * g             m_t = o * tanh(c_t)                  h_t = m_t  or  m_t @ w_hr^T
//
// Work: a block is `lanes` hidden units with their four gates (panel.h). The product, the nonlinearities and the cell
// update of a block happen in registers, and h, c and, for training, the gates are written once. The cells of some rows
// are computed in turns, because one alone is a long chain; a single row has those of some blocks computed so.
// Split by rows: a worker takes its rows through all steps and never waits. Split by units: a chunk is a block, or some
// of a single row, and workers meet after each step, or twice a step with a projection (team.h). h_{t-1} and h_t lie in
// two buffers, so that no block reads what another has written in the same step. A few rows in a few steps have no use
// for a tile: the weights are read as they lie, as dot products along K, and nothing is packed.
// With tiles (tile_product.h) a product goes through memory of the worker, and its cells wait for the next one.
#pragma once

#include "geometry.h"
#include "panel.h"
#include "team.h"
#include "tile_product.h"

namespace fusedrnn::FUSEDRNN_ISA {

// b_ih + b_hh of `count` gates from the first-th on, zeros where there are none.
template <class S>
FUSEDRNN_INLINE Vec<Compute<S>> sum_of_biases(const void* b_ih, const void* b_hh, int64_t first, int64_t count) {
  if (b_ih == nullptr) return Vec<Compute<S>>{};
  return load(static_cast<const S*>(b_ih) + first, count) + load(static_cast<const S*>(b_hh) + first, count);
}

// to[0..4H) = b_ih + b_hh, in GateOrder; or block after block, with zeros where there is no unit.
template <class S>
void add_biases(const void* b_ih, const void* b_hh, int64_t H, bool in_blocks, void* to) {
  using A = Compute<S>;
  const GateOrder<A> order(H);
  for (int64_t unit = 0; unit < H; unit += kUnits<A>) {
    for (int64_t gate = 0; gate < kGates; ++gate) {
      const Vec<A> sum = sum_of_biases<S>(b_ih, b_hh, gate * H + unit, H - unit);
      if (in_blocks) {
        store(static_cast<A*>(to) + unit * kGates + gate * kUnits<A>, sum);
      } else {
        store(static_cast<A*>(to) + order(unit, gate), sum, H - unit);
      }
    }
  }
}

// With Operands that are pairs the state is kept in S.
template <class S, Operands kOperands = Operands::kNumbers>
class Forward {
 public:
  using A = Compute<S>;
  using V = Vec<A>;
  static constexpr bool kPairs = kOperands != Operands::kNumbers, kTiles = kOperands == Operands::kTiles;
  using State = std::conditional_t<kPairs, S, A>;
  using E = std::conditional_t<kPairs, Pair, A>;

  explicit Forward(const ForwardParams& params)
      : p_(params), s_(params.sizes), order_(params.sizes.H), blocks_at_a_time_(blocks_at_a_time()) {}

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
    Worker worker(p_.team, s_.D * chunks, index, s_.B * blocks_at_a_time_ * kWide<A> * s_.P);
    worker.phase([&](int64_t chunk) {
      if (chunk % chunks == 0 && p_.begin == 0) start(chunk / chunks, 0, s_.B);
    });
    for (int64_t n = p_.begin; n < p_.end; ++n) {
      prefetch_entering(n);
      worker.phase([&](int64_t chunk) { units(pipeline, n, chunk / chunks, chunk % chunks, 0, s_.B); },
                   [&] { pipeline.finish(); });
      if (!s_.projected) continue;
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
      const int64_t d = block / unit_blocks(), unit = block % unit_blocks() * kUnits<A>;
      const int64_t rows = Direction(s_, p_.sequence, d).rows(0);
      dot_units(0, d, unit, s_.H - unit < kUnits<A> ? s_.H - unit : kUnits<A>, 0, rows);
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
  static constexpr int kTogether = 4;  // rows, or blocks of a single one, whose cells are computed at the same time

  struct Rest;
  using Pipeline = std::conditional_t<kTiles, TilePipeline<Rest>, NoPipeline>;

  int64_t unit_blocks() const { return blocks_of(s_.H, kUnits<A>); }
  int64_t unit_chunks() const { return blocks_of(unit_blocks(), blocks_at_a_time_); }

  // How many blocks of a single row a chunk has: as many as leave nobody more blocks than the smallest chunks would.
  int64_t blocks_at_a_time() const {
    if (s_.B > 1) return 1;
    const int64_t workers = p_.team.split == Team::Split::kUnits ? p_.team.workers : 1;
    int64_t best = 1, least = blocks_of(s_.D * unit_blocks(), workers);
    for (int64_t count = 2; count <= kTogether; ++count) {
      const int64_t most = blocks_of(s_.D * blocks_of(unit_blocks(), count), workers) * count;
      if (most <= least) best = count;
    }
    return best;
  }

  // No more than there are chunks of units.
  int64_t output_blocks() const { return s_.projected ? blocks_of(s_.P, kWide<A>) : 0; }

  // Whether a state enters the n-th step that may be other than zero.
  bool enters(int64_t n) const { return n > 0 || p_.h0 != nullptr; }

  // The state that enters the n-th step; its rows, and the inputs of its product.
  State* h(int64_t n, int64_t d) const { return static_cast<State*>(p_.h) + ((n & 1) * s_.D + d) * s_.B * h_stride(); }
  int64_t h_stride() const { return padded(s_.P); }
  static int64_t padded(int64_t K) { return blocks_of(K, inputs_at_a_time(kOperands)) * inputs_at_a_time(kOperands); }
  static int64_t inputs(int64_t K) { return padded(K) / (kPairs ? 2 : 1); }

  // Affine maps of the input: of a row, those of gate `gate` of a block; see ForwardParams::xg.
  struct Maps {
    const A* at;
    int64_t row, block, gate;  // from one of them to the next
  };
  Maps maps(const Direction& direction, int64_t d, int64_t t, int64_t b, int64_t block) const {
    const A* const all = static_cast<const A*>(p_.xg[d]);
    if (all == nullptr) return {nullptr, 0, 0, 0};
    const int64_t first = d == 0 ? p_.begin : s_.T - p_.end, row = direction.row(t, b) - direction.row(first, 0);
    const bool in_blocks = p_.xg_rows[d] > 0;
    Maps maps{all, in_blocks ? kWide<A> : kGates * s_.H, in_blocks ? p_.xg_rows[d] * kWide<A> : order_(kUnits<A>),
              in_blocks ? kUnits<A> : order_(0, 1)};
    maps.at += row * maps.row + block * maps.block;
    return maps;
  }

  // The following only ask memory for what is used soon. They have to be inlined: the compiler takes a call of a
  // function that does nothing else for one without an effect, and leaves it out.
  static FUSEDRNN_INLINE void prefetch_gates(const Maps& maps, int64_t row) {
    for (int64_t gate = 0; gate < kGates; ++gate) __builtin_prefetch(maps.at + row * maps.row + gate * maps.gate);
  }
  // A state of few lines, of which some have just been written by other cores: none of them is waited for alone.
  FUSEDRNN_INLINE void prefetch_entering(int64_t n) const {
    const char* const from = reinterpret_cast<const char*>(h(n, 0));
    const int64_t bytes = s_.D * s_.B * h_stride() * static_cast<int64_t>(sizeof(State));
    constexpr int64_t kLine = sizeof(Line), kFewLines = 64;
    if (bytes > kFewLines * kLine) return;
    for (int64_t k = 0; k < bytes; k += kLine) __builtin_prefetch(from + k);
  }
  // Where a block of the only row is going to be written: others can be told of it only when the lines are here.
  FUSEDRNN_INLINE void prefetch_written(const Direction& direction, int64_t n, int64_t d, int64_t unit) const {
    if (s_.projected) return;
    __builtin_prefetch(static_cast<S*>(p_.y) + time_major(s_, direction.row(direction.at(n), 0), d, s_.P) + unit, 1);
    __builtin_prefetch(h(n + 1, d) + unit, 1);
  }

  // The cell state of a unit, the first of a block: `lanes` numbers for each row.
  A* c_state(int64_t d, int64_t unit) const {
    return static_cast<A*>(p_.c_state) + (d * unit_blocks() * kUnits<A> + unit) * s_.B;
  }

  // The state before the first step, and the final state of the rows that have no step at all.
  void start(int64_t d, int64_t row_begin, int64_t row_end) const {
    const Direction direction(s_, p_.sequence, d);
    for (int64_t b = row_begin; b < row_end; ++b) {
      const S* h0 = static_cast<const S*>(p_.h0);
      const S* c0 = static_cast<const S*>(p_.c0);
      const bool cut = direction.is_reset(direction.first(b), b);
      for (int64_t k = 0; k < s_.P; k += kUnits<A>) {
        const V value = h0 == nullptr ? V{} : load(h0 + state(s_, d, b, s_.P) + k, s_.P - k);
        store(h(0, d) + b * h_stride() + k, cut ? V{} : value, s_.P - k);
        // Where steps that do not exist have no rows, nobody hands the state on to the first one that does.
        if (direction.is_packed()) store(h(1, d) + b * h_stride() + k, cut ? V{} : value, s_.P - k);
      }
      for (int64_t n = 0; n < 2; ++n) {
        std::memset(h(n, d) + b * h_stride() + s_.P, 0, (h_stride() - s_.P) * sizeof(State));
      }
      for (int64_t k = 0; k < s_.H; k += kUnits<A>) {
        const V value = c0 == nullptr ? V{} : load(c0 + state(s_, d, b, s_.H) + k, s_.H - k);
        store(c_state(d, k) + b * kUnits<A>, value);
      }
      if (direction.length(b) > 0) continue;
      copy_state(static_cast<S*>(p_.hn), h0, state(s_, d, b, s_.P), s_.P);
      copy_state(static_cast<S*>(p_.cn), c0, state(s_, d, b, s_.H), s_.H);
    }
  }

  static void copy_state(S* to, const S* from, int64_t offset, int64_t size) {
    if (from == nullptr) {
      std::memset(to + offset, 0, size * sizeof(S));
    } else {
      std::memcpy(to + offset, from + offset, size * sizeof(S));
    }
  }

  // The n-th step of a chunk of hidden units, for rows [row_begin, row_end).
  void units(Pipeline& pipeline, int64_t n, int64_t d, int64_t chunk, int64_t row_begin, int64_t row_end) const {
    const Direction direction(s_, p_.sequence, d);
    if (s_.B == 1) {
      const int64_t begin = chunk * blocks_at_a_time_, end = begin + blocks_at_a_time_;
      return single_row(direction, n, d, begin, end < unit_blocks() ? end : unit_blocks());
    }
    const int64_t t = direction.at(n), unit = chunk * kUnits<A>;
    const int64_t count = s_.H - unit < kUnits<A> ? s_.H - unit : kUnits<A>;
    row_end = direction.clipped(t, row_end);
    if (p_.panel_hh == nullptr) return dot_units(n, d, unit, count, row_begin, row_end);
    if constexpr (kTiles) {
      for (int64_t b = row_begin; b < row_end; b += kTileChunk) {
        tiled_units(pipeline, direction, n, d, chunk, row_begin, b,
                    row_end - b < kTileChunk ? row_end - b : kTileChunk);
      }
    } else {
      for_each_chunk(row_begin, row_end, [&](int64_t b, int64_t rows) {
        const Maps own = maps(direction, d, t, b, chunk);
        for (int64_t r = 0; r < rows; ++r) prefetch_gates(own, r);  // while the product runs
        V sum[kRowsAtATime][kGates];
        multiply<E>(
            sum, entering(n, d, b), inputs(s_.P), panel(p_.panel_hh, d, chunk, s_.P), inputs(s_.P), rows, false,
            [&](int64_t first, int64_t count) { return enters(n) && direction.any_exists(t, b + first, count); });
        Cells<false>(*this, direction, n, d, b, unit).all(0, rows, count, sum);
      });
    }
  }

  // The same of rows [b, b + rows), at most kTileChunk, of a worker's from row_begin on: both affine maps by tiles,
  // where the input's were not computed before, and meanwhile the cells of the product before.
  void tiled_units(Pipeline& pipeline, const Direction& direction, int64_t n, int64_t d, int64_t chunk,
                   int64_t row_begin, int64_t b, int64_t rows) const {
    const int64_t t = direction.at(n), unit = chunk * kUnits<A>, end = b + rows;
    // A tile has 16 rows where there are as many: some from before are computed again.
    const int64_t first = rows < kTileRowsMost && row_begin + kTileRowsMost <= end ? end - kTileRowsMost : b;
    const int64_t all = end - first, second = all > kTileRowsMost ? end - kTileRowsMost : first;
    pipeline.tiles.configure(all < kTileRowsMost ? all : kTileRowsMost);
    TileOperand operands[2];
    int count = 0;
    int64_t blocks = 0;
    const auto add = [&](const S* left, int64_t stride, const void* panels, int64_t K) {
      const int64_t own = inputs(K) / kTilePairs;
      operands[count++] = {left + first * stride,
                           left + second * stride,
                           stride * int64_t{sizeof(S)},
                           kTileBytes,
                           panel(panels, d, chunk, K),
                           inputs(K),
                           0,
                           own};
      blocks += all > kTileRowsMost ? 2 * own : own;
    };
    if (direction.any_exists(t, b, rows)) {
      if (p_.panel_ih != nullptr) {
        add(static_cast<const S*>(p_.x_padded) + direction.row(t, 0) * p_.x_stride, p_.x_stride, p_.panel_ih, s_.I);
      }
      if (enters(n)) add(h(n, d), h_stride(), p_.panel_hh, s_.P);
    }
    TileStart start{};
    if (p_.panel_ih == nullptr) {
      const Maps own = maps(direction, d, t, first, chunk);
      start = {own.at, own.at + (second - first) * own.row, own.row * int64_t{sizeof(A)}};
    } else if (p_.biases[d] != nullptr) {
      const A* const biases = static_cast<const A*>(p_.biases[d]) + unit * kGates;
      start = {biases, biases, 0};
    }
    V(*const sums)[kGates] = pipeline.sums();
    const auto multiply = [&](const auto& between) { multiply_by_tiles(sums, start, operands, count, all, between); };
    pipeline.run(blocks, multiply,
                 {Cells<false>(*this, direction, n, d, b, unit), rows,
                  s_.H - unit < kUnits<A> ? s_.H - unit : kUnits<A>, sums + (b - first)});
  }

  // The n-th step of blocks [begin, end), at most kTogether, of the only row.
  void single_row(const Direction& direction, int64_t n, int64_t d, int64_t begin, int64_t end) const {
    const int64_t t = direction.at(n), full = end * kUnits<A> <= s_.H ? end : end - 1;
    V gates[kTogether][kGates];
    for (int64_t k = 0; k < end - begin; ++k) {
      const int64_t block = begin + in_turns(n - p_.begin, k, end - begin), unit = block * kUnits<A>;
      V(*const own)[kGates] = gates + (block - begin);
      if (p_.panel_hh == nullptr) {
        dots(own, n, d, unit, block < full ? kUnits<A> : s_.H - unit, 0, 1);
      } else {
        prefetch_gates(maps(direction, d, t, 0, block), 0);
        prefetch_written(direction, n, d, unit);
        multiply<E>(own, entering(n, d, 0), inputs(s_.P), panel(p_.panel_hh, d, block, s_.P), inputs(s_.P), 1, true,
                    [&](int64_t, int64_t) { return enters(n) && direction.exists(t, 0); });
      }
    }
    if (begin < full) {
      Cells<true>(*this, direction, n, d, 0, begin * kUnits<A>).all(0, full - begin, kUnits<A>, gates);
    }
    if (full < end) {
      const int64_t unit = full * kUnits<A>;
      Cells<true>(*this, direction, n, d, 0, unit).all(0, 1, s_.H - unit, gates + (full - begin));
    }
  }

  // Rows of the state that enters a step, and the panel of a block of weights with K inputs.
  const E* entering(int64_t n, int64_t d, int64_t b) const {
    return reinterpret_cast<const E*>(h(n, d) + b * h_stride());
  }
  const E* panel(const void* panels, int64_t d, int64_t block, int64_t K) const {
    return static_cast<const E*>(panels) + (d * unit_blocks() + block) * inputs(K) * kWide<A>;
  }

  // The n-th step of a block of projected outputs.
  void outputs(int64_t n, int64_t d, int64_t block, int64_t row_begin, int64_t row_end) const {
    const Direction direction(s_, p_.sequence, d);
    row_end = direction.clipped(direction.at(n), row_end);
    const A* panel = static_cast<const A*>(p_.panel_hr) + (d * output_blocks() + block) * s_.H * kWide<A>;
    for_each_chunk(row_begin, row_end, [&](int64_t b, int64_t rows) {
      V sum[kRowsAtATime][4];
      multiply<A>(
          sum, static_cast<const A*>(p_.m) + state(s_, d, b, s_.H), s_.H, panel, s_.H, rows, s_.B == 1,
          [&](int64_t first, int64_t count) { return direction.any_exists(direction.at(n), b + first, count); });
      for (int v = 0; v < 4; ++v) {
        const int64_t output = block * kWide<A> + v * kUnits<A>;
        if (output >= s_.P) break;
        const Outputs outputs(*this, direction, n, d, b, output);
        for (int64_t r = 0; r < rows; ++r) outputs.template write<true>(r, sum[r][v], s_.P - output);
      }
    });
  }

  // Where some outputs of rows from b on, or of blocks of one row, go at the n-th step: the output, the state that
  // enters the next step, and the final state.
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
          h_out(forward.h(n + 1, d) + b * forward.h_stride() + output) {}

    template <bool kRagged>
    FUSEDRNN_INLINE void write(int64_t r, V value, int64_t count) const {
      const int64_t row = b + r * row_step;
      const bool exists = !kRagged || direction.exists(t, row);
      store(y + r * y_step, exists ? value : V{}, count);
      if (exists && (kRagged ? direction.is_last(t, row) : final)) store(hn + r * hn_step, value, count);
      if (final) return;
      const V after = exists ? rounded<S>(value) : load(h_in + r * h_step, count);
      store(h_out + r * h_step, kRagged && direction.is_reset(next, row) ? V{} : after, count);
    }

    Direction direction;
    int64_t t, next, b, row_step, y_step, hn_step, h_step;
    bool final;
    S *y, *hn;
    const State* h_in;
    State* h_out;
  };

  // Cells of some hidden units at the n-th step: of `unit` and those behind it, of rows from b on; or, of the only row,
  // of one block after the other.
  template <bool kBlocks>
  struct Cells {
    Cells(const Forward& forward, const Direction& direction, int64_t n, int64_t d, int64_t b, int64_t unit)
        : outputs(forward, direction, n, d, b, unit, kBlocks), order(forward.order_) {
      const Sizes& s = forward.s_;
      const ForwardParams& p = forward.p_;
      const int64_t t = direction.at(n), H = s.H, row = direction.row(t, b);
      state_step = kBlocks ? kUnits<A> : H;
      maps = kTiles && !kBlocks ? Maps{} : forward.maps(direction, d, t, b, unit / kUnits<A>);  // a product has them
      gates_step = kBlocks ? order(kUnits<A>) : kGates * H;
      c_step = kBlocks ? kUnits<A> : s.D * H;
      gates_all = p.gates == nullptr ? nullptr
                                     : static_cast<S*>(p.gates) + direction_major(s, d, row, kGates * H) + order(unit);
      c_all = p.c == nullptr ? nullptr : static_cast<S*>(p.c) + time_major(s, row, d, H) + unit;
      c_state = forward.c_state(d, unit) + b * kUnits<A>;
      m_all = s.projected ? static_cast<A*>(p.m) + state(s, d, b, H) + unit : nullptr;
      cn = static_cast<S*>(p.cn) + state(s, d, b, H) + unit;
    }

    Cells() = default;  // of nothing

    // From the recurrent affine maps, or both where there are no maps of the input, to everything that is written about
    // [begin, end) of them. What is known when compiled needs no test for each row.
    FUSEDRNN_INLINE void all(int64_t begin, int64_t end, int64_t count, V (*gates)[kGates]) const {
      if (count < kUnits<A> || outputs.direction.ragged()) {
        each<Kind::kRagged>(begin, end, count, gates);
      } else if (c_all != nullptr || gates_all != nullptr || m_all != nullptr || outputs.final) {
        each<Kind::kWhole>(begin, end, kUnits<A>, gates);
      } else {
        each<Kind::kStateOnly>(begin, end, kUnits<A>, gates);
      }
    }

   private:
    enum class Kind { kRagged, kWhole, kStateOnly };

    template <Kind kKind>
    void each(int64_t begin, int64_t end, int64_t count, V (*gates)[kGates]) const {
      for (int64_t r = begin; r < end; r += kTogether) {
        with_rows<kTogether>(end - r < kTogether ? end - r : kTogether,
                             [&](auto R) { some<kKind, R.kCount>(r, count, gates + r); });
      }
    }

    // R of them from the first-th on.
    template <Kind kKind, int R>
    FUSEDRNN_INLINE void some(int64_t first, int64_t count, V (*gates)[kGates]) const {
      constexpr bool kRagged = kKind == Kind::kRagged;
      const Direction& direction = outputs.direction;
      const auto row = [&](int64_t r) { return kBlocks ? outputs.b : outputs.b + r; };
      V c[R], m[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const bool cut = kRagged && direction.is_reset(outputs.t, row(first + r));
        c[r] = cut ? V{} : load(c_state + (first + r) * kUnits<A>);
      }
      if (maps.at != nullptr) {
        const int64_t step = kBlocks ? maps.block : maps.row;
        const A* row = maps.at + first * step;
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r, row += step) {
          for (int gate = 0; gate < kGates; ++gate) gates[r][gate] += load(row + gate * maps.gate, count);
          if (!kBlocks) prefetch_gates(maps, first + r + kTogether);
        }
      }
      LstmCell<A>::template forward<R>(gates, c, m);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const int64_t at = first + r;
        const bool exists = !kRagged || direction.exists(outputs.t, row(at));
        if (exists) store(c_state + at * kUnits<A>, c[r]);
        if constexpr (kKind != Kind::kStateOnly) {
          if (c_all != nullptr) store(c_all + at * c_step, exists ? c[r] : V{}, count);
          for (int gate = 0; gates_all != nullptr && gate < kGates; ++gate) {
            store(gates_all + at * gates_step + order(0, gate), exists ? gates[r][gate] : V{}, count);
          }
          if (exists && (kRagged ? direction.is_last(outputs.t, row(at)) : outputs.final)) {
            store(cn + at * state_step, c[r], count);
          }
          if (m_all != nullptr) {
            if (exists) store(m_all + at * state_step, m[r], count);
            continue;
          }
        }
        outputs.template write<kRagged>(at, m[r], count);
      }
    }

    Outputs outputs;
    GateOrder<A> order;
    int64_t state_step, gates_step, c_step;  // from one of them to the next
    Maps maps;
    S *gates_all, *c_all, *cn;
    A *c_state, *m_all;
  };

  // Cells that follow a product by tiles.
  struct Rest {
    int64_t groups() const { return blocks_of(rows - at, kTogether); }
    void step() {
      const int64_t begin = at;
      at = rows - at < kTogether ? rows : at + kTogether;
      cells.all(begin, at, count, sums);
    }

    Cells<false> cells;
    int64_t rows = 0, count = 0;
    V (*sums)[kGates] = nullptr;
    int64_t at = 0;
  };

  // The n-th step of the hidden units [unit, unit + count), at most `lanes`, for rows [row_begin, row_end): dot
  // products with the weights as they lie.
  void dot_units(int64_t n, int64_t d, int64_t unit, int64_t count, int64_t row_begin, int64_t row_end) const {
    const Direction direction(s_, p_.sequence, d);
    for_each_chunk(row_begin, row_end, [&](int64_t b, int64_t rows) {
      V gates[kRowsAtATime][kGates];
      dots(gates, n, d, unit, count, b, rows);
      Cells<false>(*this, direction, n, d, b, unit).all(0, rows, count, gates);
    });
  }

  // Their affine maps, biases and all.
  void dots(V (*gates)[kGates], int64_t n, int64_t d, int64_t unit, int64_t count, int64_t b, int64_t rows) const {
    const Direction direction(s_, p_.sequence, d);
    const S* w_hh = static_cast<const S*>(p_.w_hh[d]) + unit * s_.P;
    const S* x = static_cast<const S*>(p_.x) + direction.row(direction.at(n), 0) * s_.I;
    for (int gate = 0; gate < kGates; ++gate) {
      const V bias = sum_of_biases<S>(p_.b_ih[d], p_.b_hh[d], gate * s_.H + unit, count);
      for (int64_t r = 0; r < rows; ++r) {
        V sums[kUnits<A>];
        for (int64_t u = 0; u < kUnits<A>; ++u) sums[u] = V{};
        const S* w_ih = static_cast<const S*>(p_.w_ih[d]) + (gate * s_.H + unit) * s_.I;
        add_dots<A>(sums, w_ih, count, x + (b + r) * s_.I, s_.I);
        // The states of rows that are reset were made zero where they were written.
        if (enters(n)) add_dots<A>(sums, w_hh + gate * s_.H * s_.P, count, h(n, d) + (b + r) * s_.P, s_.P);
        gates[r][gate] = sum_each<A>(sums) + bias;
      }
    }
  }

  const ForwardParams& p_;
  const Sizes& s_;
  const GateOrder<A> order_;
  const int64_t blocks_at_a_time_;
};

}  // namespace fusedrnn::FUSEDRNN_ISA
