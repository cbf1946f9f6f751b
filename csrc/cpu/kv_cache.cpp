// The blocks of the KV cache: writing new keys and values, reading them back, copying blocks within a pool and between
// pools. Owns no layout beyond [blocks, block_size, heads, head_dim]; knows no requests. Invariant: every slot and block
// number is checked before anything is written, so a call that fails has changed nothing.
#include <cstring>

#include "../common/check.h"
#include "../ops.h"
#include "parallel.h"
#include "vec.h"

namespace octavo::OCTAVO_ISA {
namespace {

constexpr int64_t grain_elements = 16384;  // below this a thread costs more than it brings

int64_t grain(int64_t elements_of_one) { return elements_of_one >= grain_elements ? 1 : grain_elements / (elements_of_one + 1) + 1; }

// Checks what write_kv and gather_kv share; returns [T, H, D] as T and H * D.
struct Slots {
  int64_t tokens, width;
};
Slots check(const char* op, const Tensor& key, const Tensor& value, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots,
            double k_scale, double v_scale) {
  Contract c(op);
  c.tensor("key", key, "THD", f32, rows);
  c.tensor("value", value, "THD", f32, rows);
  c.tensor("k_cache", k_cache, "BSHD", storage_types);
  c.tensor("v_cache", v_cache, "BSHD", k_cache.dtype);
  c.tensor("slots", slots, "T", i64);
  c.require(k_scale == 1 && v_scale == 1, "k_scale = %g and v_scale = %g, but a cache of this type has no scales", k_scale, v_scale);
  const int64_t num_slots = c['B'] * c['S'];
  const int64_t* slot = slots.ptr<int64_t>();
  for (int64_t t = 0; t < c['T']; ++t)
    c.require(slot[t] >= -1 && slot[t] < num_slots, "slots[%lld] = %lld, but the cache has %lld slots (and -1 means none)", static_cast<long long>(t),
              static_cast<long long>(slot[t]), static_cast<long long>(num_slots));
  return {c['T'], c['H'] * c['D']};
}

template <class T>
void narrow_row(T* to, const float* from, int64_t count) {
  if constexpr (sizeof(T) == sizeof(float)) {
    std::memcpy(to, from, sizeof(float) * static_cast<size_t>(count));
  } else {
    for (int64_t i = 0; i < count; i += lanes) store_as(to + i, load(from + i, count - i), count - i);
  }
}

template <class T>
void widen_row(float* to, const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += lanes) store(to + i, load(from + i, count - i), count - i);
}

template <class T>
void write_rows(const Tensor& from, const Tensor& cache, const int64_t* slots, int64_t width, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t)
    if (slots[t] >= 0) narrow_row(cache.ptr<T>() + slots[t] * width, from.ptr<float>() + t * from.stride[0], width);
}

template <class T>
void read_rows(const Tensor& to, const Tensor& cache, const int64_t* slots, int64_t width, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    float* row = to.ptr<float>() + t * to.stride[0];
    if (slots[t] >= 0)
      widen_row(row, cache.ptr<const T>() + slots[t] * width, width);
    else
      std::memset(row, 0, sizeof(float) * static_cast<size_t>(width));
  }
}

// Copies blocks pairs[i] = (source, destination) in every layer, keys and values.
void copy_pairs(const Tensor& src, const Tensor& dst, const int32_t* pairs, int64_t num_pairs) {
  const int64_t planes = src.size[0] * 2;  // [L, 2]
  const int64_t block_bytes = src.size[3] * src.size[4] * src.size[5] * src.item_size;
  const int64_t src_plane = src.size[2] * block_bytes;
  const int64_t dst_plane = dst.size[2] * block_bytes;
  parallel_for(planes * num_pairs, grain(block_bytes / 4), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t plane = i / num_pairs;
      const int32_t* pair = pairs + 2 * (i % num_pairs);
      std::memcpy(dst.ptr<char>() + plane * dst_plane + pair[1] * block_bytes, src.ptr<const char>() + plane * src_plane + pair[0] * block_bytes,
                  static_cast<size_t>(block_bytes));
    }
  });
}

