// Backward of one layer in clusters that exchange partial sums of dh: backward.h's recurrence, without a projection.
//
//   da_t, dc_{t-1} from dh_t + dy_t, dc_t, the gates and c: cell.h       dh_{t-1} = sum over blocks of da_t @ w_hh
//
// A block owns 16 * plan.tiles hidden units. It multiplies da of its own units, which nobody else needs, with its own
// rows of w_hh, and has a part of the sum for dh of every unit; each block is sent the parts of its units, H numbers of
// the compute dtype for a batch row in the place of the 4 H of the storage dtype that gathering da takes.
//
// Grid and groups: as in forward.h. The warps of a block take turns with the tiles of 16 units of dh, all of K = da of
// the block each, and share out the cells, one or a few to a thread. Registers: weights of the first tiles, dh and dc
// of the thread's cells. Shared memory: weights of further tiles; da of the block, twice; the parts of dh from every
// block, twice; and the gates, c, dy and dc of four steps, copied asynchronously, 16 bytes at a time. Synchronisation,
// with steps counted over all slices of the launch:
//
//   cells from dh      da is staged, the only barrier      product, its results pushed      dh of the next step
//   received
//
// A buffer of parts is used again two steps later. Who pushes into it has received all of the step between, to which
// every warp here has pushed, or with which it has passed the barrier, after it had read that buffer. da is staged in
// the buffer of two steps before, which everybody has read before the barrier between. Step n's copies take the place
// of those of step n + 4, whose cells are before the barrier of that step. Limits: no projection; 1 to 4 tiles, in
// float64 and in TF32 with 16 rows 1 or 2; a cluster of at least two blocks.
#pragma once

#include "geometry.h"
#include "product.h"
#include "runs.h"

namespace fusedrnn::cuda {

// kTiles: plan.tiles.
template <Math kMath, int kColumnTiles, int kTiles>
class ScatterTiles {
 public:
  FUSEDRNN_DEVICE ScatterTiles(const BackwardParams& p, char* shared)
      : p_(p),
        role_(p.plan),
        direction_(p.sizes, p.sequence, role_.direction),
        thread_(thread_index()),
        first_unit_(role_.rank * kUnits),
        all_tiles_(static_cast<int>(ceil_div(p.sizes.H, 16))),
        senders_(static_cast<int>(ceil_div(all_tiles_, kTiles))) {
    const SharedLayout layout = shared_layout(Pass::kBackward, p.sizes, p.plan);
    weights_ = reinterpret_cast<Quad*>(shared + layout.weights[0]) + role_.warp * p.plan.shared_blocks * kFragment;
    staged_ = shared + layout.operands[0];
    parts_ = reinterpret_cast<A*>(shared + layout.partial[0]);
    copies_ = shared + layout.staging;
    barriers_ = reinterpret_cast<Mbarrier*>(shared + layout.barriers[0]);
  }

  FUSEDRNN_DEVICE void run() {
    // Parts that nobody sends, of blocks without units, are zeros in every sum.
    for (int k = thread_; k < 2 * p_.plan.blocks * kNumbers; k += kThreads) parts_[k] = 0;
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
    }
  }

