// Backward of one layer, both directions: one launch over the whole sequence, in reverse order of the steps.
//
//   dh_t = dy_t + da_{t+1} @ w_hh       dm = dh_t  or  dh_t @ w_hr       da_t, dcarry_{t-1} from dm and dcarry_t:
//   csrc/cells
//
// (t+1 is the step after t in the direction's own order.) The product uses the maps of da with a recurrent product.
// Weight gradients are GEMMs over all steps after the launch, which returns da and, with a projection, dh and m for
// them.
//
// Work: a block is 4 * lanes adjacent hidden units. Its product da_{t+1} @ w_hh is dh of these units, so the derivative
// of the cell follows in registers; with a projection dh has to be complete first. Workers split blocks or rows as in
// forward.h, with one barrier a step, or two with a projection. With AMX tiles the pointwise part of a product runs
// beside the next product.
#pragma once

#include <cstring>
#include <vector>

#include "activations.h"
#include "geometry.h"
#include "panel.h"
#include "team.h"
#include "tile_product.h"

namespace fusedrnn::FUSEDRNN_ISA {

// The hidden states entering each step, zero where it was reset or the step does not exist; packed.
template <class S, Operands kOperands>
class EnteringStates {
 public:
  explicit EnteringStates(const BackwardParams& params) : p_(params), s_(params.sizes) {}

  // Inputs [begin, end) of the panels of all directions.
  void run(int64_t begin, int64_t end) const {
    constexpr bool kPairs = kOperands != Operands::kNumbers;
    constexpr int64_t kAtATime = inputs_at_a_time(kOperands);
    const int64_t inputs = blocks_of(s_.N, kAtATime) * kAtATime / (kPairs ? 2 : 1);
    const bool drops = p_.noise.of[static_cast<size_t>(Noise::kR)] != nullptr;
    std::vector<S> own(drops ? 2 * s_.P : 0);  // states times their dropout masks
    for (int64_t index = begin; index < end; ++index) {
      const int64_t d = index / inputs, input = index % inputs;
      const Direction direction(s_, p_.sequence, d);
      A* const panels = static_cast<A*>(p_.h_in) + d * blocks_of(s_.P, kWide<A>) * inputs * kWide<A>;
      const auto of = [&](int64_t row, int64_t which) {
        const S* const h = of_row(direction, d, row);
        return drops && h != nullptr ? dropped(direction, d, row, h, own.data() + which * s_.P) : h;
      };
      if constexpr (kPairs) {
        pack_input(of(2 * input, 0), of(2 * input + 1, 1), s_.P, panels, inputs, input);
      } else {
        pack_input(of(input, 0), s_.P, panels, inputs, input);
      }
    }
  }

 private:
  using A = Compute<S>;

  // The state h as the operand of the product with w_hh: times its multipliers, in `to`.
  const S* dropped(const Direction& direction, int64_t d, int64_t row, const S* h, S* to) const {
    const int64_t t = direction.step_of(row), b = row - direction.row(t, 0);
    const A* const v = noise_at<A>(s_, p_.noise, Noise::kR, direction, t, d, b, 0);
    for (int64_t k = 0; k < s_.P; k += kUnits<A>)
      store(to + k, load(h + k, s_.P - k) * load(v + k, s_.P - k), s_.P - k);
    return to;
  }

  // The state entering the step of a row, or null for zeros.
  const S* of_row(const Direction& direction, int64_t d, int64_t row) const {
    if (row >= s_.N) return nullptr;
    const int64_t t = direction.step_of(row), b = row - direction.row(t, 0);
    if (!direction.exists(t, b) || direction.is_reset(t, b)) return nullptr;
    if (!direction.is_first(t, b)) {
      return static_cast<const S*>(p_.y) + time_major(s_, direction.row(direction.before(t), b), d, s_.P);
    }
    return p_.h0 == nullptr ? nullptr : static_cast<const S*>(p_.h0) + state(s_, d, b, s_.P);
  }

  const BackwardParams& p_;
  const Sizes& s_;
};

// With operands that are pairs da is stored in S.
template <class Cell, class S, Operands kOperands = Operands::kNumbers>
class Backward {
 public:
  static constexpr bool kPairs = kOperands != Operands::kNumbers, kTiles = kOperands == Operands::kTiles;
  using A = Compute<S>;
  using V = Vec<A>;
  using Gradient = std::conditional_t<kPairs, S, A>;
  using E = std::conditional_t<kPairs, Pair, A>;

