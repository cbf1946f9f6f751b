// Functions of single elements: the activations of an MLP, plain and gated, with an output of the activation's type or of e4m3 with one
// scale a row; and the rows of an embedding table. Knows rows and their strides, no model. Invariant: an element depends on its own
// inputs alone, and a row's scale, being a maximum, on the order of nothing.
#include "common/check.h"
#include "launch.h"
#include "ops.h"
#include "vec.cuh"

namespace octavo::cuda {
namespace {

enum class Kind { silu, gelu, gelu_tanh, relu };

struct Params {
  void* out;                     // [T, d]
  float* scale;                  // [T], for e4m3
  const void* x;                 // [T, d] or [T, 2 d]
  int64_t out_stride, x_stride;  // elements
  int64_t rows;
  uint32_t chunks;       // of eight elements, in all rows
  Divider chunks_a_row;  // by ceil(d / 8)
  int width;             // d
  Kind kind;
  bool vec;
};

// Where the result is rounded to 16 bits or fewer, the error of the fast exponential (2^-23 |x|) is far below that rounding.
template <bool fine>
__device__ __forceinline__ float exponential(float x) {
  return fine ? expf(x) : __expf(x);
}

// 1 / x within a unit in the last place; 0 for an infinite x.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x / (1 + e^-u)
template <bool fine>
__device__ __forceinline__ float sigmoid_times(float x, float u) {
  return x * reciprocal(1.0f + exponential<fine>(-u));
}

template <bool fine>
__device__ __forceinline__ float gelu_tanh(float x) {  // 0.5 (1 + tanh(u)) = sigmoid(2 u)
  return sigmoid_times<fine>(x, fmaf(x * x * x, 0.044715f, x) * 1.59576912160573071f);  // 2 sqrt(2 / pi)
}

// By erfc(z) = e^(-z^2) t p(t) with t = 1 / (1 + 0.4 z): the polynomial of cpu/norm_act_rope.cpp, within 2.6e-7 of erfc relative to its
// size, at a third of the instructions of erfcf.
template <bool fine>
__device__ __forceinline__ float gelu(float x) {
  const float z = fabsf(x) * 0.707106781186547524f, t = reciprocal(fmaf(z, 0.4f, 1.0f));
  float p = 0.0502621308f;
  p = fmaf(p, t, -0.182901487f);
  p = fmaf(p, t, 0.169085458f);
  p = fmaf(p, t, -0.00560755981f);
  p = fmaf(p, t, 0.141431436f);
  p = fmaf(p, t, 0.168541983f);
  p = fmaf(p, t, 0.207842693f);
  p = fmaf(p, t, 0.225669593f);
  p = fmaf(p, t, 0.225675866f);
  const float half = p * t * exponential<fine>(-(z * z)) * 0.5f;  // half of erfc(|x| / sqrt(2))
  return x * (x < 0.0f ? half : 1.0f - half);
}

template <bool fine>
__device__ __forceinline__ void act8(float* v, Kind kind) {
  switch (kind) {
    case Kind::silu:
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = sigmoid_times<fine>(v[i], v[i]);
      break;
    case Kind::gelu:
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = gelu<fine>(v[i]);
      break;
    case Kind::gelu_tanh:
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = gelu_tanh<fine>(v[i]);
      break;
    case Kind::relu:
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = v[i] < 0.0f ? 0.0f : v[i];  // NaN stays
  }
}

// Every thread takes `unroll` chunks, a block's width apart.
template <class T, bool gated, int unroll, bool vec>
__global__ void __launch_bounds__(128) act_kernel(const Params p) {
  dependents_start();
  dependency_wait();
  const uint32_t start = blockIdx.x * (128 * unroll) + threadIdx.x;
  Packed<T> gate[unroll];
  [[maybe_unused]] Packed<T> up[unroll];
  T* to[unroll];
  int count[unroll];
#pragma unroll
  for (int u = 0; u < unroll; ++u) {
    const uint32_t chunk = start + u * 128;
    const uint32_t row = p.chunks_a_row(chunk);
    const int column = static_cast<int>(chunk - row * p.chunks_a_row.by) * 8;
    count[u] = chunk < p.chunks ? p.width - column : 0;
    to[u] = static_cast<T*>(p.out) + row * p.out_stride + column;
    const T* from = static_cast<const T*>(p.x) + row * p.x_stride + column;
    load_some<vec>(gate[u], from, count[u]);
    if constexpr (gated) load_some<vec>(up[u], from + p.width, count[u]);
  }
#pragma unroll
  for (int u = 0; u < unroll; ++u) {
    float y[8];
    gate[u].unpack(y);
    act8<std::is_same_v<T, float>>(y, p.kind);
    if constexpr (gated) {
      float factor[8];
      up[u].unpack(factor);
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] *= factor[i];
    }
    store_some<vec>(to[u], y, count[u]);
  }
}

// Rows that share a multiprocessor at least: the next one's loads hide what one waits for. Elsewhere the registers would not do.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int rows_at_once = 2;
#else
constexpr int rows_at_once = 1;
#endif

// A thread block takes a row: its maximum has to be known before anything is stored. A thread keeps `held` chunks in registers.
template <class T, bool gated, int held, bool vec>
__global__ void __launch_bounds__(held == 2 ? 1024 : 512, held == 4 && vec && sizeof(T) == 2 ? rows_at_once : 1) act_fp8_kernel(const Params p) {
  __shared__ float of_warp[32];
  dependents_start();
  dependency_wait();
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  E4m3* out = static_cast<E4m3*>(p.out) + row * p.out_stride;
  const int chunks = static_cast<int>(p.chunks_a_row.by), threads = static_cast<int>(blockDim.x), first = static_cast<int>(threadIdx.x);

  float y[held][8], most = 0.0f;
  {
    Packed<T> gate[held];
    [[maybe_unused]] Packed<T> up[held];
#pragma unroll
    for (int i = 0; i < held; ++i) {
      const int column = (first + i * threads) * 8;
      load_some<vec>(gate[i], x + column, p.width - column);
      if constexpr (gated) load_some<vec>(up[i], x + p.width + column, p.width - column);
    }
#pragma unroll
    for (int i = 0; i < held; ++i) {
      gate[i].unpack(y[i]);
      act8<false>(y[i], p.kind);  // zeros, where the row has ended, stay zeros
      if constexpr (gated) {
        float factor[8];
        up[i].unpack(factor);
#pragma unroll
        for (int e = 0; e < 8; ++e) y[i][e] *= factor[e];
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) most = fmaxf(most, fabsf(y[i][e]));
    }
  }
  const auto beyond = [&](const auto& f) {  // chunks that the registers do not hold are worked out twice
#pragma unroll 1
    for (int chunk = first + held * threads; chunk < chunks; chunk += threads) {
      float more[8];
      [[maybe_unused]] float up[8];
      load_some<vec>(more, x + chunk * 8, p.width - chunk * 8);
      if constexpr (gated) load_some<vec>(up, x + p.width + chunk * 8, p.width - chunk * 8);
      act8<false>(more, p.kind);
      if constexpr (gated)
#pragma unroll
        for (int e = 0; e < 8; ++e) more[e] *= up[e];
      f(chunk, more);
    }
  };
  beyond([&](int, const float* more) {
#pragma unroll
    for (int e = 0; e < 8; ++e) most = fmaxf(most, fabsf(more[e]));
  });
  most = lanes_max(most, 32);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = most;
  __syncthreads();
  most = lanes_max(threadIdx.x % 32 < blockDim.x / 32 ? of_warp[threadIdx.x % 32] : 0.0f, 32);

  const float scale = most > 0.0f ? __fdiv_rn(most, e4m3_max) : 1.0f;
  if (threadIdx.x == 0) p.scale[row] = scale;
  const float to_e4m3 = e4m3_factor(most);
  const auto store = [&](int chunk, float* v) {
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] *= to_e4m3;
    store_some<vec>(out + chunk * 8, v, p.width - chunk * 8);
  };
#pragma unroll
  for (int i = 0; i < held; ++i) store(first + i * threads, y[i]);
  beyond(store);
}

