// What the planners' cost models assume, one kernel each, in the primitives that the layers are written in
// (csrc/cuda/device.h): so they run on a GPU, where they are timed (micro.cu), and on the host, where their logic is
// tested (micro_host.cpp).
//
// Every kernel repeats one thing `iterations` times, after a first time that is not counted where blocks wait at a
// barrier. Each block writes when it began and ended, and `counted`, a number that is right only if nothing was left
// out: expected() says which.
#pragma once

#include "../../csrc/cuda/device.h"

#if !defined(__CUDACC__)
#include <chrono>
#endif

namespace fusedrnn::micro {

using namespace fusedrnn::cuda;

struct Span {
  uint64_t begin, end;  // nanoseconds
  int64_t cycles;
  uint32_t counted;
};

struct Params {
  int32_t iterations, blocks, threads;
  int32_t group;    // blocks at one barrier, or exchange; a cluster in kernels of clusters
  int32_t partner;  // block of the group, or rank, that block 0 plays ping-pong with
  int32_t word;     // of operands that are all ones: a number that the compiler does not know
  int64_t bytes;    // that a block reads, or that a group exchanges, in an iteration
  uint32_t* flags;  // zeroes: 32 for each block
  char* data;       // every bit set
  Span* spans;      // of each block
};

constexpr uint32_t kSentinel = 0xffffffffu;
constexpr int kFlagStride = 32;  // words: no two flags in a line

// ------------------------------------------------------------------- primitives that the layers do without

#if defined(__CUDACC__)

FUSEDRNN_DEVICE uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}
FUSEDRNN_DEVICE int64_t cycles() { return clock64(); }
// As the Triton kernels announce (kernels/grid.py).
FUSEDRNN_DEVICE void arrive(uint32_t* counter, const char*) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(__cvta_generic_to_global(counter)) : "memory");
}
// Data that is polled: four words, each of which may be old or new.
FUSEDRNN_DEVICE Quad load_exchanged(const void* address) {
  Quad quad;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(quad.word[0]), "=r"(quad.word[1]), "=r"(quad.word[2]), "=r"(quad.word[3])
               : "l"(__cvta_generic_to_global(address))
               : "memory");
  return quad;
}
FUSEDRNN_DEVICE Quad load_shared(const void* address) {
  Quad quad;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(quad.word[0]), "=r"(quad.word[1]), "=r"(quad.word[2]), "=r"(quad.word[3])
               : "r"(shared_address(address))
               : "memory");
  return quad;
}
FUSEDRNN_DEVICE void cluster_barrier_wait(const char*) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.relaxed;\n\t"
      "barrier.cluster.wait;");
#endif
}

#else

inline uint64_t nanoseconds() { return std::chrono::steady_clock::now().time_since_epoch().count(); }
inline int64_t cycles() { return static_cast<int64_t>(nanoseconds()); }
inline void arrive(uint32_t* counter, const char* name) {
  if (host::present(name)) host::release_stores();
  ++*counter;
}
inline void cluster_barrier_wait(const char* name) { host::cluster_barrier(name); }
inline Quad load_exchanged(const void* address) { return *static_cast<const Quad*>(address); }
inline Quad load_shared(const void* address) { return *static_cast<const Quad*>(address); }

#endif

// Times what lies between its construction and stop(), in the first thread of every block.
class Stopwatch {
 public:
  explicit FUSEDRNN_DEVICE Stopwatch(const Params& p) : p_(p), begin_(nanoseconds()), cycles_(cycles()) {}
  FUSEDRNN_DEVICE void stop(uint32_t counted) const {
    const int64_t passed = cycles() - cycles_;
    if (thread_index() == 0) p_.spans[block_index()] = {begin_, nanoseconds(), passed, counted};
  }

 private:
  const Params& p_;
  uint64_t begin_;
  int64_t cycles_;
};

FUSEDRNN_DEVICE bool complete(const Quad& quad) {
  return quad.word[0] != kSentinel && quad.word[1] != kSentinel && quad.word[2] != kSentinel &&
         quad.word[3] != kSentinel;
}
FUSEDRNN_DEVICE uint32_t every_bit(const Quad& quad) {
  return quad.word[0] & quad.word[1] & quad.word[2] & quad.word[3];
}
FUSEDRNN_DEVICE Quad same_words(uint32_t word) { return {{word, word, word, word}}; }
FUSEDRNN_BOTH constexpr int quads(int64_t bytes) { return static_cast<int>(bytes / sizeof(Quad)); }

