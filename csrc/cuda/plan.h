// The layout of a launch: groups, blocks, warps, and the contents of shared memory. Kernels do not check their plan;
// call invalid() before a launch. All of this is arithmetic on sizes, for the host and for kernels.
//
// A group of blocks owns one direction and takes slices of batch rows, one after another. Inside of a group, a warp has
// a tile of output rows of the recurrent product (hidden units with their maps in the forward, units in the backward)
// and a part of its inner dimension K. The operand of the product, h or da of all units for the rows of the slice, is
// exchanged between the blocks at every step. A projection adds a second product per step, with an operand of its own,
// m or dh, whose tiles are spread over the same warps. With fuse_input the forward has a product with w_ih before the
// recurrent one, with the same tiles; its operand is x, which is not exchanged.
//
// If an operand exceeds shared memory, or there are more tiles than warps, the plan is chunked: operands come to shared
// memory one chunk of K after another, and a warp computes several tiles in turn in every step.
//
// K counts in bytes: 64 bytes of an operand's row are one K block, which is two matrix instructions in any dtype.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cell.h"
#include "device.h"

namespace fusedrnn::cuda {

enum class Pass : int32_t { kForward, kBackward };
enum class Stage : int32_t {
  kRecurrent,   // with w_hh
  kProjection,  // with w_hr
  kInput,       // with w_ih; in the forward, where plan.fuse_input
};
constexpr int kStages = 3;
enum class Exchange : int32_t {
  kGrid,     // through the second-level cache, announced by flags; all blocks of a launch run at the same time
  kCluster,  // a group is a cluster: into the peers' shared memory, announced on their mbarriers; sm_90
  kChunked,  // as kGrid, with operands that come in chunks and tiles that take turns, and all weights streamed: any H
  kScatter,  // a group is a cluster, whose blocks exchange partial sums of dh: scatter.h; backward, no projection
};
enum class Math : int32_t { kBFloat16, kFloat16, kTf32, kFloat32, kFloat64 };

struct Sizes {
  int64_t T, B, H, P, D;
  int64_t projected;  // 1 where there is a w_hr; else 0, and P = H
  int64_t I;          // of x; read only where the launch takes it
};

struct Plan {
  Exchange exchange;
  Math math;
  int32_t blocks;         // of a group; of a cluster 2, 4, 8 or 16
  int32_t tiles;          // of a block: warps next to each other along the outputs; of kScatter, of its own units
  int32_t splits;         // warps behind each other along K: a block has 32 * tiles * splits threads; of kScatter none
                          // is behind another
  int32_t rows;           // batch rows that a group takes at a time, 8 or 16
  int32_t groups;         // of each direction
  int32_t shared_blocks;  // K blocks of each warp's weights that lie in shared memory. Before them register_blocks()
                          // lie in registers; what remains is streamed from the second-level cache at every step
  int32_t shared_projection_blocks;  // the same for w_hr, with one K block in registers; 0 without a projection
  int32_t fuse_input;                // 1 where the launch takes x and w_ih, else 0 and it takes xg; forward only
  int32_t shared_input_blocks;       // the same for w_ih, with none in registers; 0 without fuse_input
  int32_t chunk_blocks;              // of kChunked: K blocks of each warp in a chunk of the operand; else 0
  CellKind cell;
};

constexpr int kMostBlocks = 16;   // of a cluster
constexpr int kMaxThreads = 256;  // kernels are compiled for it: 255 registers a thread
constexpr int kMmaN = 8;          // batch rows of one matrix instruction
constexpr int kBlockBytes = 64;   // of a K block in a row of the operand
// Streamed weights: K blocks in flight to a warp, and slots of its ring.
constexpr int kStreamAhead = 3, kStreamSlots = 4;

FUSEDRNN_BOTH constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

FUSEDRNN_BOTH constexpr int storage_bytes(Math math) {
  return math == Math::kFloat64 ? 8 : math == Math::kTf32 || math == Math::kFloat32 ? 4 : 2;
}
FUSEDRNN_BOTH constexpr int compute_bytes(Math math) { return math == Math::kFloat64 ? 8 : 4; }
FUSEDRNN_BOTH constexpr bool uses_matrix_unit(Math math) {
  return math == Math::kBFloat16 || math == Math::kFloat16 || math == Math::kTf32;
}
FUSEDRNN_BOTH constexpr int max_rows(Math math) { return uses_matrix_unit(math) ? 2 * kMmaN : kMmaN; }

// Hidden units of a tile: 8 with their maps in the forward, 16 in the backward.
FUSEDRNN_BOTH constexpr int tile_units(Pass pass) { return pass == Pass::kForward ? 8 : 16; }
constexpr int kTileOutputs = 16;  // of the projection, in the forward, and of h in its backward

// Functions that depend on the cell take its spec: that of plan.cell, which is a compile-time constant in kernels.

// Groups of eight output rows in a tile, the segments of an accumulator: in the forward, of 8 units each of the maps
// that the product fills; 16 units or outputs in the other products.
FUSEDRNN_BOTH constexpr int segments(const CellSpec& cell, Pass pass, Stage stage) {
  if (pass == Pass::kBackward || stage == Stage::kProjection) return 2;
  return width(stage == Stage::kInput ? cell.input : cell.recurrent);
}
// Segments that are summed over the warps that split K: the maps, where another product is added to them.
FUSEDRNN_BOTH constexpr int summed_segments(const CellSpec& cell, Pass pass, Stage stage) {
  return pass == Pass::kForward && stage == Stage::kRecurrent ? cell.maps : segments(cell, pass, stage);
}

// K blocks of weights that a warp keeps in registers; each takes 4 * segments() registers of a thread. As many as fit
// into 255 registers beside the accumulators and the values prefetched for a step. A compile-time constant.
FUSEDRNN_BOTH constexpr int register_blocks(const CellSpec& cell, Exchange exchange, Pass pass, Stage stage, Math math,
                                            int rows, bool projected) {
  const bool forward = pass == Pass::kForward, narrow = rows == kMmaN;
  if (stage == Stage::kInput || exchange == Exchange::kChunked) return 0;
  const bool variant = is_variant(cell);  // which has its multipliers and peepholes in registers
  if (math == Math::kFloat64) return projected || variant ? 0 : 1;
  if (stage == Stage::kProjection) return 1;
  if (math == Math::kFloat32) return 2;
  const bool tf32 = math == Math::kTf32;
  if (projected) return !forward ? 8 : variant && !tf32 ? 4 : 5;
  if (!forward) return narrow ? 10 : tf32 || variant ? 1 : 3;
  if (variant) return !narrow ? 1 : cell.maps == 3 ? 6 : 4;
  const int of_four = !narrow ? 2 : tf32 ? 5 : 6, of_tile = segments(cell, pass, stage);
  // Maps of one product alone take registers as well.
  if (cell.maps > of_tile) return narrow ? of_four + 1 : of_four - 1;
  const int blocks = of_four * 4 / of_tile, most = narrow ? 8 : 4;
  return blocks < most ? blocks : most;
}

// Whether the blocks of a group gather an operand, h or da. In a cluster the backward without a projection does not:
// of what it could exchange da is the less of an RNN in 16 bits alone, and kScatter takes its place.
FUSEDRNN_BOTH constexpr bool gathers(Pass pass, Exchange exchange, bool projected) {
  return exchange != Exchange::kScatter && (exchange != Exchange::kCluster || pass == Pass::kForward || projected);
}
FUSEDRNN_BOTH constexpr bool is_cluster(const Plan& plan) {
  return plan.exchange == Exchange::kCluster || plan.exchange == Exchange::kScatter;
}

// kScatter only. splits: warps for each tile of 16 units that a block owns.
constexpr int kStepsCopied = 4;  // ahead of a step
FUSEDRNN_BOTH constexpr int most_scatter_tiles(Math math, int rows) {
  return math == Math::kFloat64 || (math == Math::kTf32 && rows != kMmaN) ? 2 : 4;
}
FUSEDRNN_BOTH constexpr int scatter_splits(int tiles) { return tiles <= 2 ? 4 : 2; }
// K blocks of a block's part of da that is multiplied with w_hh; the last one is padded with zeros.
FUSEDRNN_BOTH constexpr int scatter_blocks(const CellSpec& cell, Math math, int tiles) {
  return (tiles * 16 * width(cell.recurrent) * storage_bytes(math) + kBlockBytes - 1) / kBlockBytes;
}
// Tiles of dh of which a warp has the weights in registers, 8 registers for each K block.
FUSEDRNN_BOTH constexpr int scatter_outputs_in_registers(const CellSpec& cell, Math math, int rows, int tiles) {
  const int wide = math == Math::kTf32 || tiles > 2 ? 0 : 8;
  const int less = is_variant(cell) && math == Math::kTf32 ? 4 : 0;
  const int on_matrix_unit = rows != kMmaN ? wide : (tiles <= 2 ? 16 : 12) - less;
  const int blocks = uses_matrix_unit(math) ? on_matrix_unit : math == Math::kFloat32 ? 8 : 0;
  const int outputs = blocks / scatter_blocks(cell, math, tiles);
  return outputs < 4 ? outputs : 4;
}
// The inputs that the backward prefetches: saved values, carry, dy and dc; and the row stride in bytes of `units` of
// them.
FUSEDRNN_BOTH constexpr int copied_arrays(const CellSpec& cell) {
  return cell.saved + (cell.carry != Carry::kNone ? 1 : 0) + 1 + (has_cell_state(cell) ? 1 : 0);
}
FUSEDRNN_BOTH constexpr int copied_row(const CellSpec& cell, Math math, int units) {
  return copied_arrays(cell) * units * storage_bytes(math) + static_cast<int>(sizeof(Quad));
}

FUSEDRNN_BOTH constexpr int threads(const Plan& plan) { return kWarp * plan.tiles * plan.splits; }
FUSEDRNN_BOTH constexpr int64_t launched_blocks(const Sizes& sizes, const Plan& plan) {
  return sizes.D * plan.groups * plan.blocks;
}

// Stride in bytes of rows of `blocks` K blocks in shared memory: an odd multiple of 64, so that eight lanes that read
// 16 bytes each from two rows have no bank conflicts.
FUSEDRNN_BOTH constexpr int row_stride(int blocks) { return kBlockBytes * (blocks | 1); }

// The operand of a product: for each batch row what the tiles put next to each other, 16-byte aligned.
struct Operand {
  int64_t tiles;    // of those who send it, over all blocks of the group; of x, its quads
  int chunk_bytes;  // that a tile adds to a row

