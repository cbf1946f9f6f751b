"""DecoderSpec: everything that a decoder-only model can vary, as frozen data.

Owns the vocabulary between the families (which read a checkpoint's config.json) and the one decoder (which builds
itself from a spec). No Hugging Face names below this line. Invariant: two checkpoints with equal specs are the same
network; ``forward`` never asks which family a spec came from.
"""

from dataclasses import dataclass, field
from typing import Literal

NormKind = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """A table of rotary angles.

    Attributes:
        base: theta. rotary_dim: leading dims of a head that rotate, even, <= head_dim.
        interleaved: True pairs dims (0, 1), (2, 3), ... (GPT-J style); False pairs i with i + rotary_dim / 2 (NeoX style).
        scaling: "none", "linear", "llama3", "yarn", "longrope" or "dynamic" (the last two fixed by the model length).
        factor: the scaling factor. original_max_len: trained length that the scaling refers to.
        low_freq_factor, high_freq_factor: of llama3. beta_fast, beta_slow, attention_factor, mscale, mscale_all_dim,
            truncate: of yarn.
        short_factor, long_factor: of longrope, one per frequency; the table is chosen from max_model_len at build time.
    """

    base: float = 10000.0
    rotary_dim: int = 0
    interleaved: bool = False
    scaling: Literal["none", "linear", "llama3", "yarn", "longrope", "dynamic"] = "none"
    factor: float = 1.0
    original_max_len: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What may differ from layer to layer.

    Attributes:
        window: a query sees the last ``window`` keys, itself included; 0 sees all.
        rope: index into DecoderSpec.ropes, or None for a layer without rotary positions.
    """

    window: int = 0
    rope: int | None = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """One decoder-only network.

    Attributes:
        family: name for messages. vocab_size: ids that exist; embedding rows beyond it are padding and never sampled.
        embedding_rows: rows of the checkpoint's embedding (>= vocab_size).
        hidden, num_heads, num_kv_heads, head_dim, intermediate: sizes. max_len: positions the model was made for.
        layers: one LayerSpec per layer. ropes: the tables they point at.
        norm, norm_eps: kind and epsilon. norm_offset: added to the weight (1.0 in Gemma: (1 + w)). norm_bias: LayerNorm bias.
        norm_placement: "pre" (norm, sublayer, add), "post" (sublayer, add, norm: OPT-350m) or "sandwich" (pre and post norms
            around both sublayers: Gemma 2 and 3).
        parallel_residual: attention and MLP read the same input (GPT-NeoX, each with its own norm).
        final_norm: False where nothing follows the last layer (OPT-350m).
        qk_norm: RMSNorm of q and k per head before the rotation (Qwen3, Gemma 3), with norm_offset and norm_eps.
        qkv_bias, out_bias, mlp_bias: biases of the projections. attn_scale: multiplies q.k. attn_softcap, logit_softcap: 0 off.
        gated: gate and up projections (act(gate) * up), else a plain MLP. activation: of the MLP.
        positions: 0 for none, else rows of a learned position table. position_offset: added to positions (OPT: 2).
        embedding_scale: multiplies embeddings (Gemma: sqrt(hidden)). embedding_dim: of the table where it differs from
            hidden (OPT-350m: project_in and project_out), 0 otherwise.
        tied: the head is the embedding. head_bias: of the head (Phi style). logit_scale: multiplies logits.
        eos_token_ids, bos_token_id: as the config says; generation_config wins.
    """

    family: str
    vocab_size: int
    embedding_rows: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    max_len: int
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...] = ()
    norm: NormKind = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    norm_bias: bool = False
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    parallel_residual: bool = False
    final_norm: bool = True
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    attn_scale: float = 1.0
    attn_softcap: float = 0.0
    logit_softcap: float = 0.0
    gated: bool = True
    activation: Activation = "silu"
    positions: int = 0
    position_offset: int = 0
    embedding_scale: float = 1.0
    embedding_dim: int = 0
    tied: bool = False
    head_bias: bool = False
    logit_scale: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)