  explicit Backward(const BackwardParams& params) : p_(params), s_(params.sizes), order_(params.sizes.H, kSaved) {}

  // Steps count as in forward; after the first step of a row comes one more round for dh0 and dc0.
  void run(int index) const {
    Pipeline pipeline;
    if (p_.team.split == Team::Split::kRows) {
      for (int64_t d = 0; d < s_.D; ++d) {
        const OwnedRows rows = owned_rows(s_, p_.sequence, p_.team, index, d);
        if (rows.begin >= rows.end) continue;
        if (p_.end == s_.T) start(d, rows.begin, rows.end);
        for (int64_t n = p_.end - 1; n >= p_.begin; --n) {
          for (int64_t k = 0; k < output_blocks(); ++k) {
            outputs(pipeline, n, d, in_turns(n, k, output_blocks()), rows.begin, rows.end);
          }
          pipeline.finish();
          if (!projected() || n < 0) continue;
          for (int64_t k = 0; k < unit_blocks(); ++k) {
            projected_units(n, d, in_turns(n, k, unit_blocks()), rows.begin, rows.end);
          }
        }
        if (p_.begin < 0) finish(d, rows.begin, rows.end);
      }
      return;
    }
    const int64_t blocks = unit_blocks();
    Worker worker(p_.team, s_.D * blocks, index, s_.B * kWide<A> * kSpec.gates * s_.H);
    worker.phase([&](int64_t chunk) {
      if (chunk % blocks == 0 && p_.end == s_.T) start(chunk / blocks, 0, s_.B);
    });
    for (int64_t n = p_.end - 1; n >= p_.begin; --n) {
      worker.phase(
          [&](int64_t chunk) {
            if (chunk % blocks < output_blocks()) outputs(pipeline, n, chunk / blocks, chunk % blocks, 0, s_.B);
          },
          [&] { pipeline.finish(); });
      if (!projected() || n < 0) continue;
      worker.phase([&](int64_t chunk) { projected_units(n, chunk / blocks, chunk % blocks, 0, s_.B); });
    }
    worker.phase([&](int64_t chunk) {
      if (chunk % blocks == 0 && p_.begin < 0) finish(chunk / blocks, 0, s_.B);
    });
  }

 private:
  static constexpr CellSpec kSpec = Cell::kSpec;
  static constexpr int kMaps = kSpec.maps, kSaved = kSpec.saved;
  static constexpr bool kHasCarry = kSpec.carry != Carry::kNone, kHasCell = kSpec.carry == Carry::kCell;
  static constexpr bool kVariant = kSpec.parameters > 0;
  static constexpr int kParameters = kVariant ? kSpec.parameters : 1;

  struct Rest;
  using Pipeline = std::conditional_t<kTiles, TilePipeline<Rest, 1>, NoPipeline>;

  bool projected() const { return kSpec.projects && s_.projected; }
  int64_t unit_blocks() const { return blocks_of(s_.H, kWide<A>); }
  int64_t output_blocks() const { return blocks_of(s_.P, kWide<A>); }

  Gradient* da(int64_t d, int64_t row) const {
    return static_cast<Gradient*>(p_.da) + direction_major(s_, d, row, p_.da_stride);
  }
  A* dh_state(int64_t d, int64_t b) const { return static_cast<A*>(p_.dh_state) + state(s_, d, b, s_.P); }
  // Gradients of the carry of sequences from b on.
  A* dcarry(int64_t d, int64_t b) const { return static_cast<A*>(p_.dcarry) + state(s_, d, b, s_.H); }
  // For a variant: gradients of the state kept by zoneout, and of the parameters of a sequence.
  A* dh_kept(int64_t d, int64_t b) const { return static_cast<A*>(p_.dh_kept) + state(s_, d, b, s_.H); }
  A* dp(int64_t d, int64_t b) const { return static_cast<A*>(p_.dp) + state(s_, d, b, kParameters * s_.H); }
  A* dh_out(int64_t d, int64_t row) const { return static_cast<A*>(p_.dh_out) + direction_major(s_, d, row, s_.P); }

