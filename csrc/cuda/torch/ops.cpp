// The CUDA operators: tensors in, plain structs out, the checks that memory safety needs, and the launches.
// The schemas, the plans and the large matrix products live in Python (fusedrnn/ops.py, cuda.py, gpu.py).
//
// Built with FUSEDRNN_CUDA_HOST, these are operators on tensors of the CPU, over the launches of
// testing/cuda_emulator/launch.cpp: what tests run where there is no GPU.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <iterator>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../launch.h"

namespace fusedrnn::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Integers = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;

void check(const std::string& failed) { STD_TORCH_CHECK(failed.empty(), failed); }

// ---------------------------------------------------------------------------------------------- where a launch runs

#if defined(FUSEDRNN_CUDA_HOST)
class OnDevice {
 public:
  explicit OnDevice(int32_t) {}
  void* stream() const { return nullptr; }
};
bool is_here(const Tensor& tensor) { return tensor.is_cpu(); }
#else
// Makes a device the current one, of torch and of the CUDA runtime that this library carries.
class OnDevice {
 public:
  explicit OnDevice(int32_t index) : index_(index), guard_(index) { check(use_device(index)); }
  void* stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return stream;
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};
bool is_here(const Tensor& tensor) { return tensor.is_cuda(); }
#endif

// ---------------------------------------------------------------------------------------------- plans

constexpr size_t kPlanFields = 13;

// The fields of fusedrnn/cuda_plan.py: Plan.fields, in the order of plan.h.
Plan plan_of(const Integers& fields) {
  STD_TORCH_CHECK(fields.size() == kPlanFields, "a plan has ", kPlanFields, " fields, got ", fields.size());
  STD_TORCH_CHECK(fields[0] >= 0 && fields[0] <= 3 && fields[1] >= 0 && fields[1] <= 4 && fields[12] >= 0 &&
                      fields[12] < kCellKinds,
                  "a plan of an unknown kind");
  for (const int64_t field : fields)
    STD_TORCH_CHECK(field >= 0 && field <= INT32_MAX, "a plan with a field of ", field);
  const auto field = [&](size_t k) { return static_cast<int32_t>(fields[k]); };
  Plan plan{};
  plan.exchange = static_cast<Exchange>(field(0));
  plan.math = static_cast<Math>(field(1));
  plan.blocks = field(2);
  plan.tiles = field(3);
  plan.splits = field(4);
  plan.rows = field(5);
  plan.groups = field(6);
  plan.shared_blocks = field(7);
  plan.shared_projection_blocks = field(8);
  plan.fuse_input = field(9);
  plan.shared_input_blocks = field(10);
  plan.chunk_blocks = field(11);
  plan.cell = static_cast<CellKind>(field(12));
  return plan;
}

ScalarType storage_type(Math math) {
  switch (math) {
    case Math::kBFloat16: return ScalarType::BFloat16;
    case Math::kFloat16: return ScalarType::Half;
    case Math::kFloat64: return ScalarType::Double;
    default: return ScalarType::Float;
  }
}

// ---------------------------------------------------------------------------------------------- tensors of a launch

// A tensor of each direction, as far as they are given.
Tensors present(const OptionalTensor& first, const OptionalTensor& second) {
  Tensors found;
  if (first.has_value()) found.push_back(*first);
  if (second.has_value()) found.push_back(*second);
  return found;
}

