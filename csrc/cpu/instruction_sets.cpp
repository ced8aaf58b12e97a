// Which instruction sets there are, and which of them this processor has.
#include "params.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fusedrnn {

extern const KernelTable kPortable;
static const Isa portable = {"portable", [] { return true; }, &kPortable};

#if defined(__x86_64__)

extern const KernelTable kAvx512, kAvx2;
extern const Kernels kAvx512BFloat16, kAmxBFloat16;

static bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}

// AMX, of a processor that can run the kernels beside it; and the system's permission to use it, which is asked for once:
// from then on a thread that uses tiles has its 8 KiB of them saved with its other registers.
static bool has_amx() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;
  if (!has_avx512() || !__builtin_cpu_supports("avx512bf16") || (d & kBFloat16) == 0 || (d & kTiles) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
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
  static const KernelTable amx_kernels = with_bfloat16(kAvx512, kAmxBFloat16);
  static const Isa amx = {"amx", has_amx, &amx_kernels};
  static const Isa* const all[] = {&amx, &avx512_bf16, &avx512, &avx2, &portable, nullptr};
  return all;
}

#else

const Isa* const* instruction_sets() {
  static const Isa* const all[] = {&portable, nullptr};
  return all;
}

#endif

}  // namespace fusedrnn
