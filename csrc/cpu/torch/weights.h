// The weights of a layer as forward takes them, and those that inference keeps from call to call.
#pragma once

#if !defined(_WIN32)
#include <pthread.h>
#endif

#include <cstring>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "../cache.h"
#include "products.h"

namespace fusedrnn {
namespace {

// The weights of a layer as forward takes them, all directions of each one after the other.
struct Panels {
  OptionalScratch w_ih, w_hh, w_hr;
};
using SharedPanels = std::shared_ptr<const Panels>;

// The input's maps that take the place of saved values come out in SavedOrder, others panel after panel.
PanelLayout input_layout(const Layer& layer, bool in_place) {
  const Sizes& s = layer.sizes;
  return in_place && !saved_in_blocks(s.H, layer.spec.saved, layer.kernels.lanes)
             ? rows_of(layer.kernels, layer.spec.gates * s.H, s.I)
             : maps_of(layer.kernels, layer.spec.input, s.H, s.I);
}
PanelLayout recurrent_layout(const Layer& layer) {
  return maps_of(layer.kernels, layer.spec.recurrent, layer.sizes.H, layer.sizes.P);
}
PanelLayout projection_layout(const Layer& layer) { return rows_of(layer.kernels, layer.sizes.P, layer.sizes.H); }

OptionalScratch packed_projection(const Layer& layer) {
  if (!layer.sizes.projected) return std::nullopt;
  return packed(layer, projection_layout(layer), [&](int64_t d) { return layer.weights.w_hr(d); });
}

SharedPanels packed_weights(const Layer& layer, bool in_place = false) {
  return std::make_shared<Panels>(
      Panels{packed(layer, input_layout(layer, in_place), [&](int64_t d) { return layer.weights.w_ih(d); }),
             packed(layer, recurrent_layout(layer), [&](int64_t d) { return layer.weights.w_hh(d); }),
             packed_projection(layer)});
}

int64_t panel_bytes(const Layer& layer) {
  const Kernels& kernels = layer.kernels;
  const int64_t numbers = input_layout(layer, false).numbers(kernels) + recurrent_layout(layer).numbers(kernels) +
                          (layer.sizes.projected ? projection_layout(layer).numbers(kernels) : 0);
  return layer.sizes.D * numbers * layer.compute_bytes();
}

// Inference keeps packed weights, and looks at every call whether the weights still are what was packed: reading them
// takes a sixth of the time of packing them. No version is trusted, which does not count what is written through .data,
// NumPy or another process.
Cache<SharedPanels>& panel_cache() {
  static auto* const kept = new Cache<SharedPanels>(default_cache_bytes());  // never destroyed, as the pool is not
  return *kept;
}

// Locks the caches while a process forks, so that the child finds them consistent and unlocked. Evicted panels return
// their memory to the pool, so the panel cache is locked first.
class HeldForFork {
 public:
  static void before() noexcept {
    instruction_sets();  // what is made once is made by now, and not by a thread that the child has not
    try {
      auto& panels = panel_cache();
      auto& memory = MemoryPool::instance();
      panels.lock();
      memory.lock();
      held = true;
    } catch (...) {  // the limit in the environment is wrong: nothing was made, and nothing will be
    }
  }
  static void after() noexcept {
    if (!std::exchange(held, false)) return;
    MemoryPool::instance().unlock();
    panel_cache().unlock();
  }

 private:
  static inline bool held = false;  // by the thread that forks
};
#if !defined(_WIN32)
[[maybe_unused]] const int held_for_fork = pthread_atfork(HeldForFork::before, HeldForFork::after, HeldForFork::after);
#endif

bool is_packed(const Tensor& weight) { return weight.dim() == 2; }  // biases are not

// The fingerprint of what is packed. With `copies`, each piece is copied there first, and it is that of the copies.
std::vector<uint64_t> fingerprint_of(const Layer& layer, const Tensors* copies = nullptr) {
  constexpr int64_t kPiece = 32 << 10, kWords = 8;
  struct Piece {
    const char* from;
    char* copy;
    int64_t bytes;
  };
  std::vector<Piece> pieces;
  for (size_t k = 0; k < layer.weights.all.size(); ++k) {
    const Tensor& weight = layer.weights.all[k];
    if (!is_packed(weight)) continue;
    const auto* const from = static_cast<const char*>(weight.const_data_ptr());
    auto* const copy = copies == nullptr ? nullptr : static_cast<char*>((*copies)[k].mutable_data_ptr());
    const int64_t bytes = weight.numel() * weight.element_size();
    for (int64_t at = 0; at < bytes; at += kPiece) {
      pieces.push_back({from + at, copy == nullptr ? nullptr : copy + at, std::min(kPiece, bytes - at)});
    }
  }
  std::vector<uint64_t> words(pieces.size() * kWords);
  torch::stable::parallel_for(0, static_cast<int64_t>(pieces.size()), 4, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const auto& [from, copy, bytes] = pieces[k];
      if (copy != nullptr) std::memcpy(copy, from, bytes);
      layer.kernels.fingerprint(copy != nullptr ? copy : from, bytes, &words[k * kWords]);
    }
  });
  return words;
}

// packed_weights, through the cache.
SharedPanels cached_weights(const Layer& layer) {
  Cache<SharedPanels>& kept = panel_cache();
  const int64_t bytes = panel_bytes(layer);
  if (bytes > kept.limit()) return packed_weights(layer);
  const Sizes& s = layer.sizes;
  std::vector<intptr_t> place{reinterpret_cast<intptr_t>(&layer.cell), s.I, s.H, s.P, s.projected};
  for (const Tensor& weight : layer.weights.all) place.push_back(reinterpret_cast<intptr_t>(weight.const_data_ptr()));
  if (std::optional<SharedPanels> panels = kept.find(place, fingerprint_of(layer))) return *panels;
  // Another thread may write the weights meanwhile, and write them back. So panels and fingerprint are made of one
  // copy: whatever it caught, it is found again only by weights that are the same.
  Layer copy = layer;
  for (Tensor& weight : copy.weights.all) {
    if (is_packed(weight)) weight = empty({weight.size(0), weight.size(1)}, weight.scalar_type());
  }
  std::vector<uint64_t> fingerprint = fingerprint_of(layer, &copy.weights.all);
  SharedPanels panels = packed_weights(copy);
  kept.keep({std::move(place), std::move(fingerprint), panels, bytes});
  return panels;
}

}  // namespace
}  // namespace fusedrnn
