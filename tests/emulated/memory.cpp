// Every load and store of a kernel passes through touch(). Each four bytes of shared memory have a Cell that says who wrote them last, who
// has read them since, and whether an asynchronous copy is on its way to them.
#include "memory.h"

#include <link.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "machine.h"

namespace emulated {
namespace {

constexpr size_t first_offset = 1024, gap = 256;
constexpr uint16_t nobody = 0xffff, several = 0xfffe, several_warps = 0xfffd;

struct Cell {
  Clock written_at, read_at;
  uint16_t writer, reader;  // a thread, nobody, or for readers several lanes of a warp (reader_warp), or several warps
  uint8_t reader_warp;
  uint8_t known;    // one bit a byte: written
  uint8_t last;     // one bit a byte: by the last writer
  bool inside : 1, coming : 1, atomic : 1;
};

struct Copy {
  uint32_t to;
  const char* from;
  int bytes;
  bool landed;
};

struct Thread {  // its copies: those of the open group, and the groups that are not waited for
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
};

struct Static {
  const char* site;
  uint32_t offset;
};

struct Shared {
  alignas(1024) unsigned char bytes[shared_room];
  Cell cells[shared_room / 4];
  size_t used = 0, dynamic = 0;
  bool by_flags = false;  // its threads tell each other by flags: the order is not known from barriers alone
  std::vector<Static> statics;
  Thread threads[max_threads];
};

Shared shared[living_blocks];
std::vector<Given> given;
const char *own_begin = nullptr, *own_end = nullptr;  // this library: constants

Shared& own() { return shared[here.block]; }

void open(Shared& s, size_t from, size_t bytes) {
  if (from + bytes + gap > shared_room) fail("has no room for its shared memory");
  for (size_t i = from / 4; i < (from + bytes + 3) / 4; ++i) {
    s.cells[i] = {};
    s.cells[i].writer = s.cells[i].reader = nobody;
    s.cells[i].inside = true;
  }
  memset(s.bytes + from, 0xff, bytes);  // a NaN of every type
  s.used = from + bytes;
}

void land(Shared& s, Copy& copy) {
  if (copy.landed) return;
  copy.landed = true;
  memcpy(s.bytes + copy.to, copy.from, copy.bytes);
  memset(s.bytes + copy.to + copy.bytes, 0, 16 - copy.bytes);
}

// Whether what another thread did at `then` is known to be before what this one does now.
bool ordered(int other, Clock then, Clock now) {
  if (other == here.thread || now.block > then.block) return true;
  if (other / warp_size == here.thread / warp_size && now.warp > then.warp) return true;
  return now.named > then.named && clock_of(other).named > then.named;
}

bool readers_ordered(const Cell& c, Clock now) {
  if (c.reader == nobody) return true;
  if (c.reader < max_threads) return ordered(c.reader, c.read_at, now);
  if (now.block > c.read_at.block || now.named > c.read_at.named) return true;
  return c.reader == several && c.reader_warp == here.thread / warp_size && now.warp > c.read_at.warp;
}

void note_reader(Cell& c, Clock now) {
  const uint8_t warp = static_cast<uint8_t>(here.thread / warp_size);
  if (c.reader == here.thread || readers_ordered(c, now)) {
    c.reader = static_cast<uint16_t>(here.thread);
  } else {
    c.reader = c.reader_warp == warp && c.reader != several_warps ? several : several_warps;
  }
  c.reader_warp = warp;
  c.read_at = now;
}

void touch_cell(Shared& s, Cell& c, uint8_t bytes, Access access, size_t offset, Clock now) {
  const char* const does = access == Access::read ? "reads" : access == Access::write ? "writes" : "changes";
  const ssize_t at = static_cast<ssize_t>(offset - first_offset);
  if (!c.inside) fail("%s shared memory at %zd, outside of what it has (%zu bytes)", does, at, s.dynamic);
  if (c.coming) fail("%s shared memory at %zd, to which an asynchronous copy is under way", does, at);
  if (access != Access::write && (c.known & bytes) != bytes) fail("%s shared memory at %zd, which no thread has written", does, at);
  const bool atomic = access == Access::atomic;
  if (!s.by_flags) {
    if (c.writer != nobody && (c.last & bytes) && !(atomic && c.atomic) && !ordered(c.writer, c.written_at, now))
      fail("%s shared memory at %zd, which thread %d has written with no barrier between", does, at, c.writer);
    if (access == Access::write && (c.last & bytes || c.writer == nobody) && !readers_ordered(c, now))
      fail("writes shared memory at %zd, which others have read with no barrier between (last by warp %d)", at, c.reader_warp);
  }
  if (access == Access::read) {
    note_reader(c, now);
    return;
  }
  c.known |= bytes;
  c.last = c.writer == here.thread && ordered(c.writer, c.written_at, now) ? c.last | bytes : bytes;
  c.writer = static_cast<uint16_t>(here.thread);
  c.written_at = now;
  c.atomic = atomic;
}

void touch_shared(Shared& s, size_t offset, size_t bytes, Access access) {
  const Clock now = clock_of(here.thread);
  for (size_t at = offset; at < offset + bytes;) {
    const size_t end = at / 4 * 4 + 4 < offset + bytes ? at / 4 * 4 + 4 : offset + bytes;
    const uint8_t mask = static_cast<uint8_t>(((1 << (end - at)) - 1) << at % 4);
    touch_cell(s, s.cells[at / 4], mask, access, at, now);
    at = end;
  }
}

const Given* latest = nullptr;

bool inside(const Given& g, const char* p, size_t bytes) {
  const int64_t at = p - g.data;
  return at >= 0 && at + static_cast<int64_t>(bytes) <= g.bytes && at % g.pitch + static_cast<int64_t>(bytes) <= g.row;
}

bool in_tensor(const char* p, size_t bytes, bool writes) {
  if (latest && (latest->writable || !writes) && inside(*latest, p, bytes)) return true;
  const Given* only_read = nullptr;  // unless the same memory was also given to be written
  for (const Given& g : given)
    if (inside(g, p, bytes)) {
      latest = &g;
      if (g.writable || !writes) return true;
      only_read = &g;
    }
  if (only_read) fail("writes argument %d of %s, which the operator's schema does not say", only_read->position, only_read->operator_name);
  return false;
}

[[noreturn]] void out_of_bounds(const char* p, size_t bytes, const char* does) {
  const Given* nearest = nullptr;
  int64_t best = INT64_MAX;
  for (const Given& g : given) {
    const int64_t distance = p < g.data ? g.data - p : p - g.data - g.bytes;
    if (distance < best) best = distance, nearest = &g;
  }
  if (!nearest) fail("%s %zu bytes at %p: the operator was given no tensor", does, bytes, static_cast<const void*>(p));
  const long long at = p - nearest->data;
  if (at >= 0 && at < nearest->bytes)
    fail("%s %zu bytes at byte %lld of argument %d of %s: beyond its row (rows of %lld bytes, %lld apart)", does, bytes, at, nearest->position,
         nearest->operator_name, static_cast<long long>(nearest->row), static_cast<long long>(nearest->pitch));
  fail("%s %zu bytes at byte %lld of argument %d of %s, which has %lld bytes", does, bytes, at, nearest->position, nearest->operator_name,
       static_cast<long long>(nearest->bytes));
}

int find_library(dl_phdr_info* info, size_t, void*) {
  const auto self = reinterpret_cast<uintptr_t>(&find_library);
  uintptr_t low = UINTPTR_MAX, high = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
    low = std::min(low, info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
    high = std::max(high, info->dlpi_addr + info->dlpi_phdr[i].p_vaddr + info->dlpi_phdr[i].p_memsz);
  }
  if (self < low || self >= high) return 0;
  own_begin = reinterpret_cast<const char*>(low), own_end = reinterpret_cast<const char*>(high);
  return 1;
}

bool shared_address(const char* p) {
  const char* const begin = reinterpret_cast<const char*>(own().bytes);
  return p >= begin && p < begin + shared_room;
}

}  // namespace

void shared_begin(int block, size_t dynamic_bytes) {
  Shared& s = shared[block];
  for (size_t i = 0; i < (s.used + gap + 16) / 4; ++i) s.cells[i].inside = false;
  s.statics.clear();
  s.by_flags = false;
  s.dynamic = dynamic_bytes;
  open(s, first_offset, dynamic_bytes);
  for (Thread& t : s.threads) t.open.clear(), t.groups.clear();
}

void shared_end(int block, std::string& failure) {
  const Shared& s = shared[block];
  for (int t = 0; t < max_threads; ++t) {
    bool waiting = !s.threads[t].open.empty();
    for (const auto& group : s.threads[t].groups) waiting |= !group.empty();
    if (waiting) failure = place() + " has ended, but an asynchronous copy of thread " + std::to_string(t) + " was never waited for";
  }
}

unsigned char* shared_dynamic() { return own().bytes + first_offset; }

void* shared_static(const char* site, size_t bytes, size_t alignment) {
  Shared& s = own();
  for (const Static& known : s.statics)
    if (known.site == site) return s.bytes + known.offset;
  const size_t offset = (s.used + gap + alignment - 1) / alignment * alignment;
  open(s, offset, bytes);
  if (s.used > shared_limit + 16 * gap) fail("has more shared memory than a block can have: %zu bytes", s.used);
  s.statics.push_back({site, static_cast<uint32_t>(offset)});
  return s.bytes + offset;
}

uint32_t shared_offset(const void* p) {
  if (!shared_address(static_cast<const char*>(p))) fail("takes the shared address of what is not in its shared memory");
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - own().bytes);
}

