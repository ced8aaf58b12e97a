// The kernels of the GRU for float64.
#include "instances.cuh"

template fusedrnn::cuda::Instances
fusedrnn::cuda::instances<fusedrnn::cuda::Math::kFloat64, fusedrnn::cuda::GruCells>();
