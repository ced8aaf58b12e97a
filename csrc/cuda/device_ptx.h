// The device primitives as PTX; see device.h. References are to the PTX ISA, version 8.7.
//
// With FUSEDRNN_CUDA_TIMEOUT defined, as a number of clock cycles, every wait that takes longer prints which one it is,
// a line for each warp; a quarter of that later the launch ends with an error, instead of hanging.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstdio>

#include "device.h"

namespace fusedrnn::cuda {

// ---------------------------------------------------------------------------------------------- where a thread is

FUSEDRNN_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FUSEDRNN_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
FUSEDRNN_DEVICE int cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}

// The address of shared memory as the instructions take it.
FUSEDRNN_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---------------------------------------------------------------------------------------------- barriers, warps

FUSEDRNN_DEVICE void sync_block(const char*) { __syncthreads(); }
FUSEDRNN_DEVICE void sync_threads(int id, int count, const char*) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}
FUSEDRNN_DEVICE void sync_warp(const char*) { __syncwarp(); }
FUSEDRNN_DEVICE void sync_cluster(const char*) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release;\n\t"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
#endif
}
template <class A>
FUSEDRNN_DEVICE A shuffle_xor(A value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Through a shuffle: the assembler sees through a move.
FUSEDRNN_DEVICE int64_t fresh(int64_t value) {
  asm volatile("" : "+l"(value));
  return value;
}
FUSEDRNN_DEVICE int kept(int value) { return __shfl_sync(0xffffffffu, value, thread_index() % kWarp); }

// ---------------------------------------------------------------------------------------------- numbers

FUSEDRNN_DEVICE float to_compute(BFloat16 value) { return __uint_as_float(uint32_t{value.bits} << 16); }
FUSEDRNN_DEVICE float to_compute(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }
FUSEDRNN_DEVICE float to_compute(float value) { return value; }
FUSEDRNN_DEVICE double to_compute(double value) { return value; }

template <class S, class A>
FUSEDRNN_DEVICE S to_storage(A value) {
  return static_cast<S>(value);
}
template <>
FUSEDRNN_DEVICE BFloat16 to_storage<BFloat16, float>(float value) {
  uint32_t pair;  // of which the upper half is another number: a conversion of two is the faster instruction
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(0.0f), "f"(value));
  return {static_cast<uint16_t>(pair)};
}
template <>
FUSEDRNN_DEVICE Float16 to_storage<Float16, float>(float value) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(0.0f), "f"(value));
  return {static_cast<uint16_t>(pair)};
}
// The nearest number that the matrix unit takes as TensorFloat-32; it would cut the mantissa off otherwise.
FUSEDRNN_DEVICE float to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
}
FUSEDRNN_DEVICE float exponential(float x) { return expf(x); }
FUSEDRNN_DEVICE double exponential(double x) { return exp(x); }
// Within 2 units in the last place plus the error of x / ln 2; for results that are rounded to less than a float.
FUSEDRNN_DEVICE float quick_exponential(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.4426950408889634f));
  return power;
}
// A relative error of 2^-11.
FUSEDRNN_DEVICE float rough_tangent(float x) {
  float tangent;
  asm("tanh.approx.f32 %0, %1;" : "=f"(tangent) : "f"(x));
  return tangent;
}
FUSEDRNN_DEVICE float quick_divide(float a, float b) { return __fdividef(a, b); }
FUSEDRNN_DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
FUSEDRNN_DEVICE double hyperbolic_tangent(double x) { return tanh(x); }

FUSEDRNN_DEVICE uint32_t as_word(float value) { return __float_as_uint(value); }
template <class E>
FUSEDRNN_DEVICE E element(const Quad& quad, int k);
template <>
FUSEDRNN_DEVICE BFloat16 element<BFloat16>(const Quad& quad, int k) {
  return {static_cast<uint16_t>(quad.word[k / 2] >> (k % 2 * 16))};
}
template <>
FUSEDRNN_DEVICE Float16 element<Float16>(const Quad& quad, int k) {
  return {static_cast<uint16_t>(quad.word[k / 2] >> (k % 2 * 16))};
}
template <>
FUSEDRNN_DEVICE float element<float>(const Quad& quad, int k) {
  return __uint_as_float(quad.word[k]);
}
template <>
FUSEDRNN_DEVICE double element<double>(const Quad& quad, int k) {
  return __hiloint2double(static_cast<int>(quad.word[2 * k + 1]), static_cast<int>(quad.word[2 * k]));
}

// ---------------------------------------------------------------------------------------------- matrix instructions

