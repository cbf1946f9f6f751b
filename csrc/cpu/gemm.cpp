// Linear layers over packed weights, and the embedding that reads its rows from the same packing. Weights are stored as panels of 32 outputs,
// [panels, K, 32]: a panel is one contiguous stream in memory, read once per call when few rows are computed.
//
// Invariant: an output is one chain of fused multiply-adds over ascending k that starts at zero, plus the bias at the end. Everything
// below (tiles, blocks of K, groups of panels, threads) only chooses which chains advance together, so a row's bits do not depend on
// how many rows there are. A chain that pauses at the end of a K block is kept as float, which is exact.
#include <cstring>
#include <utility>

#include "../common/check.h"
#include "../ops.h"
#include "parallel.h"
#include "vec.h"

namespace octavo::OCTAVO_ISA {
namespace {

constexpr int panel_width = 32;
static_assert(panel_width % (2 * lanes) == 0, "a panel is a whole number of vector pairs");

// --- pairs of vectors -----------------------------------------------------------------------------------------------------------
// Two neighbouring vectors of weights in the order that is cheapest to widen; `in_order` brings sums of that order to their columns.

template <class T>
inline void load_pair(const T* p, Vec& a, Vec& b) {
  a = load(p);
  b = load(p + lanes);
}

// bfloat16: as 32-bit words the odd columns are the upper halves and the even ones the lower: a shift and a mask.
inline void load_pair(const BFloat16* p, Vec& a, Vec& b) {
#if defined(__AVX512F__)
  const __m512i words = _mm512_loadu_si512(p);
  a.v = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  b.v = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
#elif defined(__AVX2__)
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  a.v = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
  b.v = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
#else
  a = load(p);
  b = load(p + lanes);
#endif
}

template <class T>
inline void in_order(Vec&, Vec&) {}

template <class T>
inline void out_of_order(Vec&, Vec&) {}

#if defined(__AVX512F__)
template <>
inline void in_order<BFloat16>(Vec& even, Vec& odd) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  const __m512 a = _mm512_permutex2var_ps(even.v, low, odd.v);
  odd.v = _mm512_permutex2var_ps(even.v, high, odd.v);
  even.v = a;
}
template <>
inline void out_of_order<BFloat16>(Vec& first, Vec& second) {
  const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odds = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  const __m512 a = _mm512_permutex2var_ps(first.v, evens, second.v);
  second.v = _mm512_permutex2var_ps(first.v, odds, second.v);
  first.v = a;
}
#elif defined(__AVX2__)
template <>
inline void in_order<BFloat16>(Vec& even, Vec& odd) {
  const __m256 low = _mm256_unpacklo_ps(even.v, odd.v);
  const __m256 high = _mm256_unpackhi_ps(even.v, odd.v);
  even.v = _mm256_permute2f128_ps(low, high, 0x20);
  odd.v = _mm256_permute2f128_ps(low, high, 0x31);
}
template <>
inline void out_of_order<BFloat16>(Vec& first, Vec& second) {
  const __m256 a = _mm256_permute2f128_ps(first.v, second.v, 0x20);
  const __m256 b = _mm256_permute2f128_ps(first.v, second.v, 0x31);
  first.v = _mm256_shuffle_ps(a, b, 0x88);
  second.v = _mm256_shuffle_ps(a, b, 0xdd);
}
#endif

// --- one tile of outputs --------------------------------------------------------------------------------------------------------

// Where a tile stands: `rows` rows of x times columns of one panel, over k in [0, depth).
struct Tile {
  const float* x;  // [rows, depth], row stride x_stride
  int64_t x_stride;
  const void* b;  // [depth, 32], first wanted column
  int64_t depth;
  float* c;  // [rows, columns], row stride c_stride
  int64_t c_stride;
  bool fresh;          // start the chains at zero, else go on from c
  const float* bias;   // [columns], added after the last k; or null
  const void* ahead;   // where to prefetch while k advances (any address will do)
  int64_t ahead_step;  // bytes for each k
};

template <class T, int num_rows, int num_pairs>
void compute(const Tile& t) {
  Vec sum[num_rows][2 * num_pairs];
  for (int r = 0; r < num_rows; ++r)
    for (int p = 0; p < num_pairs; ++p) {
      Vec& a = sum[r][2 * p];
      Vec& b = sum[r][2 * p + 1];
      a = b = broadcast(0.0f);
      if (!t.fresh) {
        const float* c = t.c + r * t.c_stride + 2 * p * lanes;
        a = load(c);
        b = load(c + lanes);
        out_of_order<T>(a, b);
      }
    }
  const T* b = static_cast<const T*>(t.b);
  const char* ahead = static_cast<const char*>(t.ahead);
  const float* x = t.x;
  for (int64_t k = 0; k < t.depth; ++k, b += panel_width, ++x) {
    Vec weight[2 * num_pairs];
    for (int p = 0; p < num_pairs; ++p) load_pair(b + 2 * p * lanes, weight[2 * p], weight[2 * p + 1]);
    for (unsigned line = 0; line < panel_width * sizeof(T); line += 64) __builtin_prefetch(ahead + line);
    ahead += t.ahead_step;
    for (int r = 0; r < num_rows; ++r) {
      const Vec value = broadcast(x[r * t.x_stride]);
      for (int v = 0; v < 2 * num_pairs; ++v) sum[r][v] = fma(value, weight[v], sum[r][v]);
    }
  }
  for (int r = 0; r < num_rows; ++r)
    for (int p = 0; p < num_pairs; ++p) {
      Vec a = sum[r][2 * p];
      Vec b2 = sum[r][2 * p + 1];
      in_order<T>(a, b2);
      if (t.bias) {
        a = a + load(t.bias + 2 * p * lanes);
        b2 = b2 + load(t.bias + (2 * p + 1) * lanes);
      }
      float* c = t.c + r * t.c_stride + 2 * p * lanes;
      store(c, a);
      store(c + lanes, b2);
    }
}

// As many rows as leave every chain in a register: 2 * pairs vectors a row.
constexpr int num_chains = lanes == 16 ? 24 : 12;
constexpr int panel_pairs = panel_width / (2 * lanes);
constexpr int max_rows(int num_pairs) { return num_chains / (2 * num_pairs); }

using Compute = void (*)(const Tile&);

template <class T, int num_pairs, int... row>
constexpr Compute compute_rows(int rows, std::integer_sequence<int, row...>) {
  constexpr Compute table[] = {compute<T, row + 1, num_pairs>...};
  return table[rows - 1];
}

// All 32 columns of a panel over the rows and the depth of `t`; reads the weights once where the rows are few.
template <class T>
void compute_panel(Tile t, int rows) {
  if constexpr (panel_pairs > 1)
    if (rows <= max_rows(panel_pairs)) return compute_rows<T, panel_pairs>(rows, std::make_integer_sequence<int, max_rows(panel_pairs)>())(t);
  const Compute pair = compute_rows<T, 1>(rows, std::make_integer_sequence<int, max_rows(1)>());
  for (int p = 0; p < panel_pairs; ++p) {
    pair(t);
    t.b = static_cast<const T*>(t.b) + 2 * lanes;
    t.c += 2 * lanes;
    if (t.bias) t.bias += 2 * lanes;
  }
}

// --- the driver -----------------------------------------------------------------------------------------------------------------

struct Problem {
  const float* x;  // [M, K]
  int64_t x_stride;
  const void* packed;  // [P, K, 32]
  const float* bias;   // [N] or null
  float* out;          // [M, N]
  int64_t out_stride;
  int64_t m, n, k, panels;
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// How a problem is cut into tasks (a block of rows times a group of panels) and a task into slices (one panel times a block of k).
struct Plan {
  int64_t tile_rows;   // rows that advance together; all tiles but the last of a block have as many
  int64_t block_rows;  // rows of a task
  int64_t row_blocks;
  int64_t group;  // panels of a task
  int64_t groups;
  int64_t depth;  // k of a slice
  bool k_outer;   // walk all panels of the group for one block of k before the next, else all k of a panel before the next panel
};

constexpr int64_t most_rows = 12 * 12;   // with 256 of k this much of x lies in the second-level cache beside the outputs of a group
constexpr int64_t most_panels = 16;      // of a group whose outputs are visited once for each block of k
constexpr int64_t block_depth = 256;     // a slice stays in the first-level cache while the tiles of a block of rows pass over it
constexpr int64_t small_work = 1 << 15;  // multiply-adds that are not worth another thread
static_assert(most_rows % max_rows(1) == 0);

Plan plan(int64_t m, int64_t k, int64_t panels, int64_t threads) {
  Plan p;
  const bool one_pass = m <= max_rows(panel_pairs);
  p.row_blocks = divide_up(m, most_rows);
  const int64_t tiles = divide_up(divide_up(m, p.row_blocks), max_rows(1));
  p.tile_rows = divide_up(divide_up(m, p.row_blocks), tiles);
  p.block_rows = p.tile_rows * tiles;
  p.row_blocks = divide_up(m, p.block_rows);
  p.depth = one_pass && k > 0 ? k : block_depth;
  p.k_outer = tiles > 4 && k > block_depth;
  const int64_t worth = m * k * panels * panel_width / small_work + 1;
  const int64_t wanted = threads == 1 ? 1 : least(4 * threads, worth);
  p.group = divide_up(panels, divide_up(wanted, p.row_blocks));
  if (p.k_outer) p.group = least(p.group, most_panels);
  p.groups = divide_up(panels, p.group);
  return p;
}

// Reads each weight from memory once for a block of rows; while the tiles pass over a slice they ask for the next one.
template <class T>
void run_task(const Problem& a, const Plan& plan, int64_t task) {
  const int64_t row_begin = task % plan.row_blocks * plan.block_rows;
  const int64_t rows = least(plan.block_rows, a.m - row_begin);
  const int64_t panel_begin = task / plan.row_blocks * plan.group;
  const int64_t group = least(plan.group, a.panels - panel_begin);
  const int64_t depths = a.k == 0 ? 1 : divide_up(a.k, plan.depth);
  const int64_t passes = divide_up(rows, plan.tile_rows);

  // The last panel may be wider than the output: its tiles go to `spare` [rows, 32], and the columns that exist are copied at the end.
  const int64_t spare_panel = a.n % panel_width ? a.panels - 1 : -1;
  float* spare = static_cast<float*>(scratch(0, static_cast<int64_t>(sizeof(float)) * most_rows * panel_width));
  float spare_bias[panel_width] = {};
  if (a.bias) std::memcpy(spare_bias, a.bias + (a.panels - 1) * panel_width, sizeof(float) * static_cast<size_t>(a.n - (a.panels - 1) * panel_width));

  const auto slice = [&](int64_t i) {
    const int64_t panel = panel_begin + (plan.k_outer ? i % group : i / depths);
    const int64_t k = (plan.k_outer ? i / group : i % depths) * plan.depth;
    return std::pair(panel, k);
  };
  const auto address = [&](int64_t panel, int64_t k) { return static_cast<const T*>(a.packed) + (panel * a.k + k) * panel_width; };
  for (int64_t i = 0; i < group * depths; ++i) {
    const auto [panel, k] = slice(i);
    const int64_t count = least(plan.depth, a.k - k);
    const bool last = k + count == a.k;
    const bool is_spare = panel == spare_panel;
    float* c = is_spare ? spare : a.out + row_begin * a.out_stride + panel * panel_width;
    const int64_t c_stride = is_spare ? panel_width : a.out_stride;
    const float* bias = !a.bias || !last ? nullptr : is_spare ? spare_bias : a.bias + panel * panel_width;
    const T* b = address(panel, k);
    const auto next = slice(i + 1);
    const char* ahead = reinterpret_cast<const char*>(plan.depth == a.k ? b + 32 * panel_width : address(next.first, next.second));
    const int64_t ahead_step = static_cast<int64_t>(sizeof(T)) * panel_width / passes;
    for (int64_t row = 0; row < rows; row += plan.tile_rows) {
      compute_panel<T>({a.x + (row_begin + row) * a.x_stride + k, a.x_stride, b, count, c + row * c_stride, c_stride, k == 0, bias, ahead, ahead_step},
                       static_cast<int>(least(plan.tile_rows, rows - row)));
      ahead += ahead_step * count;
    }
  }
  if (panel_begin + group - 1 != spare_panel) return;
  for (int64_t row = 0; row < rows; ++row)
    std::memcpy(a.out + (row_begin + row) * a.out_stride + spare_panel * panel_width, spare + row * panel_width,
                sizeof(float) * static_cast<size_t>(a.n % panel_width));
}

template <class T>
void multiply(const Problem& a) {
  const Plan p = plan(a.m, a.k, a.panels, num_threads());
  parallel_tasks(p.row_blocks * p.groups, [&](int64_t task) { run_task<T>(a, p, task); });
}

template <class T>
void pack(T* packed, const T* weight, int64_t stride, int64_t n, int64_t k) {
  parallel_for(divide_up(n, panel_width), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      T* panel = packed + p * k * panel_width;
      const int64_t width = n - p * panel_width < panel_width ? n - p * panel_width : panel_width;
      if (width < panel_width) std::memset(static_cast<void*>(panel), 0, sizeof(T) * static_cast<size_t>(k * panel_width));
      const T* row = weight + p * panel_width * stride;
      for (int64_t start = 0; start < k; start += 32)  // 32 x 32 elements at a time: both sides stay in cache
        for (int64_t j = 0; j < width; ++j)
          for (int64_t i = start; i < k && i < start + 32; ++i) panel[i * panel_width + j] = row[j * stride + i];
    }
  });
}