// The part that both passes share. Addresses are taken only from tensors that were checked: shape, dtype, contiguity,
// and that all are on the same device.
class Layer {
 public:
  Layer(Pass pass, const Plan& plan_in, const Tensor& like, Sizes sizes_in, const Tensors& w_hh_in,
        const Tensors& w_hr_in, const Tensors& w_ih_in = {})
      : sizes(sizes_in),
        plan(plan_in),
        cell(spec_of(plan_in.cell)),
        pass_(pass),
        like_(like),
        device_(like.get_device_index()) {
    STD_TORCH_CHECK(static_cast<int64_t>(w_hh_in.size()) == sizes.D, "there must be one w_hh of each direction");
    STD_TORCH_CHECK(w_hr_in.size() == (sizes.projected != 0 ? w_hh_in.size() : 0),
                    "there must be one w_hr of each direction, or none");
    if (const char* why = invalid(pass, sizes, plan)) STD_TORCH_CHECK(false, "the plan is invalid: ", why);
    STD_TORCH_CHECK(w_ih_in.size() == (plan.fuse_input != 0 ? w_hh_in.size() : 0),
                    "there must be one w_ih of each direction where the plan takes x, and none elsewhere");
    for (const Tensor& w : w_hh_in) w_hh_.push_back(address("w_hh", w, {cell.gates * sizes.H, sizes.P}));
    for (const Tensor& w : w_hr_in) w_hr_.push_back(address("w_hr", w, {sizes.P, sizes.H}));
    for (const Tensor& w : w_ih_in) w_ih_.push_back(address("w_ih", w, {cell.gates * sizes.H, sizes.I}));
  }

  void* address(const char* name, const Tensor& tensor, std::initializer_list<int64_t> size, ScalarType dtype) const {
    bool same = tensor.dim() == static_cast<int64_t>(size.size());
    int64_t dim = 0;
    for (auto n = size.begin(); same && n != size.end(); ++n, ++dim) same = tensor.size(dim) == *n;
    STD_TORCH_CHECK(same, name, " has the wrong shape for this layer");
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has a dtype that the plan is not for");
    STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
    STD_TORCH_CHECK(is_here(tensor) && tensor.get_device_index() == device_, name, " is on another device");
    return tensor.mutable_data_ptr();
  }
  void* address(const char* name, const Tensor& tensor, std::initializer_list<int64_t> size) const {
    return address(name, tensor, size, storage_type(plan.math));
  }
  void* address(const char* name, const OptionalTensor& tensor, std::initializer_list<int64_t> size) const {
    return tensor.has_value() ? address(name, *tensor, size) : nullptr;
  }

  // The biases of every direction, or of none.
  void biases(const char* name, const Tensors& tensors, const void* (&to)[2]) const {
    STD_TORCH_CHECK(tensors.empty() || static_cast<int64_t>(tensors.size()) == sizes.D, "there must be one ", name,
                    " of each direction, or none");
    for (size_t d = 0; d < tensors.size(); ++d) to[d] = address(name, tensors[d], {cell.gates * sizes.H});
  }

  Sequence sequence(const OptionalTensor& lengths, const OptionalTensor& reset) const {
    Sequence sequence{};
    if (lengths.has_value()) {
      sequence.lengths = static_cast<const int64_t*>(address("lengths", *lengths, {sizes.B}, ScalarType::Long));
    }
    if (reset.has_value()) {
      sequence.reset = static_cast<const uint8_t*>(address("reset", *reset, {sizes.T, sizes.B}, ScalarType::Bool));
    }
    return sequence;
  }

  // The inputs of a variant of the LSTM: its peepholes, and the multipliers in the order of Noise.
  Extras extras(const OptionalTensor& w_p0, const OptionalTensor& w_p1,
                const std::array<OptionalTensor, kNoises>& noise) const {
    Extras extras{};
    const Tensors w_p = present(w_p0, w_p1);
    STD_TORCH_CHECK(is_variant(cell) || (w_p.empty() && !(noise[0] || noise[1] || noise[2] || noise[3])), cell.name,
                    " has neither peepholes nor noise");
    STD_TORCH_CHECK(w_p.empty() || static_cast<int64_t>(w_p.size()) == sizes.D,
                    "there must be peepholes of each direction, or none");
    for (size_t d = 0; d < w_p.size(); ++d) extras.w_p[d] = address("w_p", w_p[d], {cell.parameters * sizes.H});
    const ScalarType compute = plan.math == Math::kFloat64 ? ScalarType::Double : ScalarType::Float;
    const auto& [h, c, g, r] = noise;
    STD_TORCH_CHECK(!(h || c) || sizes.projected == 0, "there is no zoneout with a projection");
    STD_TORCH_CHECK(!(g && r), "there is recurrent dropout of the candidate or of the state, not both");
    int64_t steps = 0;
    const void* any = nullptr;
    for (size_t k = 0; k < noise.size(); ++k) {
      if (!noise[k].has_value()) continue;
      const int64_t W = static_cast<Noise>(k) == Noise::kR ? sizes.P : sizes.H;
      STD_TORCH_CHECK(noise[k]->dim() == 3 && (steps == 0 || noise[k]->size(0) == steps) &&
                          (noise[k]->size(0) == sizes.T || noise[k]->size(0) == 1),
                      "noise must be of all time steps or of one");
      STD_TORCH_CHECK(sizes.B * sizes.D * W <= INT32_MAX, "noise of a step must have less than 2^31 numbers");
      steps = noise[k]->size(0);
      const size_t place = std::min(k, std::size(extras.noise) - 1);
      extras.noise[place] = any = address("noise", *noise[k], {steps, sizes.B, sizes.D * W}, compute);
      extras.given[k] = 1;
      extras.noise_strides = {W, steps == 1 ? 0 : sizes.B * sizes.D * W, sizes.D * W};
    }
    for (const void*& one : extras.noise) one = one == nullptr ? any : one;
    return extras;
  }

