// Plain parameter structs of the CPU kernels: pointers and sizes, no torch.
//
// Letters: T time, B batch, H hidden, P projection (P = H without one), D directions, N rows of x: T * B, one for each
// sequence and step, or the rows of a PackedSequence. `gates`, `maps` and `saved` are the counts of a cell
// (csrc/cells/spec.h); `input_maps` counts the maps with an input product. S is the storage dtype, A the arithmetic
// dtype: float for bfloat16, float16 and float, double for double. All tensors are contiguous and row-major in the
// shape beside them. Pointers must not alias unless stated. Where it says "or null", null means zeros for an input and
// "not wanted" for an output.
//
// Forward works on chunks of hidden units. A panel (panel.h) has four vectors, and the maps of a chunk fill whole
// panels: a chunk is one block of `lanes` units if the number of maps is a multiple of 4, otherwise four blocks, so
// that each map fills a panel. "[chunks][maps]" below is [ceil(H / (blocks * lanes))][maps][blocks][lanes].
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "../cells/spec.h"

namespace fusedrnn {

// Number of blocks of `width` outputs; the last one may be partial.
static constexpr int64_t blocks_of(int64_t outputs, int64_t width) { return (outputs + width - 1) / width; }

// Blocks of `lanes` units in a chunk, for the number of maps of a product.
static constexpr int64_t chunk_blocks(int64_t maps) { return maps % 4 == 0 ? 1 : 4; }

// Whether a row of saved values is laid out [blocks][saved][lanes]; otherwise [saved][H]. See SavedOrder.
static constexpr bool saved_in_blocks(int64_t H, int64_t saved, int64_t lanes) {
  return H % lanes == 0 && (saved == 1 || chunk_blocks(saved) == 1);
}

// Storage of 16-bit floating point numbers.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

enum class Dtype : int { kFloat32, kFloat64, kBFloat16, kFloat16, kCount };

// Operand format of the matrix products, except those of few rows and steps.
enum class Operands : int {
  kNumbers,  // single numbers of A
  kPairs,    // pairs of adjacent numbers of S, for dot product instructions
  kTiles,    // tiles of 16 pairs by 16 rows, for matrix instructions
};
// K of such a product is padded with zeros to a multiple of this.
constexpr int64_t inputs_at_a_time(Operands operands) {
  return operands == Operands::kTiles ? 32 : operands == Operands::kPairs ? 2 : 1;
}

struct Sizes {
  int64_t T, B, N, I, H, P, D;
  bool projected;  // whether there is a w_hr; else P = H
};

// Which steps exist, where their rows are, and where the state is reset.
struct Sequence {
  const int64_t* lengths;  // [B] or null (all T); values outside 0..T count as the nearest
  // [T + 1] or null. Not null: of a PackedSequence, whose lengths never grow from sequence to sequence. The rows of
  // step t are [offsets[t], offsets[t + 1]), those of the first sequences, and steps that do not exist have none.
  const int64_t* offsets;
  const uint8_t* reset;  // [T][B] or null
};

// Kinds of noise: see NOISE in fusedrnn/cells/spec.py.
enum class Noise : int { kH, kC, kG, kR, kCount };

// The multipliers of each, A [N][D][W], or [B][D][W] where those of a sequence are the same at all steps; or null. W is
// P of kR, which is always the same at all steps, and else H.
struct NoiseParams {
  const void* of[static_cast<size_t>(Noise::kCount)];
  bool by_sequence;
};

// The division of a launch's work among workers, which may or may not run concurrently.
struct Team {
  enum class Split : int {
    kRows,   // each worker owns batch rows and runs the whole sequence without synchronisation
    kUnits,  // each worker owns hidden units; barrier after every step
  };
  Split split;
  int workers;
  // For kUnits, see team.h: 1 + D * ceil(H / lanes) zeroed cache lines of 64 bytes, aligned to 64.
  void* lines;
};

// The weights of a product's maps, S w[gates * H][columns].
struct MapWeights {
  const void* w;
  const MapWindow* maps;
  int64_t H;
  int64_t skips = 0;  // numbers before those of the maps

  int64_t numbers() const { return (maps->end - maps->begin) * H; }
};

// The rows of w that the numbers of da are multiplied with, map after map. Numbers are asked for in ascending order:
// the map is looked up only where the last one ends.
class MapRows {
 public:
  explicit MapRows(const MapWeights& weights) : weights_(weights) {}

