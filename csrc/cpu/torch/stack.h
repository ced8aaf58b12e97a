// A stack of layers in inference: layer after layer, or all at the same time.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "forward.h"

namespace fusedrnn {
namespace {

// Layers of one direction, of which a worker computes some steps once the layer before has computed them. Workers do
// not wait for each other at every step, and the core of a worker keeps the weights of a layer in its cache.
//
// No worker has to run at the same time as another: each takes whatever steps can be computed and are not taken.
class LayerPipeline {
 public:
  // layers[k].x is outs[k - 1].y, with the numbers that products take. Both must outlive this.
  LayerPipeline(const std::vector<Layer>& layers, std::vector<Outputs>& outs)
      : T_(layers[0].sizes.T), steps_(pipelined_steps(layers[0].sizes, layers[0].spec)) {
    for (size_t k = 0; k < layers.size(); ++k) stages_.push_back(std::make_unique<Stage>(layers[k], outs[k], steps_));
  }

  // Whether it is for a stack whose first layer has these sizes, and x this dtype.
  static bool is_for(const Sizes& s, const CellSpec& cell, const Kernels& kernels, ScalarType dtype, int64_t layers) {
    const ScalarType compute = compute_type(dtype);
    const bool takes_y = kernels.take_pairs() ? kernels.padded(s.P) == s.P : dtype == compute;
    const int64_t threads = torch::stable::get_num_threads();
    const Team team = plan_team(s, cell, kernels, compute == ScalarType::Double, threads);
    return s.B > 0 && takes_y &&
           pipelines_layers(s, cell, kernels, team, compute == ScalarType::Double, layers, threads);
  }

  void run() {
    const int64_t workers = std::min<int64_t>(static_cast<int64_t>(stages_.size()), torch::stable::get_num_threads());
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) work(static_cast<size_t>(worker));
    });
  }

 private:
  struct Stage {
    Stage(const Layer& layer, Outputs& out, int64_t steps)
        : arguments(layer, out),
          sequence(layer, arguments.params, std::nullopt, {Team::Split::kRows, 1, nullptr}, steps) {}

    ForwardArguments arguments;
    SequenceForward sequence;
    std::atomic<int64_t> done{0};    // steps
    std::atomic<bool> taken{false};  // by a worker
  };

  // Takes steps of the layer that it took before, if there are any, or else of the next one that has some.
  void work(size_t layer) {
    for (;;) {
      size_t finished = 0, tried = 0;
      while (tried < stages_.size() && !attempt(layer)) {
        finished += stages_[layer]->done.load(std::memory_order_acquire) == T_ ? 1 : 0;
        layer = (layer + 1) % stages_.size();
        ++tried;
      }
      if (finished == stages_.size() || has_failed_.load(std::memory_order_relaxed)) return;
      if (tried == stages_.size()) std::this_thread::yield();
    }
  }

  // The end of the next steps of a layer, or 0 where it has none, or the layer before has not computed them.
  int64_t end_of_next(size_t layer) const {
    const int64_t begin = stages_[layer]->done.load(std::memory_order_acquire), end = std::min(begin + steps_, T_);
    const bool are_there = layer == 0 || stages_[layer - 1]->done.load(std::memory_order_acquire) >= end;
    return begin < T_ && are_there ? end : 0;
  }

  // Computes the next steps of a layer, if no other worker does.
  bool attempt(size_t layer) {
    Stage& stage = *stages_[layer];
    if (end_of_next(layer) == 0 || stage.taken.exchange(true, std::memory_order_acquire)) return false;
    const int64_t end = end_of_next(layer);  // another worker may have computed the ones that were there
    if (end > 0) {
      try {
        stage.sequence.run(stage.done.load(std::memory_order_relaxed), end);
      } catch (...) {
        has_failed_ = true;
        throw;
      }
      stage.done.store(end, std::memory_order_release);
    }
    stage.taken.store(false, std::memory_order_release);
    return end > 0;
  }

  const int64_t T_, steps_;
  std::vector<std::unique_ptr<Stage>> stages_;
  std::atomic<bool> has_failed_{false};
};

// All layers, of which layer(k, x) is the k-th one. The outputs are those of the last layer, and the states of all.
template <class F>
Outputs forward_stack(int64_t layers, const Tensor& x, const F& layer) {
  const auto after = [&](const Outputs& before, const Layer& next) {
    STD_TORCH_CHECK(next.C() == before.cn.size(2) && next.sizes.P == before.hn.size(2),
                    "all layers must have states of one size");
    Outputs out = before;
    out.y = empty_y(next);
    return out;
  };
  const Layer first = layer(0, x);
  Outputs out(first);
  if (!LayerPipeline::is_for(first.sizes, first.spec, first.kernels, x.scalar_type(), layers)) {
    forward(first, out);
    for (int64_t index = 1; index < layers; ++index) {
      const Layer next = layer(index, out.y);
      out = after(out, next);
      forward(next, out);
    }
    return out;
  }
  std::vector<Layer> stack{first};
  std::vector<Outputs> outs{out};
  for (int64_t index = 1; index < layers; ++index) {
    stack.push_back(layer(index, outs.back().y));
    outs.push_back(after(outs.back(), stack.back()));
  }
  LayerPipeline(stack, outs).run();
  return outs.back();
}

}  // namespace
}  // namespace fusedrnn