  FUSEDRNN_BOTH constexpr int row_bytes() const { return static_cast<int>(tiles) * chunk_bytes; }
  FUSEDRNN_BOTH constexpr int blocks() const { return (row_bytes() + kBlockBytes - 1) / kBlockBytes; }
  FUSEDRNN_BOTH constexpr int stride() const { return row_stride(blocks()); }  // in shared memory, all of it
};

// The first K block of a split, of so many K blocks; of the split behind the last one, their number.
// Divides in the type of `blocks`.
template <class Integer>
FUSEDRNN_BOTH constexpr int first_block(Integer blocks, int split, int splits) {
  return static_cast<int>(split * blocks / splits);
}

// A chunk of an operand is as many K blocks of each split, next to each other in shared memory; the last ones have
// fewer.
FUSEDRNN_BOTH constexpr int chunk_stride(const Plan& plan) { return row_stride(plan.splits * plan.chunk_blocks); }
FUSEDRNN_BOTH constexpr int chunks(const Operand& operand, const Plan& plan) {
  const int longest = (operand.blocks() + plan.splits - 1) / plan.splits;
  return (longest + plan.chunk_blocks - 1) / plan.chunk_blocks;
}

// One of the products of a step.
struct Product {
  Operand operand;
  int64_t tiles;  // of its outputs
  int segments;