  // Strides of a tensor [T][B][D][N].
  Strides strides(int64_t N) const { return {N, sizes.B * sizes.D * N, sizes.D * N}; }

  // Fills the params that both passes share, packs the weights and runs `launch`, on the current stream.
  // torch allocates all memory, and does not reuse it before the launch on that stream has ended.
  template <class Params, class Launch>
  void run(Params& params, const Launch& launch) {
    const OnDevice here(device_);
    params.sizes = sizes;
    params.plan = plan;
    const Tensor w_hh = packed(Stage::kRecurrent, w_hh_, sizes.P, here.stream());
    params.w_hh = w_hh.const_data_ptr();
    // Kinds of noise that are not given point to readable memory: see Extras.
    for (const void*& noise : params.extras.noise) noise = noise == nullptr ? params.w_hh : noise;
    OptionalTensor w_hr;
    if (sizes.projected != 0) {
      w_hr = packed(Stage::kProjection, w_hr_, sizes.H, here.stream());
      params.w_hr = w_hr->const_data_ptr();
    }
    OptionalTensor w_ih;
    if constexpr (std::is_same_v<Params, ForwardParams>) {
      if (plan.fuse_input != 0) {
        w_ih = packed(Stage::kInput, w_ih_, sizes.I, here.stream());
        params.w_ih = w_ih->const_data_ptr();
      }
    }
    const Tensor exchanged = bytes(workspace_bytes(pass_, sizes, plan));
    const Tensor flags = bytes(cuda::flags(sizes, plan) * static_cast<int64_t>(sizeof(uint32_t)));
    params.workspace = {exchanged.mutable_data_ptr(), static_cast<uint32_t*>(flags.mutable_data_ptr())};
    check(launch(params, here.stream()));
  }

  const Sizes sizes;
  const Plan plan;
  const CellSpec cell;

 private:
  Tensor bytes(int64_t count) const {
    return torch::stable::new_empty(like_, std::array<int64_t, 1>{count}, ScalarType::Byte);
  }

  Tensor packed(Stage stage, const std::vector<const void*>& weights, int64_t row_stride, void* stream) const {
    const Tensor to = bytes(packed_bytes(pass_, stage, sizes, plan));
    PackParams params{};
    params.sizes = sizes;
    params.plan = plan;
    params.pass = pass_;
    params.stage = stage;
    for (size_t d = 0; d < weights.size(); ++d) params.w[d] = weights[d];
    params.row_stride = row_stride;
    params.packed = to.mutable_data_ptr();
    check(launch_pack(params, stream));
    return to;
  }

  Pass pass_;
  Tensor like_;
  int32_t device_;
  std::vector<const void*> w_hh_, w_hr_, w_ih_;
};

