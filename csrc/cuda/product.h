// A product of one warp: its tile of output rows, its part of K, all batch rows of the slice.
//
// The weights of a warp are fragments (math.h), K block after K block: the first kRegisterBlocks of them in registers,
// the next plan.shared_blocks in shared memory, both for the whole launch; the rest is streamed (stream.h), on and on
// from the last K block of a step to the first of the next. A lane only ever reads fragments that it has put there
// itself, so weights need no barrier.
//
// Where K is split, the warps of a tile hand partial sums to each other in shared memory. Column tile n (eight batch
// rows) belongs to the warp with split n % splits, which adds them up in the order of K, so that the result does not
// depend on who owns it, and does the cell's arithmetic of these rows.
#pragma once

#include "math.h"
#include "stream.h"

namespace fusedrnn::cuda {

// The coordinates of a thread in a launch.
struct Role {
  int lane, warp;
  int local_tile, split;   // the warp's place in the block
  int tile;                // and in the group
  int rank, direction;     // the block's place in its group, the group's direction
  int group, first_slice;  // of the launch; of the direction
  int splits;

  explicit FUSEDRNN_DEVICE Role(const Plan& plan) {
    lane = thread_index() % kWarp;
    warp = thread_index() / kWarp;
    split = warp % plan.splits;
    local_tile = warp / plan.splits;
    rank = block_index() % plan.blocks;
    group = block_index() / plan.blocks;
    direction = group / plan.groups;
    first_slice = group % plan.groups;
    splits = kept(plan.splits);
    tile = rank * plan.tiles + local_tile;
  }

  FUSEDRNN_DEVICE bool owns(int column_tile) const { return column_tile % splits == split; }
};

// kIsChunked: the operand comes in chunks, and all weights are streamed. kChains: of Unit::Accumulator. kSummed:
// segments that add_parts() sums.
template <class M, int kSegments, int kColumnTiles, int kRegisterBlocks, bool kIsChunked, int kChains = 1,
          int kSummed = kSegments>
class WarpProduct {
 public:
  using A = typename M::Compute;
  using Unit = typename M::Unit;
  using Results = A[kColumnTiles][kSegments][2];
  using Summed = A[kColumnTiles][kSummed][2];

  // packed: fragments of all directions, [D][tile][K block][segment][lane]. shared_blocks: the K blocks of weights
  // that fit into `shared`; ring: those of all warps. A warp without a tile holds nothing, and must not multiply.
  FUSEDRNN_DEVICE WarpProduct(const Role& role, const Plan& plan, const Product& product, const void* packed,
                              int shared_blocks, char* shared, char* ring, char* partial)
      : role_(role),
        stream_(ring + role.warp * kStreamSlots * kFragment * static_cast<int>(sizeof(Quad)), role.lane),
        stride_(kIsChunked ? chunk_stride(plan) : product.operand.stride()),
        chunk_blocks_(plan.chunk_blocks),
        barrier_(1 + role.local_tile),
        shared_blocks_(shared_blocks),
        partial_(reinterpret_cast<A*>(partial) + role.local_tile * plan.splits * kColumnTiles * kPartial) {
    if (role.tile >= product.tiles) return;
    const int blocks = product.operand.blocks(), begin = first_block(int64_t{blocks}, role.split, plan.splits);
    first_byte_ =
        held((kIsChunked ? role.split * chunk_blocks_ : begin) * kBlockBytes + Unit::first_byte(stride_, role.lane));
    blocks_ = held(first_block(int64_t{blocks}, role.split + 1, plan.splits) - begin);
    rest_ = held(blocks_ - in_registers());
    const Quad* from = static_cast<const Quad*>(packed) + role.direction * product.packed_quads() +
                       (static_cast<int64_t>(role.tile) * blocks + begin) * kFragment + role.lane;
    FUSEDRNN_UNROLL for (int k = 0; k < kRegisterBlocks; ++k) {
      if (k < blocks_) load(registers_[k], from + k * kFragment);
    }
    from += in_registers() * kFragment;
    shared_ = reinterpret_cast<Quad*>(shared) + role.warp * shared_blocks * kFragment + role.lane;
    for (int k = 0; k < in_shared(); ++k) {
      Quad w[kSegments];
      load(w, from + k * kFragment);
      if constexpr (kInterleaves) interleave(w);
      FUSEDRNN_UNROLL for (int s = 0; s < kSegments; ++s) shared_[k * kFragment + s * kWarp] = w[s];
    }
    streamed_ = from + in_shared() * kFragment;
    if (!kIsChunked && streamed() > 0) begin_stream();
  }

  // z[n] = tile @ operand of the column tiles that this warp owns. All warps of the tile come here.
  FUSEDRNN_DEVICE void multiply(const char* operand, Results& z) {
    multiply_part(operand, z);
    add_parts(z);
  }

