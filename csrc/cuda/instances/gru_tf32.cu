// The kernels of the GRU for float32 as TensorFloat-32 on the matrix unit.
#include "instances.cuh"

template fusedrnn::cuda::Instances fusedrnn::cuda::instances<fusedrnn::cuda::Math::kTf32, fusedrnn::cuda::GruCells>();
