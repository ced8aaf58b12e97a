// The kernels of the variants of the LSTM with coupled gates, for float32 as TensorFloat-32 on the matrix unit.
#include "instances.cuh"

template fusedrnn::cuda::Instances
fusedrnn::cuda::instances<fusedrnn::cuda::Math::kTf32, fusedrnn::cuda::LstmCoupledCells>();
