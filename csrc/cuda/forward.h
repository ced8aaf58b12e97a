// Forward of one layer, both directions: one launch over the whole sequence.
//
//   a_t from xg_t and h_{t-1} @ w_hh^T     m_t, the new carry from a_t and the carry     h_t = m_t  or  m_t @ w_hr^T
//
// Each map a that the cell reads (csrc/cells) has a part of xg, of the product with w_hh, or both. A map with no part
// of xg has b_hh. xg_t = x_t @ w_ih^T + b_ih + b_hh is given, without b_hh of those; or x is, and the launch
// does that product as well. It does not depend on h, and comes before the wait for it: its sums take the place of what
// would have been loaded.
//
// h_t is rounded to the storage dtype before it is fed back; so is m_t where it is an operand of w_hr.
//
// Grid: D * plan.groups groups of plan.blocks blocks. A group owns a direction and every plan.groups-th slice of
// plan.rows batch rows; groups never wait for each other.
// A block owns 8 * plan.tiles hidden units: all maps of them, so that the cell needs no exchange. A warp owns a tile of
// 8 units and one of plan.splits parts of K; a lane ends with the maps of one unit for two batch rows of each column
// tile. With a projection, the first warps of the group own a tile of 16 outputs as well.
// Registers: the first K blocks of the warp's weights, the carry and h of the lane's units (for the whole sequence,
// the carry in the compute dtype). Shared memory: further weights, h_{t-1} of all units for the rows of the slice, x of
// this step and the next (inputs.h), partial sums of split K, what is about to be sent, and for each tile xg of three
// steps, copied asynchronously two steps ahead, or the biases, and the outputs of a step, which are stored 16 bytes at
// a time (runs.h; in float64, with a projection and in chunks, xg is loaded before the wait for h and outputs are
// stored one by one). Synchronisation: one exchange of h per step inside a group (exchange.h), with a projection one of
// m as well; and, where K is split, one barrier of the warps of a tile, and one of the block's for x. The outputs of a
// step are stored after the exchange has begun. Limits: 8 or 16 batch rows in a slice; h of all units for these rows
// fits into shared memory, once (kGrid) or twice (kCluster), and with a projection m, and every tile has a warp. In
// chunks there is neither limit: x, h and m come to shared memory in chunks, and the tiles of a warp take turns
// (tile_loop.h), all of them once for the product with h and, with a projection, again for that with m. Then no weights
// stay on the chip, the carry and h of a tile are loaded and stored in its turn, and xg is loaded before the product.
#pragma once

#include <type_traits>

#include "exchange.h"
#include "extras.h"
#include "geometry.h"
#include "inputs.h"
#include "runs.h"
#include "tile_loop.h"

namespace fusedrnn::cuda {

// C: of cell.h. kColumnTiles: plan.rows / 8.
template <Math kMath, class C, class Channel, int kColumnTiles, bool kProjected>
class Forward {
 public:
  using M = Arithmetic<kMath>;
  using S = typename M::Storage;
  using A = typename M::Compute;

  static FUSEDRNN_DEVICE void run(const ForwardParams& p, char* shared) {
    const SharedLayout layout = shared_layout(spec_of<C>(), kPass, p.sizes, p.plan);
    Role role(p.plan);
    Forward(p, role, shared, layout).run(shared, layout);
  }

 private:
  static constexpr Pass kPass = Pass::kForward;
  static constexpr int kUnits = tile_units(kPass);
  static constexpr int kOutputs = kProjected ? 2 : 1;  // numbers of h that a lane owns in each of its columns
  static constexpr int kRows = kColumnTiles * kMmaN;
  static constexpr CellSpec kCell = C::kSpec;
  static constexpr int kGates = kCell.gates, kMaps = kCell.maps, kSaved = kCell.saved;
  // Maps of the product with w_ih, and of that with w_hh.
  static constexpr int kOfInput = kCell.input.begin, kOfInputEnd = kCell.input.end;
  static constexpr int kOfState = kCell.recurrent.begin, kOfStateEnd = kCell.recurrent.end;
  static constexpr bool kCarries = kCell.carry != Carry::kNone, kHasCellState = has_cell_state(kCell);
  static_assert(kSaved <= kMaps);
  static constexpr bool kVariant = is_variant(kCell);
  using Extra = CellExtras<M, C, ForwardParams, kProjected>;
  template <Stage kStage>
  using Multiplier = WarpProduct<M, segments(kCell, kPass, kStage), kColumnTiles,
                                 register_blocks(kCell, Channel::kExchange, kPass, kStage, kMath, kRows, kProjected),
                                 Channel::kIsChunked, kProjected ? 1 : 2, summed_segments(kCell, kPass, kStage)>;
  using Recurrent = Multiplier<Stage::kRecurrent>;
  using Projection = Multiplier<Stage::kProjection>;
  using Input = Multiplier<Stage::kInput>;
  using Maps = A[kColumnTiles][kMaps][2];  // of every column tile, those of the lane's unit in its columns
  using Outputs = typename Projection::Results;
  static constexpr int kFirstH = kColumnTiles * 2;
  using Loop = TileLoop<A, state_numbers(kPass, kRows, kProjected)>;
  // Whether xg is copied, and the outputs are stored, 16 bytes at a time.
  static constexpr bool kInRuns = moves_in_runs(Channel::kExchange, kMath, kProjected);
  static constexpr int kXgRow = xg_row(kCell, kMath), kXgStep = kMmaN * kXgRow;
  static constexpr int kStoredRow = stored_row(kCell, kMath), kStepBytes = step_bytes(kCell, kPass, kMath);
  // Quads of a tile of 8 units and 8 rows: of xg in the compute dtype, and of what is stored; and for each lane.
  static constexpr int kXgRuns = kInRuns ? runs_of_lane(kGates * static_cast<int>(sizeof(A)) / 2) : 1;
  static constexpr int kStoredQuads = sizeof(S) / 2;     // of an array of 8 units
  static constexpr int kStates = kHasCellState ? 2 : 1;  // arrays of c, and of y
  static constexpr int kSavedRuns = runs_of_lane(kSaved * kStoredQuads);
  static constexpr int kStoreRuns = kInRuns ? kSavedRuns + runs_of_lane(kStates * kStoredQuads) : 1;
  using X = std::conditional_t<Channel::kIsChunked, ChunkedInputs<M, C, kRows>, Inputs<M, C, kRows>>;

