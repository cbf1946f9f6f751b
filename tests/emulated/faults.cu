// Kernels with one fault each; test_machine.py sees every one named.
#include <stdexcept>
#include <string>

#include "launch.h"

namespace {

constexpr int threads = 64;

__global__ void sound_kernel(int* out) {  // nothing is wrong here
  __shared__ int place[threads];
  __shared__ int total;
  const int thread = threadIdx.x;
  place[thread] = thread;
  if (thread == 0) total = 0;
  __syncthreads();
  atomicAdd(&total, place[threads - 1 - thread]);
  __syncthreads();
  int sum = thread;
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  out[thread] = total + sum;
}

__global__ void beyond_the_tensor_kernel(int* out) { out[threadIdx.x + 1] = 1; }

__global__ void only_read_kernel(int* out) { out[threadIdx.x] = 1; }

__global__ void beyond_shared_kernel(int* out) {
  __shared__ int place[threads];
  place[threadIdx.x + 1] = 1;
  out[threadIdx.x] = 1;
}

__global__ void beyond_dynamic_kernel(int* out) {
  extern __shared__ int dynamic[];
  dynamic[threadIdx.x] = 1;  // is launched with room for half of them
  out[threadIdx.x] = 1;
}

__global__ void not_written_kernel(int* out) {
  __shared__ int place[threads];
  if (threadIdx.x > 0) place[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = place[threadIdx.x];
}

__global__ void no_barrier_kernel(int* out) {
  __shared__ int place[threads];
  place[threadIdx.x] = 1;
  out[threadIdx.x] = place[threads - 1 - threadIdx.x];
}

__global__ void read_then_written_kernel(int* out) {
  __shared__ int place[threads];
  place[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = place[threads - 1 - threadIdx.x];
  place[threadIdx.x] = 2;
}

__global__ void diverged_kernel(int* out) {
  int sum = 1;
  if (threadIdx.x % 32 < 16) sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  __syncwarp();
  out[threadIdx.x] = sum;
}

__global__ void barrier_of_some_kernel(int* out) {
  if (threadIdx.x < 32) __syncthreads();
  else asm volatile("bar.sync 1, %0;" ::"n"(threads) : "memory");
  out[threadIdx.x] = 1;
}

__global__ void left_early_kernel(int* out) {
  if (threadIdx.x == 40) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void waits_for_nobody_kernel(int* out) {
  __shared__ int flag;
  if (threadIdx.x == 0) flag = 0;
  __syncthreads();
  while (*const_cast<volatile int*>(&flag) == 0) {}
  out[threadIdx.x] = 1;
}

__device__ void fetch(int* to, const int* from) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(16) : "memory");
  asm volatile("cp.async.commit_group;" ::: "memory");
}

__global__ void not_awaited_kernel(int* out) {
  __shared__ __align__(16) int place[4 * threads];
  fetch(place + 4 * threadIdx.x, out);
  out[threadIdx.x] = place[4 * threadIdx.x];
}

__global__ void never_awaited_kernel(int* out) {
  __shared__ __align__(16) int place[4 * threads];
  fetch(place + 4 * threadIdx.x, out);
}

__global__ void awaited_by_itself_kernel(int* out) {  // a thread's wait says nothing of the copies of others
  __shared__ __align__(16) int place[4 * threads];
  fetch(place + 4 * threadIdx.x, out);
  asm volatile("cp.async.wait_group %0;" ::"n"(0) : "memory");
  out[threadIdx.x] = place[4 * (threads - 1 - threadIdx.x)];
}

__global__ void odd_address_kernel(int* out) {
  const uint32_t word = 0;
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(1026), "r"(word) : "memory");
  out[threadIdx.x] = 1;
}

std::string words;

}  // namespace

#define FAULT(name) \
  if (asked == #name) octavo::cuda::launch(#name, name##_kernel, dim3(1), dim3(threads), sizeof(int) * threads / 2, nullptr, out)

// What a kernel's launch said, "" when nothing is wrong. out [threads] is the only tensor.
extern "C" __attribute__((visibility("default"))) const char* fault(const char* name, int* out) {
  const std::string asked = name;
  constexpr int64_t bytes = sizeof(int) * threads;
  emulated::give({reinterpret_cast<const char*>(out), bytes, bytes, bytes, "fault", 0, asked != "only_read"});
  words = "";
  try {
    FAULT(sound);
    FAULT(beyond_the_tensor);
    FAULT(only_read);
    FAULT(beyond_shared);
    FAULT(beyond_dynamic);
    FAULT(not_written);
    FAULT(no_barrier);
    FAULT(read_then_written);
    FAULT(diverged);
    FAULT(barrier_of_some);
    FAULT(left_early);
    FAULT(waits_for_nobody);
    FAULT(not_awaited);
    FAULT(never_awaited);
    FAULT(awaited_by_itself);
    FAULT(odd_address);
  } catch (const std::exception& error) {
    words = error.what();
  }
  emulated::take_back();
  return words.c_str();
}
