// Fibers, and whose turn it is. A warp goes on until all its lanes wait, or until chance takes the turn from it; then another warp of any
// living block is drawn. So a kernel meets orders that a GPU shows once in a million launches, and meets the same ones in every run.
#include "machine.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "memory.h"

// Saves the registers that a function must keep, and the stack pointer at *from; goes on where `to` was saved.
extern "C" void emulated_switch(void** from, void* to);
asm(R"(
.text
.globl emulated_switch
.hidden emulated_switch
.type emulated_switch, @function
emulated_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

namespace emulated {

Index thread_index, block_index, block_size, grid_size;
Here here;

namespace {

constexpr size_t stack_bytes = 128 << 10;  // the lowest page is no memory: what needs more ends there
constexpr uint64_t patience = 20'000'000;  // turns without progress: somebody waits for what nobody will write

enum class State { ready, at_meeting, at_barrier, over };

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  State state = State::over;
  int barrier = 0, thread = 0;
  Clock clock = {};
  Index index = {};
  unsigned meetings = 0;
};

struct Warp {
  int first = 0, lanes = 0, ready = 0, arrived = 0;
  const char* what = nullptr;        // the meeting that lanes wait at
  const char* last_to_come = nullptr;
  uint64_t words[2][warp_size * 8];  // of this meeting and of the one before, which slow lanes still read
};

struct Barrier {
  int arrived = 0, expected = 0;
};

struct Block {
  bool alive = false;
  int left = 0;
  Index index = {};
  std::vector<Fiber> fibers;
  Warp warps[max_threads / warp_size];  // not on the heap: ptx.h reads their words, and memory.cpp takes this library's data for constants
  size_t num_warps = 0;
  Barrier barriers[named_barriers];
};

Block blocks[living_blocks];
Block* block = nullptr;
Fiber* fiber = nullptr;
void* main_stack = nullptr;
void (*body)(void*) = nullptr;
void* body_call = nullptr;
const char* kernel = "?";
std::string failure;
int failed_launches = 0;
bool leave_warp = false;
uint64_t turns_left = 0;
uint64_t state = 1;
int until_chance = 1;
std::vector<char*> stacks;

void to_main() { emulated_switch(&fiber->stack_pointer, main_stack); }

void begin_fiber() {
  body(body_call);
  Warp& warp = block->warps[fiber->thread / warp_size];
  if (warp.arrived) fail("ends while other lanes of its warp wait in %s", warp.what);
  fiber->state = State::over;
  --warp.ready;
  --block->left;
  for (int i = 0; i < named_barriers; ++i)
    if (block->barriers[i].arrived && block->barriers[i].expected > block->left) fail("ends while others wait for it at barrier %d", i);
  turns_left = patience;
  to_main();
  abort();  // nobody resumes it
}

void start_block(int at, Index index, const Grid& grid) {
  const int threads = static_cast<int>(grid.block[0] * grid.block[1] * grid.block[2]);
  Block& b = blocks[at];
  b.alive = true;
  b.left = threads;
  b.index = index;
  b.fibers.assign(threads, {});
  b.num_warps = static_cast<size_t>((threads + warp_size - 1) / warp_size);
  for (Barrier& barrier : b.barriers) barrier = {};
  for (size_t w = 0; w < b.num_warps; ++w) {
    Warp& warp = b.warps[w];
    warp.first = static_cast<int>(w) * warp_size;
    warp.lanes = warp.ready = std::min(warp_size, threads - warp.first);
    warp.arrived = 0;
  }
  for (int t = 0; t < threads; ++t) {
    Fiber& f = b.fibers[t];
    const size_t place = static_cast<size_t>(at) * max_threads + t;
    while (stacks.size() <= place) {
      void* made = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (made == MAP_FAILED || mprotect(made, 4096, PROT_NONE)) throw std::runtime_error("emulated: no memory for stacks");
      stacks.push_back(static_cast<char*>(made));
    }
    f.stack = stacks[place];
    f.thread = t;
    f.state = State::ready;
    const unsigned u = static_cast<unsigned>(t);
    f.index = {u % grid.block[0], u / grid.block[0] % grid.block[1], u / (grid.block[0] * grid.block[1])};
    void** top = reinterpret_cast<void**>(f.stack + stack_bytes - 64);  // a multiple of 16: a call would have pushed 8 bytes more
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&begin_fiber);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    f.stack_pointer = top;
  }
  shared_begin(at, grid.shared);
}

void resume(int at, Fiber& f) {
  block = &blocks[at];
  fiber = &f;
  here = {at, f.thread, f.stack, stack_bytes};
  thread_index = f.index;
  block_index = block->index;
  emulated_switch(&main_stack, f.stack_pointer);
  here.block = -1;
}

// The lanes of a warp, from a random one on, until all of them wait.
void take_turns(int at, Warp& warp) {
  leave_warp = false;
  const int stay = random() % 8 ? 1 << 20 : static_cast<int>(random() % 64);
  for (int round = 0; round < stay && warp.ready && !leave_warp; ++round) {
    const int base = static_cast<int>(random() % warp.lanes);
    for (int i = 0; i < warp.lanes && failure.empty(); ++i) {
      Fiber& f = blocks[at].fibers[warp.first + (base + i) % warp.lanes];
      if (f.state != State::ready) continue;
      if (--turns_left == 0) {
        resume(at, f);
        if (failure.empty()) failure = place() + " goes round and round: what it waits for is not written";
      } else {
        resume(at, f);
      }
    }
    if (!failure.empty()) return;
  }
}

std::string deadlock() {
  for (int at = 0; at < living_blocks; ++at)
    for (const Fiber& f : blocks[at].fibers) {
      if (!blocks[at].alive || f.state == State::over) continue;
      block = &blocks[at], fiber = const_cast<Fiber*>(&f);
      const Warp& warp = block->warps[f.thread / warp_size];
      const Barrier& barrier = block->barriers[f.barrier];
      char text[200];
      if (f.state == State::at_meeting)
        snprintf(text, sizeof text, "waits for ever in %s: %d of %d lanes are there", warp.what, warp.arrived, warp.lanes);
      else
        snprintf(text, sizeof text, "waits for ever at barrier %d: %d of %d threads are there", f.barrier, barrier.arrived, barrier.expected);
      return place() + " " + text;
    }
  return "nobody can go on";
}

void release(Warp& warp) {
  warp.arrived = 0;
  for (int i = 0; i < warp.lanes; ++i) {
    Fiber& f = block->fibers[warp.first + i];
    if (f.state == State::at_meeting) f.state = State::ready, ++warp.ready;
  }
}

}  // namespace

