"""How much room attention needs on a GPU for its work lists and for the results of partitions that wait to be merged.

Owns the choice of how many partial results there may be; ops/attention.py knows how large a list and a result are.
Invariant: more contexts than there is room for cost time and nothing else, because a sequence without room is walked in one
go.
"""

from dataclasses import dataclass

import torch

from octavo.models.spec import DecoderSpec
from octavo.ops.attention import partial_floats, work_ints

PARTIAL_BYTES = 128 * 2**20  # most that partial results may take


@dataclass(frozen=True, slots=True)
class AttentionSizes:
    """Sizes of attention's buffers.

    Attributes:
        windows: of the layers, each once; one list of ``work`` int32 words for each. partials: float32 values of the room
            for ``max_partials`` results. heads, kv_heads, head_dim: of a layer.
    """

    windows: tuple[int, ...]
    work: int
    partials: int
    max_partials: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return 4 * (len(self.windows) * self.work + self.partials)


def attention_sizes(spec: DecoderSpec, dtype: torch.dtype, num_rows: int, num_tokens: int, max_model_len: int) -> AttentionSizes:
    """Sizes for steps of at most ``num_rows`` sequences and ``num_tokens`` tokens. float32 needs neither list nor room."""
    h, k, d = spec.num_heads, spec.num_kv_heads, spec.head_dim
    if dtype == torch.float32:
        return AttentionSizes((), 0, 0, 0, h, k, d)
    windows = tuple(sorted({layer.window for layer in spec.layers}))
    each = partial_floats(1, h, k, d)
    useful = num_rows * (-(-max_model_len // 256)) * k
    most = max(1, min(useful, PARTIAL_BYTES // (4 * each)))
    return AttentionSizes(windows, work_ints(num_rows, num_tokens), partial_floats(most, h, k, d), most, h, k, d)
