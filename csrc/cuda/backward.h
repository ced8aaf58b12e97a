// Backward of one layer, both directions: one launch over the whole sequence, against the order of its steps.
//
//   dh_t = dy_t + da_{t+1} @ w_hh       dm = dh_t  or  dh_t @ w_hr       da_t, dc_{t-1} from dm and dc_t: csrc/cells
//
// c stands for the cell's carry, da for the gradients of its maps; the product takes those that have an affine map of
// the state. A carry that is h has dh_0 as well. (t+1 stands for the step after t in the direction's own order.) The
// weight gradients are matrix products over all steps at once and not part of this: the launch leaves da for them.
//
// Blocks exchange da, gathering it, and hold the rows of w_hh^T that give dh of their own units: the forward's exchange
// and product with another K, and a result that is the same whatever the plan but for the order of K. In a cluster
// this is for layers with a projection; others exchange partial sums of dh there, H numbers of 32 bits for each batch
// row in the place of one for each map and unit of the storage dtype: scatter.h.
//
// Grid and groups: as in forward.h. A block owns 16 * plan.tiles hidden units, a warp a tile of 16 and a part of K,
// which is GH here, for G gates; a lane ends with dh of two units for two batch rows of each column tile. With a
// projection, the first warps of the group own a tile of 16 numbers of h as well, and da_{t+1} @ w_hh is for these.
// Registers: the first K blocks of the warp's weights, dh and dc of the lane's units. Shared memory: further weights,
// da of all units for the rows of the slice, partial sums of split K, what is about to be sent, and for each tile what
// the cell saved, c, dy and dc of three steps, copied asynchronously (backward_inputs.h; in float64, with a projection
// and in chunks, they are loaded before the wait for da). K is in the order of the tiles: 8 units of one map, of the
// next, and on with the next 8 units. Synchronisation: one exchange of da per step inside a group, with a projection
// one of dh as well; and, where K is split, one barrier of the warps of a tile. Limits: as in forward.h, with da, which
// is G times h. In chunks there is none here either: in a step, the tiles take turns to send dh, where there is a
// projection, to get da and send it, and to get dh from da.
#pragma once

#include "backward_inputs.h"
#include "exchange.h"
#include "extras.h"
#include "geometry.h"
#include "tile_loop.h"

namespace fusedrnn::cuda {

// C: of cell.h. kColumnTiles: plan.rows / 8.
template <Math kMath, class C, class Channel, int kColumnTiles, bool kProjected>
class Backward {
 public:
  using M = Arithmetic<kMath>;
  using S = typename M::Storage;
  using A = typename M::Compute;

  static FUSEDRNN_DEVICE void run(const BackwardParams& p, char* shared) {
    const SharedLayout layout = shared_layout(spec_of<C>(), kPass, p.sizes, p.plan);
    Role role(p.plan);
    Backward(p, role, shared, layout).run(shared, layout);
  }

