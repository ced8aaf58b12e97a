// An operand in chunks of K: a block copies the chunks one after another into two buffers in shared memory, all of them
// once per turn of its tiles. With the chunks of all turns of the launch counted 0, 1, 2, ...:
//
//   wait for chunk k, the only barrier      start to copy chunk k + 1      product with chunk k
//
// Chunk k + 1 overwrites chunk k - 1, which all warps have multiplied with before that barrier. The first chunk of a
// turn is not prefetched; the last product of the previous turn used the other buffer.
#pragma once

#include "product.h"

namespace fusedrnn::cuda {

class OperandChunks {
 public:
  // shared: two buffers [rows][chunk_stride()]. All threads of the block take part in every call.
  FUSEDRNN_DEVICE OperandChunks(const Role& role, const Plan& plan, const Operand& operand, int rows, char* shared)
      : role_(role),
        blocks_(operand.blocks()),
        chunk_blocks_(plan.chunk_blocks),
        count_(chunks(operand, plan)),
        rows_(rows),
        stride_(chunk_stride(plan)),
        warps_(plan.tiles * plan.splits),
        shared_(shared) {}

  // Calls use(chunk, operand) for every chunk while it is in shared memory. source.fetch(row, k, to) starts the copy of
  // quad k of a row, or writes zeros beyond the row's end, where the weights are zero. With Source::kRounds a copied
  // quad is replaced by Source::rounded() of it. kCopies and kCopied name the waits.
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
