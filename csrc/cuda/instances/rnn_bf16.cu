// The kernels of the RNN for bfloat16 on the matrix unit.
#include "instances.cuh"

template fusedrnn::cuda::Instances
fusedrnn::cuda::instances<fusedrnn::cuda::Math::kBFloat16, fusedrnn::cuda::RnnCells>();