  FUSEDRNN_DEVICE Forward(const ForwardParams& p, Role& role, char* shared, const SharedLayout& layout)
      : p_(p),
        role_(role),
        h_channel_(channel(p, role, Stage::kRecurrent, shared, layout)),
        m_channel_(channel(p, role, Stage::kProjection, shared, layout)),
        staging_(reinterpret_cast<S*>(shared + layout.staging + role.warp * layout.warp_staging)),
        is_plain_(kept(p.sequence.lengths == nullptr && p.sequence.reset == nullptr ? 1 : 0) != 0),
        steps_(shared + layout.steps + role.local_tile * kColumnTiles * kStepBytes),
        direction_(p.sizes, p.sequence, role.direction),
        extra_(p, role.direction),
        x_(p, role, shared + layout.operands[static_cast<int>(Stage::kInput)]) {
    take_tile();
    in_units_ = Channel::kIdleWarpsTakePart ? role.rank < blocks_with(unit_tiles(), p.plan) : has_units_;
    in_outputs_ = !kProjected                   ? in_units_
                  : Channel::kIdleWarpsTakePart ? role.rank < blocks_with(output_tiles(), p.plan)
                                                : has_outputs_;
  }

  FUSEDRNN_DEVICE int64_t unit_tiles() const { return ceil_div(p_.sizes.H, kUnits); }
  FUSEDRNN_DEVICE int64_t output_tiles() const {
    return kProjected ? ceil_div(p_.sizes.P, kTileOutputs) : unit_tiles();
  }

  // Switches to the role's current tile.
  FUSEDRNN_DEVICE void take_tile() {
    unit_ = role_.tile * kUnits + role_.lane / 4;
    has_units_ = role_.tile < unit_tiles();
    has_outputs_ = role_.tile < output_tiles();
    if constexpr (kVariant) {
      if constexpr (Extra::kKeeps) extra_.load(peepholes_, unit_);
    }
  }

  static FUSEDRNN_DEVICE Product product_of(const ForwardParams& p, Stage stage) {
    if (stage == Stage::kInput && p.plan.fuse_input == 0) return {};
    return product(spec_of<C>(), kPass, stage, p.sizes, kMath, kProjected);
  }
  static FUSEDRNN_DEVICE Channel channel(const ForwardParams& p, const Role& role, Stage stage, char* shared,
                                         const SharedLayout& layout) {
    const int k = static_cast<int>(stage);
    return Channel(spec_of<C>(), role, p.sizes, p.plan, kPass, stage, product_of(p, stage), kRows, p.workspace,
                   shared + layout.operands[k], reinterpret_cast<Mbarrier*>(shared + layout.barriers[k]));
  }

  FUSEDRNN_DEVICE void run(char* shared, const SharedLayout& layout) {
    if constexpr (!Channel::kIsChunked) clear_operands(layout, shared, p_.plan);
    h_channel_.start();
    if constexpr (kProjected) m_channel_.start();
    Channel::started();
    if (!in_units_) return;
    if constexpr (Channel::kIsChunked) {
      slices_in_turns(shared, layout);
    } else {
      Recurrent recurrent = recurrent_product(shared, layout);
      Input input = input_product(shared, layout);
      if constexpr (kProjected) {
        Projection projection = projection_product(shared, layout);
        slices(input, recurrent, &projection);
      } else {
        slices(input, recurrent, nullptr);
      }
    }
  }

  // The products of the role's current tile.
  FUSEDRNN_DEVICE Recurrent recurrent_product(char* shared, const SharedLayout& layout) const {
    return Recurrent(role_, p_.plan, product_of(p_, Stage::kRecurrent), p_.w_hh, p_.plan.shared_blocks,
                     shared + layout.weights[0], shared + layout.rings[0], shared + layout.partial[0]);
  }
  FUSEDRNN_DEVICE Projection projection_product(char* shared, const SharedLayout& layout) const {
    return Projection(role_, p_.plan, product_of(p_, Stage::kProjection), p_.w_hr, p_.plan.shared_projection_blocks,
                      shared + layout.weights[1], shared + layout.rings[1], shared + layout.partial[1]);
  }

