"""The four ways to join attention and MLP into a layer.

Owns the order of norms, sublayers and additions; it does not know families. A block reads and writes the network's
state as ``work.residual + work.delta``: the last sublayer's output stays apart until the next norm, which adds it on
the way. Invariant: every block leaves the state in that form, so that blocks of any kind can follow each other.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from octavo.layers.attention import Attention, QKNorm
from octavo.layers.mlp import MLP, GatedMLP, PlainMLP
from octavo.layers.norm import LayerNorm, Norm, RMSNorm
from octavo.layers.rope import Rope
from octavo.layers.weight import Slots, prefixed
from octavo.layers.workspace import Workspace
from octavo.models.spec import DecoderSpec, LayerSpec
from octavo.parallel import Shards


@dataclass(frozen=True, slots=True)
class Builder:
    """Makes the parts of a block from the spec.

    Attributes:
        spec: the network. ropes: one per entry of spec.ropes. dtype: of the weights. shards: the group. device: where
            the weights live.
    """

    spec: DecoderSpec
    ropes: tuple[Rope, ...]
    dtype: torch.dtype
    shards: Shards
    device: str = "cpu"

    def norm(self) -> Norm:
        """A norm over the hidden size."""
        s = self.spec
        if s.norm == "layer":
            return LayerNorm(s.hidden, s.norm_eps, bias=s.norm_bias, device=self.device)
        return RMSNorm(s.hidden, s.norm_eps, s.norm_offset, self.device)

    def attention(self, layer: LayerSpec) -> Attention:
        """The attention of one layer."""
        s = self.spec
        return Attention(
            hidden=s.hidden, num_heads=s.num_heads, num_kv_heads=s.num_kv_heads, head_dim=s.head_dim,
            qkv_bias=s.qkv_bias, out_bias=s.out_bias, scale=s.attn_scale, window=layer.window, softcap=s.attn_softcap,
            qk_norm=QKNorm(s.head_dim, s.norm_eps, s.norm_offset, self.device) if s.qk_norm else None,
            rope=None if layer.rope is None else self.ropes[layer.rope], dtype=self.dtype, shards=self.shards,
            device=self.device,
        )

    def mlp(self) -> MLP:
        """The MLP of one layer."""
        s = self.spec
        kind = GatedMLP if s.gated else PlainMLP
        return kind(
            s.hidden, s.intermediate, s.activation, bias=s.mlp_bias, dtype=self.dtype, shards=self.shards, device=self.device
        )


class Block(Protocol):
    """One layer of the decoder."""

    def __init__(self, build: Builder, layer: LayerSpec) -> None: ...

    def slots(self) -> Slots:
        """Names and shapes of the layer's parameters."""

    def __call__(self, work: Workspace, k_cache: Tensor, v_cache: Tensor) -> None:
        """Advance the state in work by one layer; the layer's keys and values go to its caches."""


class SequentialBlock:
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, build: Builder, layer: LayerSpec) -> None:
        self.attn_norm, self.attn = build.norm(), build.attention(layer)
        self.mlp_norm, self.mlp = build.norm(), build.mlp()

    def slots(self) -> Slots:
        """Two norms and two sublayers."""
        return _slots(attn_norm=self.attn_norm, attn=self.attn, mlp_norm=self.mlp_norm, mlp=self.mlp)

    def __call__(self, work: Workspace, k_cache: Tensor, v_cache: Tensor) -> None:
        """See Block."""
        self.attn.advance(self.attn_norm, work, k_cache, v_cache)
        self.mlp.advance(self.mlp_norm, work)


class ParallelBlock(SequentialBlock):
    """x += attention(norm(x)) + mlp(other norm(x)), both of the same x (GPT-NeoX)."""

    def __call__(self, work: Workspace, k_cache: Tensor, v_cache: Tensor) -> None:
        """See Block."""
        self.attn_norm.add(work.normed, work.residual, work.delta)
        self.attn(work.delta, work.normed, work, k_cache, v_cache)
        self.mlp_norm(work.normed, work.residual)
        work.residual.add_(work.delta)
        self.mlp(work.delta, work.normed, work)


class PostNormBlock(SequentialBlock):
    """x = norm(x + attention(x)); x = norm(x + mlp(x)) (OPT-350m). The residual is zero between two such blocks."""

    def __call__(self, work: Workspace, k_cache: Tensor, v_cache: Tensor) -> None:
        """See Block."""
        work.delta.add_(work.residual)
        self.attn(work.normed, work.delta, work, k_cache, v_cache)
        self.attn_norm.add(work.residual, work.delta, work.normed)
        self.mlp(work.normed, work.residual, work)
        self.mlp_norm.add(work.delta, work.residual, work.normed)
        work.residual.zero_()


class SandwichBlock:
    """x += norm(attention(norm(x))); x += norm(mlp(norm(x))), four norms (Gemma 2 and 3)."""

    def __init__(self, build: Builder, layer: LayerSpec) -> None:
        self.attn_norm, self.attn, self.attn_post_norm = build.norm(), build.attention(layer), build.norm()
        self.mlp_norm, self.mlp, self.mlp_post_norm = build.norm(), build.mlp(), build.norm()

    def slots(self) -> Slots:
        """Four norms and two sublayers."""
        return _slots(
            attn_norm=self.attn_norm, attn=self.attn, attn_post_norm=self.attn_post_norm,
            mlp_norm=self.mlp_norm, mlp=self.mlp, mlp_post_norm=self.mlp_post_norm,
        )

    def __call__(self, work: Workspace, k_cache: Tensor, v_cache: Tensor) -> None:
        """See Block. ``normed`` and ``delta`` take turns, because a norm may not write over what it adds."""
        self.attn_norm.add(work.normed, work.residual, work.delta)
        self.attn(work.delta, work.normed, work, k_cache, v_cache)
        self.attn_post_norm(work.normed, work.delta)
        self.mlp_norm.add(work.delta, work.residual, work.normed)
        self.mlp(work.normed, work.delta, work)
        self.mlp_post_norm(work.delta, work.normed)


def block_class(spec: DecoderSpec) -> type[Block]:
    """The kind of block that a spec asks for."""
    if spec.parallel_residual:
        assert spec.norm_placement == "pre", "a parallel residual goes with norms before the sublayers"
        return ParallelBlock
    classes: dict[str, type[Block]] = {"pre": SequentialBlock, "post": PostNormBlock, "sandwich": SandwichBlock}
    return classes[spec.norm_placement]


def _slots(**parts: Norm | Attention | MLP) -> Slots:
    found: Slots = {}
    for name, part in parts.items():
        found |= prefixed(f"{name}.", part.slots())
    return found
