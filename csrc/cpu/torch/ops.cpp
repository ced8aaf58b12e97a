// The CPU operators: tensors in, plain structs out, and the launches between the large matrix products.
// A program without Python has all of this. The fake kernels and every other check live in Python (fusedrnn/ops.py,
// fusedrnn/functional.py).
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "weights.h"

namespace fusedrnn {
namespace {

// ---------------------------------------------------------------------------------------------- launching

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

// ---------------------------------------------------------------------------------------------- forward

// The least share of a parallel loop whose items take so many operations.
int64_t grain(int64_t flops) {
  return std::max<int64_t>(1, static_cast<int64_t>(kSerialFlops) / std::max<int64_t>(1, flops));
}

// One time step of a few rows: nothing is packed, and both affine maps happen in the kernel.
void forward_step(const Layer& layer, ForwardParams& params) {
  const Sizes& s = layer.sizes;
  const int64_t lanes = layer.kernels.lanes;
  layer.cell.step_start(params);
  torch::stable::parallel_for(0, s.D * blocks_of(s.H, lanes), grain(lanes * 2 * layer.spec.gates * s.B * (s.I + s.P)),
                              [&](int64_t begin, int64_t end) { layer.cell.step(params, begin, end); });
  if (!s.projected) return;
  torch::stable::parallel_for(0, s.D * s.P, grain(2 * s.B * s.H),
                              [&](int64_t begin, int64_t end) { layer.cell.step_project(params, begin, end); });
}

// One time step of more rows: a worker packs the weights of its chunks in its cache. Where there are fewer chunks than
// threads, rows are shared as well.
void forward_step_of_batch(const Layer& layer, ForwardParams& params) {
  const Sizes& s = layer.sizes;
  const Kernels& kernels = layer.kernels;
  const Tensor x = operand_rows(kernels, layer.x, layer.compute);
  params.x_padded = x.const_data_ptr();
  params.x_stride = kernels.padded(s.I);
  layer.cell.step_start(params);
  const int64_t blocks = chunk_blocks(layer.spec.gates), panels = layer.spec.maps * blocks / 4;
  const int64_t chunks = s.D * shared_blocks(s, layer.spec, kernels);
  const int64_t parts = row_parts(s.B, chunks, torch::stable::get_num_threads());
  const int64_t flops = blocks * kernels.lanes * 2 * layer.spec.gates * s.B / parts * (s.I + s.P);
  torch::stable::parallel_for(0, chunks * parts, grain(flops), [&](int64_t begin, int64_t end) {
    const GemmParams product{.M = s.B,
                             .N = std::min(end - begin, chunks) * panels * 4 * kernels.lanes,
                             .K = kernels.inputs(std::max(s.I, s.P)),
                             .c_in_blocks = true};
    const int64_t bytes = product.M * product.N * layer.compute_bytes() + kernels.gemm_scratch(product);
    const Scratch own(blocks_of(bytes, sizeof(float)), ScalarType::Float);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = std::max(begin - part * chunks, int64_t{0}), last = std::min(end - part * chunks, chunks);
      const int64_t row = part * s.B / parts, row_end = (part + 1) * s.B / parts;
      if (first < last) layer.cell.step_of_batch(params, first, last, row, row_end, own.begin());
    }
  });
}

// Steps whose input's affine maps are computed at a time: so many that they pass through a cache, where they are not
// kept, and still fill the rows of a matrix product for every thread.
int64_t steps_at_a_time(const Layer& layer) {
  const Sizes& s = layer.sizes;
  const int64_t row_bytes = s.D * layer.spec.gates * s.H * layer.compute_bytes();
  const int64_t rows = std::max(kChunkBytes / row_bytes, kGemmRows * torch::stable::get_num_threads());
  const int64_t parts = blocks_of(s.N, rows);
  return blocks_of(s.T, parts);
}

// The biases of maps [begin, end) of each direction, as these maps begin with them.
class Biases {
 public:
  Biases(const Layer& layer, const ForwardParams& params, int begin, int end, bool in_chunks = true) {
    if (!layer.weights.biased() || begin == end) return;
    const Sizes& s = layer.sizes;
    const int64_t lanes = layer.kernels.lanes, blocks = chunk_blocks(layer.spec.gates);
    // Whole chunks of each map, rounded up to a whole panel.
    of_direction_ =
        blocks_of((end - begin) * blocks_of(s.H, blocks * lanes) * blocks, 4) * 4 * lanes * layer.compute_bytes();
    storage_.emplace(s.D * of_direction_);
    for (int64_t d = 0; d < s.D; ++d) {
      layer.cell.add_biases(params.b_ih[d], params.b_hh[d], s.H, begin, end, in_chunks, of(d));
    }
  }

