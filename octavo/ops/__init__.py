"""The operators of Octavo; every file above this folder reaches the kernels through these names and no others.

Owns the list. Each name is the chosen callable itself: a compiled kernel, or the function of reference.py (or
fused_reference.py: operators that only GPUs have) with the same signature where the extension is not built. The files below
state what a CPU takes, float32 activations; a GPU takes bfloat16 and float16 too, as csrc/cuda/ops.h says. Invariant: outputs
are made by the caller and written in place; only pack_linear returns a tensor.
"""

from octavo.ops.activation import activation, gated_activation
from octavo.ops.attention import AttentionMeta, paged_attention
from octavo.ops.fused import (
    activation_fp8,
    add_rms_norm_fp8,
    attention_plan,
    begin_step,
    count_tokens,
    end_step,
    gated_activation_fp8,
    layer_norm_fp8,
    lookup,
    norm_gated,
    norm_linear,
    rms_norm_fp8,
    rotate_and_cache,
    skinny_gated,
    skinny_linear,
    tile_gated,
    tile_linear,
)
from octavo.ops.gemm import embedding, linear, pack_linear
from octavo.ops.kv import copy_blocks, gather_kv, swap_blocks, write_kv
from octavo.ops.library import REBUILD, REBUILD_CUDA, built, cuda_built, isa, load_cuda
from octavo.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from octavo.ops.rope import rope
from octavo.ops.sampling import penalties, sample, token_logprobs

__all__ = [
    "REBUILD",
    "REBUILD_CUDA",
    "AttentionMeta",
    "activation",
    "activation_fp8",
    "add_layer_norm",
    "add_rms_norm",
    "add_rms_norm_fp8",
    "attention_plan",
    "begin_step",
    "built",
    "copy_blocks",
    "count_tokens",
    "cuda_built",
    "embedding",
    "end_step",
    "gated_activation",
    "gated_activation_fp8",
    "gather_kv",
    "isa",
    "layer_norm",
    "layer_norm_fp8",
    "linear",
    "load_cuda",
    "lookup",
    "norm_gated",
    "norm_linear",
    "pack_linear",
    "paged_attention",
    "penalties",
    "rms_norm",
    "rms_norm_fp8",
    "rope",
    "rotate_and_cache",
    "sample",
    "skinny_gated",
    "skinny_linear",
    "swap_blocks",
    "tile_gated",
    "tile_linear",
    "token_logprobs",
    "write_kv",
]
