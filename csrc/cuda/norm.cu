// The norms of rows: RMS norm and layer norm, alone and after the addition to the residual stream, with an output of the activation's
// type or of e4m3 with one scale a row. Knows rows and their strides, no model.
//
// A row is read once and kept in registers. Its sums go by one tree that depends on its length alone: eight elements of a lane, a
// butterfly over the 32 lanes that share a segment of 256 elements, then the segments' sums: those 32 apart in order, the rest by a
// butterfly. Which warp takes which segment is free. Invariant: so a row's bits are the same whatever other rows there are and
// whichever form of the kernel was chosen for their number:
//   wide: a thread has eight elements, which is quickest for a few rows; the norm's weights are loaded before the kernel waits for
//         the one that makes its input.
//   deep: a thread has up to twice eight elements, so that few threads keep much in flight, for many rows.
//   single: as wide, but element by element, for rows that cannot be loaded in vectors.
// What exceeds the registers (rows over 8192 elements) is read again from memory instead.
#include "common/check.h"
#include "launch.h"
#include "ops.h"
#include "vec.cuh"

namespace octavo::cuda {
namespace {

constexpr int segment_size = 256;  // elements that one warp sums with one butterfly
constexpr int max_warps = 16;      // in a thread block
constexpr int deep = 2;            // times eight elements that a thread of the deep form has

struct Params {
  void* out;           // [T, N, H]
  float* scale;        // [T], for e4m3
  void* residual;      // [T, H]
  const void* x;       // [T, N, H]
  const void* weight;  // [H]
  const void* bias;    // [H] or null
  int64_t out_stride, out_inner, x_stride, x_inner, residual_stride;  // elements
  int64_t rows;                                                       // T * N
  Divider inner;                                                      // by N
  int width, segments;
  int group, fold;  // lanes that share a segment; lanes that share the segments' sums
  float inverse, last_inverse;  // 1 / H, and one over the elements of the last segment
  float eps, offset;
  DType weight_type, bias_type;
  bool vec;
};

struct None {};  // no residual

// The eight elements of a lane are neighbours. Where float32 takes part they are two quads half a segment apart, so that a warp's 16-byte
// accesses to float32 leave no gaps.
template <bool split>
constexpr int second_quad = split ? segment_size / 2 : 4;

template <bool split, bool vec, class T>
__device__ __forceinline__ void load_row(Packed<T>& v, const T* row, int first, int width) {  // row: [width]
  v.clear();
  if constexpr (!vec) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int i = first + (e < 4 ? e : second_quad<split> + e - 4);
      if (i < width) v.set(e, row[i]);
    }
  } else if constexpr (split) {
    if (first < width) load_words<sizeof(T)>(v.w, row + first);
    if (first + second_quad<split> < width) load_words<sizeof(T)>(v.w + sizeof(T), row + first + second_quad<split>);
  } else {
    if (first < width) load8(v.w, row + first);
  }
}

template <bool split, bool vec, class T>
__device__ __forceinline__ void store_row(T* row, const float* v, int first, int width) {  // row: [width]
  if constexpr (!vec) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int i = first + (e < 4 ? e : second_quad<split> + e - 4);
      if (i < width) row[i] = narrow<T>(v[e]);
    }
  } else if constexpr (split) {
    if (first < width) store4(row + first, v);
    if (first + second_quad<split> < width) store4(row + first + second_quad<split>, v + 4);
  } else {
    if (first < width) store8(row + first, v);
  }
}

// A row's weights for the segments of a thread: all loads are on their way before the first is used.
template <bool split, bool vec, int depth>
__device__ __forceinline__ void load_weight(float (&v)[depth][8], const void* row, DType type, int first, int step, int width) {  // row: [width]
  const auto load = [&](auto element) {
    using T = typename decltype(element)::type;
    Packed<T> packed[depth];
#pragma unroll
    for (int i = 0; i < depth; ++i) load_row<split, vec>(packed[i], static_cast<const T*>(row), first + i * step, width);
#pragma unroll
    for (int i = 0; i < depth; ++i) packed[i].unpack(v[i]);
  };
  if (type == f32)
    load(Type<float>{});
  else if (type == bf16)
    load(Type<Bf16>{});
  else
    load(Type<Fp16>{});
}

