// The kernels as a library for tests, on the host: the ABI of launch.h, run by the fibers of runtime.h.
#include <cstdio>
#include <cstring>

#include "../../cuda/pack.h"
#include "bodies.h"
#include "runtime.h"

#define FUSEDRNN_EXPORT extern "C" __attribute__((visibility("default")))

using namespace fusedrnn::cuda;

namespace {

Body kernel_of(Pass pass, const Sizes& sizes, const Plan& plan) {
  switch (plan.cell) {
    case CellKind::kLstm: return body_of<LstmCells>(pass, sizes, plan);
    case CellKind::kGru: return body_of<GruCells>(pass, sizes, plan);
    case CellKind::kRnnTanh:
    case CellKind::kRnnRelu: return body_of<RnnCells>(pass, sizes, plan);
#if defined(FUSEDRNN_HOST_VARIANTS)
    case CellKind::kLstmPeephole: return body_of<LstmPeepholeCells>(pass, sizes, plan);
    case CellKind::kLstmCoupled: return body_of<LstmCoupledCells>(pass, sizes, plan);
#endif
    default: return nullptr;
  }
}

struct Outcome {
  char* error;  // what went wrong, or empty
  char* names;  // of the synchronisations that were met, one in a line
  int32_t bytes;
  uint64_t switches;
};

void copy(char* to, int bytes, const std::string& from) { std::snprintf(to, bytes, "%s", from.c_str()); }

template <class Params>
int launch(Pass pass, const Params& p, uint64_t seed, const char* remove, Outcome* outcome) {
  if (const char* why = invalid(pass, p.sizes, p.plan)) {
    copy(outcome->error, outcome->bytes, why);
    return 1;
  }
  const Body body = kernel_of(pass, p.sizes, p.plan);
  if (body == nullptr) {
    copy(outcome->error, outcome->bytes, "this build does not have that cell or arithmetic");
    return 1;
  }
  const host::Launch shape{static_cast<int>(launched_blocks(p.sizes, p.plan)),
                           is_cluster(p.plan) ? p.plan.blocks : 1,
                           threads(p.plan),
                           static_cast<size_t>(shared_bytes(pass, p.sizes, p.plan)),
                           seed,
                           remove};
  const host::Report report = host::run(shape, body, &p);
  copy(outcome->error, outcome->bytes, report.error);
  std::string names;
  for (const auto& name : report.names) names += name + "\n";
  copy(outcome->names, outcome->bytes, names);
  outcome->switches = report.switches;
  return report.error.empty() ? 0 : 1;
}

}  // namespace

// 0, or 1 with outcome->error. `remove` as in runtime.h, or null.
FUSEDRNN_EXPORT int fusedrnn_host_forward(const ForwardParams* p, uint64_t seed, const char* remove, Outcome* outcome) {
  return launch(Pass::kForward, *p, seed, remove, outcome);
}

FUSEDRNN_EXPORT int fusedrnn_host_backward(const BackwardParams* p, uint64_t seed, const char* remove,
                                           Outcome* outcome) {
  return launch(Pass::kBackward, *p, seed, remove, outcome);
}

FUSEDRNN_EXPORT void fusedrnn_host_pack(const PackParams* p) {
  for (int64_t thread = 0; thread < p->threads; ++thread) pack(*p, thread);
}

// The sizes of the C++ structs, which the tests compare with their ctypes copies.
FUSEDRNN_EXPORT int64_t fusedrnn_host_sizeof(int which) {
  const size_t sizes[] = {sizeof(ForwardParams), sizeof(BackwardParams), sizeof(PackParams), sizeof(Plan)};
  return static_cast<int64_t>(sizes[which]);
}

struct Needs {
  int64_t shared, exchanged, flags, packed[kStages], blocks, streamed[kStages];
};

FUSEDRNN_EXPORT const char* fusedrnn_host_needs(Pass pass, const Sizes* sizes, const Plan* plan, Needs* needs) {
  *needs = {shared_bytes(pass, *sizes, *plan),
            workspace_bytes(pass, *sizes, *plan),
            flags(*sizes, *plan),
            {},
            launched_blocks(*sizes, *plan),
            {}};
  for (int k = 0; k < kStages; ++k) {
    needs->packed[k] = packed_bytes(pass, static_cast<Stage>(k), *sizes, *plan);
    needs->streamed[k] = streamed_blocks(spec_of(plan->cell), pass, static_cast<Stage>(k), *sizes, *plan);
  }
  return invalid(pass, *sizes, *plan);
}

// Conversions and the matrix instruction, for tests of the primitives themselves.
FUSEDRNN_EXPORT void fusedrnn_host_convert(int which, int64_t count, const float* from, float* to) {
  for (int64_t k = 0; k < count; ++k) {
    to[k] = which == 0   ? to_compute(to_storage<BFloat16>(from[k]))
            : which == 1 ? to_compute(to_storage<Float16>(from[k]))
                         : to_tf32(from[k]);
  }
}

// A launch in which the threads of a warp disagree, so that none goes on.
FUSEDRNN_EXPORT int fusedrnn_host_deadlock(Outcome* outcome) {
  const host::Launch shape{2, 1, 64, 16, 1, nullptr};
  const host::Report report = host::run(
      shape,
      [](const void*, char*) {
        if (block_index() == 1 && thread_index() >= 32) {
          wait([] { return false; }, "what never comes");
        }
        sync_block("a barrier");
      },
      nullptr);
  copy(outcome->error, outcome->bytes, report.error);
  return report.error.empty() ? 0 : 1;
}

// A cluster whose first block leaves something on its way: with 0 a copy of its own, with 1 a push to the other block.
FUSEDRNN_EXPORT int fusedrnn_host_left(const int* what, uint64_t seed, const char* remove, Outcome* outcome) {
  const host::Launch shape{2, 2, 32, 64, seed, remove};
  const host::Report report = host::run(
      shape,
      [](const void* what, char* shared) {
        static const Quad from{};
        auto* barrier = reinterpret_cast<Mbarrier*>(shared);
        if (thread_index() == 0) init_mbarrier(barrier, 1);
        sync_cluster("the barrier is ready");
        if (block_index() != 0) return;
        if (*static_cast<const int*>(what) == 0) {
          copy_async(shared + 16, &from);
        } else {
          push(shared + 16, barrier, 1, from);
        }
      },
      what);
  copy(outcome->error, outcome->bytes, report.error);
  return report.error.empty() ? 0 : 1;
}