  char* of(int64_t d) const { return storage_.has_value() ? storage_->begin() + d * of_direction_ : nullptr; }

 private:
  int64_t of_direction_ = 0;
  std::optional<CacheLines> storage_;
};

// A whole sequence: the input's affine maps as matrix products, and the launches that use them; or one launch that does
// both, where the sequence is short, or where tiles are full.
void forward_sequence(const Layer& layer, ForwardParams& params, const OptionalTensor& saved) {
  const Sizes& s = layer.sizes;
  const Kernels& kernels = layer.kernels;
  const bool unpacked = is_short(s, kernels, saved.has_value());
  // Saved values replace the input's maps in place if both have the same dtype.
  const bool in_place = saved.has_value() && layer.saves_maps() && layer.x.scalar_type() == layer.compute;
  const SharedPanels panels =
      unpacked            ? std::make_shared<Panels>(Panels{std::nullopt, std::nullopt, packed_projection(layer)})
      : saved.has_value() ? packed_weights(layer, in_place)  // of training: other ones at the next call
                          : cached_weights(layer);
  params.panel_hh = pointer(panels->w_hh);
  params.panel_hr = pointer(panels->w_hr);
  params.team = plan_team(layer);
  const auto run = [&](int64_t begin, int64_t end) {
    params.begin = begin;
    params.end = end;
    const Lines lines(params.team, s, kernels);
    launch(params.team, [&](int worker) { layer.cell.forward(params, worker); });
  };
  if (unpacked) return run(0, s.T);

  const Tensor x = operand_rows(kernels, layer.x, layer.compute);
  const int64_t x_stride = kernels.padded(s.I);
  const bool fused = fuses_input(s, kernels);
  const Biases others(layer, params, fused ? 0 : layer.spec.input.end, layer.spec.maps);
  for (int64_t d = 0; d < s.D; ++d) params.biases[d] = others.of(d);
  if (fused) {
    params.panel_ih = pointer(panels->w_ih);
    params.x_padded = x.const_data_ptr();
    params.x_stride = x_stride;
    return run(0, s.T);
  }
  const Biases biases(layer, params, layer.spec.input.begin, layer.spec.input.end, !in_place);
  const int64_t steps = in_place ? s.T : steps_at_a_time(layer), most_rows = std::min(steps * s.B, s.N);
  const PanelLayout layout = input_layout(layer, in_place);
  const int64_t columns = in_place ? layer.spec.gates * s.H : layout.panels * 4 * kernels.lanes;
  OptionalScratch xg;
  if (!in_place) xg.emplace(s.D * most_rows * columns, layer.compute);
  for (int64_t begin = 0; begin < s.T; begin += steps) {
    const int64_t end = std::min(begin + steps, s.T);
    for (int64_t d = 0; d < s.D; ++d) {
      const int64_t t = d == 0 ? begin : s.T - end, first = layer.row(t), rows = layer.row(t + end - begin) - first;
      const int64_t own = d * most_rows * columns;
      void* const out = in_place ? at(*saved, own) : xg->at(own);
      gemm(kernels, {.M = rows,
                     .N = columns,
                     .K = layout.inputs,
                     .a = at(x, first * x_stride),
                     .a_stride = x_stride,
                     .panels = panels->w_ih->at(d * layout.numbers(kernels)),
                     .c = out,
                     .c_in_blocks = !in_place,
                     .by_columns = params.team.split == Team::Split::kUnits,
                     .start = biases.of(d)});
      params.xg[d] = out;
      if (!in_place) params.xg_rows[d] = rows;
    }
    run(begin, end);
  }
}

Tensor empty_y(const Layer& layer) { return layer.empty_rows(layer.sizes.D * layer.sizes.P, layer.x.scalar_type()); }

// Outputs of a forward: y; hn and cn of all layers; c and the saved values if requested.
struct Outputs {
  explicit Outputs(const Layer& layer)
      : y(empty_y(layer)), hn(layer.empty_state(layer.sizes.P)), cn(layer.empty_state(layer.C())) {}

