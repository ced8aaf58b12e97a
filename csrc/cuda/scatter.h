// Backward of one layer in clusters that exchange partial sums of dh: backward.h's recurrence, without a projection.
//
//   da_t, dc_{t-1} from dh_t + dy_t, dc_t, what the cell saved and c: csrc/cells
//   dh_{t-1} = sum over blocks of da_t @ w_hh
//
// A block owns 16 * plan.tiles hidden units. It multiplies da of its own units, which no other block needs, with its
// own rows of w_hh, and has a part of the sum for dh of every unit; each block is sent the parts of its units, H
// numbers of the compute dtype for a batch row in the place of the GH of the storage dtype that gathering da of G gates
// takes.
//
// Grid and groups: as in forward.h. The warps of a block take turns with the tiles of 16 units of dh, all of K = da of
// the block each, and share out the cells, one or a few to a thread. Registers: weights of the first tiles, dh and dc
// of the thread's cells. Shared memory: weights of further tiles; da of the block, twice; the parts of dh from every
// block, twice; and what the cell saved, c, dy and dc of four steps, copied asynchronously, 16 bytes at a time.
// Synchronisation, with steps counted over all slices of the launch:
//
//   cells from dh      da is staged, the only barrier      product, its results pushed      dh of the next step
//   received
//
// A buffer of parts is used again two steps later. Who pushes into it has received all of the step between, to which
// every warp here has pushed, or with which it has passed the barrier, after it had read that buffer. da is staged in
// the buffer of two steps before, which all threads have read before the barrier between. Step n's copies take the
// place of those of step n + 4, whose cells are before the barrier of that step. Limits: no projection; 1 to 4 tiles,
// in float64 and in TF32 with 16 rows 1 or 2; a cluster of at least two blocks.
#pragma once

#include "backward_inputs.h"
#include "extras.h"
#include "geometry.h"
#include "product.h"
#include "stream.h"

namespace fusedrnn::cuda {

// C: of cell.h. kTiles: plan.tiles.
template <Math kMath, class C, int kColumnTiles, int kTiles>
class ScatterTiles {
 public:
  FUSEDRNN_DEVICE ScatterTiles(const BackwardParams& p, char* shared)
      : p_(p),
        role_(p.plan),
        direction_(p.sizes, p.sequence, role_.direction),
        extra_(p, role_.direction),
        thread_(thread_index()),
        first_unit_(role_.rank * kUnits),
        all_tiles_(static_cast<int>(ceil_div(p.sizes.H, 16))),
        senders_(static_cast<int>(ceil_div(all_tiles_, kTiles))),
        first_output_(kept((role_.rank * kTiles + role_.warp) % all_tiles_)),
        has_resets_(kept(p.sequence.reset != nullptr ? 1 : 0) != 0),
        stream_(shared + shared_layout(spec_of<C>(), Pass::kBackward, p.sizes, p.plan).rings[0] +
                    role_.warp * kStreamSlots * kFragment * static_cast<int>(sizeof(Quad)),
                role_.lane) {
    const SharedLayout layout = shared_layout(spec_of<C>(), Pass::kBackward, p.sizes, p.plan);
    weights_ = reinterpret_cast<Quad*>(shared + layout.weights[0]) + role_.warp * p.plan.shared_blocks * kFragment;
    staged_ = shared + layout.operands[0];
    chunks_ = reinterpret_cast<A*>(shared + layout.partial[0]);
    copies_ = shared + layout.staging;
    barriers_ = reinterpret_cast<Mbarrier*>(shared + layout.barriers[0]);
    if constexpr (kVariant) {
      FUSEDRNN_UNROLL for (int k = 0; k < kCells; ++k) {
        if constexpr (Extra::kKeeps) extra_.load(peepholes_[k], first_unit_ + cell(k).unit);
      }
    }
  }

