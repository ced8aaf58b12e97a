// The backward of a layer: the launch over its steps, and the matrix products of its gradients.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <vector>

#include "launch.h"
#include "products.h"

namespace fusedrnn {
namespace {

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

}  // namespace
}  // namespace fusedrnn
