// Forward of one layer, both directions: one launch over the whole sequence, or a few over parts of it.
//
//   a_t = xg_t + b + h_{t-1} @ w_hh^T     i, f, o = sigmoid(a_i, a_f, a_o)     g = tanh(a_g)
//   c_t = f * c_{t-1} + i * g             m_t = o * tanh(c_t)                  h_t = m_t  or  m_t @ w_hr^T
//
// Work: a block is `lanes` hidden units with their four gates (panel.h). The product, the nonlinearities and the cell
// update of a block happen in registers, and h, c and, for training, the gates are written once.
// Split by rows: a worker takes its rows through all steps and never waits. Split by units: a chunk is a block, and
// workers meet after each step, or twice a step with a projection (team.h). h_{t-1} and h_t lie in two buffers, so that
// no block reads what another has written in the same step.
// A single step, or a single row, has no use for a tile: the weights are read as they lie, as dot products along K, and
// nothing is packed.
#pragma once

#include "geometry.h"
#include "panel.h"
#include "team.h"

namespace fusedrnn::FUSEDRNN_ISA {

template <class S>
class Forward {
 public:
  using A = Compute<S>;
  using V = Vec<A>;

  explicit Forward(const ForwardParams& params) : p_(params), s_(params.sizes), order_(params.sizes.H) {}

  void run(int index) const {
    if (p_.team.split == Team::Split::kRows) {
      for (int64_t d = 0; d < s_.D; ++d) {
        const OwnedRows rows = owned_rows(s_, p_.team, index, d);
        if (rows.begin >= rows.end) continue;
        if (p_.begin == 0) start(d, rows.begin, rows.end);
        for (int64_t n = p_.begin; n < p_.end; ++n) {
          for (int64_t k = 0; k < unit_blocks(); ++k) {
            units(n, d, in_turns(n, k, unit_blocks()), rows.begin, rows.end);
          }
          for (int64_t k = 0; k < output_blocks(); ++k) {
            outputs(n, d, in_turns(n, k, output_blocks()), rows.begin, rows.end);
          }
        }
      }
      return;
    }
    // One Worker serves phases of different chunk counts by using the larger one; the surplus chunks are empty.
    const int64_t blocks = unit_blocks();
    Worker worker(p_.team, s_.D * blocks, index);
    worker.phase([&](int64_t chunk) {
      if (chunk % blocks == 0 && p_.begin == 0) start(chunk / blocks, 0, s_.B);
    });
    for (int64_t n = p_.begin; n < p_.end; ++n) {
      worker.phase([&](int64_t chunk) { units(n, chunk / blocks, chunk % blocks, 0, s_.B); });
      if (!s_.projected) continue;
      worker.phase([&](int64_t chunk) {
        if (chunk % blocks < output_blocks()) outputs(n, chunk / blocks, chunk % blocks, 0, s_.B);
      });
    }
  }

  // T = 1: before step(), the state of the rows.
  void step_start() const {
    for (int64_t d = 0; d < s_.D; ++d) start(d, 0, s_.B);
  }

  // T = 1: hidden units [begin, end) of D * H, for all rows.
  void step(int64_t begin, int64_t end) const {
    for (int64_t d = 0; d < s_.D; ++d) {
      const int64_t first = begin > d * s_.H ? begin - d * s_.H : 0;
      const int64_t last = end < (d + 1) * s_.H ? end - d * s_.H : s_.H;
      for (int64_t unit = first; unit < last; unit += kUnits<A>) {
        dot_units(0, d, unit, last - unit < kUnits<A> ? last - unit : kUnits<A>, 0, s_.B);
      }
    }
  }