  FUSEDRNN_DEVICE void run() {
    // Parts that are not sent, of blocks without units, are zeros in every sum.
    for (int k = thread_; k < 2 * p_.plan.blocks * kNumbers; k += kThreads) chunks_[k] = 0;
    if constexpr (kHasGap) {
      constexpr int kQuads = 2 * kStaged / static_cast<int>(sizeof(Quad));
      for (int k = thread_; k < kQuads; k += kThreads) reinterpret_cast<Quad*>(staged_)[k] = Quad{{0, 0, 0, 0}};
    }
    if (thread_ == 0) {
      init_mbarrier(barriers_, 1);
      init_mbarrier(barriers_ + 1, 1);
    }
    sync_cluster("the barriers of the cluster are ready");
    if (role_.rank >= senders_) return;
    load_weights();
    for (int64_t b = static_cast<int64_t>(role_.first_slice) * kRows; b < p_.sizes.B;
         b += static_cast<int64_t>(p_.plan.groups) * kRows) {
      slice(b);
      end_copies();
    }
  }

 private:
  using M = Arithmetic<kMath>;
  using S = typename M::Storage;
  using A = typename M::Compute;
  using Unit = typename M::Unit;
  static constexpr int kSegments = 2, kRows = kColumnTiles * kMmaN, kUnits = 16 * kTiles;
  static constexpr int kWarps = kTiles * scatter_splits(kTiles), kThreads = kWarps * kWarp;
  static constexpr int kNumbers = kUnits * kRows;  // of dh, that the block owns
  static constexpr int kCells = kNumbers / kThreads;
  static_assert(kNumbers % kThreads == 0 && (kStepsCopied & (kStepsCopied - 1)) == 0);
  static constexpr CellSpec kCell = C::kSpec;
  static constexpr int kMaps = kCell.maps, kSaved = kCell.saved;
  static constexpr bool kCarries = kCell.carry != Carry::kNone, kHasCellState = has_cell_state(kCell);
  static_assert(kSaved <= kMaps);
  static constexpr bool kVariant = is_variant(kCell);
  using Extra = CellExtras<M, C, BackwardParams, false>;
  static constexpr int kK = scatter_blocks(kCell, kMath, kTiles);  // K blocks of the product
  static constexpr int kOfTile = scatter_blocks(kCell, kMath, 1);
  // Whether da ends within the last of them.
  static constexpr bool kHasGap = kUnits * width(kCell.recurrent) * storage_bytes(kMath) % kBlockBytes != 0;
  static constexpr int kFragment = kSegments * kWarp;  // quads of one
  static constexpr int kInRegisters = scatter_outputs_in_registers(kCell, kMath, kRows, kTiles);
  static constexpr int kStagedRow = row_stride(scatter_staged_blocks(kCell, kMath, kTiles)),
                       kStaged = kRows * kStagedRow;
  // Whether there can be tiles of dh whose weights are not in registers.
  static constexpr bool kOthers = kMostBlocks * kTiles > kInRegisters* kWarps;
  using Staged = StagedGradients<M, C, kUnits, kK * kBlockBytes>;
  using Inputs = BackwardInputs<M, C, kUnits, kRows, kThreads>;
  using Stores = GradientStores<M, Staged, kUnits, kRows, kThreads>;
  template <int kChains>
  using Accumulator = typename Unit::template Accumulator<kSegments, kChains>;
  using Fragment = Quad[kSegments];

  // Numbers of dh are in the order in which the lanes of a product hold them: [tile][column tile][lane][segment][2].
  struct Cell {
    int unit, row;  // of the block, of the slice
  };
  FUSEDRNN_DEVICE Cell cell(int k) const {
    const int number = thread_ + k * kThreads, lane = number / 4 % kWarp, tile = number / 128;
    return {tile / kColumnTiles * 16 + number / 2 % 2 * 8 + lane / 4,
            tile % kColumnTiles * kMmaN + lane % 4 * 2 + number % 2};
  }

  FUSEDRNN_DEVICE void slice(int64_t first_row) {
    start(first_row);
    FUSEDRNN_UNROLL for (int k = 0; k < kStepsCopied; ++k) copy(p_.sizes.T - 1 - k);
    wait_copies_but<kStepsCopied - 2>("the thread's copies of the first steps");
    sync_block("the first steps are copied");
    FUSEDRNN_NO_UNROLL for (int64_t n = p_.sizes.T - 1; n >= 0; --n) {
      cells(n);
      wait_copies_but<1>("the thread's copies of the step that comes");
      sync_block("da is staged");
      typename Stores::Quads da;
      if constexpr (!M::kRoundsOperands)
        stores_.read(da, [&](int row, int byte) { return staged() + staged_at(row, byte); });
      multiply();
      ++sent_;
      if constexpr (!M::kRoundsOperands) stores_.store(da);
      copy(n - kStepsCopied);
      look_at(n - 1);
      if (n > 0) load_multipliers(n - 1);
      receive();
    }
    finish();
  }