__device__ __forceinline__ float sum_of_squares(const float* e) {
  float low = 0.0f, high = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    low = __fmaf_rn(e[i], e[i], low);
    high = __fmaf_rn(e[4 + i], e[4 + i], high);
  }
  return __fadd_rn(low, high);
}

// One over the number of elements of a segment; only the last may have fewer than the others.
__device__ __forceinline__ float inverse_size(const Params& p, int segment) {
  return segment == p.segments - 1 ? p.last_inverse : 1.0f / segment_size;
}

template <class X, class R, class Out, bool layer, int depth, bool vec>
__global__ void __launch_bounds__(32 * max_warps, 1) norm_kernel(const Params p) {
  constexpr bool adds = !std::is_same_v<R, None>, fp8 = std::is_same_v<Out, E4m3>;
  constexpr bool split = std::is_same_v<X, float> || std::is_same_v<R, float>;
  using Stream = std::conditional_t<adds, R, X>;  // what is normed
  extern __shared__ float shared[];               // of each row of the thread block: [2 * segments + max_warps]

  dependents_start();
  const int group = depth > 1 ? 32 : p.group;  // several segments fill warps
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int warps = blockDim.x <= 32 ? 1 : static_cast<int>(blockDim.x / 32);
  const int first = warp * segment_size + lane * (split ? 4 : 8), step = warps * segment_size;  // of the thread's segments

  float w[depth][8];
  load_weight<split, vec>(w, p.weight, p.weight_type, first, step, p.width);
  float b[depth][8];
  const auto load_bias = [&] {
    if constexpr (layer) {
      if (p.bias) return load_weight<split, vec>(b, p.bias, p.bias_type, first, step, p.width);
#pragma unroll
      for (int i = 0; i < depth; ++i)
#pragma unroll
        for (int e = 0; e < 8; ++e) b[i][e] = 0.0f;
    }
  };
  if constexpr (depth == 1) load_bias();  // the deep form has no registers for it so early

  // A row past the end has no elements but takes part in the butterflies.
  const int64_t found = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool there = found < p.rows;
  const uint32_t row = there ? static_cast<uint32_t>(found) : 0;
  const int width = there ? p.width : 0;
  const uint32_t outer = p.inner(row), inner = row - outer * p.inner.by;
  const X* x = static_cast<const X*>(p.x) + outer * p.x_stride + inner * p.x_inner;
  Out* out = static_cast<Out*>(p.out) + outer * p.out_stride + inner * p.out_inner;
  [[maybe_unused]] R* residual = static_cast<R*>(p.residual) + row * p.residual_stride;

  dependency_wait();

  // The sum is rounded to the residual's type before it is normed, as the next layer will read it.
  Packed<Stream> v[depth];
  [[maybe_unused]] const auto add = [&](Packed<Stream>& stream, const Packed<X>& delta, int at) {
    float a[8], c[8];
    stream.unpack(a);
    delta.unpack(c);
#pragma unroll
    for (int e = 0; e < 8; ++e) a[e] = __fadd_rn(a[e], c[e]);
    if constexpr (adds) store_row<split, vec>(residual, a, at, width);
    stream.pack(a);
  };
  if constexpr (adds) {
    Packed<X> delta[depth];
#pragma unroll
    for (int i = 0; i < depth; ++i) {
      load_row<split, vec>(delta[i], x, first + i * step, width);
      load_row<split, vec>(v[i], residual, first + i * step, width);
    }
#pragma unroll
    for (int i = 0; i < depth; ++i) add(v[i], delta[i], first + i * step);
  } else {
#pragma unroll
    for (int i = 0; i < depth; ++i) load_row<split, vec>(v[i], x, first + i * step, width);
  }

  // Segments beyond the registers: f(segment, its place, elements), read from the residual once that has been written.
  const auto beyond = [&](bool added, const auto& f) {
#pragma unroll 1
    for (int s = warp + depth * warps; s < p.segments; s += warps) {
      const int at = first + (s - warp) * segment_size;
      Packed<Stream> more;
      if constexpr (adds) {
        load_row<split, vec>(more, residual, at, width);
        if (!added) {
          Packed<X> delta;
          load_row<split, vec>(delta, x, at, width);
          add(more, delta, at);
        }
      } else {
        load_row<split, vec>(more, x, at, width);
      }
      float e[8];
      more.unpack(e);
      f(s, at, e);
    }
  };

  // What the warps of a row tell each other, and the sum of value(segment) over the row's segments, in every thread.
  float* sums = shared + threadIdx.y * (2 * p.segments + max_warps);  // [segments]
  [[maybe_unused]] float* squares = sums + p.segments;                // [segments]
  [[maybe_unused]] float* of_warp = squares + p.segments;             // [max_warps]
  const auto fold = [&](const auto& value) {
    float sum = 0.0f;
#pragma unroll 1
    for (int s = lane & (p.fold - 1); s < p.segments; s += 32) sum = __fadd_rn(sum, value(s));
    return lanes_sum(sum, p.fold);
  };
  const auto largest = [](float most, const float* e) {
#pragma unroll
    for (int i = 0; i < 8; ++i) most = fmaxf(most, fabsf(e[i]));
    return most;
  };
  const auto largest_of_warps = [&](float most) { return warps == 1 ? most : lanes_max(lane < warps ? of_warp[lane] : 0.0f, 32); };

  float y[depth][8], mean = 0.0f, square, most = 0.0f;
  if constexpr (!layer) {
    float own[depth];
    // An 8-bit output needs the largest of x * weight; what that is divided by follows from the same sums, so one barrier does.
    const auto weighted = [&](float* e, const float* weight) {
#pragma unroll
      for (int i = 0; i < 8; ++i) e[i] = __fmul_rn(e[i], weight[i]);
      most = largest(most, e);
    };
    if (p.offset != 0.0f)
#pragma unroll
      for (int i = 0; i < depth; ++i)
#pragma unroll
        for (int e = 0; e < 8; ++e) w[i][e] += p.offset;
#pragma unroll
    for (int i = 0; i < depth; ++i) {
      v[i].unpack(y[i]);
      own[i] = sum_of_squares(y[i]);
      if constexpr (fp8)
        weighted(y[i], w[i]);
      else
        v[i].forget();
    }
#pragma unroll
    for (int i = 0; i < depth; ++i) {
      own[i] = lanes_sum(own[i], group);
      if (lane == 0 && warp + i * warps < p.segments) sums[warp + i * warps] = own[i];
    }
    beyond(false, [&](int s, int at, float* e) {
      const float one = lanes_sum(sum_of_squares(e), group);
      if (lane == 0) sums[s] = one;
      if constexpr (fp8) {
        float weight[1][8];
        load_weight<split, vec>(weight, p.weight, p.weight_type, at, 0, width);
#pragma unroll
        for (int i = 0; i < 8; ++i) weight[0][i] += p.offset;
        weighted(e, weight[0]);
      }
    });
    if constexpr (fp8) {
      most = lanes_max(most, group);
      if (lane == 0) of_warp[warp] = most;
    }
    square = own[0];
    if (p.segments > 1) {
      __syncthreads();
      square = fold([&](int s) { return sums[s]; });
    }
    if constexpr (fp8) most = largest_of_warps(most);
  } else {
    // The moments of the segments, each about its own mean, and then those of the row (Chan, Golub and LeVeque, Updating Formulae, 1979):
    // no cancellation, and one barrier.
    const auto moments = [&](const float* e, int s, int at, float& sum, float& about) {
      const float low = __fadd_rn(__fadd_rn(e[0], e[1]), __fadd_rn(e[2], e[3])), high = __fadd_rn(__fadd_rn(e[4], e[5]), __fadd_rn(e[6], e[7]));
      sum = lanes_sum(__fadd_rn(low, high), group);
      const float center = __fmul_rn(sum, inverse_size(p, s));
      float d[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {  // what lies past the end counts as no distance; with vectors that is a quad or none
        const int quad = i < 4 ? at : at + second_quad<split>;
        d[i] = (vec ? quad : quad + i % 4) < width ? __fsub_rn(e[i], center) : 0.0f;
      }
      about = lanes_sum(sum_of_squares(d), group);
    };
    float sum[depth], about[depth];
#pragma unroll
    for (int i = 0; i < depth; ++i) {
      const int s = warp + i * warps;
      v[i].unpack(y[i]);
      moments(y[i], s, first + i * step, sum[i], about[i]);
      v[i].forget();
      if (lane == 0 && s < p.segments) sums[s] = sum[i], squares[s] = about[i];
    }
    beyond(false, [&](int s, int at, float* e) {
      float one, two;
      moments(e, s, at, one, two);
      if (lane == 0) sums[s] = one, squares[s] = two;
    });
    mean = __fmul_rn(sum[0], p.inverse);
    square = about[0];
    if (p.segments > 1) {
      __syncthreads();
      mean = __fmul_rn(fold([&](int s) { return sums[s]; }), p.inverse);
      square = fold([&](int s) {
        const float size = static_cast<float>(min(segment_size, p.width - s * segment_size));
        const float apart = __fsub_rn(__fmul_rn(sums[s], inverse_size(p, s)), mean);
        return __fmaf_rn(__fmul_rn(apart, apart), size, squares[s]);
      });
    }
  }
  const float factor = rsqrtf(__fmaf_rn(square, p.inverse, p.eps));

  // Past the end of the row everything is zero, weights and bias too, and stays it.
  const auto norm = [&](float* e, const float* weight, const float* bias, float by) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if constexpr (layer)
        e[i] = __fmaf_rn(__fmul_rn(__fsub_rn(e[i], mean), by), weight[i], bias[i]);
      else
        e[i] = __fmul_rn(__fmul_rn(e[i], by), weight[i]);
    }
  };
  const auto norm_beyond = [&](float* e, int at, float by) {
    float weight[1][8], bias[1][8] = {};
    load_weight<split, vec>(weight, p.weight, p.weight_type, at, 0, width);
    if (layer && p.bias) load_weight<split, vec>(bias, p.bias, p.bias_type, at, 0, width);
    if constexpr (!layer)
#pragma unroll
      for (int i = 0; i < 8; ++i) weight[0][i] += p.offset;
    norm(e, weight[0], bias[0], by);
  };
  if constexpr (depth > 1) load_bias();
  if constexpr (!fp8 || layer) {
#pragma unroll
    for (int i = 0; i < depth; ++i) {
      v[i].unpack(y[i]);
      norm(y[i], w[i], b[i], factor);
      if constexpr (!fp8) store_row<split, vec>(out, y[i], first + i * step, width);
    }
    beyond(true, [&](int, int at, float* e) {
      norm_beyond(e, at, factor);
      if constexpr (fp8)
        most = largest(most, e);
      else
        store_row<split, vec>(out, e, at, width);
    });
  }
  if constexpr (fp8) {
    if constexpr (layer) {
#pragma unroll
      for (int i = 0; i < depth; ++i) most = largest(most, y[i]);
      most = lanes_max(most, group);
      if (lane == 0) of_warp[warp] = most;
      if (warps > 1) __syncthreads();
      most = largest_of_warps(most);
    }
    const float size = layer ? most : __fmul_rn(most, factor);
    if (there && threadIdx.x == 0) p.scale[row] = size > 0.0f ? __fdiv_rn(size, e4m3_max) : 1.0f;
    const float to_e4m3 = e4m3_factor(most);
    const auto store = [&](float* e, int at) {
#pragma unroll
      for (int i = 0; i < 8; ++i) e[i] = __fmul_rn(e[i], to_e4m3);
      store_row<split, vec>(out, e, at, width);
    };
#pragma unroll
    for (int i = 0; i < depth; ++i) store(y[i], first + i * step);
    beyond(true, [&](int, int at, float* e) {
      norm_beyond(e, at, layer ? factor : 1.0f);
      store(e, at);
    });
  }
}