  Tensor y, hn, cn;
  OptionalTensor c, saved;
};

void forward(const Layer& layer, Outputs& out) {
  const Sizes& s = layer.sizes;
  if (s.B == 0) return;
  // Enough for either form of h, and each of them begins with a cache line.
  const int64_t line = CacheLines::kLine, bytes = layer.compute_bytes();
  const auto in_lines = [&](int64_t numbers) { return blocks_of(numbers * bytes, line) * line; };
  const int64_t h_size = in_lines(2 * s.D * s.B * layer.kernels.padded(s.P));
  const int64_t units = blocks_of(s.H, layer.kernels.lanes) * layer.kernels.lanes;
  const int64_t carry_size = layer.has_carry() ? in_lines(s.D * s.B * units) : 0;
  const CacheLines scratch(h_size + carry_size + (s.projected ? in_lines(s.D * s.B * s.H) : 0));
  char* const h = scratch.begin();
  char* const carry = h + h_size;

  ForwardParams params{};
  params.sizes = s;
  params.sequence = layer.sequence();
  for (int64_t d = 0; d < s.D; ++d) {
    params.w_ih[d] = layer.weights.w_ih(d).const_data_ptr();
    params.w_hh[d] = layer.weights.w_hh(d).const_data_ptr();
    params.w_hr[d] = s.projected ? layer.weights.w_hr(d).const_data_ptr() : nullptr;
    params.b_ih[d] = layer.weights.biased() ? layer.weights.b_ih(d).const_data_ptr() : nullptr;
    params.b_hh[d] = layer.weights.biased() ? layer.weights.b_hh(d).const_data_ptr() : nullptr;
    params.w_p[d] = layer.has_parameters() ? layer.weights.w_p(d).const_data_ptr() : nullptr;
  }
  params.noise = layer.noise_params();
  params.h0 = layer.h0.has_value() ? at(*layer.h0, layer.own(s.P)) : nullptr;
  params.c0 = layer.c0.has_value() ? at(*layer.c0, layer.own(layer.C())) : nullptr;
  params.y = pointer(out.y);
  params.hn = at(out.hn, layer.own(s.P));
  params.cn = at(out.cn, layer.own(layer.C()));
  params.c = pointer(out.c);
  params.saved = pointer(out.saved);
  params.h = h;
  params.carry = carry;
  params.m = s.projected ? carry + carry_size : nullptr;
  params.x = layer.x.const_data_ptr();
  const bool trains = out.saved.has_value();
  // Inference finds the panels of tiles in the cache; packing them takes longer than to read the weights twice. Sums of
  // tiles are the same to the bit.
  const bool once = packs_in_cache(s) && (trains || layer.kernels.operands != Operands::kTiles);
  if (once && s.B > dot_rows(layer.kernels)) {
    forward_step_of_batch(layer, params);
  } else if (s.T == 1 && (once || is_short(s, layer.kernels, trains))) {
    forward_step(layer, params);
  } else {
    forward_sequence(layer, params, out.saved);
  }
}

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
  std::optional<Outputs> out;
  for (int64_t index = 0; index < layers; ++index) {
    const auto first = flat.begin() + index * (all / layers);
    const Layer layer(cell_of(cell), index == 0 ? x : out->y, Tensors(first, first + all / layers), bidirectional, h0,
                      c0, std::nullopt, std::nullopt, std::nullopt, index, layers);
    if (index == 0) {
      out.emplace(layer);
    } else {
      STD_TORCH_CHECK(layer.C() == out->cn.size(2) && layer.sizes.P == out->hn.size(2),
                      "all layers must have states of one size");
      out->y = empty_y(layer);
    }
    forward(layer, *out);
  }
  return {out->y, out->hn, out->cn};
}

// ---------------------------------------------------------------------------------------------- backward

// The part of a row of da that a product of its maps takes: where it begins, and how many numbers it has. Where
// operands are pairs it begins with a whole one, maybe with a number of the map before, and ends with whole inputs.
struct MapInputs {
  MapInputs(const Kernels& kernels, const MapWindow& maps, int64_t H)
      : begin(maps.begin * H - skipped(kernels, maps, H)),
        rows((maps.end - maps.begin) * H),
        skips(maps.begin * H - begin),
        numbers(kernels.padded(skips + rows)),
        maps(&maps),
        H(H) {}

