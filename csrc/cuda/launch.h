// Launches of the kernels, free of CUDA's headers. Every function works on the current device and the given stream (a
// cudaStream_t), copies its arguments, does not wait, and can be captured into a graph.
//
// They return an empty string, or what failed: the name of the CUDA call and its message. A launch that failed has
// written nothing.
#pragma once

#include <string>

#include "pack.h"
#include "params.h"

namespace fusedrnn::cuda {

// Makes a device the current one of this library's CUDA runtime, which may be another than the caller's.
std::string use_device(int device);

// Why none of the kernels can run on a device, or an empty string: the driver is older than the CUDA that the library
// was built with, or the library has no code for that architecture.
std::string obstacle(int device);

// Packs w_hh, w_hr or w_ih for one pass. PackParams::threads is chosen here.
std::string launch_pack(const PackParams& params, void* stream);

// Sets the flags of the workspace to zero, then runs the recurrence. The plan has to be valid (plan.h) and to fit.
std::string launch_forward(const ForwardParams& params, void* stream);
std::string launch_backward(const BackwardParams& params, void* stream);

// The resources of the current device for a plan.
struct Occupancy {
  int64_t shared_bytes;  // that a block may have
  int groups;            // that can run at the same time, of all directions; 0 if not even one fits
};

// The occupancy of a plan. With kGrid all of its groups, D * plan.groups, must be resident at the same time; of
// clusters one is enough: the others start when it ends.
std::string occupancy(Pass pass, const Sizes& sizes, const Plan& plan, Occupancy* found);

}  // namespace fusedrnn::cuda
