// Sends the operand of a product from the warps that compute it to all blocks that need it, once per step.
//
// Every warp sends its results; every block with a tile of the product receives all of them. The protocol, with
// operands counted 0, 1, 2, ... over all steps and slices of the launch:
//
//   send operand k  (after the product with operand k - 1)      announce      receive operand k      product with it
//
// Operand k is in buffer k % 2, and no second synchronisation is needed: a block sends operand k only after it has
// received all of operand k - 1, which every tile of every block sent after its product with operand k - 2, the last
// use of that buffer. With a projection two such exchanges alternate. A block then sends operand k of one after it has
// received all of operand k of the other, which every tile sent after its product with operand k - 1 of the first: the
// same argument, with a step to spare. Every block with a tile receives every announced operand before it ends: nothing
// is sent to a block that has ended.
//
// The policies have the same interface: start() once by all threads, and then started(), once for all exchanges;
// send() by a warp, announce() and receive() by all threads that take part. kIdleWarpsTakePart says whether those are
// all of a block that has a tile, or only the warps that have one. Where operands come in chunks, kIsChunked, there is
// await() in the place of receive(), and then for_each_chunk() for each of the tiles that take turns: operand k is
// received when the last of them is through, and what a tile sends before that is a part of operand k + 1.
#pragma once

#include "operand_chunks.h"
#include "params.h"
#include "product.h"

namespace fusedrnn::cuda {

// Through the second-level cache. A block's stores are followed by a barrier of the block and the release of its flag;
// a warp of each block polls the flags of the group, and its block copies the operand into shared memory.
// The flag of a block is the number of operands that it has announced.
class GridExchange {
 public:
  static constexpr Exchange kExchange = Exchange::kGrid;
  static constexpr bool kIsChunked = false, kIdleWarpsTakePart = true;

  FUSEDRNN_DEVICE GridExchange(const CellSpec& cell, const Role& role, const Sizes& sizes, const Plan& plan, Pass pass,
                               Stage stage, const Product& product, int rows, const Workspace& workspace, char* operand,
                               Mbarrier*)
      : row_bytes_(product.operand.row_bytes()),
        senders_(blocks_with(product.operand.tiles, plan)),
        role_(role),
        rows_(rows),
        stride_(product.operand.stride()),
        warps_(plan.tiles * plan.splits),
        operand_(operand),
        exchanged_(static_cast<char*>(workspace.exchanged) + int64_t{role.group} * 2 * rows * row_bytes_),
        flags_(workspace.flags + int64_t{role.group} * plan.blocks) {
    if (stage == Stage::kProjection) {
      exchanged_ += exchanged_bytes(cell, pass, Stage::kRecurrent, sizes, plan);
      flags_ += launched_blocks(sizes, plan);
    }
  }

  FUSEDRNN_DEVICE void start() {}
  static FUSEDRNN_DEVICE void started() {}

  // 16 bytes at `byte` of row `row` of the operand, for every `piece` of the warp.
  template <int kPieces, class F>
  FUSEDRNN_DEVICE void send(const F& piece) {
    FUSEDRNN_NO_UNROLL for (int k = role_.lane; k < kPieces; k += kWarp) {
      int row, byte;
      const Quad quad = piece(k, row, byte);
      store_exchanged(buffer(sent_) + static_cast<int64_t>(row) * row_bytes_ + byte, quad);
    }
  }

  FUSEDRNN_DEVICE void announce() {
    ++sent_;
    sync_block("the block's part of the operand is stored");
    if (thread_index() == 0) release_flag(flags_ + role_.rank, sent_, "the block's flag is released");
  }

  // The operand in shared memory.
  FUSEDRNN_DEVICE const char* receive() {
    await();
    const char* from = received();
    const int quads = row_bytes_ / static_cast<int>(sizeof(Quad));
    FUSEDRNN_NO_UNROLL for (int row = role_.warp; row < rows_; row += warps_) {
      const Quad* global = reinterpret_cast<const Quad*>(from + static_cast<int64_t>(row) * row_bytes_) + role_.lane;
      Quad* shared = reinterpret_cast<Quad*>(operand_ + row * stride_) + role_.lane;
      int left = quads - role_.lane;
      FUSEDRNN_NO_UNROLL for (; left > (kAtOnce - 1) * kWarp; left -= kAtOnce * kWarp) {
        FUSEDRNN_UNROLL for (int k = 0; k < kAtOnce; ++k) copy_async(shared + k * kWarp, global + k * kWarp);
        shared += kAtOnce * kWarp;
        global += kAtOnce * kWarp;
      }
      FUSEDRNN_UNROLL for (int k = 0; k < kAtOnce - 1; ++k) {
        copy_async_if(left > k * kWarp, shared + k * kWarp, global + k * kWarp);
      }
    }
    wait_copies("the thread's copies of the operand");
    sync_block("the operand is copied");
    return operand_;
  }