  // T = 1 with a projection: outputs [begin, end) of D * P, for all rows.
  void step_project(int64_t begin, int64_t end) const {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t d = n / s_.P, output = n % s_.P;
      const Direction direction(s_, p_.sequence, d);
      const S* w_hr = static_cast<const S*>(p_.w_hr[d]) + output * s_.H;
      const A* m = static_cast<const A*>(p_.m) + state(s_, d, 0, s_.H);
      for (int64_t b = 0; b < s_.B; ++b) {
        V sum{};
        for (int64_t k = 0; k < s_.H; k += kUnits<A>)
          sum += load(w_hr + k, s_.H - k) * load(m + b * s_.H + k, s_.H - k);
        Outputs(*this, direction, 0, d, b, output).template write<true>(0, broadcast<A>(horizontal_sum<A>(sum)), 1);
      }
    }
  }

 private:
  int64_t unit_blocks() const { return blocks_of(s_.H, kUnits<A>); }
  int64_t output_blocks() const { return s_.projected ? blocks_of(s_.P, kWide<A>) : 0; }

  A* h(int64_t n, int64_t d) const { return static_cast<A*>(p_.h) + ((n & 1) * s_.D + d) * s_.B * s_.P; }
  const A* xg(int64_t d, int64_t t, int64_t b) const {
    const int64_t first = d == 0 ? p_.begin : s_.T - p_.end;
    return static_cast<const A*>(p_.xg[d]) + ((t - first) * s_.B + b) * kGates * s_.H;
  }
  void prefetch_gates(const A* row) const {
    for (int64_t gate = 0; gate < kGates; ++gate) __builtin_prefetch(row + order_(0, gate));
  }
  A* c_state(int64_t d) const { return static_cast<A*>(p_.c_state) + state(s_, d, 0, s_.H); }

  // The state before the first step, and the final state of the rows that have no step at all.
  void start(int64_t d, int64_t row_begin, int64_t row_end) const {
    const Direction direction(s_, p_.sequence, d);
    for (int64_t b = row_begin; b < row_end; ++b) {
      const S* h0 = static_cast<const S*>(p_.h0);
      const S* c0 = static_cast<const S*>(p_.c0);
      const bool cut = direction.is_reset(direction.at(0), b);
      for (int64_t k = 0; k < s_.P; k += kUnits<A>) {
        const V value = h0 == nullptr ? V{} : load(h0 + state(s_, d, b, s_.P) + k, s_.P - k);
        store(h(0, d) + b * s_.P + k, cut ? V{} : value, s_.P - k);
        if (direction.length(b) == 0) store(static_cast<S*>(p_.hn) + state(s_, d, b, s_.P) + k, value, s_.P - k);
      }
      for (int64_t k = 0; k < s_.H; k += kUnits<A>) {
        const V value = c0 == nullptr ? V{} : load(c0 + state(s_, d, b, s_.H) + k, s_.H - k);
        store(c_state(d) + b * s_.H + k, value, s_.H - k);
        if (direction.length(b) == 0) store(static_cast<S*>(p_.cn) + state(s_, d, b, s_.H) + k, value, s_.H - k);
      }
    }
  }

  // The n-th step of a block of hidden units, for rows [row_begin, row_end).
  void units(int64_t n, int64_t d, int64_t block, int64_t row_begin, int64_t row_end) const {
    const Direction direction(s_, p_.sequence, d);
    const int64_t t = direction.at(n), unit = block * kUnits<A>;
    const int64_t count = s_.H - unit < kUnits<A> ? s_.H - unit : kUnits<A>;
    if (p_.panel_hh == nullptr) return dot_units(n, d, unit, count, row_begin, row_end);
    const A* panel = static_cast<const A*>(p_.panel_hh) + (d * unit_blocks() + block) * s_.P * kWide<A>;
    for_each_chunk(row_begin, row_end, [&](int64_t b, int64_t rows) {
      for (int64_t r = 0; r < rows; ++r) prefetch_gates(xg(d, t, b + r) + order_(unit));  // while the product runs
      V sum[kRowsAtATime][4];
      multiply<A>(sum, h(n, d) + b * s_.P, s_.P, panel, s_.P, rows, s_.B == 1,
                  [&](int64_t first, int64_t count) { return direction.any_exists(t, b + first, count); });
      finish(direction, n, d, b, rows, unit, count, sum);
    });
  }

