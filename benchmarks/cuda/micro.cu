// The microbenchmarks on a GPU: a program that needs the driver and nothing else of CUDA, so that it can be built on
// one machine (nvcc, no GPU) and run on another (a GPU, no nvcc). fusedrnn's `bench micro` builds it, runs it and reads
// it.
//
//   micro [--samples N] [NAME ...]     one line of JSON for the device, then one for each measurement, as they are made
//
// A sample is one launch. Clocks are read, never set.
#include <cuda_runtime.h>

#include <chrono>
#include <cstdlib>
#include <cstring>

#include "suite.h"

namespace fusedrnn::micro {
namespace {

template <class Kernel>
__global__ void __launch_bounds__(512) measured(const __grid_constant__ Params params) {
  extern __shared__ __align__(128) char shared[];
  Kernel::run(params, shared);
}

__global__ void empty() {}

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

// How many clusters run at the same time; 0 where the device has none of their size.
std::string active_clusters(const void* kernel, const cudaLaunchConfig_t& launch, int& count) {
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&count, kernel, &launch);
  const std::string failed = failure("cudaOccupancyMaxActiveClusters", error);
  if (error != cudaErrorInvalidClusterSize) return failed;
  count = 0;
  return {};
}

struct Allocation {
  void* pointer = nullptr;
  ~Allocation() { (void)cudaFree(pointer); }
  cudaError_t make(size_t bytes) { return cudaMalloc(&pointer, std::max<size_t>(bytes, 16)); }
};

constexpr int kWarmUps = 3;

struct DeviceRunner {
  Machine machine{};
  std::vector<std::string> names;
  int samples = 30;
  int major = 0;
  bool failed = false;

  bool wanted(const char* name) const {
    return names.empty() || std::find(names.begin(), names.end(), name) != names.end();
  }

  template <class Kernel>
  void measure(const Case& c) {
    Samples made;
    if (Kernel::kClustered && machine.cluster == 0) {
      made.skipped = "clusters need compute capability 9.0";
    } else {
      made.error = run<Kernel>(c, made);
    }
    failed |= !made.error.empty();
    print(c, made);
  }

