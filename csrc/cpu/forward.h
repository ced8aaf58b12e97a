// Forward of one layer, both directions: one launch over the whole sequence.
//
//   a_t = xg_t + b + h_{t-1} @ w_hh^T     i, f, o = sigmoid(a_i, a_f, a_o)     g = tanh(a_g)
//   c_t = f * c_{t-1} + i * g             m_t = o * tanh(c_t)                  h_t = m_t  or  m_t @ w_hr^T
//
// Work: a block is `lanes` hidden units with their four gates (panel.h). The product, the nonlinearities and the cell
// update of a block happen in registers, and h, c and, for training, the gates are written once.
// Split by rows: a worker takes its rows through all steps and never waits. Split by units: a chunk is a block, and
// workers meet after each step, or twice a step with a projection (team.h). h_{t-1} and h_t lie in two buffers, so that
// no block reads what another has written in the same step.
// A single step (T = 1) reads the weights as they lie, as dot products along K, and packs nothing.
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

  explicit Forward(const ForwardParams& params) : p_(params), s_(params.sizes) {}

  void run(int index) const {
    if (p_.team.split == Team::Split::kRows) {
      for (int64_t d = 0; d < s_.D; ++d) {
        const OwnedRows rows = owned_rows(s_, p_.team, index, d);
        if (rows.begin >= rows.end) continue;
        start(d, rows.begin, rows.end);
        for (int64_t n = 0; n < s_.T; ++n) {
          for (int64_t block = 0; block < unit_blocks(); ++block) units(n, d, block, rows.begin, rows.end);
          for (int64_t block = 0; block < output_blocks(); ++block) outputs(n, d, block, rows.begin, rows.end);
        }
      }
      return;
    }
    // One Worker serves phases of different chunk counts by using the larger one; the surplus chunks are empty.
    const int64_t blocks = unit_blocks();
    Worker worker(p_.team, s_.D * blocks, index);
    worker.phase([&](int64_t chunk) {
      if (chunk % blocks == 0) start(chunk / blocks, 0, s_.B);
    });
    for (int64_t n = 0; n < s_.T; ++n) {
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
        step_units(d, unit, last - unit < kUnits<A> ? last - unit : kUnits<A>);
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
        write_output(direction, 0, d, b, output, broadcast<A>(horizontal_sum<A>(sum)), 1);
      }
    }
  }

 private:
  int64_t unit_blocks() const { return blocks_of(s_.H, kUnits<A>); }
  int64_t output_blocks() const { return s_.projected ? blocks_of(s_.P, kWide<A>) : 0; }

  A* h(int64_t n, int64_t d) const { return static_cast<A*>(p_.h) + ((n & 1) * s_.D + d) * s_.B * s_.P; }
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
    const A* panel = static_cast<const A*>(p_.panel_hh) + (d * unit_blocks() + block) * s_.P * kWide<A>;
    for_each_tile(row_begin, row_end, [&](auto rows, int64_t b) {
      constexpr int R = decltype(rows)::kCount;
      V sum[R][4];
      clear(sum);
      if (direction.any_exists(t, b, R)) multiply<A, R>(sum, h(n, d) + b * s_.P, s_.P, panel, s_.P);
      for (int r = 0; r < R; ++r) {
        const A* xg = static_cast<const A*>(p_.xg) + direction_major(s_, d, t, b + r, kGates * s_.H) + unit;
        for (int gate = 0; gate < kGates; ++gate) sum[r][gate] += load(xg + gate * s_.H, count);
        finish(direction, n, d, b + r, unit, count, sum[r]);
      }
    });
  }

  // From the affine maps of some hidden units of one row, without bias, to everything that is written about them.
  FUSEDRNN_INLINE void finish(const Direction& direction, int64_t n, int64_t d, int64_t b, int64_t unit, int64_t count,
                              V (&gates)[kGates]) const {
    const int64_t t = direction.at(n);
    S* c_all = p_.c == nullptr ? nullptr : static_cast<S*>(p_.c) + time_major(s_, t, b, d, s_.H) + unit;
    S* gates_all =
        p_.gates == nullptr ? nullptr : static_cast<S*>(p_.gates) + direction_major(s_, d, t, b, kGates * s_.H) + unit;
    if (!direction.exists(t, b)) {
      if (c_all != nullptr) store(c_all, V{}, count);
      for (int gate = 0; gates_all != nullptr && gate < kGates; ++gate) store(gates_all + gate * s_.H, V{}, count);
      if (!s_.projected) write_output(direction, n, d, b, unit, V{}, count);
      return;
    }
    if (p_.bias != nullptr) {
      const A* bias = static_cast<const A*>(p_.bias) + d * kGates * s_.H + unit;
      for (int gate = 0; gate < kGates; ++gate) gates[gate] += load(bias + gate * s_.H, count);
    }
    A* c_state_row = c_state(d) + b * s_.H + unit;
    V c = direction.is_reset(t, b) ? V{} : load(c_state_row, count);
    const V m = LstmCell<A>::forward(gates, c);
    store(c_state_row, c, count);
    if (direction.is_last(t, b)) store(static_cast<S*>(p_.cn) + state(s_, d, b, s_.H) + unit, c, count);
    if (c_all != nullptr) store(c_all, c, count);
    for (int gate = 0; gates_all != nullptr && gate < kGates; ++gate) {
      store(gates_all + gate * s_.H, gates[gate], count);
    }
    if (s_.projected) {
      store(static_cast<A*>(p_.m) + state(s_, d, b, s_.H) + unit, m, count);
    } else {
      write_output(direction, n, d, b, unit, m, count);
    }
  }

  // The n-th step of a block of projected outputs.
  void outputs(int64_t n, int64_t d, int64_t block, int64_t row_begin, int64_t row_end) const {
    const Direction direction(s_, p_.sequence, d);
    const A* panel = static_cast<const A*>(p_.panel_hr) + (d * output_blocks() + block) * s_.H * kWide<A>;
    for_each_tile(row_begin, row_end, [&](auto rows, int64_t b) {
      constexpr int R = decltype(rows)::kCount;
      V sum[R][4];
      clear(sum);
      if (direction.any_exists(direction.at(n), b, R)) {
        multiply<A, R>(sum, static_cast<const A*>(p_.m) + state(s_, d, b, s_.H), s_.H, panel, s_.H);
      }
      for (int r = 0; r < R; ++r) {
        for (int v = 0; v < 4; ++v) {
          const int64_t output = block * kWide<A> + v * kUnits<A>;
          if (output < s_.P) write_output(direction, n, d, b + r, output, sum[r][v], s_.P - output);
        }
      }
    });
  }

  // h_t to where it goes: the output, the state that enters the next step, the final state.
  FUSEDRNN_INLINE void write_output(const Direction& direction, int64_t n, int64_t d, int64_t b, int64_t output,
                                    V value, int64_t count) const {
    const int64_t t = direction.at(n);
    const bool exists = direction.exists(t, b);
    store(static_cast<S*>(p_.y) + time_major(s_, t, b, d, s_.P) + output, exists ? value : V{}, count);
    if (exists && direction.is_last(t, b)) {
      store(static_cast<S*>(p_.hn) + state(s_, d, b, s_.P) + output, value, count);
    }
    if (n + 1 == s_.T) return;
    const V next = exists ? rounded<S>(value) : load(h(n, d) + b * s_.P + output, count);
    const bool cut = direction.is_reset(direction.at(n + 1), b);
    store(h(n + 1, d) + b * s_.P + output, cut ? V{} : next, count);
  }

  // T = 1: some hidden units, for all rows, by dot products.
  void step_units(int64_t d, int64_t unit, int64_t count) const {
    const Direction direction(s_, p_.sequence, d);
    for (int64_t b = 0; b < s_.B; b += kStepRows) {
      const int64_t rows = s_.B - b < kStepRows ? s_.B - b : kStepRows;
      A dots[kStepRows][kGates][kUnits<A>] = {};
      for (int64_t lane = 0; lane < count; ++lane) {
        if (rows == kStepRows) {
          dot_unit<kStepRows>(d, unit + lane, b, dots, lane);
        } else {
          for (int64_t r = 0; r < rows; ++r) dot_unit<1>(d, unit + lane, b + r, dots + r, lane);
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        V gates[kGates];
        for (int gate = 0; gate < kGates; ++gate) gates[gate] = load(dots[r][gate]);
        finish(direction, 0, d, b + r, unit, count, gates);
      }
    }
  }

  // dots[r][gate][lane] = w_ih[gate, unit] . x[b + r] + w_hh[gate, unit] . h0[b + r]
  template <int R>
  FUSEDRNN_INLINE void dot_unit(int64_t d, int64_t unit, int64_t b, A (*dots)[kGates][kUnits<A>], int64_t lane) const {
    V sum[R][kGates];
    clear(sum);
    const S* x = static_cast<const S*>(p_.x) + b * s_.I;
    add_dots<R>(sum, static_cast<const S*>(p_.w_ih[d]) + unit * s_.I, x, s_.I);
    if (p_.h0 != nullptr) {
      // The states of rows that are reset here were made zero by start(), in h.
      add_dots<R>(sum, static_cast<const S*>(p_.w_hh[d]) + unit * s_.P, h(0, d) + b * s_.P, s_.P);
    }
    for (int r = 0; r < R; ++r) {
      for (int gate = 0; gate < kGates; ++gate) dots[r][gate][lane] = horizontal_sum<A>(sum[r][gate]);
    }
  }

  // sum[r][gate] += w[gate * H][k] * a[r][k], lane by lane; w points at one unit's row of the first gate.
  template <int R, class Operand>
  FUSEDRNN_INLINE void add_dots(V (&sum)[R][kGates], const S* w, const Operand* a, int64_t K) const {
    const int64_t whole = K - K % kUnits<A>;
    for (int64_t k = 0; k < whole; k += kUnits<A>) add_dots_at<R>(sum, w, a, K, k, kUnits<A>);
    if (whole < K) add_dots_at<R>(sum, w, a, K, whole, K - whole);
  }
  template <int R, class Operand>
  FUSEDRNN_INLINE void add_dots_at(V (&sum)[R][kGates], const S* w, const Operand* a, int64_t K, int64_t k,
                                   int64_t count) const {
    V weights[kGates];
    for (int gate = 0; gate < kGates; ++gate) weights[gate] = load(w + gate * s_.H * K + k, count);
    for (int r = 0; r < R; ++r) {
      const V values = load(a + r * K + k, count);
      for (int gate = 0; gate < kGates; ++gate) sum[r][gate] += weights[gate] * values;
    }
  }

  static constexpr int kStepRows = FUSEDRNN_VECTOR_BYTES == 64 ? 4 : 2;

  const ForwardParams& p_;
  const Sizes& s_;
};

}  // namespace fusedrnn::FUSEDRNN_ISA
