// An operand in chunks: a block copies one chunk of it after the other into one of two buffers in shared memory, all of
// them once for every turn. With the chunks of all turns of the launch counted 0, 1, 2, ...:
//
//   chunk k is copied, the only barrier      begin to copy chunk k + 1     product with chunk k
//
// Part k + 1 takes the buffer of chunk k - 1, with which everybody has multiplied before that barrier. The first chunk
// of a turn is copied on its own: the last product of the turn before it was with the other buffer.
#pragma once

#include "product.h"

namespace fusedrnn::cuda {

class OperandChunks {
 public:
  // shared: two buffers of so many rows of chunk_stride(). All threads of the block come to all of this.
  FUSEDRNN_DEVICE OperandChunks(const Role& role, const Plan& plan, const Operand& operand, int rows, char* shared)
      : role_(role),
        blocks_(operand.blocks()),
        chunk_blocks_(plan.chunk_blocks),
        count_(chunks(operand, plan)),
        rows_(rows),
        stride_(chunk_stride(plan)),
        warps_(plan.tiles * plan.splits),
        shared_(shared) {}

  // use(chunk, operand) for every chunk, which lies in shared memory meanwhile. source.fetch(row, k, to) begins to
  // bring quad k of a row, or zeros behind the row's end, which meet weights that are zero; once it has come and where
  // Source::kRounds, it is replaced by Source::rounded() of it. kCopies and kCopied name what is waited for.
  template <class Source, class F>
  FUSEDRNN_DEVICE void for_each(const Source& source, const F& use) {
    const auto fetch = [&](int row, int k, Quad& to) { source.fetch(row, k, to); };
    for_each_quad(0, fetch);
    FUSEDRNN_NO_UNROLL for (int chunk = 0; chunk < count_; ++chunk) {
      wait_copies(Source::kCopies);
      if constexpr (Source::kRounds) {
        for_each_quad(chunk, [](int, int, Quad& copied) { copied = Source::rounded(copied); });
      }
      sync_block(Source::kCopied);
      const char* copied = buffer();
      ++copied_;
      if (chunk + 1 < count_) for_each_quad(chunk + 1, fetch);
      use(chunk, copied);
    }
  }

 private:
  FUSEDRNN_DEVICE char* buffer() const { return shared_ + static_cast<int>(copied_ & 1) * rows_ * stride_; }

  // f(row, k, quad) for quads k of the operand in that chunk, and where they lie: those that this thread copies.
  template <class F>
  FUSEDRNN_DEVICE void for_each_quad(int chunk, const F& f) const {
    constexpr int kQuads = kBlockBytes / static_cast<int>(sizeof(Quad));
    FUSEDRNN_NO_UNROLL for (int row = role_.warp; row < rows_; row += warps_) {
      FUSEDRNN_NO_UNROLL for (int split = 0; split < role_.splits; ++split) {
        const int begin = first_block(blocks_, split, role_.splits) + chunk * chunk_blocks_;
        const int left = first_block(blocks_, split + 1, role_.splits) - begin;
        const int quads = (left < chunk_blocks_ ? left : chunk_blocks_) * kQuads;
        Quad* to = reinterpret_cast<Quad*>(buffer() + row * stride_) + split * chunk_blocks_ * kQuads;
        FUSEDRNN_NO_UNROLL for (int k = role_.lane; k < quads; k += kWarp) f(row, begin * kQuads + k, to[k]);
      }
    }
  }

  const Role& role_;
  int blocks_, chunk_blocks_, count_, rows_, stride_, warps_;
  char* shared_;
  uint32_t copied_ = 0;
};

}  // namespace fusedrnn::cuda
