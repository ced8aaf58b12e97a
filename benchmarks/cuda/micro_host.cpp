// The microbenchmarks' kernels on the host, every thread a fiber (csrc/testing/cuda_emulator/runtime.h): whether they
// end, and count right, under a schedule. Prints what micro.cu prints; times mean nothing.
//
//   micro_host [--seed N] [--remove SYNCHRONISATION] [NAME ...]      exit status 1 if a kernel did not end or
//   miscounted
#include <cstdlib>
#include <cstring>

#include "../../csrc/testing/cuda_emulator/runtime.h"
#include "suite.h"

namespace fusedrnn::micro {
namespace {

struct HostRunner {
  Machine machine{4, 8, 64 << 10, 64};
  std::vector<std::string> names;
  uint64_t seed = 0;
  const char* remove = nullptr;
  bool failed = false;

  bool wanted(const char* name) const {
    return names.empty() || std::find(names.begin(), names.end(), name) != names.end();
  }

  template <class Kernel>
  void measure(Case c) {
    Params p{};
    p.blocks = c.blocks != 0 ? c.blocks : c.group < machine.cluster ? 2 * c.group : c.group;
    p.iterations = c.iterations;
    p.threads = c.threads = std::min(c.threads, 64);
    p.group = c.group;
    p.partner = c.pairs ? 1 + static_cast<int>(seed) % (c.group - 1) : 0;
    p.word = c.word;
    p.bytes = c.bytes;
    std::vector<uint32_t> flags(size_t(p.blocks) * kFlagStride);
    const int groups = Kernel::kClustered || c.group == 1 ? 1 : p.blocks / c.group;
    std::vector<char> data(c.data * groups + 1, '\xff');
    std::vector<Span> spans(p.blocks);
    p.flags = flags.data();
    p.data = data.data();
    p.spans = spans.data();
    const host::Launch launch{
        p.blocks, Kernel::kClustered ? c.group : 1, p.threads, static_cast<size_t>(c.shared), seed, remove};
    const host::Report report = host::run(
        launch, [](const void* params, char* shared) { Kernel::run(*static_cast<const Params*>(params), shared); }, &p);
    Samples samples;
    samples.blocks = p.blocks;
    samples.error = report.error.empty() ? miscounted<Kernel>(p, spans) : report.error;
    if (samples.error.empty()) add(c, spans, samples);
    failed |= !samples.error.empty();
    print(c, samples);
  }
};

}  // namespace
}  // namespace fusedrnn::micro

int main(int argc, char** argv) {
  fusedrnn::micro::HostRunner runner;
  for (int k = 1; k < argc; ++k) {
    if (std::strcmp(argv[k], "--seed") == 0 && k + 1 < argc) {
      runner.seed = std::strtoull(argv[++k], nullptr, 10);
    } else if (std::strcmp(argv[k], "--remove") == 0 && k + 1 < argc) {
      runner.remove = argv[++k];
    } else {
      runner.names.emplace_back(argv[k]);
    }
  }
  std::printf("{\"device\":\"the host, on fibers\"}\n");
  fusedrnn::micro::suite(runner);
  return runner.failed ? 1 : 0;
}
