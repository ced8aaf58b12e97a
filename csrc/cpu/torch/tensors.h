// Tensors for the CPU operators: allocation, access, and scratch memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "../cache.h"

// Wraps external memory in a tensor; calls `deleter` when the memory is freed. In torch from 2.11 on, null with 2.10.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* tensor, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);

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

int64_t bytes_of(ScalarType dtype) { return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2; }

// madvise(MADV_HUGEPAGE) for tensors from 16 MiB on, as NumPy does: the first touch of a page of 4 KiB costs a
// microsecond, and training with a large batch has tens of thousands of them.
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

// Whether memory that is handed out is filled with NaN before, for tests.
std::atomic<bool> poisons{false};

void poison(void* memory, size_t bytes) {
  if (bytes > 0 && poisons.load(std::memory_order_relaxed)) std::memset(memory, 0xff, bytes);  // NaN in every dtype
}

// The strides of a contiguous tensor of at most four dimensions, and how many numbers it has.
struct Contiguous {
  explicit Contiguous(std::initializer_list<int64_t> size) {
    int64_t stride = 1;
    for (size_t k = size.size(); k-- > 0; stride *= std::max<int64_t>(1, size.begin()[k])) {
      strides[k] = stride;
      numbers *= size.begin()[k];
    }
  }

  std::array<int64_t, 4> strides{};
  int64_t numbers = 1;
};

// On the CPU. Not through the dispatcher, which a single time step would feel.
Tensor empty(std::initializer_list<int64_t> size, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(size.size()), size.begin(),
                                                  Contiguous(size).strides.data(), dtype_code(dtype),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  advise(tensor);
  poison(tensor.mutable_data_ptr(), static_cast<size_t>(tensor.numel()) * tensor.element_size());
  return tensor;
}

Tensor as(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

ScalarType compute_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

OptionalTensor dense(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(dense(*tensor)) : std::nullopt;
}

constexpr size_t kMaxWeights = 12;  // of a layer: 2 to 6 of a direction

// w0, w1, and of the others those that are given.
Tensors listed(const Tensor& w0, const Tensor& w1, std::initializer_list<const OptionalTensor*> others) {
  Tensors all{w0, w1};
  for (const OptionalTensor* w : others) {
    if (w->has_value()) all.push_back(**w);
  }
  return all;
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

// Default limit in bytes of the memory pool, and of the cache of packed weights.
int64_t default_cache_bytes() {
  constexpr int64_t kDefaultMib = 128, kMostMib = int64_t{1} << 40;
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

// Memory that calls have worked in, or that the caller has let go of, for the next ones. Memory that is new to the
// process has to be found and cleared by the system page by page, which takes a tenth to a third of a training step
// with large weights, wherever the allocator gives it back after every call.
class MemoryPool : public ByteLru<Block> {
 public:
  static constexpr int64_t kSmall = 64 << 10;  // bytes: less than that has its place in any allocator
  using ByteLru<Block>::ByteLru;

  // Never destroyed: tensors should not be, when torch itself is.
  static MemoryPool& instance() {
    static auto* const pool = new MemoryPool(default_cache_bytes());
    return *pool;
  }

  // At least as many numbers, and at most so many.
  Tensor take(int64_t numbers, int64_t most, ScalarType dtype) {
    {
      const std::lock_guard lock(mutex_);
      auto best = items_.end();
      for (auto block = items_.begin(); block != items_.end(); ++block) {
        const int64_t size = block->tensor.numel();
        const bool fits = block->tensor.scalar_type() == dtype && size >= numbers && size <= most;
        if (fits && (best == items_.end() || size < best->tensor.numel())) best = block;
      }
      if (best != items_.end()) return take_out(best).tensor;
    }
    return empty({numbers}, dtype);
  }

  void give(Tensor memory) {
    Block block(std::move(memory));
    if (block.bytes < kSmall) return;
    const std::lock_guard lock(mutex_);
    put(std::move(block));
  }
};

// As `empty`, but with memory from the pool, which takes it back when the tensor is freed: for gradients and for what
// only the backward reads. Pooled tensors cannot be resized. With torch 2.10, which has no deleter, this is `empty`.
Tensor pooled(std::initializer_list<int64_t> size, ScalarType dtype) {
  const Contiguous layout(size);
  if (torch_from_blob == nullptr || layout.numbers * bytes_of(dtype) < MemoryPool::kSmall) return empty(size, dtype);
  const int64_t most = layout.numbers + layout.numbers / 8;  // a tensor holds the whole block
  auto block = std::make_unique<Tensor>(MemoryPool::instance().take(layout.numbers, most, dtype));
  const auto give = [](void*, void* memory) {
    const std::unique_ptr<Tensor> block(static_cast<Tensor*>(memory));
    MemoryPool::instance().give(std::move(*block));
  };
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(block->mutable_data_ptr(), static_cast<int64_t>(size.size()), size.begin(),
                                         layout.strides.data(), 0, dtype_code(dtype), aoti_torch_device_type_cpu(), -1,
                                         &handle, aoti_torch_layout_strided(), nullptr, 0, give, block.get()));
  block.release();
  return Tensor(handle);
}

// Numbers to work with, uninitialised, for as long as this lives.
class Scratch {
 public:
  Scratch(int64_t numbers, ScalarType dtype) : block_(MemoryPool::instance().take(numbers, 2 * numbers, dtype)) {}
  Scratch(Scratch&& other) noexcept : block_(std::exchange(other.block_, std::nullopt)) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (block_.has_value()) MemoryPool::instance().give(std::move(*block_));
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
