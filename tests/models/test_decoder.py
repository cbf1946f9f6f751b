"""The decoder against a second writing of the same mathematics: dense, in float64, straight from the spec."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import PagedCache, assert_close, logits_in_chunks, run
from torch import Tensor

from octavo import ops
from octavo.errors import ModelError
from octavo.models.decoder import Decoder
from octavo.models.frequencies import frequencies
from octavo.models.spec import DecoderSpec, LayerSpec, RopeSpec

BASE = DecoderSpec(
    family="test", vocab_size=97, embedding_rows=97, hidden=36, num_heads=6, num_kv_heads=2, head_dim=8,
    intermediate=44, max_len=64, layers=(LayerSpec(),) * 3, ropes=(RopeSpec(rotary_dim=8),), attn_scale=8**-0.5,
)
PLAIN = {"ropes": (), "layers": (LayerSpec(rope=None),) * 2, "gated": False}
LAYER_NORM = {"norm": "layer", "norm_bias": True, "norm_eps": 1e-5}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tied": True},
    "padding rows": {"embedding_rows": 128, "vocab_size": 91},
    "padding rows, tied": {"embedding_rows": 128, "vocab_size": 91, "tied": True},
    "all biases": {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "head_bias": True},
    "padded head with bias": {"head_bias": True, "embedding_rows": 100},
    "layer norm": LAYER_NORM,
    "layer norm without bias": {"norm": "layer"},
    "gpt2": {
        **PLAIN, **LAYER_NORM, "positions": 64, "activation": "gelu_tanh", "tied": True, "num_kv_heads": 6,
        "qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "neox": {
        **LAYER_NORM, "parallel_residual": True, "gated": False, "activation": "gelu",
        "ropes": (RopeSpec(rotary_dim=2),), "qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "parallel, rms, gated": {"parallel_residual": True},
    "opt-350m": {
        **PLAIN, **LAYER_NORM, "norm_placement": "post", "final_norm": False, "positions": 66, "position_offset": 2,
        "embedding_dim": 20, "activation": "relu", "tied": True},
    "post, with final norm and a head of its own": {"norm_placement": "post", "embedding_dim": 20},
    "gemma2": {
        "norm_placement": "sandwich", "norm_offset": 1.0, "attn_softcap": 5.0, "logit_softcap": 3.0, "tied": True,
        "embedding_scale": 6.0, "activation": "gelu_tanh", "layers": (LayerSpec(window=4), LayerSpec()) * 2},
    "gemma3": {
        "norm_placement": "sandwich", "norm_offset": 1.0, "qk_norm": True, "embedding_scale": 6.0, "tied": True,
        "ropes": (RopeSpec(base=100.0, rotary_dim=8), RopeSpec(base=1e6, rotary_dim=8, scaling="linear", factor=8.0)),
        "layers": (LayerSpec(window=4), LayerSpec(rope=1), LayerSpec(window=9))},
    "qk norm, biases": {"qk_norm": True, "qkv_bias": True},
    "interleaved, partial": {"ropes": (RopeSpec(rotary_dim=6, interleaved=True),)},
    "layers without rope": {"layers": (LayerSpec(), LayerSpec(rope=None), LayerSpec())},
    "logit scale and cap": {"logit_scale": 0.25, "logit_softcap": 2.0},
}


def make(spec: DecoderSpec, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> tuple[Decoder, dict[str, Tensor]]:
    """A decoder with random parameters, loaded in random order, and the parameters in float64."""
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(spec, dtype=dtype, max_model_len=64)
    parameters = {}
    for name, shape in decoder.expected().items():
        value = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            value = 1.0 - spec.norm_offset + 0.3 * value if "norm.weight" in name else 0.3 * value
        elif name not in ("embed.weight", "positions.weight"):
            value *= 1.4 / math.sqrt(shape[1])
        parameters[name] = value
    for at in torch.randperm(len(parameters), generator=generator).tolist():
        name = list(parameters)[at]
        decoder.load(name, parameters[name])
    decoder.finish()
    matrices = {n for n, v in parameters.items() if v.ndim == 2 and n != "positions.weight"}
    return decoder, {n: (v.to(dtype) if n in matrices else v).double() for n, v in parameters.items()}


def plain_logits(spec: DecoderSpec, p: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Logits [tokens, vocab] of one sequence, without a cache, a kernel or a fused anything."""
    x = p["embed.weight"][ids] * spec.embedding_scale
    if spec.embedding_dim:
        x = x @ p["project_in.weight"].T
    if spec.positions:
        x = x + p["positions.weight"][torch.arange(len(ids)) + spec.position_offset]
    for i, layer in enumerate(spec.layers):
        q = {name.removeprefix(f"layers.{i}."): value for name, value in p.items() if name.startswith(f"layers.{i}.")}

        def normed(x: Tensor, name: str, q: dict[str, Tensor] = q) -> Tensor:
            return _norm(spec, x, q[f"{name}.weight"], q.get(f"{name}.bias"))

        def attend(x: Tensor, q: dict[str, Tensor] = q, layer: LayerSpec = layer) -> Tensor:
            return _attention(spec, layer, q, x)

        def mlp(x: Tensor, q: dict[str, Tensor] = q) -> Tensor:
            return _mlp(spec, q, x)

        x = _join(spec, x, normed, attend, mlp)
    if spec.final_norm:
        x = _norm(spec, x, p["final_norm.weight"], p.get("final_norm.bias"))
    if spec.embedding_dim:
        x = x @ p["project_out.weight"].T
    logits = x @ p["embed.weight" if spec.tied else "head.weight"].T
    logits = (logits + p["head.bias"] if spec.head_bias else logits)[:, : spec.vocab_size] * spec.logit_scale
    return spec.logit_softcap * torch.tanh(logits / spec.logit_softcap) if spec.logit_softcap else logits