  void start(int64_t d, int64_t row_begin, int64_t row_end) const {
    for (int64_t b = row_begin; b < row_end; ++b) {
      copy(dh_state(d, b), static_cast<const S*>(p_.dhn), state(s_, d, b, s_.P), s_.P);
      if (kHasCarry) copy(dcarry(d, b), static_cast<const S*>(p_.dcn), state(s_, d, b, s_.H), s_.H);
      if (kVariant && p_.dp != nullptr) std::memset(dp(d, b), 0, kParameters * s_.H * sizeof(A));
    }
  }

  static void copy(A* to, const S* from, int64_t offset, int64_t N) {
    for (int64_t k = 0; k < N; k += kUnits<A>) {
      store(to + k, from == nullptr ? V{} : load(from + offset + k, N - k), N - k);
    }
  }

  void finish(int64_t d, int64_t row_begin, int64_t row_end) const {
    if (!kHasCell || p_.dc0 == nullptr) return;
    for (int64_t b = row_begin; b < row_end; ++b) {
      for (int64_t k = 0; k < s_.H; k += kUnits<A>) {
        store(static_cast<S*>(p_.dc0) + state(s_, d, b, s_.H) + k, load(dcarry(d, b) + k, s_.H - k), s_.H - k);
      }
    }
  }

  // dh of a block of outputs at the n-th step and, without a projection, the gradients of the cells of these units.
  // n = -1 is the state before the first step: dh0.
  __attribute__((noinline)) void outputs(Pipeline& pipeline, int64_t n, int64_t d, int64_t block, int64_t row_begin,
                                         int64_t row_end) const {
    if (n < 0 && p_.dh0 == nullptr) return;
    const Direction direction(s_, p_.sequence, d);
    const int64_t t = direction.at(n), next = direction.after(t);  // n = -1 gives a t that does not exist
    const bool last = n == s_.T - 1;
    const int64_t next_end = last ? 0 : direction.clipped(next, row_end);
    if (n >= 0) {  // sequences that have this step, or pass on the gradient of the next
      row_end = direction.clipped(t, row_end);
      if (row_end < next_end) row_end = next_end;
    }
    const int64_t inputs = p_.da_inputs / (kPairs ? 2 : 1), stride = p_.da_stride / (kPairs ? 2 : 1);
    const E* panel = static_cast<const E*>(p_.panel_hh) + (d * output_blocks() + block) * inputs * kWide<A>;
    const V(*product)[4] = nullptr;  // of the rows that have a next step, if it was computed before
    if (n < 0 && p_.product_hh != nullptr) {
      product = static_cast<const V(*)[4]>(p_.product_hh) + (d * output_blocks() + block) * s_.N;
    }
    if constexpr (kTiles) {
      for (int64_t b = row_begin; b < row_end; b += kTileChunk) {
        const int64_t end = row_end - b < kTileChunk ? row_end : b + kTileChunk;
        tiled_outputs(pipeline, {*this, direction, n, d, b, block, end - b}, panel, inputs, product, row_begin,
                      next_end < end ? next_end : end);
      }
    } else {
      for_each_part(row_begin, row_end, [&](int64_t b, int64_t rows) {
        V sum[kRowsAtATime][4];
        const int64_t wanted = next_end - b < rows ? next_end - b : rows;
        if (wanted > 0 && product != nullptr) {
          std::memcpy(sum, product + b, wanted * sizeof(sum[0]));
        } else if (wanted > 0) {
          multiply<E>(sum, reinterpret_cast<const E*>(da(d, direction.row(next, b)) + p_.da_begin), stride, panel,
                      inputs, wanted, s_.B == 1, {&direction, next, b});
        }
        const Block own(*this, direction, n, d, b, block, rows);
        for (int v = 0; v < 4; ++v) own.gradients(v, 0, rows, sum);
      });
    }
  }

  // Rows [b, b + rows) of a block of outputs at the n-th step.
  struct Block {
    Block() = default;  // of nothing
    Block(const Backward& backward, const Direction& direction, int64_t n, int64_t d, int64_t b, int64_t block,
          int64_t rows)
        : backward(&backward), direction(direction), n(n), d(d), b(b), block(block), rows(rows) {}

