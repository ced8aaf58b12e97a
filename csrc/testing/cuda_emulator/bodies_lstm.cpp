// The kernels of the LSTM, for the host.
#include "bodies_of.h"

template fusedrnn::cuda::Body fusedrnn::cuda::body_of<fusedrnn::cuda::LstmCells>(fusedrnn::cuda::Pass,
                                                                                 const fusedrnn::cuda::Sizes&,
                                                                                 const fusedrnn::cuda::Plan&);
