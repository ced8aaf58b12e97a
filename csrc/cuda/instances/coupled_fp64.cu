// The kernels of the variants of the LSTM with coupled gates, for float64.
#include "instances.cuh"

template fusedrnn::cuda::Instances
fusedrnn::cuda::instances<fusedrnn::cuda::Math::kFloat64, fusedrnn::cuda::LstmCoupledCells>();