  // From the affine maps of some hidden units, without biases and the input's where it was computed before, to
  // everything that is written about them.
  FUSEDRNN_INLINE void finish(const Direction& direction, int64_t n, int64_t d, int64_t b, int64_t rows, int64_t unit,
                              int64_t count, V (*gates)[kGates]) const {
    if (count == kUnits<A> && !direction.ragged()) {  // known when compiled: nothing to test per row
      finish_all<false>(direction, n, d, b, rows, unit, kUnits<A>, gates);
    } else {
      finish_all<true>(direction, n, d, b, rows, unit, count, gates);
    }
  }

  template <bool kRagged>
  FUSEDRNN_INLINE void finish_all(const Direction& direction, int64_t n, int64_t d, int64_t b, int64_t rows,
                                  int64_t unit, int64_t count, V (*gates)[kGates]) const {
    V bias[kGates] = {};
    for (int gate = 0; p_.b_ih[d] != nullptr && gate < kGates; ++gate) {
      bias[gate] = load(static_cast<const S*>(p_.b_ih[d]) + gate * s_.H + unit, count) +
                   load(static_cast<const S*>(p_.b_hh[d]) + gate * s_.H + unit, count);
    }
    for (int64_t r = 0; r < rows; r += kTogether) {
      with_rows<kTogether>(rows - r < kTogether ? rows - r : kTogether, [&](auto R) {
        finish_rows<kRagged, R.kCount>(direction, n, d, b + r, unit, count, bias, gates + r);
      });
    }
  }