Sizes sizes_of(const Plan& plan, int64_t T, int64_t B, int64_t I, const Tensors& w_hh, const Tensors& w_hr) {
  STD_TORCH_CHECK(!w_hh.empty() && w_hh[0].dim() == 2, "w_hh must have 2 dimensions");
  return {T,
          B,
          w_hh[0].size(0) / spec_of(plan.cell).gates,
          w_hh[0].size(1),
          static_cast<int64_t>(w_hh.size()),
          w_hr.empty() ? 0 : 1,
          I};
}

// ---------------------------------------------------------------------------------------------- operators

// x, w_ih and the biases where the plan takes them; xg elsewhere. Weights are one tensor of each direction, and not a
// list: torch moves the tensors out of a list that it hands to an operator of the stable ABI.
void cuda_launch_forward(Integers fields, OptionalTensor x, OptionalTensor xg, OptionalTensor w_ih0,
                         OptionalTensor w_ih1, OptionalTensor b_ih0, OptionalTensor b_ih1, OptionalTensor b_hh0,
                         OptionalTensor b_hh1, OptionalTensor w_hh0, OptionalTensor w_hh1, OptionalTensor w_hr0,
                         OptionalTensor w_hr1, OptionalTensor h0, OptionalTensor c0, OptionalTensor lengths,
                         OptionalTensor reset, Tensor y, Tensor hn, OptionalTensor cn, OptionalTensor c,
                         OptionalTensor saved, OptionalTensor w_p0, OptionalTensor w_p1, OptionalTensor noise_h,
                         OptionalTensor noise_c, OptionalTensor noise_g, OptionalTensor noise_r) {
  STD_TORCH_CHECK(y.dim() == 3, "y must have 3 dimensions");
  STD_TORCH_CHECK(!x.has_value() || x->dim() == 3, "x must have 3 dimensions");
  const Tensors w_hh = present(w_hh0, w_hh1), w_hr = present(w_hr0, w_hr1);
  const Plan plan = plan_of(fields);
  const Sizes sizes = sizes_of(plan, y.size(0), y.size(1), x.has_value() ? x->size(2) : 0, w_hh, w_hr);
  Layer layer(Pass::kForward, plan, y, sizes, w_hh, w_hr, present(w_ih0, w_ih1));
  const auto& [T, B, H, P, D, projected, I] = layer.sizes;
  const bool fused = layer.plan.fuse_input != 0;
  STD_TORCH_CHECK(x.has_value() == fused && xg.has_value() != fused, "the plan takes ",
                  fused ? "x, and no xg" : "xg, and no x");
  ForwardParams params{};
  params.sequence = layer.sequence(lengths, reset);
  const int64_t GH = layer.cell.gates * H;
  params.xg = layer.address("xg", xg, {D, T, B, GH});
  params.xg_strides = {T * B * GH, B * GH, GH};
  params.x = layer.address("x", x, {T, B, I});
  params.x_strides = {0, B * I, I};
  layer.biases("b_ih", present(b_ih0, b_ih1), params.b_ih);
  layer.biases("b_hh", present(b_hh0, b_hh1), params.b_hh);
  params.h0 = layer.address("h0", h0, {D, B, P});
  params.c0 = layer.address("c0", c0, {D, B, H});
  params.y = layer.address("y", y, {T, B, D * P});
  params.y_strides = layer.strides(P);
  params.c = layer.address("c", c, {T, B, D * H});
  params.c_strides = layer.strides(H);
  params.hn = layer.address("hn", hn, {D, B, P});
  STD_TORCH_CHECK(cn.has_value() == has_cell_state(layer.cell), "cn must be given, of a cell that has c");
  params.cn = layer.address("cn", cn, {D, B, H});
  params.saved = layer.address("saved", saved, {D, T, B, layer.cell.saved * H});
  params.extras = layer.extras(w_p0, w_p1, {noise_h, noise_c, noise_g, noise_r});
  layer.run(params, launch_forward);
}

