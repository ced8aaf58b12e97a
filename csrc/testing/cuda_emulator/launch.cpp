// The launches of launch.h on the host, over the functions of harness.cpp: with cuda/torch/ops.cpp, operators for
// tests. A stream has no meaning, and a launch has ended when it returns.
#include "../../cuda/launch.h"

#include <array>

using namespace fusedrnn::cuda;

extern "C" {
struct Outcome {
  char* error;
  char* names;
  int32_t bytes;
  uint64_t switches;
};
int fusedrnn_host_forward(const ForwardParams*, uint64_t seed, const char* remove, Outcome*);
int fusedrnn_host_backward(const BackwardParams*, uint64_t seed, const char* remove, Outcome*);
void fusedrnn_host_pack(const PackParams*);
}

namespace fusedrnn::cuda {
namespace {

// The device that these tests plan for: as an H200, with few multiprocessors.
constexpr int64_t kSharedBytes = 232448;
constexpr int kMultiprocessors = 16;

template <class Params>
std::string launch(int (*run)(const Params*, uint64_t, const char*, Outcome*), const Params& params) {
  const int64_t count = flags(params.sizes, params.plan);
  for (int64_t k = 0; k < count; ++k) params.workspace.flags[k] = 0;
  std::array<char, 16384> error{}, names{};
  Outcome outcome{error.data(), names.data(), static_cast<int32_t>(error.size()), 0};
  return run(&params, 0, nullptr, &outcome) == 0 ? std::string() : std::string(error.data());
}

}  // namespace

std::string use_device(int) { return {}; }

std::string obstacle(int) { return {}; }

std::string launch_pack(const PackParams& given, void*) {
  PackParams params = given;
  params.threads = 3;
  fusedrnn_host_pack(&params);
  return {};
}

std::string launch_forward(const ForwardParams& params, void*) { return launch(fusedrnn_host_forward, params); }

std::string launch_backward(const BackwardParams& params, void*) { return launch(fusedrnn_host_backward, params); }

std::string occupancy(Pass pass, const Sizes& sizes, const Plan& plan, Occupancy* found) {
  if (const char* why = invalid(pass, sizes, plan)) return std::string("the plan is invalid: ") + why;
  const bool fits = shared_bytes(pass, sizes, plan) <= kSharedBytes;
  *found = {kSharedBytes, fits ? kMultiprocessors / plan.blocks : 0};
  return {};
}

}  // namespace fusedrnn::cuda
