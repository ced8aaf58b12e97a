// Backward of one layer, both directions: one launch over the whole sequence, against the order of its steps.
//
//   dh_t = dy_t + da_{t+1} @ w_hh       dm = dh_t  or  dh_t @ w_hr       da_t, dc_{t-1} from dm and dc_t: cell.h
//
// (t+1 stands for the step after t in the direction's own order.) The weight gradients are matrix products over all
// steps at once and not part of this: the launch leaves da for them.
//
// Blocks exchange da, gathering it, and hold the rows of w_hh^T that give dh of their own units: the forward's exchange
// and product with another K, and a result that is the same whatever the plan but for the order of K. In a cluster
// this is for layers with a projection; others exchange partial sums of dh there, H numbers of 32 bits for each batch
// row in the place of 4 H of the storage dtype: scatter.h.
//
// Grid and groups: as in forward.h. A block owns 16 * plan.tiles hidden units, a warp a tile of 16 and a part of K,
// which is 4H here; a lane ends with dh of two units for two batch rows of each column tile. With a projection, the
// first warps of the group own a tile of 16 numbers of h as well, and da_{t+1} @ w_hh is for these. Registers: the
// first K blocks of the warp's weights, dh and dc of the lane's units, and the gates, c, dy and dc of the next step,
// loaded before the wait for da, in 16 bits as they are stored. Shared memory: further weights, da of all units for the
// rows of the slice, partial sums of split K, and what is about to be sent. K is in the order of the tiles: 8 units of
// gate i, of f, of g, of o, and on with the next 8 units. Synchronisation: one exchange of da per step inside a group,
// with a projection one of dh as well; and, where K is split, one barrier of the warps of a tile. Limits: as in
// forward.h, with da, which is four times h. In parts there is none here either: in a step, the tiles take turns to
// send dh, where there is a projection, to get da and send it, and to get dh from da.
#pragma once

#include <type_traits>

#include "exchange.h"
#include "geometry.h"
#include "turns.h"

namespace fusedrnn::cuda {

// kColumnTiles: plan.rows / 8.
template <Math kMath, class Channel, int kColumnTiles, bool kProjected>
class Backward {
 public:
  using M = Arithmetic<kMath>;
  using S = typename M::Storage;
  using A = typename M::Compute;

  static FUSEDRNN_DEVICE void run(const BackwardParams& p, char* shared) {
    const SharedLayout layout = shared_layout(kPass, p.sizes, p.plan);
    Role role(p.plan);
    Backward(p, role, shared, layout).run(shared, layout);
  }

 private:
  static constexpr Pass kPass = Pass::kBackward;
  static constexpr int kSegments = 2;
  static constexpr int kUnits = tile_units(kPass);
  static_assert(kUnits == kTileOutputs && kUnits == 8 * kSegments);  // a lane's units and numbers of h have one index
  static constexpr int kRows = kColumnTiles * kColumns;
  template <Stage kStage>
  using Multiplier =
      WarpProduct<M, kSegments, kColumnTiles,
                  register_blocks(Channel::kExchange, kPass, kStage, kMath, kRows, kProjected), Channel::kInParts>;
  using Recurrent = Multiplier<Stage::kRecurrent>;
  using Projection = Multiplier<Stage::kProjection>;
  // What a step needs of a cell is held as it is stored, and converted when the step comes, where registers allow it: a
  // conversion waits for each number where it is loaded.
  static constexpr bool kRaw = sizeof(S) == 2 && kColumnTiles == 1 && !kProjected && !Channel::kInParts;
  using Held = std::conditional_t<kRaw, S, A>;
  // Zero where the step does not exist, and then so is da.
  template <class Number>
  struct Numbers {
    Number gates[kGates], c, c_in, dy, dc;
  };
  using Results = A[kColumnTiles][kSegments][2];
  static constexpr int kKeptOfDh = kColumnTiles * kSegments * 2;
  using Kept = Turns<A, kept_numbers(kPass, kRows, kProjected)>;