  // ------------------------------------------------------------------------------------------------ a slice

  FUSEDRNN_DEVICE void start(int64_t first_row) {
    first_row_ = first_row;
    const int64_t H = p_.sizes.H, last = direction_.at(p_.sizes.T - 1);
    FUSEDRNN_UNROLL for (int k = 0; k < kCells; ++k) {
      const Cell c = cell(k);
      const int64_t b = first_row + c.row, at = direction_.state(b, H) + first_unit_ + c.unit;
      const bool is_there = b < p_.sizes.B && first_unit_ + c.unit < H;
      lengths_[k] = is_there ? direction_.length(b) : 0;
      dh_[k] = is_there && p_.dhn != nullptr ? number(p_.dhn, at) : A(0);
      dc_[k] = kHasCellState && is_there && p_.dcn != nullptr ? number(p_.dcn, at) : A(0);
      c0_[k] = kCarries && is_there && p_.c0 != nullptr ? number(p_.c0, at) : A(0);
    }
    look_at(p_.sizes.T - 1);
    load_multipliers(p_.sizes.T - 1);
    const int64_t backwards = role_.direction == 1 ? 1 : -1;  // from a step to the next that is computed
    // Variants have no registers for values that depend on the thread alone: `fresh` has them computed again.
    // (nvcc 13.0 crashes for sm_100 if the compiler is told the range of the thread again.)
    const int thread = kVariant ? static_cast<int>(fresh(thread_)) : thread_;
    inputs_.template start<kStepsCopied>(p_, direction_, thread, first_row, first_unit_, role_.direction == 1, copies_);
    stores_.start(p_, direction_, thread, first_row, first_unit_, role_.direction == 1);
    exact_step_ = direction_.step(last, 0, kMaps * H);
    exact_stride_ = backwards * p_.sizes.B * kMaps * H;
  }

  static FUSEDRNN_DEVICE A number(const void* from, int64_t at) { return to_compute(static_cast<const S*>(from)[at]); }
  FUSEDRNN_DEVICE void finish() {
    FUSEDRNN_UNROLL for (int k = 0; k < kCells; ++k) {
      const Cell c = cell(k);
      const int64_t b = first_row_ + c.row, unit = first_unit_ + c.unit;
      if (b >= p_.sizes.B || unit >= p_.sizes.H) continue;
      const int64_t at = direction_.state(b, p_.sizes.H) + unit;
      const A dh = kCarries && !kHasCellState ? dh_[k] + dc_[k] : dh_[k];
      if (p_.dh0 != nullptr) static_cast<S*>(p_.dh0)[at] = to_storage<S>(dh);
      if (kHasCellState && p_.dc0 != nullptr) static_cast<S*>(p_.dc0)[at] = to_storage<S>(dc_[k]);
    }
  }

  // ------------------------------------------------------------------------------------------------ a step

  // Begins to copy what the n-th step needs, and goes on to the step before; none where n is negative.
  FUSEDRNN_DEVICE void copy(int64_t n) { inputs_.copy(n >= 0, step(n)); }
  FUSEDRNN_DEVICE char* step(int64_t n) const {
    return copies_ + static_cast<int>(n & (kStepsCopied - 1)) * Inputs::kStep;
  }

  // Marks the thread's cells whose entering state in the n-th step is reset.
  FUSEDRNN_DEVICE void look_at(int64_t n) {
    reset_next_ = 0;
    if (!has_resets_) return;
    const int64_t t = direction_.at(n);
    FUSEDRNN_UNROLL for (int k = 0; k < kCells; ++k) {
      if (!Direction::exists(t, lengths_[k])) continue;
      if (direction_.is_reset(t, first_row_ + cell(k).row)) reset_next_ |= 1u << k;
    }
  }

