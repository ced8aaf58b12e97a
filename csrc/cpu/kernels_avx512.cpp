// The kernels for AVX-512 (F, BW, DQ, VL) and FMA; setup.py passes the flags.
#define FUSEDRNN_ISA avx512
#define FUSEDRNN_VECTOR_BYTES 64
#include "kernels.h"

namespace fusedrnn {
// Initialised at compile time: nothing of this file may run on a processor that lacks the instruction set.
extern constinit const KernelTable kAvx512 = avx512::kKernels;
}  // namespace fusedrnn