 private:
  static constexpr Pass kPass = Pass::kBackward;
  static constexpr int kSegments = 2;
  static constexpr int kUnits = tile_units(kPass);
  static_assert(kUnits == kTileOutputs && kUnits == 8 * kSegments);  // a lane's units and numbers of h have one index
  static constexpr int kRows = kColumnTiles * kMmaN;
  static constexpr CellSpec kCell = C::kSpec;
  static constexpr int kMaps = kCell.maps, kSaved = kCell.saved;
  static constexpr int kOfState = kCell.recurrent.begin,
                       kRecurrentMaps = width(kCell.recurrent);  // maps that are multiplied with w_hh
  static constexpr bool kCarries = kCell.carry != Carry::kNone, kHasCellState = has_cell_state(kCell);
  static_assert(kSaved <= kMaps);
  static constexpr bool kVariant = is_variant(kCell);
  using Extra = CellExtras<M, C, BackwardParams, kProjected>;
  // Whether a lane holds values that are the same at all steps of a row in registers; else it loads them at each use.
  static constexpr bool kKeepsRows = !(kVariant && kProjected) || Extra::kKeeps;
  static constexpr int kStepBytes = step_bytes(kCell, kPass, kMath);
  template <Stage kStage>
  using Multiplier = WarpProduct<M, kSegments, kColumnTiles,
                                 register_blocks(kCell, Channel::kExchange, kPass, kStage, kMath, kRows, kProjected),
                                 Channel::kIsChunked, kProjected ? 1 : 2>;
  using Recurrent = Multiplier<Stage::kRecurrent>;
  using Projection = Multiplier<Stage::kProjection>;
  // Whether a step's inputs are prefetched, and da is stored 16 bytes at a time.
  static constexpr bool kInRuns = moves_in_runs(Channel::kExchange, kMath, kProjected);
  // Bytes of a tile's row of da: those that are exchanged, and all.
  static constexpr int kChunkBytes = kUnits * kRecurrentMaps * static_cast<int>(sizeof(S));
  static constexpr int kStagedRow = staged_bytes(kCell, kMath, kUnits);
  using Staged = StagedGradients<M, C, kUnits, kChunkBytes>;
  using Inputs = BackwardInputs<M, C, kUnits, kMmaN, kWarp>;
  using Stores = GradientStores<M, Staged, kUnits, kMmaN, kWarp>;
  // Zero where the step does not exist, and then so is da.
  struct Numbers {
    A a[kMaps], c, c_in, dy, dc;
  };
  using Results = A[kColumnTiles][kSegments][2];
  static constexpr int kFirstDh = kColumnTiles * kSegments * 2;
  using Loop = TileLoop<A, state_numbers(kPass, kRows, kProjected)>;

  FUSEDRNN_DEVICE Backward(const BackwardParams& p, Role& role, char* shared, const SharedLayout& layout)
      : p_(p),
        role_(role),
        da_channel_(channel(p, role, Stage::kRecurrent, shared, layout)),
        dh_channel_(channel(p, role, Stage::kProjection, shared, layout)),
        staging_(reinterpret_cast<S*>(shared + layout.staging + role.warp * layout.warp_staging)),
        steps_(shared + layout.steps + role.local_tile * kColumnTiles * kStepBytes),
        direction_(p.sizes, p.sequence, role.direction),
        extra_(p, role.direction) {
    take_tile();
    in_units_ = Channel::kIdleWarpsTakePart ? role.rank < blocks_with(unit_tiles(), p.plan) : has_units_;
    in_outputs_ = Channel::kIdleWarpsTakePart ? role.rank < blocks_with(output_tiles(), p.plan) : has_outputs_;
  }

  FUSEDRNN_DEVICE int unit_tiles() const { return static_cast<int>(ceil_div(p_.sizes.H, kUnits)); }
  FUSEDRNN_DEVICE int output_tiles() const { return static_cast<int>(ceil_div(p_.sizes.P, kTileOutputs)); }

  // Makes the tile of the role the one that all of this is about.
  FUSEDRNN_DEVICE void take_tile() {
    first_unit_ = role_.tile * kUnits + role_.lane / 4;
    has_units_ = role_.tile < unit_tiles();
    has_outputs_ = role_.tile < output_tiles();
    if constexpr (!kInRuns) load_peepholes();
  }

  // Does nothing unless the cell is a variant.
  FUSEDRNN_DEVICE void load_peepholes() {
    if constexpr (kVariant && Extra::kKeeps) {
      FUSEDRNN_UNROLL for (int s = 0; s < kSegments; ++s) extra_.load(peepholes_[s], unit_of(s));
    }
  }

