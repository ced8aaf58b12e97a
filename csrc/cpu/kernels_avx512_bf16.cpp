// The kernels for bfloat16 of processors that have AVX-512 and its instructions for pairs of them; setup.py passes the
// flags. All other dtypes are those of kernels_avx512.cpp.
#define FUSEDRNN_ISA avx512_bf16
#define FUSEDRNN_VECTOR_BYTES 64
#define FUSEDRNN_PAIRS
#include "kernels.h"

namespace fusedrnn {
// Initialised at compile time: nothing of this file may run on a processor that lacks the instruction set.
extern constinit const Kernels kAvx512BFloat16 = avx512_bf16::kernels_for<BFloat16>();
}  // namespace fusedrnn
