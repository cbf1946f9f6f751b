"""The operators that only GPUs have, in plain torch: fused forms, quantised outputs and weights in plain rows.

Owns their meaning, as reference.py owns that of the operators every device has; same names and signatures as the extension.
Invariant: each function is a composition of functions of reference.py with all arithmetic in float32, so that a kernel may
differ from it by the rounding of its output type and by the order of its sums, and by nothing else.
"""

import torch
from torch import Tensor

from octavo.ops.reference import E4M3_MAX, activation, add_rms_norm, gated_activation, layer_norm, rms_norm, rope, write_kv


def rms_norm_fp8(out: Tensor, scale: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> None:
    """out * scale = rms_norm(x), out e4m3 [tokens, size], scale float32 [tokens]."""
    y = torch.empty(x.shape, dtype=torch.float32)
    rms_norm(y, x.float(), weight, eps, offset)
    quantize(out, scale, y)


def add_rms_norm_fp8(
    out: Tensor, scale: Tensor, residual: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float
) -> None:
    """residual += x, then out * scale = rms_norm(residual)."""
    residual.add_(x)
    rms_norm_fp8(out, scale, residual, weight, eps, offset)


def layer_norm_fp8(out: Tensor, scale: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> None:
    """out * scale = layer_norm(x)."""
    y = torch.empty(x.shape, dtype=torch.float32)
    layer_norm(y, x.float(), weight, bias, eps)
    quantize(out, scale, y)


def gated_activation_fp8(out: Tensor, scale: Tensor, x: Tensor, kind: str) -> None:
    """out * scale = gated_activation(x)."""
    y = torch.empty(out.shape, dtype=torch.float32)
    gated_activation(y, x.float(), kind)
    quantize(out, scale, y)


def activation_fp8(out: Tensor, scale: Tensor, x: Tensor, kind: str) -> None:
    """out * scale = activation(x)."""
    y = torch.empty(out.shape, dtype=torch.float32)
    activation(y, x.float(), kind)
    quantize(out, scale, y)


def quantize(out: Tensor, scale: Tensor, y: Tensor) -> None:
    """One scale a row: the largest magnitude becomes 448; a row of zeros has scale 1."""
    most = y.abs().amax(-1)
    scale.copy_(torch.where(most > 0, most / E4M3_MAX, 1.0))
    out.copy_((y / scale.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX))


def lookup(out: Tensor, ids: Tensor, table: Tensor) -> None:
    """out [tokens, columns] = table[ids]; an id outside the table gives zeros (padding rows of a graph)."""
    there = (ids >= 0) & (ids < len(table))
    out.copy_(table[ids.clamp(0, len(table) - 1)] * there.unsqueeze(1))


def rotate_and_cache(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, positions: Tensor, cos_sin: Tensor | None,
    interleaved: bool, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, offset: float, k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Norm the heads of q and k, rotate both, write k and v to the cache; float32 until q and the cache are stored."""
    new_q, new_k = q.float(), k.float()
    if q_weight is not None and k_weight is not None:
        rms_norm(new_q, new_q.clone(), q_weight, eps, offset)
        rms_norm(new_k, new_k.clone(), k_weight, eps, offset)
    if cos_sin is not None:
        rope(new_q, new_k, positions, cos_sin, interleaved)
    q.copy_(new_q)
    write_kv(new_k, v, k_cache, v_cache, slots, k_scale, v_scale)


def attention_plan(
    work: Tensor, query_start: Tensor, context_len: Tensor, heads: int, kv_heads: int, head_dim: int, window: int, max_query: int,
    max_partials: int,
) -> None:
    """Nothing: the list says how the work is cut, not what it is."""


def skinny_linear(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, scratch: Tensor) -> None:
    """out [rows, n] = x [rows, k] @ weight.T + bias, weight [n, k]."""
    y = x.float() @ weight.float().T
    out.copy_(y if bias is None else y + bias)


def skinny_gated(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, scratch: Tensor) -> None:
    """out [rows, n] = act(gate) * up, with [gate | up] = x @ weight.T + bias, weight [2 n, k]."""
    y = torch.empty(len(x), len(weight))
    skinny_linear(y, x, weight, bias, scratch)
    product = torch.empty(out.shape, dtype=torch.float32)
    gated_activation(product, y, kind)
    out.copy_(product)


def tile_linear(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """out [rows, n] = x [rows, k] @ weight.T + bias, weight [n, k]: skinny_linear for more rows."""
    skinny_linear(out, x, weight, bias, out)


def tile_gated(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> None:
    """out [rows, n] = act(gate) * up, with [gate | up] = x @ weight.T + bias, weight [2 n, k]: skinny_gated for more rows."""
    skinny_gated(out, x, weight, bias, kind, out)


def norm_linear(
    out: Tensor, total: Tensor, residual: Tensor, delta: Tensor, norm_weight: Tensor, eps: float, offset: float, weight: Tensor,
    bias: Tensor | None, scratch: Tensor,
) -> None:
    """total = residual + delta; out = linear(rms_norm(total)). The normed rows are rounded to the type of delta."""
    skinny_linear(out, _normed(total, residual, delta, norm_weight, eps, offset), weight, bias, scratch)


def norm_gated(
    out: Tensor, total: Tensor, residual: Tensor, delta: Tensor, norm_weight: Tensor, eps: float, offset: float, weight: Tensor,
    bias: Tensor | None, kind: str, scratch: Tensor,
) -> None:
    """total = residual + delta; out = skinny_gated(rms_norm(total))."""
    skinny_gated(out, _normed(total, residual, delta, norm_weight, eps, offset), weight, bias, kind, scratch)


def _normed(total: Tensor, residual: Tensor, delta: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    total.copy_(residual)
    y = torch.empty(total.shape, dtype=torch.float32)
    add_rms_norm(y, total, delta, weight, eps, offset)
    return y.to(delta.dtype)


def count_tokens(counts: Tensor, slots: Tensor, tokens: Tensor) -> None:
    """counts[slots[i], tokens[i]] += 1 where both are 0 or more."""
    used = (slots >= 0) & (tokens >= 0)
    counts.index_put_((slots[used].long(), tokens[used].long()), torch.ones(1, dtype=counts.dtype), accumulate=True)


HEADER = 16  # words; csrc/cuda/step.cu describes the layout of staging


def begin_step(
    staging: Tensor, block_tables: Tensor, last_token: Tensor, parameters: Tensor, ids: Tensor, positions: Tensor, slots: Tensor,
    rows: Tensor, query_start: Tensor, context_len: Tensor, sample_ints: Tensor, sample_floats: Tensor, sample_seeds: Tensor,
    result_slot: Tensor, block_size: int,
) -> None:
    """Apply the changes that staging carries, then fill the inputs of a step to their ends, padding included."""
    num_seqs, num_tokens, num_samples, num_runs, num_blocks, num_last, num_parameters, slot = staging[:8].tolist()
    sizes = [num_seqs, num_seqs, num_seqs, num_seqs + 1, num_tokens, 4 * num_runs, num_blocks, 2 * num_last, 9 * num_parameters]
    sizes += [num_samples, num_samples, num_samples]
    words = staging[HEADER : HEADER + sum(sizes)]
    row, start, count, first, known, runs, blocks, last, changed, samples, sources, places = words.split(sizes)
    for r, index, length, offset in runs.view(-1, 4).tolist():
        block_tables[r, index : index + length] = blocks[offset : offset + length]
    for r, token in last.view(-1, 2).tolist():
        last_token[r] = token
    for line in changed.view(-1, 9):
        parameters[int(line[0])] = line[1:]
    result_slot.fill_(slot)
    for out, used, padding in ((rows, row, 0), (query_start, first, num_tokens), (context_len, start + count, 0)):
        out.fill_(padding)
        out[: len(used)] = used
    ids.fill_(-1)
    positions.zero_()
    slots.fill_(-1)
    of = torch.repeat_interleave(torch.arange(num_seqs), count)
    place = start[of] + torch.arange(num_tokens) - first[of]
    ids[:num_tokens] = torch.where(known >= 0, known, last_token[row[of].long()]).long()
    positions[:num_tokens] = place
    block = block_tables[row[of].long(), place.long() // block_size].long()
    slots[:num_tokens] = block * block_size + place % block_size
    _begin_sampling(sample_ints, sample_floats, sample_seeds, parameters, samples, sources, places)


def _begin_sampling(
    ints: Tensor, floats: Tensor, seeds: Tensor, parameters: Tensor, samples: Tensor, sources: Tensor, places: Tensor
) -> None:
    num = len(samples)
    ints.zero_()
    ints[0] = -1
    floats.copy_(torch.tensor([[0.0], [1.0], [0.0]]).expand_as(floats))
    seeds.zero_()
    ints[0, :num], ints[1, :num], ints[2, :num] = samples, sources, places
    drawn = (samples >= 0).nonzero().squeeze(1)
    own = parameters[samples[drawn].long()]
    ints[3, drawn], ints[4, drawn] = own[:, 1], own[:, 6]
    floats[:, drawn] = own[:, [0, 2, 3]].contiguous().view(torch.float32).T
    seeds[drawn] = (own[:, 4].long() & 0xFFFFFFFF) | (own[:, 5].long() << 32)


def end_step(tokens: Tensor, samples: Tensor, last_token: Tensor, results: Tensor, result_slot: Tensor) -> None:
    """Hand the tokens to the rows (token 0 where none could be sampled) and to the host."""
    used = samples >= 0
    last_token[samples[used].long()] = tokens[used].clamp(min=0)
    results[int(result_slot), : len(tokens)] = tokens