void seed(uint64_t value) { state = value * 0x9e3779b97f4a7c15u | 1, until_chance = 1; }
uint64_t random() {  // xorshift64*
  state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
  return (state * 0x2545f4914f6cdd1du) >> 20;
}
bool chance() {
  if (--until_chance) return false;
  until_chance = 1 + static_cast<int>(random() % 127);
  return true;
}
int failures() { return failed_launches; }
int lane() { return fiber->thread % warp_size; }
void name_kernel(const char* name) { kernel = name; }
Clock clock_of(int thread) { return block->fibers[thread].clock; }

std::string place() {
  char text[200];
  snprintf(text, sizeof text, "kernel %s, block (%u, %u, %u), thread %d", kernel, block->index.x, block->index.y, block->index.z, fiber->thread);
  return text;
}

void fail(const char* format, ...) {
  char text[600];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (here.block < 0) throw std::runtime_error(std::string("emulated: ") + text);
  here.block = -1;  // what follows is not the kernel's
  failure = place() + " " + text;
  to_main();
  abort();  // a thread that has failed is not resumed
}

void pause() {
  leave_warp = true;
  to_main();
}

void barrier(int number, int threads) {
  if (number < 0 || number >= named_barriers) fail("meets at barrier %d", number);
  Barrier& b = block->barriers[number];
  const int expected = threads ? threads : static_cast<int>(block->fibers.size());
  if (b.arrived == 0) b.expected = expected;
  if (b.expected != expected) fail("expects %d threads at barrier %d, and others %d", expected, number, b.expected);
  if (expected > block->left) fail("waits at barrier %d for threads that have ended", number);
  Warp& own = block->warps[fiber->thread / warp_size];
  if (own.arrived) fail("comes to barrier %d while other lanes of its warp wait in %s", number, own.what);
  fiber->barrier = number;
  fiber->state = State::at_barrier;
  --own.ready;
  if (++b.arrived == expected) {
    b.arrived = 0;
    turns_left = patience;
    for (Fiber& f : block->fibers)
      if (f.state == State::at_barrier && f.barrier == number) {
        f.state = State::ready;
        number == 0 ? ++f.clock.block : ++f.clock.named;
        ++block->warps[f.thread / warp_size].ready;
      }
    leave_warp = true;
  }
  to_main();
}

