"""Operators that only GPUs have: fused steps, 8-bit outputs, GEMMs of few rows over plain weights.

Owns the names; what they compute is written in fused_reference.py, the shapes in csrc/cuda/ops.h. Invariant: nothing that
runs on a CPU calls them.
"""

from collections.abc import Callable

from octavo.ops.library import choose

Operator = Callable[..., None]

SKINNY_ROWS = 16  # most rows that go to the skinny operators, which would take 64
SKINNY_SCRATCH = 524_288  # float32 elements of `scratch`, enough for every shape: skinny_scratch_floats in csrc/cuda/ops.h

rms_norm_fp8: Operator = choose("rms_norm_fp8")
add_rms_norm_fp8: Operator = choose("add_rms_norm_fp8")
layer_norm_fp8: Operator = choose("layer_norm_fp8")
gated_activation_fp8: Operator = choose("gated_activation_fp8")
activation_fp8: Operator = choose("activation_fp8")
lookup: Operator = choose("lookup")
rotate_and_cache: Operator = choose("rotate_and_cache")
attention_plan: Operator = choose("attention_plan")
skinny_linear: Operator = choose("skinny_linear")
skinny_gated: Operator = choose("skinny_gated")
norm_linear: Operator = choose("norm_linear")
norm_gated: Operator = choose("norm_gated")
tile_linear: Operator = choose("tile_linear")
tile_gated: Operator = choose("tile_gated")
count_tokens: Operator = choose("count_tokens")
begin_step: Operator = choose("begin_step")
end_step: Operator = choose("end_step")