  template <bool kRagged, int R>
  FUSEDRNN_INLINE void finish_rows(const Direction& direction, int64_t n, int64_t d, int64_t b, int64_t unit,
                                   int64_t count, const V (&bias)[kGates], V (*gates)[kGates]) const {
    const int64_t t = direction.at(n), H = s_.H, c_step = s_.D * H;
    const int64_t gates_at = direction_major(s_, d, t, b, kGates * H) + order_(unit);
    const A* xg = p_.xg[d] == nullptr ? nullptr : this->xg(d, t, b) + order_(unit);
    S* gates_all = p_.gates == nullptr ? nullptr : static_cast<S*>(p_.gates) + gates_at;
    S* c_all = p_.c == nullptr ? nullptr : static_cast<S*>(p_.c) + time_major(s_, t, b, d, H) + unit;
    A* c_state = this->c_state(d) + b * H + unit;
    A* m_all = s_.projected ? static_cast<A*>(p_.m) + state(s_, d, b, H) + unit : nullptr;
    S* cn = static_cast<S*>(p_.cn) + state(s_, d, b, H) + unit;
    const Outputs outputs(*this, direction, n, d, b, unit);
    V c[R], m[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      for (int gate = 0; gate < kGates; ++gate) gates[r][gate] += bias[gate];
      if (xg != nullptr) {
        const A* row = xg + r * kGates * H;
        for (int gate = 0; gate < kGates; ++gate) gates[r][gate] += load(row + order_(0, gate), count);
        prefetch_gates(row + kTogether * kGates * H);
      }
      c[r] = kRagged && direction.is_reset(t, b + r) ? V{} : load(c_state + r * H, count);
    }
    LstmCell<A>::template forward<R>(gates, c, m);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const bool exists = !kRagged || direction.exists(t, b + r);
      if (c_all != nullptr) store(c_all + r * c_step, exists ? c[r] : V{}, count);
      for (int gate = 0; gates_all != nullptr && gate < kGates; ++gate) {
        store(gates_all + r * kGates * H + order_(0, gate), exists ? gates[r][gate] : V{}, count);
      }
      if (exists) store(c_state + r * H, c[r], count);
      if (exists && (kRagged ? direction.is_last(t, b + r) : n + 1 == s_.T)) store(cn + r * H, c[r], count);
      if (!s_.projected) {
        outputs.template write<kRagged>(r, m[r], count);
      } else if (exists) {
        store(m_all + r * H, m[r], count);
      }
    }
  }

  // The n-th step of a block of projected outputs.
  void outputs(int64_t n, int64_t d, int64_t block, int64_t row_begin, int64_t row_end) const {
    const Direction direction(s_, p_.sequence, d);
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

  // Where some outputs of rows from b on go at the n-th step: the output, the state that enters the next step, and the
  // final state.
  struct Outputs {
    Outputs(const Forward& forward, const Direction& direction, int64_t n, int64_t d, int64_t b, int64_t output)
        : direction(direction),
          t(direction.at(n)),
          next(direction.at(n + 1)),
          b(b),
          P(forward.s_.P),
          y_step(forward.s_.D * forward.s_.P),
          final(n + 1 == forward.s_.T),
          y(static_cast<S*>(forward.p_.y) + time_major(forward.s_, t, b, d, P) + output),
          hn(static_cast<S*>(forward.p_.hn) + state(forward.s_, d, b, P) + output),
          h_in(forward.h(n, d) + b * P + output),
          h_out(forward.h(n + 1, d) + b * P + output) {}

    template <bool kRagged>
    FUSEDRNN_INLINE void write(int64_t r, V value, int64_t count) const {
      const bool exists = !kRagged || direction.exists(t, b + r);
      store(y + r * y_step, exists ? value : V{}, count);
      if (exists && (kRagged ? direction.is_last(t, b + r) : final)) store(hn + r * P, value, count);
      if (final) return;
      const V after = exists ? rounded<S>(value) : load(h_in + r * P, count);
      store(h_out + r * P, kRagged && direction.is_reset(next, b + r) ? V{} : after, count);
    }

    const Direction& direction;
    int64_t t, next, b, P, y_step;
    bool final;
    S *y, *hn;
    const A* h_in;
    A* h_out;
  };

  // The n-th step of the hidden units [unit, unit + count), at most `lanes`, for rows [row_begin, row_end): dot
  // products with the weights as they lie.
  void dot_units(int64_t n, int64_t d, int64_t unit, int64_t count, int64_t row_begin, int64_t row_end) const {
    const Direction direction(s_, p_.sequence, d);
    const S* w_hh = static_cast<const S*>(p_.w_hh[d]) + unit * s_.P;
    const S* x = static_cast<const S*>(p_.x) + direction.at(n) * s_.B * s_.I;
    const bool recurs = n > 0 || p_.h0 != nullptr;
    for_each_chunk(row_begin, row_end, [&](int64_t b, int64_t rows) {
      V gates[kRowsAtATime][kGates];
      for (int gate = 0; gate < kGates; ++gate) {
        for (int64_t r = 0; r < rows; ++r) {
          V sums[kUnits<A>];
          for (int64_t u = 0; u < kUnits<A>; ++u) sums[u] = V{};
          const S* w_ih = static_cast<const S*>(p_.w_ih[d]) + (gate * s_.H + unit) * s_.I;
          add_dots<A>(sums, w_ih, count, x + (b + r) * s_.I, s_.I);
          // The states of rows that are reset were made zero where they were written.
          if (recurs) add_dots<A>(sums, w_hh + gate * s_.H * s_.P, count, h(n, d) + (b + r) * s_.P, s_.P);
          gates[r][gate] = sum_each<A>(sums);
        }
      }
      finish(direction, n, d, b, rows, unit, count, gates);
    });
  }

  static constexpr int kTogether = 4;  // rows whose cells are computed at the same time

  const ForwardParams& p_;
  const Sizes& s_;
  const GateOrder<A> order_;
};

}  // namespace fusedrnn::FUSEDRNN_ISA
