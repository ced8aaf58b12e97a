// The kernels of the variants of the LSTM with a forget gate, for the host.
#include "bodies_of.h"

template fusedrnn::cuda::Body fusedrnn::cuda::body_of<fusedrnn::cuda::LstmPeepholeCells>(fusedrnn::cuda::Pass,
                                                                                         const fusedrnn::cuda::Sizes&,
                                                                                         const fusedrnn::cuda::Plan&);
