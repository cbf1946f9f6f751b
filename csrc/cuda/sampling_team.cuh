// The team that works on one row of logits: a cluster of 1 to 16 thread blocks of 16 warps. Owns the order of tokens, their weights as
// integers, and how the team's warps tell each other sums; it does not know where the logits lie nor what is looked for.
//
// Invariant: what a row gives does not depend on how it was split. Weights are 2^((logit - best) * log2(e) / temperature), rounded
// once to a multiple of 2^-38, so sums of them are sums of integers, which have one value in any order; ranks go by (logit, lower
// id), which no two tokens share. So there is no tree to keep to, and atomics on counts are exact too. A weight below 2^-39 is no
// weight: all of them together are less than 2^-21 of the best token's. Only tokens with a weight are counted and ranked.
//
// Blocks exchange sums by writing them into each other's shared memory (distributed shared memory, CUDA programming guide), with
// stores that report to a barrier of the receiver, since a barrier of the whole cluster costs a fence. The table that they write has
// two copies that take turns: a warp writes a copy again only when all warps have told what comes after it, so have read it.
#pragma once

#include <cfloat>
#include <cstdint>

#include "launch.h"

namespace octavo::cuda {
namespace {

constexpr int row_warps = 16, row_threads = 32 * row_warps, row_step = 128;  // a warp looks at `row_step` tokens at a time
constexpr int largest_team = 16, table_slots = largest_team * row_warps;
constexpr int largest_vocab = 1 << 24;  // sums of that many weights fit into 64 bits, times 2^24 into two words
constexpr int bins = 1024;
constexpr float bins_per_octave = 25;  // a weight above 2^-39 has a bin
// Blocks on a multiprocessor that registers are saved for. From 10.0 on the compiler would spill for two.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int resident_blocks = 1;
#else
constexpr int resident_blocks = 2;
#endif
constexpr float least_exponent = -39;
constexpr int list_size = 2048, short_list = row_threads / 4;
static_assert(bins == 2 * row_threads, "a thread adds up two bins");
static_assert(39 * bins_per_octave + 1 < bins, "every weight has a bin");
static_assert(list_size <= 4 * row_threads, "a thread holds at most four entries of the list");

using Word = unsigned long long;

// Bulk copies and reporting stores: PTX 8.1. Without them the same is done by loads and barriers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && (__CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 1))
#define OCTAVO_ROW_ASYNC 1
#else
#define OCTAVO_ROW_ASYNC 0
#endif

struct Shared {
  Word table[2][2][table_slots];  // what the warps of the team tell each other
  Word list[list_size];                        // of the first block: tokens that are being ranked
  Word scan[row_warps];
  Word weights[short_list];
  Word answer[2];
  alignas(8) uint64_t arrived[row_warps], told[2], listed, decided;
  uint32_t histogram[bins];
  uint32_t scan_count[row_warps];
  float scan_mass[row_warps];
  uint32_t filled;  // entries of the list
  union {
    uint32_t found[12];  // what the first block finds in the histogram
    Word decision[6];
  };
  double log_total;
};
constexpr int shared_bytes = (sizeof(Shared) + 127) / 128 * 128;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fffffff); }

// --- Order: a token's place as one number, larger is better, no two alike ------------------------------------------------------------

__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 equals 0
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ Word place_of(float x, int id) { return static_cast<Word>(ordered(x)) << 32 | (0xffffffffu - static_cast<uint32_t>(id)); }
__device__ __forceinline__ float logit_of(uint32_t order) { return __uint_as_float(order >> 31 ? order ^ 0x80000000u : ~order); }
__device__ __forceinline__ int id_of(uint32_t low) { return static_cast<int>(0xffffffffu - low); }
constexpr Word broken_place = ~Word{0};  // above +inf

// The worst token that is kept.
struct Border {
  float logit;
  int id;
  __device__ bool keeps(float x, int i) const { return x > logit || (x == logit && i <= id); }
};
__device__ __forceinline__ Border border_of(Word place) {
  return {logit_of(static_cast<uint32_t>(place >> 32)), id_of(static_cast<uint32_t>(place))};
}

// --- Weights -------------------------------------------------------------------------------------------------------------------------

// Adds float weights from 0 to 1 as multiples of 2^-38, at most 4 before `value`: the integer parts of w 2^20 and the rests times
// 2^18, both read from the low bits of floats that were pushed to a binade where the last bit is 1.
struct Fixed {
  static constexpr float high_offset = 0x1p23f, low_offset = 0x1.8p23f;
  uint32_t high = 0, low = 0;
  __device__ void add(float w) {
    const float shifted = fmaf(w, 0x1p20f, high_offset);
    const float rest = fmaf(w, 0x1p20f, -(shifted - high_offset));
    high += __float_as_uint(shifted);
    low += __float_as_uint(fmaf(rest, 0x1p18f, low_offset));
  }
  __device__ Word value(int count) const {
    const uint32_t h = high - count * __float_as_uint(high_offset), l = low - count * __float_as_uint(low_offset);
    return (static_cast<Word>(h) << 18) + static_cast<Word>(static_cast<long long>(static_cast<int32_t>(l)));
  }
};
__device__ __forceinline__ Word fixed(float w) {
  Fixed sum;
  sum.add(w);
  return sum.value(1);
}

