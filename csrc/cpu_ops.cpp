// The CPU operators: tensors in, plain structs out, the checks that memory safety needs, and the large matrix products.
// The schemas, the fake kernels and every other check live in Python (fusedrnn/ops.py, fusedrnn/functional.py).
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kept.h"
#include "cpu/plan.h"
#include "cpu_tensors.h"

namespace fusedrnn {
namespace {

// ---------------------------------------------------------------------------------------------- instruction set

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

// Selects an instruction set by name ("" for the best one), or only tells which is in use.
std::string cpu_isa(std::optional<std::string> select) {
  if (select.has_value()) selected_isa = find_isa(*select);
  return isa().name;
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

// ---------------------------------------------------------------------------------------------- a layer's arguments

// One layer's weights, contiguous, direction after direction in nn.LSTM's order; see fusedrnn/layout.py.
struct Weights {
  Weights(const Tensors& flat, bool bidirectional) : directions(bidirectional ? 2 : 1) {
    count = static_cast<int64_t>(flat.size()) / directions;
    STD_TORCH_CHECK(count >= 2 && count <= 5 && count * directions == static_cast<int64_t>(flat.size()),
                    "weights must be 2 to 5 tensors per direction, got ", flat.size());
    for (const Tensor& weight : flat) all.push_back(dense(weight));
  }

  bool biased() const { return count >= 4; }
  bool projected() const { return count % 2 == 1; }
  const Tensor& w_ih(int64_t d) const { return all[d * count]; }
  const Tensor& w_hh(int64_t d) const { return all[d * count + 1]; }
  const Tensor& b_ih(int64_t d) const { return all[d * count + 2]; }
  const Tensor& b_hh(int64_t d) const { return all[d * count + 3]; }
  const Tensor& w_hr(int64_t d) const { return all[d * count + count - 1]; }

  int64_t directions, count;
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
  Layer(const Tensor& x_in, const Tensors& flat, bool bidirectional, const OptionalTensor& h0_in,
        const OptionalTensor& c0_in, const OptionalTensor& lengths_in, const OptionalTensor& reset_in,
        int64_t index_in = 0, int64_t layers_in = 1)
      : index(index_in),
        layers(layers_in),
        x(dense(x_in)),
        weights(flat, bidirectional),
        h0(dense(h0_in)),
        c0(dense(c0_in)),
        lengths(dense(lengths_in)),
        reset(dense(reset_in)),
        offsets(is_packed() ? offsets_of(*lengths, x.size(0)) : std::vector<int64_t>()),
        compute(compute_type(x_in)),
        kernels(kernels_of(x_in.scalar_type())) {
    const bool fits = x.dim() == 3 || is_packed() || (is_cell() && layers * weights.directions == 1);
    STD_TORCH_CHECK(fits && weights.w_hh(0).dim() == 2, "x and w_hh must have 3 and 2 dimensions");
    Sizes& s = sizes;
    const Tensor& w_hh = weights.w_hh(0);
    s.T = is_packed() ? static_cast<int64_t>(offsets.size()) - 1 : is_cell() ? 1 : x.size(0);
    s.B = is_packed() ? lengths->size(0) : x.size(x.dim() - 2);
    s.N = is_packed() ? x.size(0) : s.T * s.B;
    s.I = x.size(x.dim() - 1);
    s.H = w_hh.size(0) / 4;
    s.P = w_hh.size(1);
    s.D = weights.directions;
    s.projected = weights.projected();
    STD_TORCH_CHECK(s.T > 0, "x must have at least one time step");
    for (int64_t d = 0; d < s.D; ++d) {
      check_size("w_ih", weights.w_ih(d), {4 * s.H, s.I});
      check_size("w_hh", weights.w_hh(d), {4 * s.H, s.P});
      if (weights.biased()) check_size("b_ih", weights.b_ih(d), {4 * s.H});
      if (weights.biased()) check_size("b_hh", weights.b_hh(d), {4 * s.H});
      if (s.projected) check_size("w_hr", weights.w_hr(d), {s.P, s.H});
    }
    STD_TORCH_CHECK(s.projected || s.P == s.H, "w_hh must be [4H, H] without a projection");
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

  bool is_packed() const { return x.dim() == 2 && lengths.has_value(); }
  bool is_cell() const { return x.dim() == 2 && !lengths.has_value(); }

  // Of a tensor with `size` numbers for each row: [T, B, size], or [N, size].
  Tensor empty_rows(int64_t size, ScalarType dtype) const {
    return is_packed() ? empty({sizes.N, size}, dtype) : empty({sizes.T, sizes.B, size}, dtype);
  }
  void check_rows(const char* name, const OptionalTensor& tensor, int64_t size) const {
    if (!tensor.has_value()) return;
    if (is_packed()) {
      check_size(name, *tensor, {sizes.N, size});
    } else {
      check_size(name, *tensor, {sizes.T, sizes.B, size});
    }
  }

  // The gates, [D, T, B, 4H], or [D, N, 4H].
  Tensor empty_gates() const {
    const Sizes& s = sizes;
    return is_packed() ? empty({s.D, s.N, 4 * s.H}, x.scalar_type()) : empty({s.D, s.T, s.B, 4 * s.H}, x.scalar_type());
  }
  void check_gates(const Tensor& gates) const {
    const Sizes& s = sizes;
    if (is_packed()) {
      check_size("reserve", gates, {s.D, s.N, 4 * s.H});
    } else {
      check_size("reserve", gates, {s.D, s.T, s.B, 4 * s.H});
    }
  }

  // Of a tensor [layers * D, B, N], what belongs to this one.
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
  OptionalTensor h0, c0, lengths, reset;
  std::vector<int64_t> offsets;  // only where packed
  ScalarType compute;
  const Kernels& kernels;
  Sizes sizes;
};

// ---------------------------------------------------------------------------------------------- launching

Team plan_team(const Layer& layer) {
  return plan_team(layer.sizes, layer.kernels, layer.compute == ScalarType::Double, torch::stable::get_num_threads());
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

  explicit CacheLines(size_t bytes) : storage_(new char[bytes + kLine]) {}

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

std::string cpu_plan(int64_t T, int64_t B, int64_t I, int64_t H, int64_t P, int64_t D, bool float64) {
  const Sizes s{T, B, T * B, I, H, P, D, P != H};
  const Dtype dtype = float64 ? Dtype::kFloat64 : Dtype::kFloat32;
  const Kernels& kernels = (*isa().kernels)[static_cast<size_t>(dtype)];
  const std::string name = std::string(isa().name) + ", ";
  if (T == 1) return name + "one step, weights read as they lie";
  const Team team = plan_team(s, kernels, float64, torch::stable::get_num_threads());
  return name + std::to_string(team.workers) + (team.workers == 1 ? " thread" : " threads") + " by " +
         (team.split == Team::Split::kRows ? "batch rows, no synchronisation" : "hidden units, meeting at every step");
}

// ---------------------------------------------------------------------------------------------- matrix products

// A way to pack a matrix into panels (panel.h): how many blocks of how many inputs, and which of the two are counted.
struct Packing {
  Pack Kernels::* pack;
  int64_t blocks, inputs;
  bool by_blocks;
  bool pairs = false;  // an input is two of the matrix, which is of 16-bit numbers

  int64_t numbers(const Kernels& kernels) const { return blocks * inputs * 4 * kernels.lanes; }
};
Packing gates_of(const Kernels& kernels, int64_t H, int64_t inputs) {
  return {&Kernels::pack_gates, blocks_of(H, kernels.lanes), inputs, true};
}
Packing rows_of(const Kernels& kernels, int64_t outputs, int64_t inputs) {
  return {&Kernels::pack_rows, blocks_of(outputs, 4 * kernels.lanes), inputs, true};
}
Packing columns_of(const Kernels& kernels, int64_t outputs, int64_t inputs) {
  return {&Kernels::pack_columns, blocks_of(outputs, 4 * kernels.lanes), inputs, false};
}

// The same of pairs of inputs, where the kernels multiply pairs, and all inputs are in one.
Packing paired(Packing (*packing)(const Kernels&, int64_t, int64_t), const Kernels& kernels, int64_t outputs,
               int64_t inputs) {
  const bool pairs = kernels.gemm_pairs != nullptr && inputs % 2 == 0;
  Packing result = packing(kernels, outputs, pairs ? inputs / 2 : inputs);
  result.pairs = pairs;
  return result;
}
// Columns of rows of steps, of which a last one may be without another.
Packing steps_of(const Kernels& kernels, int64_t outputs, int64_t steps) {
  return paired(columns_of, kernels, outputs, kernels.gemm_pairs != nullptr ? steps + steps % 2 : steps);
}

// Runs f(d, begin, end) for parts of the blocks, or inputs, of D matrices.
template <class F>
void for_each_part(const Kernels& kernels, const Packing& packing, int64_t D, const F& f) {
  const int64_t count = packing.by_blocks ? packing.blocks : packing.inputs;
  const int64_t grain = std::max<int64_t>(1, 16384 * count / std::max<int64_t>(1, packing.numbers(kernels)));
  torch::stable::parallel_for(0, D * count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t d = 0; d < D; ++d) {
      const int64_t first = std::max(begin - d * count, int64_t{0}), last = std::min(end - d * count, count);
      if (first < last) f(d, first, last);
    }
  });
}

// Pairs of rows [begin, end), which are inputs.
void pack_row_pairs(const Layer& layer, const Packing& packing, const Tensor& w, void* panels, int64_t begin,
                    int64_t end) {
  for (int64_t k = begin; k < end; ++k) {
    layer.kernels.pack_pair(at(w, 2 * k * w.size(1)), at(w, (2 * k + 1) * w.size(1)), w.size(1), panels, packing.inputs,
                            k);
  }
}

// The panels of matrix(d) for each direction, one after the other.
template <class F>
Scratch packed(const Layer& layer, const Packing& packing, const F& matrix) {
  const Kernels& kernels = packing.pairs ? kernels_of(ScalarType::Float) : layer.kernels;
  const int64_t numbers = packing.numbers(kernels), width = packing.pairs ? 2 : 1;
  Scratch panels(layer.sizes.D * numbers, layer.compute);
  for_each_part(kernels, packing, layer.sizes.D, [&](int64_t d, int64_t begin, int64_t end) {
    const Tensor& w = matrix(d);
    if (packing.pairs && !packing.by_blocks)
      return pack_row_pairs(layer, packing, w, panels.at(d * numbers), begin, end);
    (kernels.*packing.pack)(w.const_data_ptr(), w.size(0), w.size(1) / width, panels.at(d * numbers), begin, end);
  });
  return panels;
}

// c = a @ b or c += a @ b, see params.h.
void gemm(const Kernels& kernels, const GemmParams& params, bool pairs = false) {
  const auto run = pairs ? kernels.gemm_pairs : kernels.gemm;
  const int64_t tiles = blocks_of(params.M, kernels.tile_rows), halves = blocks_of(params.N, 2 * kernels.lanes);
  const int64_t blocks = blocks_of(halves, 2);
  const bool is_large = 2.0 * params.M * params.N * params.K >= kSerialFlops;
  const int64_t threads = is_large ? torch::stable::get_num_threads() : 1;
  // Rows are shared, unless there are so few that a worker would hardly use what it reads of b.
  int64_t row_parts = blocks_of(params.M, kGemmRows), column_parts = 1;
  if (tiles >= 4 * threads && !params.by_columns) {
    row_parts = blocks_of(row_parts, threads) * threads;
  } else {
    column_parts = std::min(threads, blocks);
  }
  torch::stable::parallel_for(0, row_parts * column_parts, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> scratch(params.a_transposed ? new char[kernels.gemm_scratch] : nullptr);
    for (int64_t part = begin; part < end; ++part) {
      const int64_t row = part / column_parts, column = part % column_parts;
      const int64_t m = row * tiles / row_parts * kernels.tile_rows;
      const int64_t m_end = std::min((row + 1) * tiles / row_parts * kernels.tile_rows, params.M);
      const int64_t half = column * blocks / column_parts * 2, half_end = (column + 1) * blocks / column_parts * 2;
      run(params, m, m_end, half, std::min(half_end, halves), scratch.get());
    }
  });
}

// ---------------------------------------------------------------------------------------------- weights of forward

// The weights of a layer as forward takes them, all directions of each one after the other.
struct Panels {
  OptionalScratch w_ih, w_hh, w_hr;
};
using SharedPanels = std::shared_ptr<const Panels>;

// In which order the affine maps of the input come out: as in GateOrder.
Packing input_packing(const Layer& layer) {
  const Sizes& s = layer.sizes;
  return gates_in_blocks(s.H, layer.kernels.lanes) ? paired(gates_of, layer.kernels, s.H, s.I)
                                                   : paired(rows_of, layer.kernels, 4 * s.H, s.I);
}
Packing recurrent_packing(const Layer& layer) { return paired(gates_of, layer.kernels, layer.sizes.H, layer.sizes.P); }
Packing projection_packing(const Layer& layer) { return rows_of(layer.kernels, layer.sizes.P, layer.sizes.H); }

OptionalScratch packed_projection(const Layer& layer) {
  if (!layer.sizes.projected) return std::nullopt;
  return packed(layer, projection_packing(layer), [&](int64_t d) { return layer.weights.w_hr(d); });
}

SharedPanels packed_weights(const Layer& layer) {
  return std::make_shared<Panels>(
      Panels{packed(layer, input_packing(layer), [&](int64_t d) { return layer.weights.w_ih(d); }),
             packed(layer, recurrent_packing(layer), [&](int64_t d) { return layer.weights.w_hh(d); }),
             packed_projection(layer)});
}

int64_t panel_bytes(const Layer& layer) {
  const Kernels& kernels = layer.kernels;
  const int64_t numbers = input_packing(layer).numbers(kernels) + recurrent_packing(layer).numbers(kernels) +
                          (layer.sizes.projected ? projection_packing(layer).numbers(kernels) : 0);
  return layer.sizes.D * numbers * (layer.compute == ScalarType::Double ? 8 : 4);
}

// Inference keeps packed weights, and looks at every call whether the weights still are what was packed: reading them
// takes a sixth of the time of packing them. No version is trusted, which does not count what is written through .data,
// NumPy or another process.
Kept<SharedPanels>& kept_panels() {
  static auto* const kept = new Kept<SharedPanels>(kept_by_default());  // never destroyed, as scratch is not
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

// Sets how many bytes of packed weights may be kept, and as many of scratch, or leaves that as it is. Returns it, and
// how many are kept of each.
std::tuple<int64_t, int64_t, int64_t> cpu_keep(std::optional<int64_t> limit) {
  STD_TORCH_CHECK(!limit.has_value() || *limit >= 0, "limit must be 0 or more bytes, got ", limit.value_or(0));
  Kept<SharedPanels>& panels = kept_panels();
  ScratchPool& scratch = ScratchPool::instance();
  if (limit.has_value()) {
    panels.set_limit(*limit);
    scratch.set_limit(*limit);
  }
  return {panels.limit(), panels.bytes(), scratch.bytes()};
}

// ---------------------------------------------------------------------------------------------- forward

// One time step: nothing is packed, and both affine maps happen in the kernel.
void forward_step(const Layer& layer, ForwardParams& params) {
  const Sizes& s = layer.sizes;
  const auto grain = [](int64_t flops) {
    return std::max<int64_t>(1, static_cast<int64_t>(kSerialFlops) / std::max<int64_t>(1, flops));
  };
  const int64_t lanes = layer.kernels.lanes;
  layer.kernels.step_start(params);
  torch::stable::parallel_for(0, s.D * blocks_of(s.H, lanes), grain(lanes * 8 * s.B * (s.I + s.P)),
                              [&](int64_t begin, int64_t end) { layer.kernels.step(params, begin, end); });
  if (!s.projected) return;
  torch::stable::parallel_for(0, s.D * s.P, grain(2 * s.B * s.H),
                              [&](int64_t begin, int64_t end) { layer.kernels.step_project(params, begin, end); });
}

// Steps whose input's affine maps are computed at a time: so many that they pass through a cache, where they are not
// kept, and still fill the rows of a matrix product for every thread.
int64_t steps_at_a_time(const Layer& layer) {
  const Sizes& s = layer.sizes;
  const int64_t row_bytes = s.D * 4 * s.H * (layer.compute == ScalarType::Double ? 8 : 4);
  const int64_t rows = std::max(kChunkBytes / row_bytes, kGemmRows * torch::stable::get_num_threads());
  const int64_t parts = blocks_of(s.N, rows);
  return blocks_of(s.T, parts);
}

// A whole sequence: the input's affine maps as matrix products, and the launches that use them; or, where the sequence
// is short, one launch that does both.
void forward_sequence(const Layer& layer, ForwardParams& params, const OptionalTensor& gates) {
  const Sizes& s = layer.sizes;
  const Kernels& kernels = layer.kernels;
  const bool is_short = s.N <= kUnpackedRows;
  const SharedPanels panels =
      is_short            ? std::make_shared<Panels>(Panels{std::nullopt, std::nullopt, packed_projection(layer)})
      : gates.has_value() ? packed_weights(layer)  // of training: other ones at the next call
                          : kept_weights(layer);
  params.panel_hh = pointer(panels->w_hh);
  params.panel_hr = pointer(panels->w_hr);
  params.pairs = !is_short && recurrent_packing(layer).pairs;
  params.team = plan_team(layer);
  const auto run = [&](int64_t begin, int64_t end) {
    params.begin = begin;
    params.end = end;
    const Lines lines(params.team, s, kernels);
    launch(params.team, [&](int worker) { kernels.forward(params, worker); });
  };
  if (is_short) return run(0, s.T);

  // The gates take the place of their affine maps where both are kept, in one dtype.
  const bool in_place = gates.has_value() && layer.x.scalar_type() == layer.compute;
  const int64_t steps = in_place ? s.T : steps_at_a_time(layer), G = 4 * s.H;
  OptionalScratch xg;
  const int64_t most_rows = std::min(steps * s.B, s.N);
  if (!in_place) xg.emplace(s.D * most_rows * G, layer.compute);
  const Packing packing = input_packing(layer);
  const Tensor x = packing.pairs ? layer.x : as(layer.x, layer.compute);
  const int64_t panel_numbers = packing.numbers(kernels);
  for (int64_t begin = 0; begin < s.T; begin += steps) {
    const int64_t end = std::min(begin + steps, s.T);
    for (int64_t d = 0; d < s.D; ++d) {
      const int64_t t = d == 0 ? begin : s.T - end, first = layer.row(t), rows = layer.row(t + end - begin) - first;
      const int64_t own = d * most_rows * G;
      void* const out = in_place ? at(*gates, own) : xg->at(own);
      gemm(kernels,
           {rows, G, packing.inputs, at(x, first * s.I), false, panels->w_ih->at(d * panel_numbers), out, false,
            params.team.split == Team::Split::kUnits},
           packing.pairs);
      params.xg[d] = out;
    }
    run(begin, end);
  }
}

Tensor empty_y(const Layer& layer) { return layer.empty_rows(layer.sizes.D * layer.sizes.P, layer.x.scalar_type()); }
Tensor empty_state(const Layer& layer, int64_t N) {
  const Sizes& s = layer.sizes;
  return layer.is_cell() ? empty({s.B, N}, layer.x.scalar_type())
                         : empty({layer.layers * s.D, s.B, N}, layer.x.scalar_type());
}

// What a forward writes: y; hn and cn, of all layers; and c and the gates, where they are wanted.
struct Outputs {
  explicit Outputs(const Layer& layer)
      : y(empty_y(layer)), hn(empty_state(layer, layer.sizes.P)), cn(empty_state(layer, layer.sizes.H)) {}

  Tensor y, hn, cn;
  OptionalTensor c, gates;
};

void forward(const Layer& layer, Outputs& out) {
  const Sizes& s = layer.sizes;
  if (s.B == 0) return;
  const int64_t h_size = 2 * s.D * s.B * s.P, c_size = s.D * s.B * s.H;
  const int64_t bytes = layer.compute == ScalarType::Double ? 8 : 4;
  const CacheLines scratch((h_size + (s.projected ? 2 : 1) * c_size) * bytes);
  char* const h = scratch.begin();
  char* const c_state = h + h_size * bytes;

  ForwardParams params{};
  params.sizes = s;
  params.sequence = layer.sequence();
  for (int64_t d = 0; d < s.D; ++d) {
    params.w_ih[d] = layer.weights.w_ih(d).const_data_ptr();
    params.w_hh[d] = layer.weights.w_hh(d).const_data_ptr();
    params.w_hr[d] = s.projected ? layer.weights.w_hr(d).const_data_ptr() : nullptr;
    params.b_ih[d] = layer.weights.biased() ? layer.weights.b_ih(d).const_data_ptr() : nullptr;
    params.b_hh[d] = layer.weights.biased() ? layer.weights.b_hh(d).const_data_ptr() : nullptr;
  }
  params.h0 = layer.h0.has_value() ? at(*layer.h0, layer.own(s.P)) : nullptr;
  params.c0 = layer.c0.has_value() ? at(*layer.c0, layer.own(s.H)) : nullptr;
  params.y = pointer(out.y);
  params.hn = at(out.hn, layer.own(s.P));
  params.cn = at(out.cn, layer.own(s.H));
  params.c = pointer(out.c);
  params.gates = pointer(out.gates);
  params.h = h;
  params.c_state = c_state;
  params.m = s.projected ? c_state + c_size * bytes : nullptr;
  params.x = layer.x.const_data_ptr();
  if (s.T == 1) {
    forward_step(layer, params);
  } else {
    forward_sequence(layer, params, out.gates);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cpu_forward(Tensor x, Tensors flat, bool bidirectional,
                                                               OptionalTensor h0, OptionalTensor c0,
                                                               OptionalTensor lengths, OptionalTensor reset,
                                                               bool cell_states, bool reserve) {
  const NoGrad no_grad;
  const Layer layer(x, flat, bidirectional, h0, c0, lengths, reset);
  const Sizes& s = layer.sizes;
  const ScalarType dtype = x.scalar_type();
  Outputs out(layer);
  if (cell_states || reserve) out.c = layer.empty_rows(s.D * s.H, dtype);
  if (reserve) out.gates = layer.empty_gates();
  forward(layer, out);
  const auto present = [&](const OptionalTensor& tensor) { return tensor.has_value() ? *tensor : empty({0}, dtype); };
  return {out.y, out.hn, out.cn, present(out.c), present(out.gates)};
}

std::tuple<Tensor, Tensor, Tensor> cpu_infer(Tensor x, Tensors flat, int64_t layers, bool bidirectional,
                                             OptionalTensor h0, OptionalTensor c0) {
  const NoGrad no_grad;
  const int64_t all = static_cast<int64_t>(flat.size());
  STD_TORCH_CHECK(layers > 0 && all % layers == 0, "weights must be as many for each of ", layers, " layers");
  std::optional<Outputs> out;
  for (int64_t index = 0; index < layers; ++index) {
    const auto first = flat.begin() + index * (all / layers);
    const Layer layer(index == 0 ? x : out->y, Tensors(first, first + all / layers), bidirectional, h0, c0,
                      std::nullopt, std::nullopt, index, layers);
    if (index == 0) {
      out.emplace(layer);
    } else {
      STD_TORCH_CHECK(layer.sizes.H == out->cn.size(2) && layer.sizes.P == out->hn.size(2),
                      "all layers must have states of one size");
      out->y = empty_y(layer);
    }
    forward(layer, *out);
  }
  return {out->y, out->hn, out->cn};
}

// ---------------------------------------------------------------------------------------------- backward

// What the launch leaves for the matrix products, of each direction: in the compute dtype, but for da, which is in the
// layer's where its products take pairs.
struct StepGradients {
  Scratch da;                 // [N][4H]
  OptionalScratch h_in;       // the panels of the states that entered each step, only if w_hh needs a gradient
  OptionalScratch dh_out, m;  // [N][P] and [N][H], only with a projection
};

// The recurrence backwards. params holds the tensors that came from the caller, or go to it.
StepGradients backward_sequence(const Layer& layer, BackwardParams& params, bool needs_w_hh) {
  const Sizes& s = layer.sizes;
  const Kernels& kernels = layer.kernels;
  const int64_t N = s.N;
  const auto make = [&](int64_t numbers) { return Scratch(s.D * numbers, layer.compute); };
  const ScalarType da_type = kernels.gemm_pairs != nullptr ? layer.x.scalar_type() : layer.compute;
  StepGradients steps{Scratch(s.D * N * 4 * s.H, da_type), std::nullopt, std::nullopt, std::nullopt};
  if (s.projected) steps.dh_out.emplace(make(N * s.P));
  if (s.projected) steps.m.emplace(make(N * s.H));
  const Scratch dh_state = make(s.B * s.P), dc_state = make(s.B * s.H);
  OptionalScratch panel_hh, panel_hr;
  if (s.T > 1 || params.dh0 != nullptr) {
    panel_hh.emplace(
        packed(layer, paired(columns_of, kernels, s.P, 4 * s.H), [&](int64_t d) { return layer.weights.w_hh(d); }));
  }
  if (s.projected) {
    panel_hr.emplace(packed(layer, columns_of(kernels, s.H, s.P), [&](int64_t d) { return layer.weights.w_hr(d); }));
  }
  params.panel_hh = pointer(panel_hh);
  params.panel_hr = pointer(panel_hr);
  params.da = steps.da.begin();
  params.dh_out = pointer(steps.dh_out);
  params.m = pointer(steps.m);
  params.dh_state = dh_state.begin();
  params.dc_state = dc_state.begin();
  params.team = plan_team(layer);
  const Lines lines(params.team, s, kernels);
  launch(params.team, [&](int worker) { kernels.backward(params, worker); });
  if (needs_w_hh) {
    const Packing states = steps_of(kernels, s.P, N);
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
  Tensor dx = layer.empty_rows(s.I, layer.compute);
  const Packing w_ih = paired(columns_of, layer.kernels, s.I, 4 * s.H);
  const Scratch panels = packed(layer, w_ih, [&](int64_t d) { return layer.weights.w_ih(d); });
  for (int64_t d = 0; d < s.D; ++d) {
    gemm(layer.kernels,
         {s.N, s.I, w_ih.inputs, steps.da.at(d * s.N * 4 * s.H), false, panels.at(d * w_ih.numbers(layer.kernels)),
          pointer(dx), d > 0, false},
         w_ih.pairs);
  }
  return as(dx, layer.x.scalar_type());
}

// The panels of x, its steps being the inputs; zero at steps that do not exist.
Scratch packed_steps(const Layer& layer) {
  const Sizes& s = layer.sizes;
  const Packing steps = steps_of(layer.kernels, s.I, s.N);
  Scratch panels(steps.numbers(layer.kernels), layer.compute);
  for_each_part(layer.kernels, steps, 1, [&](int64_t, int64_t begin, int64_t end) {
    const auto row = [&](int64_t k) { return k < s.N && layer.exists(k) ? at(layer.x, k * s.I) : nullptr; };
    for (int64_t k = begin; k < end; ++k) {
      if (steps.pairs) {
        layer.kernels.pack_pair(row(2 * k), row(2 * k + 1), s.I, panels.begin(), steps.inputs, k);
      } else {
        layer.kernels.pack_columns(layer.exists(k) ? layer.x.const_data_ptr() : nullptr, s.N, s.I, panels.begin(), k,
                                   k + 1);
      }
    }
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

// The gradient of a bias, [4H]: the sum over all steps.
Tensor bias_gradients(const Layer& layer, StepGradients& steps, int64_t d) {
  const Sizes& s = layer.sizes;
  const int64_t N = s.N, G = 4 * s.H;
  if (N > kUnpackedRows || layer.kernels.gemm_pairs != nullptr) {
    return torch::stable::sum(steps.da.matrix(d * N * G, N, G), std::array<int64_t, 1>{0});
  }
  // Of a few rows the sum takes less than the way to torch's.
  Tensor sum = empty({G}, layer.compute);
  const auto of = layer.compute == ScalarType::Double ? sum_rows<double> : sum_rows<float>;
  of(steps.da.at(d * N * G), N, G, pointer(sum));
  return sum;
}

// A vector once more.
Tensor copied(const Tensor& vector) {
  Tensor copy = empty({vector.numel()}, vector.scalar_type());
  std::memcpy(pointer(copy), vector.const_data_ptr(), vector.numel() * vector.element_size());
  return copy;
}

// The weight gradients, each as one matrix product, or sum, over all steps; empty where not needed.
template <class Needs>
Tensors weight_gradients(const Layer& layer, StepGradients& steps, const Needs& needs_weight) {
  const Sizes& s = layer.sizes;
  const int64_t N = s.N;
  Tensors dweights;
  OptionalScratch x;
  for (int64_t d = 0; d < s.D; ++d) {
    // transposed [N][rows] @ panels of [N][columns]
    const auto product = [&](int64_t rows, const void* transposed, int64_t columns, const void* panels,
                             bool pairs = false) {
      const Kernels& kernels = pairs ? layer.kernels : kernels_of(layer.compute);
      Tensor out = empty({rows, columns}, layer.compute);
      const int64_t inputs = pairs ? blocks_of(N, 2) : N;
      gemm(kernels, {rows, columns, inputs, transposed, true, panels, pointer(out), false, false, N % 2 == 1}, pairs);
      return out;
    };
    const bool pairs = layer.kernels.gemm_pairs != nullptr;
    const void* const da = steps.da.at(d * N * 4 * s.H);
    const auto append = [&](int64_t k, const auto& gradient) {
      const bool needed = needs_weight(d, k);
      dweights.push_back(needed ? as(gradient(), layer.x.scalar_type()) : empty({0}, layer.x.scalar_type()));
    };
    append(0, [&] {
      if (!x.has_value()) x.emplace(packed_steps(layer));
      return product(4 * s.H, da, s.I, pointer(x), pairs);
    });
    append(1, [&] {
      const int64_t states = steps_of(layer.kernels, s.P, N).numbers(layer.kernels);
      return product(4 * s.H, da, s.P, steps.h_in->at(d * states), pairs);
    });
    if (layer.weights.biased()) {
      OptionalTensor db;
      const auto bias_gradient = [&] {
        if (db.has_value()) return copied(*db);  // both biases have the same
        db = bias_gradients(layer, steps, d);
        return *db;
      };
      append(2, bias_gradient);
      append(3, bias_gradient);
    }
    if (s.projected) {
      append(layer.weights.count - 1, [&] {
        const Kernels& kernels = kernels_of(layer.compute);  // m is not of the dtype of x
        const Packing columns = columns_of(kernels, s.H, N);
        const Scratch m(columns.numbers(kernels), layer.compute);
        for_each_part(kernels, columns, 1, [&](int64_t, int64_t begin, int64_t end) {
          kernels.pack_columns(steps.m->at(d * N * s.H), N, s.H, m.begin(), begin, end);
        });
        return product(s.P, steps.dh_out->at(d * N * s.P), s.H, m.begin());
      });
    }
  }
  return dweights;
}

std::tuple<Tensor, Tensor, Tensor, Tensors> cpu_backward(OptionalTensor dy, OptionalTensor dhn, OptionalTensor dcn,
                                                         OptionalTensor dc, Tensor x, Tensors flat, bool bidirectional,
                                                         OptionalTensor h0, OptionalTensor c0, OptionalTensor lengths,
                                                         OptionalTensor reset, Tensor y, Tensor c, Tensor reserve,
                                                         std::vector<bool> needs) {
  const NoGrad no_grad;
  const Layer layer(x, flat, bidirectional, h0, c0, lengths, reset);
  const Sizes& s = layer.sizes;
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(needs.size() == 3 + flat.size(), "needs must have one entry for x, h0, c0 and each weight");
  const bool needs_x = needs[0], needs_h0 = needs[1], needs_c0 = needs[2];
  const auto needs_weight = [&](int64_t d, int64_t k) { return needs[3 + d * layer.weights.count + k]; };

  y = dense(y);
  c = dense(c);
  reserve = dense(reserve);
  layer.check_rows("y", y, s.D * s.P);
  layer.check_rows("c", c, s.D * s.H);
  layer.check_gates(reserve);
  const std::array<OptionalTensor, 4> gradients{dense(dy), dense(dhn), dense(dcn), dense(dc)};
  layer.check_rows("dy", gradients[0], s.D * s.P);
  layer.check_state("dhn", gradients[1], s.P);
  layer.check_state("dcn", gradients[2], s.H);
  layer.check_rows("dc", gradients[3], s.D * s.H);
  for (const OptionalTensor& tensor :
       {gradients[0], gradients[3], OptionalTensor(y), OptionalTensor(c), OptionalTensor(reserve)}) {
    if (tensor.has_value())
      STD_TORCH_CHECK(tensor->scalar_type() == dtype, "gradients and saved tensors must have the dtype of x");
  }

  Tensor dh0 = needs_h0 ? empty({s.D, s.B, s.P}, dtype) : empty({0}, dtype);
  Tensor dc0 = needs_c0 ? empty({s.D, s.B, s.H}, dtype) : empty({0}, dtype);
  if (s.B == 0) {
    Tensors dweights;
    Tensor dx = needs_x ? layer.empty_rows(s.I, dtype) : empty({0}, dtype);
    for (size_t k = 0; k < flat.size(); ++k) {
      Tensor zero = torch::stable::empty_like(flat[k]);
      dweights.push_back(needs[3 + k] ? torch::stable::zero_(zero) : empty({0}, dtype));
    }
    return {dx, dh0, dc0, dweights};
  }

  BackwardParams params{};
  params.sizes = s;
  params.sequence = layer.sequence();
  params.dy = pointer(gradients[0]);
  params.dhn = pointer(gradients[1]);
  params.dcn = pointer(gradients[2]);
  params.dc = pointer(gradients[3]);
  params.h0 = pointer(layer.h0);
  params.c0 = pointer(layer.c0);
  params.y = y.const_data_ptr();
  params.c = c.const_data_ptr();
  params.gates = reserve.const_data_ptr();
  params.dh0 = needs_h0 ? pointer(dh0) : nullptr;
  params.dc0 = needs_c0 ? pointer(dc0) : nullptr;
  bool needs_w_hh = false;
  for (int64_t d = 0; d < s.D; ++d) needs_w_hh |= needs_weight(d, 1);
  StepGradients steps = backward_sequence(layer, params, needs_w_hh);
  Tensor dx = needs_x ? input_gradient(layer, steps) : empty({0}, dtype);
  return {dx, dh0, dc0, weight_gradients(layer, steps, needs_weight)};
}

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CPU, library) {
  library.impl("cpu_forward", TORCH_BOX(&cpu_forward));
  library.impl("cpu_backward", TORCH_BOX(&cpu_backward));
  library.impl("cpu_infer", TORCH_BOX(&cpu_infer));
}

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CompositeExplicitAutograd, library) {
  library.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  library.impl("cpu_keep", TORCH_BOX(&cpu_keep));
  library.impl("cpu_plan", TORCH_BOX(&cpu_plan));
}

}  // namespace
}  // namespace fusedrnn