 protected:
  // Waits until all of the operand is in the second-level cache.
  FUSEDRNN_DEVICE void await() {
    const uint32_t expected = ++received_;
    if (role_.warp == 0) {
      FUSEDRNN_NO_UNROLL for (int rank = role_.lane; rank < senders_; rank += kWarp) {
        wait([&] { return static_cast<int32_t>(flag(flags_ + rank) - expected) >= 0; }, "the flags of the group");
      }
    }
    sync_block("the operand is announced");
  }

  FUSEDRNN_DEVICE const char* received() const { return buffer(received_ - 1); }

  int row_bytes_, senders_;

 private:
  static constexpr int kAtOnce = 4;  // quads of a row that a lane copies in a straight line

  FUSEDRNN_DEVICE char* buffer(uint32_t k) const {
    return exchanged_ + static_cast<int64_t>(k & 1) * rows_ * row_bytes_;
  }

  const Role& role_;
  int rows_, stride_, warps_;
  char *operand_, *exchanged_;
  uint32_t* flags_;
  uint32_t sent_ = 0, received_ = 0;
};

// A grid exchange of operands of any size, which are copied to shared memory in chunks.
class ChunkedExchange : public GridExchange {
 public:
  static constexpr Exchange kExchange = Exchange::kChunked;
  static constexpr bool kIsChunked = true, kRounds = false;
  static constexpr const char *kCopies = "the thread's copies of the chunk", *kCopied = "the chunk is copied";
  using GridExchange::await;

  FUSEDRNN_DEVICE ChunkedExchange(const CellSpec& cell, const Role& role, const Sizes& sizes, const Plan& plan,
                                  Pass pass, Stage stage, const Product& product, int rows, const Workspace& workspace,
                                  char* operand, Mbarrier*)
      : GridExchange(cell, role, sizes, plan, pass, stage, product, rows, workspace, nullptr, nullptr),
        chunks_(role, plan, product.operand, rows, operand) {
    if (senders_ > plan.blocks) senders_ = plan.blocks;  // each has several of the tiles
  }

  // use(chunk, operand) for every chunk of the operand, which lies in shared memory meanwhile.
  template <class F>
  FUSEDRNN_DEVICE void for_each_chunk(const F& use) {
    chunks_.for_each(*this, use);
  }

  FUSEDRNN_DEVICE void fetch(int row, int k, Quad& to) const {
    const int byte = k * static_cast<int>(sizeof(Quad));
    if (byte < row_bytes_) {
      copy_async(&to, received() + static_cast<int64_t>(row) * row_bytes_ + byte);
    } else {
      to = Quad{{0, 0, 0, 0}};
    }
  }

 private:
  OperandChunks chunks_;
};

// Through distributed shared memory. Each 16 bytes are pushed to every block of the cluster, the own one included, and
// counted by the mbarrier of the buffer there, on which the receivers wait. Warps without a tile do not take part: the
// others could get two mbarrier phases ahead of them, where the parity is ambiguous. Blocks without a tile are not sent
// to, for the same reason.
class ClusterExchange {
 public:
  static constexpr Exchange kExchange = Exchange::kCluster;
  static constexpr bool kIsChunked = false, kIdleWarpsTakePart = false;

  FUSEDRNN_DEVICE ClusterExchange(const CellSpec&, const Role& role, const Sizes&, const Plan& plan, Pass, Stage,
                                  const Product& product, int rows, const Workspace&, char* operand, Mbarrier* barriers)
      : role_(role),
        thread_(kept(thread_index())),
        stride_(kept(product.operand.stride())),
        buffer_bytes_(kept(rows * product.operand.stride())),
        operand_bytes_(rows * product.operand.row_bytes()),
        receivers_(blocks_with(product.tiles, plan)),
        first_receiver_(role.rank % receivers_),
        operand_(operand),
        barriers_(barriers) {}

  FUSEDRNN_DEVICE void start() {
    if (thread_index() == 0) {
      init_mbarrier(barriers_, 1);
      init_mbarrier(barriers_ + 1, 1);
    }
  }

