"""Steps of attention on a GPU: what the tests of the decode and of the prefill kernels share.

Owns the building of a paged step from the lengths of its sequences and its exact answer; it does not know which kernel takes a
sequence. Invariant: everything around the data is poisoned: cells that hold no token are NaN, blocks that nobody owns too, and
entries of the block tables that are not in use (those that have left a window among them) name no block.
"""

import math
from dataclasses import dataclass, field
from itertools import accumulate

import torch

BF16, F16, F32, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
NO_BLOCK = -7
# (new tokens, keys)
ONES = ((1, 1), (1, 15), (1, 16), (1, 17), (1, 255), (1, 0), (1, 256), (1, 257), (1, 300), (1, 1023), (1, 2100), (1, 63), (1, 0))


@dataclass(frozen=True)
class Case:
    """A step: (new tokens, keys) per sequence, 0 keys are padding; and the model's side of attention."""

    sequences: tuple[tuple[int, int], ...] = ONES
    heads: tuple[int, int] = (8, 2)
    head_dim: int = 128
    act: torch.dtype = BF16
    kv: torch.dtype | None = None  # act
    block_size: int = 16
    window: int = 0
    softcap: float = 0.0
    alibi: bool = False
    portable: bool = False  # slopes of zero where there are none
    size: float = 1.0  # of the queries
    seed: int = 0


@dataclass
class Step:
    """The tensors of a Case on the GPU.

    Attributes:
        q: rows further apart than they are long: a part of the fused projection. k, v: the caches. scales: of an 8-bit cache.
        tables, rows, starts, contexts, max_query: as in AttentionMeta. slopes: or None.
    """

    case: Case
    whole_blocks: bool = False  # only blocks that have left a window are poisoned, not the cells beside its begin
    gap: int | None = None  # heads between two rows of q; None: as many as those of the keys and values
    random_slopes: bool = False  # up to 1, and not rising from head to head
    q: torch.Tensor = field(init=False)
    k: torch.Tensor = field(init=False)
    v: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        case, size = self.case, self.case.block_size
        heads, kv_heads = case.heads
        cpu = torch.Generator().manual_seed(case.seed)
        random = torch.Generator("cuda").manual_seed(case.seed)
        self.kv_dtype = case.kv or case.act
        self.scales = (0.75, 1.5) if self.kv_dtype == E4M3 else (1.0, 1.0)
        needed = [-(-keys // size) for _, keys in case.sequences]
        num_rows, num_blocks = len(needed) + 2, sum(needed) + 2
        owned = torch.randperm(num_blocks, generator=cpu).to(torch.int32)
        tables = torch.full((num_rows, max(needed) + 1), NO_BLOCK, dtype=torch.int32)
        rows = torch.randperm(num_rows, generator=cpu)[: len(needed)].to(torch.int32)
        low, high = (torch.zeros(num_blocks, dtype=torch.int32) for _ in range(2))  # the cells of a block that hold tokens
        at = 0
        for row, (new, keys) in zip(rows.tolist(), case.sequences, strict=True):
            count = -(-keys // size)
            blocks = owned[at : at + count]
            at += count
            tables[row, :count] = blocks
            start = torch.arange(count, dtype=torch.int32) * size
            high[blocks.long()] = (keys - start).clamp(max=size)
            first = self.first_visible(new, keys)
            low[blocks.long()] = ((first // size * size if self.whole_blocks else first) - start).clamp(0, size)
            tables[row, : first // size] = NO_BLOCK
        cell = torch.arange(size)
        empty = ((cell >= high.unsqueeze(1)) | (cell < low.unsqueeze(1))).cuda()[:, :, None, None]
        shape = (num_blocks, size, kv_heads, case.head_dim)
        made = [torch.randn(shape, generator=random, device="cuda").masked_fill_(empty, math.nan) for _ in range(2)]
        self.k, self.v = ((x / scale).to(self.kv_dtype) for x, scale in zip(made, self.scales, strict=True))
        self.tables, self.rows = tables.cuda(), rows.cuda()
        counts = [new for new, _ in case.sequences]
        self.starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device="cuda")
        self.contexts = torch.tensor([keys for _, keys in case.sequences], dtype=torch.int32, device="cuda")
        gap = 2 * kv_heads if self.gap is None else self.gap
        wide = torch.randn(sum(counts), heads + gap, case.head_dim, generator=random, device="cuda") * case.size
        self.q = wide.to(case.act)[:, :heads]
        slopes = torch.linspace(0.01, 0.4, heads, device="cuda")
        if self.random_slopes:
            slopes = torch.rand(heads, generator=random, device="cuda")
        self.slopes = slopes if case.alibi else slopes * 0 if case.portable else None
        self.max_query = max(counts)

    def first_visible(self, new: int, keys: int) -> int:
        """The first key that a sequence's first new token sees."""
        return max(0, keys - new - self.case.window + 1) if self.case.window else 0

    def tokens(self, sequence: int) -> slice:
        """A sequence's rows of q."""
        return slice(int(self.starts[sequence]), int(self.starts[sequence + 1]))

    def oracle(self, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Softmax over all visible keys at once, in float64: the output, and the weighted sum of |values|."""
        case, group = self.case, self.case.heads[0] // self.case.heads[1]
        new, keys = case.sequences[sequence]
        j = torch.arange(self.first_visible(new, keys), keys, device="cuda")
        blocks = self.tables[self.rows[sequence].long(), j // case.block_size].long()
        cells = (blocks, j % case.block_size)
        k, v = (x[cells].double().repeat_interleave(group, 1) * s for x, s in zip((self.k, self.v), self.scales, strict=True))
        scores = torch.einsum("qhd,khd->hqk", self.q[self.tokens(sequence)].double(), k) * case.head_dim**-0.5
        if case.softcap > 0:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        distance = torch.arange(keys - new, keys, device="cuda").unsqueeze(1) - j
        if self.slopes is not None:
            scores = scores - self.slopes.double().view(-1, 1, 1) * distance
        hidden = (distance < 0) | ((distance >= case.window) if case.window else False)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v), torch.einsum("hqk,khd->qhd", weights, v.abs())