  static int64_t skipped(const Kernels& kernels, const MapWindow& maps, int64_t H) {
    return kernels.take_pairs() ? maps.begin * H % 2 : 0;
  }

  // The rows of torch's weights that the numbers are multiplied with.
  MapWeights of(const Tensor& w) const { return {w.const_data_ptr(), maps, H, skips}; }

  // The same, for products that pack them, of so many columns.
  UnpackedWeights unpacked(const Kernels& kernels, const Tensor& w) const {
    return {kernels.pack_weight_rows, of(w), w.size(1)};
  }

  int64_t begin, rows, skips, numbers;
  const MapWindow* maps;
  int64_t H;
};

// Results of the launch for the matrix products, by direction: in the compute dtype; da in the layer's dtype if its
// products take pairs.
struct StepGradients {
  Scratch da;  // [N][da_stride]: the gradients of all maps, [N][M*H], and zeros
  int64_t da_stride;
  OptionalScratch h_in;       // the panels of the states that entered each step, only if w_hh needs a gradient
  OptionalScratch dh_out, m;  // [N][P] and [N][H], only with a projection
  OptionalScratch dp;         // [B][K*H], where units have parameters
};

// The panels of weights whose rows are multiplied with maps of da, of so many columns.
template <class F>
Scratch packed_for_maps(const Layer& layer, const MapInputs& inputs, int64_t columns, const F& matrix) {
  const Kernels& kernels = layer.kernels;
  const PanelLayout layout = inputs_of(kernels, columns, inputs.numbers);
  const int64_t numbers = layout.numbers(kernels);
  Scratch panels(layer.sizes.D * numbers, layer.compute);
  for_each_part(kernels, layout, layer.sizes.D, [&](int64_t d, int64_t begin, int64_t end) {
    const Tensor& w = matrix(d);
    MapRows rows(inputs.of(w));
    const auto row = [&](int64_t k) -> const void* {
      const int64_t index = rows(k);
      return index < 0 ? nullptr : at(w, index * columns);
    };
    pack_inputs(kernels, layout, row, columns, panels.at(d * numbers), begin, end);
  });
  return panels;
}

// The product of a direction's da, from the numbers of `inputs` on, with so many columns; without panels and c.
GemmParams product_of_da(const Layer& layer, const StepGradients& steps, const MapInputs& inputs, int64_t d,
                         int64_t columns) {
  return {.M = layer.sizes.N,
          .N = columns,
          .K = layer.kernels.inputs(inputs.numbers),
          .a = steps.da.at(d * layer.sizes.N * steps.da_stride + inputs.begin),
          .a_stride = steps.da_stride};
}

// da @ w_hh of the only step; see BackwardParams.
Scratch first_product(const Layer& layer, const StepGradients& steps, const MapInputs& of_state) {
  const Sizes& s = layer.sizes;
  const int64_t columns = inputs_of(layer.kernels, s.P, of_state.numbers).panels * 4 * layer.kernels.lanes;
  Scratch product(s.D * s.N * columns, layer.compute);
  for (int64_t d = 0; d < s.D; ++d) {
    const UnpackedWeights unpacked = of_state.unpacked(layer.kernels, layer.weights.w_hh(d));
    GemmParams params = product_of_da(layer, steps, of_state, d, columns);
    params.unpacked = &unpacked;
    params.c = product.at(d * s.N * columns);
    params.c_in_blocks = true;
    gemm(layer.kernels, params);
  }
  return product;
}

