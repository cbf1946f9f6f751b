"""Rotary positions, the write to the cache, and the copies of blocks on a GPU: against the reference in float32, and by the bit
where nothing is computed. Caches are compared whole, so that a write outside its slot is seen."""

import itertools

import pytest
import torch

from octavo import ops
from octavo.ops import fused_reference, reference
from octavo.worker import host_pool

ACTS = (torch.float32, torch.bfloat16, torch.float16)
E4M3 = torch.float8_e4m3fn
# Half a unit in the last place of the output; a rotation's or a norm's float32 rounding is covered by SLACK times the row's size.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, E4M3: 2.0**-4}
SMALLEST = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25, E4M3: 2.0**-10}
SLACK = 3e-6
HEADS = [  # q heads, kv heads, head_dim, rotary_dim
    (16, 8, 128, 128), (32, 8, 64, 64), (32, 8, 128, 128), (8, 8, 80, 80), (4, 2, 64, 16), (3, 1, 96, 96), (4, 4, 256, 64),
    (2, 2, 16, 16), (5, 5, 8, 8), (4, 4, 64, 24), (3, 3, 20, 10), (2, 1, 512, 512), (2, 2, 80, 32), (7, 1, 64, 2),
]


def draw(*shape, dtype=torch.float32, seed=0, scale=2.0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)


def bits(t):
    """The same memory as integers: NaNs compare, and every operation of torch takes it."""
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()])


def table_of(rotary_dim, positions=600):
    angle = torch.arange(positions).unsqueeze(1) * 10000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    return torch.cat([angle.cos(), angle.sin()], 1).cuda()


def cache_of(blocks, block_size, heads, dim, dtype, seed):
    """A cache full of what a write must not touch."""
    return draw(blocks, block_size, heads, dim, seed=seed).to(dtype)


def slots_of(tokens, num_slots, seed=0):
    slots = torch.randperm(num_slots, generator=torch.Generator().manual_seed(seed))[:tokens]
    slots[::5] = -1
    return slots.cuda()


def expect(found, wanted, dtype, what):
    """found was rounded to dtype. A small result may come from large numbers, so the slack is that of the row's largest."""
    found, wanted = found.double().cpu(), wanted.double().cpu()
    size = wanted.abs().amax(-1, keepdim=True)
    bad = ~((found - wanted).abs() <= ROUNDING[dtype] * 1.01 * wanted.abs() + SMALLEST[dtype] * 1.01 + SLACK * size)
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        text = f"{int(bad.sum())} of {bad.numel()} wrong, first at {at}: {found[at].item()} for {wanted[at].item()}"
        pytest.fail(f"{what}: {text}, largest error {(found - wanted).abs().max().item():.3g}", pytrace=False)


def check_cache(found, before, values, slots, scale, what, exact):
    """The slots hold values / scale, everything else what it held before."""
    flat, old = found.flatten(0, 1), before.flatten(0, 1)
    used = slots[slots >= 0]
    untouched = torch.ones(len(flat), dtype=torch.bool, device="cuda")
    untouched[used] = False
    assert torch.equal(bits(flat)[untouched], bits(old)[untouched]), f"{what}: another slot was written"
    wanted = values[slots.cpu() >= 0].float() / scale
    if exact:
        wanted = reference.narrowed(wanted, found.dtype)
        assert torch.equal(bits(flat)[used].cpu(), bits(wanted.cpu().contiguous())), f"{what}: not the same bits"
    elif found.dtype == E4M3:
        expect(flat.view(torch.uint8)[used].view(E4M3).float(), wanted.clamp(-448, 448), E4M3, what)
    else:
        expect(flat[used], wanted, found.dtype, what)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", ACTS)