  FUSEDRNN_DEVICE Input input_product(char* shared, const SharedLayout& layout) const {
    return Input(role_, p_.plan, product_of(p_, Stage::kInput), p_.w_ih, p_.plan.shared_input_blocks,
                 shared + layout.weights[2], shared + layout.rings[2], shared + layout.partial[2]);
  }

  // f(b) for the first batch row of every slice of the group.
  template <class F>
  FUSEDRNN_DEVICE void for_each_slice(const F& f) {
    for (int64_t b = static_cast<int64_t>(role_.first_slice) * p_.plan.rows; b < p_.sizes.B;
         b += static_cast<int64_t>(p_.plan.groups) * p_.plan.rows) {
      f(b);
    }
  }

  FUSEDRNN_DEVICE void slices(Input& input, Recurrent& recurrent, Projection* projection) {
    const int T = kept(static_cast<int>(p_.sizes.T));
    for_each_slice([&](int64_t b) {
      start(b);
      send_h();
      announce_h();
      if (takes_x()) x_.copy(direction_.at(0), b);
      if constexpr (kInRuns) {
        start_runs(b);
        look_at(0);
        if (is_plain_) reset_next_ = ColumnMask();
      } else {
        load(0);
      }
      FUSEDRNN_NO_UNROLL for (int n = 0; n < T; ++n) {
        Maps a;
        if constexpr (kInRuns) take_xg();
        if (takes_x()) {
          const char* x = x_.receive();
          if (n + 1 < T) x_.copy(direction_.at(n + 1), b);
          input.multiply_part(x, a);
          add_input(a);
        }
        const char* h = h_channel_.receive();
        if (has_units_) {
          recurrent.multiply_part(h, a);
          add_xg(a);
          recurrent.add_parts(a);
          cells(a);
        }
        if constexpr (kProjected) project(*projection);
        reset_ = reset_next_;
        if (n + 1 < T) {
          send_h();
          announce_h();
          if constexpr (kInRuns) load_multipliers();  // which are there by the end of the stores
        }
        if constexpr (kInRuns) {
          store_step(a);
          copy_xg(n + 2 < T, next_slot(xg_slot_));
          if (!is_plain_) look_at(n + 1);
        } else {
          store_h(direction_.at(n));
          store_cells(direction_.at(n), a);
          if (n + 1 < T) load(n + 1);
        }
      }
      finish();
      end_copies();
    });
  }

  // All slices, where a warp computes several tiles in turn. With a projection a step loops over them twice: for m,
  // then for h.
  FUSEDRNN_DEVICE void slices_in_turns(char* shared, const SharedLayout& layout) {
    const int64_t T = p_.sizes.T;
    Loop loop(spec_of<C>(), p_.sizes, p_.plan, kPass, p_.workspace);
    const auto in_turns = [&](int64_t tiles, const auto& f) {
      loop.for_each(tiles, role_, [&] {
        take_tile();
        f();
      });
    };
    for_each_slice([&](int64_t b) {
      in_turns(unit_tiles(), [&] {
        start(b);
        send_h();
        save_state(loop);
      });
      announce_h();
      FUSEDRNN_NO_UNROLL for (int64_t n = 0; n < T; ++n) {
        in_turns(unit_tiles(), [&] {
          load_state(loop, b, n);
          load(n);
          Maps a;
          if (fuses_input()) {
            x_.take(direction_.at(n), b);
            input_product(shared, layout).multiply_part(x_, a);
            add_input(a);
          }
          if (loop.is_first()) h_channel_.await();
          Recurrent recurrent = recurrent_product(shared, layout);
          recurrent.multiply_part(h_channel_, a);
          add_xg(a);
          recurrent.add_parts(a);
          cells(a);
          if constexpr (kProjected) {
            send_m();
          } else {
            next(n);
          }
          store_cells(direction_.at(n), a);
          save_state(loop);
        });
        if constexpr (kProjected) {
          m_channel_.announce();
          if (!in_outputs_) continue;
          m_channel_.await();
          in_turns(output_tiles(), [&] {
            load_state(loop, b, n);
            look_at(n);
            Projection projection = projection_product(shared, layout);
            Outputs z;
            projection.multiply_part(m_channel_, z);
            projection.add_parts(z);
            take(z);
            next(n);
            save_state(loop);
          });
        }
        if (n + 1 < T) announce_h();
      }
      in_turns(unit_tiles(), [&] {
        load_state(loop, b, T - 1);
        finish();
      });
    });
  }

  // ---- xg, copied ahead, and the outputs of a step, 16 bytes at a time.

