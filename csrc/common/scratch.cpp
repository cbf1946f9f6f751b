// Per-thread buffers that grow and stay, so that a step of decoding allocates nothing after the first.
#include <cstdlib>
#include <new>

#include "../cpu/parallel.h"

namespace octavo {
namespace {

constexpr int num_slots = 4;

struct Buffers {
  void* data[num_slots] = {};
  int64_t size[num_slots] = {};
  ~Buffers() {
    for (void* p : data) std::free(p);
  }
};

}  // namespace

void* scratch(int slot, int64_t bytes) {
  thread_local Buffers buffers;
  if (buffers.size[slot] < bytes) {
    std::free(buffers.data[slot]);
    buffers.size[slot] = 0;
    const size_t rounded = (static_cast<size_t>(bytes) + 4095) / 4096 * 4096;
    buffers.data[slot] = std::aligned_alloc(64, rounded);
    if (!buffers.data[slot]) throw std::bad_alloc();
    buffers.size[slot] = static_cast<int64_t>(rounded);
  }
  return buffers.data[slot];
}

}  // namespace octavo
