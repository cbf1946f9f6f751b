// Which memory a thread of the machine may touch. The sources are compiled with calls before every load and store (those that a compiler
// makes for ThreadSanitizer); memory.cpp answers them. Owns the shared memory of the living blocks and the list of tensors that the
// operator was given. A thread may touch its own stack, the tensors, and its block's shared memory.
//
// Invariant: a read of shared memory sees what a thread has written, or fails: never what an earlier block has left, never a word
// that an asynchronous copy may still change, and never one that another thread wrote with no barrier between the two.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace emulated {

constexpr int living_blocks = 4;                 // at most
constexpr size_t shared_room = 256 << 10;        // of a block; shared addresses are offsets
constexpr size_t shared_limit = 163 << 10;       // what a block of 8.0 can have

// --- shared memory ------------------------------------------------------------------------------------------------------------------
void shared_begin(int block, size_t dynamic_bytes);
void shared_end(int block, std::string& failure);  // a copy that nobody has waited for is one
unsigned char* shared_dynamic();
void* shared_static(const char* site, size_t bytes, size_t alignment);  // the same for all threads of a block that name the same site
uint32_t shared_offset(const void* p);                                   // __cvta_generic_to_shared
unsigned char* shared_at(uint32_t offset, size_t bytes, size_t alignment);

// --- what a thread does ---------------------------------------------------------------------------------------------------------------
enum class Access { read, write, atomic };
void touch(const void* p, size_t bytes, Access access, size_t alignment);
void copy_begin(uint32_t to, const void* from, int bytes, int wanted);  // cp.async
void copies_commit();
void copies_wait(int pending);  // the thread's latest groups that may stay unfinished

// --- tensors ------------------------------------------------------------------------------------------------------------------------
struct Given {  // rows of `row` bytes, `pitch` bytes apart
  const char* data;
  int64_t bytes, row, pitch;
  const char* operator_name;
  int position;
  bool writable;  // as the operator's schema says
};
void give(const Given& tensor);
void take_back();
void allow_writes(const char* operator_name, uint64_t positions);  // bit i: argument i
bool may_write(const char* operator_name, int position);

}  // namespace emulated