  // Loads the multipliers of the n-th step, of a variant.
  FUSEDRNN_DEVICE void load_multipliers([[maybe_unused]] int64_t n) {
    if constexpr (kVariant) {
      if (!extra_.has_noise()) return;
      const int64_t first = extra_.place(direction_.at(n), first_row_, first_unit_);
      FUSEDRNN_UNROLL for (int k = 0; k < kCells; ++k) {
        const Cell c = cell(k);
        const bool is_there = first_row_ + c.row < p_.sizes.B && first_unit_ + c.unit < p_.sizes.H;
        extra_.load(multipliers_[k], is_there, first + c.row * extra_.to_next_row() + c.unit);
      }
    }
  }

  // dh: the gradient of h_t.
  FUSEDRNN_DEVICE void backward_cell(int k, [[maybe_unused]] bool exists, A (&a)[kMaps], A c_in, A c, A dh, A& dc) {
    using Math = typename M::BackwardMath;
    if constexpr (kVariant) {
      typename Extra::Peepholes p, dp;  // the gradients are computed after the launch
      extra_.take(p, peepholes_[k], first_unit_ + cell(k).unit);
      // dh_ holds the gradient that bypasses the cell until dh of the step before arrives.
      const A passed = extra_.passed(multipliers_[k], dh);
      if (exists) dh_[k] = passed;
      const auto operands = extra_.operands(p, multipliers_[k]);
      C::template backward<Math>(p_.plan.cell, a, c_in, c, dh - passed, dc, operands, dp);
    } else {
      C::template backward<Math>(p_.plan.cell, a, c_in, c, dh, dc);
    }
  }

  // Offset of a byte of a staged row of da. Every two rows have the quads of a K block in another order, against bank
  // conflicts: the lanes of a warp write the same gate of eight rows, 16 banks apart.
  static FUSEDRNN_DEVICE int staged_at(int row, int byte) {
    return row * kStagedRow + (uses_matrix_unit(kMath) ? byte ^ row / 2 % 4 * static_cast<int>(sizeof(Quad)) : byte);
  }

  // From dh and dc to da, which is staged, and dc of the step before.
  FUSEDRNN_DEVICE void cells(int64_t n) {
    const int64_t t = direction_.at(n);
    const char *now = step(n), *before = step(n - 1);
    char* staged = this->staged();
    exists_ = 0;
    reset_ = reset_next_;
    FUSEDRNN_UNROLL for (int k = 0; k < kCells; ++k) {
      const Cell c = cell(k);
      const auto copied = [&](const char* step, int array) { return Inputs::number(step, c.row, array, c.unit); };
      A a[kMaps];
      FUSEDRNN_UNROLL for (int i = 0; i < kMaps; ++i) a[i] = i < kSaved ? copied(now, i) : A(0);
      const bool exists = Direction::exists(t, lengths_[k]), is_reset = (reset_ >> k & 1) != 0;
      const A last = Inputs::carry(before, c.row, c.unit),
              entered = direction_.is_first(t, lengths_[k]) ? c0_[k] : last;
      A dc = dc_[k] + Inputs::dcarry(now, c.row, c.unit);
      backward_cell(k, exists, a, is_reset ? A(0) : entered, Inputs::carry(now, c.row, c.unit),
                    dh_[k] + copied(now, Inputs::kDy), dc);
      if (exists) exists_ |= 1u << k;
      if constexpr (kCarries) dc_[k] = !exists ? dc_[k] : is_reset ? A(0) : dc;
      // The staged gradients may be rounded to the operand's precision; then the exact ones are stored here.
      const int64_t row = first_row_ + c.row, H = p_.sizes.H;
      S* exact = M::kRoundsOperands && row < p_.sizes.B && first_unit_ + c.unit < H
                     ? static_cast<S*>(p_.da) + exact_step_ + row * kMaps * H + first_unit_ + c.unit
                     : nullptr;
      FUSEDRNN_UNROLL for (int map = 0; map < kMaps; ++map) {
        const A da = exists ? a[map] : A(0);
        *reinterpret_cast<S*>(staged + staged_at(c.row, Staged::byte_of(map, c.unit / 8, c.unit % 8))) = M::operand(da);
        if (M::kRoundsOperands && exact != nullptr) exact[map * H] = to_storage<S>(da);
      }
    }
    exact_step_ += exact_stride_;
  }

