"""Packed linear layers and the embedding: values against float64, and one row's bits in every company."""

import pytest
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((64, 32), (1, 1), (576, 960), (33, 47), (300, 100), (777, 65), (257, 31), (1024, 33), (40, 640))  # (k, n)


def layer(k, n, dtype=torch.bfloat16, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=random).to(dtype), torch.randn(n, generator=random)


def run(ops, x, packed, bias, n):
    out = torch.full((len(x), n), float("nan"))
    ops.linear(out, x, packed, bias, n)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_panels(impl, k, n, dtype):
    weight, _ = layer(k, n, dtype)
    packed = impl.pack_linear(weight)
    assert packed.shape == (-(-n // 32), k, 32) and packed.dtype == dtype and packed.is_contiguous()
    rows = packed.transpose(1, 2).reshape(-1, k)
    assert torch.equal(rows[:n], weight) and not rows[n:].any()


def test_panels_of_a_slice(impl):
    weight, _ = layer(96, 70)
    assert torch.equal(impl.pack_linear(weight[:, 32:]), impl.pack_linear(weight[:, 32:].contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 16, 24, 31, 64, 145, 300])
def test_rows_agree_with_float64(impl, m, dtype):
    for k, n in ((576, 200), (65, 33)):
        weight, bias = layer(k, n, dtype)
        x = torch.randn(m, k)
        expected = x.double() @ weight.double().T + bias.double()
        torch.testing.assert_close(run(impl, x, impl.pack_linear(weight), bias, n).double(), expected, atol=3e-6 * k, rtol=0)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_shapes_agree_with_float64(impl, k, n, with_bias):
    weight, bias = layer(k, n)
    for m in (1, 5, 40):
        x = torch.randn(m, k)
        expected = x.double() @ weight.double().T + (bias.double() if with_bias else 0.0)
        found = run(impl, x, impl.pack_linear(weight), bias if with_bias else None, n)
        torch.testing.assert_close(found.double(), expected, atol=3e-6 * k + 1e-6, rtol=0)


def test_strided_rows_leave_what_lies_between(impl):
    weight, bias = layer(100, 40)
    packed = impl.pack_linear(weight)
    wide_x, wide_out = torch.randn(9, 150), torch.full((9, 60), 7.0)
    impl.linear(wide_out[:, 10:50], wide_x[:, 30:130], packed, bias, 40)
    assert torch.equal(wide_out[:, 10:50], run(impl, wide_x[:, 30:130].contiguous(), packed, bias, 40))
    assert (wide_out[:, :10] == 7.0).all() and (wide_out[:, 50:] == 7.0).all()


def test_nothing_to_add_up(impl):
    bias = torch.randn(5)
    packed = torch.empty(1, 0, 32)
    assert torch.equal(run(impl, torch.empty(3, 0), packed, bias, 5), bias.expand(3, 5))
    assert run(impl, torch.empty(0, 7), torch.zeros(1, 7, 32), None, 5).shape == (0, 5)


def test_padding_does_not_leak(impl):
    """A NaN row of x stays in its row; the padded columns of the last panel stay outside the output."""
    weight, bias = layer(64, 40)
    x = torch.randn(20, 64)
    clean = run(impl, x, impl.pack_linear(weight), bias, 40)
    x[3] = float("nan")
    found = run(impl, x, impl.pack_linear(weight), bias, 40)
    assert found[3].isnan().all()
    rest = torch.arange(20) != 3
    assert torch.equal(found[rest], clean[rest])


# Bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), [(576, 960), (700, 100), (256, 31), (1536, 64)])
def test_a_row_has_the_same_bits_in_any_company(kernels, k, n, dtype):
    weight, bias = layer(k, n, dtype, seed=1)
    packed = kernels.pack_linear(weight)
    x = torch.randn(310, k)
    alone = torch.cat([run(kernels, x[i : i + 1], packed, bias, n) for i in range(310)])
    for m in (2, 3, 4, 6, 7, 12, 13, 16, 25, 48, 64, 144, 145, 310):
        assert torch.equal(run(kernels, x[:m], packed, bias, n), alone[:m]), f"{m} rows"
        assert torch.equal(run(kernels, x[310 - m :], packed, bias, n), alone[310 - m :]), f"the last {m} rows"


@pytest.mark.parametrize("m", [1, 16, 64, 300])
def test_threads_do_not_change_bits(kernels, on_threads, m):
    weight, bias = layer(600, 1000, seed=2)
    packed, x = kernels.pack_linear(weight), torch.randn(m, 600)
    first, *others = (on_threads(count, lambda: run(kernels, x, packed, bias, 1000)) for count in (1, 2, 3))
    for other in others:
        assert torch.equal(other, first)


def test_storage_types_are_only_widened(kernels):
    """bfloat16 or float16 weights give the bits of the same values in float32."""
    for dtype in (torch.bfloat16, torch.float16):
        weight, bias = layer(300, 70, dtype, seed=3)
        for m in (1, 9, 200):
            x = torch.randn(m, 300)
            narrow = run(kernels, x, kernels.pack_linear(weight), bias, 70)
            assert torch.equal(narrow, run(kernels, x, kernels.pack_linear(weight.float()), bias, 70))


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_reads_rows_of_the_weight(impl, dtype):
    weight, _ = layer(72, 101, dtype)
    ids = torch.tensor([0, 100, 31, 32, 33, 7, 7])
    out = torch.full((7, 72), float("nan"))
    impl.embedding(out, ids, impl.pack_linear(weight), 101)
    assert torch.equal(out, weight[ids].float())


@pytest.mark.parametrize("bad", [-1, 101, 120])
def test_an_id_outside_the_vocabulary_is_an_error(impl, bad):
    weight, _ = layer(8, 101)
    with pytest.raises(RuntimeError, match=rf"embedding: .*{bad}"):
        impl.embedding(torch.empty(2, 8), torch.tensor([0, bad]), impl.pack_linear(weight), 101)
