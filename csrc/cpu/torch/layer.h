// One layer as the CPU operators get it: its tensors, looked at once for all that memory safety needs, its sizes, and
// the kernels that compute it.
#pragma once

#include <atomic>
#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "../params.h"
#include "tensors.h"

namespace fusedrnn {
namespace {

const Isa* find_isa(const std::string& name) {
  std::string known;
  for (const Isa* const* isa = instruction_sets(); *isa != nullptr; ++isa) {
    if (name.empty() ? (*isa)->runs_here() : name == (*isa)->name) {
      STD_TORCH_CHECK((*isa)->runs_here(), "this processor does not have the instruction set ", name);
      return *isa;
    }
    known += std::string(known.empty() ? "" : ", ") + (*isa)->name;
  }
  STD_TORCH_CHECK(false, "unknown instruction set '", name, "': expected one of ", known);
  return nullptr;
}

std::atomic<const Isa*> selected_isa{nullptr};

const Isa& isa() {
  const Isa* current = selected_isa.load(std::memory_order_relaxed);
  if (current == nullptr) {
    const char* wanted = std::getenv("FUSEDRNN_CPU_ISA");
    selected_isa = current = find_isa(wanted == nullptr ? "" : wanted);
  }
  return *current;
}

Dtype dtype_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: STD_TORCH_CHECK(false, "x must be float32, float64, bfloat16 or float16"); return Dtype::kCount;
  }
}

const Kernels& kernels_of(ScalarType dtype) { return (*isa().kernels)[static_cast<size_t>(dtype_of(dtype))]; }

// The parts of a cell's name: its kernels, whether its units have parameters, and its noise, by the letters of Noise;
// see lstm_variant in Python.
struct CellName {
  CellKind kind;
  bool has_parameters = false;
  std::string noise;
};
constexpr const char* kNoiseLetters = "hcgr";

CellName cell_of(const std::string& name) {
  const auto& cells = (*isa().kernels)[0].cells;
  for (size_t k = 0; k < static_cast<size_t>(CellKind::kLstmPeephole); ++k) {
    if (name == cells[k].spec.name) return {static_cast<CellKind>(k), false, ""};
  }
  const size_t plus = name.find('+');
  const std::string base = name.substr(0, plus), noise = plus == std::string::npos ? "" : name.substr(plus + 1);
  STD_TORCH_CHECK(noise.find_first_not_of(kNoiseLetters) == std::string::npos, "unknown noise in the cell ", name);
  if (base == "lstm_coupled") return {CellKind::kLstmCoupled, false, noise};
  if (base == "lstm_peephole_coupled") return {CellKind::kLstmCoupled, true, noise};
  const bool has_peepholes = base == "lstm_peephole";
  STD_TORCH_CHECK(base == "lstm" || has_peepholes, "the cpu backend has no kernel for the cell ", name);
  return {CellKind::kLstmPeephole, has_peepholes, noise};
}

// One layer's weights, contiguous, direction after direction in nn.LSTM's order; see fusedrnn/layout.py.
struct Weights {
  Weights(const Tensors& flat, bool bidirectional, bool has_parameters)
      : directions(bidirectional ? 2 : 1), parameters(has_parameters ? 1 : 0) {
    count = static_cast<int64_t>(flat.size()) / directions;
    const int64_t plain = count - parameters;
    STD_TORCH_CHECK(plain >= 2 && plain <= 5 && count * directions == static_cast<int64_t>(flat.size()),
                    "weights must be ", 2 + parameters, " to ", 5 + parameters, " tensors per direction, got ",
                    flat.size());
    for (const Tensor& weight : flat) all.push_back(dense(weight));
  }

  bool biased() const { return count - parameters >= 4; }
  bool projected() const { return (count - parameters) % 2 == 1; }
  const Tensor& w_ih(int64_t d) const { return all[d * count]; }
  const Tensor& w_hh(int64_t d) const { return all[d * count + 1]; }
  const Tensor& b_ih(int64_t d) const { return all[d * count + 2]; }
  const Tensor& b_hh(int64_t d) const { return all[d * count + 3]; }
  int64_t index_of_w_hr() const { return count - parameters - 1; }
  const Tensor& w_hr(int64_t d) const { return all[d * count + index_of_w_hr()]; }
  const Tensor& w_p(int64_t d) const { return all[d * count + count - 1]; }

  int64_t directions, parameters, count;
  Tensors all;
};

// Where the rows of each step of a PackedSequence begin, and the last ones end: Sequence::offsets.
std::vector<int64_t> offsets_of(const Tensor& lengths, int64_t N) {
  STD_TORCH_CHECK(lengths.dim() == 1 && lengths.numel() > 0 && lengths.scalar_type() == ScalarType::Long,
                  "lengths of packed rows must be one int64 for each sequence");
  const auto* const length = static_cast<const int64_t*>(lengths.const_data_ptr());
  int64_t sequences = lengths.numel(), rows = 0;
  for (int64_t b = 0; b < sequences && rows <= N; ++b) {
    const int64_t most = b == 0 ? N : length[b - 1];
    STD_TORCH_CHECK(0 <= length[b] && length[b] <= most, "lengths of packed rows must not be negative and never grow");
    rows += length[b];
  }
  STD_TORCH_CHECK(rows == N, "lengths must add up to the ", N, " packed rows of x");
  std::vector<int64_t> offsets{0};
  for (int64_t t = 0; t < length[0]; ++t) {  // none where there are no rows, which is refused below
    while (length[sequences - 1] <= t) --sequences;
    offsets.push_back(offsets.back() + sequences);
  }
  return offsets;
}