 private:
  using M = Arithmetic<kMath>;
  using S = typename M::Storage;
  using A = typename M::Compute;
  using Unit = typename M::Unit;
  static constexpr int kSegments = 2, kRows = kColumnTiles * kColumns, kUnits = 16 * kTiles;
  static constexpr int kWarps = kTiles * scatter_splits(kTiles), kThreads = kWarps * kWarp;
  static constexpr int kNumbers = kUnits * kRows;  // of dh, that the block owns
  static constexpr int kCells = kNumbers / kThreads;
  static_assert(kNumbers % kThreads == 0 && (kStepsCopied & (kStepsCopied - 1)) == 0);
  static constexpr int kK = scatter_blocks(kMath, kTiles);  // K blocks of the product
  static constexpr int kFragment = kSegments * kWarp;       // quads of one
  static constexpr int kInRegisters = scatter_outputs_in_registers(kMath, kRows, kTiles);
  static constexpr int kPerQuad = sizeof(Quad) / sizeof(S);
  static constexpr int kStagedRow = row_stride(kK), kStaged = kRows * kStagedRow;
  static constexpr int kCopiedArray = kUnits * static_cast<int>(sizeof(S));
  static constexpr int kCopiedRow = scatter_copied_row(kMath, kTiles), kCopied = kRows * kCopiedRow;
  static constexpr int kChunks = kCopiedArray / static_cast<int>(sizeof(Quad));
  static constexpr int kCopies = (kRows * kCopiedArrays * kChunks + kThreads - 1) / kThreads;
  static constexpr int kQuadsOfRow = 4 * kK;  // of da
  static constexpr int kStores = (kRows * kQuadsOfRow + kThreads - 1) / kThreads;
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
            tile % kColumnTiles * kColumns + lane % 4 * 2 + number % 2};
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
      Quad da[kStores];
      read_da(da);
      multiply();
      ++sent_;
      store_da(da);
      copy(n - kStepsCopied);
      look_at(n - 1);
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
      dc_[k] = is_there && p_.dcn != nullptr ? number(p_.dcn, at) : A(0);
      c0_[k] = is_there && p_.c0 != nullptr ? number(p_.c0, at) : A(0);
    }
    look_at(p_.sizes.T - 1);
    const int64_t backwards = role_.direction == 1 ? 1 : -1;  // from a step to the next that is computed
    FUSEDRNN_UNROLL for (int m = 0; m < kCopies; ++m) {
      const int q = thread_ + m * kThreads, array = q / kChunks % kCopiedArrays, row = q / kChunks / kCopiedArrays;
      const int64_t b = first_row + row, unit = first_unit_ + q % kChunks * kPerQuad;
      const void* base = array < kGates ? p_.gates : array == kC ? p_.c : array == kDy ? p_.dy : p_.dc;
      const Strides& strides = array == kC ? p_.c_strides : array == kDy ? p_.dy_strides : p_.dc_strides;
      const int64_t at =
          array < kGates ? direction_.step(last, b, kGates * H) + array * H : direction_.offset(strides, last, b);
      const int64_t step = array < kGates ? p_.sizes.B * kGates * H : strides.t;
      const bool exists = row < kRows && base != nullptr && b < p_.sizes.B;
      copied_[m] = run(base, at + unit, backwards * step, exists ? H - unit : 0);
    }
    FUSEDRNN_UNROLL for (int m = 0; m < kStores; ++m) {
      const int q = thread_ + m * kThreads, row = q / kQuadsOfRow, k = q % kQuadsOfRow * kPerQuad;
      const int64_t b = first_row + row, unit = first_unit_ + k / 32 * 8 + k % 8, gate = k / 8 % 4;
      stores_[m] = run(p_.da, direction_.step(last, b, kGates * H) + gate * H + unit,
                       backwards * p_.sizes.B * kGates * H, row < kRows && b < p_.sizes.B ? H - unit : 0);
    }
    ragged_ = false;
    FUSEDRNN_UNROLL for (int m = 0; m < kCopies; ++m) ragged_ |= copied_[m].is_ragged();
    FUSEDRNN_UNROLL for (int m = 0; m < kStores; ++m) ragged_ |= stores_[m].is_ragged();
    exact_step_ = direction_.step(last, 0, kGates * H);
    exact_stride_ = backwards * p_.sizes.B * kGates * H;
  }

  static FUSEDRNN_DEVICE A number(const void* from, int64_t at) { return to_compute(static_cast<const S*>(from)[at]); }
  static FUSEDRNN_DEVICE Run run(const void* base, int64_t at, int64_t step, int64_t left) {
    constexpr int kBytes = sizeof(S);
    return Run(static_cast<const char*>(base) + at * kBytes, step * kBytes, left * kBytes);
  }

  FUSEDRNN_DEVICE void finish() {
    FUSEDRNN_UNROLL for (int k = 0; k < kCells; ++k) {
      const Cell c = cell(k);
      const int64_t b = first_row_ + c.row, unit = first_unit_ + c.unit;
      if (b >= p_.sizes.B || unit >= p_.sizes.H) continue;
      const int64_t at = direction_.state(b, p_.sizes.H) + unit;
      if (p_.dh0 != nullptr) static_cast<S*>(p_.dh0)[at] = to_storage<S>(dh_[k]);
      if (p_.dc0 != nullptr) static_cast<S*>(p_.dc0)[at] = to_storage<S>(dc_[k]);
    }
  }

  // ------------------------------------------------------------------------------------------------ a step

  // Begins to copy what the n-th step needs, and goes on to the step before; none where n is negative.
  FUSEDRNN_DEVICE void copy(int64_t n) {
    if (n >= 0) {
      char* to = copies_ + static_cast<int>(n & (kStepsCopied - 1)) * kCopied;
      ragged_ ? copy_quads<true>(to) : copy_quads<false>(to);
    }
    commit_copies();
  }
  template <bool kRagged>
  FUSEDRNN_DEVICE void copy_quads(char* to) {
    FUSEDRNN_UNROLL for (int m = 0; m < kCopies; ++m) {
      const int q = thread_ + m * kThreads;
      char* quad = to + q / (kChunks * kCopiedArrays) * kCopiedRow +
                   q % (kChunks * kCopiedArrays) * static_cast<int>(sizeof(Quad));
      copied_[m].template copy<kRagged>(quad);
    }
  }

  // Which of the thread's cells there are in the n-th step, and whether the state that enters it is cut.
  FUSEDRNN_DEVICE void look_at(int64_t n) {
    cut_next_ = 0;
    if (p_.sequence.reset == nullptr) return;
    const int64_t t = direction_.at(n);
    FUSEDRNN_UNROLL for (int k = 0; k < kCells; ++k) {
      if (!Direction::exists(t, lengths_[k])) continue;
      if (direction_.is_reset(t, first_row_ + cell(k).row)) cut_next_ |= 1u << k;
    }
  }

  // From dh and dc to da, which is staged, and dc of the step before.
  FUSEDRNN_DEVICE void cells(int64_t n) {
    const int64_t t = direction_.at(n);
    const char* now = copies_ + static_cast<int>(n & (kStepsCopied - 1)) * kCopied;
    const char* before = copies_ + static_cast<int>((n - 1) & (kStepsCopied - 1)) * kCopied;
    char* staged = staged_ + static_cast<int>(sent_ & 1) * kStaged;
    exists_ = 0;
    cut_ = cut_next_;
    FUSEDRNN_UNROLL for (int k = 0; k < kCells; ++k) {
      const Cell c = cell(k);
      const int at = c.row * kCopiedRow + c.unit * static_cast<int>(sizeof(S));
      const auto copied = [&](const char* step, int array) {
        return to_compute(*reinterpret_cast<const S*>(step + at + array * kCopiedArray));
      };
      A gates[kGates];
      FUSEDRNN_UNROLL for (int gate = 0; gate < kGates; ++gate) gates[gate] = copied(now, gate);
      const bool exists = Direction::exists(t, lengths_[k]), cut = (cut_ >> k & 1) != 0;
      const A entered = direction_.is_first(t, lengths_[k]) ? c0_[k] : copied(before, kC);
      const A dy = p_.dy != nullptr ? copied(now, kDy) : A(0);
      A dc = dc_[k] + (p_.dc != nullptr ? copied(now, kDc) : A(0));
      M::Cell::backward(gates, cut ? A(0) : entered, copied(now, kC), dh_[k] + dy, dc);
      if (exists) exists_ |= 1u << k;
      dc_[k] = !exists ? dc_[k] : cut ? A(0) : dc;
      S* to = reinterpret_cast<S*>(staged + c.row * kStagedRow) + c.unit / 8 * 32 + c.unit % 8;
      // What is staged may be rounded to the operand's precision, and then is not what is stored.
      const int64_t row = first_row_ + c.row, H = p_.sizes.H;
      S* exact = M::kRoundsOperands && row < p_.sizes.B && first_unit_ + c.unit < H
                     ? static_cast<S*>(p_.da) + exact_step_ + row * kGates * H + first_unit_ + c.unit
                     : nullptr;
      FUSEDRNN_UNROLL for (int gate = 0; gate < kGates; ++gate) {
        const A da = exists ? gates[gate] : A(0);
        to[gate * 8] = M::operand(da);
        if (M::kRoundsOperands && exact != nullptr) exact[gate * H] = to_storage<S>(da);
      }
    }
    exact_step_ += exact_stride_;
  }

  // What the thread stores of da of the step that is staged.
  FUSEDRNN_DEVICE void read_da(Quad (&da)[kStores]) const {
    if constexpr (M::kRoundsOperands) return;
    const char* staged = staged_ + static_cast<int>(sent_ & 1) * kStaged;
    FUSEDRNN_UNROLL for (int m = 0; m < kStores; ++m) {
      const int q = thread_ + m * kThreads;
      da[m] = Quad{{0, 0, 0, 0}};
      if (q < kRows * kQuadsOfRow) {
        da[m] = *reinterpret_cast<const Quad*>(staged + q / kQuadsOfRow * kStagedRow +
                                               q % kQuadsOfRow * static_cast<int>(sizeof(Quad)));
      }
    }
  }
  FUSEDRNN_DEVICE void store_da(const Quad (&da)[kStores]) {
    if constexpr (!M::kRoundsOperands) {
      ragged_ ? store_quads<true>(da) : store_quads<false>(da);
    }
  }
  template <bool kRagged>
  FUSEDRNN_DEVICE void store_quads(const Quad (&da)[kStores]) {
    FUSEDRNN_UNROLL for (int m = 0; m < kStores; ++m) stores_[m].template store<kRagged>(da[m]);
  }

  // ------------------------------------------------------------------------------------------------ the product

  // The j-th tile of dh of the warp: each block begins with another, so that not all send to the same.
  FUSEDRNN_DEVICE int output(int j) const {
    const int tile = role_.rank * kTiles + role_.warp + j * kWarps;
    return tile % all_tiles_;
  }
  FUSEDRNN_DEVICE int outputs() const {
    return role_.warp < all_tiles_ ? (all_tiles_ - role_.warp + kWarps - 1) / kWarps : 0;
  }

  // Fragment k of the weights of a tile of dh; zeros behind the last unit.
  FUSEDRNN_DEVICE void load(Fragment& w, int output, int k) const {
    const int all = all_tiles_ * static_cast<int>(sizeof(S)), block = role_.rank * kK + k;
    FUSEDRNN_UNROLL for (int s = 0; s < kSegments; ++s) w[s] = Quad{{0, 0, 0, 0}};
    if (block >= all) return;
    const Quad* from = static_cast<const Quad*>(p_.w_hh) +
                       ((int64_t{role_.direction} * all_tiles_ + output) * all + block) * kFragment + role_.lane;
    FUSEDRNN_UNROLL for (int s = 0; s < kSegments; ++s) w[s] = M::operands(load_streamed(from + s * kWarp));
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
  }
  FUSEDRNN_DEVICE int in_shared() const { return p_.plan.shared_blocks / kK; }
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
    FUSEDRNN_NO_UNROLL for (int j = kInRegisters; j < outputs; ++j) {
      const bool shared = j < kInRegisters + in_shared();
      const int tile = output(j);
      Accumulator<1> sums[kColumnTiles];
      FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) Unit::clear(sums[n]);
      const auto fetch = [&](Fragment& w, int k) {
        if (shared) {
          const Quad* from = shared_fragment(j - kInRegisters, k);
          FUSEDRNN_UNROLL for (int s = 0; s < kSegments; ++s) w[s] = from[s * kWarp];
        } else {
          load(w, tile, k);
        }
      };
      Fragment ahead, w;
      fetch(ahead, 0);
      FUSEDRNN_NO_UNROLL for (int k = 0; k < kK; ++k) {
        FUSEDRNN_UNROLL for (int s = 0; s < kSegments; ++s) w[s] = ahead[s];
        if (k + 1 < kK) fetch(ahead, k + 1);
        add(sums, w, k);
      }
      send(sums, tile);
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
    const char* rows =
        staged_ + static_cast<int>(sent_ & 1) * kStaged + k * kBlockBytes + Unit::first_byte(kStagedRow, role_.lane);
    FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) {
      Unit::add(sums[n], w, rows + n * kColumns * kStagedRow, kStagedRow);
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

  FUSEDRNN_DEVICE A* parts(int buffer, int sender) const {
    return parts_ + (buffer * p_.plan.blocks + sender) * kNumbers;
  }

  // dh of the state that entered the step: the sum of everybody's parts, in the order of the blocks.
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
      if ((exists_ >> k & 1) != 0) dh_[k] = (cut_ >> k & 1) != 0 ? A(0) : sums[k];
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

  // Of what is copied ahead of a step: the arrays of a row, one after the other.
  static constexpr int kC = kGates, kDy = kGates + 1, kDc = kGates + 2;

  const BackwardParams& p_;
  const Role role_;
  const Direction direction_;
  const int thread_, first_unit_, all_tiles_, senders_;  // tiles of 16 units of the layer; blocks that have units
  Quad* weights_;
  char *staged_, *copies_;  // [2][kRows] of kStagedRow bytes; [kStepsCopied][kRows] of kCopiedRow
  A* parts_;                // [2][blocks][kNumbers]
  Mbarrier* barriers_;
  Quad registers_[kInRegisters > 0 ? kInRegisters : 1][kK][kSegments];
  uint32_t sent_ = 0, received_ = 0;
  int64_t first_row_ = 0;
  uint32_t exists_ = 0, cut_ = 0, cut_next_ = 0;  // a bit for each of the thread's cells
  int lengths_[kCells];
  A dh_[kCells], dc_[kCells], c0_[kCells];
  Run copied_[kCopies], stores_[kStores];      // what the thread copies of a step, and stores
  bool ragged_ = false;                        // whether any of these is
  int64_t exact_step_ = 0, exact_stride_ = 0;  // where da of a step begins, of kRoundsOperands
};

template <Math kMath, int kColumnTiles>
class BackwardScatter {
 public:
  static FUSEDRNN_DEVICE void run(const BackwardParams& p, char* shared) {
    switch (p.plan.tiles) {
      case 1: return ScatterTiles<kMath, kColumnTiles, 1>(p, shared).run();
      case 2: return ScatterTiles<kMath, kColumnTiles, 2>(p, shared).run();
      default: break;
    }
    if constexpr (most_scatter_tiles(kMath, kColumnTiles * kColumns) > 2) {
      if (p.plan.tiles == 3) return ScatterTiles<kMath, kColumnTiles, 3>(p, shared).run();
      return ScatterTiles<kMath, kColumnTiles, 4>(p, shared).run();
    }
  }
};

}  // namespace fusedrnn::cuda
