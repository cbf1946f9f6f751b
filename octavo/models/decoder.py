"""The one decoder: embedding, blocks, norm, head, built from a DecoderSpec.

Owns the parameters and the order of the computation. It knows no family, no checkpoint names and no requests: ids,
positions, cache and metadata come in, hidden states and logits go out. What varies is chosen in ``__init__``;
``forward`` has no branch. Invariant: a token's result depends on its id, position and keys alone, never on the tokens
that happen to be computed with it.
"""

import torch
from torch import Tensor

from octavo.errors import ModelError
from octavo.layers.embedding import Embedding, Head, LearnedPositions, Project, Scale, Step
from octavo.layers.norm import NoNorm, Norm
from octavo.layers.rope import Rope
from octavo.layers.weight import PackedWeight, Slot, Slots, prefixed
from octavo.layers.workspace import Workspace
from octavo.models.blocks import Builder, block_class
from octavo.models.frequencies import frequencies
from octavo.models.spec import DecoderSpec, RopeSpec
from octavo.ops.attention import AttentionMeta
from octavo.parallel import Shards


class Decoder:
    """A decoder-only network, for inference.

    Args:
        spec: the network. dtype: storage type of matrices (float32, bfloat16, float16); activations, norms and biases
            are float32. max_model_len: positions that the rotary tables hold. shards: the tensor-parallel
            group.
    """

    def __init__(
        self, spec: DecoderSpec, *, dtype: torch.dtype, max_model_len: int,
        shards: Shards | None = None,
    ) -> None:
        self.spec, self.dtype, self.max_model_len = spec, dtype, max_model_len
        width = spec.embedding_dim or spec.hidden
        self._embed = Embedding(spec.vocab_size, spec.embedding_rows, width, tied=spec.tied, dtype=dtype)
        before: list[Scale | Project | LearnedPositions] = []
        if spec.embedding_scale != 1.0:
            before.append(Scale(spec.embedding_scale))
        if width != spec.hidden:
            before.append(Project("project_in", width, spec.hidden, dtype))
        if spec.positions:
            before.append(LearnedPositions(spec.positions, spec.hidden, spec.position_offset))
        build = Builder(spec, _ropes(spec.ropes, max_model_len), dtype, shards or Shards())
        block = block_class(spec)
        self._blocks = tuple(block(build, layer) for layer in spec.layers)
        self._final_norm: Norm | NoNorm = build.norm() if spec.final_norm else NoNorm()
        after = [Project("project_out", spec.hidden, width, dtype)] if width != spec.hidden else []
        self._head = Head(
            self._embed.table if isinstance(self._embed.table, PackedWeight) else None, vocab_size=spec.vocab_size,
            rows=spec.embedding_rows, columns=width, bias=spec.head_bias, scale=spec.logit_scale,
            softcap=spec.logit_softcap, dtype=dtype,
        )
        self._before: tuple[Step, ...] = tuple(before)
        self._after: tuple[Project, ...] = tuple(after)
        self._slots: Slots = prefixed("embed.", self._embed.slots())
        for part in (*before, *after, self._head):
            self._slots |= part.slots()
        for i, layer in enumerate(self._blocks):
            self._slots |= prefixed(f"layers.{i}.", layer.slots())
        self._slots |= prefixed("final_norm.", self._final_norm.slots())
        self._missing = set(self._slots)

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter that must be loaded, in the shapes of a checkpoint."""
        return {name: slot.shape for name, slot in self._slots.items()}

    def load(self, name: str, tensor: Tensor) -> None:
        """Take one parameter; it is converted and copied, and matrices are packed as soon as their parts are there.

        Raises:
            ModelError: the network has no such parameter, it came before, or its shape is another one.
        """
        slot: Slot | None = self._slots.get(name)
        if slot is None:
            raise ModelError(f"the network has no parameter {name!r}.", "model")
        if name not in self._missing:
            raise ModelError(f"the checkpoint gives {name!r} twice.", "model")
        if tuple(tensor.shape) != slot.shape:
            wanted, found = list(slot.shape), list(tensor.shape)
            raise ModelError(f"{name} must have shape {wanted}, the checkpoint has {found}.", "model")
        slot.store(tensor)
        self._missing.remove(name)

    def finish(self) -> None:
        """Say that loading is over. The loader has named missing tensors by now; here they are a bug."""
        assert not self._missing, f"parameters never loaded: {sorted(self._missing)}"

    def forward(self, ids: Tensor, positions: Tensor, kv: Tensor, meta: AttentionMeta) -> Tensor:
        """Compute tokens and put their keys and values into the cache.

        Args:
            ids, positions: int64 [tokens]. kv: [num_layers, 2, num_blocks, block_size, kv_heads, head_dim], contiguous.
            meta: where the tokens' sequences are in the cache.

        Returns:
            Hidden states after the final norm, float32 [tokens, hidden].
        """
        x = self._embed(ids)
        for step in self._before:
            x = step(x, positions)
        s = self.spec
        work = Workspace(
            x, positions, meta, num_heads=s.num_heads, num_kv_heads=s.num_kv_heads, head_dim=s.head_dim,
            up_size=s.intermediate * (1 + s.gated), intermediate=s.intermediate,
        )
        caches = kv.view(-1, *kv.shape[2:]).unbind()
        for i, block in enumerate(self._blocks):
            block(work, caches[2 * i], caches[2 * i + 1])
        self._final_norm.add(work.normed, work.residual, work.delta)
        return work.normed

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [rows, vocab_size] of hidden states [rows, hidden]; soft cap and scale are applied."""
        for step in self._after:
            hidden = step(hidden, hidden)
        return self._head(hidden)


def _ropes(specs: tuple[RopeSpec, ...], max_model_len: int) -> tuple[Rope, ...]:
    """One table per different spec, shared by the entries that are equal."""
    tables: dict[RopeSpec, Rope] = {}
    for spec in specs:
        if spec not in tables:
            tables[spec] = Rope(*frequencies(spec, max_model_len), max_model_len, interleaved=spec.interleaved)
    return tuple(tables[spec] for spec in specs)
