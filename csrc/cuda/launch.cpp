// The parts of launch.h that need no device compiler.
#include "launch.h"

#include <dlfcn.h>

#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>

namespace octavo::cuda {
namespace {

constexpr int max_devices = 64;

// torch's own function, looked up by name: linking it would tie this library to a torch with CUDA, and a weak symbol stays null when
// libtorch_cuda is loaded later.
using StreamOf = int32_t (*)(int32_t device, void** stream);

StreamOf stream_of() {
  static const StreamOf found = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    if (!symbol) symbol = dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
    if (!symbol) throw std::runtime_error("octavo: this torch has no CUDA (aoti_torch_get_current_cuda_stream was not found)");
    return reinterpret_cast<StreamOf>(symbol);
  }();
  return found;
}

int current_device() {
  int index = 0;
  check(cudaGetDevice(&index), "octavo");
  return index;
}

}  // namespace

void check(cudaError_t error, const char* op) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  if (stream_of()(device < 0 ? current_device() : device, &stream)) throw std::runtime_error("octavo: torch has no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

const Device& device() {
  static Device devices[max_devices];
  static std::once_flag read[max_devices];
  const int index = current_device();
  if (index >= max_devices) throw std::runtime_error("octavo: CUDA device " + std::to_string(index) + " is beyond the 64 that are supported");
  std::call_once(read[index], [index] {
    const auto attribute = [index](cudaDeviceAttr name) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, name, index), "octavo");
      return value;
    };
    Device& d = devices[index];
    d.num_sms = attribute(cudaDevAttrMultiProcessorCount);
    d.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
    // Such code would neither wait for the kernel before it nor know which thread block of a cluster it is.
    if (d.capability >= 90 && !code_knows_clusters()) d.capability = 89;
    d.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    d.shared_per_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    d.l2_bytes = attribute(cudaDevAttrL2CacheSize);
  });
  return devices[index];
}

bool dependent_launch() { return device().capability >= 90; }

}  // namespace octavo::cuda