struct LookupParams {
  void* out;           // [T, K]
  const int64_t* ids;  // [T]
  const void* table;   // [n, K]
  int64_t out_stride, table_stride, table_rows;
  uint32_t quads;       // of four elements, in all rows
  Divider quads_a_row;  // by ceil(K / 4)
  int width;            // K
  bool vec;
};

template <class Out, class T, bool vec>
__global__ void __launch_bounds__(128) lookup_kernel(const LookupParams p) {
  constexpr int unroll = 2;
  dependents_start();
  dependency_wait();
  const uint32_t start = blockIdx.x * (128 * unroll) + threadIdx.x;
  float v[unroll][4];
  Out* to[unroll];
  int count[unroll];
#pragma unroll
  for (int u = 0; u < unroll; ++u) {
    const uint32_t quad = start + u * 128;
    const uint32_t row = p.quads_a_row(quad);
    const int column = static_cast<int>(quad - row * p.quads_a_row.by) * 4;
    count[u] = quad < p.quads ? p.width - column : 0;
    to[u] = static_cast<Out*>(p.out) + row * p.out_stride + column;
    const int64_t id = count[u] > 0 ? p.ids[row] : -1;
    const bool there = static_cast<uint64_t>(id) < static_cast<uint64_t>(p.table_rows);
    const T* from = static_cast<const T*>(p.table) + (there ? id : 0) * p.table_stride + column;
#pragma unroll
    for (int i = 0; i < 4; ++i) v[u][i] = 0.0f;
    if constexpr (vec) {
      if (there) load4(v[u], from);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (there && i < count[u]) v[u][i] = widen(from[i]);
    }
  }
#pragma unroll
  for (int u = 0; u < unroll; ++u) {
    if constexpr (vec) {
      if (count[u] > 0) store4(to[u], v[u]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i < count[u]) to[u][i] = narrow<Out>(v[u][i]);
    }
  }
}