  FUSEDRNN_DEVICE Backward(const BackwardParams& p, Role& role, char* shared, const SharedLayout& layout)
      : p_(p),
        role_(role),
        da_channel_(channel(p, role, Stage::kRecurrent, shared, layout)),
        dh_channel_(channel(p, role, Stage::kProjection, shared, layout)),
        staging_(reinterpret_cast<S*>(shared + layout.staging + role.warp * layout.warp_staging)),
        direction_(p.sizes, p.sequence, role.direction) {
    take_tile();
    in_units_ = Channel::kIdleWarpsTakePart ? role.rank < blocks_with(unit_tiles(), p.plan) : has_units_;
    in_outputs_ = Channel::kIdleWarpsTakePart ? role.rank < blocks_with(output_tiles(), p.plan) : has_outputs_;
  }

  FUSEDRNN_DEVICE int64_t unit_tiles() const { return ceil_div(p_.sizes.H, kUnits); }
  FUSEDRNN_DEVICE int64_t output_tiles() const { return ceil_div(p_.sizes.P, kTileOutputs); }

  // Makes the tile of the role the one that all of this is about.
  FUSEDRNN_DEVICE void take_tile() {
    first_unit_ = role_.tile * kUnits + role_.lane / 4;
    has_units_ = role_.tile < unit_tiles();
    has_outputs_ = role_.tile < output_tiles();
  }

  static FUSEDRNN_DEVICE Product product_of(const BackwardParams& p, Stage stage) {
    return product(kPass, stage, p.sizes, kMath, kProjected);
  }
  static FUSEDRNN_DEVICE Channel channel(const BackwardParams& p, const Role& role, Stage stage, char* shared,
                                         const SharedLayout& layout) {
    const int k = static_cast<int>(stage);
    return Channel(role, p.sizes, p.plan, kPass, stage, product_of(p, stage), kRows, p.workspace,
                   shared + layout.operands[k], reinterpret_cast<Mbarrier*>(shared + layout.barriers[k]));
  }

  FUSEDRNN_DEVICE void run(char* shared, const SharedLayout& layout) {
    if constexpr (!Channel::kInParts) clear_operands(layout, shared, p_.plan);
    da_channel_.start();
    if constexpr (kProjected) dh_channel_.start();
    Channel::started();
    if (!in_units_) return;
    if constexpr (Channel::kInParts) {
      slices_in_turns(shared, layout);
    } else {
      const Recurrent recurrent = recurrent_product(shared, layout);
      if constexpr (kProjected) {
        const Projection projection = projection_product(shared, layout);
        slices(recurrent, &projection);
      } else {
        slices(recurrent, nullptr);
      }
    }
  }

  // Of the tile that the role has now.
  FUSEDRNN_DEVICE Recurrent recurrent_product(char* shared, const SharedLayout& layout) const {
    return Recurrent(role_, p_.plan, product_of(p_, Stage::kRecurrent), p_.w_hh, p_.plan.shared_blocks,
                     shared + layout.weights[0], shared + layout.partial[0]);
  }
  FUSEDRNN_DEVICE Projection projection_product(char* shared, const SharedLayout& layout) const {
    return Projection(role_, p_.plan, product_of(p_, Stage::kProjection), p_.w_hr, p_.plan.shared_projection_blocks,
                      shared + layout.weights[1], shared + layout.partial[1]);
  }

  // f(b) for the first batch row of every slice of the group.
  template <class F>
  FUSEDRNN_DEVICE void for_each_slice(const F& f) {
    for (int64_t b = static_cast<int64_t>(role_.first_slice) * p_.plan.rows; b < p_.sizes.B;
         b += static_cast<int64_t>(p_.plan.groups) * p_.plan.rows) {
      f(b);
    }
  }

