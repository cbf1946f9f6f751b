"""Every operator in plain torch: the specification of the kernels, their oracle in the tests, and the fallback.

Owns the meaning of each operator: same names, same signatures, same out-variants as the extension. It does not know who
calls it and it never looks at the extension. Activations are float32; weights and the KV cache are float32, bfloat16 or
float16 and are widened before they are used. Invariant: what a row gets depends on that row's inputs alone; the kernels
promise this by the bit, the functions here up to the rounding of torch's matmul (``linear`` and ``paged_attention``).
Sampling works in float64, so that a kernel may differ from it only where a sum falls within rounding of a border.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 32  # output features in one panel of a packed weight
PARTITION = 256  # tokens in one partition of the keys, counted from the start of the context
E4M3_MAX = 448.0


# Norms: x may be [tokens, hidden] or [tokens, heads, head_dim]; the last dim is normalised.


def rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> None:
    """out = x * rsqrt(mean(x^2) + eps) * (weight + offset)."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    torch.mul(x * scale, weight.float() + offset, out=out)


def add_rms_norm(out: Tensor, residual: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> None:
    """residual += x, then out = rms_norm(residual)."""
    residual.add_(x)
    rms_norm(out, residual, weight, eps, offset)


def layer_norm(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> None:
    """out = (x - mean) * rsqrt(variance + eps) * weight + bias."""
    out.copy_(F.layer_norm(x, x.shape[-1:], weight.float(), None if bias is None else bias.float(), eps))


def add_layer_norm(out: Tensor, residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> None:
    """residual += x, then out = layer_norm(residual)."""
    residual.add_(x)
    layer_norm(out, residual, weight, bias, eps)


# Positions and activations


def rope(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> None:
    """Rotate the first rotary_dim dims of every head of q and k, in place; pairs are halves or neighbours."""
    rotary_dim = cos_sin.shape[1]
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    for x in (q, k):
        turned = x[..., :rotary_dim]
        a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
        new_a, new_b = a * cos - b * sin, b * cos + a * sin
        a.copy_(new_a)
        b.copy_(new_b)


def _act(x: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        return F.silu(x)
    if kind == "gelu":  # by erfc, which keeps the small values left of zero that 1 + erf loses
        twice: Tensor = torch.special.erfc(x * -math.sqrt(0.5))
        return 0.5 * x * twice
    if kind == "gelu_tanh":  # 0.5 * (1 + tanh(u)) is sigmoid(2 u)
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))
    if kind == "relu":
        return F.relu(x)
    raise RuntimeError(f"kind must be silu, gelu, gelu_tanh or relu, got {kind!r}")


def gated_activation(out: Tensor, x: Tensor, kind: str) -> None:
    """out [tokens, d] = act(x[:, :d]) * x[:, d:]."""
    gate, up = x.chunk(2, dim=-1)
    torch.mul(_act(gate, kind), up, out=out)


def activation(out: Tensor, x: Tensor, kind: str) -> None:
    """out = act(x)."""
    out.copy_(_act(x, kind))


# KV cache: slot = block * block_size + offset; -1 stands for no slot


def write_kv(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, k_scale: float = 1.0, v_scale: float = 1.0
) -> None:
    """Token t's key and value go to slots[t], divided by the scales; -1 writes nowhere."""
    used = slots >= 0
    for x, cache, scale in ((key, k_cache, k_scale), (value, v_cache, v_scale)):
        cache.view(-1, *cache.shape[2:])[slots[used]] = narrowed(x[used].float() / scale, cache.dtype)


def gather_kv(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, k_scale: float = 1.0, v_scale: float = 1.0
) -> None:
    """The inverse of write_kv: row t is read from slots[t]; -1 gives zeros."""
    used = slots >= 0
    for x, cache, scale in ((key, k_cache, k_scale), (value, v_cache, v_scale)):
        x.zero_()
        x[used] = (cache.view(-1, *cache.shape[2:])[slots[used]].float() * scale).to(x.dtype)


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x float32 in another type; an 8-bit float saturates at its largest value instead of becoming NaN."""
    if dtype == torch.float8_e4m3fn:
        x = x.clamp(-E4M3_MAX, E4M3_MAX)
    return x.to(dtype)


def copy_blocks(kv: Tensor, pairs: Tensor) -> None:
    """Block pairs[i, 0] is copied over block pairs[i, 1] in every layer; no block may be source and destination."""
    source, target = pairs.long().unbind(1)
    if torch.isin(target, source).any():
        raise RuntimeError("copy_blocks: a destination is also a source")
    kv[:, :, target] = kv[:, :, source]


def swap_blocks(src: Tensor, dst: Tensor, pairs: Tensor) -> None:
    """Block pairs[i, 0] of one pool is copied over block pairs[i, 1] of another."""
    source, target = pairs.long().unbind(1)
    dst[:, :, target] = src[:, :, source]


# Attention


def paged_attention(
    out: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, rows: Tensor, query_start: Tensor,
    context_len: Tensor, scale: float, window: int, softcap: float, alibi_slopes: Tensor | None, k_scale: float = 1.0,
    v_scale: float = 1.0, work: Tensor | None = None, partials: Tensor | None = None, max_query: int = 0,
) -> None:
    """Causal attention of every sequence's new tokens over its blocks, partitions merged left to right."""
    block_size, kv_heads = k_cache.shape[1], k_cache.shape[2]
    heads, head_dim = q.shape[1:]
    group = heads // kv_heads
    slopes = None if alibi_slopes is None else alibi_slopes.float().view(kv_heads, group, 1, 1)
    starts = query_start.tolist()
    for s, (row, context) in enumerate(zip(rows.tolist(), context_len.tolist(), strict=True)):
        start, end = starts[s], starts[s + 1]
        n = end - start
        if n == 0:
            continue
        # [kv_heads, group, n, head_dim]; keys and values below are [kv_heads, 1, keys, head_dim]
        queries = q[start:end].view(n, kv_heads, group, head_dim).permute(1, 2, 0, 3) * scale
        positions = torch.arange(context - n, context).unsqueeze(1)
        best = queries.new_full((kv_heads, group, n, 1), -math.inf)
        total = torch.zeros_like(best)
        mixed = torch.zeros_like(queries)
        first = max(0, context - n - window + 1) // PARTITION * PARTITION if window > 0 else 0
        for begin in range(first, context, PARTITION):
            keys = torch.arange(begin, min(begin + PARTITION, context))
            blocks = block_tables[row, keys // block_size].long()
            k = k_cache[blocks, keys % block_size].float().mul_(k_scale).transpose(0, 1).unsqueeze(1)
            v = v_cache[blocks, keys % block_size].float().mul_(v_scale).transpose(0, 1).unsqueeze(1)
            distance = positions - keys
            scores = queries @ k.transpose(2, 3)
            if softcap > 0:
                scores = softcap * torch.tanh(scores / softcap)
            if slopes is not None:
                scores = scores - slopes * distance
            hidden = distance < 0
            if window > 0:
                hidden |= distance >= window
            scores = scores.masked_fill_(hidden, -math.inf)
            top = scores.amax(-1, keepdim=True)
            # A query that sees no key of this partition gets top = -inf, weights of zero, and keeps what it had.
            weights = torch.exp(scores - top.masked_fill(top == -math.inf, 0.0))
            merged = torch.maximum(best, top)
            anchor = merged.masked_fill(merged == -math.inf, 0.0)
            old, new = torch.exp(best - anchor), torch.exp(top - anchor)
            total = total * old + weights.sum(-1, keepdim=True) * new
            mixed = mixed * old + (weights @ v) * new
            best = merged
        out[start:end] = (mixed / total).permute(2, 0, 1, 3).reshape(n, heads, head_dim)


# Linear layers: packed[i // 32, k, i % 32] = weight[i, k], zero padded


def pack_linear(weight: Tensor) -> Tensor:
    """weight [n, k] -> panels [ceil(n / 32), k, 32] of the same dtype."""
    n, k = weight.shape
    panels = -(-n // PANEL)
    padded = F.pad(weight, (0, 0, 0, panels * PANEL - n))
    return padded.view(panels, PANEL, k).permute(0, 2, 1).contiguous()


def linear(out: Tensor, x: Tensor, packed: Tensor, bias: Tensor | None, n: int) -> None:
    """out [tokens, n] = x [tokens, k] @ weight.T + bias."""
    y = torch.matmul(x, packed.float())  # [panels, tokens, 32]
    y = y.transpose(0, 1).reshape(x.shape[0], packed.shape[0] * PANEL)[:, :n]
    out.copy_(y if bias is None else y + bias)


def embedding(out: Tensor, ids: Tensor, packed: Tensor, n: int) -> None:
    """out [tokens, k] = weight[ids], read from the panels; an id outside 0 .. n - 1 is an error."""
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < n:
        raise RuntimeError(f"embedding: an id is outside 0 .. {n - 1}: {int(ids.min())} .. {int(ids.max())}")
    out.copy_(packed[ids // PANEL, :, ids % PANEL])


# Sampling


def penalties(
    logits: Tensor, counts: Tensor, prompt_mask: Tensor, slots: Tensor, repetition: Tensor, frequency: Tensor,
    presence: Tensor,
) -> None:
    """Push down what a row has seen: repetition over prompt and output, frequency and presence over the output."""
    rows = (slots >= 0).nonzero().squeeze(1)
    if rows.numel() == 0:
        return
    count, x = counts[slots[rows].long()], logits[rows]
    repeated = (count > 0) | prompt_mask[slots[rows].long()]
    factor = repetition[rows].unsqueeze(1)
    x = torch.where(repeated, torch.where(x > 0, x / factor, x * factor), x)
    logits[rows] = x - frequency[rows].unsqueeze(1) * count - presence[rows].unsqueeze(1) * (count > 0)


def philox(seeds: Tensor, index: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 with key (seed low, seed high) and counter (position, index, 0, 0): four words in int64 [rows].

    The products wrap modulo 2^64, which leaves both of their halves right.
    """
    mask = 0xFFFFFFFF
    key0, key1 = seeds & mask, (seeds >> 32) & mask
    c0, c1 = positions.long() & mask, index.long() & mask
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    return _philox_rounds(c0, c1, c2, c3, key0, key1)


def _philox_rounds(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key0: Tensor, key1: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask = 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & mask) ^ c1 ^ key0, p1 & mask, ((p0 >> 32) & mask) ^ c3 ^ key1, p0 & mask
        key0, key1 = (key0 + 0x9E3779B9) & mask, (key1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def kept_weights(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Unnormalised float64 weights [rows, vocab] of rows that are drawn from; the best token has 1, a cut one 0.

    Order: min_p, then top_k, then top_p over what is left. Ranks go by the logits themselves, ties by the lower id.
    A +inf logit is the limit of a large one: the mass is shared by the tokens that have it.
    """
    top = logits.amax(-1, keepdim=True)
    scaled = (logits.double() - top.double()) / temperature.double().unsqueeze(1)
    weights = torch.where(logits == top, 1.0, torch.exp(scaled))
    weights.masked_fill_(weights < min_p.double().unsqueeze(1), 0.0)
    if not bool(((top_k > 0) | (top_p < 1)).any()):
        return weights
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    ranked = weights.gather(1, order)
    place = torch.arange(logits.shape[1])
    limit = torch.where(top_k > 0, top_k, logits.shape[1]).unsqueeze(1)
    ranked.masked_fill_(place >= limit, 0.0)
    running = ranked.cumsum(1)
    before = running - ranked  # mass of the better tokens
    nucleus = top_p.double().unsqueeze(1)
    cut = (nucleus < 1) & (before >= nucleus * running[:, -1:])
    cut[:, 0] = False
    ranked.masked_fill_(cut, 0.0)
    return torch.zeros_like(weights).scatter_(1, order, ranked)


def broken_rows(logits: Tensor) -> Tensor:
    """bool [rows]: rows with a NaN or without any finite logit."""
    return logits.isnan().any(-1) | ~logits.isfinite().any(-1)


def sample(
    tokens: Tensor, logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor,
    index: Tensor, positions: Tensor,
) -> None:
    """Choose a token per row: argmax at temperature 0, else the inverse of the distribution function at Philox's u."""
    ids = torch.arange(logits.shape[1], dtype=torch.int32)
    best = logits.amax(-1, keepdim=True)
    chosen = torch.where(logits == best, ids, logits.shape[1]).amin(-1)
    rows = ((temperature > 0) & ~broken_rows(logits)).nonzero().squeeze(1)
    if rows.numel():
        weights = kept_weights(logits[rows], temperature[rows], top_k[rows], top_p[rows], min_p[rows])
        running = weights.cumsum(1)
        u = (philox(seeds[rows], index[rows], positions[rows])[0] >> 8).double() * 2.0**-24
        target = (u * running[:, -1]).unsqueeze(1)
        chosen[rows] = torch.searchsorted(running, target, right=True).squeeze(1).to(torch.int32)
    tokens.copy_(chosen.masked_fill(broken_rows(logits), -1))


def token_logprobs(
    logprobs: Tensor, ranks: Tensor, top_ids: Tensor, top_logprobs: Tensor, logits: Tensor, tokens: Tensor
) -> None:
    """Raw log-softmax at the tokens, their ranks, and the best k; ties go to the lower id.

    A row with a NaN or without any finite logit gives NaN, rank 0 and ids -1; token -1 gives NaN and rank 0.
    """
    k, vocab = top_ids.shape[1], logits.shape[1]
    if tokens.numel() and not -1 <= int(tokens.min()) <= int(tokens.max()) < vocab:
        span = f"{int(tokens.min())} .. {int(tokens.max())}"
        raise RuntimeError(f"token_logprobs: a token is outside -1 .. {vocab - 1}: {span}")
    broken = broken_rows(logits)
    top = logits.amax(-1, keepdim=True)
    shifted = torch.where(logits == top, 0.0, logits.double() - top.double())
    shifted = shifted - shifted.exp().sum(-1, keepdim=True).log()
    token = tokens.long().clamp(min=0).unsqueeze(1)
    own = logits.gather(1, token)
    better = (logits > own) | ((logits == own) & (torch.arange(vocab) < token))
    none = broken | (tokens < 0)
    logprobs.copy_(shifted.gather(1, token).squeeze(1).masked_fill(none, math.nan))
    ranks.copy_((better.sum(-1) + 1).masked_fill(none, 0))
    if k > 0:
        order = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :k]
        top_ids.copy_(order.masked_fill(broken.unsqueeze(1), -1))
        top_logprobs.copy_(shifted.gather(1, order).masked_fill(broken.unsqueeze(1), math.nan))
