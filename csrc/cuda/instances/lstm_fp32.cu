// The kernels of the LSTM for IEEE float32.
#include "instances.cuh"

template fusedrnn::cuda::Instances
fusedrnn::cuda::instances<fusedrnn::cuda::Math::kFloat32, fusedrnn::cuda::LstmCells>();