  // Sets up the copies and stores of a slice, from its first step on.
  FUSEDRNN_DEVICE void start_runs(int64_t first_row) {
    const int64_t H = p_.sizes.H, t = direction_.at(0), forwards = role_.direction == 1 ? -1 : 1;
    // Variants have no registers for values that depend on the lane alone: `fresh` has them computed again.
    const int lane = kVariant ? static_cast<int>(fresh(role_.lane)) & (kWarp - 1) : role_.lane;
    FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) {
      const bool mine = has_units_ && role_.owns(n);
      const int64_t row = first_row + n * kMmaN, unit = int64_t{role_.tile} * kUnits;
      const auto run = [&](const void* base, int bytes, int64_t at, int64_t step, int64_t b, int64_t u) {
        const bool exists = mine && base != nullptr && b < p_.sizes.B;
        return Run(static_cast<const char*>(base) + (at + u) * bytes, forwards * step * bytes,
                   exists ? (H - u) * bytes : 0);
      };
      const int bytes = p_.xg_wide != 0 ? sizeof(A) : sizeof(S), quads = bytes / 2;  // of an array of 8 units
      FUSEDRNN_UNROLL for (int m = 0; m < kXgRuns; ++m) {
        const int q = lane + m * kWarp, array = q / quads % kGates;
        const int64_t b = row + q / quads / kGates;
        const bool exists = !fuses_input() && q / quads < kGates * kMmaN;
        xg_runs_[n][m] = run(exists ? p_.xg : nullptr, bytes, direction_.offset(p_.xg_strides, t, b) + array * H,
                             p_.xg_strides.t, b, unit + q % quads * (16 / bytes));
        xg_to_[m] = kept(q / (quads * kGates) * kXgRow + q % (quads * kGates) * static_cast<int>(sizeof(Quad)));
      }
      FUSEDRNN_UNROLL for (int m = 0; m < kStoreRuns; ++m) {
        const Stored q = stored(m);
        const int64_t b = row + q.row;
        const bool is_saved = q.array < kSaved, is_c = kHasCellState && q.array == kSaved;
        const Strides& strides = is_c ? p_.c_strides : p_.y_strides;
        const void* base = is_saved ? p_.saved : is_c ? p_.c : p_.y;
        stores_[n][m] =
            run(q.row < kMmaN ? base : nullptr, sizeof(S),
                is_saved ? direction_.step(t, b, kSaved * H) + q.array * H : direction_.offset(strides, t, b),
                is_saved ? p_.sizes.B * kSaved * H : strides.t, b, unit + q.unit);
      }
    }
    load_state_biases();
    ragged_ = false;
    FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) {
      FUSEDRNN_UNROLL for (int m = 0; m < kXgRuns; ++m) ragged_ |= xg_runs_[n][m].is_ragged();
      FUSEDRNN_UNROLL for (int m = 0; m < kStoreRuns; ++m) ragged_ |= stores_[n][m].is_ragged();
    }
    if (fuses_input()) {
      keep_biases();
      return;
    }
    xg_slot_ = 0;
    copy_xg(true, 0);
    copy_xg(p_.sizes.T > 1, 1);
  }

  // The m-th quad of the outputs of a step that the lane stores: of what is saved, and behind that of c and y. In row 8
  // or later there is none.
  struct Stored {
    int row, array, unit;
  };
  FUSEDRNN_DEVICE Stored stored(int m) const {
    const bool is_saved = m < kSavedRuns;
    const int arrays = is_saved ? kSaved : kStates, q = role_.lane + (is_saved ? m : m - kSavedRuns) * kWarp;
    return {q / (kStoredQuads * arrays), (is_saved ? 0 : kSaved) + q / kStoredQuads % arrays,
            q % kStoredQuads * (8 / kStoredQuads)};
  }

  static FUSEDRNN_DEVICE int next_slot(int slot) { return slot == kStepsAhead - 1 ? 0 : slot + 1; }
  FUSEDRNN_DEVICE char* xg_of(int n, int slot) const { return steps_ + n * kStepBytes + slot * kXgStep; }

  // Begins to copy xg of the next step that was not copied, if there is one.
  FUSEDRNN_DEVICE void copy_xg(bool exists, int slot) {
    static_assert(kStepsAhead == 3);
    if (fuses_input()) return;
    if (exists) ragged_ ? copy_xg<true>(slot) : copy_xg<false>(slot);
    commit_copies();
  }

  template <bool kRagged>
  FUSEDRNN_DEVICE void copy_xg(int slot) {
    FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) {
      FUSEDRNN_UNROLL for (int m = 0; m < kXgRuns; ++m) {
        xg_runs_[n][m].template copy<kRagged>(xg_of(n, slot) + xg_to_[m]);
      }
    }
  }

  // Reads xg of the step that comes, or the biases; zeros in column tiles that another warp owns.
  FUSEDRNN_DEVICE void take_xg() {
    FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) {
      FUSEDRNN_UNROLL for (int v = 0; v < 2 * kMaps; ++v) xg_[n][v / 2][v % 2] = 0;
    }
    if (fuses_input()) {
      for_each_column(
          [&](int n, int j) { FUSEDRNN_UNROLL for (int map = 0; map < kMaps; ++map) xg_[n][map][j] = biases(n)[map]; });
      return;
    }
    for_each_column([&](int n, int j) {
      FUSEDRNN_UNROLL for (int map = 0; map < kMaps; ++map) {
        if (!is_of_input(map)) xg_[n][map][j] = state_biases_[map];
      }
    });
    wait_copies_but<1>("the thread's copies of xg");
    sync_warp("xg of the warp's tile is copied");
    if (p_.xg_wide != 0) {
      read_xg<A>();
    } else {
      read_xg<S>();
    }
    xg_slot_ = next_slot(xg_slot_);
  }
  template <class Number>
  FUSEDRNN_DEVICE void read_xg() {
    for_each_column([&](int n, int j) {
      const auto* from = reinterpret_cast<const Number*>(xg_of(n, xg_slot_) + (role_.lane % 4 * 2 + j) * kXgRow);
      FUSEDRNN_UNROLL for (int map = 0; map < kMaps; ++map) {
        if (is_of_input(map)) xg_[n][map][j] = to_compute(from[gate_of_input(map) * 8 + role_.lane / 4]);
      }
    });
  }

  // The biases are kept in shared memory in the place of xg; each lane has its own copy.
  FUSEDRNN_DEVICE A* biases(int n) const { return reinterpret_cast<A*>(xg_of(n, 0)) + role_.lane * kMaps; }
  FUSEDRNN_DEVICE void keep_biases() {
    for_each_column([&](int n, int) {
      FUSEDRNN_UNROLL for (int map = 0; map < kMaps; ++map) {
        biases(n)[map] = unit_ < p_.sizes.H ? bias_of(map) : A(0);
      }
    });
  }

  // Stores the outputs of a step.
  FUSEDRNN_DEVICE void store_step(const Maps& saved) {
    FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) {
      if (!has_units_ || !role_.owns(n)) continue;
      char* staged = xg_of(n, kStepsAhead);
      FUSEDRNN_UNROLL for (int j = 0; j < 2; ++j) {
        const bool exists = exists_(n, j);
        S* to = reinterpret_cast<S*>(staged + (role_.lane % 4 * 2 + j) * kStoredRow) + role_.lane / 4;
        FUSEDRNN_UNROLL for (int k = 0; k < kSaved; ++k) to[k * 8] = to_storage<S>(exists ? saved[n][k][j] : A(0));
        if constexpr (kHasCellState) to[kSaved * 8] = to_storage<S>(exists ? carry_[n][j] : A(0));
        to[(kSaved + kStates - 1) * 8] = to_storage<S>(exists ? h_[n][0][j] : A(0));
      }
      sync_warp("the outputs of the step are staged");
      Quad quads[kStoreRuns];
      FUSEDRNN_UNROLL for (int m = 0; m < kStoreRuns; ++m) {
        const Stored q = this->stored(m);
        quads[m] = Quad{{0, 0, 0, 0}};
        if (q.row >= kMmaN) continue;
        quads[m] = *reinterpret_cast<const Quad*>(staged + q.row * kStoredRow +
                                                  (q.array * 8 + q.unit) * static_cast<int>(sizeof(S)));
      }
      ragged_ ? store<true>(stores_[n], quads) : store<false>(stores_[n], quads);
    }
  }

  template <bool kRagged>
  FUSEDRNN_DEVICE void store(Run (&runs)[kStoreRuns], const Quad (&quads)[kStoreRuns]) {
    FUSEDRNN_UNROLL for (int m = 0; m < kStoreRuns; ++m) runs[m].template store<kRagged>(quads[m]);
  }

  // Sends h to the next step, and stores that of the n-th.
  FUSEDRNN_DEVICE void next(int64_t n) {
    reset_ = reset_next_;
    if (n + 1 < p_.sizes.T) send_h();
    store_h(direction_.at(n));
  }

  // Saves the state of a tile between its turns; load_state() loads it before the n-th step.
  FUSEDRNN_DEVICE void save_state(const Loop& loop) {
    for_each_column([&](int n, int j) { loop[2 * n + j] = carry_[n][j]; });
    for_each_output([&](int n, int j, int k) { loop[kFirstH + (n * kOutputs + k) * 2 + j] = h_[n][k][j]; });
  }
  FUSEDRNN_DEVICE void load_state(const Loop& loop, int64_t first_row, int64_t step) {
    find_rows(first_row);
    reset_ = resets(step);
    for_each_column([&](int n, int j) { carry_[n][j] = loop[2 * n + j]; });
    for_each_output([&](int n, int j, int k) { h_[n][k][j] = loop[kFirstH + (n * kOutputs + k) * 2 + j]; });
  }

  // f(n, j) for every column tile n that the warp owns and each of the lane's two columns j in it.
  template <class F>
  FUSEDRNN_DEVICE void for_each_column(const F& f) const {
    FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) {
      if (!role_.owns(n)) continue;
      FUSEDRNN_UNROLL for (int j = 0; j < 2; ++j) f(n, j);
    }
  }
  // f(n, j, k) for each of these, and each of the lane's numbers of h.
  template <class F>
  FUSEDRNN_DEVICE void for_each_output(const F& f) const {
    for_each_column([&](int n, int j) { FUSEDRNN_UNROLL for (int k = 0; k < kOutputs; ++k) f(n, j, k); });
  }

  // Whether the warp has a product with w_ih.
  FUSEDRNN_DEVICE bool takes_x() const { return fuses_input() && has_units_; }
  FUSEDRNN_DEVICE bool fuses_input() const { return p_.plan.fuse_input != 0; }

  // The batch row of a column, and the index in h of one of the lane's numbers of it.
  FUSEDRNN_DEVICE int64_t row(int n, int j) const { return first_row_ + n * kMmaN + j; }
  FUSEDRNN_DEVICE int output(int k) const {
    return kProjected ? role_.tile * kTileOutputs + k * 8 + role_.lane / 4 : unit_;
  }
  FUSEDRNN_DEVICE bool is_unit(int n, int j) const { return unit_ < p_.sizes.H && row(n, j) < p_.sizes.B; }
  FUSEDRNN_DEVICE bool is_output(int n, int j, int k) const { return output(k) < p_.sizes.P && row(n, j) < p_.sizes.B; }

  // The state before the first step. A lane that has a number of h that exists has a unit that does.
  FUSEDRNN_DEVICE void start(int64_t first_row) {
    find_rows(first_row);
    reset_ = resets(0);
    for_each_column([&](int n, int j) {
      carry_[n][j] = 0;
      if (kCarries && p_.c0 != nullptr && is_unit(n, j)) {
        carry_[n][j] = to_compute(static_cast<const S*>(p_.c0)[direction_.state(row(n, j), p_.sizes.H) + unit_]);
      }
    });
    for_each_output([&](int n, int j, int k) {
      h_[n][k][j] = 0;
      if (p_.h0 != nullptr && is_output(n, j, k)) {
        h_[n][k][j] = to_compute(static_cast<const S*>(p_.h0)[direction_.state(row(n, j), p_.sizes.P) + output(k)]);
      }
    });
    if constexpr (kInRuns) {
      find_multipliers();
      load_multipliers();
    } else {
      load_multipliers(0);
    }
  }

  FUSEDRNN_DEVICE void find_rows(int64_t first_row) {
    first_row_ = first_row + role_.lane % 4 * 2;
    for_each_column([&](int n, int j) { lengths_[n][j] = unit_ < p_.sizes.H ? direction_.length(row(n, j)) : 0; });
    if constexpr (kVariant && kProjected && Extra::kKeeps) {
      for_each_output(
          [&](int n, int j, int k) { of_state_[n][k][j] = extra_.of_state(is_output(n, j, k), row(n, j), output(k)); });
    }
  }

  // The multiplier of a number of h in the recurrent product, of a variant.
  FUSEDRNN_DEVICE A of_state(int n, int j, int k) const {
    if constexpr (!kProjected) return extra_.of_state(multipliers_[n][j]);
    if constexpr (Extra::kKeeps) return of_state_[n][k][j];
    return extra_.of_state(is_output(n, j, k), row(n, j), output(k));
  }
  // The multipliers of a variant. In runs: finds those of the first step, and loads those of the step that comes. Of
  // rows and units that do not exist they are those of others, and not used: so that no load has a condition.
  FUSEDRNN_DEVICE void find_multipliers() {
    if constexpr (kVariant) {
      const auto existing = [&](int n, int j) { return row(n, j) < p_.sizes.B ? row(n, j) : p_.sizes.B - 1; };
      const int64_t first = existing(0, 0);
      multipliers_at_ = extra_.place_of_nearest(direction_.at(0), first, unit_);
      for_each_column([&](int n, int j) {
        to_multipliers_[n][j] = static_cast<int>(existing(n, j) - first) * extra_.to_next_row();
      });
      multipliers_step_ = kept(role_.direction == 1 ? -extra_.to_next_step() : extra_.to_next_step());
    }
  }
  FUSEDRNN_DEVICE void load_multipliers() {
    if constexpr (kVariant) {
      for_each_column([&](int n, int j) {
        extra_.load(multipliers_[n][j], n + j == 0 ? multipliers_at_ : multipliers_at_ + to_multipliers_[n][j]);
      });
      multipliers_at_ += multipliers_step_;
    }
  }
  // Elsewhere: loads those of the n-th step.
  FUSEDRNN_DEVICE void load_multipliers([[maybe_unused]] int64_t step) {
    if constexpr (kVariant) {
      if (!extra_.has_noise()) return;
      const int64_t first = extra_.place(direction_.at(step), first_row_, unit_);
      for_each_column([&](int n, int j) {
        extra_.load(multipliers_[n][j], is_unit(n, j), first + (n * kMmaN + j) * extra_.to_next_row());
      });
    }
  }

  // Whether the state that enters the n-th step is reset to zero.
  FUSEDRNN_DEVICE ColumnMask resets(int64_t step) const {
    const int64_t t = direction_.at(step);
    ColumnMask mask;
    for_each_column([&](int n, int j) {
      mask.set(n, j, Direction::exists(t, lengths_[n][j]) && direction_.is_reset(t, row(n, j)));
    });
    return mask;
  }

  // Marks the lane's columns that exist in the n-th step, and those that are reset before the next.
  FUSEDRNN_DEVICE void look_at(int64_t step) {
    for_each_column([&](int n, int j) { exists_.set(n, j, Direction::exists(direction_.at(step), lengths_[n][j])); });
    reset_next_ = resets(step + 1);
  }

  // Loads what the n-th step needs and no other block computes.
  FUSEDRNN_DEVICE void load(int64_t step) {
    const int64_t t = direction_.at(step);
    look_at(step);
    load_multipliers(step);
    FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) {
      FUSEDRNN_UNROLL for (int v = 0; v < 2 * kMaps; ++v) xg_[n][v / 2][v % 2] = 0;
    }
    for_each_column([&](int n, int j) {
      if (!exists_(n, j) || fuses_input()) return;
      const int64_t at = direction_.offset(p_.xg_strides, t, row(n, j)) + unit_;
      FUSEDRNN_UNROLL for (int map = 0; map < kMaps; ++map) {
        if (!is_of_input(map)) {
          xg_[n][map][j] = bias_of(map);
          continue;
        }
        const int64_t k = at + gate_of_input(map) * p_.sizes.H;
        xg_[n][map][j] =
            p_.xg_wide != 0 ? static_cast<const A*>(p_.xg)[k] : to_compute(static_cast<const S*>(p_.xg)[k]);
      }
    });
    if (fuses_input()) load_biases();
  }

  // The biases, to which the products are added where xg is not given.
  FUSEDRNN_DEVICE void load_biases() {
    if (unit_ >= p_.sizes.H) return;
    FUSEDRNN_UNROLL for (int map = 0; map < kMaps; ++map) {
      const A sum = bias_of(map);
      for_each_column([&](int n, int j) { xg_[n][map][j] = sum; });
    }
  }
  // Biases of the maps that have no part of xg.
  FUSEDRNN_DEVICE void load_state_biases() {
    FUSEDRNN_UNROLL for (int map = 0; map < kMaps; ++map) {
      if (!is_of_input(map)) state_biases_[map] = unit_ < p_.sizes.H ? bias_of(map) : A(0);
    }
  }
  // The biases of a map of the lane's unit, which exists.
  FUSEDRNN_DEVICE A bias_of(int map) const {
    const A of_input = is_of_input(map) ? bias(p_.b_ih, gate_of_input(map)) : A(0);
    return is_of_state(map) ? of_input + bias(p_.b_hh, gate_of_state(map)) : of_input;
  }
  static FUSEDRNN_DEVICE bool is_of_input(int map) { return map >= kOfInput && map < kOfInputEnd; }
  static FUSEDRNN_DEVICE bool is_of_state(int map) { return map >= kOfState && map < kOfStateEnd; }
  // The block of rows of w_ih, and of w_hh, that a map has: a constant where the map is one.
  static FUSEDRNN_DEVICE int gate_of_input(int map) {
    constexpr CellSpec cell = spec_of<C>();
    return cell.input.gates[map - kOfInput];
  }
  static FUSEDRNN_DEVICE int gate_of_state(int map) {
    constexpr CellSpec cell = spec_of<C>();
    return cell.recurrent.gates[map - kOfState];
  }
  FUSEDRNN_DEVICE A bias(const void* const (&b)[2], int gate) const {
    const S* of = static_cast<const S*>(b[role_.direction]);
    return of == nullptr ? A(0) : to_compute(of[gate * p_.sizes.H + unit_]);
  }

  // Adds the product with w_ih, which is the first of z, to xg.
  FUSEDRNN_DEVICE void add_input(const Maps& z) {
    FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) {
      FUSEDRNN_UNROLL for (int v = 0; v < 2 * (kOfInputEnd - kOfInput); ++v) {
        xg_[n][kOfInput + v / 2][v % 2] += z[n][v / 2][v % 2];
      }
    }
  }
  // a: the product with w_hh, which is the first of it, on entry, the maps on exit.
  FUSEDRNN_DEVICE void add_xg(Maps& a) const {
    FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) {
      FUSEDRNN_UNROLL for (int v = 2 * kMaps - 1; v >= 0; --v) {
        const int map = v / 2, j = v % 2;
        a[n][map][j] =
            is_of_state(map) ? a[n][is_of_state(map) ? map - kOfState : 0][j] + xg_[n][map][j] : xg_[n][map][j];
      }
    }
  }

  // a: the maps on entry, what is saved on exit.
  FUSEDRNN_DEVICE void cells(Maps& a) {
    for_each_column([&](int n, int j) {
      A maps[1][kMaps], carry[1] = {reset_(n, j) ? A(0) : carry_[n][j]}, m[1];
      FUSEDRNN_UNROLL for (int k = 0; k < kMaps; ++k) maps[0][k] = a[n][k][j];
      if constexpr (kVariant) {
        typename Extra::Peepholes p;
        extra_.take(p, peepholes_, unit_);
        const auto operands = extra_.operands(p, multipliers_[n][j]);
        C::template forward<typename M::ForwardMath, 1>(p_.plan.cell, maps, carry, m, operands);
        if constexpr (!kProjected) m[0] = extra_.zoned_out(multipliers_[n][j], reset_(n, j) ? A(0) : h_[n][0][j], m[0]);
      } else {
        C::template forward<typename M::ForwardMath, 1>(p_.plan.cell, maps, carry, m);
      }
      if constexpr (kCarries) carry_[n][j] = exists_(n, j) ? carry[0] : carry_[n][j];
      if constexpr (kProjected) {
        m_[n][j] = exists_(n, j) ? m[0] : A(0);  // nor is there a unit: its zero weights would make NaN of an infinity
      } else {
        take(n, j, 0, m[0]);
      }
      FUSEDRNN_UNROLL for (int k = 0; k < kMaps; ++k) a[n][k][j] = maps[0][k];
    });
  }

  // h of the step that is being computed.
  FUSEDRNN_DEVICE void take(int n, int j, int k, A h) {
    h_[n][k][j] = exists_(n, j) ? to_compute(to_storage<S>(h)) : h_[n][k][j];
  }

  // The second exchange and product of a step, from m to h.
  FUSEDRNN_DEVICE void project(Projection& projection) {
    send_m();
    m_channel_.announce();
    if (!in_outputs_) return;
    const char* operand = m_channel_.receive();
    if (!has_outputs_) return;
    Outputs z;
    projection.multiply(operand, z);
    take(z);
  }
  FUSEDRNN_DEVICE void send_m() {
    send<kUnits>(m_channel_, has_units_, [&](int n, int j, int) { return m_[n][j]; });
  }
  FUSEDRNN_DEVICE void take(const Outputs& z) {
    for_each_output([&](int n, int j, int k) { take(n, j, k, z[n][k][j]); });
  }

  // Sends the state that enters the step that comes.
  FUSEDRNN_DEVICE void send_h() {
    send<kOutputs * 8>(h_channel_, has_outputs_, [&](int n, int j, int k) {
      const A h = reset_(n, j) ? A(0) : h_[n][k][j];
      if constexpr (kVariant) return h * of_state(n, j, k);
      return h;
    });
  }
  FUSEDRNN_DEVICE void announce_h() {
    if (in_outputs_) h_channel_.announce();
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

  FUSEDRNN_DEVICE void store_h(int64_t t) {
    for_each_output([&](int n, int j, int k) {
      if (!is_output(n, j, k)) return;
      static_cast<S*>(p_.y)[direction_.offset(p_.y_strides, t, row(n, j)) + output(k)] =
          to_storage<S>(exists_(n, j) ? h_[n][k][j] : A(0));
    });
  }

  FUSEDRNN_DEVICE void store_cells(int64_t t, const Maps& saved) {
    const int64_t H = p_.sizes.H;
    for_each_column([&](int n, int j) {
      if (!is_unit(n, j)) return;
      const int64_t b = row(n, j);
      const bool exists = exists_(n, j);
      if (kHasCellState && p_.c != nullptr) {
        static_cast<S*>(p_.c)[direction_.offset(p_.c_strides, t, b) + unit_] =
            to_storage<S>(exists ? carry_[n][j] : A(0));
      }
      if (p_.saved == nullptr) return;
      S* to = static_cast<S*>(p_.saved) + direction_.step(t, b, kSaved * H) + unit_;
      FUSEDRNN_UNROLL for (int k = 0; k < kSaved; ++k) to[k * H] = to_storage<S>(exists ? saved[n][k][j] : A(0));
    });
  }

  FUSEDRNN_DEVICE void finish() {
    for_each_output([&](int n, int j, int k) {
      if (!is_output(n, j, k)) return;
      static_cast<S*>(p_.hn)[direction_.state(row(n, j), p_.sizes.P) + output(k)] = to_storage<S>(h_[n][k][j]);
    });
    if constexpr (kHasCellState) {
      for_each_column([&](int n, int j) {
        if (!is_unit(n, j)) return;
        static_cast<S*>(p_.cn)[direction_.state(row(n, j), p_.sizes.H) + unit_] = to_storage<S>(carry_[n][j]);
      });
    }
  }

  const ForwardParams& p_;
  Role& role_;
  Channel h_channel_, m_channel_;  // the second one only with a projection
  S* staging_;
  const bool is_plain_;  // whether all steps exist, and no state is reset
  char* steps_;          // [column tile] of kStepsAhead steps of xg, and of the outputs of a step
  const Direction direction_;
  const Extra extra_;  // of a variant
  X x_;                // only where the launch takes it
  int unit_;
  // Whether the warp has a tile of units, and of outputs; and whether the thread takes part in receiving h, and m.
  bool has_units_, has_outputs_, in_units_, in_outputs_;
  int64_t first_row_;  // batch row of the first column
  // For each of the lane's columns: the sequence's length and, for its unit or its elements of h, the state.
  int lengths_[kColumnTiles][2];
  A h_[kColumnTiles][kOutputs][2], carry_[kColumnTiles][2];  // the state
  // All maps of the next step: xg, or the biases plus x @ w_ih^T. Zero in column tiles that another warp owns, except
  // for this warp's part of that product.
  Maps xg_;
  A state_biases_[kMaps];  // of maps that have no part of xg
  Run xg_runs_[kInRuns ? kColumnTiles : 1][kXgRuns], stores_[kInRuns ? kColumnTiles : 1][kStoreRuns];
  int xg_to_[kXgRuns];   // where in a step of xg what is copied goes
  int xg_slot_ = 0;      // of the step that comes
  bool ragged_ = false;  // whether any of these is
  A m_[kColumnTiles][2];
  // Variants: multipliers of the next step and, with a projection, those of h in the product with w_hh.
  typename Extra::Peepholes peepholes_;
  typename Extra::Multipliers multipliers_[kColumnTiles][2];
  int64_t multipliers_at_;               // of the step that comes and the lane's first column
  int to_multipliers_[kColumnTiles][2];  // from there to those of each column
  int multipliers_step_;                 // and to the next step
  A of_state_[kColumnTiles][kOutputs][2];
  ColumnMask exists_;              // whether that step does
  ColumnMask reset_, reset_next_;  // whether the state that enters it, or the next, is zero
};

}  // namespace fusedrnn::cuda
