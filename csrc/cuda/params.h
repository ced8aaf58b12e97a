// The plain structs that the CUDA kernels take: pointers, sizes, nothing of torch.
//
// Letters: T time, B batch, I input, H hidden, P projection (P = H without one), D directions; of the plan's cell, G
// gates, M maps, and K numbers of a unit that it saves. S is the dtype tensors are stored in, A the dtype of the
// arithmetic: double for double, else float. Every pointer is to device memory, owned by the caller, and contiguous and
// row-major in the shape given beside it unless a Strides stands next to it. No two pointers may alias, but xg and
// saved of one type and layout: a thread writes of saved what it has read of xg. A null pointer where "or null" stands
// means zeros for an input and "not wanted" for an output. Outputs are written in full, and need not be initialised.
//
// A launch is the recurrence. What it takes of the input is the plan's choice: xg, the affine map of all steps, which
// the caller computes before it as one matrix product; or, with plan.fuse_input, x and the weights and biases of that
// map. After a backward launch dx, dw and db are the caller's, as matrix products with da.
#pragma once

#include <cstdint>

#include "plan.h"

namespace fusedrnn::cuda {

// Strides, in elements, of a tensor with dimensions d (direction), t, b and a dense last one.
struct Strides {
  int64_t d, t, b;
};

// Which steps exist and where the state is reset.
struct Sequence {
  const int64_t* lengths;  // [B] or null (all T); values outside 0..T count as the nearest
  const uint8_t* reset;    // [T][B] or null
};

// Memory through which the blocks of a launch exchange data, in the L2 cache.
struct Workspace {
  void* exchanged;  // workspace_bytes() of plan.h, aligned to 128, uninitialised; null if that is 0
  uint32_t* flags;  // flags() of plan.h, zero at the start of every launch; null if that is 0
};

// The values that noise multiplies: see NOISE in fusedrnn/cells/spec.py.
enum class Noise : int32_t { kH, kC, kG, kR };
constexpr int kNoises = 4;

// The additional inputs of a variant of the LSTM.
struct Extras {
  const void* w_p[2];  // S [K * H], one for each direction; both null without peepholes
  // A, the multipliers of h, of c, and of g or r, which no variant has both. The kernels read all three, at the same
  // places: the address of one that is not given is that of another, or without any that of some number.
  const void* noise[3];
  int32_t given[kNoises];  // whether there is that kind
  // Strides of all multipliers that are given; t may be 0. Those of kR are the same at all steps. All 0 without noise.
  Strides noise_strides;
};

struct ForwardParams {
  Sizes sizes;
  Sequence sequence;
  Plan plan;
  Workspace workspace;
  const void* w_hh;  // S, packed_bytes() of plan.h: as pack.h packs it for the forward
  const void* w_hr;  // S, as pack.h packs it for the forward, or null; only where projected
  // x @ w_ih^T + b_ih + b_hh, without b_hh of gates whose two affine maps are not summed. Of type A where xg_wide, and
  // of S otherwise, in which case a 16-bit dtype has rounded it: a matrix product that can write float saves that
  // rounding, one that cannot saves half the bytes. Any strides, so that [T][B][D][GH] and [D][T][B][GH] both do. Steps
  // that do not exist are not read.
  const void* xg;  // [GH] dense: the gates in the order of the weights; not read with plan.fuse_input
  Strides xg_strides;
  int32_t xg_wide;
  const void* h0;  // S [D][B][P] or null
  const void* c0;  // S [D][B][H] or null: the carry that enters the first step, which may be h0
  void* y;         // S [P] dense: [T][B][D][P] or a slice of more. Zero where a step does not exist
  Strides y_strides;
  void* c;  // S [H] dense: as y, every c_t of a cell that has one; or null
  Strides c_strides;
  void* hn;     // S [D][B][P]
  void* cn;     // S [D][B][H], of a cell that has c; or null
  void* saved;  // S [D][T][B][KH]: what the cell saves for the backward; zero where no step exists; or null
  // In the place of xg, with plan.fuse_input. Any strides and alignment; rows that begin at multiples of 16 bytes, all
  // of them, are copied asynchronously. Steps that do not exist may be read, and what is there does not matter.
  const void* x;  // S [I] dense
  Strides x_strides;
  const void* w_ih;  // S, as pack.h packs it
  // S [GH], one for each direction; either or both null. b_hh also in the place of what xg is without.
  const void* b_ih[2];
  const void* b_hh[2];
  Extras extras;
};

struct BackwardParams {
  Sizes sizes;
  Sequence sequence;
  Plan plan;
  Workspace workspace;
  const void* w_hh;  // S, as pack.h packs it for the backward
  const void* w_hr;  // S, as pack.h packs it for the backward, or null; only where projected
  const void* dy;    // S [P] dense, as y of the forward; or null
  Strides dy_strides;
  const void* dc;  // S [H] dense, as c of the forward; or null
  Strides dc_strides;
  const void* dhn;  // S [D][B][P] or null
  const void* dcn;  // S [D][B][H] or null
  const void* c;    // S [H] dense: the carry that left each step, which is c or y of the forward; null without one
  Strides c_strides;
  const void* c0;     // S [D][B][H] or null: as in the forward
  const void* saved;  // S [D][T][B][KH]: of the forward
  void* da;           // S [D][T][B][MH]: gradients of the maps; zero where no step exists
  void* dh0;          // S [D][B][P] or null
  void* dc0;          // S [D][B][H] or null; only of a cell that has c, as dc and dcn
  // Operands of the gradient of w_hr, only where projected: dw_hr = dh_out^T @ m over all t and b.
  void* dh_out;  // S [D][T][B][P]: the gradient of h_t; zero where no step exists
  void* m;       // S [D][T][B][H]: m_t of the cell; zero where no step exists
  Extras extras;
};

}  // namespace fusedrnn::cuda