// How many threads a row gets. The form is free (see the head of this file); it depends on the number of rows and on the device.
struct Shape {
  bool deep_form;
  dim3 grid, block;
  size_t shared;
};

int power_of_two(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

Shape choose(const Params& p) {
  const int segments = p.segments;
  const bool one_wave = p.rows * segments <= 32 * int64_t{device().num_sms};  // 1024 threads for each multiprocessor
  const bool deep_form = segments > 1 && p.vec && (!one_wave || segments > max_warps);
  const int warps = deep_form ? (segments + deep - 1) / deep : segments;
  const int threads = segments == 1 ? p.group : 32 * (warps < max_warps ? warps : max_warps);
  const int rows = threads <= 32 ? 128 / threads : 1;
  return {deep_form, dim3(static_cast<unsigned>((p.rows + rows - 1) / rows)), dim3(threads, rows), rows * (2 * segments + max_warps) * sizeof(float)};
}

template <class X, class R, class Out, bool layer>
void start(const char* op, const Params& p) {
  const Shape shape = choose(p);
  const auto kernel = shape.deep_form ? norm_kernel<X, R, Out, layer, deep, true>
                      : p.vec         ? norm_kernel<X, R, Out, layer, 1, true>
                                      : norm_kernel<X, R, Out, layer, 1, false>;
  launch(op, kernel, shape.grid, shape.block, shape.shared, current_stream(), p);
}

struct Call {
  const char* op;
  const Tensor& out;
  const Tensor* scale;
  const Tensor* residual;
  const Tensor& x;
  const Tensor& weight;
  const Tensor* bias;
  double eps, offset;
};

Params check_norm(const Call& call) {
  const auto& [op, out, scale, residual, x, weight, bias, eps, offset] = call;
  Contract c(op);
  const bool heads = x.ndim == 3 && !scale && !residual;
  const char* shape = heads ? "TNH" : "TH";
  c.tensor("x", x, shape, storage_types, last_only);
  if (residual) c.tensor("residual", *residual, shape, f32 | x.dtype, last_only);
  // A float32 stream may be normed into any activation: what the first layer of a model reads.
  c.tensor("out", out, shape, scale ? e4m3 : x.dtype == f32 && !residual ? storage_types : x.dtype, last_only);
  if (scale) c.tensor("scale", *scale, "T", f32);
  c.tensor("weight", weight, "H", storage_types);
  if (bias) c.tensor("bias", *bias, "H", storage_types);
  const int64_t width = c['H'], inner = heads ? c['N'] : 1, rows = c['T'] * inner;
  c.require(width <= 1 << 20, "rows of %lld elements are longer than the 1048576 that are supported", static_cast<long long>(width));
  c.require(rows < int64_t{1} << 31, "%lld rows are more than the 2147483647 that are supported", static_cast<long long>(rows));

  Params p = {};
  p.out = out.data;
  p.scale = scale ? scale->ptr<float>() : nullptr;
  p.residual = residual ? residual->data : nullptr;
  p.x = x.data;
  p.weight = weight.data;
  p.bias = bias ? bias->data : nullptr;
  p.out_stride = out.stride[0];
  p.out_inner = heads ? out.stride[1] : 0;
  p.x_stride = x.stride[0];
  p.x_inner = heads ? x.stride[1] : 0;
  p.residual_stride = residual ? residual->stride[0] : 0;
  p.rows = width == 0 ? 0 : rows;
  p.inner = Divider(inner > 0 ? inner : 1);
  p.width = static_cast<int>(width);
  p.segments = (p.width + segment_size - 1) / segment_size;
  const bool split = x.dtype == f32 || (residual && residual->dtype == f32);
  const int lanes = (p.width + (split ? 4 : 8) - 1) / (split ? 4 : 8);
  p.group = lanes < 32 ? power_of_two(lanes) : 32;
  p.fold = p.segments < 32 ? power_of_two(p.segments) : 32;
  p.inverse = 1.0f / static_cast<float>(width > 0 ? width : 1);
  p.last_inverse = 1.0f / static_cast<float>(width > 0 ? p.width - (p.segments - 1) * segment_size : 1);
  p.eps = static_cast<float>(eps);
  p.offset = static_cast<float>(offset);
  p.weight_type = weight.dtype;
  p.bias_type = bias ? bias->dtype : f32;
  p.vec = width % 8 == 0 && aligned(x, 16, p.x_stride, p.x_inner) && aligned(out, scale ? 8 : 16, p.out_stride, p.out_inner) &&
          (!residual || aligned(*residual, 16, p.residual_stride)) && aligned(weight, 16, 0) && (!bias || aligned(*bias, 16, 0));
  return p;
}

template <class X, class R, bool layer>
void start_out(const Call& call, const Params& p) {
  if (call.scale) {
    if constexpr (!layer || std::is_same_v<R, None>) start<X, R, E4m3, layer>(call.op, p);
  } else if (call.out.dtype == call.x.dtype) {
    start<X, R, X, layer>(call.op, p);
  } else if constexpr (std::is_same_v<X, float> && std::is_same_v<R, None>) {
    if (call.out.dtype == bf16)
      start<X, R, Bf16, layer>(call.op, p);
    else
      start<X, R, Fp16, layer>(call.op, p);
  }
}

template <bool layer>
void run(const Call& call) {
  const Params p = check_norm(call);
  if (p.rows == 0) return;
  with_act(call.x.dtype, [&](auto x) {
    using X = typename decltype(x)::type;
    if (!call.residual)
      start_out<X, None, layer>(call, p);
    else if (call.residual->dtype == f32)
      start_out<X, float, layer>(call, p);
    else
      start_out<X, X, layer>(call, p);
  });
}

}  // namespace