// c[16][8] += a[16][K] b[K][8]; fragments as in "Matrix Fragments for mma.m16n8k16" and "... mma.m16n8k8".
template <Operands kOperands>
FUSEDRNN_DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (kOperands == Operands::kBFloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else if constexpr (kOperands == Operands::kFloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// ---------------------------------------------------------------------------------------------- memory

FUSEDRNN_DEVICE Quad load_streamed(const Quad* address) {
  Quad quad;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(quad.word[0]), "=r"(quad.word[1]), "=r"(quad.word[2]), "=r"(quad.word[3])
               : "l"(__cvta_generic_to_global(address)));
  return quad;
}

FUSEDRNN_DEVICE void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global))
               : "memory");
}
FUSEDRNN_DEVICE void copy_async_if(bool condition, void* shared, const void* global) {
  asm volatile(
      "{\n\t"
      ".reg .pred p;\n\t"
      "setp.ne.u32 p, %2, 0;\n\t"
      "@p cp.async.cg.shared.global [%0], [%1], 16;\n\t"
      "}" ::"r"(shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(static_cast<uint32_t>(condition))
      : "memory");
}
FUSEDRNN_DEVICE void wait_copies(const char*) { asm volatile("cp.async.wait_all;" ::: "memory"); }
FUSEDRNN_DEVICE void end_copies() { wait_copies(nullptr); }

// Commits this thread's copies that are in no group yet as one group, which may be empty.
FUSEDRNN_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
FUSEDRNN_DEVICE void wait_copies_but(const char*) {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

FUSEDRNN_DEVICE void store_global_if(bool condition, void* address, const Quad& quad) {
  asm volatile(
      "{\n\t"
      ".reg .pred p;\n\t"
      "setp.ne.u32 p, %5, 0;\n\t"
      "@p st.global.v4.u32 [%0], {%1,%2,%3,%4};\n\t"
      "}" ::"l"(__cvta_generic_to_global(address)),
      "r"(quad.word[0]), "r"(quad.word[1]), "r"(quad.word[2]), "r"(quad.word[3]), "r"(static_cast<uint32_t>(condition))
      : "memory");
}

FUSEDRNN_DEVICE void load_global_if(bool condition, const float* address, float& value) {
  asm("{\n\t"
      ".reg .pred p;\n\t"
      "setp.ne.u32 p, %2, 0;\n\t"
      "@p ld.global.nc.f32 %0, [%1];\n\t"
      "}"
      : "+f"(value)
      : "l"(__cvta_generic_to_global(address)), "r"(static_cast<uint32_t>(condition)));
}
FUSEDRNN_DEVICE void load_global_if(bool condition, const double* address, double& value) {
  asm("{\n\t"
      ".reg .pred p;\n\t"
      "setp.ne.u32 p, %2, 0;\n\t"
      "@p ld.global.nc.f64 %0, [%1];\n\t"
      "}"
      : "+d"(value)
      : "l"(__cvta_generic_to_global(address)), "r"(static_cast<uint32_t>(condition)));
}

FUSEDRNN_DEVICE void store_exchanged(void* address, const Quad& quad) {
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(address)), "r"(quad.word[0]),
               "r"(quad.word[1]), "r"(quad.word[2]), "r"(quad.word[3])
               : "memory");
}

// "Release and Acquire Patterns": what this thread wrote, and what others of its block wrote before a barrier that it
// has passed since, is visible to a thread that reads the value, and to those behind a barrier with it.
FUSEDRNN_DEVICE void release_flag(uint32_t* flag, uint32_t value, const char*) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(flag)), "r"(value) : "memory");
}
FUSEDRNN_DEVICE uint32_t flag(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(flag)) : "memory");
  return value;
}

// ---------------------------------------------------------------------------------------------- mbarrier, sm_90

FUSEDRNN_DEVICE void init_mbarrier([[maybe_unused]] Mbarrier* barrier, [[maybe_unused]] int arrivals) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Arrives, and has the current phase wait for that many bytes as well.
FUSEDRNN_DEVICE void expect_bytes([[maybe_unused]] Mbarrier* barrier, [[maybe_unused]] uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

// Whether the phase of this parity is over. Acquires at the scope of the cluster: the default is the block, and the
// bytes come from other blocks.
FUSEDRNN_DEVICE bool mbarrier_passed([[maybe_unused]] Mbarrier* barrier, [[maybe_unused]] uint32_t parity) {
  uint32_t passed = 1;
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t"
      ".reg .pred p;\n\t"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, p;\n\t"
      "}"
      : "=r"(passed)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
#endif
  return passed != 0;
}

// The completion has the semantics of a release at the scope of the cluster.
FUSEDRNN_DEVICE void push([[maybe_unused]] void* shared, [[maybe_unused]] Mbarrier* barrier, [[maybe_unused]] int rank,
                          [[maybe_unused]] const Quad& quad) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t"
      ".reg .b32 to, bar;\n\t"
      "mapa.shared::cluster.u32 to, %0, %2;\n\t"
      "mapa.shared::cluster.u32 bar, %1, %2;\n\t"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%3,%4,%5,%6}, [bar];\n\t"
      "}" ::"r"(shared_address(shared)),
      "r"(shared_address(barrier)), "r"(rank), "r"(quad.word[0]), "r"(quad.word[1]), "r"(quad.word[2]),
      "r"(quad.word[3])
      : "memory");
#endif
}

// ---------------------------------------------------------------------------------------------- waiting

template <class F>
FUSEDRNN_DEVICE void wait(const F& condition, [[maybe_unused]] const char* name) {
#if defined(FUSEDRNN_CUDA_TIMEOUT)
  constexpr long long kTimeout = FUSEDRNN_CUDA_TIMEOUT;
  const long long start = clock64();
  while (!condition()) {
    if (clock64() - start <= kTimeout) continue;
    const unsigned lanes = __activemask();
    if (thread_index() % kWarp == __ffs(static_cast<int>(lanes)) - 1) {
      printf("fusedrnn: block %d, warp %d, lanes %08x have waited too long for '%s'\n", block_index(),
             thread_index() / kWarp, lanes, name);
    }
    // The trap ends all blocks: those that began to wait a little later print first.
    while (clock64() - start <= kTimeout + kTimeout / 4) {
    }
    __trap();
  }
#else
  while (!condition()) {
  }
#endif
}

}  // namespace fusedrnn::cuda
