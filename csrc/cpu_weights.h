// The weights of a layer as forward takes them, and those that inference keeps from call to call.
#pragma once

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/kept.h"
#include "cpu_products.h"

namespace fusedrnn {
namespace {

// The weights of a layer as forward takes them, all directions of each one after the other.
struct Panels {
  OptionalScratch w_ih, w_hh, w_hr;
};
using SharedPanels = std::shared_ptr<const Panels>;

// Affine maps of the input that take the place of gates come out in GateOrder, others block after block.
Packing input_packing(const Layer& layer, bool in_place) {
  const Sizes& s = layer.sizes;
  return in_place && !gates_in_blocks(s.H, layer.kernels.lanes) ? rows_of(layer.kernels, 4 * s.H, s.I)
                                                                : gates_of(layer.kernels, s.H, s.I);
}
Packing recurrent_packing(const Layer& layer) { return gates_of(layer.kernels, layer.sizes.H, layer.sizes.P); }
Packing projection_packing(const Layer& layer) { return rows_of(layer.kernels, layer.sizes.P, layer.sizes.H); }

OptionalScratch packed_projection(const Layer& layer) {
  if (!layer.sizes.projected) return std::nullopt;
  return packed(layer, projection_packing(layer), [&](int64_t d) { return layer.weights.w_hr(d); });
}

SharedPanels packed_weights(const Layer& layer, bool in_place = false) {
  return std::make_shared<Panels>(
      Panels{packed(layer, input_packing(layer, in_place), [&](int64_t d) { return layer.weights.w_ih(d); }),
             packed(layer, recurrent_packing(layer), [&](int64_t d) { return layer.weights.w_hh(d); }),
             packed_projection(layer)});
}

int64_t panel_bytes(const Layer& layer) {
  const Kernels& kernels = layer.kernels;
  const int64_t numbers = input_packing(layer, false).numbers(kernels) + recurrent_packing(layer).numbers(kernels) +
                          (layer.sizes.projected ? projection_packing(layer).numbers(kernels) : 0);
  return layer.sizes.D * numbers * layer.compute_bytes();
}

// Inference keeps packed weights, and looks at every call whether the weights still are what was packed: reading them
// takes a sixth of the time of packing them. No version is trusted, which does not count what is written through .data,
// NumPy or another process.
Kept<SharedPanels>& kept_panels() {
  static auto* const kept = new Kept<SharedPanels>(kept_by_default());  // never destroyed, as the pool is not
  return *kept;
}

std::vector<uint64_t> fingerprint_of(const Layer& layer) {
  constexpr int64_t kPiece = 32 << 10, kWords = 8;
  struct Piece {
    const char* from;
    int64_t bytes;
  };
  std::vector<Piece> pieces;
  for (const Tensor& weight : layer.weights.all) {
    if (weight.dim() != 2) continue;  // biases are not packed
    const auto* const from = static_cast<const char*>(weight.const_data_ptr());
    const int64_t bytes = weight.numel() * weight.element_size();
    for (int64_t k = 0; k < bytes; k += kPiece) pieces.push_back({from + k, std::min(kPiece, bytes - k)});
  }
  std::vector<uint64_t> words(pieces.size() * kWords);
  torch::stable::parallel_for(0, static_cast<int64_t>(pieces.size()), 4, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      layer.kernels.fingerprint(pieces[k].from, pieces[k].bytes, &words[k * kWords]);
    }
  });
  return words;
}

// packed_weights, or what they were before.
SharedPanels kept_weights(const Layer& layer) {
  Kept<SharedPanels>& kept = kept_panels();
  const int64_t bytes = panel_bytes(layer);
  if (bytes > kept.limit()) return packed_weights(layer);
  const Sizes& s = layer.sizes;
  std::vector<intptr_t> place{reinterpret_cast<intptr_t>(&layer.kernels), s.I, s.H, s.P, s.projected};
  for (const Tensor& weight : layer.weights.all) place.push_back(reinterpret_cast<intptr_t>(weight.const_data_ptr()));
  std::vector<uint64_t> fingerprint = fingerprint_of(layer);
  if (std::optional<SharedPanels> panels = kept.find(place, fingerprint)) return *panels;
  SharedPanels panels = packed_weights(layer);
  kept.keep({std::move(place), std::move(fingerprint), panels, bytes});
  return panels;
}

}  // namespace
}  // namespace fusedrnn