  FUSEDRNN_BOTH constexpr int64_t fragment_quads() const { return int64_t{segments} * kWarp; }
  // Size of the packed weights of one direction.
  FUSEDRNN_BOTH constexpr int64_t packed_quads() const { return tiles * operand.blocks() * fragment_quads(); }
};

// A kernel knows whether there is a projection when it is compiled.
FUSEDRNN_BOTH constexpr Product product(const CellSpec& cell, Pass pass, Stage stage, const Sizes& sizes, Math math,
                                        bool projected) {
  const int bytes = storage_bytes(math), of_tile = segments(cell, pass, stage);
  if (stage == Stage::kInput) {
    return {{ceil_div(sizes.I * bytes, sizeof(Quad)), sizeof(Quad)}, ceil_div(sizes.H, tile_units(pass)), of_tile};
  }
  const int64_t units = ceil_div(sizes.H, tile_units(pass)), outputs = ceil_div(sizes.P, kTileOutputs);
  const Operand h = {outputs, kTileOutputs * bytes};
  if (pass == Pass::kForward) {
    const Operand m = {units, tile_units(pass) * bytes};  // and h, without a projection
    if (stage == Stage::kProjection) return {m, outputs, of_tile};
    return {projected ? h : m, units, of_tile};
  }
  if (stage == Stage::kProjection) return {h, units, of_tile};
  return {{units, tile_units(pass) * width(cell.recurrent) * bytes}, projected ? outputs : units, of_tile};
}
FUSEDRNN_BOTH constexpr Product product(const CellSpec& cell, Pass pass, Stage stage, const Sizes& sizes, Math math) {
  return product(cell, pass, stage, sizes, math, sizes.projected != 0);
}
// The product with its operand in the layout that weights are packed for: with kScatter each block's part of da begins
// with a K block.
FUSEDRNN_BOTH constexpr Product packed_product(Pass pass, Stage stage, const Sizes& sizes, const Plan& plan) {
  const CellSpec cell = spec_of(plan.cell);
  Product packed = product(cell, pass, stage, sizes, plan.math);
  if (plan.exchange == Exchange::kScatter) {
    packed.operand = {ceil_div(packed.operand.tiles, plan.tiles),
                      scatter_blocks(cell, plan.math, plan.tiles) * kBlockBytes};
  }
  return packed;
}

// Whether a launch has that stage. Stages whose operand is exchanged come first.
FUSEDRNN_BOTH constexpr bool has(Stage stage, const Sizes& sizes, const Plan& plan) {
  return stage == Stage::kRecurrent || (stage == Stage::kProjection ? sizes.projected : plan.fuse_input) != 0;
}
FUSEDRNN_BOTH constexpr int exchanges(const Sizes& sizes) { return sizes.projected != 0 ? 2 : 1; }

// K blocks of weights of that stage that lie in shared memory.
FUSEDRNN_BOTH constexpr int shared_blocks(Stage stage, const Plan& plan) {
  return stage == Stage::kRecurrent    ? plan.shared_blocks
         : stage == Stage::kProjection ? plan.shared_projection_blocks
                                       : plan.shared_input_blocks;
}

// K blocks of weights that a warp, the one with the longest part of K, loads again at every step. Each is
// fragment_quads() * 16 bytes.
FUSEDRNN_BOTH constexpr int64_t streamed_blocks(const CellSpec& cell, Pass pass, Stage stage, const Sizes& sizes,
                                                const Plan& plan) {
  if (!has(stage, sizes, plan)) return 0;
  if (plan.exchange == Exchange::kScatter) {
    const int64_t blocks = scatter_blocks(cell, plan.math, plan.tiles);
    const int64_t outputs = ceil_div(ceil_div(sizes.H, 16), plan.tiles * plan.splits);
    const int64_t resident =
        scatter_outputs_in_registers(cell, plan.math, plan.rows, plan.tiles) + plan.shared_blocks / blocks;
    return outputs > resident ? (outputs - resident) * blocks : 0;
  }
  const int64_t resident =
      register_blocks(cell, plan.exchange, pass, stage, plan.math, plan.rows, sizes.projected != 0) +
      shared_blocks(stage, plan);
  const int64_t all = ceil_div(product(cell, pass, stage, sizes, plan.math).operand.blocks(), plan.splits);
  return all > resident ? all - resident : 0;
}

// Size of the rings of all warps of a block.
FUSEDRNN_BOTH constexpr int64_t ring_bytes(const CellSpec& cell, Pass pass, Stage stage, const Sizes& sizes,
                                           const Plan& plan) {
  if (streamed_blocks(cell, pass, stage, sizes, plan) == 0) return 0;
  return int64_t{kStreamSlots} * plan.tiles * plan.splits *
         product(cell, pass, stage, sizes, plan.math).fragment_quads() * static_cast<int64_t>(sizeof(Quad));
}

// Blocks that so many tiles need, one to a warp; in a cluster, some may have none.
FUSEDRNN_BOTH constexpr int blocks_with(int64_t tiles, const Plan& plan) {
  return static_cast<int>(ceil_div(tiles, plan.tiles));
}

// How many of `tiles` one warp computes: its first one, and every plan.blocks * plan.tiles-th after it.
FUSEDRNN_BOTH constexpr int turns(int64_t tiles, const Plan& plan) {
  const int warps = plan.blocks * plan.tiles;
  return (static_cast<int>(tiles) + warps - 1) / warps;
}

// Numbers of a tile that a thread saves from step to step: the carry and h, or their gradients.
FUSEDRNN_BOTH constexpr int state_numbers(Pass pass, int rows, bool projected) {
  return rows / kMmaN * (pass == Pass::kBackward ? 8 : projected ? 6 : 4);
}

// Whether what a step takes beside the operand is copied ahead, and what it leaves is stored 16 bytes at a time: of the
// forward and of a backward that gathers. In float64 it would take too many registers.
FUSEDRNN_BOTH constexpr bool moves_in_runs(Exchange exchange, Math math, bool projected) {
  return exchange != Exchange::kChunked && math != Math::kFloat64 && !projected;
}
// If so: steps in flight or in use; and in the forward, row strides in bytes of a tile of xg and of a step's outputs
// (saved values, c and h), padded against bank conflicts.
constexpr int kStepsAhead = 3;
FUSEDRNN_BOTH constexpr int xg_row(const CellSpec& cell, Math math) {
  return cell.gates * 8 * compute_bytes(math) + 16;
}
FUSEDRNN_BOTH constexpr int stored_row(const CellSpec& cell, Math math) {
  return (cell.saved + (has_cell_state(cell) ? 2 : 1)) * 8 * storage_bytes(math) + 16;
}
// All of these buffers, for a tile and eight rows.
FUSEDRNN_BOTH constexpr int step_bytes(const CellSpec& cell, Pass pass, Math math) {
  return kMmaN * (pass == Pass::kForward ? kStepsAhead * xg_row(cell, math) + stored_row(cell, math)
                                         : kStepsAhead * copied_row(cell, math, tile_units(pass)));
}
// Backward: bytes of a row of staged da of `units` units. The maps that are multiplied with w_hh come first.
FUSEDRNN_BOTH constexpr int staged_bytes(const CellSpec& cell, Math math, int units) {
  return units * cell.maps * storage_bytes(math);
}
// kScatter: the same in K blocks, in which the other maps are rounded up to a whole one as well.
FUSEDRNN_BOTH constexpr int scatter_staged_blocks(const CellSpec& cell, Math math, int tiles) {
  const int others = tiles * 16 * (cell.maps - width(cell.recurrent)) * storage_bytes(math);
  return scatter_blocks(cell, math, tiles) + (others + kBlockBytes - 1) / kBlockBytes;
}

// Offsets into a block's shared memory, of each stage.
struct SharedLayout {
  int64_t weights[kStages];  // [warp][K blocks in shared memory][segment][lane] quads
  int64_t rings[kStages];    // [warp][kStreamSlots][segment][lane] quads, where weights are streamed
  int64_t
      operands[kStages];  // [1 or 2][rows] of Operand::stride(); of x always 2. kChunked: [2][rows] of chunk_stride()
  int64_t operands_end;   // those that are exchanged lie next to each other; x is behind them
  int64_t partial[kStages];   // [tile][split][rows / 8][segment][2][lane] of A, where K is split; none of x
  int64_t staging;            // [warp][8] of the longer chunk
  int64_t warp_staging;       // bytes of it for one warp
  int64_t steps;              // [tile][rows / 8] of step_bytes()
  int64_t barriers[kStages];  // two Mbarriers; none of x
  int64_t bytes;
};

FUSEDRNN_BOTH constexpr SharedLayout shared_layout(const CellSpec& cell, Pass pass, const Sizes& sizes,
                                                   const Plan& plan) {
  const int64_t warps = plan.tiles * plan.splits;
  SharedLayout at{};
  int64_t end = 0;
  if (plan.exchange == Exchange::kScatter) {
    const int columns = plan.rows / kMmaN;
    at.weights[0] = 0;
    end += warps * plan.shared_blocks * 2 * kWarp * static_cast<int64_t>(sizeof(Quad));
    at.rings[0] = end;
    end += ring_bytes(cell, pass, Stage::kRecurrent, sizes, plan);
    at.operands[0] = end;  // da, twice
    end += int64_t{2} * plan.rows * row_stride(scatter_staged_blocks(cell, plan.math, plan.tiles));
    at.partial[0] = end;  // [2][blocks] of dh of the block's units
    end += int64_t{2} * plan.blocks * plan.tiles * columns * 128 * compute_bytes(plan.math);
    at.staging = end;  // what is copied ahead
    end += int64_t{kStepsCopied} * plan.rows * copied_row(cell, plan.math, 16 * plan.tiles);
    at.barriers[0] = end;
    at.bytes = end + 2 * static_cast<int64_t>(sizeof(Mbarrier));
    return at;
  }
  // Loops of a constant count: on the device, an index that is not known would put `at` into local memory.
  for (int k = 0; k < kStages; ++k) {
    const Stage stage = static_cast<Stage>(k);
    if (!has(stage, sizes, plan)) continue;
    const Product each = product(cell, pass, stage, sizes, plan.math);
    at.weights[k] = end;
    end += warps * shared_blocks(stage, plan) * each.fragment_quads() * static_cast<int64_t>(sizeof(Quad));
    at.rings[k] = end;
    end += ring_bytes(cell, pass, stage, sizes, plan);
    if (each.operand.chunk_bytes * kMmaN > at.warp_staging) at.warp_staging = each.operand.chunk_bytes * kMmaN;
  }
  if (pass == Pass::kBackward) {
    const int64_t all = int64_t{kMmaN} * staged_bytes(cell, plan.math, tile_units(pass));
    if (all > at.warp_staging) at.warp_staging = all;
  }
  for (int k = 0; k < kStages; ++k) {
    const Stage stage = static_cast<Stage>(k);
    at.operands[k] = end;
    if (!has(stage, sizes, plan)) continue;
    const int64_t buffers = plan.exchange != Exchange::kGrid || stage == Stage::kInput ? 2 : 1;
    end += buffers * plan.rows *
           (plan.exchange == Exchange::kChunked ? chunk_stride(plan)
                                                : product(cell, pass, stage, sizes, plan.math).operand.stride());
  }
  at.operands_end = at.operands[static_cast<int>(Stage::kInput)];
  for (int k = 0; k < kStages; ++k) {
    at.partial[k] = end;
    if (k >= exchanges(sizes) || plan.splits == 1) continue;
    end += warps * (plan.rows / kMmaN) * summed_segments(cell, pass, static_cast<Stage>(k)) * 2 * kWarp *
           compute_bytes(plan.math);
  }
  at.staging = end;
  end += warps * at.warp_staging;
  at.steps = end;
  if (moves_in_runs(plan.exchange, plan.math, sizes.projected != 0)) {
    end += plan.tiles * (plan.rows / kMmaN) * step_bytes(cell, pass, plan.math);
  }
  for (int k = 0; k < kStages; ++k) {
    at.barriers[k] = end;
    if (k < exchanges(sizes)) end += 2 * static_cast<int64_t>(sizeof(Mbarrier));
  }
  at.bytes = end;
  return at;
}

FUSEDRNN_BOTH constexpr int64_t shared_bytes(Pass pass, const Sizes& sizes, const Plan& plan) {
  return shared_layout(spec_of(plan.cell), pass, sizes, plan).bytes;
}

// Size of Workspace::exchanged for one launch: the buffers of one exchange after the other, then the states that
// threads save where they compute several tiles in turn.
FUSEDRNN_BOTH constexpr int64_t exchanged_bytes(const CellSpec& cell, Pass pass, Stage stage, const Sizes& sizes,
                                                const Plan& plan) {
  if (is_cluster(plan) || static_cast<int>(stage) >= exchanges(sizes)) return 0;
  return sizes.D * plan.groups * 2 * plan.rows * product(cell, pass, stage, sizes, plan.math).operand.row_bytes();
}
FUSEDRNN_BOTH constexpr int64_t exchanged_bytes(const CellSpec& cell, Pass pass, const Sizes& sizes, const Plan& plan) {
  return exchanged_bytes(cell, pass, Stage::kRecurrent, sizes, plan) +
         exchanged_bytes(cell, pass, Stage::kProjection, sizes, plan);
}
FUSEDRNN_BOTH constexpr int64_t kept_bytes(Pass pass, const Sizes& sizes, const Plan& plan) {
  if (plan.exchange != Exchange::kChunked) return 0;
  return launched_blocks(sizes, plan) * threads(plan) * turns(ceil_div(sizes.H, tile_units(pass)), plan) *
         state_numbers(pass, plan.rows, sizes.projected != 0) * compute_bytes(plan.math);
}
FUSEDRNN_BOTH constexpr int64_t workspace_bytes(Pass pass, const Sizes& sizes, const Plan& plan) {
  return exchanged_bytes(spec_of(plan.cell), pass, sizes, plan) + kept_bytes(pass, sizes, plan);
}
FUSEDRNN_BOTH constexpr int64_t flags(const Sizes& sizes, const Plan& plan) {
  return is_cluster(plan) ? 0 : exchanges(sizes) * launched_blocks(sizes, plan);
}

// Size of the packed weights of all directions.
FUSEDRNN_BOTH constexpr int64_t packed_bytes(Pass pass, Stage stage, const Sizes& sizes, const Plan& plan) {
  return sizes.D * packed_product(pass, stage, sizes, plan).packed_quads() * static_cast<int64_t>(sizeof(Quad));
}

// Why no device can run this problem by the plan, or null. Shared memory, clusters and the occupancy of the device are
// checked by occupancy() (launch.h).
FUSEDRNN_BOTH constexpr const char* invalid(Pass pass, const Sizes& sizes, const Plan& plan) {
  if (sizes.T < 1 || sizes.B < 1 || sizes.H < 1 || sizes.D < 1 || sizes.D > 2)
    return "sizes must be positive, D 1 or 2";
  if (sizes.T > INT32_MAX || sizes.H > (1 << 20)) return "T must be below 2^31 and H at most 2^20";
  if (sizes.projected == 0 && sizes.P != sizes.H) return "P must be H without a projection";
  if (sizes.P < 1 || sizes.P > sizes.H) return "P must be 1 to H";
  const CellSpec cell = spec_of(plan.cell);
  if (sizes.projected != 0 && !cell.projects) return "the cell has no projection";
  if (plan.blocks < 1 || plan.tiles < 1 || plan.splits < 1 || plan.groups < 1 || plan.shared_blocks < 0 ||
      plan.shared_projection_blocks < 0 || plan.shared_input_blocks < 0 || plan.chunk_blocks < 0) {
    return "counts must be positive";
  }
  if (plan.fuse_input != 0 && plan.fuse_input != 1) return "fuse_input must be 0 or 1";
  if (plan.fuse_input == 0 && plan.shared_input_blocks != 0) return "shared_input_blocks without fuse_input";
  if (plan.fuse_input != 0 && pass == Pass::kBackward) return "fuse_input is of the forward alone";
  if (plan.fuse_input != 0 && (sizes.I < 1 || sizes.I > (1 << 20))) return "I must be 1 to 2^20";
  if (plan.tiles > kMaxThreads || plan.splits > kMaxThreads || threads(plan) > kMaxThreads) {
    return "a block has too many threads";
  }
  if (plan.rows != kMmaN && plan.rows != 2 * kMmaN) return "rows must be 8 or 16";
  if (plan.rows > max_rows(plan.math)) return "rows must be 8 where the matrix unit is not used";
  if (plan.rows != kMmaN && sizes.projected != 0) return "rows must be 8 with a projection";
  if (launched_blocks(sizes, plan) > INT32_MAX) return "too many blocks";
  if (plan.exchange == Exchange::kChunked) {
    if (plan.rows != max_rows(plan.math) && sizes.projected == 0) return "in chunks, rows must be as many as can be";
    if (plan.blocks > (1 << 20)) return "too many blocks";
    if (plan.shared_blocks != 0 || plan.shared_projection_blocks != 0 || plan.shared_input_blocks != 0) {
      return "in chunks, all weights are streamed";
    }
    if (plan.chunk_blocks < 1 || plan.chunk_blocks > (1 << 12)) return "chunk_blocks must be 1 to 2^12";
    return nullptr;
  }
  if (plan.chunk_blocks != 0) return "chunk_blocks without chunks";
  if (int64_t{plan.blocks} * plan.tiles < ceil_div(sizes.H, tile_units(pass))) return "the tiles do not cover H";
  if (plan.exchange == Exchange::kGrid) return nullptr;
  // Stores to other blocks ("st.async", PTX ISA) are defined for clusters of two or more.
  if (plan.blocks < 2 || plan.blocks > kMostBlocks || (plan.blocks & (plan.blocks - 1)) != 0) {
    return "a cluster has 2, 4, 8 or 16 blocks";
  }
  if (plan.exchange == Exchange::kScatter) {
    if (pass != Pass::kBackward || sizes.projected != 0) return "only the backward without a projection scatters";
    if (plan.splits != scatter_splits(plan.tiles)) {
      return "a block that scatters has 4 warps for each of 1 or 2 tiles, or 2 for each of 3 or 4";
    }
    if (plan.tiles > most_scatter_tiles(plan.math, plan.rows))
      return "a block that scatters has up to 4 tiles, in float64 and in TF32 with 16 rows up to 2";
    if (plan.shared_blocks % scatter_blocks(cell, plan.math, plan.tiles) != 0) {
      return "a block that scatters has the weights of whole tiles in shared memory";
    }
    return nullptr;
  }
  if (!gathers(pass, plan.exchange, sizes.projected != 0)) return "without a projection, a cluster scatters";
  for (int k = 0; k < exchanges(sizes); ++k) {  // what a phase of an mbarrier can count
    const Operand operand = product(cell, pass, static_cast<Stage>(k), sizes, plan.math).operand;
    if (plan.rows * operand.row_bytes() >= (1 << 20)) return "the operand is too large for an mbarrier";
  }
  return nullptr;
}

}  // namespace fusedrnn::cuda
