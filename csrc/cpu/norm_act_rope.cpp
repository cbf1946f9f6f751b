// The pointwise operators: norms (alone and after the residual add), rotary positions, activations. Rows are shared out to
// threads only where there is enough work. Invariant: a row is reduced in one order that depends on its length alone, and
// an element is computed from its own row alone, so neither the batch nor the threads change a bit.
#include <cmath>

#include "../common/check.h"
#include "../ops.h"
#include "parallel.h"
#include "vec.h"

namespace octavo::OCTAVO_ISA {
namespace {

// Rows one thread should get at least, for rows of `width` elements: below that a thread costs more than it saves.
constexpr int64_t grain(int64_t width) {
  constexpr int64_t elements = 32768;
  return width >= elements ? 1 : elements / (width > 0 ? width : 1);
}

// The last dimension of a tensor of two or three, row by row.
struct Rows {
  float* data;  // [T, H] or [T, N, H]
  int64_t inner, outer_stride, inner_stride;

  explicit Rows(const Tensor& t)
      : data(t.ptr<float>()), inner(t.ndim == 3 ? t.size[1] : 1), outer_stride(t.stride[0]), inner_stride(t.ndim == 3 ? t.stride[1] : 0) {}
  float* operator[](int64_t i) const { return inner == 1 ? data + i * outer_stride : data + i / inner * outer_stride + i % inner * inner_stride; }
};

// Calls f with a typed pointer to a weight.
template <class F>
void with_storage(const Tensor& t, const F& f) {
  if (t.dtype == f32) return f(t.ptr<const float>());
  if (t.dtype == bf16) return f(t.ptr<const BFloat16>());
  f(t.ptr<const Float16>());
}

// The sum of term(x) over a row: four accumulators in turn, then the rest, then one tree.
template <class Term>
float sum_row(const float* x, int64_t width, const Term& term) {  // [width]
  Vec a = broadcast(0), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * lanes <= width; i += 4 * lanes) {
    a = a + term(load(x + i));
    b = b + term(load(x + i + lanes));
    c = c + term(load(x + i + 2 * lanes));
    d = d + term(load(x + i + 3 * lanes));
  }
  for (; i + lanes <= width; i += lanes) a = a + term(load(x + i));
  if (i < width) b = b + select(first(width - i), term(load(x + i, width - i)), broadcast(0));
  return reduce_add((a + b) + (c + d));
}

// out[i] = f(i, x[i]) for whole vectors, then for what is left; f gets the index and how many lanes count.
template <class F>
void map_row(float* out, const float* x, int64_t width, const F& f) {  // [width], [width]
  int64_t i = 0;
  for (; i + lanes <= width; i += lanes) store(out + i, f(i, lanes, load(x + i)));
  if (i < width) store(out + i, f(i, width - i, load(x + i, width - i)), width - i);
}

template <class W>
void rms_row(float* out, const float* x, const W* weight, int64_t width, float eps, float offset) {  // [H] each
  const float square = sum_row(x, width, [](Vec v) { return v * v; });
  const Vec scale = broadcast(1.0f / std::sqrt(square / static_cast<float>(width) + eps));
  const Vec shift = broadcast(offset);
  map_row(out, x, width, [&](int64_t i, int64_t count, Vec v) {
    const Vec w = count == lanes ? load(weight + i) : load(weight + i, count);
    return v * scale * (w + shift);
  });
}

template <class W, class B>
void layer_row(float* out, const float* x, const W* weight, const B* bias, int64_t width, float eps) {  // [H] each
  const float mean = sum_row(x, width, [](Vec v) { return v; }) / static_cast<float>(width);
  const Vec center = broadcast(mean);
  const float square = sum_row(x, width, [&](Vec v) { return (v - center) * (v - center); });
  const Vec scale = broadcast(1.0f / std::sqrt(square / static_cast<float>(width) + eps));
  map_row(out, x, width, [&](int64_t i, int64_t count, Vec v) {
    const Vec w = count == lanes ? load(weight + i) : load(weight + i, count);
    const Vec y = (v - center) * scale;
    if (!bias) return y * w;
    return fma(y, w, count == lanes ? load(bias + i) : load(bias + i, count));
  });
}

void add_row(float* residual, const float* x, int64_t width) {  // [H], [H]
  map_row(residual, x, width, [&](int64_t i, int64_t count, Vec v) { return (count == lanes ? load(residual + i) : load(residual + i, count)) + v; });
}

void rms_rows(const Tensor& out, const Tensor* residual, const Tensor& x, const Tensor& weight, int64_t rows, double eps, double offset) {
  const int64_t width = weight.size[0];
  const Rows to(out), from(x), stream(residual ? *residual : x);
  with_storage(weight, [&](const auto* w) {
    parallel_for(rows, grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (residual) add_row(stream[i], from[i], width);
        rms_row(to[i], stream[i], w, width, static_cast<float>(eps), static_cast<float>(offset));
      }
    });
  });
}