Kind kind_of(const Contract& c, std::string_view kind) {
  if (kind == "silu") return Kind::silu;
  if (kind == "gelu") return Kind::gelu;
  if (kind == "gelu_tanh") return Kind::gelu_tanh;
  c.require(kind == "relu", "kind must be silu, gelu, gelu_tanh or relu, got '%.*s'", static_cast<int>(kind.size()), kind.data());
  return Kind::relu;
}

constexpr int64_t index_limit = int64_t{1} << 31;  // what a Divider takes

Params check_activation(const char* op, const Tensor& out, const Tensor* scale, const Tensor& x, std::string_view kind, bool gated) {
  Contract c(op);
  c.tensor("x", x, gated ? "TE" : "TD", storage_types, rows);
  c.tensor("out", out, "TD", scale ? e4m3 : x.dtype, rows);
  if (scale) c.tensor("scale", *scale, "T", f32);
  const int64_t width = c['D'], count = c['T'];
  if (gated)
    c.require(c['E'] == 2 * width, "x must have twice the %lld columns of out, got %lld", static_cast<long long>(width),
              static_cast<long long>(c['E']));
  const int64_t chunks = (width + 7) / 8;
  c.require(width < index_limit / 4 && count * chunks < index_limit, "%lld rows of %lld elements are more than one call takes",
            static_cast<long long>(count), static_cast<long long>(width));
  Params p = {};
  p.out = out.data;
  p.scale = scale ? scale->ptr<float>() : nullptr;
  p.x = x.data;
  p.out_stride = out.stride[0];
  p.x_stride = x.stride[0];
  p.rows = width == 0 && !scale ? 0 : count;
  p.chunks = static_cast<uint32_t>(count * chunks);
  p.chunks_a_row = Divider(chunks > 0 ? chunks : 1);
  p.width = static_cast<int>(width);
  p.kind = kind_of(c, kind);
  p.vec = width % 8 == 0 && aligned(x, 16, p.x_stride) && aligned(out, scale ? 8 : 16, p.out_stride);
  return p;
}

