// The kernels of the LSTM for float32 as TensorFloat-32 on the matrix unit.
#include "instances.cuh"

template fusedrnn::cuda::Instances fusedrnn::cuda::instances<fusedrnn::cuda::Math::kTf32, fusedrnn::cuda::LstmCells>();