@pytest.mark.parametrize("shape", HEADS)
def test_rope(shape, dtype, interleaved):
    q_heads, kv_heads, dim, rotary = shape
    table = table_of(rotary)
    for tokens, gap in ((0, 0), (1, 0), (33, 0), (33, 1)):
        row = draw(tokens, (q_heads + 2 * kv_heads + gap) * dim + gap, dtype=dtype)  # a fused tensor, with gap not aligned
        before = row.clone()
        q = row[:, : q_heads * dim].view(tokens, q_heads, dim)
        k = row[:, q_heads * dim : (q_heads + kv_heads) * dim].view(tokens, kv_heads, dim)
        positions = torch.arange(tokens, device="cuda") * 17 % 600
        new_q, new_k = q.float().cpu(), k.float().cpu()
        reference.rope(new_q, new_k, positions.cpu(), table.cpu(), interleaved)
        ops.rope(q, k, positions, table, interleaved)
        what = f"{shape} {dtype} {tokens} tokens, gap {gap}"
        expect(q, new_q, dtype, f"q of {what}")
        expect(k, new_k, dtype, f"k of {what}")
        rest = slice((q_heads + kv_heads) * dim, None)
        assert torch.equal(row[:, rest], before[:, rest]), what
        assert torch.equal(q[..., rotary:], before[:, : q_heads * dim].view_as(q)[..., rotary:]), f"{what}: past rotary_dim"


@pytest.mark.parametrize("kv", ["act", "e4m3"])
@pytest.mark.parametrize("dtype", ACTS)
@pytest.mark.parametrize("shape", HEADS)
def test_rotate_and_cache(shape, dtype, kv):
    q_heads, kv_heads, dim, rotary = shape
    kv, k_scale, v_scale = (dtype, 1.0, 1.0) if kv == "act" else (E4M3, 0.037, 0.5)
    blocks, block_size = 7, 8
    for tokens, normed, rotated, interleaved in itertools.product((1, 40), (False, True), (False, True), (False, True)):
        if interleaved and not rotated:
            continue
        qkv = draw(tokens, q_heads + 2 * kv_heads, dim, dtype=dtype)
        q, k, v = qkv.split([q_heads, kv_heads, kv_heads], 1)
        weights = [draw(dim, seed=s, scale=1.0) if normed else None for s in (5, 6)]
        table = table_of(rotary) if rotated else None
        positions, slots = torch.arange(tokens, device="cuda") * 17 % 600, slots_of(tokens, blocks * block_size)
        caches = [cache_of(blocks, block_size, kv_heads, dim, kv, seed) for seed in (7, 8)]
        before = [c.clone() for c in caches]
        new_q, new_k, new_v = q.float().cpu(), k.float().cpu(), v.float().cpu()
        if normed:
            reference.rms_norm(new_q, new_q.clone(), weights[0].cpu(), 1e-6, 1.0)
            reference.rms_norm(new_k, new_k.clone(), weights[1].cpu(), 1e-6, 1.0)
        if rotated:
            reference.rope(new_q, new_k, positions.cpu(), table.cpu(), interleaved)
        ops.rotate_and_cache(q, k, v, *caches, slots, positions, table, interleaved, *weights, 1e-6, 1.0, k_scale, v_scale)
        what = f"{shape} {dtype} {kv} {tokens} tokens, normed {normed}, rotated {rotated}, interleaved {interleaved}"
        expect(q, new_q, dtype, f"q of {what}")
        check_cache(caches[0], before[0], new_k, slots, k_scale, f"k of {what}", exact=not (normed or rotated))
        check_cache(caches[1], before[1], new_v, slots, v_scale, f"v of {what}", exact=True)
        assert torch.equal(bits(qkv[:, q_heads + kv_heads :]), bits(v)), what


def test_rotate_and_cache_is_the_reference():
    """The fused reference itself, once, so that its order of arguments is held to."""
    q, k, v = draw(9, 4, 64), draw(9, 2, 64, seed=1), draw(9, 2, 64, seed=2)
    caches = [torch.zeros(4, 8, 2, 64, device="cuda") for _ in range(2)]
    weights, table = [draw(64, seed=s) for s in (3, 4)], table_of(64)
    slots, positions = slots_of(9, 32), torch.arange(9, device="cuda")
    copies = [t.cpu() for t in (q, k, v, *caches)]
    arguments = (slots.cpu(), positions.cpu(), table.cpu(), False, *[w.cpu() for w in weights], 1e-6, 0.0)
    fused_reference.rotate_and_cache(*copies, *arguments)
    ops.rotate_and_cache(q, k, v, *caches, slots, positions, table, False, *weights, 1e-6, 0.0)
    for found, wanted in zip((q, *caches), (copies[0], *copies[3:]), strict=True):
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-5, atol=1e-5)


