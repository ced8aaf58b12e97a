// The instruction sets of the build, and their detection at run time.
#include "params.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fusedrnn {

extern const KernelTable kPortable;
static const Isa portable = {"portable", [] { return true; }, &kPortable};

static KernelTable with_bfloat16(KernelTable table, const Kernels& kernels) {
  table[static_cast<size_t>(Dtype::kBFloat16)] = kernels;
  return table;
}

extern const Kernels kAmxBFloat16;

#if defined(FUSEDRNN_EMULATE_TILES)
// For tests: available on every processor, used only if requested by name.
static const Isa& amx_emulated() {
  static const KernelTable kernels = with_bfloat16(kPortable, kAmxBFloat16);
  static const Isa isa = {"amx_emulated", [] { return true; }, &kernels};
  return isa;
}
#endif

#if defined(__x86_64__)

extern const KernelTable kAvx512, kAvx2;
extern const Kernels kAvx512BFloat16;

static bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}

static bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// AMX needs the other instructions of its kernels and the kernel's permission, which has to be requested: it then saves
// the 8 KiB of tiles with the registers of threads that use them.
[[maybe_unused]] static bool has_amx() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!has_avx512_bf16() || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  if ((d & kBFloat16) == 0 || (d & kTiles) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;  // refused where the system does not save tiles
#else
  return false;
#endif
}

static bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

static const Isa avx512 = {"avx512", has_avx512, &kAvx512};
static const Isa avx2 = {"avx2", has_avx2, &kAvx2};

const Isa* const* instruction_sets() {
  static const KernelTable kernels = with_bfloat16(kAvx512, kAvx512BFloat16);
  static const Isa avx512_bf16 = {"avx512_bf16", has_avx512_bf16, &kernels};
#if defined(FUSEDRNN_EMULATE_TILES)
  static const Isa* const all[] = {&avx512_bf16, &avx512, &avx2, &portable, &amx_emulated(), nullptr};
#else
  static const KernelTable amx_kernels = with_bfloat16(kAvx512, kAmxBFloat16);
  static const Isa amx = {"amx", has_amx, &amx_kernels};
  static const Isa* const all[] = {&amx, &avx512_bf16, &avx512, &avx2, &portable, nullptr};
#endif
  return all;
}

#else

const Isa* const* instruction_sets() {
#if defined(FUSEDRNN_EMULATE_TILES)
  static const Isa* const all[] = {&portable, &amx_emulated(), nullptr};
#else
  static const Isa* const all[] = {&portable, nullptr};
#endif
  return all;
}

#endif

}  // namespace fusedrnn