  // The row of the k-th number, or -1 for none.
  int64_t operator()(int64_t k) {
    if (k < begin_ || k >= end_) find(k);
    return row_ < 0 ? row_ : row_ + k - begin_;
  }

 private:
  void find(int64_t k) {
    const MapWindow& maps = *weights_.maps;
    begin_ = weights_.skips;
    for (int map = maps.begin; map < maps.end; ++map, begin_ += weights_.H) {
      end_ = begin_ + weights_.H;
      row_ = maps.gates[map - maps.begin] * weights_.H;
      if (begin_ <= k && k < end_) return;
    }
    begin_ = k;
    end_ = k + 1;
    row_ = -1;
  }

  const MapWeights weights_;
  int64_t begin_ = 0, end_ = 0;  // the numbers of the map found last
  int64_t row_ = -1;             // of the first of them
};

// Weights in memory as torch has them, for a product that reads them once: a worker packs some inputs of a panel in its
// cache when it needs them.
struct UnpackedWeights {
  // Packs inputs [begin, begin + inputs) of a panel of the product, as a panel of so many inputs.
  void (*pack)(const UnpackedWeights&, int64_t panel, int64_t begin, int64_t inputs, void* to);
  MapWeights weights;
  int64_t columns;  // of w
  // Of products with maps: the chunks that it computes, whose panels come map after map.
  int64_t first_chunk = 0, chunks = 0;
};

struct ForwardParams {
  Sizes sizes;
  Sequence sequence;
  // For small N both products are dot products with the unpacked weights, and all panels are null. Otherwise the
  // weights are packed, and the input projection is computed before (xg) or in the launch (panel_ih).
  const void* x;  // S [N][I]
  // The steps of this launch, in the order of each direction; other launches run the other steps, in order.
  int64_t begin, end;
  // The input's maps of the rows of these steps, by time, for each direction; or null. With biases: b_ih, and b_hh
  // where the state's map is added to it. Where xg_rows is not 0, A [chunks][input_maps][xg_rows], of each panel a row;
  // else A [rows][input_maps * H], each row in SavedOrder, which is only where a cell saves as many values as that.
  const void* xg[2];
  int64_t xg_rows[2];
  const void* w_ih[2];   // S [gates * H][I]
  const void* w_hh[2];   // S [gates * H][P]
  const void* w_hr[2];   // S [P][H], or null
  const void* panel_ih;  // as panel_hh, of w_ih, or null
  const void* panel_hh;  // packed by Kernels::pack_maps: one buffer per direction; or null
  const void* panel_hr;  // A, packed by pack_rows from w_hr, or null
  // With panel_ih, and for step_of_batch: A [N][x_stride], or S of Operands that are pairs: x, with zeros up to the
  // inputs of a panel.
  const void* x_padded;
  int64_t x_stride;
  // Biases that are not in xg, or null: A [chunks][maps] with panel_ih, else of the maps behind the input's.
  const void* biases[2];
  const void* b_ih[2];  // S [gates * H] for each direction, or null
  const void* b_hh[2];  // S [gates * H] for each direction, or null
  const void* w_p[2];   // S [parameters * H] for each direction, or null
  NoiseParams noise;    // of a cell with parameters
  const void* h0;       // S [D][B][P] or null
  const void* c0;       // S [D][B][H] or null; this, cn and c only of a cell with a cell state
  void* y;              // S [N][D][P]
  void* hn;             // S [D][B][P]
  void* cn;             // S [D][B][H]
  void* c;              // S [N][D][H] or null
  void* saved;          // S [D][N][saved * H], each row in SavedOrder, or null; may hold xg where S is A
  // Scratch, uninitialised.
  void* h;  // A [2][D][B][P], or S [2][D][B][P, padded] of Operands that are pairs: the state entering this step and
            // the next
  void* carry;  // A [D][ceil(H / lanes)][B][lanes], where the cell has one
  void* m;      // A [D][B][H], only where projected
  Team team;
};

struct BackwardParams {
  Sizes sizes;
  Sequence sequence;
  // The rounds of this launch, counted as steps; the last one, -1, is for dh0 and dc0. Other launches run the others.
  int64_t begin, end;
  // A, packed by pack_columns from w_hh: one buffer per direction. Or null, if T = 1: then da @ w_hh is computed before
  // the last round, A [D][ceil(P / (4 * lanes))][N][4 * lanes]; or null if dh0 is null.
  const void* panel_hh;
  const void* product_hh;
  const void* panel_hr;  // A, packed by pack_columns from w_hr, or null
  const void* dy;        // S [N][D][P] or null
  const void* dhn;       // S [D][B][P] or null
  const void* dcn;       // S [D][B][H] or null
  const void* dc;        // S [N][D][H] or null
  const void* h0;        // S [D][B][P] or null
  const void* y;         // S [N][D][P]
  const void* w_p[2];    // S [parameters * H] for each direction, or null
  NoiseParams noise;     // of a cell with parameters
  const void* saved;     // S [D][N][saved * H], each row in SavedOrder
  // The carry, rounded: before the first step, and of each step. If h is the carry, these are h0 and y. Only for cells
  // with a carry.
  const void* carry0;  // S [D][B][H] or null
  const void* carry;   // S [N][D][H]
  // Gradients of the maps, map after map: A [D][N][maps * H]; or, of Operands that are pairs, S [D][N][da_stride],
  // where what lies behind the maps is zero already.
  void* da;
  int64_t da_stride;
  // The part of a row of da that is multiplied with panel_hh: a multiple of `inputs_at_a_time` from an even number on.
  // It holds the recurrent maps, and panel_hh has zeros for all else.
  int64_t da_begin, da_inputs;
  void* dh0;  // S [D][B][P] or null
  void* dc0;  // S [D][B][H] or null
  // Outputs for the weight gradients, besides da.
  void* h_in;    // [D] panels as by pack_columns from [N][P], or null: the hidden state that entered each step
  void* dh_out;  // A [D][N][P], only where projected: gradient of h_t
  void* m;       // A [D][N][H], only where projected
  // Scratch, uninitialised.
  void* dh_state;  // A [D][B][P]: gradient of the hidden state where it passes a step that does not exist
  void* dcarry;    // A [D][B][H], where the cell has a carry
  void* dh_kept;   // A [D][B][H], where there is noise of h: gradient of h_{t-1} by what was kept of it
  void* dp;        // A [D][B][parameters * H], where there are w_p: written, the sum over the steps
  Team team;
};

// c = start + a @ b, or c += a @ b, where b is packed in panels, or is weights as they lie; see gemm.h, tile_gemm.h
// and weight_rows.h. Of pairs K counts pairs.
struct GemmParams {
  int64_t M, N, K;
  const void* a = nullptr;  // [M][a_stride] numbers, or [a_rows][a_stride] where a_transposed
  int64_t a_stride = 0;     // numbers of a row; of contiguous rows of pairs all up to 2K are there
  bool a_transposed = false;
  int64_t a_rows = 0;            // where a_transposed: those that exist, of K or 2K; others count as zeros
  const void* panels = nullptr;  // packed from [N][K] or [K][N]: outputs are counted as they lie in the panels; or null
  const UnpackedWeights* unpacked = nullptr;  // where there are no panels; a is not transposed then
  void* c = nullptr;  // A [M][N]; or S where c_is_narrow; or A [N / (4 * lanes)][M][4 * lanes] where c_in_blocks
  bool c_is_narrow = false, c_in_blocks = false;
  bool accumulate = false;
  bool by_columns = false;  // workers share the columns of c, as they share hidden units, and not its rows
  // A [N, rounded up to whole half panels], of each row of c; or null. Not where accumulate.
  const void* start = nullptr;
  // Another product with the same a, M and K, which is packed once for both; or null. Workers share rows then.
  const GemmParams* also = nullptr;
};
// Inputs up to which a product is one sum along K, as that of a launch is: with more, a sum for each block of them.
constexpr int64_t kFusedInputs = 384;
constexpr int64_t kGemmRows = 192;  // of c, that a worker computes at a time: a multiple of every tile's rows

// Packs a matrix w, S [rows][columns], into panels; see panel.h. Each call packs [begin, end) of the blocks, or of the
// inputs.
using Pack = void (*)(const void* w, int64_t rows, int64_t columns, void* panel, int64_t begin, int64_t end);

// A mask of `numbers` multipliers, A to[numbers]: `value` with probability limit / 2^16, else 0. See masks.h.
struct MaskParams {
  void* to;
  int64_t numbers;
  uint64_t seed;
  uint32_t stream;  // another one has other bits
  int32_t limit;
  double value;
};
constexpr int kMaskBlock = 64;  // numbers of a mask that are drawn at a time

// The cells in csrc/cells.
enum class CellKind : int { kLstm, kGru, kRnnTanh, kRnnRelu, kLstmPeephole, kLstmCoupled, kCount };

// The kernels of a cell. A worker function is called once for every worker of the team.
struct CellKernels {
  CellSpec spec;
  void (*forward)(const ForwardParams&, int worker);
  // Biases of maps [begin, end), each with those of the products that it has: A to[chunks][maps], zero where there is
  // no unit; or to[maps * H] in SavedOrder.
  void (*add_biases)(const void* b_ih, const void* b_hh, int64_t H, int begin, int end, bool in_chunks, void* to);
  // T = 1: once step_start; then blocks of `lanes` units, [begin, end) of D * ceil(H / lanes), by dot products with the
  // weights as they lie, or chunks of them, of some rows, packed in memory of the worker; then, where projected,
  // outputs [begin, end) of D * P.
  void (*step_start)(const ForwardParams&);
  void (*step)(const ForwardParams&, int64_t begin, int64_t end);
  void (*step_of_batch)(const ForwardParams&, int64_t begin, int64_t end, int64_t row, int64_t row_end, void* own);
  void (*step_project)(const ForwardParams&, int64_t begin, int64_t end);  // or null
  void (*backward)(const BackwardParams&, int worker);
};

// The kernels of one instruction set and one dtype.
struct Kernels {
  Operands operands;  // of the products with weights and steps; those of a projection are always of numbers
  std::array<CellKernels, static_cast<size_t>(CellKind::kCount)> cells;
  // Fills h_in for inputs [begin, end) of D * inputs(N).
  void (*entering_states)(const BackwardParams&, int64_t begin, int64_t end);
  // Rows [m, m_end), at most kGemmRows, and half panels [half, half_end) of c; all of those of `also`. own:
  // gemm_scratch bytes.
  void (*gemm)(const GemmParams&, int64_t m, int64_t m_end, int64_t half, int64_t half_end, void* own);
  int64_t (*gemm_scratch)(const GemmParams&);  // bytes
  // Panels [begin, end) of the maps of a product, from w [gates * H][K].
  void (*pack_maps)(const void* w, const MapWindow& maps, int64_t H, int64_t K, void* panels, int64_t begin,
                    int64_t end);
  decltype(UnpackedWeights::pack) pack_weight_rows;  // of products with rows of weights, for UnpackedWeights
  Pack pack_rows;     // of numbers: blocks of w [N][K]: a block is 4 * lanes outputs, which are rows of w
  Pack pack_columns;  // of numbers: inputs of w [K][N]: a block is 4 * lanes outputs, which are columns of w
  // Input k of panels of `inputs` as by pack_columns, from a row of N columns, or two where operands are pairs; null
  // for zeros.
  void (*pack_input)(const void* first, const void* second, int64_t N, void* panels, int64_t inputs, int64_t k);
  // to[0..8): a fingerprint of memory; see fingerprint.h.
  void (*fingerprint)(const void* from, int64_t bytes, uint64_t* to);
  // Blocks [begin, end) of a mask.
  void (*masks)(const MaskParams&, int64_t begin, int64_t end);
  int lanes;      // numbers of type A in a vector register
  int tile_rows;  // batch rows that share one pass over a panel

  bool take_pairs() const { return operands != Operands::kNumbers; }
  // K rounded up to what panels have, and how many inputs of a panel that is.
  int64_t padded(int64_t K) const { return blocks_of(K, inputs_at_a_time(operands)) * inputs_at_a_time(operands); }
  int64_t inputs(int64_t K) const { return take_pairs() ? padded(K) / 2 : K; }
};

// One for each Dtype.
using KernelTable = std::array<Kernels, static_cast<size_t>(Dtype::kCount)>;

struct Isa {
  const char* name;
  bool (*runs_here)();
  const KernelTable* kernels;
};

// From the widest to the portable one, which runs everywhere; ends with null.
const Isa* const* instruction_sets();

}  // namespace fusedrnn
