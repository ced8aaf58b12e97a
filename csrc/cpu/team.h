// Barrier and work stealing of the workers of a launch, without the assumption that they run at the same time.
//
// The work of a phase is split into chunks. Each chunk has an owner, whose core caches its weights, but any worker may
// claim it: a worker that has waited for long steals chunks that their owner has not begun. So a worker that is
// preempted, or not started because the caller is inside a parallel region, delays the others by at most one chunk.
// Results do not depend on which worker computes a chunk.
#pragma once

#include <cstdint>

#include "simd.h"

#if defined(__x86_64__)
#define FUSEDRNN_PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define FUSEDRNN_PAUSE() __asm__ __volatile__("yield")
#else
#define FUSEDRNN_PAUSE() ((void)0)
#endif

extern "C" int sched_yield();

namespace fusedrnn::FUSEDRNN_ISA {

// The k-th of `count` indices, ascending in even rounds and descending in odd ones.
FUSEDRNN_INLINE int64_t in_turns(int64_t round, int64_t k, int64_t count) { return round % 2 == 0 ? k : count - 1 - k; }

// One cache line. Line 0 counts the finished chunks of all phases, line 1 + k holds the last phase that claimed chunk
// k.
struct alignas(64) Line {
  int64_t value;
};

class Worker {
 public:
  // multiply_adds: of a chunk.
  Worker(const Team& team, int64_t chunks, int index, int64_t multiply_adds)
      : lines_(static_cast<Line*>(team.lines)),
        chunks_(chunks),
        spins_before_help_(multiply_adds < kLongChunk ? 256 : 32),
        first_(index * chunks / team.workers),
        last_((index + 1) * chunks / team.workers) {}

  // Runs f(chunk) for every chunk of the next phase, together with the other workers; returns when all are finished and
  // their results are visible. finish() runs after a series of chunks of this worker.
  template <class F, class Finish>
  void phase(const F& f, const Finish& finish) {
    ++phase_;
    const int64_t target = phase_ * chunks_;
    if (finished() >= target) return;
    run_unclaimed(first_, last_ - first_, f, finish);
    for (int spins = 0; finished() < target; ++spins) {
      if (spins < spins_before_help_) {
        FUSEDRNN_PAUSE();
      } else if (spins == spins_before_help_) {
        run_unclaimed(last_, chunks_, f, finish);
      } else if (spins < kSpinsBeforeYield) {
        FUSEDRNN_PAUSE();
      } else {
        sched_yield();
      }
    }
  }
  template <class F>
  void phase(const F& f) {
    phase(f, [] {});
  }

 private:
  // A worker polls for a while before it steals a chunk, whose weights are in the owner's cache; not for long if a
  // chunk takes longer than loading them.
  static constexpr int64_t kLongChunk = 32768;
  static constexpr int kSpinsBeforeYield = 4096;

  int64_t finished() const { return __atomic_load_n(&lines_[0].value, __ATOMIC_ACQUIRE); }

  // Claims and runs the unclaimed of `count` chunks from `first` on, modulo the number of chunks; in alternating order,
  // so that a phase begins with the weights that the last one left in the cache.
  template <class F, class Finish>
  void run_unclaimed(int64_t first, int64_t count, const F& f, const Finish& finish) {
    int64_t done = 0;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t chunk = (first + in_turns(phase_, k, count)) % chunks_;
      int64_t expected = phase_ - 1;
      if (!__atomic_compare_exchange_n(&lines_[1 + chunk].value, &expected, phase_, false, __ATOMIC_ACQ_REL,
                                       __ATOMIC_RELAXED)) {
        continue;
      }
      f(chunk);
      ++done;
    }
    if (done == 0) return;
    finish();
    __atomic_fetch_add(&lines_[0].value, done, __ATOMIC_RELEASE);
  }

  Line* lines_;
  int64_t chunks_;
  int spins_before_help_;
  int64_t first_, last_;  // the chunks this worker owns
  int64_t phase_ = 0;
};

}  // namespace fusedrnn::FUSEDRNN_ISA
