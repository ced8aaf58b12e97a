// Workers that meet at every step, without assuming that they run at the same time.
//
// The work of a phase is cut into chunks. A chunk belongs to a worker, which keeps its weights in that core's cache,
// but any worker may claim it: one that has waited for long takes what its owner has not begun. So a worker that was
// preempted, or that has not been started because the caller runs inside a parallel region already, delays the others
// by at most the chunk it is in. Which worker computes a chunk does not change a bit of the result.
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

// The k-th of `count`, upwards in even rounds and downwards in odd ones.
FUSEDRNN_INLINE int64_t in_turns(int64_t round, int64_t k, int64_t count) { return round % 2 == 0 ? k : count - 1 - k; }

// One cache line; line 0 counts the finished chunks of all phases, every further line is the claim of one chunk.
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

  // Runs f(chunk) for every chunk of the next phase, together with the other workers; returns when all are finished
  // and what they wrote can be read. finish() follows the last of some chunks that are run together.
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
  // Looking at who has finished goes on for a while before another's chunk is taken, whose weights are in the other
  // core's cache; not for long where a chunk takes longer than reading them does.
  static constexpr int64_t kLongChunk = 32768;
  static constexpr int kSpinsBeforeYield = 4096;

  int64_t finished() const { return __atomic_load_n(&lines_[0].value, __ATOMIC_ACQUIRE); }

  // Claims and runs what is left of `count` chunks from `first` on, around the end: in turns upwards and downwards, so
  // that a phase begins with what the last one has left in the cache.
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
