"""From logits to tokens: penalties, sampling, and the log-probabilities of what was chosen.

Owns the signatures; which rows ask for what is the worker's business. Invariant: a row's token depends on its own
logits, parameters, seed, index and position alone (the random numbers are Philox4x32-10, counted by position), never on
the batch.
"""

from collections.abc import Callable

from torch import Tensor

from octavo.ops.library import choose

penalties: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None] = choose("penalties")
"""penalties(logits, counts, prompt_mask, slots, repetition, frequency, presence)

Where a token is in the output (counts > 0) or the prompt, its logit is divided by repetition if positive, else
multiplied; then frequency * counts and presence * (counts > 0) are subtracted.

Args:
    logits: float32 [rows, vocab], written. slots: int32 [rows], the row's place in the pool; -1 leaves the row alone.
    counts: int32 [pool, vocab], tokens of the output. prompt_mask: bool [pool, vocab].
    repetition, frequency, presence: float32 [rows].
"""

sample: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None] = choose("sample")
"""sample(tokens, logits, temperature, top_k, top_p, min_p, seeds, index, positions)

Temperature 0 takes the best token, ties to the lowest id. Else weights are exp(logit / temperature), cut by min_p
(keep p >= min_p * best), then top_k (exactly k, ties to the lower id), then top_p (the smallest set of best tokens
whose share of what is left reaches top_p); the token is the first, in order of ids, whose running sum of kept weights
exceeds u * total. u comes from Philox4x32-10 with key seed and counter (position, index, 0, 0).

Args:
    tokens: int32 [rows], written; -1 for a row that holds a NaN or no finite logit.
    logits: float32 [rows, vocab]. temperature, top_p, min_p: float32 [rows]; top_p 1 and min_p 0 are off.
    top_k, index, positions: int32 [rows]; top_k 0 is off. seeds: int64 [rows], the bits of a uint64.
"""

token_logprobs: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None] = choose("token_logprobs")
"""token_logprobs(logprobs, ranks, top_ids, top_logprobs, logits, tokens): log-softmax at tokens, and the best k.

Args:
    logprobs: float32 [rows], written. ranks: int32 [rows], written: 1 + the number of better tokens, where an equal one
        with a lower id is better.
    top_ids: int32 [rows, k], top_logprobs: float32 [rows, k], both written: best first, ties to the lower id; k from 0
        to vocab.
    logits: float32 [rows, vocab], raw. tokens: int32 [rows]; -1, and any row with a NaN or without a finite logit,
        gives NaN and rank 0 (and top_ids -1 in the latter case).
"""