void check_pairs(const Contract& c, const int32_t* pairs, int64_t num_pairs, int64_t src_blocks, int64_t dst_blocks) {
  for (int64_t i = 0; i < num_pairs; ++i)
    c.require(pairs[2 * i] >= 0 && pairs[2 * i] < src_blocks && pairs[2 * i + 1] >= 0 && pairs[2 * i + 1] < dst_blocks,
              "pairs[%lld] = (%d, %d), but there are %lld source and %lld destination blocks", static_cast<long long>(i), pairs[2 * i], pairs[2 * i + 1],
              static_cast<long long>(src_blocks), static_cast<long long>(dst_blocks));
}

// Marks the destinations in a byte per block; two copies into one block would race.
char* mark_destinations(const Contract& c, const int32_t* pairs, int64_t num_pairs, int64_t dst_blocks) {
  auto* role = static_cast<char*>(scratch(0, dst_blocks));
  std::memset(role, 0, static_cast<size_t>(dst_blocks));
  for (int64_t i = 0; i < num_pairs; ++i) {
    c.require(!role[pairs[2 * i + 1]], "block %d is a destination twice", pairs[2 * i + 1]);
    role[pairs[2 * i + 1]] = 1;
  }
  return role;
}

}  // namespace

void write_kv(const Tensor& key, const Tensor& value, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots, double k_scale,
             double v_scale) {
  const auto [tokens, width] = check("write_kv", key, value, k_cache, v_cache, slots, k_scale, v_scale);
  const int64_t* slot = slots.ptr<int64_t>();
  parallel_for(tokens, grain(2 * width), [&, width = width](int64_t begin, int64_t end) {
    const auto both = [&](auto write) {
      write(key, k_cache, slot, width, begin, end);
      write(value, v_cache, slot, width, begin, end);
    };
    if (k_cache.dtype == f32)
      both(write_rows<float>);
    else if (k_cache.dtype == bf16)
      both(write_rows<BFloat16>);
    else
      both(write_rows<Float16>);
  });
}

void gather_kv(const Tensor& key, const Tensor& value, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots, double k_scale,
              double v_scale) {
  const auto [tokens, width] = check("gather_kv", key, value, k_cache, v_cache, slots, k_scale, v_scale);
  const int64_t* slot = slots.ptr<int64_t>();
  parallel_for(tokens, grain(2 * width), [&, width = width](int64_t begin, int64_t end) {
    const auto both = [&](auto read) {
      read(key, k_cache, slot, width, begin, end);
      read(value, v_cache, slot, width, begin, end);
    };
    if (k_cache.dtype == f32)
      both(read_rows<float>);
    else if (k_cache.dtype == bf16)
      both(read_rows<BFloat16>);
    else
      both(read_rows<Float16>);
  });
}

void copy_blocks(const Tensor& kv, const Tensor& pairs) {
  Contract c("copy_blocks");
  c.tensor("kv", kv, "L2BSHD", any_type);
  c.tensor("pairs", pairs, "N2", i32);
  const int32_t* pair = pairs.ptr<int32_t>();
  check_pairs(c, pair, c['N'], c['B'], c['B']);
  if (c['N'] == 0) return;
  // Destinations are written once and no source is a destination, so the order of the copies cannot matter.
  const char* role = mark_destinations(c, pair, c['N'], c['B']);
  for (int64_t i = 0; i < c['N']; ++i) c.require(!role[pair[2 * i]], "block %d is both a source and a destination", pair[2 * i]);
  copy_pairs(kv, kv, pair, c['N']);
}

void swap_blocks(const Tensor& src, const Tensor& dst, const Tensor& pairs) {
  Contract c("swap_blocks");
  c.tensor("src", src, "L2ASHD", any_type);
  c.tensor("dst", dst, "L2BSHD", src.dtype);
  c.tensor("pairs", pairs, "N2", i32);
  c.require(src.item_size == dst.item_size, "src and dst have items of %lld and %lld bytes", static_cast<long long>(src.item_size),
            static_cast<long long>(dst.item_size));
  check_pairs(c, pairs.ptr<int32_t>(), c['N'], c['A'], c['B']);
  if (c['N'] == 0) return;
  mark_destinations(c, pairs.ptr<int32_t>(), c['N'], c['B']);
  copy_pairs(src, dst, pairs.ptr<int32_t>(), c['N']);
}

}  // namespace octavo::OCTAVO_ISA
