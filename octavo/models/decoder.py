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
from octavo.layers.weight import Slot, Slots, Table, prefixed
from octavo.layers.workspace import Fresh, Memory, Workspace
from octavo.models.blocks import Builder, block_class
from octavo.models.frequencies import frequencies
from octavo.models.spec import DecoderSpec, RopeSpec
from octavo.ops.attention import AttentionMeta
from octavo.parallel import Shards


class Decoder:
    """A decoder-only network, for inference.

    Args:
        spec: the network. dtype: storage type of matrices (float32, bfloat16, float16); norms and biases are float32.
            max_model_len: positions that the rotary tables hold. shards: the tensor-parallel group.
        device: "cpu", where activations are float32, or "cuda", where they have the type of the matrices and the residual
            stream is float32 for networks that norm before their sublayers.
    """

    def __init__(
        self, spec: DecoderSpec, *, dtype: torch.dtype, max_model_len: int,
        shards: Shards | None = None, device: str = "cpu",
    ) -> None:
        self.spec, self.dtype, self.max_model_len, self.device = spec, dtype, max_model_len, device
        self.act_dtype = torch.float32 if device == "cpu" else dtype
        self.residual_dtype = residual_dtype(spec, self.act_dtype)
        width = spec.embedding_dim or spec.hidden
        self._embed = Embedding(spec.vocab_size, spec.embedding_rows, width, tied=spec.tied, dtype=dtype, device=device)
        before: list[Scale | Project | LearnedPositions] = []
        if spec.embedding_scale != 1.0:
            before.append(Scale(spec.embedding_scale))
        if width != spec.hidden:
            before.append(Project("project_in", width, spec.hidden, dtype, device))
        if spec.positions:
            before.append(LearnedPositions(spec.positions, spec.hidden, spec.position_offset, device))
        build = Builder(spec, _ropes(spec.ropes, max_model_len, device), dtype, shards or Shards(), device)
        block = block_class(spec)
        self._blocks = tuple(block(build, layer) for layer in spec.layers)
        self._final_norm: Norm | NoNorm = build.norm() if spec.final_norm else NoNorm()
        after = [Project("project_out", spec.hidden, width, dtype, device)] if width != spec.hidden else []
        self._head = Head(
            None if isinstance(self._embed.table, Table) else self._embed.table, vocab_size=spec.vocab_size,
            rows=spec.embedding_rows, columns=width, bias=spec.head_bias, scale=spec.logit_scale,
            softcap=spec.logit_softcap, dtype=dtype, device=device,
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

    def forward(self, ids: Tensor, positions: Tensor, kv: Tensor, meta: AttentionMeta, memory: Memory | None = None) -> Tensor:
        """Compute tokens and put their keys and values into the cache.

        Args:
            ids, positions: int64 [tokens]. kv: [num_layers, 2, num_blocks, block_size, kv_heads, head_dim], contiguous.
            meta: where the tokens' sequences are in the cache. memory: where buffers come from; None: new ones.

        Returns:
            Hidden states after the final norm [tokens, hidden], in the first buffer of ``memory``.
        """
        s, memory = self.spec, memory or Fresh(self.device)
        normed = memory.take((len(ids), s.hidden), self.act_dtype)  # the first buffer: what is returned lies at the beginning
        x = memory.take((len(ids), self._embed.columns), self.act_dtype)
        self._embed(x, ids)
        for step in self._before:
            x = step(x, positions)
        work = Workspace(
            x, normed, positions, meta, memory, self.residual_dtype, num_heads=s.num_heads, num_kv_heads=s.num_kv_heads,
            head_dim=s.head_dim, up_size=s.intermediate * (1 + s.gated), intermediate=s.intermediate,
        )
        caches = kv.view(-1, *kv.shape[2:]).unbind()
        for i, block in enumerate(self._blocks):
            block(work, caches[2 * i], caches[2 * i + 1])
        self._final_norm.add(work.normed, work.residual, work.delta)
        return work.normed

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """float32 [rows, vocab_size] of hidden states [rows, hidden], in ``out`` where given; soft cap and scale are applied."""
        for step in self._after:
            hidden = step(hidden, hidden)
        if out is None:
            out = hidden.new_empty(len(hidden), self.spec.vocab_size, dtype=torch.float32)
        self._head(out, hidden)
        return out


def residual_dtype(spec: DecoderSpec, act_dtype: torch.dtype) -> torch.dtype:
    """The type of the residual stream: float32, but where a norm reads or writes it alone, beside activations."""
    mixed = spec.norm_placement == "post" or spec.parallel_residual
    return act_dtype if mixed else torch.float32


def _ropes(specs: tuple[RopeSpec, ...], max_model_len: int, device: str) -> tuple[Rope, ...]:
    """One table per different spec, shared by the entries that are equal."""
    tables: dict[RopeSpec, Rope] = {}
    for spec in specs:
        if spec not in tables:
            tables[spec] = Rope(
                *frequencies(spec, max_model_len), max_model_len, interleaved=spec.interleaved, device=device
            )
    return tuple(tables[spec] for spec in specs)