// One layer of a stack: h0 and c0 are of all layers. x is [T, B, I]; or, with lengths, [N, I], the rows of a
// PackedSequence; or [B, I] of a cell, with h0 and c0 without a dimension for layers.
struct Layer {
  Layer(const CellName& name, const Tensor& x_in, const Tensors& flat, bool bidirectional, const OptionalTensor& h0_in,
        const OptionalTensor& c0_in, const OptionalTensor& lengths_in, const OptionalTensor& reset_in,
        const OptionalTensor& noise_in, int64_t index_in = 0, int64_t layers_in = 1)
      : index(index_in),
        layers(layers_in),
        x(dense(x_in)),
        weights(flat, bidirectional, name.has_parameters),
        h0(dense(h0_in)),
        c0(dense(c0_in)),
        lengths(dense(lengths_in)),
        reset(dense(reset_in)),
        noise(dense(noise_in)),
        noise_letters(name.noise),
        offsets(is_packed() ? offsets_of(*lengths, x.size(0)) : std::vector<int64_t>()),
        compute(compute_type(x_in.scalar_type())),
        kernels(kernels_of(x_in.scalar_type())),
        cell(kernels.cells[static_cast<size_t>(name.kind)]),
        spec(cell.spec) {
    const bool fits = x.dim() == 3 || is_packed() || (is_cell() && layers * weights.directions == 1);
    STD_TORCH_CHECK(fits && weights.w_hh(0).dim() == 2, "x and w_hh must have 3 and 2 dimensions");
    Sizes& s = sizes;
    const Tensor& w_hh = weights.w_hh(0);
    const int64_t G = spec.gates;
    s.T = is_packed() ? static_cast<int64_t>(offsets.size()) - 1 : is_cell() ? 1 : x.size(0);
    s.B = is_packed() ? lengths->size(0) : x.size(x.dim() - 2);
    s.N = is_packed() ? x.size(0) : s.T * s.B;
    s.I = x.size(x.dim() - 1);
    s.H = w_hh.size(0) / G;
    s.P = w_hh.size(1);
    s.D = weights.directions;
    s.projected = weights.projected();
    STD_TORCH_CHECK(s.T > 0, "x must have at least one time step");
    STD_TORCH_CHECK(spec.projects || !s.projected, "a layer of the cell ", spec.name, " has no projection");
    STD_TORCH_CHECK(has_cell() || !c0.has_value(), "a layer of the cell ", spec.name, " takes no c0");
    for (int64_t d = 0; d < s.D; ++d) {
      check_size("w_ih", weights.w_ih(d), {G * s.H, s.I});
      check_size("w_hh", weights.w_hh(d), {G * s.H, s.P});
      if (weights.biased()) check_size("b_ih", weights.b_ih(d), {G * s.H});
      if (weights.biased()) check_size("b_hh", weights.b_hh(d), {G * s.H});
      if (s.projected) check_size("w_hr", weights.w_hr(d), {s.P, s.H});
      if (has_parameters()) check_size("peepholes", weights.w_p(d), {spec.parameters * s.H});
    }
    STD_TORCH_CHECK(s.projected || s.P == s.H, "w_hh must be [", G, "H, H] without a projection");
    for (const Tensor& weight : weights.all) {
      STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weights must have the dtype of x");
    }
    check_state("h0", h0, s.P);
    check_state("c0", c0, s.H);
    if (lengths.has_value()) {
      check_size("lengths", *lengths, {s.B});
      STD_TORCH_CHECK(lengths->scalar_type() == ScalarType::Long, "lengths must be int64");
    }
    if (reset.has_value()) {
      check_size("reset", *reset, {s.T, s.B});
      STD_TORCH_CHECK(reset->scalar_type() == ScalarType::Bool, "reset must be bool");
    }
    check_noise();
  }

  void check_noise() const {
    const auto kinds = static_cast<int64_t>(noise_letters.size());
    STD_TORCH_CHECK(noise.has_value() == (kinds > 0), "noise must be given to a cell that has it, and to no other");
    if (!noise.has_value()) return;
    const Sizes& s = sizes;
    const int64_t size = s.D * (noise_letters == "r" ? s.P : s.H);
    if (noise->dim() == 3) {
      check_size("noise", *noise, {kinds, s.N, size});
      STD_TORCH_CHECK(is_packed(), "noise of padded rows must have 4 dimensions");
    } else {
      const int64_t steps = noise->dim() == 4 && noise->size(1) > 1 && !is_packed() ? s.T : 1;
      check_size("noise", *noise, {kinds, steps, s.B, size});
    }
    STD_TORCH_CHECK(noise->scalar_type() == compute, "noise must have the dtype of the arithmetic");
    const bool keeps = noise_letters.find_first_of("hc") != std::string::npos;
    STD_TORCH_CHECK(!keeps || !s.projected, "there is no zoneout with a projection");
  }

