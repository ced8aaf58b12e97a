// The kernels of the RNN, for the host.
#include "bodies_of.h"

template fusedrnn::cuda::Body fusedrnn::cuda::body_of<fusedrnn::cuda::RnnCells>(fusedrnn::cuda::Pass,
                                                                                const fusedrnn::cuda::Sizes&,
                                                                                const fusedrnn::cuda::Plan&);
