// Instructions that only Hopper (sm_90a) has, one function each: mbarriers, bulk tensor copies, wgmma, named barriers, register
// budgets, clusters of thread blocks. It knows no algorithm and no kernel. Everything here is PTX of the "sm_90a" target, so it is only
// called from code between `#ifdef OCTAVO_HOPPER`. Sources: PTX ISA, chapters "mbarrier", "cp.async.bulk.tensor" and "Asynchronous
// warpgroup level matrix".
//
// Layout of an operand in shared memory, everywhere in this engine: rows of 64 elements of 16 bits (128 bytes), 16-byte chunk c of row r
// at chunk c ^ (r % 8) (the 128-byte swizzle), the first row at a multiple of 1024 bytes. A wider matrix is several such panels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define OCTAVO_HOPPER 1
#endif

#ifdef OCTAVO_HOPPER
namespace octavo::cuda::hopper {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// --- mbarriers: phase p of a barrier is over when its parity is p & 1; a new barrier's "phase -1", of parity 1, is over -----------
__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// New barriers become visible to the copy engine; a barrier of the thread block has to follow for the other threads.
__device__ __forceinline__ void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and lets the phase wait for `bytes` more bytes of bulk copies.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits until the phase of this parity is over. order: "" for what the thread block itself and its bulk copies wrote.
#define OCTAVO_WAIT(order)                                                   \
  asm volatile(                                                              \
      "{\n"                                                                  \
      ".reg .pred over;\n"                                                   \
      "again:\n"                                                             \
      "mbarrier.try_wait.parity" order ".shared::cta.b64 over, [%0], %1;\n"  \
      "@over bra done;\n"                                                    \
      "bra again;\n"                                                         \
      "done:\n"                                                              \
      "}\n" ::"r"(barrier),                                                  \
      "r"(parity)                                                            \
      : "memory")
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) { OCTAVO_WAIT(""); }