  static FUSEDRNN_DEVICE Product product_of(const BackwardParams& p, Stage stage) {
    return product(spec_of<C>(), kPass, stage, p.sizes, kMath, kProjected);
  }
  static FUSEDRNN_DEVICE Channel channel(const BackwardParams& p, const Role& role, Stage stage, char* shared,
                                         const SharedLayout& layout) {
    const int k = static_cast<int>(stage);
    return Channel(spec_of<C>(), role, p.sizes, p.plan, kPass, stage, product_of(p, stage), kRows, p.workspace,
                   shared + layout.operands[k], reinterpret_cast<Mbarrier*>(shared + layout.barriers[k]));
  }

  FUSEDRNN_DEVICE void run(char* shared, const SharedLayout& layout) {
    if constexpr (!Channel::kIsChunked) clear_operands(layout, shared, p_.plan);
    da_channel_.start();
    if constexpr (kProjected) dh_channel_.start();
    Channel::started();
    if (!in_units_) return;
    if constexpr (Channel::kIsChunked) {
      slices_in_turns(shared, layout);
    } else {
      Recurrent recurrent = recurrent_product(shared, layout);
      if constexpr (kProjected) {
        Projection projection = projection_product(shared, layout);
        slices(recurrent, &projection);
      } else {
        slices(recurrent, nullptr);
      }
    }
  }

  // The product of the role's current tile.
  FUSEDRNN_DEVICE Recurrent recurrent_product(char* shared, const SharedLayout& layout) const {
    return Recurrent(role_, p_.plan, product_of(p_, Stage::kRecurrent), p_.w_hh, p_.plan.shared_blocks,
                     shared + layout.weights[0], shared + layout.rings[0], shared + layout.partial[0]);
  }
  FUSEDRNN_DEVICE Projection projection_product(char* shared, const SharedLayout& layout) const {
    return Projection(role_, p_.plan, product_of(p_, Stage::kProjection), p_.w_hr, p_.plan.shared_projection_blocks,
                      shared + layout.weights[1], shared + layout.rings[1], shared + layout.partial[1]);
  }

  // f(b) for the first batch row of every slice of the group.
  template <class F>
  FUSEDRNN_DEVICE void for_each_slice(const F& f) {
    // 32 bits: a 64-bit counter takes one register more, and variants in TF32 spill on sm_100.
    const int slices = static_cast<int>(ceil_div(p_.sizes.B, p_.plan.rows));
    for (int k = role_.first_slice; k < slices; k += p_.plan.groups) f(int64_t{k} * p_.plan.rows);
  }

  FUSEDRNN_DEVICE void slices(Recurrent& recurrent, Projection* projection) {
    for_each_slice([&](int64_t b) {
      start(b);
      if constexpr (kInRuns) {
        start_runs(b);
      } else {
        load(p_.sizes.T - 1);
      }
      FUSEDRNN_NO_UNROLL for (int64_t n = p_.sizes.T - 1; n >= 0; --n) {
        if constexpr (kInRuns) {
          step_in_runs(n);
        } else {
          step(projection, n);
        }
        if (!in_outputs_) continue;
        const char* operand = da_channel_.receive();
        if (!has_outputs_) continue;
        Results z;
        recurrent.multiply(operand, z);
        take(z);
      }
      finish();
      end_copies();
    });
  }

  // From dh to da, which is sent.
  FUSEDRNN_DEVICE void step(Projection* projection, int64_t n) {
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
  }

  // ---- The same of what is copied ahead, each column tile by the warp that owns it.

