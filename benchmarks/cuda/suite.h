// What is measured: every kernel of kernels.h with the sizes that the planners have, for a runner on a GPU (micro.cu)
// or on the host (micro_host.cpp). A runner has
//
//   Machine machine                       what it runs on
//   bool wanted(name)                     whether this measurement was asked for
//   void measure<Kernel>(const Case&)     runs it a number of times and prints a line of JSON
#pragma once

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "kernels.h"

namespace fusedrnn::micro {

struct Machine {
  int processors;  // blocks that run at the same time, one on each
  int cluster;     // largest, or 0
  int64_t shared;  // bytes that a block may have
  int shrink;      // divides iterations and payloads, where time means nothing
};

enum class Quantity { kLatency, kBytes, kMultiplyAdds };

// One line of results. `work` is per iteration: crossings from one block to another that follow each other, or bytes or
// multiply-adds of all blocks together.
struct Case {
  const char* name;
  std::string variant;
  Quantity quantity;
  double work;
  int blocks;  // to be launched; in kernels of clusters 0 for as many as fit
  int threads;
  int group;  // blocks at one barrier; the size of a cluster
  int iterations;
  int64_t bytes = 0;   // Params.bytes
  int64_t data = 0;    // bytes of Params.data that each group has, or all blocks together
  int64_t shared = 0;  // bytes of each block
  bool pairs = false;  // block 0 exchanges with each partner in turn
  int word = 0;
};

inline const char* name_of(Quantity quantity) {
  return quantity == Quantity::kLatency ? "latency" : quantity == Quantity::kBytes ? "bytes" : "multiply-adds";
}

struct Samples {
  int blocks = 0;
  std::vector<double> ns, cycles;
  std::string error, skipped;
};

inline std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c == '\n' ? ' ' : c;
  }
  return out + "\"";
}

inline std::string listed(const std::vector<double>& values) {
  std::string out = "[";
  char number[32];
  for (const double value : values) {
    std::snprintf(number, sizeof(number), "%s%.0f", out.size() > 1 ? "," : "", value);
    out += number;
  }
  return out + "]";
}

// Flushed, so that it is kept if the rest is cut off.
inline void print(const Case& c, const Samples& samples) {
  std::printf("{\"name\":%s,\"variant\":%s,\"quantity\":\"%s\",\"work\":%.17g,\"iterations\":%d,\"blocks\":%d,",
              quoted(c.name).c_str(), quoted(c.variant).c_str(), name_of(c.quantity), c.work, c.iterations,
              samples.blocks);
  std::printf("\"group\":%d,\"threads\":%d,\"bytes\":%lld,", c.group, c.threads, static_cast<long long>(c.bytes));
  if (!samples.error.empty()) std::printf("\"error\":%s,", quoted(samples.error).c_str());
  if (!samples.skipped.empty()) std::printf("\"skipped\":%s,", quoted(samples.skipped).c_str());
  std::printf("\"ns\":%s,\"cycles\":%s}\n", listed(samples.ns).c_str(), listed(samples.cycles).c_str());
  std::fflush(stdout);
}

// What a launch took. What goes on in one place is what block 0 says; a rate is that of all blocks, the slowest one
// included.
inline void add(const Case& c, const std::vector<Span>& spans, Samples& samples) {
  if (c.quantity == Quantity::kLatency) {
    samples.ns.push_back(static_cast<double>(spans[0].end - spans[0].begin));
    samples.cycles.push_back(static_cast<double>(spans[0].cycles));
    return;
  }
  uint64_t begin = UINT64_MAX, end = 0;
  int64_t cycles = 0;
  for (const Span& span : spans) {
    begin = std::min(begin, span.begin);
    end = std::max(end, span.end);
    cycles = std::max(cycles, span.cycles);
  }
  samples.ns.push_back(static_cast<double>(end - begin));
  samples.cycles.push_back(static_cast<double>(cycles));
}

// What a launch counted wrong, or "".
template <class Kernel>
std::string miscounted(const Params& p, const std::vector<Span>& spans) {
  for (int block = 0; block < p.blocks; ++block) {
    const uint32_t expected = Kernel::expected(p, block);
    if (spans[block].counted != expected) {
      return "block " + std::to_string(block) + " counted " + std::to_string(spans[block].counted) + ", not " +
             std::to_string(expected);
    }
  }
  return {};
}