// The recurrence backwards. params holds the tensors that came from the caller, or go to it.
StepGradients backward_sequence(const Layer& layer, BackwardParams& params, bool needs_w_hh) {
  const Sizes& s = layer.sizes;
  const Kernels& kernels = layer.kernels;
  const int64_t N = s.N;
  const auto make = [&](int64_t numbers) { return Scratch(s.D * numbers, layer.compute); };
  const ScalarType da_type = kernels.take_pairs() ? layer.x.scalar_type() : layer.compute;
  const MapInputs of_input(kernels, layer.spec.input, s.H), of_state(kernels, layer.spec.recurrent, s.H);
  const int64_t maps = layer.spec.maps * s.H;
  const int64_t least = std::max(of_input.begin + of_input.numbers, of_state.begin + of_state.numbers);
  const int64_t stride = kernels.padded(std::max(maps, least));
  StepGradients steps{
      Scratch(s.D * N * stride, da_type), stride, std::nullopt, std::nullopt, std::nullopt, std::nullopt};
  for (int64_t row = 0; stride > maps && row < s.D * N; ++row) {
    std::memset(steps.da.at(row * stride + maps), 0, (stride - maps) * bytes_of(da_type));
  }
  if (s.projected) steps.dh_out.emplace(make(N * s.P));
  if (s.projected) steps.m.emplace(make(N * s.H));
  if (layer.has_parameters()) steps.dp.emplace(make(s.B * layer.spec.parameters * s.H));
  const Scratch dh_state = make(s.B * s.P), dcarry = make(layer.has_carry() ? s.B * s.H : 0);
  const bool keeps = params.noise.of[static_cast<size_t>(Noise::kH)] != nullptr;
  const Scratch dh_kept = make(keeps ? s.B * s.H : 0);
  OptionalScratch panel_hh, panel_hr;
  const bool once = packs_in_cache(s);
  if (s.T > 1 || (params.dh0 != nullptr && !once)) {
    panel_hh.emplace(packed_for_maps(layer, of_state, s.P, [&](int64_t d) { return layer.weights.w_hh(d); }));
  }
  if (s.projected) {
    panel_hr.emplace(packed(layer, columns_of(kernels, s.H, s.P), [&](int64_t d) { return layer.weights.w_hr(d); }));
  }
  params.panel_hh = pointer(panel_hh);
  params.panel_hr = pointer(panel_hr);
  params.da = steps.da.begin();
  params.da_stride = stride;
  params.da_begin = of_state.begin;
  params.da_inputs = of_state.numbers;
  params.dh_out = pointer(steps.dh_out);
  params.m = pointer(steps.m);
  params.dh_state = dh_state.begin();
  params.dcarry = dcarry.begin();
  params.dh_kept = keeps ? dh_kept.begin() : nullptr;
  params.dp = pointer(steps.dp);
  params.team = plan_team(layer);
  const auto run = [&](int64_t begin, int64_t end) {
    params.begin = begin;
    params.end = end;
    const Lines lines(params.team, s, kernels);
    launch(params.team, [&](int worker) { layer.cell.backward(params, worker); });
  };
  if (once) {
    run(0, 1);
    OptionalScratch product;
    if (params.dh0 != nullptr) product.emplace(first_product(layer, steps, of_state));
    params.product_hh = pointer(product);
    if (params.dh0 != nullptr || params.dc0 != nullptr) run(-1, 0);
  } else {
    run(-1, s.T);
  }
  if (needs_w_hh) {
    const PanelLayout states = inputs_of(kernels, s.P, N);
    steps.h_in.emplace(make(states.numbers(kernels)));
    params.h_in = pointer(steps.h_in);
    for_each_part(kernels, states, s.D, [&](int64_t d, int64_t begin, int64_t end) {
      kernels.entering_states(params, d * states.inputs + begin, d * states.inputs + end);
    });
  }
  return steps;
}

// dx as one matrix product a direction over all steps.
Tensor input_gradient(const Layer& layer, const StepGradients& steps) {
  const Sizes& s = layer.sizes;
  const Kernels& kernels = layer.kernels;
  const bool is_narrow = kernels.operands == Operands::kTiles && s.D == 1;
  Tensor dx = layer.pooled_rows(s.I, is_narrow ? layer.x.scalar_type() : layer.compute);
  const MapInputs of_input(kernels, layer.spec.input, s.H);
  const PanelLayout w_ih = inputs_of(kernels, s.I, of_input.numbers);
  OptionalScratch panels;  // none where workers pack them
  if (!packs_in_cache(s.N)) {
    panels.emplace(packed_for_maps(layer, of_input, s.I, [&](int64_t d) { return layer.weights.w_ih(d); }));
  }
  for (int64_t d = 0; d < s.D; ++d) {
    const UnpackedWeights unpacked = of_input.unpacked(kernels, layer.weights.w_ih(d));
    GemmParams params = product_of_da(layer, steps, of_input, d, s.I);
    params.panels = panels.has_value() ? panels->at(d * w_ih.numbers(kernels)) : nullptr;
    params.unpacked = &unpacked;
    params.c = pointer(dx);
    params.c_is_narrow = is_narrow;
    params.accumulate = d > 0;
    gemm(kernels, params);
  }
  return as(dx, layer.x.scalar_type());
}