  // The multipliers, where the kernels look for them.
  NoiseParams noise_params() const {
    NoiseParams params{};
    if (!noise.has_value()) return params;
    params.by_sequence = noise->dim() == 4 && noise->size(1) == 1;
    const int64_t numbers = noise->numel() / static_cast<int64_t>(noise_letters.size());
    for (size_t k = 0; k < noise_letters.size(); ++k) {
      const size_t kind = std::string(kNoiseLetters).find(noise_letters[k]);
      params.of[kind] = at(*noise, static_cast<int64_t>(k) * numbers);
    }
    return params;
  }

  void check_state(const char* name, const OptionalTensor& tensor, int64_t N) const {
    if (!tensor.has_value()) return;
    if (is_cell()) {
      check_size(name, *tensor, {sizes.B, N});
    } else {
      check_size(name, *tensor, {layers * sizes.D, sizes.B, N});
    }
    STD_TORCH_CHECK(tensor->scalar_type() == x.scalar_type(), name, " must have the dtype of x");
  }

  bool has_parameters() const { return weights.parameters > 0; }
  bool has_cell() const { return spec.carry == Carry::kCell; }
  bool has_carry() const { return spec.carry != Carry::kNone; }
  // The size of c.
  int64_t C() const { return has_cell() ? sizes.H : 0; }
  // Whether the input's maps are as many numbers as what is saved, so that the one may take the place of the other.
  bool saves_maps() const { return spec.input.end - spec.input.begin == spec.saved; }

  int64_t compute_bytes() const { return bytes_of(compute); }

  bool is_packed() const { return x.dim() == 2 && lengths.has_value(); }
  bool is_cell() const { return x.dim() == 2 && !lengths.has_value(); }

  // A tensor with `size` numbers per row: [T, B, size], or [N, size] where x is [N, I].
  Tensor empty_rows(int64_t size, ScalarType dtype) const {
    return x.dim() == 2 ? empty({sizes.N, size}, dtype) : empty({sizes.T, sizes.B, size}, dtype);
  }
  Tensor pooled_rows(int64_t size, ScalarType dtype) const {
    return x.dim() == 2 ? pooled({sizes.N, size}, dtype) : pooled({sizes.T, sizes.B, size}, dtype);
  }
  void check_rows(const char* name, const OptionalTensor& tensor, int64_t size) const {
    if (!tensor.has_value()) return;
    if (x.dim() == 2) {
      check_size(name, *tensor, {sizes.N, size});
    } else {
      check_size(name, *tensor, {sizes.T, sizes.B, size});
    }
  }

  // The saved values, [D, T, B, S*H], or [D, N, S*H].
  Tensor pooled_saved() const {
    const Sizes& s = sizes;
    const ScalarType dtype = x.scalar_type();
    const int64_t row = spec.saved * s.H;
    return is_packed() ? pooled({s.D, s.N, row}, dtype) : pooled({s.D, s.T, s.B, row}, dtype);
  }
  void check_saved(const Tensor& saved) const {
    const Sizes& s = sizes;
    const int64_t row = spec.saved * s.H;
    if (is_packed()) {
      check_size("reserve", saved, {s.D, s.N, row});
    } else {
      check_size("reserve", saved, {s.D, s.T, s.B, row});
    }
  }

  // A state of all layers, [layers * D, B, N], or [B, N] of a cell.
  Tensor empty_state(int64_t N) const {
    const Sizes& s = sizes;
    return is_cell() ? empty({s.B, N}, x.scalar_type()) : empty({layers * s.D, s.B, N}, x.scalar_type());
  }

  // The offset of this layer in a tensor [layers * D, B, N].
  int64_t own(int64_t N) const { return index * sizes.D * sizes.B * N; }

  Sequence sequence() const {
    return {static_cast<const int64_t*>(pointer(lengths)), is_packed() ? offsets.data() : nullptr,
            static_cast<const uint8_t*>(pointer(reset))};
  }

  // Where the rows of step t begin.
  int64_t row(int64_t t) const { return is_packed() ? offsets[t] : t * sizes.B; }

  // Whether a row of x is a step that exists.
  bool exists(int64_t row) const {
    return !lengths.has_value() || is_packed() ||
           row / sizes.B < static_cast<const int64_t*>(pointer(lengths))[row % sizes.B];
  }

  int64_t index, layers;
  Tensor x;
  Weights weights;
  OptionalTensor h0, c0, lengths, reset, noise;
  std::string noise_letters;
  std::vector<int64_t> offsets;  // only where packed
  ScalarType compute;
  const Kernels& kernels;
  const CellKernels& cell;
  const CellSpec& spec;
  Sizes sizes;
};

}  // namespace
}  // namespace fusedrnn
