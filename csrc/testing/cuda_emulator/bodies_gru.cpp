// The kernels of the GRU, for the host.
#include "bodies_of.h"

template fusedrnn::cuda::Body fusedrnn::cuda::body_of<fusedrnn::cuda::GruCells>(fusedrnn::cuda::Pass,
                                                                                const fusedrnn::cuda::Sizes&,
                                                                                const fusedrnn::cuda::Plan&);