  static FUSEDRNN_DEVICE void started() { sync_cluster("the barriers of the cluster are ready"); }

  template <int kPieces, class F>
  FUSEDRNN_DEVICE void send(const F& piece) {
    const int buffer = static_cast<int>(sent_ & 1);
    char* operand = operand_ + buffer * buffer_bytes_;
    const auto push_to = [&](int receiver, const Quad& quad, int at) {
      int rank = first_receiver_ + receiver;  // each begins with a different one
      if (rank >= receivers_) rank -= receivers_;
      push(operand + at, barriers_ + buffer, rank, quad);
    };
    int row, byte;
    if constexpr (kPieces <= kWarp) {  // a lane has one piece, for every so many-th receiver
      constexpr int kAtOnce = kWarp / kPieces, kTimes = kMostBlocks / kAtOnce;
      const Quad quad = piece(role_.lane % kPieces, row, byte);
      const int first = role_.lane / kPieces, at = row * stride_ + byte;
      if (receivers_ == kMostBlocks) {  // a straight line
        FUSEDRNN_UNROLL for (int k = 0; k < kTimes; ++k) push_to(first + k * kAtOnce, quad, at);
      } else if (receivers_ == kMostBlocks / 2 && kTimes % 2 == 0) {
        FUSEDRNN_UNROLL for (int k = 0; k < kTimes / 2; ++k) push_to(first + k * kAtOnce, quad, at);
      } else {
        FUSEDRNN_NO_UNROLL for (int k = first; k < receivers_; k += kAtOnce) push_to(k, quad, at);
      }
    } else {
      FUSEDRNN_NO_UNROLL for (int k = role_.lane; k < kPieces * receivers_; k += kWarp) {
        const Quad quad = piece(k % kPieces, row, byte);
        push_to(k / kPieces, quad, row * stride_ + byte);
      }
    }
  }

  FUSEDRNN_DEVICE void announce() { ++sent_; }

  FUSEDRNN_DEVICE const char* receive() {
    const int buffer = static_cast<int>(received_ & 1);
    const uint32_t parity = received_ >> 1 & 1;
    ++received_;
    // Bytes may come before they are expected: the phase does not end without this arrival.
    if (thread_ == 0) expect_bytes(barriers_ + buffer, operand_bytes_);
    wait([&] { return mbarrier_passed(barriers_ + buffer, parity); }, "the operand has come");
    return operand_ + buffer * buffer_bytes_;
  }

 private:
  const Role& role_;
  int thread_, stride_, buffer_bytes_, operand_bytes_, receivers_, first_receiver_;
  char* operand_;
  Mbarrier* barriers_;
  uint32_t sent_ = 0, received_ = 0;
};

// Sends what the lanes of a warp put into `staging`, [8][kChunkBytes], as column tile n of the warp's part of the
// operand; rows are kPitch bytes apart. The warp synchronises before it stages another column tile; before it stages
// another operand it has received one that contains these numbers, or depends on them.
template <int kChunkBytes, int kPitch = kChunkBytes, class Channel>
FUSEDRNN_DEVICE void send_staged(Channel& channel, const Role& role, const char* staging, int n) {
  constexpr int kQuads = kChunkBytes / static_cast<int>(sizeof(Quad));
  sync_warp("the warp's results are staged");
  channel.template send<kMmaN * kQuads>([&](int k, int& row, int& byte) {
    row = n * kMmaN + k / kQuads;
    byte = role.tile * kChunkBytes + k % kQuads * static_cast<int>(sizeof(Quad));
    const int skipped =
        kPitch == kChunkBytes ? 0 : k / kQuads * ((kPitch - kChunkBytes) / static_cast<int>(sizeof(Quad)));
    return reinterpret_cast<const Quad*>(staging)[k + skipped];
  });
}

// Zeroes the buffers of the operands that are exchanged: past the last tile they are multiplied with zeros, and
// must be finite.
FUSEDRNN_DEVICE void clear_operands(const SharedLayout& layout, char* shared, const Plan& plan) {
  for (int64_t at = layout.operands[0] + thread_index() * static_cast<int64_t>(sizeof(Quad)); at < layout.operands_end;
       at += threads(plan) * static_cast<int64_t>(sizeof(Quad))) {
    *reinterpret_cast<Quad*>(shared + at) = Quad{{0, 0, 0, 0}};
  }
}

}  // namespace fusedrnn::cuda
