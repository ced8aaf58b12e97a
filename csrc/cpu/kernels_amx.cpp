// The kernels for bfloat16 of processors that have AMX besides AVX-512; setup.py passes the flags. All other dtypes are
// those of kernels_avx512.cpp.
#define FUSEDRNN_ISA amx
#define FUSEDRNN_VECTOR_BYTES 64
#define FUSEDRNN_PAIRS
#define FUSEDRNN_TILES
#include "kernels.h"

namespace fusedrnn {
// Initialised at compile time: nothing of this file may run on a processor that lacks the instruction set.
extern constinit const Kernels kAmxBFloat16 = amx::kernels_for<BFloat16>();
}  // namespace fusedrnn
