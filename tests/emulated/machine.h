// A machine that runs CUDA kernels on one core: the threads of a block are fibers, and a few blocks are alive at a time. Owns whose turn
// it is, barriers, the meetings of a warp's lanes, and what the current fiber can see of itself. It does not know what an instruction
// computes (intrinsics.h, ptx.h) nor which memory a thread may touch (memory.h).
//
// Invariant: everything is a function of the seed. What goes wrong in a kernel ends the launch with one sentence that names the kernel,
// the block and the thread; nothing that the kernel was about to do is done.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace emulated {

constexpr int warp_size = 32;
constexpr int max_threads = 1024;
constexpr int named_barriers = 16;

struct Index {
  unsigned x, y, z;
};
// Of the fiber that runs. Plain words, so that a kernel may read them as often as it likes.
extern Index thread_index, block_index, block_size, grid_size;

// What two threads of a block need to know to say which of them was first: how often each has passed a barrier.
struct Clock {
  uint16_t block, named;
  uint32_t warp;
};

struct Here {  // the fiber that runs, as memory.cpp needs it; block is -1 outside of a kernel
  int block = -1;  // place among the living
  int thread = 0;
  const char* stack = nullptr;
  size_t stack_bytes = 0;
};
extern Here here;
Clock clock_of(int thread);  // of this block

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string place();  // "kernel norm_kernel, block (3, 0, 0), thread 17"
void name_kernel(const char* name);

// --- meetings -----------------------------------------------------------------------------------------------------------------------
void pause();                            // somebody else may go on first
void barrier(int number, int threads);   // bar.sync; 0 threads means the whole block
// All lanes bring `words` words and see those of all: lane l's words are at result[l * words] until this lane's next meeting but one.
// `together` is what the last one to come does to the words of all.
const uint64_t* meet(const char* what, const uint64_t* own, int words, void (*together)(uint64_t*) = nullptr);
void meet_warp();                        // __syncwarp: also orders the memory of the lanes
int lane();

// --- launching ----------------------------------------------------------------------------------------------------------------------
struct Grid {
  unsigned grid[3], block[3];
  size_t shared;
};
void run(const Grid& grid, void (*thread)(void*), void* call);  // throws what went wrong
int failures();  // launches that went wrong so far
void seed(uint64_t value);
uint64_t random();
bool chance();  // one in 64, and cheap

}  // namespace emulated