def _join(
    spec: DecoderSpec, x: Tensor, norm: Callable[[Tensor, str], Tensor], attend: Callable[[Tensor], Tensor],
    mlp: Callable[[Tensor], Tensor],
) -> Tensor:
    if spec.parallel_residual:
        return x + attend(norm(x, "attn_norm")) + mlp(norm(x, "mlp_norm"))
    if spec.norm_placement == "post":
        x = norm(x + attend(x), "attn_norm")
        return norm(x + mlp(x), "mlp_norm")
    if spec.norm_placement == "sandwich":
        x = x + norm(attend(norm(x, "attn_norm")), "attn_post_norm")
        return x + norm(mlp(norm(x, "mlp_norm")), "mlp_post_norm")
    x = x + attend(norm(x, "attn_norm"))
    return x + mlp(norm(x, "mlp_norm"))


def _norm(spec: DecoderSpec, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if spec.norm == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, spec.norm_eps)
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + spec.norm_eps) * (weight + spec.norm_offset)


def _rotate(rope: RopeSpec, x: Tensor) -> Tensor:
    """x [tokens, heads, head_dim] as complex numbers turned by position * frequency."""
    angles = torch.arange(len(x))[:, None] * frequencies(rope, 64)[0].double()
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]
    part, rest = x[..., : rope.rotary_dim], x[..., rope.rotary_dim :]
    if rope.interleaved:
        turned = torch.view_as_real(torch.complex(part[..., 0::2], part[..., 1::2]) * turns).flatten(-2)
    else:
        numbers = torch.complex(*part.chunk(2, -1)) * turns
        turned = torch.cat((numbers.real, numbers.imag), -1)
    return torch.cat((turned, rest), -1)