// The panels of x, its steps being the inputs; zero at steps that do not exist.
Scratch packed_steps(const Layer& layer) {
  const Sizes& s = layer.sizes;
  const PanelLayout steps = inputs_of(layer.kernels, s.I, s.N);
  Scratch panels(steps.numbers(layer.kernels), layer.compute);
  for_each_part(layer.kernels, steps, 1, [&](int64_t, int64_t begin, int64_t end) {
    const auto row = [&](int64_t k) { return k < s.N && layer.exists(k) ? at(layer.x, k * s.I) : nullptr; };
    pack_inputs(layer.kernels, steps, row, s.I, panels.begin(), begin, end);
  });
  return panels;
}

template <class A>
void sum_rows(const void* rows, int64_t count, int64_t columns, void* sum) {
  const A* row = static_cast<const A*>(rows);
  A* const to = static_cast<A*>(sum);
  std::copy(row, row + columns, to);
  for (int64_t k = 1; k < count; ++k) {
    row += columns;
    for (int64_t n = 0; n < columns; ++n) to[n] += row[n];
  }
}

// The gradients of the biases of all maps, [M*H]: the sum over all steps.
Tensor bias_gradients(const Layer& layer, StepGradients& steps, int64_t d) {
  const Sizes& s = layer.sizes;
  const int64_t N = s.N, maps = layer.spec.maps * s.H, stride = steps.da_stride;
  if (N > kUnpackedRows || layer.kernels.take_pairs()) {
    Tensor rows = steps.da.matrix(d * N * stride, N, stride);
    rows = torch::stable::narrow(rows, 1, 0, maps);
    return torch::stable::sum(rows, std::array<int64_t, 1>{0});
  }
  // A sum of few rows is faster than a call of torch's operator.
  Tensor sum = empty({maps}, layer.compute);
  const auto of = layer.compute == ScalarType::Double ? sum_rows<double> : sum_rows<float>;
  of(steps.da.at(d * N * maps), N, maps, pointer(sum));
  return sum;
}

// The gradients of a product's maps, in torch's order, in a new tensor.
Tensor rows_of_maps(const Layer& layer, const MapWindow& maps, const Tensor& gradients) {
  const int64_t H = layer.sizes.H, bytes = H * static_cast<int64_t>(gradients.element_size());
  Tensor rows = empty({layer.spec.gates * H}, gradients.scalar_type());
  for (int map = maps.begin; map < maps.end; ++map) {
    std::memcpy(at(rows, maps.gates[map - maps.begin] * H), at(gradients, map * H), bytes);
  }
  return rows;
}

// Maps next to each other that the same products have, and for each of these the first of their rows in torch's order,
// which lie next to each other as well.
struct MapRun {
  int begin, end;
  int input, recurrent;  // a gate, or -1
};
std::vector<MapRun> runs_of(const CellSpec& spec) {
  const auto gate = [](const MapWindow& window, int map) {
    return window.begin <= map && map < window.end ? window.gates[map - window.begin] : -1;
  };
  const auto follows = [](int first, int count, int next) { return first < 0 ? next < 0 : next == first + count; };
  std::vector<MapRun> runs;
  for (int map = 0; map < spec.maps; ++map) {
    const int input = gate(spec.input, map), recurrent = gate(spec.recurrent, map);
    if (!runs.empty()) {
      MapRun& last = runs.back();
      const int count = last.end - last.begin;
      if (follows(last.input, count, input) && follows(last.recurrent, count, recurrent)) {
        ++last.end;
        continue;
      }
    }
    runs.push_back({map, map + 1, input, recurrent});
  }
  return runs;
}