  // Sets up the copies and stores of a slice, from its last step on.
  FUSEDRNN_DEVICE void start_runs(int64_t first_row) {
    const int64_t unit = has_units_ ? role_.tile * kUnits : p_.sizes.H;
    const int lane = this->lane();
    FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) {
      const int64_t row = role_.owns(n) ? first_row + n * kMmaN : p_.sizes.B;
      inputs_[n].template start<kStepsAhead>(p_, direction_, lane, row, unit, role_.direction == 1, copied(n, 0));
      stores_[n].start(p_, direction_, lane, row, unit, role_.direction == 1);
    }
    if constexpr (!kVariant) load_c0();
    look_at(p_.sizes.T - 1);
    slot_ = 0;
    FUSEDRNN_UNROLL for (int k = 0; k < kStepsAhead; ++k) copy(p_.sizes.T > k, k);
    if constexpr (kVariant) {  // here, where registers are left
      load_c0();
      load_peepholes();
      load_multipliers(p_.sizes.T - 1);
    }
  }
  FUSEDRNN_DEVICE void load_c0() {
    for_each_cell([&](int n, int s, int j) {
      c0_[n][s][j] = 0;
      if (kCarries && p_.c0 != nullptr && is_unit(n, s, j)) {
        c0_[n][s][j] = number(p_.c0, direction_.state(row(n, j), p_.sizes.H) + unit_of(s));
      }
    });
  }
  FUSEDRNN_DEVICE void copy(bool exists, int slot) {
    FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) inputs_[n].copy(exists, copied(n, slot));
  }
  FUSEDRNN_DEVICE char* copied(int n, int slot) const { return steps_ + n * kStepBytes + slot * Inputs::kStep; }

  FUSEDRNN_DEVICE void step_in_runs(int64_t step) {
    wait_copies_but<kColumnTiles>("the thread's copies of the step");
    sync_warp("the step is copied");
    exists_ = exists_next_;
    reset_ = reset_next_;
    const int64_t t = direction_.at(step);
    const int next_slot = slot_ == kStepsAhead - 1 ? 0 : slot_ + 1;
    typename Stores::Quads da[kColumnTiles];
    FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) {
      if (!has_units_ || !role_.owns(n)) continue;
      if (n > 0) sync_warp("the staged results are sent");
      FUSEDRNN_UNROLL for (int j = 0; j < 2; ++j) {
        FUSEDRNN_UNROLL for (int s = 0; s < kSegments; ++s) stage(t, n, s, j, copied(n, slot_), copied(n, next_slot));
      }
      send_staged<kChunkBytes, kStagedRow>(da_channel_, role_, reinterpret_cast<const char*>(staging_), n);
      if constexpr (!M::kRoundsOperands) {
        stores_[n].read(da[n], [&](int row, int byte) {
          return reinterpret_cast<const char*>(staging_) + row * kStagedRow + byte;
        });
      }
    }
    da_channel_.announce();
    if constexpr (!M::kRoundsOperands) {
      FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) {
        if (has_units_ && role_.owns(n)) stores_[n].store(da[n]);
      }
    }
    // The step's own place is free: all lanes had read it at the warp's barrier before the send.
    copy(step >= kStepsAhead, slot_);
    slot_ = next_slot;
    look_at(step - 1);
    if (step > 0) load_multipliers(step - 1);
  }

  // The cell of a unit and a row, from the step to da, which is staged.
  FUSEDRNN_DEVICE void stage(int64_t t, int n, int s, int j, const char* now, const char* before) {
    const int row = role_.lane % 4 * 2 + j, unit = s * kMmaN + role_.lane / 4;
    const auto copied = [&](const char* from, int array) { return Inputs::number(from, row, array, unit); };
    A a[kMaps];
    FUSEDRNN_UNROLL for (int k = 0; k < kMaps; ++k) a[k] = k < kSaved ? copied(now, k) : A(0);
    const bool exists = exists_(n, j) && unit_of(s) < p_.sizes.H, is_reset = reset_(n, j);
    const A last = Inputs::carry(before, row, unit),
            entered = direction_.is_first(t, length(n, j)) ? c0_[n][s][j] : last;
    A dm = dh_[n][s][j] + copied(now, Inputs::kDy), dc = dc_[n][s][j] + Inputs::dcarry(now, row, unit);
    pass_dh(n, s, j, exists, dm);
    backward_cell(n, s, j, a, is_reset ? A(0) : entered, Inputs::carry(now, row, unit), dm, dc);
    if constexpr (kCarries) dc_[n][s][j] = !exists ? dc_[n][s][j] : is_reset ? A(0) : dc;
    // The staged gradients may be rounded to the operand's precision; then the exact ones are stored here.
    S* exact = M::kRoundsOperands && is_unit(n, s, j)
                   ? static_cast<S*>(p_.da) + direction_.step(t, this->row(n, j), kMaps * p_.sizes.H) + unit_of(s)
                   : nullptr;
    char* staged = reinterpret_cast<char*>(staging_) + row * kStagedRow;
    FUSEDRNN_UNROLL for (int map = 0; map < kMaps; ++map) {
      const A da = exists ? a[map] : A(0);
      *reinterpret_cast<S*>(staged + Staged::byte_of(map, s, role_.lane / 4)) = M::operand(da);
      if (M::kRoundsOperands && exact != nullptr) exact[map * p_.sizes.H] = to_storage<S>(da);
    }
  }

  FUSEDRNN_DEVICE A backward_cell([[maybe_unused]] int n, [[maybe_unused]] int s, [[maybe_unused]] int j, A (&a)[kMaps],
                                  A c_in, A c, A dm, A& dc) const {
    using Math = typename M::BackwardMath;
    if constexpr (kVariant) {
      typename Extra::Peepholes p, dp;  // the gradients are computed after the launch
      extra_.take(p, peepholes_[s], unit_of(s));
      const auto operands = extra_.operands(p, multipliers_[n][s][j]);
      return C::template backward<Math>(p_.plan.cell, a, c_in, c, dm, dc, operands, dp);
    } else {
      return C::template backward<Math>(p_.plan.cell, a, c_in, c, dm, dc);
    }
  }
  // Variants: holds the gradient that bypasses the cell in dh_, until dh of the step before arrives.
  FUSEDRNN_DEVICE void pass_dh(int n, int s, int j, bool exists, A& dm) {
    if constexpr (kVariant && !kProjected) {
      const A passed = extra_.passed(multipliers_[n][s][j], dm);
      dm -= passed;
      if (exists) dh_[n][s][j] = passed;
    }
  }

  // All slices, where a warp computes several tiles in turn.
  FUSEDRNN_DEVICE void slices_in_turns(char* shared, const SharedLayout& layout) {
    Loop loop(spec_of<C>(), p_.sizes, p_.plan, kPass, p_.workspace);
    const auto in_turns = [&](int64_t tiles, const auto& f) {
      loop.for_each(tiles, role_, [&] {
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
        Recurrent recurrent = recurrent_product(shared, layout);
        Results z;
        recurrent.multiply_part(da_channel_, z);
        recurrent.add_parts(z);
        load_state(loop, b);
        look_at(n);
        load_multipliers(n);
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
              save_dh(loop);
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
              Projection projection = projection_product(shared, layout);
              projection.multiply_part(dh_channel_, dm);
              projection.add_parts(dm);
            }
            if (first) {
              start(b);
            } else {
              load_state(loop, b);
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
          save_dc(loop);
          if constexpr (!kProjected) save_dh(loop);
        });
        if (!last) da_channel_.announce();
      }
    });
  }

  // Clears what does not pass from one turn to the next, so that it takes no registers in between.
  FUSEDRNN_DEVICE void forget() {
    exists_ = reset_ = exists_next_ = reset_next_ = ColumnMask();
    FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) {
      lengths_[n][0] = lengths_[n][1] = 0;
      FUSEDRNN_UNROLL for (int s = 0; s < kSegments; ++s) {
        FUSEDRNN_UNROLL for (int j = 0; j < 2; ++j) {
          loaded_[n][s][j] = {};
          dh_[n][s][j] = dc_[n][s][j] = 0;
          if constexpr (kVariant) {
            multipliers_[n][s][j] = {};
            of_state_[n][s][j] = 0;
          }
        }
      }
    }
  }

  // Saves the gradients of a tile's state between its turns; load_state() loads them.
  FUSEDRNN_DEVICE void save_dc(const Loop& loop) {
    for_each_cell([&](int n, int s, int j) { loop[(n * kSegments + s) * 2 + j] = dc_[n][s][j]; });
  }
  FUSEDRNN_DEVICE void save_dh(const Loop& loop) {
    for_each_cell([&](int n, int s, int j) { loop[kFirstDh + (n * kSegments + s) * 2 + j] = dh_[n][s][j]; });
  }
  FUSEDRNN_DEVICE void load_state(const Loop& loop, int64_t first_row) {
    find_rows(first_row);
    for_each_cell([&](int n, int s, int j) {
      dc_[n][s][j] = loop[(n * kSegments + s) * 2 + j];
      dh_[n][s][j] = loop[kFirstDh + (n * kSegments + s) * 2 + j];
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

  FUSEDRNN_DEVICE int unit_of(int s) const { return first_unit_ + s * kMmaN; }
  FUSEDRNN_DEVICE int64_t row(int n, int j) const { return first_row_ + n * kMmaN + j; }
  FUSEDRNN_DEVICE bool is_unit(int n, int s, int j) const { return unit_of(s) < p_.sizes.H && row(n, j) < p_.sizes.B; }
  // Whether the row and the element of h exist.
  FUSEDRNN_DEVICE bool is_output(int n, int s, int j) const {
    return unit_of(s) < p_.sizes.P && row(n, j) < p_.sizes.B;
  }
  static FUSEDRNN_DEVICE A number(const void* from, int64_t at) { return to_compute(static_cast<const S*>(from)[at]); }
  FUSEDRNN_DEVICE void start(int64_t first_row) {
    find_rows(first_row);
    for_each_cell([&](int n, int s, int j) {
      const int64_t b = row(n, j);
      dh_[n][s][j] = dc_[n][s][j] = 0;
      if (p_.dhn != nullptr && is_output(n, s, j)) {
        dh_[n][s][j] = number(p_.dhn, direction_.state(b, p_.sizes.P) + unit_of(s));
      }
      if (kHasCellState && p_.dcn != nullptr && is_unit(n, s, j)) {
        dc_[n][s][j] = number(p_.dcn, direction_.state(b, p_.sizes.H) + unit_of(s));
      }
    });
  }

  // Variants have no registers for values that depend on the lane alone: `fresh` has them computed again.
  FUSEDRNN_DEVICE int lane() const { return kVariant ? static_cast<int>(fresh(role_.lane)) & (kWarp - 1) : role_.lane; }

  FUSEDRNN_DEVICE void find_rows(int64_t first_row) {
    first_row_ = first_row + lane() % 4 * 2;
    if constexpr (!kKeepsRows) return;
    for_each_column([&](int n, int j) { lengths_[n][j] = direction_.length(row(n, j)); });
    if constexpr (kVariant && kProjected) {
      for_each_cell([&](int n, int s, int j) {
        of_state_[n][s][j] = extra_.of_state(is_output(n, s, j), row(n, j), unit_of(s));
      });
    }
  }

  // The multiplier of a number of h in the recurrent product, of a variant.
  FUSEDRNN_DEVICE A of_state(int n, int s, int j) const {
    if constexpr (!kProjected) return extra_.of_state(multipliers_[n][s][j]);
    if constexpr (Extra::kKeeps) return of_state_[n][s][j];
    return extra_.of_state(is_output(n, s, j), row(n, j), unit_of(s));
  }
  // Loads the multipliers of the n-th step, of a variant.
  FUSEDRNN_DEVICE void load_multipliers([[maybe_unused]] int64_t step) {
    if constexpr (kVariant) {
      if (!extra_.has_noise()) return;
      const int64_t first = extra_.place(direction_.at(step), first_row_, first_unit_);
      for_each_cell([&](int n, int s, int j) {
        extra_.load(multipliers_[n][s][j], is_unit(n, s, j),
                    first + (n * kMmaN + j) * extra_.to_next_row() + s * kMmaN);
      });
    }
  }

  FUSEDRNN_DEVICE int length(int n, int j) const {
    if constexpr (kKeepsRows) return lengths_[n][j];
    return direction_.length(row(n, j));
  }

  // Marks the lane's columns that exist in the n-th step, and those whose entering state was reset.
  FUSEDRNN_DEVICE void look_at(int64_t step) {
    const int64_t t = direction_.at(step);
    for_each_column([&](int n, int j) {
      exists_next_.set(n, j, Direction::exists(t, length(n, j)));
      reset_next_.set(n, j, exists_next_(n, j) && direction_.is_reset(t, row(n, j)));
    });
  }

  // Loads what the n-th step needs and no other block computes.
  FUSEDRNN_DEVICE void load(int64_t step) {
    const int64_t t = direction_.at(step), H = p_.sizes.H;
    look_at(step);
    if (step >= 0) load_multipliers(step);
    for_each_cell([&](int n, int s, int j) {
      Numbers& loaded = loaded_[n][s][j];
      loaded = {};
      if (!is_unit(n, s, j) || !exists_next_(n, j)) return;
      const int64_t b = row(n, j), saved = direction_.step(t, b, kSaved * H) + unit_of(s);
      FUSEDRNN_UNROLL for (int k = 0; k < kSaved; ++k) loaded.a[k] = number(p_.saved, saved + k * H);
      if constexpr (kCarries) loaded.c = number(p_.c, direction_.offset(p_.c_strides, t, b) + unit_of(s));
      if (kCarries && !reset_next_(n, j)) {
        if (!direction_.is_first(t, length(n, j))) {
          loaded.c_in = number(p_.c, direction_.offset(p_.c_strides, direction_.before(t), b) + unit_of(s));
        } else if (p_.c0 != nullptr) {
          loaded.c_in = number(p_.c0, direction_.state(b, H) + unit_of(s));
        }
      }
      if (p_.dy != nullptr && is_output(n, s, j)) {
        loaded.dy = number(p_.dy, direction_.offset(p_.dy_strides, t, b) + unit_of(s));
      }
      if (kHasCellState && p_.dc != nullptr)
        loaded.dc = number(p_.dc, direction_.offset(p_.dc_strides, t, b) + unit_of(s));
    });
  }

  // The first exchange and product of a step: from dh to dm.
  FUSEDRNN_DEVICE void project(Projection& projection, int64_t step, Results& dm) {
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
      static_cast<S*>(p_.dh_out)[direction_.step(t, row(n, j), p_.sizes.P) + unit_of(s)] = to_storage<S>(dh(n, s, j));
    });
  }

  // From dh to dm, without a projection.
  FUSEDRNN_DEVICE void add_dy(Results& dm) {
    for_each_cell([&](int n, int s, int j) { dm[n][s][j] = dh_[n][s][j] + loaded_[n][s][j].dy; });
  }

  // From the product with da to dh of the state that entered the step.
  FUSEDRNN_DEVICE void take(const Results& z) {
    for_each_cell([&](int n, int s, int j) {
      A dh = z[n][s][j];
      if constexpr (kVariant) dh *= of_state(n, s, j);
      if constexpr (kVariant && !kProjected) dh += dh_[n][s][j];
      if (exists_(n, j)) dh_[n][s][j] = reset_(n, j) ? A(0) : dh;
    });
  }

  FUSEDRNN_DEVICE void next_step() {
    exists_ = exists_next_;
    reset_ = reset_next_;
  }

  // From dm and dc to da, in the place of what was saved, and dc of the step before; and m, in the place of c.
  FUSEDRNN_DEVICE void cells(const Results& of_m) {
    for_each_cell([&](int n, int s, int j) {
      Numbers& loaded = loaded_[n][s][j];
      if (!exists_(n, j)) return;
      A dc = dc_[n][s][j] + loaded.dc, dm = of_m[n][s][j];
      pass_dh(n, s, j, true, dm);
      loaded.c = backward_cell(n, s, j, loaded.a, loaded.c_in, loaded.c, dm, dc);
      if constexpr (kCarries) dc_[n][s][j] = reset_(n, j) ? A(0) : dc;
    });
  }

  FUSEDRNN_DEVICE void send_da() {
    send<kUnits * kRecurrentMaps>(da_channel_, has_units_, [&](int n, int j, int k) {
      return loaded_[n][k / kRecurrentMaps][j].a[kOfState + k % kRecurrentMaps];
    });
  }

  // Sends value(n, j, k), which is number 8 k + lane / 4 of kChunk, of the column tiles that the warp owns.
  template <int kChunk, class F>
  FUSEDRNN_DEVICE void send(Channel& channel, bool has_values, const F& value) {
    FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) {
      if (!has_values || !role_.owns(n)) continue;
      if (Channel::kIsChunked || n > 0) sync_warp("the staged results are sent");
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
      S* to = static_cast<S*>(p_.da) + direction_.step(t, row(n, j), kMaps * H) + unit_of(s);
      FUSEDRNN_UNROLL for (int map = 0; map < kMaps; ++map) to[map * H] = to_storage<S>(loaded_[n][s][j].a[map]);
      if constexpr (kProjected) {
        static_cast<S*>(p_.m)[direction_.step(t, row(n, j), H) + unit_of(s)] = to_storage<S>(loaded_[n][s][j].c);
      }
    });
  }

  FUSEDRNN_DEVICE void finish() {
    for_each_cell([&](int n, int s, int j) {
      const int64_t b = row(n, j);
      if (p_.dh0 != nullptr && is_output(n, s, j)) {
        static_cast<S*>(p_.dh0)[direction_.state(b, p_.sizes.P) + unit_of(s)] =
            to_storage<S>(kCarries && !kHasCellState ? dh_[n][s][j] + dc_[n][s][j] : dh_[n][s][j]);
      }
      if (kHasCellState && p_.dc0 != nullptr && is_unit(n, s, j)) {
        static_cast<S*>(p_.dc0)[direction_.state(b, p_.sizes.H) + unit_of(s)] = to_storage<S>(dc_[n][s][j]);
      }
    });
  }

  const BackwardParams& p_;
  Role& role_;
  Channel da_channel_, dh_channel_;  // the second one only with a projection
  S* staging_;
  char* steps_;  // [column tile] of kStepsAhead steps
  const Direction direction_;
  const Extra extra_;  // of a variant
  int first_unit_;
  // Whether the warp has a tile of units, and of numbers of h; and whether the thread takes part in receiving dh, and
  // da.
  bool has_units_, has_outputs_, in_units_, in_outputs_;
  int64_t first_row_;  // batch row of the first column
  int lengths_[kColumnTiles][2];
  // Whether the last step exists and whether its state was reset; the same for the next step.
  ColumnMask exists_, reset_, exists_next_, reset_next_;
  A dh_[kColumnTiles][kSegments][2];  // gradients of the state that leaves it
  A dc_[kColumnTiles][kSegments][2];
  Numbers loaded_[kColumnTiles][kSegments][2];
  // Variants: multipliers of the next step and, with a projection, those of h in the product with w_hh.
  typename Extra::Peepholes peepholes_[kSegments];
  typename Extra::Multipliers multipliers_[kColumnTiles][kSegments][2];
  A of_state_[kColumnTiles][kSegments][2];
  Inputs inputs_[kInRuns ? kColumnTiles : 1];
  Stores stores_[kInRuns ? kColumnTiles : 1];
  A c0_[kColumnTiles][kSegments][2];
  int slot_ = 0;  // of the step that comes
};

}  // namespace fusedrnn::cuda
