// Launches; see launch.h.
#include <cuda_runtime.h>

#include <algorithm>
#include <mutex>
#include <set>
#include <utility>

#include "instances.h"
#include "launch.h"

namespace fusedrnn::cuda {
namespace {

std::string failure(const char* call, cudaError_t error) {
  if (error == cudaSuccess) return {};
  (void)cudaGetLastError();  // so that the next call is not blamed for it
  return std::string(call) + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error);
}

// Returns from the function with what failed.
#define FUSEDRNN_CALL(call, ...)                                                                \
  do {                                                                                          \
    if (std::string failed = failure(#call, call(__VA_ARGS__)); !failed.empty()) return failed; \
  } while (false)

template <class C>
Instances instances_of(Math math) {
  switch (math) {
    case Math::kBFloat16: return instances<Math::kBFloat16, C>();
    case Math::kFloat16: return instances<Math::kFloat16, C>();
    case Math::kTf32: return instances<Math::kTf32, C>();
    case Math::kFloat32: return instances<Math::kFloat32, C>();
    case Math::kFloat64: return instances<Math::kFloat64, C>();
  }
  return {};
}

Instances instances_of(CellKind cell, Math math) {
  switch (cell) {
    case CellKind::kLstm: return instances_of<LstmCells>(math);
    case CellKind::kGru: return instances_of<GruCells>(math);
    case CellKind::kRnnTanh:
    case CellKind::kRnnRelu: return instances_of<RnnCells>(math);
    case CellKind::kLstmPeephole: return instances_of<LstmPeepholeCells>(math);
    case CellKind::kLstmCoupled: return instances_of<LstmCoupledCells>(math);
  }
  return {};
}

const void* kernel_of(Pass pass, const Sizes& sizes, const Plan& plan) {
  return instances_of(plan.cell, plan.math)
      .kernel[static_cast<int>(pass)][static_cast<int>(plan.exchange)][variant(sizes, plan)];
}

// A launch's configuration together with the attributes that it points to.
struct Configuration {
  cudaLaunchConfig_t launch{};
  cudaLaunchAttribute attribute{};

  Configuration(Pass pass, const Sizes& sizes, const Plan& plan, cudaStream_t stream) {
    launch.gridDim = dim3(static_cast<unsigned>(launched_blocks(sizes, plan)));
    launch.blockDim = dim3(static_cast<unsigned>(threads(plan)));
    launch.dynamicSmemBytes = static_cast<size_t>(shared_bytes(pass, sizes, plan));
    launch.stream = stream;
    launch.attrs = &attribute;
    launch.numAttrs = 1;
    if (is_cluster(plan)) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = static_cast<unsigned>(plan.blocks);
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    } else {
      attribute.id = cudaLaunchAttributeCooperative;  // refused unless all blocks run at the same time
      attribute.val.cooperative = 1;
    }
  }
  Configuration(const Configuration&) = delete;
};

// Lets a kernel have all of the shared memory that a block may have on the current device, and clusters of any size:
// once for each kernel and device. An attribute set to what one plan needs would be taken away from another thread that
// is about to launch the same kernel with a larger plan.
std::string prepare(const void* kernel, const Plan& plan) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> prepared;
  int device = 0, shared = 0;
  FUSEDRNN_CALL(cudaGetDevice, &device);
  const std::lock_guard<std::mutex> lock(mutex);
  if (prepared.count({kernel, device}) != 0) return {};
  FUSEDRNN_CALL(cudaDeviceGetAttribute, &shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  FUSEDRNN_CALL(cudaFuncSetAttribute, kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (is_cluster(plan)) {
    FUSEDRNN_CALL(cudaFuncSetAttribute, kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  prepared.insert({kernel, device});
  return {};
}

template <class Params>
std::string launch(Pass pass, const Params& params, void* stream_) {
  if (const char* why = invalid(pass, params.sizes, params.plan)) return std::string("the plan is invalid: ") + why;
  const auto stream = static_cast<cudaStream_t>(stream_);
  const void* kernel = kernel_of(pass, params.sizes, params.plan);
  const Configuration configuration(pass, params.sizes, params.plan, stream);
  if (std::string failed = prepare(kernel, params.plan); !failed.empty()) return failed;
  if (const int64_t count = flags(params.sizes, params.plan); count > 0) {
    FUSEDRNN_CALL(cudaMemsetAsync, params.workspace.flags, 0, count * sizeof(uint32_t), stream);
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  FUSEDRNN_CALL(cudaLaunchKernelExC, &configuration.launch, kernel, arguments);
  return {};
}

__global__ void __launch_bounds__(kMaxThreads) pack_weights(const __grid_constant__ PackParams params) {
  pack(params, int64_t{blockIdx.x} * blockDim.x + threadIdx.x);
}

}  // namespace

std::string use_device(int device) {
  FUSEDRNN_CALL(cudaSetDevice, device);
  return {};
}

std::string obstacle(int device) {
  const auto release = [](int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  };
  int driver = 0, major = 0, minor = 0;
  FUSEDRNN_CALL(cudaDriverGetVersion, &driver);
  if (driver == 0) return "there is no NVIDIA driver";
  if (driver / 1000 < CUDART_VERSION / 1000) {
    return "it was built with CUDA " + release(CUDART_VERSION) + ", and the driver is one of CUDA " + release(driver);
  }
  FUSEDRNN_CALL(cudaDeviceGetAttribute, &major, cudaDevAttrComputeCapabilityMajor, device);
  FUSEDRNN_CALL(cudaDeviceGetAttribute, &minor, cudaDevAttrComputeCapabilityMinor, device);
  if (std::string failed = use_device(device); !failed.empty()) return failed;
  cudaFuncAttributes attributes;
  const std::string failed = failure("cudaFuncGetAttributes",
                                     cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&pack_weights)));
  if (failed.empty()) return {};
  return "it was built for other architectures than sm_" + std::to_string(10 * major + minor) + " (" + failed + ")";
}

std::string launch_pack(const PackParams& given, void* stream) {
  const Product packed = packed_product(given.pass, given.stage, given.sizes, given.plan);
  const int64_t lanes = given.sizes.D * packed.tiles * packed.operand.blocks() * kWarp;
  const int64_t blocks = std::min<int64_t>(ceil_div(lanes, kMaxThreads), 4096);
  PackParams params = given;
  params.threads = blocks * kMaxThreads;
  const void* kernel = reinterpret_cast<const void*>(&pack_weights);
  void* arguments[] = {&params};
  FUSEDRNN_CALL(cudaLaunchKernel, kernel, dim3(static_cast<unsigned>(blocks)), dim3(kMaxThreads), arguments, size_t{0},
                static_cast<cudaStream_t>(stream));
  return {};
}

std::string launch_forward(const ForwardParams& params, void* stream) { return launch(Pass::kForward, params, stream); }

std::string launch_backward(const BackwardParams& params, void* stream) {
  return launch(Pass::kBackward, params, stream);
}

std::string occupancy(Pass pass, const Sizes& sizes, const Plan& plan, Occupancy* found) {
  if (const char* why = invalid(pass, sizes, plan)) return std::string("the plan is invalid: ") + why;
  int device = 0, processors = 0, shared = 0, major = 0;
  FUSEDRNN_CALL(cudaGetDevice, &device);
  FUSEDRNN_CALL(cudaDeviceGetAttribute, &processors, cudaDevAttrMultiProcessorCount, device);
  FUSEDRNN_CALL(cudaDeviceGetAttribute, &shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  FUSEDRNN_CALL(cudaDeviceGetAttribute, &major, cudaDevAttrComputeCapabilityMajor, device);
  *found = {shared, 0};
  const bool cluster = is_cluster(plan);
  if (shared_bytes(pass, sizes, plan) > shared || (cluster && major < 9)) return {};
  const void* kernel = kernel_of(pass, sizes, plan);
  const Configuration configuration(pass, sizes, plan, nullptr);
  if (std::string failed = prepare(kernel, plan); !failed.empty()) return failed;
  if (cluster) {
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&found->groups, kernel, &configuration.launch);
    const std::string failed = failure("cudaOccupancyMaxActiveClusters", error);
    return error == cudaErrorInvalidClusterSize ? std::string() : failed;  // no such cluster can be resident
  }
  int blocks = 0;
  FUSEDRNN_CALL(cudaOccupancyMaxActiveBlocksPerMultiprocessor, &blocks, kernel, threads(plan),
                configuration.launch.dynamicSmemBytes);
  found->groups = blocks * processors / plan.blocks;
  return {};
}

}  // namespace fusedrnn::cuda