  // ------------------------------------------------------------------------------------------------ the product

  // The j-th tile of dh of the warp: each block begins with another, so that not all send to the same.
  FUSEDRNN_DEVICE int output(int j) const {
    const int tile = first_output_ + j * kWarps;
    return tile < all_tiles_ ? tile : tile - all_tiles_;
  }
  FUSEDRNN_DEVICE int outputs() const {
    return role_.warp < all_tiles_ ? (all_tiles_ - role_.warp + kWarps - 1) / kWarps : 0;
  }

  // K blocks of the block's units that exist.
  FUSEDRNN_DEVICE int blocks_of_k() const {
    const int tiles = all_tiles_ - role_.rank * kTiles;
    const int own = kK == kTiles * kOfTile ? tiles * kOfTile : scatter_blocks(spec_of<C>(), kMath, tiles);
    return own < kK ? own : kK;
  }
  // Fragment k of the weights of a tile of dh.
  FUSEDRNN_DEVICE const Quad* fragment(int output, int k) const {
    const int all = static_cast<int>(senders_) * kK;
    return static_cast<const Quad*>(p_.w_hh) +
           ((int64_t{role_.direction} * all_tiles_ + output) * all + role_.rank * kK + k) * kFragment + role_.lane;
  }
  // Loads fragment k; zeros past the last unit.
  FUSEDRNN_DEVICE void load(Fragment& w, int output, int k) const {
    FUSEDRNN_UNROLL for (int s = 0; s < kSegments; ++s) {
      w[s] = k < blocks_of_k() ? load_streamed(fragment(output, k) + s * kWarp) : Quad{{0, 0, 0, 0}};
    }
  }

  FUSEDRNN_DEVICE void load_weights() {
    FUSEDRNN_UNROLL for (int j = 0; j < kInRegisters; ++j) {
      FUSEDRNN_UNROLL for (int k = 0; k < kK; ++k) {
        if (j < outputs()) {
          load(registers_[j][k], output(j), k);
        } else {
          FUSEDRNN_UNROLL for (int s = 0; s < kSegments; ++s) registers_[j][k][s] = Quad{{0, 0, 0, 0}};
        }
      }
    }
    for (int j = kInRegisters; j < outputs() && j < kInRegisters + in_shared(); ++j) {
      for (int k = 0; k < kK; ++k) {
        Fragment w;
        load(w, output(j), k);
        FUSEDRNN_UNROLL for (int s = 0; s < kSegments; ++s) shared_fragment(j - kInRegisters, k)[s * kWarp] = w[s];
      }
    }
    next_output_ = first_streamed();
    if (!kOthers || next_output_ >= outputs()) return;
    next_ = fragment(output(next_output_), 0);
    FUSEDRNN_UNROLL for (int k = 0; k < kStreamAhead; ++k) copy_next();
  }
  // Copies the next K block of the tiles whose weights are streamed; the first one follows the last.
  FUSEDRNN_DEVICE void copy_next() {
    stream_.copy(next_);
    next_ += kFragment;
    ++next_k_;
    while (next_k_ == blocks_of_k()) {  // once: a branch would be taken for predicates in front of every instruction
      next_k_ = 0;
      if (++next_output_ == outputs()) next_output_ = first_streamed();
      next_ = fragment(output(next_output_), 0);
    }
  }
  FUSEDRNN_DEVICE int in_shared() const { return p_.plan.shared_blocks / kK; }
  FUSEDRNN_DEVICE int first_streamed() const { return kInRegisters + in_shared(); }
  FUSEDRNN_DEVICE Quad* shared_fragment(int j, int k) const { return weights_ + (j * kK + k) * kFragment + role_.lane; }