template <class T>
void gather_row(float* out, const T* panel, int64_t k) {
  for (int64_t i = 0; i < k; ++i) out[i] = widen(panel[i * panel_width]);
}

void check_packed(const Contract& c, const Tensor& packed, int64_t n) {
  const int64_t panels = packed.size[0];
  c.require(packed.size[2] == panel_width, "packed must have panels of %d columns, found %lld", panel_width, static_cast<long long>(packed.size[2]));
  c.require(n >= 0 && divide_up(n, panel_width) == panels, "n = %lld does not fit the %lld panels of packed", static_cast<long long>(n),
            static_cast<long long>(panels));
}

}  // namespace

void pack_linear(const Tensor& packed, const Tensor& weight) {
  Contract c("pack_linear");
  c.tensor("weight", weight, "NK", storage_types, rows);
  c.tensor("packed", packed, "PKL", weight.dtype);
  check_packed(c, packed, c['N']);
  if (weight.dtype == f32)
    pack(packed.ptr<uint32_t>(), weight.ptr<const uint32_t>(), weight.stride[0], c['N'], c['K']);
  else
    pack(packed.ptr<uint16_t>(), weight.ptr<const uint16_t>(), weight.stride[0], c['N'], c['K']);
}

void linear(const Tensor& out, const Tensor& x, const Tensor& packed, const Tensor* bias, int64_t n) {
  Contract c("linear");
  c.tensor("x", x, "MK", f32, rows);
  c.tensor("packed", packed, "PKL", storage_types);
  c.tensor("out", out, "MN", f32, rows);
  if (bias) c.tensor("bias", *bias, "N", f32);
  check_packed(c, packed, n);
  c.require(c['N'] == n, "out has %lld columns, but n = %lld", static_cast<long long>(c['N']), static_cast<long long>(n));
  if (c['M'] == 0 || n == 0) return;
  const Problem a{
      x.ptr<const float>(), x.stride[0], packed.data, bias ? bias->ptr<const float>() : nullptr, out.ptr<float>(), out.stride[0], c['M'], n, c['K'], c['P']};
  if (packed.dtype == f32)
    multiply<float>(a);
  else if (packed.dtype == bf16)
    multiply<BFloat16>(a);
  else
    multiply<Float16>(a);
}

void embedding(const Tensor& out, const Tensor& ids, const Tensor& packed, int64_t n) {
  Contract c("embedding");
  c.tensor("ids", ids, "T", i64);
  c.tensor("packed", packed, "PKL", storage_types);
  c.tensor("out", out, "TK", f32);
  check_packed(c, packed, n);
  const int64_t* id = ids.ptr<const int64_t>();
  for (int64_t t = 0; t < c['T']; ++t)
    c.require(id[t] >= 0 && id[t] < n, "ids[%lld] = %lld, but there are %lld rows", static_cast<long long>(t), static_cast<long long>(id[t]),
              static_cast<long long>(n));
  const int64_t k = c['K'];
  parallel_for(c['T'], divide_up(16384, k + 1), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t start = id[t] / panel_width * k * panel_width + id[t] % panel_width;
      float* row = out.ptr<float>() + t * k;
      if (packed.dtype == f32)
        gather_row(row, packed.ptr<const float>() + start, k);
      else if (packed.dtype == bf16)
        gather_row(row, packed.ptr<const BFloat16>() + start, k);
      else
        gather_row(row, packed.ptr<const Float16>() + start, k);
    }
  });
}

}  // namespace octavo::OCTAVO_ISA
