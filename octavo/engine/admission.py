"""Admission: may a request enter at all? Everything that depends on the model and the pool is checked here, before queueing.

Owns the rules between a request and the numbers of the engine; ranges of single parameters lie in params.py. It changes
nothing. Invariant: a request that passes can finish when it is alone, so nothing that is queued waits for ever.
"""

import math
from collections.abc import Collection

from octavo.config import EngineConfig
from octavo.errors import RequestError
from octavo.messages import EngineRequest
from octavo.plan import GroupInfo


def check_request(request: EngineRequest, config: EngineConfig, info: GroupInfo) -> int:
    """Check ``request``; returns the tokens, prompt included, at which each of its sequences ends.

    Raises:
        RequestError: names the field and the value.
    """
    params, num_prompt = request.params, len(request.prompt_token_ids)
    if num_prompt == 0:
        raise RequestError("prompt must hold at least one token, got none.", "prompt")
    _check_ids("prompt", request.prompt_token_ids, info.vocab_size)
    _check_ids("eos_token_ids", request.eos_token_ids, info.vocab_size)
    _check_ids("stop_token_ids", params.stop_token_ids, info.vocab_size)
    _check_ids("logit_bias", params.logit_bias, info.vocab_size)
    _check_ids("allowed_token_ids", params.allowed_token_ids or (), info.vocab_size)
    for word in request.bad_word_ids:
        _check_ids("bad_words", word, info.vocab_size)
    for name in ("logprobs", "prompt_logprobs"):
        asked = getattr(params, name)
        if asked is not None and asked > min(config.max_logprobs, info.vocab_size):
            raise RequestError(f"{name} must be at most {min(config.max_logprobs, info.vocab_size)}, got {asked}.", name)
    if request.priority != 0 and config.scheduling_policy != "priority":
        raise RequestError(
            f"priority must be 0 under the {config.scheduling_policy} policy, got {request.priority}.", "priority")
    if params.use_beam_search:
        name = "best_of" if params.best_of is not None else "n"
        for limit, what in ((info.max_num_seqs, "max_num_seqs"), (info.vocab_size // 2, "half the vocabulary")):
            if params.width > limit:
                raise RequestError(f"{name} must be at most {what} ({limit}) with beam search, got {params.width}.", name)
    return _check_length(request, config, info)


def pool_tokens(request: EngineRequest, info: GroupInfo) -> int:
    """The most tokens, prompt included, that each sequence of ``request`` can have when it has the pool to itself.

    Sequences of n > 1 run one after the other if they must; beams advance together and share the prompt's full blocks.
    """
    if not request.params.use_beam_search:
        return info.num_blocks * info.block_size
    shared = (len(request.prompt_token_ids) - 1) // info.block_size
    return (shared + max(info.num_blocks - shared, 0) // request.params.width) * info.block_size


def _check_length(request: EngineRequest, config: EngineConfig, info: GroupInfo) -> int:
    num_prompt, max_tokens = len(request.prompt_token_ids), request.params.max_tokens
    room = pool_tokens(request, info)
    longest = min(info.max_model_len, room)
    limit = f"max_model_len is {info.max_model_len}" if info.max_model_len <= room else f"the KV pool holds {room} tokens"
    code = "context_length_exceeded"
    if num_prompt >= longest:
        raise RequestError(f"prompt has {num_prompt} tokens and one more must fit, but {limit}.", "prompt", code)
    if max_tokens is not None and num_prompt + max_tokens > longest:
        raise RequestError(
            f"prompt has {num_prompt} tokens and max_tokens is {max_tokens}, together {num_prompt + max_tokens}, but {limit}.",
            "max_tokens", code)
    if not config.enable_chunked_prefill and num_prompt > info.max_num_batched_tokens:
        raise RequestError(
            f"prompt has {num_prompt} tokens, but without chunked prefill a step computes a whole prompt and "
            f"max_num_batched_tokens is {info.max_num_batched_tokens}.", "prompt", code)
    least = request.params.min_tokens
    if num_prompt + least > longest:
        raise RequestError(f"prompt has {num_prompt} tokens and min_tokens is {least}, but {limit}.", "min_tokens", code)
    total = longest if max_tokens is None else num_prompt + max_tokens
    assert math.ceil(total / info.block_size) <= info.num_blocks
    return total


def _check_ids(name: str, ids: Collection[int], vocab_size: int) -> None:
    if not ids or (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size):
        return  # long prompts are checked without a loop in Python
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise RequestError(f"{name} must hold token ids from 0 to {vocab_size - 1}, got {token!r:.200}.", name)