struct Weigher {
  float best, scale;
  __device__ Weigher(float best_logit, float temperature) : best(best_logit) {
    // log2(e) / temperature, rounded once: the quotient of the constant's first float, and what that leaves over.
    const float quotient = 1.44269502f / temperature;
    scale = fminf(quotient + (fmaf(-quotient, temperature, 1.44269502f) + 1.92596303e-8f) / temperature, FLT_MAX);
  }
  // log2 of the weight. The best logit has 0 also where it is +inf: the minimum drops the NaN of inf - inf.
  __device__ float exponent(float x) const { return fminf(x - best, 0.0f) * scale; }
  __device__ static float power(float e) {
    float w;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(w) : "f"(e));
    return w;
  }
  __device__ float operator()(float x) const { return power(exponent(x)); }
  // Bins go from the best on; a place in [b, b + 1) is bin b.
  __device__ static float bin_place(float e) { return e * -bins_per_octave; }
};

// --- Warps and blocks ----------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ Word warp_sum(Word x) {
#pragma unroll
  for (int o = 16; o > 0; o /= 2) x += __shfl_xor_sync(~0u, x, o);
  return x;
}
__device__ __forceinline__ Word warp_max(Word x) {
#pragma unroll
  for (int o = 16; o > 0; o /= 2) {
    const Word y = __shfl_xor_sync(~0u, x, o);
    x = y > x ? y : x;
  }
  return x;
}
template <class T>
__device__ __forceinline__ T warp_running_sum(T x, int lane) {
#pragma unroll
  for (int o = 1; o < 32; o *= 2) {
    const T y = __shfl_up_sync(~0u, x, o);
    if (lane >= o) x += y;
  }
  return x;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void wait_for(uint32_t barrier, uint32_t parity) {
#if OCTAVO_ROW_ASYNC
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{\n .reg .pred p;\n mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
#endif
}

// The blocks of one row. Every member function that waits is called by all threads of all blocks.
struct Team {
  Shared& shared;
  int size, rank, warp, lane, thread, turn = 0, tells = 0, lists = 0, decisions = 0;

  __device__ explicit Team(Shared& s) : shared(s), size(1), rank(0), warp(threadIdx.x / 32), lane(threadIdx.x % 32), thread(threadIdx.x) {
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  }

  // Sets up what the blocks share; `wait` ends it.
  __device__ void begin() const {
    shared.histogram[thread] = shared.histogram[thread + row_threads] = 0;
    if (thread == 0) {
      shared.filled = 0;
#if OCTAVO_ROW_ASYNC
      for (uint64_t* barrier : {&shared.told[0], &shared.told[1], &shared.listed, &shared.decided})
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    }
    arrive();
  }

  __device__ void arrive() const {
#if __CUDA_ARCH__ >= 900
    __syncwarp();
    if (size > 1) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
  }
  __device__ void wait() const {
#if __CUDA_ARCH__ >= 900
    if (size > 1) {
      asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
      return;
    }
#endif
    __syncthreads();
  }
  __device__ void sync() const {
    arrive();
    wait();
  }

  // The same variable of another block.
  __device__ static uint32_t remote(const void* p, int block) {
    uint32_t address = shared_address(p);
#if __CUDA_ARCH__ >= 900
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(address), "r"(block));
#endif
    return address;
  }
  __device__ void store(Word* p, int block, Word value) const {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(remote(p, block)), "l"(value) : "memory");
#else
    *p = value;
#endif
  }
  __device__ uint2 load(const uint32_t* p, int block) const {
#if __CUDA_ARCH__ >= 900
    uint2 v;
    asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(remote(p, block)) : "memory");
    return v;
#else
    return *reinterpret_cast<const uint2*>(p);
#endif
  }
  __device__ uint32_t add(uint32_t* p, int block, uint32_t value) const {
#if __CUDA_ARCH__ >= 900
    uint32_t old;
    asm volatile("atom.relaxed.cluster.shared::cluster.add.u32 %0, [%1], %2;" : "=r"(old) : "r"(remote(p, block)), "r"(value) : "memory");
    return old;
#else
    return atomicAdd(p, value);
#endif
  }

#if OCTAVO_ROW_ASYNC
  __device__ static void expect(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
  }
  // A store that another block's barrier hears of.
  __device__ static void report(Word* p, int block, Word value, uint64_t* barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u64 [%0], %1, [%2];" ::"r"(remote(p, block)), "l"(value),
                 "r"(remote(barrier, block))
                 : "memory");
  }
