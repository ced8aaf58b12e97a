// The device primitives that the kernels are written in, and nothing that they do not use. Two implementations: PTX,
// and the host, where every thread is a fiber (testing/cuda_emulator/runtime.h). Kernels include this file and no CUDA
// header.
//
//   thread_index() block_index() cluster_rank()      where a thread is; one dimension each
//   sync_block(name)                                 barrier of the block
//   sync_threads(id, count, name)                    barrier 1..15 of `count` threads of the block
//   sync_warp(name)
//   sync_cluster(name)                               sm_90: barrier of the cluster; orders all of its shared memory
//   shuffle_xor(value, mask)
//   kept(value)                                      the value, held in a register and not computed again;
//                                                    all lanes of a warp come here
//   fresh(value)                                     the value, of which the compiler knows nothing: it computes
//                                                    nothing from it before a loop, to be kept in registers
//   mma(c, a, b0, b1, kind)                          m16n8k16 of bfloat16 or float16, m16n8k8 of TensorFloat-32
//   load_streamed(address)                           16 bytes that are read once and by one thread
//   copy_async(shared, global) wait_copies(name)     16 bytes at a time, past the first-level cache; copy_async_if(c,
//   ..) commit_copies() wait_copies_but<n>(name)         groups of copies: waits for all but the last n groups
//   end_copies()                                     after a slice, and so before the thread ends: K blocks that are
//                                                    streamed for a step that does not come are on their way till then
//   store_global_if(c, address, quad)                16 bytes, for later launches
//   load_global_if(c, address, value)                a read-only number, or the old value; no branch
//   store_exchanged(address, quad)                   16 bytes that other blocks read through the second-level cache
//   release_flag(flag, value, name) flag(flag)       release and acquire at the scope of the device
//   init_mbarrier expect_bytes mbarrier_passed       sm_90: a barrier in shared memory that counts bytes
//   push(shared, barrier, rank, quad)                sm_90: 16 bytes to a peer's shared memory, completing on the
//                                                    peer's barrier; both addresses are those of the own block
//   wait(condition, name)                            polls
//
// Names say what a synchronisation is for: in reports of a deadlock, and on the host as a handle to take it away.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FUSEDRNN_BOTH __host__ __device__ __forceinline__
#define FUSEDRNN_DEVICE __device__ __forceinline__
#define FUSEDRNN_UNROLL _Pragma("unroll")
#define FUSEDRNN_NO_UNROLL _Pragma("unroll 1")
#else
#define FUSEDRNN_BOTH inline
#define FUSEDRNN_DEVICE inline
#define FUSEDRNN_UNROLL
#define FUSEDRNN_NO_UNROLL
#endif

namespace fusedrnn::cuda {

constexpr int kWarp = 32;

// The unit of copies: 16 bytes by one thread.
struct alignas(16) Quad {
  uint32_t word[4];
};

// Storage of 16-bit floating point numbers; conversions round to nearest, ties to even.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Operand types of a matrix instruction.
enum class Operands { kBFloat16, kFloat16, kTf32 };

// Opaque, in shared memory.
struct alignas(8) Mbarrier {
  uint64_t state;
};

}  // namespace fusedrnn::cuda

#if defined(__CUDACC__)
#include "device_ptx.h"
#else
#include "device_host.h"
#endif
