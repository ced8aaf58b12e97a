// The kernels that are compiled, as addresses to launch. One file for each arithmetic and each kind of cells, so that
// they compile side by side.
#pragma once

#include "plan.h"

namespace fusedrnn::cuda {

struct Instances {
  const void* kernel[2][4][3];  // [pass][exchange][variant]; null where there is none
};

// Index of the kernel among those of one pass and exchange: 8 rows, 16 rows, 8 rows with a projection.
constexpr int variant(const Sizes& sizes, const Plan& plan) { return sizes.projected != 0 ? 2 : plan.rows / kMmaN - 1; }

// C is a cell (cell.h).
template <Math kMath, class C>
Instances instances();

#define FUSEDRNN_INSTANCES(Cells)                                \
  extern template Instances instances<Math::kBFloat16, Cells>(); \
  extern template Instances instances<Math::kFloat16, Cells>();  \
  extern template Instances instances<Math::kTf32, Cells>();     \
  extern template Instances instances<Math::kFloat32, Cells>();  \
  extern template Instances instances<Math::kFloat64, Cells>();
FUSEDRNN_INSTANCES(LstmCells)
FUSEDRNN_INSTANCES(GruCells)
FUSEDRNN_INSTANCES(RnnCells)
FUSEDRNN_INSTANCES(LstmPeepholeCells)
FUSEDRNN_INSTANCES(LstmCoupledCells)
#undef FUSEDRNN_INSTANCES

}  // namespace fusedrnn::cuda