def _attention(spec: DecoderSpec, layer: LayerSpec, q: dict[str, Tensor], x: Tensor) -> Tensor:
    def heads(part: str, number: int) -> Tensor:
        return F.linear(x, q[f"attn.{part}.weight"], q.get(f"attn.{part}.bias")).view(len(x), number, spec.head_dim)

    query, key, value = heads("q", spec.num_heads), heads("k", spec.num_kv_heads), heads("v", spec.num_kv_heads)
    if spec.qk_norm:
        query = _norm(replace(spec, norm="rms"), query, q["attn.q_norm.weight"], None)
        key = _norm(replace(spec, norm="rms"), key, q["attn.k_norm.weight"], None)
    if layer.rope is not None:
        query, key = _rotate(spec.ropes[layer.rope], query), _rotate(spec.ropes[layer.rope], key)
    group = spec.num_heads // spec.num_kv_heads
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * spec.attn_scale
    if spec.attn_softcap:
        scores = spec.attn_softcap * torch.tanh(scores / spec.attn_softcap)
    distance = torch.arange(len(x))[:, None] - torch.arange(len(x))
    hidden = (distance < 0) | ((distance >= layer.window) if layer.window else False)
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    mixed = torch.einsum("hqk,khd->qhd", weights, value).flatten(1)
    return F.linear(mixed, q["attn.o.weight"], q.get("attn.o.bias"))