unsigned char* shared_at(uint32_t offset, size_t bytes, size_t alignment) {
  if (offset % alignment) fail("takes %zu bytes of shared memory at %u, which is no multiple of %zu", bytes, offset, alignment);
  if (offset + bytes > shared_room) fail("takes shared memory at %u, outside of what it has", offset);
  return own().bytes + offset;
}

void touch(const void* address, size_t bytes, Access access, size_t alignment) {
  const char* const p = static_cast<const char*>(address);
  if (here.block < 0 || static_cast<size_t>(p - here.stack) < here.stack_bytes) return;
  const char* const does = access == Access::read ? "reads" : access == Access::write ? "writes" : "changes";
  if (shared_address(p)) {
    if (reinterpret_cast<uintptr_t>(p) % alignment) fail("%s %zu bytes of shared memory at an odd address", does, bytes);
    if (chance()) pause();
    touch_shared(own(), reinterpret_cast<const unsigned char*>(p) - own().bytes, bytes, access);
    return;
  }
  if (in_tensor(p, bytes, access != Access::read)) {
    if (reinterpret_cast<uintptr_t>(p) % alignment) fail("%s %zu bytes of a tensor at an odd address", does, bytes);
    return;
  }
  if (!own_begin) dl_iterate_phdr(&find_library, nullptr);
  if (p >= own_begin && p < own_end) {
    for (const Shared& s : shared) {
      const char* const begin = reinterpret_cast<const char*>(s.bytes);
      if (p >= begin && p < begin + shared_room) fail("%s shared memory of another block", does);
    }
    return;
  }
  out_of_bounds(p, bytes, does);
}