const uint64_t* meet(const char* what, const uint64_t* own, int words, void (*together)(uint64_t*)) {
  Warp& warp = block->warps[fiber->thread / warp_size];
  if (warp.lanes != warp_size) fail("is in %s with a warp of %d lanes", what, warp.lanes);
  if (warp.arrived == 0) warp.what = what;
  if (strcmp(warp.what, what)) fail("is in %s while other lanes of its warp wait in %s", what, warp.what);
  uint64_t* const table = warp.words[fiber->meetings++ % 2];
  memcpy(table + fiber->thread % warp_size * words, own, words * sizeof(uint64_t));
  if (++warp.arrived == warp_size) {
    if (together) together(table);
    release(warp);
  } else {
    for (int i = 0; i < warp.lanes; ++i) {
      const Fiber& f = block->fibers[warp.first + i];
      if (f.state == State::at_barrier) fail("is in %s while thread %d of its warp waits at barrier %d", what, f.thread, f.barrier);
      if (f.state == State::over) fail("is in %s, but thread %d of its warp has ended", what, f.thread);
    }
    fiber->state = State::at_meeting;
    --warp.ready;
    to_main();
  }
  return table;
}

void meet_warp() {
  const uint64_t nothing = 0;
  meet("__syncwarp", &nothing, 1);
  ++fiber->clock.warp;
}

void run(const Grid& grid, void (*thread)(void*), void* call) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const uint64_t threads = uint64_t{1} * grid.block[0] * grid.block[1] * grid.block[2];
  const uint64_t count = uint64_t{1} * grid.grid[0] * grid.grid[1] * grid.grid[2];
  if (threads == 0 || threads > max_threads || grid.shared > shared_limit || count == 0)
    throw std::runtime_error("emulated: no GPU launches " + std::to_string(count) + " blocks of " + std::to_string(threads) + " threads with " +
                             std::to_string(grid.shared) + " bytes of shared memory");
  body = thread;
  body_call = call;
  block_size = {grid.block[0], grid.block[1], grid.block[2]};
  grid_size = {grid.grid[0], grid.grid[1], grid.grid[2]};
  failure.clear();
  turns_left = patience;
  uint64_t next = 0;
  std::vector<int> alive;
  while (next < count || !alive.empty()) {
    for (int at = 0; at < living_blocks && next < count; ++at) {
      if (blocks[at].alive) continue;
      start_block(at, {static_cast<unsigned>(next % grid.grid[0]), static_cast<unsigned>(next / grid.grid[0] % grid.grid[1]),
                       static_cast<unsigned>(next / grid.grid[0] / grid.grid[1])}, grid);
      alive.push_back(at);
      ++next;
    }
    const size_t from = random() % alive.size();
    bool ran = false;
    for (size_t i = 0; i < alive.size() && !ran; ++i) {
      const int at = alive[(from + i) % alive.size()];
      const size_t num_warps = blocks[at].num_warps, base = random() % num_warps;
      for (size_t w = 0; w < num_warps && !ran; ++w) {
        Warp& warp = blocks[at].warps[(base + w) % num_warps];
        if (warp.ready == 0) continue;
        take_turns(at, warp);
        ran = true;
      }
      if (blocks[at].left == 0) {
        here = {at, 0, nullptr, 0};  // for what shared_end has to say
        if (failure.empty()) shared_end(at, failure);
        here.block = -1;
        blocks[at].alive = false;
        std::erase(alive, at);
        break;
      }
    }
    if (!ran && failure.empty()) failure = deadlock();
    if (!failure.empty()) {
      for (Block& b : blocks) b.alive = false;
      ++failed_launches;
      here.block = -1;
      throw std::runtime_error("emulated: " + failure);
    }
  }
}

}  // namespace emulated