void rms_norm(const Tensor& out, const Tensor& x, const Tensor& weight, double eps, double offset) {
  run<false>({"rms_norm", out, nullptr, nullptr, x, weight, nullptr, eps, offset});
}

void add_rms_norm(const Tensor& out, const Tensor& residual, const Tensor& x, const Tensor& weight, double eps, double offset) {
  run<false>({"add_rms_norm", out, nullptr, &residual, x, weight, nullptr, eps, offset});
}

void layer_norm(const Tensor& out, const Tensor& x, const Tensor& weight, const Tensor* bias, double eps) {
  run<true>({"layer_norm", out, nullptr, nullptr, x, weight, bias, eps, 0});
}

void add_layer_norm(const Tensor& out, const Tensor& residual, const Tensor& x, const Tensor& weight, const Tensor* bias, double eps) {
  run<true>({"add_layer_norm", out, nullptr, &residual, x, weight, bias, eps, 0});
}

void rms_norm_fp8(const Tensor& out, const Tensor& scale, const Tensor& x, const Tensor& weight, double eps, double offset) {
  run<false>({"rms_norm_fp8", out, &scale, nullptr, x, weight, nullptr, eps, offset});
}

void add_rms_norm_fp8(const Tensor& out, const Tensor& scale, const Tensor& residual, const Tensor& x, const Tensor& weight, double eps,
                      double offset) {
  run<false>({"add_rms_norm_fp8", out, &scale, &residual, x, weight, nullptr, eps, offset});
}

void layer_norm_fp8(const Tensor& out, const Tensor& scale, const Tensor& x, const Tensor& weight, const Tensor* bias, double eps) {
  run<true>({"layer_norm_fp8", out, &scale, nullptr, x, weight, bias, eps, 0});
}

}  // namespace octavo::cuda