  // The warp's part of K alone, of all column tiles. z has at least as many segments.
  template <int kRoom>
  FUSEDRNN_DEVICE void multiply_part(const char* operand, A (&z)[kColumnTiles][kRoom][2]) {
    Sums sums;
    FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) Unit::clear(sums[n]);
    const char* rows = operand + first_byte_;
    // A straight line for the usual numbers of blocks, where registers allow it.
    if (kChains > 1 && blocks_ >= kRegisterBlocks) {
      add_registers<kRegisterBlocks>(sums, rows);
    } else if (kChains > 1 && kRegisterBlocks > 4 && blocks_ == 4) {
      add_registers < kRegisterBlocks<4 ? 0 : 4>(sums, rows);
    } else if (kChains > 1 && kRegisterBlocks > 2 && blocks_ == 2) {
      add_registers < kRegisterBlocks<2 ? 0 : 2>(sums, rows);
    } else {
      FUSEDRNN_UNROLL for (int k = 0; k < kRegisterBlocks; ++k) {
        if (k < blocks_) add(sums, registers_[k], rows + k * kBlockBytes);
      }
    }
    if (rest_ > 0) add_rest(sums, rows + kRegisterBlocks * kBlockBytes);
    FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) { Unit::finish(sums[n], z[n], role_.lane); }
  }

  // As above, for kIsChunked. All threads of the block must call it; a warp without a tile gets zeros.
  template <class Channel, int kRoom>
  FUSEDRNN_DEVICE void multiply_part(Channel& channel, A (&z)[kColumnTiles][kRoom][2]) {
    Sums sums;
    FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) Unit::clear(sums[n]);
    if (blocks_ > 0) begin_stream();
    channel.for_each_chunk([&](int chunk, const char* operand) {
      const int left = blocks_ - chunk * chunk_blocks_, count = left < chunk_blocks_ ? left : chunk_blocks_;
      if (count > 0) add_streamed(sums, operand + first_byte_, count);
    });
    FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) { Unit::finish(sums[n], z[n], role_.lane); }
  }

  // From the parts of all warps of the tile to the sums of the column tiles that this warp owns.
  FUSEDRNN_DEVICE void add_parts(Summed& z) const {
    if (role_.splits == 2) {
      add_other_half(z);
    } else if (role_.splits > 1) {
      add_partial_sums(z);
    }
  }

 private:
  static constexpr int kFragment = kSegments * kWarp;   // quads of a K block
  static constexpr int kPartial = kSummed * 2 * kWarp;  // numbers of a column tile

  // As `kept`, where registers are left: in double the compiler may compute a value again at every step.
  static FUSEDRNN_DEVICE int held(int value) { return M::kMath == Math::kFloat64 ? value : kept(value); }
  static constexpr int kAtOnce = kSummed <= 2 ? 4 : 2;  // partial sums that are read before they are added
  using Sums = typename Unit::template Accumulator<kSegments, kChains>[kColumnTiles];

  // How many of the warp's K blocks are in registers.
  FUSEDRNN_DEVICE int in_registers() const {
    return kRegisterBlocks == 0 ? 0 : blocks_ < kRegisterBlocks ? blocks_ : kRegisterBlocks;
  }
  FUSEDRNN_DEVICE int in_shared() const { return rest_ < shared_blocks_ ? rest_ : shared_blocks_; }
  FUSEDRNN_DEVICE int streamed() const { return rest_ - in_shared(); }

  static FUSEDRNN_DEVICE void load(Quad (&w)[kSegments], const Quad* from) {
    FUSEDRNN_UNROLL for (int s = 0; s < kSegments; ++s) w[s] = load_streamed(from + s * kWarp);
  }

  // In shared memory the words are in the order of an instruction's registers: so that a load fills these, and nothing
  // is moved. And back, which only names registers. With a projection there are none for it on sm_100.
  static constexpr bool kInterleaves = kChains > 1;
  static FUSEDRNN_DEVICE void interleave(Quad (&w)[kSegments]) {
    FUSEDRNN_UNROLL for (int s = 0; s < kSegments; s += 2) {
      const Quad a = w[s];
      if (s + 1 == kSegments) {
        w[s] = Quad{{a.word[0], a.word[2], a.word[1], a.word[3]}};
      } else {
        const Quad b = w[s + 1];
        w[s] = Quad{{a.word[0], b.word[0], a.word[1], b.word[1]}};
        w[s + 1] = Quad{{a.word[2], b.word[2], a.word[3], b.word[3]}};
      }
    }
  }
  static FUSEDRNN_DEVICE void separate(Quad (&w)[kSegments]) {
    FUSEDRNN_UNROLL for (int s = 0; s < kSegments; s += 2) {
      const Quad a = w[s];
      if (s + 1 == kSegments) {
        w[s] = Quad{{a.word[0], a.word[2], a.word[1], a.word[3]}};
      } else {
        const Quad b = w[s + 1];
        w[s] = Quad{{a.word[0], a.word[2], b.word[0], b.word[2]}};
        w[s + 1] = Quad{{a.word[1], a.word[3], b.word[1], b.word[3]}};
      }
    }
  }

  FUSEDRNN_DEVICE void begin_stream() { FUSEDRNN_UNROLL for (int k = 0; k < kStreamAhead; ++k) copy_next(); }
  // In chunks the product ends with the last K block; elsewhere the next step begins with the first one again.
  FUSEDRNN_DEVICE void copy_next() {
    stream_.copy(streamed_ + static_cast<int64_t>(next_) * kFragment, !kIsChunked || next_ < blocks_);
    ++next_;
    if (!kIsChunked && next_ == streamed()) next_ = 0;
  }

  FUSEDRNN_DEVICE void add(Sums& sums, const Quad (&w)[kSegments], const char* rows) const {
    FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) {
      Unit::add(sums[n], w, rows + n * kMmaN * stride_, stride_);
    }
  }

  template <int kBlocks>
  FUSEDRNN_DEVICE void add_registers(Sums& sums, const char* rows) const {
    FUSEDRNN_UNROLL for (int k = 0; k < kBlocks; ++k) add(sums, registers_[k], rows + k * kBlockBytes);
  }

  // Adds the K blocks that are not in registers.
  FUSEDRNN_DEVICE void add_rest(Sums& sums, const char* rows) {
    const int in_shared = this->in_shared(), streamed = this->streamed();
    FUSEDRNN_NO_UNROLL for (int k = 0; k < in_shared; ++k, rows += kBlockBytes) {
      Quad w[kSegments];
      FUSEDRNN_UNROLL for (int s = 0; s < kSegments; ++s) w[s] = shared_[k * kFragment + s * kWarp];
      if constexpr (kInterleaves) separate(w);
      add(sums, w, rows);
    }
    if (streamed > 0) add_streamed(sums, rows, streamed);
  }

  FUSEDRNN_DEVICE void add_streamed(Sums& sums, const char* rows, int streamed) {
    FUSEDRNN_NO_UNROLL for (int k = 0; k < streamed; ++k, rows += kBlockBytes) {
      Quad w[kSegments];
      stream_.read(w);
      copy_next();
      add(sums, w, rows);
    }
  }

  FUSEDRNN_DEVICE void share_partial_sums(const Summed& z) const {
    FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) {
      if (role_.owns(n)) continue;
      A* to = partial(n, role_.split);
      FUSEDRNN_UNROLL for (int v = 0; v < 2 * kSummed; ++v) to[v * kWarp] = z[n][v / 2][v % 2];
    }
    sync_threads(barrier_, role_.splits * kWarp, "partial sums");
  }

  // For two splits: their sum does not depend on the order.
  FUSEDRNN_DEVICE void add_other_half(Summed& z) const {
    share_partial_sums(z);
    FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) {
      if (!role_.owns(n)) continue;
      const A* from = partial(n, 1 - role_.split);
      FUSEDRNN_UNROLL for (int v = 0; v < 2 * kSummed; ++v) z[n][v / 2][v % 2] += from[v * kWarp];
    }
  }

  FUSEDRNN_DEVICE void add_partial_sums(Summed& z) const {
    share_partial_sums(z);
    FUSEDRNN_UNROLL for (int n = 0; n < kColumnTiles; ++n) {
      if (!role_.owns(n)) continue;
      A sum[2 * kSummed];
      FUSEDRNN_UNROLL for (int v = 0; v < 2 * kSummed; ++v) sum[v] = 0;
      FUSEDRNN_NO_UNROLL for (int first = 0; first < role_.splits; first += kAtOnce) {
        A part[kAtOnce][2 * kSummed];
        FUSEDRNN_UNROLL for (int k = 0; k < kAtOnce; ++k) {
          const A* from = partial(n, first + k);
          const bool exists = first + k < role_.splits, own = first + k == role_.split;
          FUSEDRNN_UNROLL for (int v = 0; v < 2 * kSummed; ++v) {
            part[k][v] = own ? z[n][v / 2][v % 2] : exists ? from[v * kWarp] : A(0);
          }
        }
        FUSEDRNN_UNROLL for (int k = 0; k < kAtOnce; ++k) {
          FUSEDRNN_UNROLL for (int v = 0; v < 2 * kSummed; ++v) sum[v] += part[k][v];
        }
      }
      FUSEDRNN_UNROLL for (int v = 0; v < 2 * kSummed; ++v) z[n][v / 2][v % 2] = sum[v];
    }
  }

  FUSEDRNN_DEVICE A* partial(int n, int split) const {
    return partial_ + (split * kColumnTiles + n) * kPartial + role_.lane;
  }

  const Role& role_;
  WeightStream<kSegments> stream_;
  int stride_, chunk_blocks_, barrier_, shared_blocks_;
  A* partial_;
  Quad registers_[kRegisterBlocks > 0 ? kRegisterBlocks : 1][kSegments];
  int blocks_ = 0, rest_ = 0, first_byte_ = 0;  // K blocks, and those of them that are not in registers
  Quad* shared_ = nullptr;
  const Quad* streamed_ = nullptr;  // the first of those K blocks
  int next_ = 0;                    // of these, the one to copy next
};

}  // namespace fusedrnn::cuda