// --- clusters: thread blocks that run side by side and can write each other's shared memory -------------------------------------------
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// Where `address` of this thread block's shared memory is in that of thread block `rank` of the cluster.
__device__ __forceinline__ uint32_t at_rank(uint32_t address, int rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
// Stores that do not wait: they count as bytes at the barrier, which lies in the same thread block's memory as the target.
__device__ __forceinline__ void send(uint32_t target, float a, float b, uint32_t barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(target), "f"(a), "f"(b), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void send(uint32_t target, float a, float b, float c, float d, uint32_t barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(target), "f"(a), "f"(b),
               "f"(c), "f"(d), "r"(barrier)
               : "memory");
}
// barrier_wait() for what other thread blocks of the cluster have sent.
__device__ __forceinline__ void barrier_wait_cluster(uint32_t barrier, uint32_t parity) { OCTAVO_WAIT(".acquire.cluster"); }
#undef OCTAVO_WAIT

// --- copies ----------------------------------------------------------------------------------------------------------------------
// One box of a tensor map to shared memory; what lies outside of the tensor arrives as zeros and counts as bytes.
__device__ __forceinline__ void copy_box(uint32_t target, const void* map, int x0, int x1, int x2, int x3, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(target),
      "l"(map), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(barrier)
      : "memory");
}
// The same with a cache policy of createpolicy.
__device__ __forceinline__ void copy_box(uint32_t target, const void* map, int x0, int x1, int x2, int x3, uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(
          target),
      "l"(map), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(barrier), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void prefetch_map(const void* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
// 16 bytes, or zeros. `source` must be a valid address in both cases.
__device__ __forceinline__ void copy_chunk(uint32_t target, const void* source, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_chunks_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// What this thread wrote to shared memory itself becomes visible to wgmma and to bulk copies.
__device__ __forceinline__ void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- warpgroups ------------------------------------------------------------------------------------------------------------------
__device__ __forceinline__ void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ __forceinline__ void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
template <int registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

// --- wgmma -----------------------------------------------------------------------------------------------------------------------
// Order: settle() on all registers that a product reads or adds to, products, products_issued(); later products_wait<k>() until all but
// the last k groups are done, then settle() on their results. settle() holds the compiler, not the hardware.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_issued() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
template <int n>
__device__ __forceinline__ void settle(float (&x)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int n>
__device__ __forceinline__ void settle(uint32_t (&x)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

// Descriptor of an operand with the 128-byte swizzle. Rows along the product's outer index and elements along its inner one ("K-major"):
// 1024 bytes between groups of 8 rows, `panel` is not read. Rows along the inner index ("MN-major"): 1024 bytes between groups of 8
// inner indices, `panel` bytes between groups of 64 outer ones. A step along the row adds bytes to the address; rows step by eights.
__device__ __forceinline__ uint64_t operand(uint32_t address, uint32_t panel) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>((panel & 0x3ffff) >> 4) << 16 |
         static_cast<uint64_t>(1024 >> 4) << 32 | static_cast<uint64_t>(1) << 62;
}

#define OCTAVO_D8(b) "+f"(d[b]), "+f"(d[b + 1]), "+f"(d[b + 2]), "+f"(d[b + 3]), "+f"(d[b + 4]), "+f"(d[b + 5]), "+f"(d[b + 6]), "+f"(d[b + 7])
#define OCTAVO_D16(b) OCTAVO_D8(b), OCTAVO_D8(b + 8)
#define OCTAVO_D32(b) OCTAVO_D8(b), OCTAVO_D8(b + 8), OCTAVO_D8(b + 16), OCTAVO_D8(b + 24)
#define OCTAVO_D64(b) OCTAVO_D32(b), OCTAVO_D32(b + 32)
#define OCTAVO_D128(b) OCTAVO_D64(b), OCTAVO_D64(b + 64)
#define OCTAVO_N16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define OCTAVO_N32                                                                                                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, " \
  "%26, %27, %28, %29, %30, %31"
#define OCTAVO_N64                                                                                                          \
  OCTAVO_N32                                                                                                                \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, " \
  "%56, %57, %58, %59, %60, %61, %62, %63"
#define OCTAVO_N128                                                                                                              \
  OCTAVO_N64                                                                                                                     \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, "   \
  "%88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "     \
  "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// d = a b (+ d): a from shared memory, K-major; b from shared memory, K-major.
#define OCTAVO_SS(n, type, names, regs, a_at, b_at, p_at)                                                                      \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" p_at ", 0;\nwgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" \
               names "}, %" a_at ", %" b_at ", p, 1, 1, 0, 0;\n}\n"                                                            \
               : regs                                                                                                          \
               : "l"(a), "l"(b), "r"(accumulate))
// d += a b: a in registers, b from shared memory, MN-major.
#define OCTAVO_RS(n, type, names, regs, a0, a1, a2, a3, b_at, p_at)                                                              \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" p_at ", 0;\nwgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {"   \
               names "}, {%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" b_at ", p, 1, 1, 1;\n}\n"                                     \
               : regs                                                                                                            \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1))

// Accumulators of a 64 x n product: thread 4 g + t of warp w has rows 16 w + g and 16 w + g + 8, columns 8 j + 2 t and the next;
// d[4 j], d[4 j + 1] are the upper row's, d[4 j + 2], d[4 j + 3] the lower row's.
template <bool bf16, int n>
__device__ __forceinline__ void multiply(float (&d)[n / 2], uint64_t a, uint64_t b, int accumulate) {
  static_assert(n == 32 || n == 64 || n == 128, "no other width is used");
  if constexpr (n == 32 && bf16) OCTAVO_SS("32", "bf16", OCTAVO_N16, OCTAVO_D16(0), "16", "17", "18");
  if constexpr (n == 32 && !bf16) OCTAVO_SS("32", "f16", OCTAVO_N16, OCTAVO_D16(0), "16", "17", "18");
  if constexpr (n == 64 && bf16) OCTAVO_SS("64", "bf16", OCTAVO_N32, OCTAVO_D32(0), "32", "33", "34");
  if constexpr (n == 64 && !bf16) OCTAVO_SS("64", "f16", OCTAVO_N32, OCTAVO_D32(0), "32", "33", "34");
  if constexpr (n == 128 && bf16) OCTAVO_SS("128", "bf16", OCTAVO_N64, OCTAVO_D64(0), "64", "65", "66");
  if constexpr (n == 128 && !bf16) OCTAVO_SS("128", "f16", OCTAVO_N64, OCTAVO_D64(0), "64", "65", "66");
}

// `a`, 64 x 16: a[0] and a[2] are the upper row's elements 2 t, 2 t + 1 and 2 t + 8, 2 t + 9; a[1] and a[3] the lower row's.
template <bool bf16, int n>
__device__ __forceinline__ void multiply_add(float (&d)[n / 2], const uint32_t* a, uint64_t b) {
  static_assert(n == 64 || n == 128 || n == 256, "no other width is used");
  if constexpr (n == 64 && bf16) OCTAVO_RS("64", "bf16", OCTAVO_N32, OCTAVO_D32(0), "32", "33", "34", "35", "36", "37");
  if constexpr (n == 64 && !bf16) OCTAVO_RS("64", "f16", OCTAVO_N32, OCTAVO_D32(0), "32", "33", "34", "35", "36", "37");
  if constexpr (n == 128 && bf16) OCTAVO_RS("128", "bf16", OCTAVO_N64, OCTAVO_D64(0), "64", "65", "66", "67", "68", "69");
  if constexpr (n == 128 && !bf16) OCTAVO_RS("128", "f16", OCTAVO_N64, OCTAVO_D64(0), "64", "65", "66", "67", "68", "69");
  if constexpr (n == 256 && bf16)
    OCTAVO_RS("256", "bf16", OCTAVO_N128, OCTAVO_D128(0), "128", "129", "130", "131", "132", "133");
  if constexpr (n == 256 && !bf16)
    OCTAVO_RS("256", "f16", OCTAVO_N128, OCTAVO_D128(0), "128", "129", "130", "131", "132", "133");
}

}  // namespace octavo::cuda::hopper
#endif  // OCTAVO_HOPPER
