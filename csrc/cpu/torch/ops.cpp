// The CPU operators: tensors in, plain structs out.
// A program without Python has all of this. The fake kernels and every other check live in Python (fusedrnn/ops.py,
// fusedrnn/functional.py).
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "backward.h"
#include "stack.h"

namespace fusedrnn {
namespace {

// ---------------------------------------------------------------------------------------------- forward

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cpu_forward(
    std::string cell, Tensor x, bool bidirectional, OptionalTensor h0, OptionalTensor c0, OptionalTensor lengths,
    OptionalTensor reset, bool cell_states, bool reserve, Tensor w0, Tensor w1, OptionalTensor w2, OptionalTensor w3,
    OptionalTensor w4, OptionalTensor w5, OptionalTensor w6, OptionalTensor w7, OptionalTensor w8, OptionalTensor w9,
    OptionalTensor w10, OptionalTensor w11, OptionalTensor noise) {
  const NoGrad no_grad;
  const Tensors flat = listed(w0, w1, {&w2, &w3, &w4, &w5, &w6, &w7, &w8, &w9, &w10, &w11});
  const Layer layer(cell_of(cell), x, flat, bidirectional, h0, c0, lengths, reset, noise);
  const Sizes& s = layer.sizes;
  const ScalarType dtype = x.scalar_type();
  Outputs out(layer);
  if (cell_states || reserve) {
    const int64_t row = s.D * layer.C();
    out.c = cell_states ? layer.empty_rows(row, dtype) : layer.pooled_rows(row, dtype);
  }
  if (reserve) out.saved = layer.pooled_saved();
  forward(layer, out);
  const auto or_empty = [&](const OptionalTensor& tensor) { return tensor.has_value() ? *tensor : empty({0}, dtype); };
  return {out.y, out.hn, out.cn, or_empty(out.c), or_empty(out.saved)};
}

// torch moves the weights out of the list that it is called with. It is for functional.py alone, whose list is made for
// the call, and is never recorded in a program.
std::tuple<Tensor, Tensor, Tensor> cpu_infer(std::string cell, Tensor x, Tensors flat, int64_t layers,
                                             bool bidirectional, OptionalTensor h0, OptionalTensor c0) {
  const NoGrad no_grad;
  const int64_t all = static_cast<int64_t>(flat.size());
  STD_TORCH_CHECK(layers > 0 && all % layers == 0, "weights must be as many for each of ", layers, " layers");
  const Outputs out = forward_stack(layers, x, [&](int64_t index, const Tensor& input) {
    const auto first = flat.begin() + index * (all / layers);
    return Layer(cell_of(cell), input, Tensors(first, first + all / layers), bidirectional, h0, c0, std::nullopt,
                 std::nullopt, std::nullopt, index, layers);
  });
  return {out.y, out.hn, out.cn};
}

// ---------------------------------------------------------------------------------------------- backward

// dx, dh0, dc0 and the gradient of each weight, undefined for one that is not given.
using Gradients = decltype(std::tuple_cat(std::array<Tensor, 3>{}, std::array<Tensor, kMaxWeights>{}));

Gradients gradients_of(Tensor dx, Tensor dh0, Tensor dc0, Tensors dweights) {
  std::array<Tensor, kMaxWeights> each;
  std::move(dweights.begin(), dweights.end(), each.begin());
  return std::tuple_cat(std::array{std::move(dx), std::move(dh0), std::move(dc0)}, std::move(each));
}

Gradients cpu_backward(std::string cell, OptionalTensor dy, OptionalTensor dhn, OptionalTensor dcn, OptionalTensor dc,
                       Tensor x, bool bidirectional, OptionalTensor h0, OptionalTensor c0, OptionalTensor lengths,
                       OptionalTensor reset, Tensor y, Tensor c, Tensor reserve, std::vector<bool> needs, Tensor w0,
                       Tensor w1, OptionalTensor w2, OptionalTensor w3, OptionalTensor w4, OptionalTensor w5,
                       OptionalTensor w6, OptionalTensor w7, OptionalTensor w8, OptionalTensor w9, OptionalTensor w10,
                       OptionalTensor w11, OptionalTensor noise) {
  const NoGrad no_grad;
  const Tensors flat = listed(w0, w1, {&w2, &w3, &w4, &w5, &w6, &w7, &w8, &w9, &w10, &w11});
  const Layer layer(cell_of(cell), x, flat, bidirectional, h0, c0, lengths, reset, noise);
  const Sizes& s = layer.sizes;
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(needs.size() == 3 + flat.size(), "needs must have one entry for x, h0, c0 and each weight");
  const bool needs_x = needs[0], needs_h0 = needs[1], needs_c0 = needs[2];
  const auto needs_weight = [&](int64_t d, int64_t k) { return needs[3 + d * layer.weights.count + k]; };

  y = dense(y);
  c = dense(c);
  reserve = dense(reserve);
  layer.check_rows("y", y, s.D * s.P);
  layer.check_rows("c", c, s.D * layer.C());
  layer.check_saved(reserve);
  const std::array<OptionalTensor, 4> gradients{dense(dy), dense(dhn), dense(dcn), dense(dc)};
  layer.check_rows("dy", gradients[0], s.D * s.P);
  layer.check_state("dhn", gradients[1], s.P);
  layer.check_state("dcn", gradients[2], layer.C());
  layer.check_rows("dc", gradients[3], s.D * layer.C());
  for (const OptionalTensor& tensor :
       {gradients[0], gradients[3], OptionalTensor(y), OptionalTensor(c), OptionalTensor(reserve)}) {
    if (tensor.has_value())
      STD_TORCH_CHECK(tensor->scalar_type() == dtype, "gradients and saved tensors must have the dtype of x");
  }

  Tensor dh0 = needs_h0 ? layer.empty_state(s.P) : empty({0}, dtype);
  Tensor dc0 = needs_c0 ? layer.empty_state(layer.C()) : empty({0}, dtype);
  if (s.B == 0) {
    Tensors dweights;
    Tensor dx = needs_x ? layer.empty_rows(s.I, dtype) : empty({0}, dtype);
    for (size_t k = 0; k < flat.size(); ++k) {
      Tensor zero = torch::stable::empty_like(flat[k]);
      dweights.push_back(needs[3 + k] ? torch::stable::zero_(zero) : empty({0}, dtype));
    }
    return gradients_of(dx, dh0, dc0, dweights);
  }

  BackwardParams params{};
  params.sizes = s;
  params.sequence = layer.sequence();
  params.dy = pointer(gradients[0]);
  params.dhn = pointer(gradients[1]);
  params.dcn = layer.has_cell() ? pointer(gradients[2]) : nullptr;
  params.dc = layer.has_cell() ? pointer(gradients[3]) : nullptr;
  params.h0 = pointer(layer.h0);
  params.y = y.const_data_ptr();
  params.noise = layer.noise_params();
  for (int64_t d = 0; d < s.D; ++d) {
    params.w_p[d] = layer.has_parameters() ? layer.weights.w_p(d).const_data_ptr() : nullptr;
  }
  params.saved = reserve.const_data_ptr();
  params.carry0 = layer.has_cell() ? pointer(layer.c0) : params.h0;
  params.carry = layer.has_cell() ? c.const_data_ptr() : params.y;
  params.dh0 = needs_h0 ? pointer(dh0) : nullptr;
  params.dc0 = needs_c0 && layer.has_cell() ? pointer(dc0) : nullptr;
  bool needs_w_hh = false;
  for (int64_t d = 0; d < s.D; ++d) needs_w_hh |= needs_weight(d, 1);
  StepGradients steps = backward_sequence(layer, params, needs_w_hh);
  Tensor dx = needs_x ? input_gradient(layer, steps) : empty({0}, dtype);
  return gradients_of(dx, dh0, dc0, weight_gradients(layer, steps, needs_weight));
}

// ---------------------------------------------------------------------------------------------- masks

Tensor cpu_masks(Tensor seed, int64_t numbers, std::vector<double> p, std::vector<double> values, bool float64) {
  const auto kinds = static_cast<int64_t>(p.size());
  const int64_t blocks = blocks_of(numbers, kMaskBlock);
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, "seed must be one int64");
  STD_TORCH_CHECK(p.size() == values.size(), "p and values must have a number for each mask");
  STD_TORCH_CHECK(numbers >= 0 && blocks <= int64_t{1} << 28, "a mask has at most 2^34 numbers, got ", numbers);
  for (double one : p) STD_TORCH_CHECK(0 <= one && one <= 1, "p must be in 0..1, got ", one);

