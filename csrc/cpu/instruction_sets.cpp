// Which instruction sets there are, and which of them this processor has.
#include "params.h"

namespace fusedrnn {

extern const KernelTable kPortable;
static const Isa portable = {"portable", [] { return true; }, &kPortable};

#if defined(__x86_64__)

extern const KernelTable kAvx512, kAvx2;
extern const Kernels kAvx512BFloat16;

static bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}

static KernelTable with_bfloat16(KernelTable table, const Kernels& kernels) {
  table[static_cast<size_t>(Dtype::kBFloat16)] = kernels;
  return table;
}

static const Isa avx512 = {"avx512", has_avx512, &kAvx512};
static const Isa avx2 = {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
                         &kAvx2};

const Isa* const* instruction_sets() {
  static const KernelTable kernels = with_bfloat16(kAvx512, kAvx512BFloat16);
  static const Isa avx512_bf16 = {"avx512_bf16", [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); },
                                  &kernels};
  static const Isa* const all[] = {&avx512_bf16, &avx512, &avx2, &portable, nullptr};
  return all;
}

#else

const Isa* const* instruction_sets() {
  static const Isa* const all[] = {&portable, nullptr};
  return all;
}

#endif

}  // namespace fusedrnn
