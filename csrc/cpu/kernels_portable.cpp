// The kernels for whatever the compiler's target has: SSE2 on any x86-64, NEON on AArch64.
#define FUSEDRNN_ISA portable
#define FUSEDRNN_VECTOR_BYTES 16
#include "kernels.h"

namespace fusedrnn {
// Initialised at compile time: nothing of this file may run on a processor that lacks the instruction set.
extern constinit const KernelTable kPortable = portable::kKernels;
}  // namespace fusedrnn
