// The forward of a layer: the input's affine maps, and the launches that use them.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>

#include "launch.h"
#include "weights.h"

namespace fusedrnn {
namespace {

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

// A sequence, some steps at a time: the input's affine maps as matrix products, and the launch that uses them; or one
// launch that does both, where the sequence is short, or where tiles are full. params must outlive it.
class SequenceForward {
 public:
  // steps: at a time, where nothing is kept of them; 0 for as many as pass through a cache.
  SequenceForward(const Layer& layer, ForwardParams& params, const OptionalTensor& saved, const Team& team,
                  int64_t steps = 0)
      : layer_(layer),
        params_(params),
        is_unpacked_(is_short(layer.sizes, layer.kernels, saved.has_value())),
        // Saved values replace the input's maps in place if both have the same dtype.
        in_place_(saved.has_value() && layer.saves_maps() && layer.x.scalar_type() == layer.compute),
        panels_(is_unpacked_ ? std::make_shared<Panels>(Panels{std::nullopt, std::nullopt, packed_projection(layer)})
                : saved.has_value() ? packed_weights(layer, in_place_)  // of training: other ones at the next call
                                    : cached_weights(layer)),
        steps_(layer.sizes.T) {
    params_.panel_hh = pointer(panels_->w_hh);
    params_.panel_hr = pointer(panels_->w_hr);
    params_.team = team;
    if (is_unpacked_) return;

    const Sizes& s = layer.sizes;
    const Kernels& kernels = layer.kernels;
    x_ = operand_rows(kernels, layer.x, layer.compute);
    x_stride_ = kernels.padded(s.I);
    fuses_ = fuses_input(s, layer.spec, kernels, team, layer.compute == ScalarType::Double, saved.has_value());
    others_.emplace(layer, params_, fuses_ ? 0 : layer.spec.input.end, layer.spec.maps);
    for (int64_t d = 0; d < s.D; ++d) params_.biases[d] = others_->of(d);
    if (fuses_) {
      params_.panel_ih = pointer(panels_->w_ih);
      params_.x_padded = x_->const_data_ptr();
      params_.x_stride = x_stride_;
      return;
    }
    biases_.emplace(layer, params_, layer.spec.input.begin, layer.spec.input.end, !in_place_);
    layout_ = input_layout(layer, in_place_);
    columns_ = in_place_ ? layer.spec.gates * s.H : layout_.panels * 4 * kernels.lanes;
    if (in_place_) {
      maps_ = saved->mutable_data_ptr();
      return;
    }
    steps_ = steps > 0 ? std::min(steps, s.T) : steps_at_a_time(layer);
    xg_.emplace(s.D * most_rows() * columns_, layer.compute);
    maps_ = xg_->begin();
  }

  int64_t steps() const { return steps_; }

  // Steps [begin, end), in the order of each direction: at most steps(), and those before them first.
  void run(int64_t begin, int64_t end) {
    if (maps_ != nullptr) {
      for (int64_t d = 0; d < layer_.sizes.D; ++d) project(begin, end, d);
    }
    params_.begin = begin;
    params_.end = end;
    const Lines lines(params_.team, layer_.sizes, layer_.kernels);
    launch(params_.team, [&](int worker) { layer_.cell.forward(params_, worker); });
  }

 private:
  int64_t most_rows() const { return std::min(steps_ * layer_.sizes.B, layer_.sizes.N); }

  // The input's affine maps of a direction.
  void project(int64_t begin, int64_t end, int64_t d) {
    const Kernels& kernels = layer_.kernels;
    const int64_t t = d == 0 ? begin : layer_.sizes.T - end;
    const int64_t first = layer_.row(t), rows = layer_.row(t + end - begin) - first;
    void* const out = static_cast<char*>(maps_) + d * most_rows() * columns_ * layer_.compute_bytes();
    gemm(kernels, {.M = rows,
                   .N = columns_,
                   .K = layout_.inputs,
                   .a = at(*x_, first * x_stride_),
                   .a_stride = x_stride_,
                   .panels = panels_->w_ih->at(d * layout_.numbers(kernels)),
                   .c = out,
                   .c_in_blocks = !in_place_,
                   .by_columns = params_.team.split == Team::Split::kUnits,
                   .start = biases_->of(d)});
    params_.xg[d] = out;
    if (!in_place_) params_.xg_rows[d] = rows;
  }

  const Layer& layer_;
  ForwardParams& params_;
  const bool is_unpacked_, in_place_;
  const SharedPanels panels_;
  int64_t steps_;
  // Where the sequence is not short; from the layout on, where the launch does not do both.
  OptionalTensor x_;
  int64_t x_stride_ = 0;
  bool fuses_ = false;
  std::optional<Biases> others_, biases_;
  PanelLayout layout_{};
  int64_t columns_ = 0;
  OptionalScratch xg_;
  void* maps_ = nullptr;
};

void forward_sequence(const Layer& layer, ForwardParams& params, const OptionalTensor& saved) {
  SequenceForward sequence(layer, params, saved, plan_team(layer));
  for (int64_t begin = 0, end; begin < layer.sizes.T; begin = end) {
    end = std::min(begin + sequence.steps(), layer.sizes.T);
    sequence.run(begin, end);
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

// What a forward takes, and the scratch memory among it.
class ForwardArguments {
 public:
  ForwardArguments(const Layer& layer, Outputs& out) {
    const Sizes& s = layer.sizes;
    // Enough for either form of h, and each of them begins with a cache line.
    const int64_t line = CacheLines::kLine, bytes = layer.compute_bytes();
    const auto in_lines = [&](int64_t numbers) { return blocks_of(numbers * bytes, line) * line; };
    const int64_t h_size = in_lines(2 * s.D * s.B * layer.kernels.padded(s.P));
    const int64_t units = blocks_of(s.H, layer.kernels.lanes) * layer.kernels.lanes;
    const int64_t carry_size = layer.has_carry() ? in_lines(s.D * s.B * units) : 0;
    scratch_.emplace(h_size + carry_size + (s.projected ? in_lines(s.D * s.B * s.H) : 0));
    char* const h = scratch_->begin();
    char* const carry = h + h_size;

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
  }

  ForwardParams params{};

 private:
  std::optional<CacheLines> scratch_;
};

void forward(const Layer& layer, Outputs& out) {
  const Sizes& s = layer.sizes;
  if (s.B == 0) return;
  ForwardArguments arguments(layer, out);
  const bool trains = out.saved.has_value();
  // Inference finds the panels of tiles in the cache; packing them takes longer than to read the weights twice. Sums of
  // tiles are the same to the bit.
  const bool once = packs_in_cache(s) && (trains || layer.kernels.operands != Operands::kTiles);
  if (once && s.B > dot_rows(layer.kernels)) {
    forward_step_of_batch(layer, arguments.params);
  } else if (s.T == 1 && (once || is_short(s, layer.kernels, trains))) {
    forward_step(layer, arguments.params);
  } else {
    forward_sequence(layer, arguments.params, out.saved);
  }
}

}  // namespace
}  // namespace fusedrnn