#endif

  // An entry for the first block's list.
  __device__ void put(uint32_t at, Word value) const {
    if (at >= list_size) return;
#if OCTAVO_ROW_ASYNC
    if (size > 1) return report(&shared.list[at], 0, value, &shared.listed);
#endif
    store(&shared.list[at], 0, value);
  }
  // The first block waits until the list has its `count` entries. The others go on.
  __device__ void await_list(int count) {
#if OCTAVO_ROW_ASYNC
    if (size > 1) {
      if (rank == 0) {
        if (thread == 0) expect(&shared.listed, 8 * count);
        wait_for(shared_address(&shared.listed), lists & 1);
      }
      ++lists;
      return;
    }
#endif
    sync();
  }

  // The histograms of all blocks: this thread's two bins. Eight loads are under way before the first is used.
  __device__ uint2 histogram_of_team() const {
    constexpr int together = 8;
    uint2 n[together], sum = {0, 0};
#pragma unroll 1
    for (int base = 0; base < size; base += together) {
#pragma unroll
      for (int i = 0; i < together; ++i) {
        n[i] = {0, 0};
        if (base + i < size) n[i] = load(&shared.histogram[2 * thread], base + i);
      }
#pragma unroll
      for (int i = 0; i < together; ++i) sum.x += n[i].x, sum.y += n[i].y;
    }
    return sum;
  }
  // The first block gives its `decision` to the others. Reading all histograms is a lot of traffic, so that one block does it; and
  // the others cannot leave before it has read theirs.
  __device__ void share_decision() {
#if OCTAVO_ROW_ASYNC
    if (size > 1) {
      if (rank > 0) {
        if (thread == 0) expect(&shared.decided, sizeof shared.decision);
        wait_for(shared_address(&shared.decided), decisions & 1);
      } else {
        __syncthreads();
        if (thread > 0 && thread < size) {
#pragma unroll
          for (Word& word : shared.decision) report(&word, thread, word, &shared.decided);
        }
      }
      ++decisions;
      return;
    }
#endif
    __syncthreads();
    if (rank == 0 && thread > 0 && thread < size) {
#pragma unroll
      for (Word& word : shared.decision) store(&word, thread, word);
    }
    sync();
  }

  // Tells all warps of the team this warp's values, which are the same in all lanes; then `sum`, `max` and `before` read them.
  // `settled`: all that the team did to its shared memory before is seen by all of it, too.
  template <bool settled = false, int N>
  __device__ void tell(const Word (&mine)[N]) {
    static_assert(N <= 2, "the table has room for two values a warp");
    turn = tells & 1;
    const uint32_t parity = tells >> 1 & 1;
    ++tells;
    Word* slot = &shared.table[turn][0][rank * row_warps + warp];
#if OCTAVO_ROW_ASYNC
    if (size > 1) {
      if (thread == 0) expect(&shared.told[turn], size * row_warps * N * 8);
      if (lane < size) {
#pragma unroll
        for (int v = 0; v < N; ++v) report(slot + v * table_slots, lane, mine[v], &shared.told[turn]);
      }
      if (settled) sync();
      wait_for(shared_address(&shared.told[turn]), parity);
      __syncwarp();
      return;
    }
#endif
    (void)parity;
    if (lane < size) {
#pragma unroll
      for (int v = 0; v < N; ++v) store(slot + v * table_slots, lane, mine[v]);
    }
    sync();
  }
  // `combine(what the warp told, its number)` of this lane's share of the team's warps.
  template <class Combine>
  __device__ void each(int v, const Combine& combine) const {
#pragma unroll
    for (int i = 0; i < table_slots / 32; ++i) {
      const int w = 32 * i + lane;
      if (w < size * row_warps) combine(shared.table[turn][v][w], w);
    }
  }
  __device__ Word sum(int v) const {
    Word sum = 0;
    each(v, [&](Word x, int) { sum += x; });
    return warp_sum(sum);
  }
  __device__ Word max(int v) const {
    Word max = 0;
    each(v, [&](Word x, int) { max = x > max ? x : max; });
    return warp_max(max);
  }
  // What the warps before this one told.
  __device__ Word before(int v) const {
    Word sum = 0;
    each(v, [&](Word x, int w) { sum += w < rank * row_warps + warp ? x : 0; });
    return warp_sum(sum);
  }

  // Over the threads of this block: what those before this one have, and what all have.
  __device__ __forceinline__ Word block_before(Word x, Word& total) const {
    const Word running = warp_running_sum(x, lane);
    __syncthreads();
    if (lane == 31) shared.scan[warp] = running;
    __syncthreads();
    Word earlier = 0;
    total = 0;
#pragma unroll 4
    for (int w = 0; w < row_warps; ++w) {
      const Word y = shared.scan[w];
      if (w < warp) earlier += y;
      total += y;
    }
    return earlier + running - x;
  }
};

}  // namespace
}  // namespace octavo::cuda
