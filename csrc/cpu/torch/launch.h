// A launch: its team, and the memory that its workers share.
#pragma once

#include <cstring>
#include <memory>
#include <optional>

#include "../plan.h"
#include "layer.h"

namespace fusedrnn {
namespace {

Team plan_team(const Layer& layer) {
  return plan_team(layer.sizes, layer.spec, layer.kernels, layer.compute == ScalarType::Double,
                   torch::stable::get_num_threads());
}

// Runs f(worker) for every worker of a team, at the same time as far as threads are free.
template <class F>
void launch(const Team& team, const F& f) {
  torch::stable::parallel_for(0, team.workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) f(static_cast<int>(worker));
  });
}

// Memory that begins with a cache line, uninitialised.
class CacheLines {
 public:
  static constexpr size_t kLine = 64;

  explicit CacheLines(size_t bytes) : storage_(new char[bytes + kLine]) { poison(storage_.get(), bytes + kLine); }

  char* begin() const {
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(storage_.get()) + kLine - 1) / kLine * kLine);
  }

 private:
  std::unique_ptr<char[]> storage_;
};

// The claims of team.h, aligned and zeroed.
class Lines {
 public:
  Lines(Team& team, const Sizes& s, const Kernels& kernels) {
    if (team.split != Team::Split::kUnits) return;
    const size_t bytes = (1 + s.D * blocks_of(s.H, kernels.lanes)) * CacheLines::kLine;
    storage_.emplace(bytes);
    std::memset(storage_->begin(), 0, bytes);
    team.lines = storage_->begin();
  }

 private:
  std::optional<CacheLines> storage_;
};

}  // namespace
}  // namespace fusedrnn
