// The kernels of the GRU for IEEE float32.
#include "instances.cuh"

template fusedrnn::cuda::Instances
fusedrnn::cuda::instances<fusedrnn::cuda::Math::kFloat32, fusedrnn::cuda::GruCells>();
