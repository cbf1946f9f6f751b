// Which instruction set the CPU kernels use. The best one of this machine is chosen once, from cpuid alone; tests may
// force another. Every kernel file is compiled once per instruction set, in a namespace of that name.
#pragma once

#include <string>
#include <string_view>

namespace octavo {

enum class Isa { plain, avx2, avx512 };

Isa isa();
const char* isa_name();

// Forces "plain", "avx2", "avx512", or "auto" (the best one again); an error for one that this CPU or build lacks.
void set_isa(std::string_view name);

}  // namespace octavo
