"""The paged KV cache: write and read tokens by slot, copy blocks inside the pool and between two pools.

Owns the signatures; which block belongs to whom is the engine's business. A slot is block * block_size + offset; -1 is
no slot. Invariant: nothing but the named slots and blocks is touched.
"""

from collections.abc import Callable

from torch import Tensor

from octavo.ops.library import choose

write_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None] = choose("write_kv")
"""write_kv(key, value, k_cache, v_cache, slots, k_scale=1, v_scale=1): token t's key and value go to slots[t].

Args:
    key, value: float32 [tokens, kv_heads, head_dim]; the stride of dim 0 is free.
    k_cache, v_cache: [num_blocks, block_size, kv_heads, head_dim], written, rounded to the cache's dtype.
    slots: int64 [tokens]; -1 writes nowhere. k_scale, v_scale: divide what a cache of 8-bit floats gets; such a cache is a GPU's.
"""

gather_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None] = choose("gather_kv")
"""gather_kv(key, value, k_cache, v_cache, slots, k_scale=1, v_scale=1): the inverse of write_kv; -1 gives zeros."""

copy_blocks: Callable[[Tensor, Tensor], None] = choose("copy_blocks")
"""copy_blocks(kv, pairs): copy block pairs[i, 0] over block pairs[i, 1] in every layer, keys and values.

Args:
    kv: [num_layers, 2, num_blocks, block_size, kv_heads, head_dim], the whole pool, written.
    pairs: int32 [n, 2] of source and destination; a block that is both is an error.
"""

swap_blocks: Callable[[Tensor, Tensor, Tensor], None] = choose("swap_blocks")
"""swap_blocks(src, dst, pairs): copy block pairs[i, 0] of src over block pairs[i, 1] of dst.

Args:
    src, dst: [num_layers, 2, blocks, block_size, kv_heads, head_dim], equal but for the number of blocks; dst written.
    pairs: int32 [n, 2].
"""
