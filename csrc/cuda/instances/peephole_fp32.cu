// The kernels of the variants of the LSTM with a forget gate, for IEEE float32.
#include "instances.cuh"

template fusedrnn::cuda::Instances
fusedrnn::cuda::instances<fusedrnn::cuda::Math::kFloat32, fusedrnn::cuda::LstmPeepholeCells>();