void copy_begin(uint32_t to, const void* from, int bytes, int wanted) {
  if (bytes != 16) fail("copies %d bytes asynchronously; the emulation knows 16", bytes);
  if (wanted < 0 || wanted > bytes) fail("copies %d of %d bytes", wanted, bytes);
  unsigned char* const target = shared_at(to, 16, 16);
  Shared& s = own();
  if (wanted) {
    if (reinterpret_cast<uintptr_t>(from) % 16) fail("copies from an address that is no multiple of 16");
    if (!in_tensor(static_cast<const char*>(from), wanted, false)) out_of_bounds(static_cast<const char*>(from), wanted, "copies");
  }
  touch_shared(s, to, 16, Access::write);
  memset(target, 0xff, 16);
  Copy copy = {to, static_cast<const char*>(from), wanted, false};
  if (random() % 2) land(s, copy);
  for (int i = 0; i < 4; ++i) s.cells[to / 4 + i].coming = true;
  s.threads[here.thread].open.push_back(copy);
}

void copies_commit() {
  Thread& t = own().threads[here.thread];
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}

void copies_wait(int pending) {
  Shared& s = own();
  Thread& t = s.threads[here.thread];
  const Clock now = clock_of(here.thread);
  const int done = static_cast<int>(t.groups.size()) - pending;
  if (done <= 0) return;
  for (int i = 0; i < done; ++i)
    for (Copy& copy : t.groups[i]) {
      land(s, copy);
      for (int c = 0; c < 4; ++c) {
        Cell& cell = s.cells[copy.to / 4 + c];
        cell.coming = false;
        cell.written_at = now;
      }
    }
  t.groups.erase(t.groups.begin(), t.groups.begin() + done);
}

void give(const Given& tensor) { given.push_back(tensor); }
void take_back() { given.clear(), latest = nullptr; }

// What the compiler calls before loads and stores. Reading a volatile is how a thread waits for another: somebody else goes on first.
namespace {
void touch_volatile(const void* p, size_t bytes, Access access, size_t alignment) {
  if (here.block < 0) return;
  if (shared_address(static_cast<const char*>(p))) own().by_flags = true;
  pause();
  touch(p, bytes, access, alignment);
}
}  // namespace
}  // namespace emulated

using emulated::Access;
using emulated::touch;
static inline void touch_quickly(const void* p, size_t bytes, Access access, size_t alignment) {  // most are of the stack
  if (static_cast<size_t>(static_cast<const char*>(p) - emulated::here.stack) >= emulated::here.stack_bytes) touch(p, bytes, access, alignment);
}
#define OCTAVO_CALLS(n)                                                                                  \
  void __tsan_read##n(void* p) { touch_quickly(p, n, Access::read, n); }                                 \
  void __tsan_unaligned_read##n(void* p) { touch_quickly(p, n, Access::read, 1); }                       \
  void __tsan_write##n(void* p) { touch_quickly(p, n, Access::write, n); }                               \
  void __tsan_unaligned_write##n(void* p) { touch_quickly(p, n, Access::write, 1); }                     \
  void __tsan_volatile_read##n(void* p) { emulated::touch_volatile(p, n, Access::read, n); }             \
  void __tsan_unaligned_volatile_read##n(void* p) { emulated::touch_volatile(p, n, Access::read, 1); }   \
  void __tsan_volatile_write##n(void* p) { emulated::touch_volatile(p, n, Access::write, n); }           \
  void __tsan_unaligned_volatile_write##n(void* p) { emulated::touch_volatile(p, n, Access::write, 1); }
extern "C" {
OCTAVO_CALLS(1)
OCTAVO_CALLS(2)
OCTAVO_CALLS(4)
OCTAVO_CALLS(8)
OCTAVO_CALLS(16)
void __tsan_read_range(void* p, size_t bytes) { touch(p, bytes, Access::read, 1); }
void __tsan_write_range(void* p, size_t bytes) { touch(p, bytes, Access::write, 1); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_init() {}
}
