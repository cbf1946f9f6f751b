"""Rotary positions against complex multiplication in float64: both pairings, partial rotation, strided views."""

import pytest
import torch


def table(max_pos, rotary_dim, base=10000.0):
    """float32 [max_pos, rotary_dim]: cosines, then sines."""
    frequency = base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angle = torch.arange(max_pos, dtype=torch.float64)[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1).float()


def exact(x, positions, cos_sin, interleaved):
    """Each pair as a complex number, turned by cos + i sin."""
    x = x.double().clone()
    half = cos_sin.shape[1] // 2
    turn = torch.complex(*cos_sin[positions].double().unsqueeze(1).split(half, dim=-1))
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    turned = torch.complex(x[..., first], x[..., second]) * turn
    x[..., first], x[..., second] = turned.real, turned.imag
    return x


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "rotary_dim"),
                         [(9, 3, 64, 64), (4, 4, 80, 32), (1, 1, 2, 2), (3, 1, 96, 96), (5, 5, 18, 10),
                          (8, 2, 128, 128), (2, 1, 256, 64), (2, 2, 24, 6)])
def test_rope(impl, interleaved, heads, kv_heads, head_dim, rotary_dim):
    generator = torch.Generator().manual_seed(heads)
    positions = torch.tensor([0, 5, 99, 1, 5])
    cos_sin = table(100, rotary_dim)
    q = torch.randn(5, heads, head_dim, generator=generator)
    k = torch.randn(5, kv_heads, head_dim, generator=generator)
    wanted_q, wanted_k = exact(q, positions, cos_sin, interleaved), exact(k, positions, cos_sin, interleaved)
    still = q[..., rotary_dim:].clone()
    impl.rope(q, k, positions, cos_sin, interleaved)
    torch.testing.assert_close(q.double(), wanted_q, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(k.double(), wanted_k, rtol=1e-6, atol=1e-6)
    assert torch.equal(q[..., rotary_dim:], still)


def test_views_of_one_fused_buffer(impl):
    heads, kv_heads, head_dim = 6, 2, 16
    qkv = torch.randn(7, (heads + 2 * kv_heads) * head_dim)
    before = qkv.clone()
    q = qkv[:, : heads * head_dim].view(7, heads, head_dim)
    k = qkv[:, heads * head_dim : (heads + kv_heads) * head_dim].view(7, kv_heads, head_dim)
    positions, cos_sin = torch.arange(7), table(16, head_dim)
    wanted_q, wanted_k = exact(q, positions, cos_sin, False), exact(k, positions, cos_sin, False)
    impl.rope(q, k, positions, cos_sin, False)
    torch.testing.assert_close(q.double(), wanted_q, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(k.double(), wanted_k, rtol=1e-6, atol=1e-6)
    assert torch.equal(qkv[:, (heads + kv_heads) * head_dim :], before[:, (heads + kv_heads) * head_dim :])


def test_no_tokens(impl):
    impl.rope(torch.empty(0, 2, 8), torch.empty(0, 1, 8), torch.empty(0, dtype=torch.int64), table(4, 8), False)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_token_is_the_same_bits_alone_in_a_batch_and_on_any_number_of_threads(kernels, interleaved, on_threads):
    q, k = torch.randn(300, 9, 64), torch.randn(300, 3, 64)
    positions, cos_sin = torch.arange(300), table(300, 64)

    def run(begin, end):
        new_q, new_k = q[begin:end].clone(), k[begin:end].clone()
        kernels.rope(new_q, new_k, positions[begin:end], cos_sin, interleaved)
        return torch.cat((new_q, new_k), dim=1)

    together = run(0, 300)
    for t in (0, 17, 299):
        assert torch.equal(run(t, t + 1)[0], together[t])
    for count in (1, 2, 3):
        assert torch.equal(on_threads(count, lambda: run(0, 300)), together)


def test_contract_errors(kernels):
    q, k, positions, cos_sin = torch.zeros(2, 2, 8), torch.zeros(2, 1, 8), torch.tensor([0, 1]), table(4, 8)
    with pytest.raises(RuntimeError, match=r"rope: .*position"):
        kernels.rope(q, k, torch.tensor([0, 4]), cos_sin, False)
    with pytest.raises(RuntimeError, match=r"rope: .*position"):
        kernels.rope(q, k, torch.tensor([-1, 0]), cos_sin, False)
    with pytest.raises(RuntimeError, match="rope: positions"):
        kernels.rope(q, k, positions.int(), cos_sin, False)
    with pytest.raises(RuntimeError, match=r"rope: .*rotary"):
        kernels.rope(q, k, positions, table(4, 10), False)
    with pytest.raises(RuntimeError, match=r"rope: .*rotary"):
        kernels.rope(q, k, positions, cos_sin[:, :7].contiguous(), False)
