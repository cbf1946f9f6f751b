// The runtime below the kernels' host code: a device of 8.0 with few multiprocessors, and what launch.cpp and the files for 9.0 would
// have given. It launches nothing itself: runtime.h does.
#include <cuda_runtime.h>

#include <map>
#include <stdexcept>
#include <string>

#include "attention.h"
#include "launch.h"
#include "machine.h"
#include "memory.h"

namespace emulated {
namespace {
std::map<const void*, int> allowed;
std::map<std::string, uint64_t> written;
}  // namespace
void allow_writes(const char* operator_name, uint64_t positions) { written[operator_name] = positions; }
bool may_write(const char* operator_name, int position) {
  const auto found = written.find(operator_name);
  return found == written.end() || (found->second >> position & 1);
}
void allow_shared(const void* kernel, int bytes) {
  if (bytes < 0 || bytes > static_cast<int>(shared_limit)) fail("no block of 8.0 has %d bytes of shared memory", bytes);
  allowed[kernel] = bytes;
}
void check_shared(const void* kernel, size_t bytes) {
  const auto found = allowed.find(kernel);
  if (bytes > 48 * 1024 && (found == allowed.end() || static_cast<size_t>(found->second) < bytes))
    fail("a kernel is launched with %zu bytes of shared memory that it was not allowed to have", bytes);
}
}  // namespace emulated

namespace octavo::cuda {

cudaStream_t current_stream(int) { return nullptr; }

void check(cudaError_t error, const char* op) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": error " + std::to_string(static_cast<int>(error)));
}

// Few multiprocessors: lists of work are shared out and blocks take several tiles, at sizes that a test can have here.
const Device& device() {
  static const Device made = [] {
    Device d = {};
    d.num_sms = 6;
    d.capability = 80;
    d.shared_per_block = static_cast<int>(emulated::shared_limit);
    d.shared_per_sm = 164 << 10;
    d.l2_bytes = 40 << 20;
    return d;
  }();
  return made;
}

bool code_knows_clusters() { return false; }
bool dependent_launch() { return false; }
bool prefill_sm90_takes(const AttentionParams&) { return false; }
void launch_prefill_sm90(const AttentionParams&, cudaStream_t) { throw std::logic_error("emulated: not on 8.0"); }

}  // namespace octavo::cuda

extern "C" {
#define OCTAVO_SEEN __attribute__((visibility("default")))  // by on_cpu.py
OCTAVO_SEEN void emulated_seed(uint64_t value) { emulated::seed(value); }
OCTAVO_SEEN int emulated_failures() { return emulated::failures(); }
OCTAVO_SEEN void emulated_allow_writes(const char* operator_name, uint64_t positions) { emulated::allow_writes(operator_name, positions); }

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* pointer) {  // everything lies on the device, and on the host
  *found = {};
  found->type = cudaMemoryTypeHost;
  found->devicePointer = found->hostPointer = const_cast<void*>(pointer);
  return cudaSuccess;
}
}
