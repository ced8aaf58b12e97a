// The plain structs that the CPU kernels take: pointers, sizes, nothing of torch.
//
// Letters: T time, B batch, H hidden, P projection (P = H without one), D directions, N the steps of all sequences
// together, which are rows of x: T * B of them, one for each sequence at each step, or those of a PackedSequence. S is
// the dtype tensors are stored in, A the dtype of the arithmetic: float for bfloat16, float16 and float, double for
// double. Everything is contiguous and row-major in the shape given beside it. No two pointers may alias unless it says
// so. A null pointer where "or null" stands means zeros for an input and "not wanted" for an output.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace fusedrnn {

// How many blocks of `width` outputs there are, the last one perhaps not full.
static constexpr int64_t blocks_of(int64_t outputs, int64_t width) { return (outputs + width - 1) / width; }

// Whether a row of 4H affine maps, or gates, lies block after block, as in a panel; else gate after gate. See
// GateOrder.
static constexpr bool gates_in_blocks(int64_t H, int64_t lanes) { return H % lanes == 0; }

// Storage of 16-bit floating point numbers.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

enum class Dtype : int { kFloat32, kFloat64, kBFloat16, kFloat16, kCount };

struct Sizes {
  int64_t T, B, N, I, H, P, D;
  bool projected;  // whether there is a w_hr; else P = H
};

// Which steps exist, where their rows are, and where the state is cut.
struct Sequence {
  const int64_t* lengths;  // [B] or null (all T); values outside 0..T count as the nearest
  // [T + 1] or null. Not null: of a PackedSequence, whose lengths never grow from sequence to sequence. The rows of
  // step t are [offsets[t], offsets[t + 1]), those of the first sequences, and steps that do not exist have none.
  const int64_t* offsets;
  const uint8_t* reset;  // [T][B] or null
};

// How the work of one launch is shared by workers that may or may not run at the same time.
struct Team {
  enum class Split : int {
    kRows,   // each worker owns batch rows and runs the whole sequence without meeting the others
    kUnits,  // each worker owns hidden units; all meet at every step
  };
  Split split;
  int workers;
  // For kUnits, see team.h: 1 + D * ceil(H / lanes) zeroed cache lines of 64 bytes, aligned to 64.
  void* lines;
};

struct ForwardParams {
  Sizes sizes;
  Sequence sequence;
  // Where N is large, the input's affine maps were computed before and the recurrent weights are packed; where it
  // is small, both affine maps are dot products with the weights as they are in nn.LSTM.
  const void* x;  // S [N][I]
  // The steps of this launch, counted as each direction goes through them; other launches do the others, in order.
  int64_t begin, end;
  // A [rows of these steps][4H] of each direction: x @ w_ih^T + b_ih + b_hh, by time, each row in GateOrder; or null
  const void* xg[2];
  const void* w_ih[2];   // S [4H][I]
  const void* w_hh[2];   // S [4H][P]
  const void* w_hr[2];   // S [P][H], or null
  const void* panel_hh;  // A, packed by pack_gates: one buffer per direction; null where xg is; or pairs of S
  const void* panel_hr;  // A, packed by pack_rows from w_hr, or null
  const void* b_ih[2];   // S [4H] for each direction, or null
  const void* b_hh[2];   // S [4H] for each direction, or null
  const void* h0;        // S [D][B][P] or null
  const void* c0;        // S [D][B][H] or null
  void* y;               // S [N][D][P]
  void* hn;              // S [D][B][P]
  void* cn;              // S [D][B][H]
  void* c;               // S [N][D][H] or null
  void* gates;           // S [D][N][4H], each row in GateOrder, or null; may hold xg where S is A
  // Scratch, uninitialised.
  void* h;        // A [2][D][B][P], or S where pairs: the state entering this step and the next
  void* c_state;  // A [D][B][H]
  void* m;        // A [D][B][H], only where projected: o * tanh(c)
  bool pairs;     // the recurrent product takes two numbers at a time: only where Kernels::gemm_pairs is, P even
  Team team;
};