// The weight gradients, each as one matrix product, or sum, over all steps; empty where not needed.
template <class Needs>
Tensors weight_gradients(const Layer& layer, StepGradients& steps, const Needs& needs_weight) {
  const Sizes& s = layer.sizes;
  const int64_t N = s.N;
  Tensors dweights;
  OptionalScratch x;
  for (int64_t d = 0; d < s.D; ++d) {
    // rows [first, first + rows) of out = transposed [N][rows] @ panels of [N][columns]
    const auto product = [&](const Kernels& kernels, const void* transposed, int64_t stride, Tensor& out, int64_t first,
                             int64_t rows, const void* panels) {
      return GemmParams{.M = rows,
                        .N = out.size(1),
                        .K = kernels.inputs(N),
                        .a = transposed,
                        .a_stride = stride,
                        .a_transposed = true,
                        .a_rows = N,
                        .panels = panels,
                        .c = at(out, first * out.size(1)),
                        .c_is_narrow = out.scalar_type() != layer.compute};
    };
    const Kernels& kernels = layer.kernels;
    const ScalarType out_type = kernels.operands == Operands::kTiles ? layer.x.scalar_type() : layer.compute;
    const auto append = [&](int64_t k, const auto& gradient) {
      const bool needed = needs_weight(d, k);
      dweights.push_back(needed ? as(gradient(), layer.x.scalar_type()) : empty({0}, layer.x.scalar_type()));
    };
    const int64_t rows = layer.spec.gates * s.H;
    Tensor dw_ih = pooled({needs_weight(d, 0) ? rows : 0, s.I}, out_type);
    Tensor dw_hh = pooled({needs_weight(d, 1) ? rows : 0, s.P}, out_type);
    if (needs_weight(d, 0) && !x.has_value()) x.emplace(packed_steps(layer));
    for (const MapRun& run : runs_of(layer.spec)) {
      const void* const da = steps.da.at(d * N * steps.da_stride + run.begin * s.H);
      const int64_t count = (run.end - run.begin) * s.H;
      std::optional<GemmParams> of_x, of_h;  // da is packed once for both
      if (needs_weight(d, 0) && run.input >= 0) {
        of_x = product(kernels, da, steps.da_stride, dw_ih, run.input * s.H, count, pointer(x));
      }
      if (needs_weight(d, 1) && run.recurrent >= 0) {
        const int64_t states = inputs_of(kernels, s.P, N).numbers(kernels);
        const void* const h_in = steps.h_in->at(d * states);
        of_h = product(kernels, da, steps.da_stride, dw_hh, run.recurrent * s.H, count, h_in);
        of_h->also = of_x.has_value() ? &*of_x : nullptr;
      }
      if (of_x.has_value() || of_h.has_value()) gemm(kernels, of_h.has_value() ? *of_h : *of_x);
    }
    append(0, [&] { return dw_ih; });
    append(1, [&] { return dw_hh; });
    if (layer.weights.biased()) {
      OptionalTensor db;  // of all maps
      const auto of = [&](const MapWindow& maps) {
        if (!db.has_value()) db = bias_gradients(layer, steps, d);
        return rows_of_maps(layer, maps, *db);
      };
      append(2, [&] { return of(layer.spec.input); });
      append(3, [&] { return of(layer.spec.recurrent); });
    }
    if (s.projected) {
      append(layer.weights.index_of_w_hr(), [&] {
        const Kernels& kernels = kernels_of(layer.compute);  // m is not of the dtype of x
        const PanelLayout columns = columns_of(kernels, s.H, N);
        const Scratch m(columns.numbers(kernels), layer.compute);
        for_each_part(kernels, columns, 1, [&](int64_t, int64_t begin, int64_t end) {
          kernels.pack_columns(steps.m->at(d * N * s.H), N, s.H, m.begin(), begin, end);
        });
        Tensor dw_hr = pooled({s.P, s.H}, layer.compute);
        gemm(kernels, product(kernels, steps.dh_out->at(d * N * s.P), s.P, dw_hr, 0, s.P, m.begin()));
        return dw_hr;
      });
    }
    if (layer.has_parameters()) {
      append(layer.weights.count - 1, [&] {
        const int64_t numbers = layer.spec.parameters * s.H;
        Tensor rows = steps.dp->matrix(d * s.B * numbers, s.B, numbers);
        return torch::stable::sum(rows, std::array<int64_t, 1>{0});
      });
    }
  }
  return dweights;
}

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

std::string cpu_plan(std::string cell, int64_t T, int64_t B, int64_t I, int64_t H, int64_t P, int64_t D, bool float64) {
  const Sizes s{T, B, T * B, I, H, P, D, P != H};
  const Dtype dtype = float64 ? Dtype::kFloat64 : Dtype::kFloat32;
  const Kernels& kernels = (*isa().kernels)[static_cast<size_t>(dtype)];
  const CellSpec& spec = kernels.cells[static_cast<size_t>(cell_of(cell).kind)].spec;
  const std::string name = std::string(isa().name) + ", ";
  if (T == 1 && (packs_in_cache(s) || is_short(s, kernels, false))) return name + "one step, weights read as they lie";
  const Team team = plan_team(s, spec, kernels, float64, torch::stable::get_num_threads());
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