// ---------------------------------------------------------------------------------------------- blocks at a barrier

// All blocks of a group pass a counter, as the programs of the Triton kernels do.
struct CounterBarrier {
  static constexpr bool kClustered = false;
  static FUSEDRNN_BOTH uint32_t expected(const Params& p, int) { return p.group * (p.iterations + 1); }

  static FUSEDRNN_DEVICE void run(const Params& p, char*) {
    uint32_t* counter = p.flags + block_index() / p.group * kFlagStride;
    sync(p, counter, 1);
    const Stopwatch watch(p);
    FUSEDRNN_NO_UNROLL for (int k = 0; k < p.iterations; ++k) sync(p, counter, k + 2);
    watch.stop(flag(counter));
  }

 private:
  static FUSEDRNN_DEVICE void sync(const Params& p, uint32_t* counter, uint32_t times) {
    sync_block("the block has come to the counter");
    if (thread_index() == 0) arrive(counter, "the counter is released");
    wait([&] { return static_cast<int32_t>(flag(counter) - p.group * times) >= 0; }, "the counter");
  }
};

// Every block of a group sets its flag and polls those of all others, as GridExchange does (csrc/cuda/exchange.h).
struct FlagBarrier {
  static constexpr bool kClustered = false;
  static FUSEDRNN_BOTH uint32_t expected(const Params& p, int) { return p.iterations + 1; }

  static FUSEDRNN_DEVICE void run(const Params& p, char*) {
    uint32_t* flags = p.flags + block_index() / p.group * p.group;
    sync(p, flags, 1);
    const Stopwatch watch(p);
    FUSEDRNN_NO_UNROLL for (int k = 0; k < p.iterations; ++k) sync(p, flags, k + 2);
    watch.stop(flag(flags + (block_index() + 1) % p.group));
  }

  static FUSEDRNN_DEVICE void sync(const Params& p, uint32_t* flags, uint32_t times) {
    sync_block("the block has come to the flags");
    if (thread_index() == 0) release_flag(flags + block_index() % p.group, times, "the block's flag is released");
    if (thread_index() < kWarp) {
      FUSEDRNN_NO_UNROLL for (int rank = thread_index(); rank < p.group; rank += kWarp) {
        wait([&] { return static_cast<int32_t>(flag(flags + rank) - times) >= 0; }, "the flags of the group");
      }
    }
    sync_block("the group has come");
  }
};

// Block 0 and its partner answer each other by flags; the others stay away.
struct FlagPingPong {
  static constexpr bool kClustered = false;
  static FUSEDRNN_BOTH uint32_t expected(const Params& p, int block) {
    return block == 0 || block == p.partner ? p.iterations + 1 : 0;
  }

  static FUSEDRNN_DEVICE void run(const Params& p, char*) {
    const bool first = block_index() == 0;
    if (thread_index() != 0 || (!first && block_index() != p.partner)) return;
    uint32_t *own = p.flags + (first ? 0 : kFlagStride), *other = p.flags + (first ? kFlagStride : 0);
    turn(first, own, other, 1);
    const Stopwatch watch(p);
    FUSEDRNN_NO_UNROLL for (int k = 0; k < p.iterations; ++k) turn(first, own, other, k + 2);
    watch.stop(flag(other));
  }

 private:
  static FUSEDRNN_DEVICE void turn(bool first, uint32_t* own, uint32_t* other, uint32_t times) {
    const auto answered = [&] { return flag(other) >= times; };
    if (!first) wait(answered, "the flag of block 0");
    release_flag(own, times, "a flag is released");
    if (first) wait(answered, "the flag of the partner");
  }
};

// The same, polling the data: 16 bytes that were all ones, at a new address in every iteration.
struct SentinelPingPong {
  static constexpr bool kClustered = false;
  static FUSEDRNN_BOTH uint32_t expected(const Params& p, int block) {
    return block == 0 || block == p.partner ? p.iterations : 0;
  }