struct BackwardParams {
  Sizes sizes;
  Sequence sequence;
  const void* panel_hh;  // A, packed by pack_columns from w_hh: one buffer per direction; or null if T = 1, dh0 is null
  const void* panel_hr;  // A, packed by pack_columns from w_hr, or null
  const void* dy;        // S [N][D][P] or null
  const void* dhn;       // S [D][B][P] or null
  const void* dcn;       // S [D][B][H] or null
  const void* dc;        // S [N][D][H] or null
  const void* h0;        // S [D][B][P] or null
  const void* c0;        // S [D][B][H] or null
  const void* y;         // S [N][D][P]
  const void* c;         // S [N][D][H]
  const void* gates;     // S [D][N][4H], each row in GateOrder
  void* da;              // A [D][N][4H], or S where there is Kernels::gemm_pairs: gradients before the nonlinearities
  void* dh0;             // S [D][B][P] or null
  void* dc0;             // S [D][B][H] or null
  // What the weight gradients need besides da.
  void* h_in;    // A, [D] panels as by pack_columns from [N][P], or null: the hidden state that entered each step
  void* dh_out;  // A [D][N][P], only where projected: gradient of h_t
  void* m;       // A [D][N][H], only where projected: o * tanh(c)
  // Scratch, uninitialised.
  void* dh_state;  // A [D][B][P]: gradient of the hidden state where it passes a step that does not exist
  void* dc_state;  // A [D][B][H]
  Team team;
};

// c = start + a @ b, or c += a @ b, where b is packed in panels; see gemm.h.
struct GemmParams {
  int64_t M, N, K;
  const void* a;  // A [M][K], or [K][M] where a_transposed
  bool a_transposed;
  const void* panels;  // A, packed from [N][K] or [K][N]: outputs are counted as they lie in the panels
  void* c;             // A [M][N]
  bool accumulate;
  bool by_columns;  // workers share the columns of c, as they share hidden units, and not its rows
  // A [N, rounded up to whole half panels], of each row of c; or null. Not where accumulate.
  const void* start = nullptr;
  bool is_odd = false;  // of pairs, a transposed: the last pair is a single row of a, and zeros
  // Another product with the same a, M and K, which is packed once for both; or null. Workers share rows then.
  const GemmParams* also = nullptr;
};
constexpr int64_t kGemmRows = 192;   // of c, that a worker computes at a time: a multiple of every tile's rows
constexpr int64_t kGemmDepth = 384;  // along K; kGemmRows by kGemmDepth is a part of the second-level cache

// Packing of a matrix w, S [rows][columns], for the matrix product of a block of outputs with all inputs; see panel.h.
// Each call packs [begin, end) of the blocks, or of the inputs.
using Pack = void (*)(const void* w, int64_t rows, int64_t columns, void* panel, int64_t begin, int64_t end);

// The kernels of one instruction set and one dtype. A worker function is called once for every worker of the team.
struct Kernels {
  void (*forward)(const ForwardParams&, int worker);
  void (*add_biases)(const void* b_ih, const void* b_hh, int64_t H, void* to);  // A to[4H], in GateOrder: their sum
  // T = 1: once step_start; then blocks of `lanes` units, [begin, end) of D * ceil(H / lanes); then, where projected,
  // outputs [begin, end) of D * P.
  void (*step_start)(const ForwardParams&);
  void (*step)(const ForwardParams&, int64_t begin, int64_t end);
  void (*step_project)(const ForwardParams&, int64_t begin, int64_t end);
  void (*backward)(const BackwardParams&, int worker);
  // Fills h_in for inputs [begin, end) of D * N; of D * ceil(N / 2) where there is gemm_pairs.
  void (*entering_states)(const BackwardParams&, int64_t begin, int64_t end);
  // Rows [m, m_end), at most kGemmRows, and half panels [half, half_end) of c; all of those of `also`. own:
  // gemm_scratch bytes.
  void (*gemm)(const GemmParams&, int64_t m, int64_t m_end, int64_t half, int64_t half_end, void* own);
  // The same where a and panels are pairs of 16-bit numbers; or null. K counts pairs.
  void (*gemm_pairs)(const GemmParams&, int64_t m, int64_t m_end, int64_t half, int64_t half_end, void* own);
  int64_t (*gemm_scratch)(const GemmParams&);  // bytes, of either
  Pack pack_gates;    // blocks of w_hh [4H][P]: a block is `lanes` hidden units, four gates each
  Pack pack_rows;     // blocks of w [N][K]: a block is 4 * lanes outputs, which are rows of w
  Pack pack_columns;  // inputs of w [K][N]: a block is 4 * lanes outputs, which are columns of w
  // Where gemm_pairs is: input k of K, of panels as by pack_columns, from two rows of N columns; null for zeros. Rows
  // that are packed by pack_gates or pack_rows are taken as of half as many floats, and packed by the kernels for
  // float.
  void (*pack_pair)(const void* first, const void* second, int64_t N, void* panels, int64_t K, int64_t k);
  // to[0..8): a fingerprint of memory; see fingerprint.h.
  void (*fingerprint)(const void* from, int64_t bytes, uint64_t* to);
  int lanes;      // numbers of type A in a vector register
  int tile_rows;  // batch rows that share one pass over a panel

  bool take_pairs() const { return gemm_pairs != nullptr; }
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