  const auto fill = (*isa().kernels)[static_cast<size_t>(float64 ? Dtype::kFloat64 : Dtype::kFloat32)].masks;
  Tensor masks = empty({kinds, numbers}, float64 ? ScalarType::Double : ScalarType::Float);
  constexpr int64_t kBlocksOfAThread = 256;
  torch::stable::parallel_for(0, kinds * blocks, kBlocksOfAThread, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin / blocks; k * blocks < end; ++k) {
      const MaskParams params{
          static_cast<char*>(masks.mutable_data_ptr()) + k * numbers * bytes_of(masks.scalar_type()),
          numbers,
          *static_cast<const uint64_t*>(seed.const_data_ptr()),
          static_cast<uint32_t>(k),
          static_cast<int32_t>(std::lround(p[k] * 65536)),
          values[k]};
      fill(params, std::max(begin - k * blocks, int64_t{0}), std::min(end - k * blocks, blocks));
    }
  });
  return masks;
}

// ---------------------------------------------------------------------------------------------- introspection and
// caches

// Selects an instruction set by name ("" for the best one), or only tells which is in use.
std::string cpu_isa(std::optional<std::string> select) {
  if (select.has_value()) selected_isa = find_isa(*select);
  return isa().name;
}

std::string cpu_plan(std::string cell, int64_t T, int64_t B, int64_t I, int64_t H, int64_t P, int64_t D,
                     ScalarType dtype, int64_t layers) {
  const Sizes s{T, B, T * B, I, H, P, D, P != H};
  const Kernels& kernels = kernels_of(dtype);
  const CellSpec& spec = kernels.cells[static_cast<size_t>(cell_of(cell).kind)].spec;
  const std::string name = std::string(isa().name) + ", ";
  if (T == 1 && (packs_in_cache(s) || is_short(s, kernels, false))) return name + "one step, weights read as they lie";
  if (LayerPipeline::is_for(s, spec, kernels, dtype, layers)) {
    const int64_t steps = pipelined_steps(s, spec);
    return name + "layers at the same time, each by a thread, " + std::to_string(steps) + " steps at a time";
  }
  const bool is_double = compute_type(dtype) == ScalarType::Double;
  const Team team = plan_team(s, spec, kernels, is_double, torch::stable::get_num_threads());
  return name + std::to_string(team.workers) + (team.workers == 1 ? " thread" : " threads") + " by " +
         (team.split == Team::Split::kRows ? "batch rows, no synchronisation"
                                           : "hidden units, with a barrier at every step");
}