  template <class Kernel>
  std::string run(const Case& c, Samples& made) {
    const auto kernel = reinterpret_cast<const void*>(&measured<Kernel>);
    cudaLaunchAttribute attribute{};
    cudaLaunchConfig_t launch{};
    launch.blockDim = dim3(static_cast<unsigned>(c.threads));
    launch.dynamicSmemBytes = static_cast<size_t>(c.shared);
    launch.attrs = &attribute;
    launch.numAttrs = 1;
    FUSEDRNN_CALL(cudaFuncSetAttribute, kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                  static_cast<int>(c.shared));
    Params p{};
    if constexpr (Kernel::kClustered) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = static_cast<unsigned>(c.group);
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
      if (c.group > 8) FUSEDRNN_CALL(cudaFuncSetAttribute, kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
      int clusters = 0;
      launch.gridDim = dim3(static_cast<unsigned>(c.group));
      if (std::string error = active_clusters(kernel, launch, clusters); !error.empty()) return error;
      if (clusters == 0) {
        made.skipped = "no cluster of this size fits";
        return {};
      }
      p.blocks = clusters * c.group;
    } else {
      attribute.id = cudaLaunchAttributeCooperative;  // refused unless all blocks run at the same time
      attribute.val.cooperative = 1;
      p.blocks = c.blocks;
    }
    launch.gridDim = dim3(static_cast<unsigned>(p.blocks));
    made.blocks = p.blocks;
    p.iterations = c.iterations;
    p.threads = c.threads;
    p.group = c.group;
    p.word = c.word;
    p.bytes = c.bytes;
    const int groups = Kernel::kClustered || c.group == 1 ? 1 : p.blocks / c.group;
    const size_t flag_bytes = sizeof(uint32_t) * p.blocks * kFlagStride, data_bytes = c.data * groups;
    const size_t span_bytes = sizeof(Span) * p.blocks;
    Allocation flags, data, spans_there;
    FUSEDRNN_CALL(flags.make, flag_bytes);
    FUSEDRNN_CALL(data.make, data_bytes);
    FUSEDRNN_CALL(spans_there.make, span_bytes);
    p.flags = static_cast<uint32_t*>(flags.pointer);
    p.data = static_cast<char*>(data.pointer);
    p.spans = static_cast<Span*>(spans_there.pointer);
    std::vector<Span> spans(p.blocks);
    for (int sample = -kWarmUps; sample < samples; ++sample) {
      // With fewer samples than partners, they are spread over all of them.
      const int k = sample + kWarmUps;
      p.partner = c.pairs ? 1 + static_cast<int>(int64_t{k} * 41 % (c.group - 1)) : 0;
      FUSEDRNN_CALL(cudaMemset, p.flags, 0, flag_bytes);
      FUSEDRNN_CALL(cudaMemset, p.data, 0xff, data_bytes);
      FUSEDRNN_CALL(cudaMemset, p.spans, 0, span_bytes);
      void* arguments[] = {&p};
      FUSEDRNN_CALL(cudaLaunchKernelExC, &launch, kernel, arguments);
      FUSEDRNN_CALL(cudaDeviceSynchronize);
      FUSEDRNN_CALL(cudaMemcpy, spans.data(), p.spans, span_bytes, cudaMemcpyDeviceToHost);
      if (std::string wrong = miscounted<Kernel>(p, spans); !wrong.empty()) return wrong;
      if (sample >= 0) add(c, spans, made);
    }
    return {};
  }
};

double now() {
  return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Multiplies until an idle GPU has had time to raise its clocks.
std::string warm_up(const DeviceRunner& runner) {
  DeviceRunner quiet = runner;
  quiet.samples = 10;
  Case c{"", "", Quantity::kMultiplyAdds, 1, runner.machine.processors, 256, runner.machine.processors, 4000};
  c.word = 0x3f803f80;
  for (const double end = now() + 3e8; now() < end;) {
    Samples ignored;
    if (std::string error = quiet.run<MatrixProduct<Operands::kBFloat16, 8>>(c, ignored); !error.empty()) return error;
  }
  return {};
}

// Launches of an empty kernel, on the clock of the host.
std::string time_launches(const DeviceRunner& runner) {
  constexpr int kLaunches = 1000;
  const auto line = [&](const char* variant, int launches, const std::vector<double>& ns) {
    Samples made;
    made.blocks = 1;
    made.ns = ns;
    print(Case{"launch", variant, Quantity::kLatency, 1, 1, 32, 1, launches}, made);
  };
  cudaStream_t stream;
  FUSEDRNN_CALL(cudaStreamCreateWithFlags, &stream, cudaStreamNonBlocking);
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  FUSEDRNN_CALL(cudaStreamBeginCapture, stream, cudaStreamCaptureModeThreadLocal);
  for (int k = 0; k < kLaunches; ++k) empty<<<1, 32, 0, stream>>>();
  FUSEDRNN_CALL(cudaStreamEndCapture, stream, &graph);
  FUSEDRNN_CALL(cudaGraphInstantiate, &replay, graph, 0);
  std::vector<double> queued, waited, replayed;
  for (int sample = -kWarmUps; sample < runner.samples; ++sample) {
    const double a = now();
    for (int k = 0; k < kLaunches; ++k) empty<<<1, 32, 0, stream>>>();
    FUSEDRNN_CALL(cudaGetLastError);
    FUSEDRNN_CALL(cudaStreamSynchronize, stream);
    const double b = now();
    for (int k = 0; k < kLaunches / 10; ++k) {
      empty<<<1, 32, 0, stream>>>();
      FUSEDRNN_CALL(cudaStreamSynchronize, stream);
    }
    const double c = now();
    FUSEDRNN_CALL(cudaGraphLaunch, replay, stream);
    FUSEDRNN_CALL(cudaStreamSynchronize, stream);
    const double d = now();
    if (sample < 0) continue;
    queued.push_back(b - a);
    waited.push_back(c - b);
    replayed.push_back(d - c);
  }
  line("one after another", kLaunches, queued);
  line("and wait", kLaunches / 10, waited);
  line("in a graph", kLaunches, replayed);
  FUSEDRNN_CALL(cudaGraphExecDestroy, replay);
  FUSEDRNN_CALL(cudaGraphDestroy, graph);
  FUSEDRNN_CALL(cudaStreamDestroy, stream);
  return {};
}

// How many clusters of `blocks` with 200 KiB each run at the same time.
std::string count_clusters(int blocks, int& count) {
  const auto kernel = reinterpret_cast<const void*>(&measured<ClusterBarrier<true>>);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(blocks));
  launch.blockDim = dim3(256);
  launch.dynamicSmemBytes = 200 * 1024;
  launch.attrs = &attribute;
  launch.numAttrs = 1;
  FUSEDRNN_CALL(cudaFuncSetAttribute, kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 * 1024);
  FUSEDRNN_CALL(cudaFuncSetAttribute, kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return active_clusters(kernel, launch, count);
}

std::string look(DeviceRunner& runner) {
  cudaDeviceProp properties;
  int driver = 0, clock = 0;
  FUSEDRNN_CALL(cudaGetDeviceProperties, &properties, 0);
  FUSEDRNN_CALL(cudaDriverGetVersion, &driver);
  FUSEDRNN_CALL(cudaDeviceGetAttribute, &clock, cudaDevAttrClockRate, 0);
  runner.machine = {properties.multiProcessorCount, properties.major >= 9 ? 16 : 0,
                    static_cast<int64_t>(properties.sharedMemPerBlockOptin), 1};
  std::string clusters;
  for (const int blocks : {2, 4, 8, 16}) {
    int count = 0;
    if (runner.machine.cluster < blocks) continue;
    if (std::string error = count_clusters(blocks, count); !error.empty()) return error;
    clusters += (clusters.empty() ? "\"" : ",\"") + std::to_string(blocks) + "\":" + std::to_string(count);
  }
  std::printf(
      "{\"device\":%s,\"capability\":%d,\"multiprocessors\":%d,\"shared\":%zu,\"l2_bytes\":%d,\"clock_khz\":%d,"
      "\"cuda_driver\":%d,\"cuda_runtime\":%d,\"clusters\":{%s}}\n",
      quoted(properties.name).c_str(), 10 * properties.major + properties.minor, properties.multiProcessorCount,
      properties.sharedMemPerBlockOptin, properties.l2CacheSize, clock, driver, CUDART_VERSION, clusters.c_str());
  std::fflush(stdout);
  return {};
}

}  // namespace
}  // namespace fusedrnn::micro

int main(int argc, char** argv) {
  using namespace fusedrnn::micro;
  DeviceRunner runner;
  for (int k = 1; k < argc; ++k) {
    if (std::strcmp(argv[k], "--samples") == 0 && k + 1 < argc) {
      runner.samples = std::max(std::atoi(argv[++k]), 1);
    } else {
      runner.names.emplace_back(argv[k]);
    }
  }
  std::string error = look(runner);
  if (error.empty()) error = warm_up(runner);
  if (error.empty() && runner.wanted("launch")) error = time_launches(runner);
  if (!error.empty()) {
    std::fprintf(stderr, "%s\n", error.c_str());
    return 1;
  }
  suite(runner);
  return runner.failed ? 1 : 0;
}
