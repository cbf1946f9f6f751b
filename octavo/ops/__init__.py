"""The operators of Octavo; every file above this folder reaches the kernels through these names and no others.

Owns the list. Each name is the chosen callable itself: a compiled kernel (CPU tensors, float32 activations), or the
function of reference.py with the same signature where the extension is not built. Invariant: outputs are made by the
caller and written in place; only pack_linear returns a tensor.
"""

from octavo.ops.activation import activation, gated_activation
from octavo.ops.attention import AttentionMeta, paged_attention
from octavo.ops.gemm import embedding, linear, pack_linear
from octavo.ops.kv import copy_blocks, gather_kv, swap_blocks, write_kv
from octavo.ops.library import REBUILD, built, isa
from octavo.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from octavo.ops.rope import rope
from octavo.ops.sampling import penalties, sample, token_logprobs

__all__ = [
    "REBUILD",
    "AttentionMeta",
    "activation",
    "add_layer_norm",
    "add_rms_norm",
    "built",
    "copy_blocks",
    "embedding",
    "gated_activation",
    "gather_kv",
    "isa",
    "layer_norm",
    "linear",
    "pack_linear",
    "paged_attention",
    "penalties",
    "rms_norm",
    "rope",
    "sample",
    "swap_blocks",
    "token_logprobs",
    "write_kv",
]