def _mlp(spec: DecoderSpec, q: dict[str, Tensor], x: Tensor) -> Tensor:
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": F.silu, "relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
    act = kinds[spec.activation]
    up = F.linear(x, q["mlp.up.weight"], q.get("mlp.up.bias"))
    inner = act(F.linear(x, q["mlp.gate.weight"], q.get("mlp.gate.bias"))) * up if spec.gated else act(up)
    return F.linear(inner, q["mlp.down.weight"], q.get("mlp.down.bias"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_feature_of_the_spec(variant: str) -> None:
    """Whole and in chunks; the spec says what the network is, twice."""
    spec = replace(BASE, **VARIANTS[variant])
    decoder, parameters = make(spec)
    ids = torch.randint(0, spec.vocab_size, (30,), generator=torch.Generator().manual_seed(3))
    wanted = plain_logits(spec, parameters, ids)
    for chunks in ((), (1, 7)):
        assert_close(logits_in_chunks(decoder, ids, chunks).double(), wanted, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_storage_types_round_the_matrices_and_nothing_else(dtype: torch.dtype, tied: bool) -> None:
    decoder, parameters = make(replace(BASE, tied=tied, qkv_bias=True), dtype)
    ids = torch.randint(0, 97, (20,))
    assert_close(logits_in_chunks(decoder, ids, (7,)).double(), plain_logits(decoder.spec, parameters, ids), 1e-4)


def test_a_cache_of_another_type_changes_little() -> None:
    decoder, _ = make(BASE)
    ids = torch.randint(0, 97, (20,))
    exact = logits_in_chunks(decoder, ids, (7,))
    rounded = logits_in_chunks(decoder, ids, (7,), dtype=torch.bfloat16)
    worst = float((exact - rounded).abs().max())
    assert 0 < worst < 0.3 * float(exact.std())


def test_tokens_do_not_depend_on_their_neighbours() -> None:
    """Two sequences in one step, in either order, and padding tokens without a slot."""
    decoder, _ = make(BASE)
    ids = torch.randint(0, 97, (12,))
    alone = logits_in_chunks(decoder, ids, ())
    pair = run(decoder, PagedCache(decoder, 12), ids, [(1, 0, 12), (0, 0, 4)])
    torch.testing.assert_close(pair[:12], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pair[12:], alone[:4], rtol=1e-5, atol=1e-5)


def test_forward_writes_the_slots_of_its_tokens_and_no_others() -> None:
    decoder, _ = make(BASE)
    cache = PagedCache(decoder, 20)
    run(decoder, cache, torch.arange(20), [(0, 0, 13)])
    flat = cache.kv.flatten(2, 3)
    written = cache.slots(0, 0, 13)
    assert not flat[:, :, written].isnan().any()
    assert int((~flat.isnan()).sum()) == flat[:, :, written].numel()


def test_names_and_shapes_of_the_parameters() -> None:
    expected = Decoder(replace(BASE, qk_norm=True, qkv_bias=True), dtype=torch.float32, max_model_len=8).expected()
    assert expected["embed.weight"] == expected["head.weight"] == (97, 36)
    layer = {name.removeprefix("layers.2."): shape for name, shape in expected.items() if name.startswith("layers.2.")}
    assert layer == {
        "attn_norm.weight": (36,), "attn.q.weight": (48, 36), "attn.k.weight": (16, 36), "attn.v.weight": (16, 36),
        "attn.q.bias": (48,), "attn.k.bias": (16,), "attn.v.bias": (16,), "attn.o.weight": (36, 48),
        "attn.q_norm.weight": (8,), "attn.k_norm.weight": (8,), "mlp_norm.weight": (36,),
        "mlp.gate.weight": (44, 36), "mlp.up.weight": (44, 36), "mlp.down.weight": (36, 44),
    }
    assert len(expected) == 3 * len(layer) + 3
    opt = Decoder(replace(BASE, **VARIANTS["opt-350m"]), dtype=torch.float32, max_model_len=8).expected()
    assert opt["embed.weight"] == (97, 20)
    assert opt["project_in.weight"] == (36, 20)
    assert opt["project_out.weight"] == (20, 36)
    assert opt["positions.weight"] == (66, 36)
    assert not {"final_norm.weight", "head.weight", "layers.0.mlp.gate.weight"} & set(opt)


def test_loading_says_what_does_not_fit() -> None:
    decoder = Decoder(BASE, dtype=torch.float32, max_model_len=8)
    with pytest.raises(ModelError, match=r"layers\.0\.attn\.q\.weight must have shape \[48, 36\].*\[36, 48\]"):
        decoder.load("layers.0.attn.q.weight", torch.zeros(36, 48))
    with pytest.raises(ModelError, match=r"no parameter 'lm_head\.weight'"):
        decoder.load("lm_head.weight", torch.zeros(97, 36))
    decoder.load("final_norm.weight", torch.ones(36))
    with pytest.raises(ModelError, match=r"'final_norm\.weight' twice"):
        decoder.load("final_norm.weight", torch.ones(36))
    with pytest.raises(AssertionError, match=r"layers\.0\.attn\.q\.weight"):
        decoder.finish()


def test_loaded_tensors_may_be_thrown_away() -> None:
    """What the decoder keeps is its own: a loader may reuse or unmap its buffers."""
    decoder, kept = Decoder(BASE, dtype=torch.float32, max_model_len=64), []
    for name, shape in decoder.expected().items():
        kept.append(torch.randn(shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
        decoder.load(name, kept[-1])
    before = logits_in_chunks(decoder, torch.arange(9), ())
    for tensor in kept:
        tensor.fill_(math.nan)
    assert torch.equal(logits_in_chunks(decoder, torch.arange(9), ()), before)


def test_equal_ropes_share_a_table() -> None:
    spec = replace(BASE, ropes=(RopeSpec(rotary_dim=8), RopeSpec(rotary_dim=8), RopeSpec(rotary_dim=4)))
    spec = replace(spec, layers=tuple(LayerSpec(rope=i) for i in range(3)))
    blocks: Any = Decoder(spec, dtype=torch.float32, max_model_len=8)._blocks
    tables = [block.attn._prepare[0].cos_sin for block in blocks]
    assert tables[0] is tables[1]
    assert tables[2] is not tables[0]


def test_few_calls_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten operators in a layer of the Llama kind: at one token each call costs as much as its work."""
    decoder, calls = make(BASE)[0], []
    for name in set(ops.__all__) - {"AttentionMeta", "built", "isa"}:
        operator = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, operator=operator, name=name: (calls.append(name), operator(*a))[1])
    logits_in_chunks(decoder, torch.arange(1), ())
    attention = ["add_rms_norm", "linear", "rope", "write_kv", "paged_attention", "linear"]
    mlp = ["add_rms_norm", "linear", "gated_activation", "linear"]
    assert calls == [*(attention + mlp) * 3, "add_rms_norm", "linear"]
