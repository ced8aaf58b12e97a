// The kernels of the LSTM for float64.
#include "instances.cuh"

template fusedrnn::cuda::Instances
fusedrnn::cuda::instances<fusedrnn::cuda::Math::kFloat64, fusedrnn::cuda::LstmCells>();