void layer_rows(const Tensor& out, const Tensor* residual, const Tensor& x, const Tensor& weight, const Tensor* bias, int64_t rows, double eps) {
  const int64_t width = weight.size[0];
  const Rows to(out), from(x), stream(residual ? *residual : x);
  with_storage(weight, [&](const auto* w) {
    with_storage(bias ? *bias : weight, [&](const auto* b) {
      parallel_for(rows, grain(width), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          if (residual) add_row(stream[i], from[i], width);
          layer_row(to[i], stream[i], w, bias ? b : nullptr, width, static_cast<float>(eps));
        }
      });
    });
  });
}

// Binds T, H (and N where there are three dimensions) and returns how many rows of H there are.
int64_t check_norm(Contract& c, const Tensor& out, const Tensor& x, const Tensor& weight, const Tensor* bias) {
  const bool heads = x.ndim == 3;
  c.tensor("x", x, heads ? "TNH" : "TH", f32, last_only);
  c.tensor("out", out, heads ? "TNH" : "TH", f32, last_only);
  c.tensor("weight", weight, "H", storage_types);
  if (bias) c.tensor("bias", *bias, "H", storage_types);
  return c['H'] == 0 ? 0 : c['T'] * (heads ? c['N'] : 1);
}

int64_t check_add_norm(Contract& c, const Tensor& out, const Tensor& residual, const Tensor& x, const Tensor& weight, const Tensor* bias) {
  c.tensor("x", x, "TH", f32, last_only);
  c.tensor("residual", residual, "TH", f32, last_only);
  c.tensor("out", out, "TH", f32, last_only);
  c.tensor("weight", weight, "H", storage_types);
  if (bias) c.tensor("bias", *bias, "H", storage_types);
  return c['H'] == 0 ? 0 : c['T'];
}

// Turns the pairs (i, i + half) of one head.
void rotate_halves(float* x, const float* cos, const float* sin, int64_t half) {  // [2 half], [half], [half]
  int64_t i = 0;
  for (; i + lanes <= half; i += lanes) {
    const Vec a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(x + i, fma(a, c, -(b * s)));
    store(x + half + i, fma(b, c, a * s));
  }
  if (const int64_t rest = half - i; rest > 0) {
    const Vec a = load(x + i, rest), b = load(x + half + i, rest), c = load(cos + i, rest), s = load(sin + i, rest);
    store(x + i, fma(a, c, -(b * s)), rest);
    store(x + half + i, fma(b, c, a * s), rest);
  }
}

// Turns the pairs (2 i, 2 i + 1) of one head.
void rotate_neighbours(float* __restrict x, const float* __restrict cos, const float* __restrict sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cos[i] - b * sin[i];
    x[2 * i + 1] = b * cos[i] + a * sin[i];
  }
}

Vec sigmoid_times(Vec x, Vec u) { return x / (broadcast(1) + exp(-u)); }

struct Silu {
  Vec operator()(Vec x) const { return sigmoid_times(x, x); }
};
struct GeluTanh {  // 0.5 (1 + tanh(u)) = sigmoid(2 u)
  Vec operator()(Vec x) const {
    const Vec cubic = fma(x * x * x, broadcast(0.044715f), x);
    return sigmoid_times(x, cubic * broadcast(1.59576912160573071f));  // 2 sqrt(2 / pi)
  }
};
struct Gelu {
  // erfc(z) = e^(-z^2) t p(t) with t = 1 / (1 + 0.4 z): a least-maximum fit of p, within 2.6e-7 of erfc relative to its size
  Vec operator()(Vec x) const {
    const Vec z = abs(x) * broadcast(0.707106781186547524f);
    const Vec t = broadcast(1) / fma(z, broadcast(0.4f), broadcast(1));
    Vec p = broadcast(0.0502621308f);
    p = fma(p, t, broadcast(-0.182901487f));
    p = fma(p, t, broadcast(0.169085458f));
    p = fma(p, t, broadcast(-0.00560755981f));
    p = fma(p, t, broadcast(0.141431436f));
    p = fma(p, t, broadcast(0.168541983f));
    p = fma(p, t, broadcast(0.207842693f));
    p = fma(p, t, broadcast(0.225669593f));
    p = fma(p, t, broadcast(0.225675866f));
    const Vec half = p * t * exp(-(z * z)) * broadcast(0.5f);  // half of erfc(|x| / sqrt(2))
    return x * select(less(x, broadcast(0)), half, broadcast(1) - half);
  }
};
struct Relu {
  Vec operator()(Vec x) const { return max(broadcast(0), x); }  // NaN stays
};

