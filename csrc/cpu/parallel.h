// Loops over the threads of torch's own pool (so that torch.set_num_threads counts for both), and buffers that outlive a
// call. The functions behind it live in bindings.cpp and common/scratch.cpp. Invariant: how many threads run, and which of
// them takes what, never changes a result; kernels must be written so.
#pragma once

#include <atomic>
#include <cstdint>

namespace octavo {

int num_threads();

// Calls body(begin, end, context) on disjoint ranges that cover [0, count); ranges are at least `grain` long.
void run_ranges(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

// At least `bytes` of 64-byte aligned memory, kept by this thread for its next call with the same `slot`; contents undefined.
void* scratch(int slot, int64_t bytes);

// body(begin, end): contiguous ranges, one per thread. For work of even cost.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  run_ranges(
      count, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// body(task) for every task in [0, count), handed out in ascending order one at a time. For work of uneven cost.
template <class Body>
void parallel_tasks(int64_t count, const Body& body) {
  std::atomic<int64_t> next{0};
  const int64_t threads = num_threads();
  parallel_for(count < threads ? count : threads, 1, [&](int64_t, int64_t) {
    for (int64_t task = next.fetch_add(1); task < count; task = next.fetch_add(1)) body(task);
  });
}

}  // namespace octavo
