// The kernels of the variants of the LSTM with coupled gates, for IEEE float32.
#include "instances.cuh"

template fusedrnn::cuda::Instances
fusedrnn::cuda::instances<fusedrnn::cuda::Math::kFloat32, fusedrnn::cuda::LstmCoupledCells>();