    // Computes the gradients from sum[r][v] for rows [begin, end).
    FUSEDRNN_INLINE void gradients(int v, int64_t begin, int64_t end, const V (*sum)[4]) const {
      const int64_t output = block * kWide<A> + v * kUnits<A>, count = backward->s_.P - output;
      if (count <= 0) return;
      if (count >= kUnits<A> && !direction.ragged()) {  // known when compiled: nothing to test per row
        backward->output_gradients<false>(*this, output, kUnits<A>, begin, end, sum, v);
      } else {
        backward->output_gradients<true>(*this, output, count, begin, end, sum, v);
      }
    }

    const Backward* backward = nullptr;
    Direction direction;
    int64_t n = 0, d = 0, b = 0, block = 0, rows = 0;
  };

  // As outputs, for some rows by tiles, interleaved with the gradients of the previous product. The worker's rows begin
  // at row_begin; those up to next_end have a next step.
  void tiled_outputs(Pipeline& pipeline, const Block& own, const E* panel, int64_t inputs, const V (*product)[4],
                     int64_t row_begin, int64_t next_end) const {
    V(*const sums)[4] = pipeline.sums()[0];
    const int64_t next = own.direction.after(own.direction.at(own.n)), b = own.b, rows = next_end - b;
    if (rows > 0 && product != nullptr) std::memcpy(sums, product + b, rows * sizeof(sums[0]));
    if (rows <= 0 || product != nullptr || !own.direction.any_exists(next, b, rows)) {
      return pipeline.run(0, [](const auto&) {}, {own, sums});
    }
    // A tile has 16 rows if possible: it overlaps the previous one.
    const int64_t first = rows < kTileRowsMost && row_begin + kTileRowsMost <= next_end ? next_end - kTileRowsMost : b;
    const int64_t all = next_end - first, second = all > kTileRowsMost ? next_end - kTileRowsMost : first;
    const int64_t blocks = inputs / kTilePairs;
    pipeline.tiles.configure(all < kTileRowsMost ? all : kTileRowsMost);
    const TileOperand operand{da(own.d, own.direction.row(next, first)) + p_.da_begin,
                              da(own.d, own.direction.row(next, second)) + p_.da_begin,
                              p_.da_stride * int64_t{sizeof(S)},
                              kTileBytes,
                              panel,
                              inputs,
                              0,
                              blocks};
    const auto multiply = [&](const auto& between) { multiply_by_tiles(sums, TileStart{}, &operand, 1, all, between); };
    pipeline.run(all > kTileRowsMost ? 2 * blocks : blocks, multiply, {own, sums + (b - first)});
  }

  // Pending gradients of a complete tile product.
  struct Rest {
    static constexpr int64_t kTogether = 4;  // rows

    int64_t groups() const { return blocks_of(own.rows - at, kTogether) * 4 - v; }
    void step() {
      const int64_t end = own.rows - at < kTogether ? own.rows : at + kTogether;
      own.gradients(v, at, end, sums);
      if (++v < 4) return;
      v = 0;
      at = end;
    }

    Block own;
    V (*sums)[4] = nullptr;
    int64_t at = 0;
    int v = 0;
  };

  // sum[r][v]: da_next @ w_hh for some outputs of row b + r; undefined where there is no next step.
  template <bool kRagged>
  FUSEDRNN_INLINE void output_gradients(const Block& own, int64_t output, int64_t count, int64_t begin, int64_t end,
                                        const V (*sum)[4], int v) const {
    const Direction& direction = own.direction;
    const int64_t n = own.n, d = own.d, b = own.b;
    const int64_t t = direction.at(n), next = direction.after(t), P = s_.P, y_step = s_.D * P;
    const bool last = n == s_.T - 1;
    A* handed_on = dh_state(d, b) + output;  // by steps that do not exist; dhn at the end
    S* dh0 = n < 0 ? static_cast<S*>(p_.dh0) + state(s_, d, b, P) + output : nullptr;
    const S* dy = n < 0 || p_.dy == nullptr
                      ? nullptr
                      : static_cast<const S*>(p_.dy) + time_major(s_, direction.row(t, b), d, P) + output;
    A* out = n < 0 || !s_.projected ? nullptr : dh_out(d, direction.row(t, b)) + output;
    const Units units(*this, direction, t < 0 || t >= s_.T ? 0 : t, d, b, output);
    const A *dropped = nullptr, *kept = nullptr;  // of the next step
    if constexpr (kVariant) {
      if (!last) dropped = noise_at<A>(s_, p_.noise, Noise::kR, direction, next, d, b, output);
      if (p_.dh_kept != nullptr) kept = dh_kept(d, b) + output;
    }
    for (int64_t r = begin; r < end; ++r) {
      V dh{};
      if (!last && (!kRagged || direction.exists(next, b + r))) {
        if (!kRagged || !direction.is_reset(next, b + r)) {
          dh = sum[r][v];
          if (kVariant && dropped != nullptr) dh *= load(dropped + r * y_step, count);
          if (kVariant && kept != nullptr) dh += load(kept + r * P, count);
        }
      } else {
        dh = load(handed_on + r * P, count);
      }
      if (dh0 != nullptr) {
        if (kHasCarry && !kHasCell) dh += load(dcarry(d, b) + output + r * P, count);
        store(dh0 + r * P, dh, count);
        continue;
      }
      const bool exists = !kRagged || direction.exists(t, b + r);
      if (!exists) {
        store(handed_on + r * P, dh, count);
        if (direction.is_packed()) continue;  // there is no row to write to
        dh = V{};
      } else if (dy != nullptr) {
        dh += load(dy + r * y_step, count);
      }
      if (out != nullptr) {
        store(out + r * P, dh, count);
      } else {
        units.template gradients<kRagged>(r, count, exists, dh);
      }
    }
  }

