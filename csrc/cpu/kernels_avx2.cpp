// The kernels for AVX2 and FMA; setup.py passes the flags.
#define FUSEDRNN_ISA avx2
#define FUSEDRNN_VECTOR_BYTES 32
#include "kernels.h"

namespace fusedrnn {
// Initialised at compile time: nothing of this file may run on a processor that lacks the instruction set.
extern constinit const KernelTable kAvx2 = avx2::kKernels;
}  // namespace fusedrnn