// Calls f with the activation of that name.
template <class F>
void with_kind(const Contract& c, std::string_view kind, const F& f) {
  if (kind == "silu") return f(Silu{});
  if (kind == "gelu") return f(Gelu{});
  if (kind == "gelu_tanh") return f(GeluTanh{});
  c.require(kind == "relu", "kind must be silu, gelu, gelu_tanh or relu, got '%.*s'", static_cast<int>(kind.size()), kind.data());
  f(Relu{});
}

}  // namespace

void rms_norm(const Tensor& out, const Tensor& x, const Tensor& weight, double eps, double offset) {
  Contract c("rms_norm");
  const int64_t rows = check_norm(c, out, x, weight, nullptr);
  rms_rows(out, nullptr, x, weight, rows, eps, offset);
}

void add_rms_norm(const Tensor& out, const Tensor& residual, const Tensor& x, const Tensor& weight, double eps, double offset) {
  Contract c("add_rms_norm");
  const int64_t rows = check_add_norm(c, out, residual, x, weight, nullptr);
  rms_rows(out, &residual, x, weight, rows, eps, offset);
}

void layer_norm(const Tensor& out, const Tensor& x, const Tensor& weight, const Tensor* bias, double eps) {
  Contract c("layer_norm");
  const int64_t rows = check_norm(c, out, x, weight, bias);
  layer_rows(out, nullptr, x, weight, bias, rows, eps);
}

void add_layer_norm(const Tensor& out, const Tensor& residual, const Tensor& x, const Tensor& weight, const Tensor* bias, double eps) {
  Contract c("add_layer_norm");
  const int64_t rows = check_add_norm(c, out, residual, x, weight, bias);
  layer_rows(out, &residual, x, weight, bias, rows, eps);
}

void rope(const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& cos_sin, bool interleaved) {
  Contract c("rope");
  c.tensor("q", q, "TQD", f32, octavo::rows);
  c.tensor("k", k, "THD", f32, octavo::rows);
  c.tensor("positions", positions, "T", i64);
  c.tensor("cos_sin", cos_sin, "PR", f32);
  const int64_t dim = c['D'], rotary = c['R'], half = rotary / 2;
  c.require(rotary % 2 == 0 && rotary <= dim, "rotary_dim must be even and at most head_dim %lld, got %lld", static_cast<long long>(dim),
            static_cast<long long>(rotary));
  const int64_t* at = positions.ptr<const int64_t>();  // [T]
  for (int64_t t = 0; t < c['T']; ++t)
    c.require(at[t] >= 0 && at[t] < c['P'], "position %lld of token %lld is outside the table of %lld", static_cast<long long>(at[t]),
              static_cast<long long>(t), static_cast<long long>(c['P']));

  const auto rotate = interleaved ? rotate_neighbours : rotate_halves;
  parallel_for(c['T'], grain((c['Q'] + c['H']) * rotary), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* cos = cos_sin.ptr<const float>() + at[t] * rotary;
      for (const Tensor* x : {&q, &k}) {
        float* head = x->ptr<float>() + t * x->stride[0];
        for (int64_t h = 0; h < x->size[1]; ++h, head += dim) rotate(head, cos, cos + half, half);
      }
    }
  });
}

void gated_activation(const Tensor& out, const Tensor& x, std::string_view kind) {
  Contract c("gated_activation");
  c.tensor("out", out, "TD", f32, octavo::rows);
  c.tensor("x", x, "TE", f32, octavo::rows);
  const int64_t width = c['D'];
  c.require(c['E'] == 2 * width, "x must have twice the %lld columns of out, got %lld", static_cast<long long>(width), static_cast<long long>(c['E']));
  const Rows to(out), from(x);
  with_kind(c, kind, [&](const auto act) {
    parallel_for(c['T'], grain(4 * width), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const float* up = from[t] + width;
        map_row(to[t], from[t], width, [&](int64_t i, int64_t count, Vec v) { return act(v) * (count == lanes ? load(up + i) : load(up + i, count)); });
      }
    });
  });
}

void activation(const Tensor& out, const Tensor& x, std::string_view kind) {
  Contract c("activation");
  c.tensor("out", out, "TD", f32, octavo::rows);
  c.tensor("x", x, "TD", f32, octavo::rows);
  const int64_t width = c['D'];
  const Rows to(out), from(x);
  with_kind(c, kind, [&](const auto act) {
    parallel_for(c['T'], grain(4 * width), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) map_row(to[t], from[t], width, [&](int64_t, int64_t, Vec v) { return act(v); });
    });
  });
}

}  // namespace octavo::OCTAVO_ISA