  static FUSEDRNN_DEVICE void run(const Params& p, char*) {
    const bool first = block_index() == 0;
    if (thread_index() != 0 || (!first && block_index() != p.partner)) return;
    turn(p, first, p.iterations);
    const Stopwatch watch(p);
    uint32_t counted = 0;
    FUSEDRNN_NO_UNROLL for (int k = 0; k < p.iterations; ++k) counted += turn(p, first, k);
    watch.stop(counted);
  }

 private:
  static FUSEDRNN_DEVICE bool turn(const Params& p, bool first, int k) {
    char *own = p.data + int64_t{2} * k * 128, *other = own + 128;
    if (!first) {
      char* swapped = own;
      own = other;
      other = swapped;
    }
    Quad seen{};
    const auto answered = [&] {
      seen = load_exchanged(other);
      return complete(seen);
    };
    if (!first) wait(answered, "the data of block 0");
    store_exchanged(own, same_words(k));
    if (first) wait(answered, "the data of the partner");
    return seen.word[0] == static_cast<uint32_t>(k) && seen.word[3] == static_cast<uint32_t>(k);
  }
};

// One step of a grid-resident layer without its arithmetic: every block stores its part of the operand, announces it
// by a flag, and copies all of it into shared memory.
struct FlagExchange {
  static constexpr bool kClustered = false;
  static FUSEDRNN_BOTH uint32_t expected(const Params& p, int) { return p.iterations; }

  static FUSEDRNN_DEVICE void run(const Params& p, char* shared) {
    step(p, shared, 0);
    const Stopwatch watch(p);
    uint32_t counted = 0;
    FUSEDRNN_NO_UNROLL for (int k = 1; k <= p.iterations; ++k) counted += step(p, shared, k);
    watch.stop(counted);
  }

 private:
  static FUSEDRNN_DEVICE bool step(const Params& p, char* shared, int k) {
    const int rank = block_index() % p.group, group = block_index() / p.group, part = quads(p.bytes) / p.group;
    char* buffer = p.data + (int64_t{2} * group + k % 2) * p.bytes;
    FUSEDRNN_NO_UNROLL for (int n = thread_index(); n < part; n += p.threads) {
      store_exchanged(buffer + (int64_t{rank} * part + n) * sizeof(Quad), same_words(k));
    }
    FlagBarrier::sync(p, p.flags + group * p.group, k + 1);
    FUSEDRNN_NO_UNROLL for (int n = thread_index(); n < part * p.group; n += p.threads) {
      copy_async(shared + n * sizeof(Quad), buffer + n * sizeof(Quad));
    }
    wait_copies("the thread's copies of the operand");
    sync_block("the operand is copied");
    const int last = part * p.group - 1;
    return load_shared(shared + (k % 2 ? last : 0) * sizeof(Quad)).word[2] == static_cast<uint32_t>(k);
  }
};

// The same without flags: the operand is polled until none of it is the sentinel. Each step has a place of its own.
struct SentinelExchange {
  static constexpr bool kClustered = false;
  static FUSEDRNN_BOTH uint32_t expected(const Params& p, int) { return p.iterations; }

  static FUSEDRNN_DEVICE void run(const Params& p, char* shared) {
    step(p, shared, 0);
    const Stopwatch watch(p);
    uint32_t counted = 0;
    FUSEDRNN_NO_UNROLL for (int k = 1; k <= p.iterations; ++k) counted += step(p, shared, k);
    watch.stop(counted);
  }

 private:
  static FUSEDRNN_DEVICE bool step(const Params& p, char* shared, int k) {
    const int rank = block_index() % p.group, group = block_index() / p.group, part = quads(p.bytes) / p.group;
    char* place = p.data + (int64_t{group} * (p.iterations + 1) + k) * p.bytes;
    FUSEDRNN_NO_UNROLL for (int n = thread_index(); n < part; n += p.threads) {
      store_exchanged(place + (int64_t{rank} * part + n) * sizeof(Quad), same_words(k));
    }
    FUSEDRNN_NO_UNROLL for (int n = thread_index(); n < part * p.group; n += p.threads) {
      Quad quad{};
      wait(
          [&] {
            quad = load_exchanged(place + n * sizeof(Quad));
            return complete(quad);
          },
          "the operand itself");
      reinterpret_cast<Quad*>(shared)[n] = quad;
    }
    sync_block("the operand has come");
    const int last = part * p.group - 1;
    const bool right = load_shared(shared + (k % 2 ? last : 0) * sizeof(Quad)).word[2] == static_cast<uint32_t>(k);
    sync_block("the operand is used");
    return right;
  }
};

