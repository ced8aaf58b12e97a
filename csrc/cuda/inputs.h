// x, where the launch takes it: from global memory to the shared memory of every block that multiplies with w_ih.
#pragma once

#include "operand_chunks.h"
#include "params.h"
#include "product.h"

namespace fusedrnn::cuda {

// The rows of a slice at one time step, in quads. Behind a row come zeros to the end of the K block; rows outside of
// the batch are left as they are; their results are not read.
template <class M>
class InputRows {
 public:
  using S = typename M::Storage;
  static constexpr bool kRounds = M::kRoundsOperands;
  static constexpr const char *kCopies = "the thread's copies of the chunk of the input",
                              *kCopied = "the chunk of the input is copied";

  FUSEDRNN_DEVICE InputRows(const ForwardParams& p, int direction, int64_t t, int64_t first_row)
      : slice_(static_cast<const S*>(p.x) + direction * p.x_strides.d + t * p.x_strides.t + first_row * p.x_strides.b),
        stride_(p.x_strides.b),
        I_(p.sizes.I),
        rows_(p.sizes.B - first_row),
        aligned_(are_aligned(p)) {}

  // Begins to bring quad k of a row.
  FUSEDRNN_DEVICE void fetch(int row, int k, Quad& to) const {
    if (row >= rows_) return;
    const int64_t first = int64_t{k} * kPerQuad;
    const S* from = slice_ + row * stride_ + first;
    if (aligned_ && first + kPerQuad <= I_) {
      copy_async(&to, from);
    } else {
      to = numbers(from, I_ - first);
    }
  }

  // A quad that was copied, converted to operands.
  static FUSEDRNN_DEVICE Quad rounded(const Quad& copied) { return M::operands(copied); }

 private:
  static constexpr int kPerQuad = sizeof(Quad) / sizeof(S);

  // Whether all rows begin at multiples of 16 bytes.
  static FUSEDRNN_DEVICE bool are_aligned(const ForwardParams& p) {
    const uint64_t bytes = static_cast<uint64_t>(p.x_strides.d | p.x_strides.t | p.x_strides.b) * sizeof(S);
    return (reinterpret_cast<uintptr_t>(p.x) | bytes) % sizeof(Quad) == 0;
  }

  static FUSEDRNN_DEVICE Quad numbers(const S* from, int64_t count) {
    union {
      Quad quad;
      S number[kPerQuad];
    };
    FUSEDRNN_UNROLL for (int e = 0; e < kPerQuad; ++e) number[e] = e < count ? from[e] : S{};
    return quad;
  }

  const S* slice_;
  int64_t stride_, I_, rows_;
  bool aligned_;
};

// Whole rows: the warps of a block that have a tile copy them a step ahead, into one of two buffers. With operands
// counted 0, 1, 2, ... over all steps and slices of the launch:
//
//   receive operand k, the only barrier      begin to copy operand k + 1      product with operand k
//
// Operand k + 1 takes the buffer of operand k - 1, which all warps have multiplied with before that barrier.
// kRows: of a slice.
template <class M, class C, int kRows>
class Inputs {
 public:
  // shared: two buffers of kRows rows.
  FUSEDRNN_DEVICE Inputs(const ForwardParams& p, const Role& role, char* shared)
      : p_(p), role_(role), shared_(shared) {}

  // Begins to copy x of time step t, batch rows from first_row on.
  FUSEDRNN_DEVICE void copy(int64_t t, int64_t first_row) {
    const InputRows<M> x(p_, role_.direction, t, first_row);
    for_each_quad([&](int row, int k, Quad& to) { x.fetch(row, k, to); });
  }

  // The operand in shared memory, copied before. What is copied next is the next one.
  FUSEDRNN_DEVICE const char* receive() {
    wait_copies("the thread's copies of the input");
    if constexpr (InputRows<M>::kRounds) {
      for_each_quad([](int, int, Quad& copied) { copied = InputRows<M>::rounded(copied); });
    }
    sync_threads(kBarrier, warps() * kWarp, "the input has come");
    return buffer(received_++);
  }

 private:
  static constexpr int kBarrier = 15;  // behind those of WarpProduct

  // The following are computed at each use, while other warps wait, instead of being held in registers.
  FUSEDRNN_DEVICE Product product() const {
    return cuda::product(spec_of<C>(), Pass::kForward, Stage::kInput, p_.sizes, M::kMath);
  }
  FUSEDRNN_DEVICE char* buffer(uint32_t k) const {
    return shared_ + static_cast<int>(k & 1) * kRows * product().operand.stride();
  }
  // Warps of the block that have a tile.
  FUSEDRNN_DEVICE int warps() const {
    const int64_t tiles = product().tiles - int64_t{role_.rank} * p_.plan.tiles;
    return static_cast<int>(tiles < p_.plan.tiles ? tiles : p_.plan.tiles) * p_.plan.splits;
  }

  // f(row, k, quad) for quads k of the rows of the operand that comes next: those that this thread copies.
  template <class F>
  FUSEDRNN_DEVICE void for_each_quad(const F& f) const {
    const Operand operand = product().operand;
    const int quads = operand.blocks() * (kBlockBytes / static_cast<int>(sizeof(Quad))), step = warps();
    char* at = buffer(received_);
    FUSEDRNN_NO_UNROLL for (int row = role_.warp; row < kRows; row += step) {
      FUSEDRNN_NO_UNROLL for (int k = role_.lane; k < quads; k += kWarp) {
        f(row, k, reinterpret_cast<Quad*>(at + row * operand.stride())[k]);
      }
    }
  }

  const ForwardParams& p_;
  const Role& role_;
  char* shared_;
  uint32_t received_ = 0;
};

// Rows in chunks.
template <class M, class C, int kRows>
class ChunkedInputs {
 public:
  // shared: two buffers of a chunk.
  FUSEDRNN_DEVICE ChunkedInputs(const ForwardParams& p, const Role& role, char* shared)
      : p_(p),
        role_(role),
        chunks_(role, p.plan, product(spec_of<C>(), Pass::kForward, Stage::kInput, p.sizes, M::kMath).operand, kRows,
                shared) {}

  // Makes x of time step t, batch rows from first_row on, the operand.
  FUSEDRNN_DEVICE void take(int64_t t, int64_t first_row) {
    t_ = t;
    first_row_ = first_row;
  }

  // use(chunk, operand) for every chunk of the operand, which lies in shared memory meanwhile.
  template <class F>
  FUSEDRNN_DEVICE void for_each_chunk(const F& use) {
    chunks_.for_each(InputRows<M>(p_, role_.direction, t_, first_row_), use);
  }

 private:
  const ForwardParams& p_;
  const Role& role_;
  OperandChunks chunks_;
  int64_t t_ = 0, first_row_ = 0;
};

}  // namespace fusedrnn::cuda
