// The kernels as functions that the fibers of runtime.h run. One source for each kind of cells, so that they compile
// side by side.
#pragma once

#include "../../cuda/plan.h"

namespace fusedrnn::cuda {

using Body = void (*)(const void* params, char* shared);

// Of a valid plan; null for an arithmetic that this build does not have. C: of cell.h.
template <class C>
Body body_of(Pass pass, const Sizes& sizes, const Plan& plan);

extern template Body body_of<LstmCells>(Pass, const Sizes&, const Plan&);
extern template Body body_of<GruCells>(Pass, const Sizes&, const Plan&);
extern template Body body_of<RnnCells>(Pass, const Sizes&, const Plan&);
extern template Body body_of<LstmPeepholeCells>(Pass, const Sizes&, const Plan&);
extern template Body body_of<LstmCoupledCells>(Pass, const Sizes&, const Plan&);

}  // namespace fusedrnn::cuda