  // With a projection: dm = dh @ w_hr for a block of units, and the gradients of their cells.
  void projected_units(int64_t n, int64_t d, int64_t block, int64_t row_begin, int64_t row_end) const {
    const Direction direction(s_, p_.sequence, d);
    const int64_t t = direction.at(n);
    row_end = direction.clipped(t, row_end);
    const A* panel = static_cast<const A*>(p_.panel_hr) + (d * unit_blocks() + block) * s_.P * kWide<A>;
    for_each_part(row_begin, row_end, [&](int64_t b, int64_t rows) {
      V sum[kRowsAtATime][4];
      multiply<A>(sum, dh_out(d, direction.row(t, b)), s_.P, panel, s_.P, rows, s_.B == 1, {&direction, t, b});
      for (int v = 0; v < 4; ++v) {
        const int64_t unit = block * kWide<A> + v * kUnits<A>;
        if (unit >= s_.H) break;
        const Units units(*this, direction, t, d, b, unit);
        for (int64_t r = 0; r < rows; ++r) {
          units.template gradients<true>(r, s_.H - unit, direction.exists(t, b + r), sum[r][v]);
        }
      }
    });
  }

  // Additional operands and results of a variant.
  struct Extra {
    const S* weights = nullptr;
    const A *g = nullptr, *c = nullptr, *h = nullptr;
    A *dh_kept = nullptr, *dp = nullptr;
  };

  // Hidden units of rows from b on at step t: from dm to da, and dcarry for the previous step.
  struct Units {
    Units(const Backward& backward, const Direction& direction, int64_t t, int64_t d, int64_t b, int64_t unit)
        : direction(direction),
          order(backward.order_),
          t(t),
          b(b),
          H(backward.s_.H),
          carry_step(backward.s_.D * H),
          da_step(backward.p_.da_stride) {
      const Sizes& s = backward.s_;
      const BackwardParams& p = backward.p_;
      const int64_t row = direction.row(t, b), before = direction.before(t);
      const int64_t carry_at = time_major(s, row, d, H) + unit, saved_at = direction_major(s, d, row, kSaved * H);
      first = direction.is_first(t, b);
      saved = static_cast<const S*>(p.saved) + saved_at + order(unit);
      da = backward.da(d, row) + unit;
      if constexpr (kHasCarry) {
        carry = static_cast<const S*>(p.carry) + carry_at;
        carry_before = before < 0 || before >= s.T  // not of the first
                           ? carry
                           : carry + (direction.row(before, b) - row) * carry_step;
        carry0 = p.carry0 == nullptr ? nullptr : static_cast<const S*>(p.carry0) + state(s, d, b, H) + unit;
        dcarry = backward.dcarry(d, b) + unit;
      }
      dc_all = !kHasCell || p.dc == nullptr ? nullptr : static_cast<const S*>(p.dc) + carry_at;
      m = !backward.projected() ? nullptr : static_cast<A*>(p.m) + direction_major(s, d, row, H) + unit;
      if constexpr (kVariant) {
        const auto noise = [&](Noise kind) { return noise_at<A>(s, p.noise, kind, direction, t, d, b, unit); };
        extra.g = noise(Noise::kG);
        extra.c = noise(Noise::kC);
        extra.h = noise(Noise::kH);
        if (extra.h != nullptr) extra.dh_kept = backward.dh_kept(d, b) + unit;
        if (p.w_p[d] != nullptr) {
          extra.weights = static_cast<const S*>(p.w_p[d]) + unit;
          extra.dp = backward.dp(d, b) + unit;
        }
      }
    }

