// The plain structs that the CUDA kernels take: pointers, sizes, nothing of torch.
//
// Letters: T time, B batch, I input, H hidden, P projection (P = H without one), D directions. S is the dtype tensors
// are stored in, A the dtype of the arithmetic: double for double, else float. Every pointer is to device memory, owned
// by the caller, and contiguous and row-major in the shape given beside it unless a Strides stands next to it. No two
// pointers may alias, but xg and gates of one type and layout: a thread writes of gates what it has read of xg. A null
// pointer where "or null" stands means zeros for an input and "not wanted" for an output. Outputs are written in full,
// and need not be initialised.
//
// A launch is the recurrence. What it takes of the input is the plan's choice: xg, the affine map of all steps, which
// the caller computes before it as one matrix product; or, with plan.inputs, x and the weights and biases of that map.
// After a backward launch dx, dw and db are the caller's, as matrix products with da.
#pragma once

#include <cstdint>

#include "plan.h"

namespace fusedrnn::cuda {

// Of a tensor with dimensions t, b and a last one that is dense, for one direction d: in elements.
struct Strides {
  int64_t d, t, b;
};

// Which steps exist and where the state is cut.
struct Sequence {
  const int64_t* lengths;  // [B] or null (all T); values outside 0..T count as the nearest
  const uint8_t* reset;    // [T][B] or null
};

// What the blocks of a launch write to and read from each other through the second-level cache.
struct Workspace {
  void* exchanged;  // workspace_bytes() of plan.h, aligned to 128, uninitialised; null if that is 0
  uint32_t* flags;  // flags() of plan.h, zero at the start of every launch; null if that is 0
};

struct ForwardParams {
  Sizes sizes;
  Sequence sequence;
  Plan plan;
  Workspace workspace;
  const void* w_hh;  // S, packed_bytes() of plan.h: as pack.h packs it for the forward
  const void* w_hr;  // S, as pack.h packs it for the forward, or null; only where projected
  // x @ w_ih^T + b_ih + b_hh. Of type A where xg_wide, and of S otherwise, in which case a 16-bit dtype has rounded it:
  // a matrix product that can write float saves that rounding, one that cannot saves half the bytes. Any strides, so
  // that [T][B][D][4H] and [D][T][B][4H] both do. Steps that do not exist are not read.
  const void* xg;  // [4H] dense: gates i, f, g, o; not read with plan.inputs
  Strides xg_strides;
  int32_t xg_wide;
  const void* h0;  // S [D][B][P] or null
  const void* c0;  // S [D][B][H] or null
  void* y;         // S [P] dense: [T][B][D][P] or a slice of more. Zero where a step does not exist
  Strides y_strides;
  void* c;  // S [H] dense: as y, every c_t; or null
  Strides c_strides;
  void* hn;     // S [D][B][P]
  void* cn;     // S [D][B][H]
  void* gates;  // S [D][T][B][4H]: after the nonlinearities, for the backward; zero where no step exists; or null
  // In the place of xg, with plan.inputs. Any strides and alignment; rows that begin at multiples of 16 bytes, all of
  // them, are copied asynchronously. Steps that do not exist may be read, and what is there does not matter.
  const void* x;  // S [I] dense
  Strides x_strides;
  const void* w_ih;  // S, as pack.h packs it
  // S [4H], one for each direction; either or both null.
  const void* b_ih[2];
  const void* b_hh[2];
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
  const void* c;    // S [H] dense: every c_t of the forward
  Strides c_strides;
  const void* c0;     // S [D][B][H] or null
  const void* gates;  // S [D][T][B][4H]: of the forward
  void* da;           // S [D][T][B][4H]: gradients before the nonlinearities; zero where no step exists
  void* dh0;          // S [D][B][P] or null
  void* dc0;          // S [D][B][H] or null
  // What the gradient of w_hr needs, only where projected: dw_hr = dh_out^T @ m over all t and b.
  void* dh_out;  // S [D][T][B][P]: the gradient of h_t; zero where no step exists
  void* m;       // S [D][T][B][H]: o * tanh(c_t); zero where no step exists
};

}  // namespace fusedrnn::cuda
