// Which instruction sets there are, and which of them this processor has.
#include "params.h"

namespace fusedrnn {

extern const KernelTable kPortable;
static const Isa portable = {"portable", [] { return true; }, &kPortable};

#if defined(__x86_64__)

extern const KernelTable kAvx512, kAvx2;

static const Isa avx512 = {"avx512",
                           [] {
                             return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                                    __builtin_cpu_supports("fma");
                           },
                           &kAvx512};
static const Isa avx2 = {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
                         &kAvx2};

const Isa* const* instruction_sets() {
  static const Isa* const all[] = {&avx512, &avx2, &portable, nullptr};
  return all;
}

#else

const Isa* const* instruction_sets() {
  static const Isa* const all[] = {&portable, nullptr};
  return all;
}

#endif

}  // namespace fusedrnn