  FUSEDRNN_DEVICE void slices(const Recurrent& recurrent, const Projection* projection) {
    for_each_slice([&](int64_t b) {
      start(b);
      load(p_.sizes.T - 1);
      FUSEDRNN_NO_UNROLL for (int64_t n = p_.sizes.T - 1; n >= 0; --n) {
        next_step();
        Results dm;
        if constexpr (kProjected) {
          project(*projection, n, dm);
        } else {
          add_dy(dm);
        }
        cells(dm);
        send_da();
        da_channel_.announce();
        store(n);
        load(n - 1);
        if (!in_outputs_) continue;
        const char* operand = da_channel_.receive();
        if (!has_outputs_) continue;
        Results z;
        recurrent.multiply(operand, z);
        take(z);
      }
      finish();
    });
  }

  // The same of several tiles, in turns.
  FUSEDRNN_DEVICE void slices_in_turns(char* shared, const SharedLayout& layout) {
    Kept kept(p_.sizes, p_.plan, kPass, p_.workspace);
    const auto in_turns = [&](int64_t tiles, const auto& f) {
      kept.for_each(tiles, role_, [&] {
        take_tile();
        forget();
        f();
      });
    };
    // From da of the n-th step, where there was one, to dh of the tile.
    const auto begin = [&](int64_t b, int64_t n) {
      if (n == p_.sizes.T) {
        start(b);
      } else {
        const Recurrent recurrent = recurrent_product(shared, layout);
        Results z;
        recurrent.multiply_part(da_channel_, z);
        recurrent.add_parts(z);
        recall(kept, b);
        look_at(n);
        next_step();
        take(z);
      }
    };
    for_each_slice([&](int64_t b) {
      FUSEDRNN_NO_UNROLL for (int64_t n = p_.sizes.T - 1; n >= -1; --n) {
        const bool first = n == p_.sizes.T - 1, last = n < 0;
        if (!first && in_outputs_) da_channel_.await();
        if constexpr (kProjected) {
          if (in_outputs_) {
            in_turns(output_tiles(), [&] {
              begin(b, n + 1);
              keep_dh(kept);
              if (last) return;
              load(n);
              next_step();
              send_dh();
              store_dh(n);
            });
            if (!last) dh_channel_.announce();
          }
          if (!last) dh_channel_.await();
        }
        in_turns(unit_tiles(), [&] {
          Results dm;
          if constexpr (kProjected) {
            if (!last) {
              const Projection projection = projection_product(shared, layout);
              projection.multiply_part(dh_channel_, dm);
              projection.add_parts(dm);
            }
            if (first) {
              start(b);
            } else {
              recall(kept, b);
            }
          } else {
            begin(b, n + 1);
          }
          if (last) return finish();
          load(n);
          next_step();
          if constexpr (!kProjected) add_dy(dm);
          cells(dm);
          send_da();
          store(n);
          keep_dc(kept);
          if constexpr (!kProjected) keep_dh(kept);
        });
        if (!last) da_channel_.announce();
      }
    });
  }

  // Nothing of a turn goes on to the next but what is kept: so it takes no registers in between.
  FUSEDRNN_DEVICE void forget() {
    exists_ = cut_ = exists_next_ = cut_next_ = ColumnMask();
    FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) {
      lengths_[n][0] = lengths_[n][1] = 0;
      FUSEDRNN_UNROLL for (int s = 0; s < kSegments; ++s) {
        FUSEDRNN_UNROLL for (int j = 0; j < 2; ++j) {
          held(n, s, j) = {};
          loaded_[n][s][j] = {};
          dh_[n][s][j] = dc_[n][s][j] = 0;
        }
      }
    }
  }