def test_a_token_is_the_same_bits_in_any_company():
    q, k, v = (draw(3000, h, 128, dtype=torch.bfloat16, seed=h) for h in (16, 8, 9))
    v = v[:, :8].contiguous()
    table, weights = table_of(128), [draw(128, seed=s) for s in (3, 4)]
    positions, slots = torch.arange(3000, device="cuda") % 600, torch.arange(3000, device="cuda")

    def run(part):
        caches = [torch.zeros(188, 16, 8, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
        new_q = q[part].clone()
        ops.rotate_and_cache(
            new_q, k[part].clone(), v[part], *caches, slots[part], positions[part], table, False, *weights, 1e-6, 0.0
        )
        return new_q, *(c.flatten(0, 1)[part] for c in caches)

    together = run(slice(0, 3000))
    for part in (slice(0, 1), slice(1234, 1235), slice(2900, 3000)):
        for a, b in zip(run(part), together, strict=True):
            assert torch.equal(a, b[part])


@pytest.mark.parametrize("shape", HEADS[:3])
def test_rotate_and_cache_of_many_tokens(shape):
    """So many that a group of lanes takes several heads: the same bits as a few at a time, and all of the cache."""
    q_heads, kv_heads, dim, rotary = shape
    tokens, table, weights = 2500, table_of(rotary), [draw(dim, seed=s) for s in (3, 4)]
    qkv = draw(tokens, q_heads + 2 * kv_heads, dim, dtype=torch.bfloat16)
    positions, slots = torch.arange(tokens, device="cuda") % 600, slots_of(tokens, 160 * 16)
    scale = 1.0
    for kv, normed, interleaved in itertools.product((torch.bfloat16, E4M3), (False, True), (False, True)):
        first = [cache_of(160, 16, kv_heads, dim, kv, seed) for seed in (7, 8)]
        second, norm = [c.clone() for c in first], weights if normed else (None, None)
        at_once, piecewise = qkv.clone(), qkv.clone()
        q, k, v = at_once.split([q_heads, kv_heads, kv_heads], 1)
        ops.rotate_and_cache(q, k, v, *first, slots, positions, table, interleaved, *norm, 1e-6, 0.0, scale, scale)
        for part in torch.arange(tokens, device="cuda").split(50):
            rows = slice(int(part[0]), int(part[-1]) + 1)
            q, k, v = piecewise[rows].split([q_heads, kv_heads, kv_heads], 1)
            ops.rotate_and_cache(
                q, k, v, *second, slots[rows], positions[rows], table, interleaved, *norm, 1e-6, 0.0, scale, scale
            )
        assert torch.equal(at_once[:, :q_heads], piecewise[:, :q_heads]), f"{shape} {kv} q"
        for a, b in zip(first, second, strict=True):
            assert torch.equal(bits(a), bits(b)), f"{shape} {kv} cache"


@pytest.mark.parametrize("kv", ["act", "e4m3"])
@pytest.mark.parametrize("dtype", ACTS)
def test_write_and_gather(dtype, kv):
    kv, k_scale, v_scale = (dtype, 1.0, 1.0) if kv == "act" else (E4M3, 0.037, 0.01)  # with 0.01 much of v saturates
    for (heads, dim), tokens in itertools.product(((8, 128), (8, 64), (3, 20), (1, 7)), (0, 1, 90)):
        key, value = draw(tokens, heads + 1, dim, dtype=dtype)[:, 1:], draw(tokens, heads, dim, dtype=dtype, seed=1)
        caches = [cache_of(20, 8, heads, dim, kv, seed) for seed in (7, 8)]
        before, slots = [c.clone() for c in caches], slots_of(tokens, 160)
        ops.write_kv(key, value, *caches, slots, k_scale, v_scale)
        what = f"{dtype} {kv} {tokens} x {heads} x {dim}"
        check_cache(caches[0], before[0], key.cpu(), slots, k_scale, f"k of {what}", exact=True)
        check_cache(caches[1], before[1], value.cpu(), slots, v_scale, f"v of {what}", exact=True)
        rows = [torch.full((tokens, heads, dim), float("nan"), device="cuda", dtype=dtype) for _ in range(2)]
        ops.gather_kv(*rows, *caches, slots, k_scale, v_scale)
        for row, cache, scale in zip(rows, caches, (k_scale, v_scale), strict=True):
            held = bits(cache).flatten(0, 1)[slots.clamp(min=0)].view(kv).float()
            held = held * torch.tensor(scale, dtype=torch.float32, device="cuda")
            wanted = torch.where((slots >= 0).view(-1, 1, 1), held, 0.0).to(dtype)
            assert torch.equal(row, wanted), f"gathered {what}"


def test_slots_outside_the_cache_are_left_out():
    key = draw(4, 2, 8)
    caches = [torch.zeros(2, 4, 2, 8, device="cuda") for _ in range(2)]
    slots = torch.tensor([-1, 8, -7, 2**40], device="cuda")
    ops.write_kv(key, key, *caches, slots)
    assert not caches[0].any()
    assert not caches[1].any()


POOLS = [  # shape [L, 2, B, S, H, D], dtype: what 16 bytes, 4 bytes, single bytes divide
    ((3, 50, 16, 8, 128), torch.bfloat16), ((2, 40, 16, 2, 64), E4M3), ((2, 11, 3, 1, 10), torch.float32),
    ((1, 9, 1, 1, 5), E4M3), ((28, 20, 16, 8, 128), torch.bfloat16),
]


def pool_of(layers, blocks, *rest, dtype, device="cuda"):
    pool = torch.randn(layers, 2, blocks, *rest).to(dtype)
    return pool.pin_memory() if device == "pinned" else pool.to(device)


@pytest.mark.parametrize("shape, dtype", POOLS)
def test_copy_blocks(shape, dtype):
    layers, blocks, *rest = shape
    for count in (0, 1, blocks // 2):
        kv = pool_of(layers, blocks, *rest, dtype=dtype)
        order = torch.randperm(blocks)
        target = order[:count]
        source = order[count:][torch.randint(0, blocks - count, (count,))]  # a source may be copied twice
        wanted = bits(kv).clone()
        wanted[:, :, target] = wanted[:, :, source]
        ops.copy_blocks(kv, torch.stack([source, target], 1).int())
        assert torch.equal(bits(kv), wanted), f"{shape} {dtype} {count} pairs"


def test_copy_blocks_of_more_pairs_than_one_launch_takes():
    kv = pool_of(2, 2000, 1, 1, 8, dtype=torch.float32)
    wanted = kv.clone()
    pairs = torch.randperm(2000).view(1000, 2).int()
    wanted[:, :, pairs[:, 1].long()] = wanted[:, :, pairs[:, 0].long()]
    ops.copy_blocks(kv, pairs)
    assert torch.equal(kv, wanted)


@pytest.mark.parametrize("shape, dtype", POOLS)
@pytest.mark.parametrize("places", [("cuda", "pinned"), ("pinned", "cuda"), ("cuda", "cuda")])
def test_swap_blocks(shape, dtype, places):
    layers, blocks, *rest = shape
    stream = torch.cuda.Stream()
    for count in (0, 1, blocks // 2):
        src = pool_of(layers, blocks, *rest, dtype=dtype, device=places[0])
        dst = pool_of(layers, blocks + 3, *rest, dtype=dtype, device=places[1])
        source, target = torch.randperm(blocks)[:count], torch.randperm(blocks + 3)[:count]
        wanted = bits(dst).cpu().clone()
        wanted[:, :, target] = bits(src).cpu()[:, :, source]
        pairs = torch.stack([source, target], 1).int()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            ops.swap_blocks(src, dst, pairs)
            pairs.zero_()  # the list is taken when the operator is called
        stream.synchronize()
        assert torch.equal(bits(dst).cpu(), wanted), f"{shape} {dtype} {count} pairs, {places}"


def test_swap_blocks_across_pieces_of_pinned_memory(monkeypatch):
    """The host's pool is pinned piece by piece, and a run of blocks lies in many of them."""
    monkeypatch.setattr(host_pool, "PIECE", 3 * host_pool.PAGE)
    monkeypatch.setattr(host_pool, "PAUSE", 0.0)
    monkeypatch.setattr(host_pool, "SHARE", 0)
    pool = host_pool.HostPool((3, 2, 40, 16, 2, 128), torch.bfloat16, "cuda:0")
    host = pool.wait()
    assert len(pool._pinned) > 50
    kv = torch.randn(3, 2, 30, 16, 2, 128, device="cuda", dtype=torch.bfloat16)
    out = torch.tensor([*((i, i + 7) for i in range(4, 24)), (0, 39), (2, 0)], dtype=torch.int32)
    ops.swap_blocks(kv, host, out)
    torch.cuda.synchronize()
    reads, writes = out.long().unbind(1)
    assert torch.equal(host[:, :, writes], kv.cpu()[:, :, reads])
    assert not host[:, :, [1, 10, 31, 38]].any()
    back = torch.zeros_like(kv)
    ops.swap_blocks(host, back, out.flip(1))
    assert torch.equal(back.cpu()[:, :, reads], kv.cpu()[:, :, reads])
    pool.close()


def test_in_a_graph():
    q, k, v = (draw(5, h, 64, dtype=torch.bfloat16, seed=h) for h in (8, 2, 3))
    v = v[:, :2].contiguous()
    caches = [torch.zeros(8, 8, 2, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    table, slots, positions = table_of(64), torch.tensor([1, 5, -1, 9, 20], device="cuda"), torch.arange(5, device="cuda")
    work = [q.clone(), k.clone()]

    def step():
        work[0].copy_(q), work[1].copy_(k)
        ops.rotate_and_cache(*work, v, *caches, slots, positions, table, False, None, None, 1e-6, 0.0)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    q.mul_(0.5), v.mul_(2.0), slots.copy_(torch.tensor([-1, 3, 63, 0, 7])), positions.add_(100)
    for cache in caches:
        cache.zero_()
    graph.replay()
    replayed = [t.clone() for t in (work[0], *caches)]
    for cache in caches:
        cache.zero_()
    step()
    for a, b in zip(replayed, (work[0], *caches), strict=True):
        assert torch.equal(a, b)
    assert caches[1].any()


def pairs_of(*pairs):
    return torch.tensor(pairs, dtype=torch.int32)


def test_contracts_of_blocks():
    kv, host, pairs = torch.zeros(1, 2, 4, 2, 1, 8, device="cuda"), torch.zeros(1, 2, 4, 2, 1, 8), pairs_of((0, 1), (2, 3))
    cases = [
        (lambda: ops.copy_blocks(kv, pairs.cuda()), "pairs must lie in host memory"),
        (lambda: ops.copy_blocks(kv, pairs_of((0, 4))), r"pairs\[0\] = \(0, 4\), but there are 4 source and 4"),
        (lambda: ops.copy_blocks(kv, pairs_of((0, 1), (2, 1))), "block 1 is a destination twice"),
        (lambda: ops.copy_blocks(kv, pairs_of((0, 1), (1, 2))), "block 1 is both a source and a destination"),
        (lambda: ops.swap_blocks(kv, host, pairs), "dst lies in host memory that is not pinned"),
        (lambda: ops.swap_blocks(host, kv, pairs), "src lies in host memory that is not pinned"),
        (lambda: ops.swap_blocks(kv, kv.half(), pairs), r"dst .* must be float32, not float16"),
    ]
    for call, words in cases:
        with pytest.raises(RuntimeError, match=words):
            call()


def test_contracts_of_tokens():
    key, cache = torch.zeros(3, 1, 8, device="cuda"), torch.zeros(4, 2, 1, 8, device="cuda")
    slots = torch.arange(3, device="cuda")
    half, eight, table, weight = cache.half(), cache.to(E4M3), torch.zeros(10, 16, device="cuda"), torch.ones(8, device="cuda")
    both = (key, key, key, cache, cache, slots, slots, None, False)
    cases = [
        (lambda: ops.write_kv(key, key, cache, cache, slots, 0.5, 1.0), "a cache of this type has no scales"),
        (lambda: ops.write_kv(key, key, eight, eight, slots, 0.0, 1.0), "k_scale = 0 and v_scale = 1, but both must be positive"),
        (lambda: ops.write_kv(key, key, half, half, slots), r"k_cache .* must be float32 or float8_e4m3fn, not float16"),
        (lambda: ops.rope(key, key, slots, table, False), "rotary_dim must be even and at most head_dim 8, got 16"),
        (lambda: ops.rotate_and_cache(*both, weight, None, 1e-6, 0.0), "q_weight and k_weight: both or neither"),
    ]
    for call, words in cases:
        with pytest.raises(RuntimeError, match=words):
            call()
