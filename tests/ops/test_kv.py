"""Writing, reading and moving the cells of the KV cache: exact to the bit, and nothing else is touched."""

import pytest
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WORDS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def same_bits(a, b):
    return torch.equal(a.view(WORDS[a.dtype]), b.view(WORDS[b.dtype]))


def caches(dtype, blocks=6, block_size=16, heads=3, head_dim=64):
    return (torch.randn(blocks, block_size, heads, head_dim).to(dtype) for _ in range(2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 64), (1, 7), (2, 40)])
@pytest.mark.parametrize("block_size", [8, 16, 5])
def test_tokens_go_to_their_slots_and_nowhere_else(impl, dtype, heads, head_dim, block_size):
    around = list(caches(dtype, 9, block_size, heads, head_dim))  # the cache is their middle; the rest is somebody else's
    k, v = (x[1:-1] for x in around)
    # key and value are slices of a fused projection
    qkv = torch.randn(11, 4 * heads, head_dim)
    key, value = qkv[:, heads : 2 * heads], qkv[:, 3 * heads :]
    slots = torch.randperm(7 * block_size)[:11]
    slots[[2, 5]] = -1
    expected = []
    for whole, x in zip(around, (key, value), strict=True):
        wanted = whole.clone()
        wanted[1:-1].view(-1, heads, head_dim)[slots[slots >= 0]] = x[slots >= 0].to(dtype)
        expected.append(wanted)
    impl.write_kv(key, value, k, v, slots)
    assert same_bits(around[0], expected[0]) and same_bits(around[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_is_the_inverse(impl, dtype):
    k, v = caches(dtype)
    slots = torch.tensor([95, 0, -1, 17, 17])
    key, value = (torch.full((5, 3, 64), float("nan")) for _ in range(2))
    impl.gather_kv(key, value, k, v, slots)
    for x, cache in ((key, k), (value, v)):
        assert torch.equal(x[slots >= 0], cache.view(-1, 3, 64)[slots[slots >= 0]].float())
        assert torch.equal(x[2], torch.zeros(3, 64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_to_nearest_even(impl, dtype):
    """Every 16-bit value, the halfway points around it, and what lies beyond the range."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    base = every.view(torch.bfloat16 if dtype == torch.float32 else dtype).float()
    base = base[base.isfinite()]
    step = torch.nextafter(base.to(dtype), torch.tensor(float("inf"), dtype=dtype)).float()
    half = ((base.double() + step.double()) / 2).float()
    around = [torch.nextafter(half, torch.tensor(sign * float("inf"))) for sign in (-1.0, 1.0)]
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 65504.0, 65519.996, 65520.0, 3.4e38, 1e-45, -6e-8])
    x = torch.cat([base, half, *around, special])
    x = x[~x.isnan()]
    x = torch.cat([x, torch.zeros(-x.numel() % 64)]).view(-1, 1, 64)
    k, v = (torch.zeros(1, len(x), 1, 64, dtype=dtype) for _ in range(2))
    impl.write_kv(x, x, k, v, torch.arange(len(x)))
    assert same_bits(k.view_as(x), x.to(dtype)) and same_bits(v, k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_nan(impl, dtype):
    x = torch.full((1, 1, 8), float("nan"))
    x.view(torch.int32)[0, 0, :2] = torch.tensor([0x7F800001, 0x7FFFFFFF])  # bits that rounding would carry into infinity
    k, v = (torch.zeros(1, 1, 1, 8, dtype=dtype) for _ in range(2))
    impl.write_kv(x, x, k, v, torch.tensor([0]))
    assert k.isnan().all()


def test_no_tokens(impl):
    k, v = caches(torch.bfloat16)
    before = k.clone()
    empty = torch.empty(0, 3, 64)
    impl.write_kv(empty, empty, k, v, torch.empty(0, dtype=torch.int64))
    assert torch.equal(k, before)


@pytest.mark.parametrize("slot", [96, -2, 2**40])
def test_a_slot_outside_the_cache_changes_nothing(kernels, slot):
    k, v = caches(torch.float32)
    before = k.clone()
    x = torch.randn(3, 3, 64)
    for call in (kernels.write_kv, kernels.gather_kv):
        with pytest.raises(RuntimeError, match=rf"{call.name().split('::')[1]}: slots\[2\] = {slot}, but the cache has 96"):
            call(x, x, k, v, torch.tensor([0, 1, slot]))
    assert torch.equal(k, before)


def pool(blocks, dtype=torch.bfloat16):
    return torch.randn(3, 2, blocks, 16, 2, 24).to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8])
def test_copied_blocks(impl, dtype):
    kv = (torch.randn(3, 2, 9, 16, 2, 24) * 50).to(dtype)
    expected = kv.clone()
    pairs = torch.tensor([[0, 3], [0, 8], [5, 1]], dtype=torch.int32)
    for source, target in pairs.tolist():
        expected[:, :, target] = kv[:, :, source]
    impl.copy_blocks(kv, pairs)
    assert torch.equal(kv, expected)


def test_swapped_blocks_between_pools_of_different_size(impl):
    device, host = pool(9), pool(4)
    expected = host.clone()
    pairs = torch.tensor([[8, 0], [2, 3]], dtype=torch.int32)
    for source, target in pairs.tolist():
        expected[:, :, target] = device[:, :, source]
    before = device.clone()
    impl.swap_blocks(device, host, pairs)
    assert torch.equal(host, expected) and torch.equal(device, before)
    impl.swap_blocks(host, device, pairs.flip(1))
    assert torch.equal(device, before)


def test_no_pairs(impl):
    kv = pool(3)
    before = kv.clone()
    impl.copy_blocks(kv, torch.empty(0, 2, dtype=torch.int32))
    impl.swap_blocks(kv, pool(2), torch.empty(0, 2, dtype=torch.int32))
    assert torch.equal(kv, before)


def test_a_block_that_is_source_and_destination_is_an_error(impl):
    kv = pool(4)
    with pytest.raises(RuntimeError, match=r"copy_blocks: .*source"):
        impl.copy_blocks(kv, torch.tensor([[0, 1], [1, 2]], dtype=torch.int32))


def test_blocks_outside_the_pool_are_errors(kernels):
    kv, other = pool(4), pool(2)
    before = kv.clone()
    with pytest.raises(RuntimeError, match=r"copy_blocks: pairs\[1\] = \(0, 4\), but there are 4"):
        kernels.copy_blocks(kv, torch.tensor([[0, 1], [0, 4]], dtype=torch.int32))
    with pytest.raises(RuntimeError, match=r"swap_blocks: pairs\[0\] = \(0, 3\), but there are 4 source and 2 destination"):
        kernels.swap_blocks(kv, other, torch.tensor([[0, 3]], dtype=torch.int32))
    with pytest.raises(RuntimeError, match=r"copy_blocks: block 1 is a destination twice"):
        kernels.copy_blocks(kv, torch.tensor([[0, 1], [3, 1]], dtype=torch.int32))
    untouched = other.clone()
    with pytest.raises(RuntimeError, match=r"swap_blocks: block 1 is a destination twice"):
        kernels.swap_blocks(kv, other, torch.tensor([[0, 1], [3, 1]], dtype=torch.int32))
    assert torch.equal(kv, before) and torch.equal(other, untouched)


def test_threads_do_not_change_bits(kernels, on_threads):
    kv = pool(64, torch.float32)
    pairs = torch.stack([torch.arange(32), torch.arange(32, 64)], 1).to(torch.int32)
    results = []
    for count in (1, 2, 3):
        copy = kv.clone()
        on_threads(count, lambda copy=copy: kernels.copy_blocks(copy, pairs))
        results.append(copy)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert torch.equal(results[0][:, :, 32:], kv[:, :, :32])