// ---------------------------------------------------------------------------------------------- clusters, sm_90

// kOrdered: what was stored before it is seen after it.
template <bool kOrdered>
struct ClusterBarrier {
  static constexpr bool kClustered = true;
  static FUSEDRNN_BOTH uint32_t expected(const Params& p, int) { return p.iterations; }

  static FUSEDRNN_DEVICE void run(const Params& p, char*) {
    sync_cluster("the cluster has begun");
    const Stopwatch watch(p);
    uint32_t counted = 0;
    FUSEDRNN_NO_UNROLL for (int k = 0; k < p.iterations; ++k, ++counted) {
      if constexpr (kOrdered) {
        sync_cluster("the barrier of the cluster");
      } else {
        cluster_barrier_wait("the barrier of the cluster");
      }
    }
    watch.stop(counted);
  }
};

// At the start of shared memory; what is pushed lies behind it.
struct Mailbox {
  Mbarrier barriers[2];
  char padding[112];

  static FUSEDRNN_DEVICE Mailbox* open(char* shared) {
    auto* mailbox = reinterpret_cast<Mailbox*>(shared);
    if (thread_index() == 0) {
      init_mbarrier(mailbox->barriers, 1);
      init_mbarrier(mailbox->barriers + 1, 1);
    }
    sync_cluster("the barriers of the cluster are ready");
    return mailbox;
  }
  // The barrier of push k, and whether its phase is over.
  FUSEDRNN_DEVICE Mbarrier* barrier(int k) { return barriers + k % 2; }
  FUSEDRNN_DEVICE bool passed(int k) { return mbarrier_passed(barrier(k), k / 2 % 2); }
  FUSEDRNN_DEVICE char* buffer(int k, int64_t bytes) { return reinterpret_cast<char*>(this + 1) + k % 2 * bytes; }
};

// Rank 0 and its partner push sixteen bytes to each other in turn.
struct PushPingPong {
  static constexpr bool kClustered = true;
  static FUSEDRNN_BOTH uint32_t expected(const Params& p, int block) {
    const int rank = block % p.group;
    return rank == 0 || rank == p.partner ? p.iterations : 0;
  }

  static FUSEDRNN_DEVICE void run(const Params& p, char* shared) {
    Mailbox* mailbox = Mailbox::open(shared);
    const int rank = cluster_rank();
    if (thread_index() == 0 && (rank == 0 || rank == p.partner)) {
      turn(p, mailbox, rank, 0);
      const Stopwatch watch(p);
      uint32_t counted = 0;
      FUSEDRNN_NO_UNROLL for (int k = 1; k <= p.iterations; ++k) counted += turn(p, mailbox, rank, k);
      watch.stop(counted);
    }
    sync_cluster("nothing is on its way");
  }

 private:
  static FUSEDRNN_DEVICE bool turn(const Params& p, Mailbox* mailbox, int rank, int k) {
    char* buffer = mailbox->buffer(k, sizeof(Quad));
    expect_bytes(mailbox->barrier(k), sizeof(Quad));
    const auto came = [&] { return mailbox->passed(k); };
    if (rank != 0) wait(came, "the push of rank 0");
    push(buffer, mailbox->barrier(k), rank == 0 ? p.partner : 0, same_words(k));
    if (rank == 0) wait(came, "the push of the partner");
    return load_shared(buffer).word[1] == static_cast<uint32_t>(k);
  }
};

// A thread pushes to every peer that it receives from, after it has used their previous data. So no thread gets two
// pushes ahead, and two barriers and two buffers suffice. Where a warp shares the receivers among its lanes, the lanes
// synchronise first; a warp with nothing to push does not take part.
template <bool kPairs>
struct Push {
  static constexpr bool kClustered = true;
  static FUSEDRNN_BOTH uint32_t expected(const Params& p, int) { return p.iterations; }