// Sets how many bytes of packed weights may be kept, and as many of memory, or leaves that as it is. Returns it, and
// how many are kept of each.
std::tuple<int64_t, int64_t, int64_t> cpu_keep(std::optional<int64_t> limit) {
  STD_TORCH_CHECK(!limit.has_value() || *limit >= 0, "limit must be 0 or more bytes, got ", limit.value_or(0));
  Cache<SharedPanels>& panels = panel_cache();
  MemoryPool& memory = MemoryPool::instance();
  if (limit.has_value()) {
    panels.set_limit(*limit);
    memory.set_limit(*limit);
  }
  return {panels.limit(), panels.bytes(), memory.bytes()};
}

// Whether memory is filled with NaN before it is worked in or returned.
void cpu_poison(bool on) { poisons = on; }

STABLE_TORCH_LIBRARY_FRAGMENT(fusedrnn, library) {
#define OPERATOR(name, schema) library.def(#name schema);
#include "../../../fusedrnn/operators.def"
#undef OPERATOR
}

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CPU, library) {
  library.impl("cpu_forward", TORCH_BOX(&cpu_forward));
  library.impl("cpu_backward", TORCH_BOX(&cpu_backward));
  library.impl("cpu_infer", TORCH_BOX(&cpu_infer));
  library.impl("cpu_masks", TORCH_BOX(&cpu_masks));
}

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CompositeExplicitAutograd, library) {
  library.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  library.impl("cpu_keep", TORCH_BOX(&cpu_keep));
  library.impl("cpu_plan", TORCH_BOX(&cpu_plan));
  library.impl("cpu_poison", TORCH_BOX(&cpu_poison));
}

}  // namespace
}  // namespace fusedrnn
