// What the CPU operators need of torch's tensors: to allocate them, to look into them, and scratch.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <cstdlib>
#include <initializer_list>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/kept.h"

namespace fusedrnn {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;

// The operators are not differentiable, so nothing inside them is: an exported program calls them with grad mode on.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool before_;
};

int32_t dtype_code(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return aoti_torch_dtype_float64();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Half: return aoti_torch_dtype_float16();
    default: return aoti_torch_dtype_float32();
  }
}

// Where the kernel grants large pages to who asks for them, asks for large tensors, as NumPy does: the first touch of
// each of 4 KiB costs a microsecond, of which training with a large batch would have tens of thousands.
void advise(Tensor& tensor) {
#if defined(__linux__)
  constexpr uintptr_t kAskFrom = 16 << 20, kPage = 2 << 20;
  const uintptr_t bytes = static_cast<uintptr_t>(tensor.numel()) * tensor.element_size();
  if (bytes < kAskFrom) return;
  const auto first = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t begin = (first + kPage - 1) / kPage * kPage, end = (first + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // refusing it is no error
#endif
}

// On the CPU. Not through the dispatcher, which a single time step would feel.
Tensor empty(std::initializer_list<int64_t> size, ScalarType dtype) {
  std::array<int64_t, 4> strides{};
  int64_t numel = 1;
  for (size_t k = size.size(); k-- > 0; numel *= std::max<int64_t>(1, size.begin()[k])) strides[k] = numel;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(size.size()), size.begin(),
                                                         strides.data(), dtype_code(dtype),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  advise(tensor);
  return tensor;
}

Tensor as(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

OptionalTensor dense(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(dense(*tensor)) : std::nullopt;
}

const void* pointer(const OptionalTensor& tensor) { return tensor.has_value() ? tensor->const_data_ptr() : nullptr; }

void* pointer(Tensor& tensor) { return tensor.mutable_data_ptr(); }

void* pointer(OptionalTensor& tensor) { return tensor.has_value() ? pointer(*tensor) : nullptr; }

// The number at `offset` of a contiguous tensor.
void* at(const Tensor& tensor, int64_t offset) {
  return static_cast<char*>(tensor.mutable_data_ptr()) + offset * tensor.element_size();
}

void check_size(const char* name, const Tensor& tensor, std::initializer_list<int64_t> size) {
  bool same = tensor.dim() == static_cast<int64_t>(size.size());
  int64_t dim = 0;
  for (auto n = size.begin(); same && n != size.end(); ++n, ++dim) same = tensor.size(dim) == *n;
  STD_TORCH_CHECK(same, name, " has the wrong shape for this layer");
}

// How many bytes may be kept from call to call: of scratch, and as many of packed weights.
int64_t kept_by_default() {
  constexpr int64_t kDefaultMib = 64, kMostMib = int64_t{1} << 40;
  const char* const text = std::getenv("FUSEDRNN_CPU_KEEP_MIB");
  if (text == nullptr) return kDefaultMib << 20;
  char* end = nullptr;
  const int64_t mib = std::strtoll(text, &end, 10);
  STD_TORCH_CHECK(end != text && *end == 0 && mib >= 0 && mib < kMostMib,
                  "FUSEDRNN_CPU_KEEP_MIB must be a whole number from 0, got '", text, "'");
  return mib << 20;
}

struct Block {
  explicit Block(Tensor memory)
      : tensor(std::move(memory)), bytes(tensor.numel() * static_cast<int64_t>(tensor.element_size())) {}

  Tensor tensor;
  int64_t bytes;
};

// Memory that calls have worked in, for the next ones. Memory that is new to the process has to be found and cleared by
// the system page by page, which takes a tenth of a training step with large weights, and far more where the allocator
// gives it back after every call.
class ScratchPool : public Shelf<Block> {
 public:
  using Shelf<Block>::Shelf;

  // Never destroyed: tensors should not be, when torch itself is.
  static ScratchPool& instance() {
    static auto* const pool = new ScratchPool(kept_by_default());
    return *pool;
  }

  // At least as many numbers.
  Tensor take(int64_t numbers, ScalarType dtype) {
    {
      const std::lock_guard lock(mutex_);
      auto best = items_.end();
      for (auto block = items_.begin(); block != items_.end(); ++block) {
        const int64_t size = block->tensor.numel();
        const bool fits = block->tensor.scalar_type() == dtype && size >= numbers && size <= 2 * numbers;
        if (fits && (best == items_.end() || size < best->tensor.numel())) best = block;
      }
      if (best != items_.end()) return take_out(best).tensor;
    }
    return empty({numbers}, dtype);
  }

  void give(Tensor memory) {
    constexpr int64_t kSmall = 64 << 10;  // less than that has its place in any allocator
    Block block(std::move(memory));
    if (block.bytes < kSmall) return;
    const std::lock_guard lock(mutex_);
    put(std::move(block));
  }
};

// Numbers to work with, uninitialised, for as long as this lives.
class Scratch {
 public:
  Scratch(int64_t numbers, ScalarType dtype) : block_(ScratchPool::instance().take(numbers, dtype)) {}
  Scratch(Scratch&& other) noexcept : block_(std::exchange(other.block_, std::nullopt)) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (block_.has_value()) ScratchPool::instance().give(std::move(*block_));
  }

  void* at(int64_t offset) const { return fusedrnn::at(*block_, offset); }
  void* begin() const { return at(0); }

  // Some of it as a matrix.
  Tensor matrix(int64_t offset, int64_t rows, int64_t columns) {
    return torch::stable::view(torch::stable::narrow(*block_, 0, offset, rows * columns), {rows, columns});
  }

 private:
  OptionalTensor block_;
};
using OptionalScratch = std::optional<Scratch>;

void* pointer(const OptionalScratch& scratch) { return scratch.has_value() ? scratch->begin() : nullptr; }

}  // namespace
}  // namespace fusedrnn