  // The parts of dh from da that is staged, to where they are summed.
  FUSEDRNN_DEVICE void multiply() {
    const int outputs = this->outputs();
    // As many tiles in one straight line as there are, or a power of two: those that do not exist have zero weights.
    if constexpr (kInRegisters > 0) {
      if (kInRegisters > 2 && outputs > 2) {
        multiply_registers<kInRegisters>(outputs);
      } else if (kInRegisters > 1 && outputs > 1) {
        multiply_registers<2 <= kInRegisters ? 2 : 1>(outputs);
      } else if (outputs > 0) {
        multiply_registers<1>(outputs);
      }
    }
    if constexpr (kOthers) multiply_others(outputs);
  }

  FUSEDRNN_DEVICE void multiply_others(int outputs) {
    FUSEDRNN_NO_UNROLL for (int j = kInRegisters; j < outputs; ++j) {
      Accumulator<1> sums[kColumnTiles];
      FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) Unit::clear(sums[n]);
      if (j < first_streamed()) {
        FUSEDRNN_NO_UNROLL for (int k = 0; k < kK; ++k) {
          Fragment w;
          FUSEDRNN_UNROLL for (int s = 0; s < kSegments; ++s) w[s] = shared_fragment(j - kInRegisters, k)[s * kWarp];
          add(sums, w, k);
        }
      } else {
        const int blocks = blocks_of_k();
        FUSEDRNN_NO_UNROLL for (int k = 0; k < blocks; ++k) {
          Fragment w;
          stream_.read(w);
          copy_next();
          add(sums, w, k);
        }
      }
      send(sums, output(j));
    }
  }