  static FUSEDRNN_DEVICE void run(const Params& p, char* shared) {
    Mailbox* mailbox = Mailbox::open(shared);
    const int part = quads(p.bytes) / p.group, warps = p.threads / kWarp, warp = thread_index() / kWarp;
    const int most = (part + warps - 1) / warps, first = warp * most;
    const int pieces = first + most <= part ? most : part - first;  // of a warp, that go to everyone
    if (kPairs || pieces > 0) {
      step(p, mailbox, 0, first, pieces);
      const Stopwatch watch(p);
      uint32_t counted = 0;
      FUSEDRNN_NO_UNROLL for (int k = 1; k <= p.iterations; ++k) counted += step(p, mailbox, k, first, pieces);
      watch.stop(counted);
    }
    sync_cluster("nothing is on its way");
  }

 private:
  static FUSEDRNN_DEVICE bool step(const Params& p, Mailbox* mailbox, int k, int first, int pieces) {
    const int rank = cluster_rank(), count = quads(p.bytes);
    char* buffer = mailbox->buffer(k, p.bytes);
    if constexpr (kPairs) {
      FUSEDRNN_NO_UNROLL for (int n = thread_index(); n < count; n += p.threads) {
        push(buffer + n * sizeof(Quad), mailbox->barrier(k), rank ^ 1, same_words(k));
      }
    } else {  // as ClusterExchange does (csrc/cuda/exchange.h), everybody beginning with another one
      char* own = buffer + (rank * (count / p.group) + first) * sizeof(Quad);
      FUSEDRNN_NO_UNROLL for (int n = thread_index() % kWarp; n < pieces * p.group; n += kWarp) {
        int to = rank + n / pieces;
        if (to >= p.group) to -= p.group;
        push(own + n % pieces * sizeof(Quad), mailbox->barrier(k), to, same_words(k));
      }
    }
    if (thread_index() == 0) expect_bytes(mailbox->barrier(k), static_cast<uint32_t>(p.bytes));
    wait([&] { return mailbox->passed(k); }, "the operand has come");
    const bool right = load_shared(buffer + (k % 2 ? count - 1 : 0) * sizeof(Quad)).word[2] == static_cast<uint32_t>(k);
    if constexpr (!kPairs) sync_warp("the operand is used");
    return right;
  }
};
// All bytes of the operand from all blocks of the cluster.
using ClusterExchange = Push<false>;
// All of them from the neighbour.
using PushBandwidth = Push<true>;

// ---------------------------------------------------------------------------------------------- memory

constexpr int kLoads = 8;  // on their way, of each thread

// The loads of thread 0, each of which finds every bit set.
FUSEDRNN_BOTH constexpr uint32_t loads_of_first(const Params& p) {
  return static_cast<uint32_t>(p.iterations * ((quads(p.bytes) + p.threads - 1) / p.threads));
}

enum class From { kL2, kL2Copied, kShared };

// p.bytes in every iteration, of the block's own, or with a group of 1 of what all blocks read.
template <From kFrom>
struct Read {
  static constexpr bool kClustered = false;
  static FUSEDRNN_BOTH uint32_t expected(const Params& p, int) { return loads_of_first(p); }

  static FUSEDRNN_DEVICE void run(const Params& p, char* shared) {
    const int count = quads(p.bytes);  // a multiple of kLoads * threads
    const char* from = kFrom == From::kShared ? shared : p.data + (p.group == 1 ? 0 : block_index() * p.bytes);
    if constexpr (kFrom == From::kShared) {
      FUSEDRNN_NO_UNROLL for (int n = thread_index(); n < count; n += p.threads) {
        reinterpret_cast<Quad*>(shared)[n] = same_words(kSentinel);
      }
    }
    sync_block("shared memory is filled");
    const Stopwatch watch(p);
    uint32_t counted = 0;
    FUSEDRNN_NO_UNROLL for (int k = 0; k < p.iterations; ++k) {
      FUSEDRNN_NO_UNROLL for (int n = thread_index(); n < count; n += kLoads * p.threads) {
        Quad loaded[kLoads];
        FUSEDRNN_UNROLL for (int j = 0; j < kLoads; ++j) {
          const int at = (n + j * p.threads) * static_cast<int>(sizeof(Quad));
          if constexpr (kFrom == From::kL2) loaded[j] = load_streamed(reinterpret_cast<const Quad*>(from + at));
          if constexpr (kFrom == From::kL2Copied) copy_async(target(p, shared, j), from + at);
          if constexpr (kFrom == From::kShared) loaded[j] = load_shared(from + at);
        }
        if constexpr (kFrom == From::kL2Copied) {
          wait_copies("the thread's copies");
          FUSEDRNN_UNROLL for (int j = 0; j < kLoads; ++j) loaded[j] = load_shared(target(p, shared, j));
        }
        FUSEDRNN_UNROLL for (int j = 0; j < kLoads; ++j) {
          // Of what was copied one word is enough; of a load that would let the compiler make it one of 4 bytes.
          counted += (kFrom == From::kL2Copied ? loaded[j].word[j % 4] : every_bit(loaded[j])) & 1u;
        }
      }
    }
    sync_block("the block has read");
    watch.stop(counted);
  }

