// The kernels of the variants of the LSTM with a forget gate, for float32 as TensorFloat-32 on the matrix unit.
#include "instances.cuh"

template fusedrnn::cuda::Instances
fusedrnn::cuda::instances<fusedrnn::cuda::Math::kTf32, fusedrnn::cuda::LstmPeepholeCells>();
