// The kernels of the variants of the LSTM with coupled gates, for float16 on the matrix unit.
#include "instances.cuh"

template fusedrnn::cuda::Instances
fusedrnn::cuda::instances<fusedrnn::cuda::Math::kFloat16, fusedrnn::cuda::LstmCoupledCells>();