    template <bool kRagged>
    FUSEDRNN_INLINE void gradients(int64_t r, int64_t count, bool exists, V dm) const {
      if (!exists) {
        for (int k = 0; k < kMaps; ++k) store(da + r * da_step + k * H, V{}, count);
        if (m != nullptr) store(m + r * H, V{}, count);
        return;
      }
      const bool is_reset = kRagged && direction.is_reset(t, b + r);
      V entered{}, left{}, dleft{};  // the carry
      if constexpr (kHasCarry) {
        if (!is_reset && !(kRagged ? direction.is_first(t, b + r) : first)) {
          entered = load(carry_before + r * carry_step, count);
        } else if (!is_reset && carry0 != nullptr) {
          entered = load(carry0 + r * H, count);
        }
        left = load(carry + r * carry_step, count);
        dleft = load(dcarry + r * H, count);
        if (dc_all != nullptr) dleft += load(dc_all + r * carry_step, count);
      }
      V a[kMaps];
      const S* row = saved + r * kSaved * H;
      for (int k = 0; k < kSaved; ++k) a[k] = load(row + order(0, k), count);
      for (int k = 0; k < kSaved; ++k) __builtin_prefetch(row + kAhead * kSaved * H + order(0, k));
      V out;
      if constexpr (kVariant) {
        out = variant(a, entered, left, dm, dleft, r, count);
      } else {
        out = Cell::template backward<VectorMath<A>>(a, entered, left, dm, dleft);
      }
      for (int k = 0; k < kMaps; ++k) store(da + r * da_step + k * H, a[k], count);
      if (m != nullptr) store(m + r * H, out, count);
      if constexpr (kHasCarry) store(dcarry + r * H, is_reset ? V{} : dleft, count);
    }

    // The derivative of a variant, with its additional operands.
    FUSEDRNN_INLINE V variant(V (&a)[kMaps], V entered, V left, V dm, V& dleft, int64_t r, int64_t count) const {
      V p[1][kParameters], of_g, of_c, own[kParameters] = {};
      typename Cell::template Operands<VectorMath<A>> operands;
      if (extra.weights != nullptr) {
        for (int k = 0; k < kParameters; ++k) p[0][k] = load(extra.weights + k * H, count);
        operands.p = p;
      }
      for (const A* const noise : {extra.g, extra.c, extra.h}) {
        if (noise != nullptr) __builtin_prefetch(noise + (r + kAhead) * carry_step);
      }
      if (extra.g != nullptr) of_g = load(extra.g + r * carry_step, count), operands.g = &of_g;
      if (extra.c != nullptr) of_c = load(extra.c + r * carry_step, count), operands.c = &of_c;
      if (extra.h != nullptr) {
        const V kept = load(extra.h + r * carry_step, count) * dm;
        store(extra.dh_kept + r * H, kept, count);
        dm -= kept;
      }
      const V out = Cell::template backward<VectorMath<A>>(a, entered, left, dm, dleft, operands, own);
      for (int k = 0; extra.weights != nullptr && k < kParameters; ++k) {
        A* const sum = extra.dp + (r * kParameters + k) * H;
        store(sum, load(sum, count) + own[k], count);
      }
      return out;
    }

    static constexpr int kAhead = 4;  // rows whose saved values are prefetched
    const Direction& direction;
    const SavedOrder<A>& order;
    int64_t t, b, H, carry_step, da_step;
    bool first;
    const S *saved, *carry = nullptr, *carry_before = nullptr, *carry0 = nullptr, *dc_all;
    Gradient* da;
    A *dcarry = nullptr, *m;
    [[no_unique_address]] std::conditional_t<kVariant, Extra, Nothing> extra;
  };

  const BackwardParams& p_;
  const Sizes& s_;
  const SavedOrder<A> order_;
};

}  // namespace fusedrnn::FUSEDRNN_ISA