void cuda_launch_backward(Integers fields, OptionalTensor dy, OptionalTensor dhn, OptionalTensor dcn, OptionalTensor dc,
                          OptionalTensor w_hh0, OptionalTensor w_hh1, OptionalTensor w_hr0, OptionalTensor w_hr1,
                          OptionalTensor c0, OptionalTensor lengths, OptionalTensor reset, OptionalTensor c,
                          Tensor saved, Tensor da, OptionalTensor dh_out, OptionalTensor m, OptionalTensor dh0,
                          OptionalTensor dc0, OptionalTensor w_p0, OptionalTensor w_p1, OptionalTensor noise_h,
                          OptionalTensor noise_c, OptionalTensor noise_g, OptionalTensor noise_r) {
  STD_TORCH_CHECK(saved.dim() == 4, "saved must have 4 dimensions");
  const Tensors w_hh = present(w_hh0, w_hh1), w_hr = present(w_hr0, w_hr1);
  const Plan plan = plan_of(fields);
  Layer layer(Pass::kBackward, plan, saved, sizes_of(plan, saved.size(1), saved.size(2), 0, w_hh, w_hr), w_hh, w_hr);
  const auto& [T, B, H, P, D, projected, I] = layer.sizes;
  STD_TORCH_CHECK(!projected || (dh_out.has_value() && m.has_value()), "a projection needs dh_out and m");
  BackwardParams params{};
  params.sequence = layer.sequence(lengths, reset);
  params.dy = layer.address("dy", dy, {T, B, D * P});
  params.dy_strides = layer.strides(P);
  params.dc = layer.address("dc", dc, {T, B, D * H});
  params.dc_strides = layer.strides(H);
  params.dhn = layer.address("dhn", dhn, {D, B, P});
  params.dcn = layer.address("dcn", dcn, {D, B, H});
  STD_TORCH_CHECK(c.has_value() == (layer.cell.carry != Carry::kNone),
                  "c must be given, of a cell that carries a state");
  params.c = layer.address("c", c, {T, B, D * H});
  params.c_strides = layer.strides(H);
  params.c0 = layer.address("c0", c0, {D, B, H});
  params.saved = layer.address("saved", saved, {D, T, B, layer.cell.saved * H});
  params.da = layer.address("da", da, {D, T, B, layer.cell.maps * H});
  params.dh0 = layer.address("dh0", dh0, {D, B, P});
  params.dc0 = layer.address("dc0", dc0, {D, B, H});
  params.dh_out = layer.address("dh_out", dh_out, {D, T, B, P});
  params.m = layer.address("m", m, {D, T, B, H});
  params.extras = layer.extras(w_p0, w_p1, {noise_h, noise_c, noise_g, noise_r});
  layer.run(params, launch_backward);
}

// Shared memory that a block may have, and how many groups of a plan can run at the same time: `Occupancy` of launch.h.
// sizes: T, B, H, P, D, projected, I.
std::tuple<int64_t, int64_t> cuda_occupancy(int64_t device, int64_t pass, Integers sizes, Integers plan) {
  STD_TORCH_CHECK(sizes.size() == 7, "sizes must be T, B, H, P, D, projected and I");
  STD_TORCH_CHECK(pass == 0 || pass == 1, "pass must be 0 or 1");
  const OnDevice here(static_cast<int32_t>(device));
  Occupancy found{};
  const Sizes of{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]};
  check(occupancy(static_cast<Pass>(pass), of, plan_of(plan), &found));
  return {found.shared_bytes, found.groups};
}

// Why the kernels cannot run on a device; empty if they can.
std::string cuda_obstacle(int64_t device) { return obstacle(static_cast<int>(device)); }

// The type of device that the operators compute on.
#if defined(FUSEDRNN_CUDA_HOST)
std::string cuda_device_type() { return "cpu"; }
STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CPU, library) {
#else
std::string cuda_device_type() { return "cuda"; }
STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CUDA, library) {
#endif
  library.impl("cuda_launch_forward", TORCH_BOX(&cuda_launch_forward));
  library.impl("cuda_launch_backward", TORCH_BOX(&cuda_launch_backward));
}

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CompositeExplicitAutograd, library) {
  library.impl("cuda_occupancy", TORCH_BOX(&cuda_occupancy));
  library.impl("cuda_obstacle", TORCH_BOX(&cuda_obstacle));
  library.impl("cuda_device_type", TORCH_BOX(&cuda_device_type));
}

}  // namespace
}  // namespace fusedrnn::cuda