namespace detail {

constexpr int kThreads = 256;
constexpr int64_t kMiB = 1 << 20;

// Bytes of an operand of which every block of a group has a part of as many quads as the others.
inline int64_t shared_out(int64_t kib, int group, const Machine& m) {
  const int64_t quads = kib * 1024 / m.shrink / static_cast<int64_t>(sizeof(Quad));
  return std::max<int64_t>(quads / group, 1) * group * static_cast<int64_t>(sizeof(Quad));
}

template <class Runner>
void barriers(Runner& run) {
  const Machine& m = run.machine;
  const int many = 1000 / m.shrink, all = m.processors;
  std::vector<int> groups;
  for (const int group : {8, 16, 32, 64}) {
    if (group < all) groups.push_back(group);
  }
  groups.push_back(all);
  const auto filled = [&](int group) { return all / group * group; };
  const auto half = m.shared / 2 + 1024;  // so that a multiprocessor has one block

  if (run.wanted("grid_barrier")) {
    for (const int group : groups) {
      Case c{"grid_barrier", "counter", Quantity::kLatency, 1, filled(group), kThreads, group, many};
      c.shared = half;
      run.template measure<CounterBarrier>(c);
      c.variant = "flags";
      run.template measure<FlagBarrier>(c);
    }
  }
  Case pair{"flag", "release, acquire", Quantity::kLatency, 2, all, 32, all, many};
  pair.shared = half;
  pair.pairs = true;
  if (run.wanted("flag")) run.template measure<FlagPingPong>(pair);
  if (run.wanted("sentinel")) {
    pair.name = "sentinel";
    pair.variant = "16 bytes, polled";
    pair.data = int64_t{2} * 128 * (many + 1);
    run.template measure<SentinelPingPong>(pair);
  }
  if (run.wanted("grid_exchange")) {
    for (const int group : groups) {
      for (const int64_t kib : {4, 16, 64}) {
        const int64_t bytes = shared_out(kib, group, m);
        if (bytes > m.shared) continue;
        Case c{"grid_exchange", "flags", Quantity::kLatency, 1, filled(group), kThreads, group, many / 2};
        c.bytes = bytes;
        c.data = 2 * bytes;
        c.shared = std::max<int64_t>(half, bytes);
        run.template measure<FlagExchange>(c);
        c.variant = "sentinel";
        // All that is polled, of all groups, has to stay in the cache.
        c.iterations = static_cast<int>(std::min<int64_t>(c.iterations, 16 * kMiB / (bytes * (all / group)) - 1));
        c.data = (c.iterations + 1) * bytes;
        run.template measure<SentinelExchange>(c);
      }
    }
  }
}

template <class Runner>
void clusters(Runner& run) {
  const Machine& m = run.machine;
  const int many = 2000 / m.shrink;
  const auto half = m.shared / 2 + 1024;
  const auto mail = static_cast<int64_t>(sizeof(Mailbox));
  for (const int cluster : {2, 4, 8, 16}) {  // of one block, what it sends to itself is undefined
    if (m.cluster != 0 && cluster > m.cluster) continue;
    Case c{"cluster_barrier", "release, acquire", Quantity::kLatency, 1, 0, kThreads, cluster, many};
    c.shared = half;
    if (run.wanted("cluster_barrier")) {
      run.template measure<ClusterBarrier<true>>(c);
      c.variant = "relaxed";
      run.template measure<ClusterBarrier<false>>(c);
    }
    if (run.wanted("push")) {
      Case pair{"push", "16 bytes, mbarrier", Quantity::kLatency, 2, 0, 32, cluster, many};
      pair.pairs = true;
      pair.shared = half;
      run.template measure<PushPingPong>(pair);
    }
    for (const int64_t kib : {4, 16, 32}) {
      c.iterations = many / 2;
      c.bytes = shared_out(kib, cluster, m);
      c.shared = std::max(half, mail + 2 * c.bytes);
      if (run.wanted("push_bandwidth")) {
        c.name = "push_bandwidth";
        c.variant = "pairs";
        c.quantity = Quantity::kBytes;
        c.work = static_cast<double>(c.bytes);  // of each block: the runner knows how many there are
        run.template measure<PushBandwidth>(c);
      }
      if (run.wanted("cluster_exchange")) {
        c.name = "cluster_exchange";
        c.variant = "push to all";
        c.quantity = Quantity::kLatency;
        c.work = 1;
        run.template measure<ClusterExchange>(c);
      }
    }
  }
}

template <class Runner>
void memory(Runner& run) {
  const Machine& m = run.machine;
  constexpr int kReaders = 512;
  const int64_t tile = int64_t{kLoads} * kReaders * 16 / (m.shrink > 1 ? 8 : 1);  // that a block reads at a time
  const int readers = m.shrink > 1 ? kReaders / 8 : kReaders;
  const auto half = m.shared / 2 + 1024;
  if (run.wanted("l2_bandwidth")) {
    for (const int blocks : {1, 8, 32, 64, m.processors}) {
      if (blocks > m.processors) continue;
      for (const int tiles : {2, 4}) {  // 128 and 256 KiB: 17 and 34 MB on 132 multiprocessors
        Case c{"l2_bandwidth", "", Quantity::kBytes, 0, blocks, readers, blocks, 200 / m.shrink};
        c.bytes = tiles * tile;
        c.work = static_cast<double>(c.bytes);
        c.data = blocks * c.bytes;
        c.shared = std::max<int64_t>(half, tile);
        c.variant = "own, loads";
        run.template measure<Read<From::kL2>>(c);
        c.variant = "own, copies to shared memory";
        run.template measure<Read<From::kL2Copied>>(c);
        if (blocks == m.processors && tiles == 2 && blocks > 1) {
          c.group = 1;
          c.data = c.bytes;
          c.variant = "the same, copies to shared memory";
          run.template measure<Read<From::kL2Copied>>(c);
        }
      }
    }
  }
  if (run.wanted("l2_latency")) {
    Case c{"l2_latency", "dependent loads", Quantity::kLatency, 1, 1, 32, 1, 4000 / m.shrink};
    c.bytes = c.data = m.shrink > 1 ? kMiB / 16 : 8 * kMiB;
    run.template measure<L2Latency>(c);
  }
  if (run.wanted("shared_bandwidth")) {
    Case c{"shared_bandwidth", "16-byte loads", Quantity::kBytes, 0,
           m.processors,       readers,         m.processors,     2000 / m.shrink};
    c.bytes = tile;
    c.work = static_cast<double>(tile);
    c.shared = std::max<int64_t>(half, tile);
    run.template measure<Read<From::kShared>>(c);
  }
}

template <Operands kOperands, class Runner>
void products(Runner& run, const char* operands, int one) {
  const Machine& m = run.machine;
  const auto half = m.shared / 2 + 1024;
  Case c{"mma", operands, Quantity::kMultiplyAdds, 0, m.processors, 0, m.processors, 4000 / m.shrink};
  c.shared = half;
  c.word = one;
  if (run.wanted("mma")) {
    for (const int warps : {4, 8, 16}) {
      c.threads = warps * kWarp;
      c.work = 8.0 * warps * multiply_adds(kOperands);
      run.template measure<MatrixProduct<kOperands, 8>>(c);
    }
  }
  if (run.wanted("mma_latency")) {
    c.name = "mma_latency";
    c.quantity = Quantity::kLatency;
    c.threads = kWarp;
    c.iterations *= m.shrink > 1 ? 1 : 8;
    c.work = 1;
    run.template measure<MatrixProduct<kOperands, 1>>(c);
  }
}

template <class Runner>
void arithmetic(Runner& run) {
  products<Operands::kBFloat16>(run, "bfloat16", 0x3f803f80);
  products<Operands::kFloat16>(run, "float16", 0x3c003c00);
  products<Operands::kTf32>(run, "tf32", 0x3f800000);
  if (run.wanted("multiply_add")) {
    const Machine& m = run.machine;
    Case c{"multiply_add", "float32",      Quantity::kMultiplyAdds, 8.0 * 512, m.processors, 512,
           m.processors,   8000 / m.shrink};
    c.shared = m.shared / 2 + 1024;
    c.word = 1;
    run.template measure<MultiplyAdd<8>>(c);
  }
}

}  // namespace detail

template <class Runner>
void suite(Runner& run) {
  detail::barriers(run);
  detail::clusters(run);
  detail::memory(run);
  detail::arithmetic(run);
}

}  // namespace fusedrnn::micro
