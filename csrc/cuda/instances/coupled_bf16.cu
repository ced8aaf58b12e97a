// The kernels of the variants of the LSTM with coupled gates, for bfloat16 on the matrix unit.
#include "instances.cuh"

template fusedrnn::cuda::Instances
fusedrnn::cuda::instances<fusedrnn::cuda::Math::kBFloat16, fusedrnn::cuda::LstmCoupledCells>();