template <bool gated>
void run(const char* op, const Tensor& out, const Tensor& x, std::string_view kind) {
  const Params p = check_activation(op, out, nullptr, x, kind, gated);
  if (p.rows == 0) return;
  // One chunk a thread while that fills no more than a wave: then time is latency.
  const bool few = !p.vec || p.chunks <= 1024u * static_cast<uint32_t>(device().num_sms);
  const int unroll = few ? 1 : 2;
  const unsigned blocks = (p.chunks + 128 * unroll - 1) / (128 * unroll);
  with_act(x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto kernel = !p.vec ? act_kernel<T, gated, 1, false> : few ? act_kernel<T, gated, 1, true> : act_kernel<T, gated, 2, true>;
    launch(op, kernel, dim3(blocks), dim3(128), 0, current_stream(), p);
  });
}

template <bool gated>
void run_fp8(const char* op, const Tensor& out, const Tensor& scale, const Tensor& x, std::string_view kind) {
  const Params p = check_activation(op, out, &scale, x, kind, gated);
  if (p.rows == 0) return;
  const int chunks = static_cast<int>(p.chunks_a_row.by);
  // Many threads for a row while there are few rows: the functions, not the memory, take the time then.
  const bool few = p.vec && p.rows <= 2 * device().num_sms;
  const int held = few ? 2 : 4, limit = few ? 1024 : 512, wanted = ((chunks + held - 1) / held + 31) / 32 * 32;
  const dim3 grid(static_cast<unsigned>(p.rows)), block(static_cast<unsigned>(wanted < limit ? wanted > 0 ? wanted : 32 : limit));
  with_act(x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto kernel = few ? act_fp8_kernel<T, gated, 2, true> : p.vec ? act_fp8_kernel<T, gated, 4, true> : act_fp8_kernel<T, gated, 4, false>;
    launch(op, kernel, grid, block, 0, current_stream(), p);
  });
}

}  // namespace

void gated_activation(const Tensor& out, const Tensor& x, std::string_view kind) { run<true>("gated_activation", out, x, kind); }

void activation(const Tensor& out, const Tensor& x, std::string_view kind) { run<false>("activation", out, x, kind); }

void gated_activation_fp8(const Tensor& out, const Tensor& scale, const Tensor& x, std::string_view kind) {
  run_fp8<true>("gated_activation_fp8", out, scale, x, kind);
}

void activation_fp8(const Tensor& out, const Tensor& scale, const Tensor& x, std::string_view kind) {
  run_fp8<false>("activation_fp8", out, scale, x, kind);
}

void lookup(const Tensor& out, const Tensor& ids, const Tensor& table) {
  Contract c("lookup");
  c.tensor("out", out, "TK", storage_types, rows);
  c.tensor("ids", ids, "T", i64);
  c.tensor("table", table, "NK", storage_types, rows);
  const int64_t width = c['K'], quads = (width + 3) / 4, count = c['T'];
  c.require(width < index_limit / 4 && count * quads < index_limit, "%lld rows of %lld elements are more than one call takes",
            static_cast<long long>(count), static_cast<long long>(width));
  if (count == 0 || width == 0) return;
  LookupParams p = {};
  p.out = out.data;
  p.ids = ids.ptr<const int64_t>();
  p.table = table.data;
  p.out_stride = out.stride[0];
  p.table_stride = table.stride[0];
  p.table_rows = c['N'];
  p.quads = static_cast<uint32_t>(count * quads);
  p.quads_a_row = Divider(quads);
  p.width = static_cast<int>(width);
  p.vec = width % 4 == 0 && aligned(out, static_cast<int>(4 * out.item_size), p.out_stride) &&
          aligned(table, static_cast<int>(4 * table.item_size), p.table_stride);
  with_act(out.dtype, [&](auto to) {
    with_act(table.dtype, [&](auto from) {
      using Out = typename decltype(to)::type;
      using T = typename decltype(from)::type;
      launch("lookup", p.vec ? lookup_kernel<Out, T, true> : lookup_kernel<Out, T, false>, dim3((p.quads + 255) / 256), dim3(128), 0,
             current_stream(), p);
    });
  });
}

}  // namespace octavo::cuda
