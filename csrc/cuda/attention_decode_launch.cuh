// Chooses the instance of the decode kernel for a head_dim and a number of rows, its ring and its grid. Every file of instances includes
// it; it does not know which type its own instances have.
#pragma once

#include <stdexcept>

#include "attention_decode.cuh"

namespace octavo::cuda {

template <class T, bool fp8, int dim, int row_groups>
void launch_decode_instance(const AttentionParams& p, DecodeLaunch d, cudaStream_t stream) {
  constexpr int place_bytes = decode_warps * decode_tile(dim, fp8) * dim * (fp8 ? 1 : 2), fixed = decode_fixed_bytes(dim, row_groups);
  // Two places are filled while the third is used; more only where they are small, because the first step waits until all are found.
  constexpr int most = place_bytes < 32768 ? 5 : 3;
  static_assert((most + 1) / 2 + 2 <= query_buffers(dim, row_groups), "steps that are loaded ahead must be known, so their queries must have room");
  const int room = (device().shared_per_block - fixed) / place_bytes;
  d.places = room >= most ? most : (room - 1) / 2 * 2 + 1;
  if (room < 1) throw std::runtime_error("paged_attention: the device has too little shared memory");
  d.slots = p.partials_size / (int64_t{p.kv_heads} * partial_floats(dim, row_groups));
  const int blocks = p.work ? device().num_sms : p.kv_heads * p.num_seqs;
  launch("paged_attention", decode_kernel<T, fp8, dim, row_groups>, dim3(blocks), dim3(decode_threads), fixed + d.places * place_bytes, stream, p, d);
}

template <class T, bool fp8>
void launch_decode_instance(const AttentionParams& p, const DecodeLaunch& d, cudaStream_t stream) {
  const int dim = decode_dim(p.head_dim);
  const int rows = p.heads / p.kv_heads * (p.max_query < decode_queries ? p.max_query : decode_queries);
  const int groups = decode_row_groups(rows, dim);
  if (dim == 64) {
    if (groups == 1) launch_decode_instance<T, fp8, 64, 1>(p, d, stream);
    else launch_decode_instance<T, fp8, 64, 2>(p, d, stream);
  } else if (dim == 128) {
    if (groups == 1) launch_decode_instance<T, fp8, 128, 1>(p, d, stream);
    else launch_decode_instance<T, fp8, 128, 2>(p, d, stream);
  } else {
    launch_decode_instance<T, fp8, 256, 1>(p, d, stream);
  }
}

}  // namespace octavo::cuda
