// Chooses the instance of the decode kernel for a head_dim and a number of rows, its stages and its grid. Every file of instances includes
// it; it does not know which type its own instances have.
#pragma once

#include "attention_decode.cuh"

namespace octavo::cuda {

template <class T, bool fp8, int dim, int row_groups>
void launch_decode_instance(const AttentionParams& p, DecodeLaunch d, cudaStream_t stream) {
  constexpr int stage_bytes = decode_warps * 2 * tile_tokens * dim * (fp8 ? 1 : 2), fixed = decode_fixed_bytes(dim, row_groups);
  const int per_block = device().shared_per_sm / decode_residents(dim) - 1024;  // a thread block's reserve is 1 KiB
  const int room = (per_block < device().shared_per_block ? per_block : device().shared_per_block) - fixed;
  d.stages = room / stage_bytes < 4 ? room / stage_bytes : 4;
  d.slots = p.partials_size / (int64_t{p.kv_heads} * partial_floats(dim, row_groups));
  launch("paged_attention", decode_kernel<T, fp8, dim, row_groups>, dim3(p.kv_heads * d.ranges), dim3(decode_threads),
         fixed + d.stages * stage_bytes, stream, p, d);
}

template <class T, bool fp8>
void launch_decode_instance(const AttentionParams& p, const DecodeLaunch& d, cudaStream_t stream) {
  const int dim = decode_dim(p.head_dim);
  const int rows = p.heads / p.kv_heads * (p.max_query < decode_queries ? p.max_query : decode_queries);
  const int groups = decode_row_groups(rows, dim);
  if (dim == 64) {
    if (groups == 1) launch_decode_instance<T, fp8, 64, 1>(p, d, stream);
    else if (groups == 2) launch_decode_instance<T, fp8, 64, 2>(p, d, stream);
    else launch_decode_instance<T, fp8, 64, 4>(p, d, stream);
  } else if (dim == 128) {
    if (groups == 1) launch_decode_instance<T, fp8, 128, 1>(p, d, stream);
    else if (groups == 2) launch_decode_instance<T, fp8, 128, 2>(p, d, stream);
    else launch_decode_instance<T, fp8, 128, 4>(p, d, stream);
  } else {
    launch_decode_instance<T, fp8, 256, 1>(p, d, stream);
  }
}

}  // namespace octavo::cuda
