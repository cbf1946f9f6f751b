#include "isa.h"

#include <atomic>
#include <stdexcept>

namespace octavo {
namespace {

bool supports(Isa wanted) {
  if (wanted == Isa::plain) return true;
#ifdef OCTAVO_X86
  __builtin_cpu_init();  // also asks the operating system whether it saves the wide registers
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (wanted == Isa::avx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

Isa best() { return supports(Isa::avx512) ? Isa::avx512 : supports(Isa::avx2) ? Isa::avx2 : Isa::plain; }

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> value{best()};
  return value;
}

constexpr const char* names[] = {"plain", "avx2", "avx512"};

}  // namespace

Isa isa() { return chosen().load(std::memory_order_relaxed); }

const char* isa_name() { return names[static_cast<int>(isa())]; }

void set_isa(std::string_view name) {
  if (name == "auto") {
    chosen() = best();
    return;
  }
  for (Isa candidate : {Isa::plain, Isa::avx2, Isa::avx512}) {
    if (name != names[static_cast<int>(candidate)]) continue;
    if (!supports(candidate)) throw std::runtime_error("set_isa: this CPU or build has no " + std::string(name));
    chosen() = candidate;
    return;
  }
  throw std::runtime_error("set_isa: unknown instruction set '" + std::string(name) + "', expected plain, avx2, avx512 or auto");
}

}  // namespace octavo
