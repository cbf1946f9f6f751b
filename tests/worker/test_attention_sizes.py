"""Room for attention: a list for every window there is, and as many partial results as are useful and not too large."""

import pytest
import torch

from octavo.models.spec import LayerSpec
from octavo.ops.attention import partial_floats, work_ints
from octavo.worker.attention_sizes import PARTIAL_BYTES, attention_sizes

HALVES = [torch.bfloat16, torch.float16]


def test_float32_needs_no_room(tiny):
    found = attention_sizes(tiny.spec(), torch.float32, 1024, 16384, 4096)
    assert (found.windows, found.work, found.partials, found.max_partials, found.bytes) == ((), 0, 0, 0, 0)
    assert (found.heads, found.kv_heads, found.head_dim) == (4, 2, 8)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_list_for_every_window(tiny, dtype):
    windows = (0, 9, 0, 4096, 9)
    found = attention_sizes(tiny.spec(layers=tuple(LayerSpec(window=w) for w in windows)), dtype, 24, 300, 512)
    assert found.windows == (0, 9, 4096) and found.work == work_ints(24, 300)
    assert found.bytes == 4 * (3 * found.work + found.partials)
    assert (found.heads, found.kv_heads, found.head_dim) == (4, 2, 8)


def test_a_short_context_has_a_partition_of_256_tokens_for_every_row_and_kv_head(tiny):
    for length, partitions in ((1, 1), (256, 1), (257, 2), (1000, 4)):
        found = attention_sizes(tiny.spec(), torch.bfloat16, 6, 64, length)
        assert found.max_partials == 6 * partitions * 2
        assert found.partials == partial_floats(found.max_partials, 4, 2, 8)


@pytest.mark.parametrize("shape", [(8, 8, 64), (32, 8, 128), (64, 1, 256), (9, 3, 64)])
def test_the_room_for_partial_results_is_limited_and_never_nothing(tiny, shape):
    heads, kv_heads, head_dim = shape
    spec = tiny.spec(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    found = attention_sizes(spec, torch.bfloat16, 1024, 16384, 131072)
    one = 4 * partial_floats(1, *shape)
    assert PARTIAL_BYTES - one < 4 * found.partials <= PARTIAL_BYTES
    assert found.partials == found.max_partials * one // 4
    assert attention_sizes(spec, torch.bfloat16, 1, 1, 1).max_partials == kv_heads


def test_room_grows_with_what_a_result_holds():
    """Sums of a head, its maximum and its sum, for 8 tokens of the heads that share a KV head, in rows of a tile."""
    assert partial_floats(1, 8, 8, 64) == 8 * 66
    assert partial_floats(1, 16, 8, 64) == partial_floats(1, 64, 8, 64) == 2 * 8 * 66
    assert partial_floats(1, 8, 8, 100) == 8 * 130 and partial_floats(5, 8, 8, 65) == 5 * 8 * 130
    assert partial_floats(1, 64, 8, 256) == 8 * 258
