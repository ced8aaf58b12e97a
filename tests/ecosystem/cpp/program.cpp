// A program without Python: loads the library of fusedrnn's operators, and what Python made of a model; runs it.
//
// program LIBRARY KIND FILE X Y SIZE...: KIND is "package" (of AOTInductor) or "trace" (of torch.jit.trace); X and Y
// are files of float64 numbers; X has an input for each SIZE, which are three numbers.
#include <ATen/core/ivalue.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/serialization/import.h>

#include <cstdlib>
#include <fstream>
#include <functional>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

namespace {

using Model = std::function<at::Tensor(at::Tensor)>;

Model load(const std::string& kind, const std::string& file) {
  if (kind == "package") {
    const auto package = std::make_shared<torch::inductor::AOTIModelPackageLoader>(file);
    return [=](at::Tensor x) { return package->run({x})[0]; };
  }
  const auto trace = std::make_shared<torch::jit::Module>(torch::jit::load(file));
  return [=](at::Tensor x) { return trace->forward({x}).toTensor(); };
}

}  // namespace

int main(int count, char** arguments) {
  const auto die = [](const std::string& why) {
    std::cerr << why << '\n';
    std::exit(1);
  };
  if (dlopen(arguments[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) die(dlerror());
  const c10::InferenceMode guard;
  const Model model = load(arguments[2], arguments[3]);
  std::ifstream in(arguments[4], std::ios::binary);
  std::ofstream out(arguments[5], std::ios::binary);
  const auto bytes = [](const at::Tensor& t) { return static_cast<std::streamsize>(t.numel() * sizeof(double)); };
  for (int k = 6; k + 2 < count; k += 3) {
    const std::vector<int64_t> size{std::atoll(arguments[k]), std::atoll(arguments[k + 1]),
                                    std::atoll(arguments[k + 2])};
    std::vector<double> numbers(size[0] * size[1] * size[2]);
    const at::Tensor x = at::from_blob(numbers.data(), size, at::kDouble);
    if (!in.read(reinterpret_cast<char*>(numbers.data()), bytes(x))) die("the input is too short");
    const at::Tensor y = model(x).contiguous();
    out.write(static_cast<const char*>(y.const_data_ptr()), bytes(y));
  }
  return 0;
}