  // The gradients of a tile's state between its turns, and back.
  FUSEDRNN_DEVICE void keep_dc(const Kept& kept) {
    for_each_cell([&](int n, int s, int j) { kept[(n * kSegments + s) * 2 + j] = dc_[n][s][j]; });
  }
  FUSEDRNN_DEVICE void keep_dh(const Kept& kept) {
    for_each_cell([&](int n, int s, int j) { kept[kKeptOfDh + (n * kSegments + s) * 2 + j] = dh_[n][s][j]; });
  }
  FUSEDRNN_DEVICE void recall(const Kept& kept, int64_t first_row) {
    find_rows(first_row);
    for_each_cell([&](int n, int s, int j) {
      dc_[n][s][j] = kept[(n * kSegments + s) * 2 + j];
      dh_[n][s][j] = kept[kKeptOfDh + (n * kSegments + s) * 2 + j];
    });
  }

  // f(n, j) for every column tile n that the warp owns and each of the lane's two columns j in it.
  template <class F>
  FUSEDRNN_DEVICE void for_each_column(const F& f) {
    FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) {
      if (!has_units_ || !role_.owns(n)) continue;
      FUSEDRNN_UNROLL for (int j = 0; j < 2; ++j) f(n, j);
    }
  }
  // f(n, s, j) for each of these, and each of the lane's units s.
  template <class F>
  FUSEDRNN_DEVICE void for_each_cell(const F& f) {
    for_each_column([&](int n, int j) { FUSEDRNN_UNROLL for (int s = 0; s < kSegments; ++s) f(n, s, j); });
  }

  FUSEDRNN_DEVICE int unit(int s) const { return first_unit_ + s * kColumns; }
  FUSEDRNN_DEVICE int64_t row(int n, int j) const { return first_row_ + n * kColumns + j; }
  FUSEDRNN_DEVICE bool is_unit(int n, int s, int j) const { return unit(s) < p_.sizes.H && row(n, j) < p_.sizes.B; }
  // Whether there is a number of h of that index.
  FUSEDRNN_DEVICE bool is_output(int n, int s, int j) const { return unit(s) < p_.sizes.P && row(n, j) < p_.sizes.B; }
  static FUSEDRNN_DEVICE A number(const void* from, int64_t at) { return to_compute(static_cast<const S*>(from)[at]); }
  static FUSEDRNN_DEVICE Held stored(const void* from, int64_t at) {
    if constexpr (kRaw) {
      return static_cast<const S*>(from)[at];
    } else {
      return number(from, at);
    }
  }

  FUSEDRNN_DEVICE void start(int64_t first_row) {
    find_rows(first_row);
    for_each_cell([&](int n, int s, int j) {
      const int64_t b = row(n, j);
      dh_[n][s][j] = dc_[n][s][j] = 0;
      if (p_.dhn != nullptr && is_output(n, s, j)) {
        dh_[n][s][j] = number(p_.dhn, direction_.state(b, p_.sizes.P) + unit(s));
      }
      if (p_.dcn != nullptr && is_unit(n, s, j)) {
        dc_[n][s][j] = number(p_.dcn, direction_.state(b, p_.sizes.H) + unit(s));
      }
    });
  }

  FUSEDRNN_DEVICE void find_rows(int64_t first_row) {
    first_row_ = first_row + role_.lane % 4 * 2;
    for_each_column([&](int n, int j) { lengths_[n][j] = direction_.length(row(n, j)); });
  }

  // Which of the lane's columns there are in the n-th step.
  FUSEDRNN_DEVICE void look_at(int64_t step) {
    const int64_t t = direction_.at(step);
    for_each_column([&](int n, int j) {
      exists_next_.set(n, j, Direction::exists(t, lengths_[n][j]));
      cut_next_.set(n, j, exists_next_(n, j) && direction_.is_reset(t, row(n, j)));
    });
  }

  // What the n-th step needs and no other block computes.
  FUSEDRNN_DEVICE void load(int64_t step) {
    const int64_t t = direction_.at(step), H = p_.sizes.H;
    look_at(step);
    for_each_cell([&](int n, int s, int j) {
      auto& raw = held(n, s, j);
      raw = {};
      if (!is_unit(n, s, j) || !exists_next_(n, j)) return;
      const int64_t b = row(n, j), gates = direction_.step(t, b, kGates * H) + unit(s);
      FUSEDRNN_UNROLL for (int gate = 0; gate < kGates; ++gate) {
        raw.gates[gate] = stored(p_.gates, gates + gate * H);
      }
      raw.c = stored(p_.c, direction_.offset(p_.c_strides, t, b) + unit(s));
      if (!cut_next_(n, j)) {
        if (!direction_.is_first(t, lengths_[n][j])) {
          raw.c_in = stored(p_.c, direction_.offset(p_.c_strides, direction_.before(t), b) + unit(s));
        } else if (p_.c0 != nullptr) {
          raw.c_in = stored(p_.c0, direction_.state(b, H) + unit(s));
        }
      }
      if (p_.dy != nullptr && is_output(n, s, j)) {
        raw.dy = stored(p_.dy, direction_.offset(p_.dy_strides, t, b) + unit(s));
      }
      if (p_.dc != nullptr) raw.dc = stored(p_.dc, direction_.offset(p_.dc_strides, t, b) + unit(s));
    });
  }

  // The first exchange and product of a step: from dh to dm.
  FUSEDRNN_DEVICE void project(const Projection& projection, int64_t step, Results& dm) {
    if (in_outputs_) {
      send_dh();
      dh_channel_.announce();
      store_dh(step);
    }
    const char* operand = dh_channel_.receive();
    if (has_units_) projection.multiply(operand, dm);
  }

  FUSEDRNN_DEVICE A dh(int n, int s, int j) const { return exists_(n, j) ? dh_[n][s][j] + loaded_[n][s][j].dy : A(0); }
  FUSEDRNN_DEVICE void send_dh() {
    send<kUnits>(dh_channel_, has_outputs_, [&](int n, int j, int k) { return dh(n, k, j); });
  }
  FUSEDRNN_DEVICE void store_dh(int64_t step) {
    const int64_t t = direction_.at(step);
    for_each_cell([&](int n, int s, int j) {
      if (!is_output(n, s, j)) return;
      static_cast<S*>(p_.dh_out)[direction_.step(t, row(n, j), p_.sizes.P) + unit(s)] = to_storage<S>(dh(n, s, j));
    });
  }

  // From dh to dm, without a projection.
  FUSEDRNN_DEVICE void add_dy(Results& dm) {
    for_each_cell([&](int n, int s, int j) { dm[n][s][j] = dh_[n][s][j] + loaded_[n][s][j].dy; });
  }

  // From the product with da to dh of the state that entered the step.
  FUSEDRNN_DEVICE void take(const Results& z) {
    for_each_cell([&](int n, int s, int j) {
      if (exists_(n, j)) dh_[n][s][j] = cut_(n, j) ? A(0) : z[n][s][j];
    });
  }

  FUSEDRNN_DEVICE void next_step() {
    exists_ = exists_next_;
    cut_ = cut_next_;
    if constexpr (!kRaw) return;
    for_each_cell([&](int n, int s, int j) {
      const auto& raw = held(n, s, j);
      Numbers<A>& loaded = loaded_[n][s][j];
      FUSEDRNN_UNROLL for (int gate = 0; gate < kGates; ++gate) loaded.gates[gate] = to_compute(raw.gates[gate]);
      loaded.c = to_compute(raw.c);
      loaded.c_in = to_compute(raw.c_in);
      loaded.dy = to_compute(raw.dy);
      loaded.dc = to_compute(raw.dc);
    });
  }
  FUSEDRNN_DEVICE Numbers<Held>& held(int n, int s, int j) {
    if constexpr (kRaw) {
      return raw_[n][s][j];
    } else {
      return loaded_[n][s][j];
    }
  }

  // From dm and dc to da, in the place of the gates, and dc of the step before; and m, in the place of c.
  FUSEDRNN_DEVICE void cells(const Results& dm) {
    for_each_cell([&](int n, int s, int j) {
      Numbers<A>& loaded = loaded_[n][s][j];
      if (!exists_(n, j)) return;
      A dc = dc_[n][s][j] + loaded.dc;
      loaded.c = M::Cell::backward(loaded.gates, loaded.c_in, loaded.c, dm[n][s][j], dc);
      dc_[n][s][j] = cut_(n, j) ? A(0) : dc;
    });
  }

  FUSEDRNN_DEVICE void send_da() {
    send<kUnits * kGates>(da_channel_, has_units_,
                          [&](int n, int j, int k) { return loaded_[n][k / kGates][j].gates[k % kGates]; });
  }

  // Sends value(n, j, k), which is number 8 k + lane / 4 of kChunk, of the column tiles that the warp owns.
  template <int kChunk, class F>
  FUSEDRNN_DEVICE void send(Channel& channel, bool has_values, const F& value) {
    FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) {
      if (!has_values || !role_.owns(n)) continue;
      if (Channel::kInParts || n > 0) sync_warp("the staged results are sent");
      FUSEDRNN_UNROLL for (int j = 0; j < 2; ++j) {
        FUSEDRNN_UNROLL for (int k = 0; k < kChunk / 8; ++k) {
          staging_[(role_.lane % 4 * 2 + j) * kChunk + k * 8 + role_.lane / 4] = M::operand(value(n, j, k));
        }
      }
      send_staged<kChunk* static_cast<int>(sizeof(S))>(channel, role_, reinterpret_cast<const char*>(staging_), n);
    }
  }

  FUSEDRNN_DEVICE void store(int64_t step) {
    const int64_t t = direction_.at(step), H = p_.sizes.H;
    for_each_cell([&](int n, int s, int j) {
      if (!is_unit(n, s, j)) return;
      S* to = static_cast<S*>(p_.da) + direction_.step(t, row(n, j), kGates * H) + unit(s);
      FUSEDRNN_UNROLL for (int gate = 0; gate < kGates; ++gate) {
        to[gate * H] = to_storage<S>(loaded_[n][s][j].gates[gate]);
      }
      if constexpr (kProjected) {
        static_cast<S*>(p_.m)[direction_.step(t, row(n, j), H) + unit(s)] = to_storage<S>(loaded_[n][s][j].c);
      }
    });
  }

  FUSEDRNN_DEVICE void finish() {
    for_each_cell([&](int n, int s, int j) {
      const int64_t b = row(n, j);
      if (p_.dh0 != nullptr && is_output(n, s, j)) {
        static_cast<S*>(p_.dh0)[direction_.state(b, p_.sizes.P) + unit(s)] = to_storage<S>(dh_[n][s][j]);
      }
      if (p_.dc0 != nullptr && is_unit(n, s, j)) {
        static_cast<S*>(p_.dc0)[direction_.state(b, p_.sizes.H) + unit(s)] = to_storage<S>(dc_[n][s][j]);
      }
    });
  }

  const BackwardParams& p_;
  Role& role_;
  Channel da_channel_, dh_channel_;  // the second one only with a projection
  S* staging_;
  const Direction direction_;
  int first_unit_;
  // Whether the warp has a tile of units, and of numbers of h; and whether the thread takes part in receiving dh, and
  // da.
  bool has_units_, has_outputs_, in_units_, in_outputs_;
  int64_t first_row_;  // batch row of the first column
  int lengths_[kColumnTiles][2];
  // Whether the last step exists and its state was cut, and the same of the step that comes.
  ColumnMask exists_, cut_, exists_next_, cut_next_;
  A dh_[kColumnTiles][kSegments][2];  // gradients of the state that leaves it
  A dc_[kColumnTiles][kSegments][2];
  Numbers<A> loaded_[kColumnTiles][kSegments][2];
  Numbers<Held> raw_[kRaw ? kColumnTiles : 1][kSegments][2];  // of the step that comes
};

}  // namespace fusedrnn::cuda