  template <int kOutputs>
  FUSEDRNN_DEVICE void multiply_registers(int outputs) {
    Accumulator < kOutputs<4 ? 2 : 1> sums[kOutputs][kColumnTiles];
    FUSEDRNN_UNROLL for (int j = 0; j < kOutputs; ++j) {
      FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) Unit::clear(sums[j][n]);
    }
    FUSEDRNN_UNROLL for (int k = 0; k < kK; ++k) {
      FUSEDRNN_UNROLL for (int j = 0; j < kOutputs; ++j) add(sums[j], registers_[j][k], k);
    }
    FUSEDRNN_UNROLL for (int j = 0; j < kOutputs; ++j) {
      if (j < outputs) send(sums[j], output(j));
    }
  }

  template <int kChains>
  FUSEDRNN_DEVICE void add(Accumulator<kChains> (&sums)[kColumnTiles], const Fragment& w, int k) const {
    const int first = uses_matrix_unit(kMath)
                          ? staged_at(role_.lane / 4, role_.lane % 4 * static_cast<int>(sizeof(Quad)))
                          : Unit::first_byte(kStagedRow, role_.lane);
    const char* rows = staged() + k * kBlockBytes + first;
    FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) {
      Unit::add(sums[n], w, rows + n * kMmaN * kStagedRow, kStagedRow);
    }
  }

  template <int kChains>
  FUSEDRNN_DEVICE void send(const Accumulator<kChains> (&sums)[kColumnTiles], int tile) {
    constexpr int kQuads = 4 * sizeof(A) / sizeof(Quad);
    const int buffer = static_cast<int>(sent_ & 1), receiver = tile / kTiles;
    FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) {
      union {
        A z[kSegments][2];
        Quad quads[kQuads];
      };
      Unit::finish(sums[n], z, role_.lane);
      A* to = parts(buffer, role_.rank) + (tile % kTiles * kColumnTiles + n) * 128 + role_.lane * 4;
      FUSEDRNN_UNROLL for (int q = 0; q < kQuads; ++q) {
        push(reinterpret_cast<Quad*>(to) + q, barriers_ + buffer, receiver, quads[q]);
      }
    }
  }

  // da of the step that is computed, or multiplied with.
  FUSEDRNN_DEVICE char* staged() const { return staged_ + static_cast<int>(sent_ & 1) * kStaged; }

  FUSEDRNN_DEVICE A* parts(int buffer, int sender) const {
    return chunks_ + (buffer * p_.plan.blocks + sender) * kNumbers;
  }

  // dh of the state that entered the step: the sum of all parts, in the order of the blocks.
  FUSEDRNN_DEVICE void receive() {
    const int buffer = static_cast<int>(received_ & 1);
    const uint32_t parity = received_ >> 1 & 1;
    ++received_;
    if (thread_ == 0) {
      const int own = all_tiles_ - role_.rank * kTiles;
      expect_bytes(barriers_ + buffer,
                   senders_ * (own < kTiles ? own : kTiles) * kColumnTiles * 128 * static_cast<int>(sizeof(A)));
    }
    wait([&] { return mbarrier_passed(barriers_ + buffer, parity); }, "the parts of dh have come");
    A sums[kCells];
    switch (p_.plan.blocks) {
      case 2: add_parts<2>(parts(buffer, 0), sums); break;
      case 4: add_parts<4>(parts(buffer, 0), sums); break;
      case 8: add_parts<8>(parts(buffer, 0), sums); break;
      default: add_parts<16>(parts(buffer, 0), sums); break;
    }
    FUSEDRNN_UNROLL for (int k = 0; k < kCells; ++k) {
      if constexpr (kVariant) sums[k] = sums[k] * extra_.of_state(multipliers_[k]) + dh_[k];
      if ((exists_ >> k & 1) != 0) dh_[k] = (reset_ >> k & 1) != 0 ? A(0) : sums[k];
    }
  }

  template <int kBlocks>
  FUSEDRNN_DEVICE void add_parts(const A* from, A (&sums)[kCells]) const {
    constexpr int kChains = kBlocks < 4 ? kBlocks : 4;
    FUSEDRNN_UNROLL for (int k = 0; k < kCells; ++k) {
      A part[kBlocks];
      FUSEDRNN_UNROLL for (int b = 0; b < kBlocks; ++b) part[b] = from[b * kNumbers + k * kThreads + thread_];
      FUSEDRNN_UNROLL for (int b = kChains; b < kBlocks; ++b) part[b % kChains] += part[b];
      sums[k] = kChains == 2 ? part[0] + part[1] : (part[0] + part[1]) + (part[2 % kChains] + part[3 % kChains]);
    }
  }

  const BackwardParams& p_;
  const Role role_;
  const Direction direction_;
  const Extra extra_;                                    // of a variant
  const int thread_, first_unit_, all_tiles_, senders_;  // tiles of 16 units of the layer; blocks that have units
  const int first_output_;                               // the warp's first tile of dh
  const bool has_resets_;
  WeightStream<kSegments> stream_;
  int next_output_ = 0, next_k_ = 0;  // of the warp's tiles of dh and their K blocks, what is to be copied next
  const Quad* next_ = nullptr;
  Quad* weights_;
  char *staged_, *copies_;  // [2][kRows] of kStagedRow bytes; [kStepsCopied] of Inputs::kStep
  A* chunks_;               // [2][blocks][kNumbers]
  Mbarrier* barriers_;
  Quad registers_[kInRegisters > 0 ? kInRegisters : 1][kK][kSegments];
  uint32_t sent_ = 0, received_ = 0;
  int64_t first_row_ = 0;
  uint32_t exists_ = 0, reset_ = 0, reset_next_ = 0;  // a bit for each of the thread's cells
  int lengths_[kCells];
  A dh_[kCells], dc_[kCells], c0_[kCells];
  typename Extra::Peepholes peepholes_[kCells];      // of a variant
  typename Extra::Multipliers multipliers_[kCells];  // of the step that comes
  Inputs inputs_;
  Stores stores_;                              // of those whose operands are not rounded
  int64_t exact_step_ = 0, exact_stride_ = 0;  // where da of a step begins, of kRoundsOperands
};

template <Math kMath, class C, int kColumnTiles>
class BackwardScatter {
 public:
  static FUSEDRNN_DEVICE void run(const BackwardParams& p, char* shared) {
    switch (p.plan.tiles) {
      case 1: return ScatterTiles<kMath, C, kColumnTiles, 1>(p, shared).run();
      case 2: return ScatterTiles<kMath, C, kColumnTiles, 2>(p, shared).run();
      default: break;
    }
    if constexpr (most_scatter_tiles(kMath, kColumnTiles * kMmaN) > 2) {
      if (p.plan.tiles == 3) return ScatterTiles<kMath, C, kColumnTiles, 3>(p, shared).run();
      return ScatterTiles<kMath, C, kColumnTiles, 4>(p, shared).run();
    }
  }
};

}  // namespace fusedrnn::cuda