 private:
  static FUSEDRNN_DEVICE char* target(const Params& p, char* shared, int j) {
    return shared + (thread_index() + j * p.threads) * static_cast<int>(sizeof(Quad));
  }
};

// Dependent loads: each yields the address of the next. p.bytes is a power of 2.
struct L2Latency {
  static constexpr bool kClustered = false;
  static FUSEDRNN_BOTH uint32_t expected(const Params& p, int block) { return block == 0 ? p.iterations : 0; }

  static FUSEDRNN_DEVICE void run(const Params& p, char*) {
    if (thread_index() != 0 || block_index() != 0) return;
    const Stopwatch watch(p);
    uint32_t at = 0, counted = 0;
    FUSEDRNN_NO_UNROLL for (int k = 0; k < p.iterations; ++k) {
      const Quad quad = load_streamed(reinterpret_cast<const Quad*>(p.data + at));
      const uint32_t found = every_bit(quad);
      counted += found == kSentinel;
      at = (at + 5 * 128 + found + 1) & static_cast<uint32_t>(p.bytes - 1);  // found is -1
    }
    watch.stop(counted);
  }
};

// ---------------------------------------------------------------------------------------------- arithmetic

FUSEDRNN_BOTH constexpr int multiply_adds(Operands operands) { return 16 * 8 * (operands == Operands::kTf32 ? 8 : 16); }

// kChains matrix instructions of a warp that do not depend on one another, in every iteration, on ones.
template <Operands kOperands, int kChains>
struct MatrixProduct {
  static constexpr bool kClustered = false;
  static FUSEDRNN_BOTH uint32_t expected(const Params& p, int) {
    return static_cast<uint32_t>(p.iterations * kChains * multiply_adds(kOperands) / (16 * 8));
  }

  static FUSEDRNN_DEVICE void run(const Params& p, char*) {
    const auto one = static_cast<uint32_t>(p.word);
    float c[kChains][4] = {};
    sync_block("the block has begun");
    const Stopwatch watch(p);
    FUSEDRNN_NO_UNROLL for (int k = 0; k < p.iterations; ++k) {
      FUSEDRNN_UNROLL for (int j = 0; j < kChains; ++j) mma<kOperands>(c[j], one, one, one, one, one, one);
    }
    sync_block("the block has multiplied");
    float sum = 0;
    FUSEDRNN_UNROLL for (int j = 0; j < kChains; ++j) sum += 0.25f * (c[j][0] + c[j][1] + c[j][2] + c[j][3]);
    watch.stop(static_cast<uint32_t>(sum));
  }
};

// Multiply-adds in float32 outside of the matrix unit.
template <int kChains>
struct MultiplyAdd {
  static constexpr bool kClustered = false;
  static FUSEDRNN_BOTH uint32_t expected(const Params& p, int) { return static_cast<uint32_t>(p.iterations * kChains); }

  static FUSEDRNN_DEVICE void run(const Params& p, char*) {
    const float one = static_cast<float>(p.word);
    float c[kChains] = {};
    sync_block("the block has begun");
    const Stopwatch watch(p);
    FUSEDRNN_NO_UNROLL for (int k = 0; k < p.iterations; ++k) {
      FUSEDRNN_UNROLL for (int j = 0; j < kChains; ++j) c[j] = c[j] * one + one;
    }
    sync_block("the block has multiplied");
    float sum = 0;
    FUSEDRNN_UNROLL for (int j = 0; j < kChains; ++j) sum += c[j];
    watch.stop(static_cast<uint32_t>(sum));
  }
};

}  // namespace fusedrnn::micro
