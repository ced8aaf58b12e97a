// Runs a CUDA launch on the host, one fiber for every thread of every block of every cluster.
//
// A fiber runs until it waits: at a barrier, in a warp-wide operation, or for a condition that it polls. Which fiber
// comes next is drawn from a seeded generator, so that one seed is one schedule, and many seeds are many interleavings.
// What is asynchronous on the device is late here: a store into another block's shared memory, a copy into shared
// memory and a store that others read through the L2 cache happen at a moment that the generator picks, at the latest
// when something that the program does makes them visible. In every fourth schedule one block begins when no other can
// go on. A wait that is missing shows as a NaN: shared memory begins as NaNs. If no fiber can run, the launch ends with
// a report of where each thread waits. It ends with an error as well where a thread ends before its copies, or a block
// before what is pushed to it has come: the shared memory may be another block's by then.
//
// Every synchronisation has a name. `remove` takes all those of one name out of the program: the tests of the tests
// remove each in turn, and expect it to be noticed.
//
// Limits: memory is sequentially consistent but for the delays above, so that a missing fence on the reading side does
// not show. Host code between two waits runs without interruption.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fusedrnn::cuda::host {

constexpr int kWarp = 32;

struct Launch {
  int blocks, cluster, threads;  // blocks is a multiple of cluster, threads of a warp
  size_t shared_bytes;           // of each block
  uint64_t seed;
  const char* remove;  // the name of a synchronisation that does nothing, or null
};

struct Report {
  std::string error;               // empty, or why the launch did not end
  std::vector<std::string> names;  // every synchronisation that was met
  uint64_t switches;               // from fiber to fiber
};

// Runs body(argument, shared) as every thread; shared is its block's, aligned to 128 bytes.
Report run(const Launch& launch, void (*body)(const void* argument, char* shared), const void* argument);

// ---------------------------------------------------------------------- for device_host.h, inside of a running fiber

int thread_index();
int block_index();
int cluster_size();
int block_threads();

// False where the synchronisation of this name is removed.
bool present(const char* name);

// Waits until `count` threads of the block have arrived at barrier `id`.
void barrier(int id, int count, const char* name);
void cluster_barrier(const char* name);

// Meets the other lanes of the warp: in[lane] of all of them is handed to `operation` once, which fills out[lane].
using WarpOperation = void (*)(const void* const* in, void* const* out);
void warp_collective(WarpOperation operation, const void* in, void* out, const char* name);

// Waits until ready(argument), which must not wait.
void wait_until(bool (*ready)(void*), void* argument, const char* name);

// A copy that this thread may not rely on before finish_copies: it happens there, or at once, as the generator picks,
// so that both premature reads and premature writes are detected. Both addresses are multiples of its bytes, a
// power of two.
void copy_later(void* to, const void* from, size_t bytes);
// Copies since the last call become a group; all groups but the last so many are finished, and copies in no group if
// that is none.
void commit_copies();
void finish_copies(int but_groups = 0);

// A store to global memory that other blocks may see late, but not after its release: by the thread itself, or by one
// of its block after a barrier.
void store_late(void* to, const void* value, size_t bytes);
void release_stores();

// A store to the shared memory of a block of the cluster, some time later, which then calls completed(its barrier,
// bytes). Both addresses are those of the own block.
void push_later(int rank, void* to, const void* value, size_t bytes, void* barrier,
                void (*completed)(void* barrier, int bytes));

// Ends the launch with an error, from inside a fiber.
[[noreturn]] void fail(const std::string& what);

}  // namespace fusedrnn::cuda::host
