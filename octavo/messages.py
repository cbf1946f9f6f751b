"""What travels between a front (LLM, the server) and the engine: EngineRequest down, StepOutput up.

Owns plain structs, encodable by msgspec; it does not know text (prompts are ids, stop strings live in the front) or
tensors. Invariant: one StepOutput per step, whatever the number of requests; per-request Python objects appear in it
only for requests that stream or end.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from octavo.outputs import FinishReason
from octavo.params import SamplingParams


class Grammar(msgspec.Struct, frozen=True):
    """What an output has to look like, checked by the front.

    Attributes:
        kind: of the constraint that the caller gave, for messages: json, json_object, regex, choice or grammar.
        text: in Lark's notation, whatever the kind.
    """

    kind: str
    text: str


class EngineRequest(msgspec.Struct, kw_only=True):
    """One request as the engine sees it.

    Attributes:
        request_id: unique among the unfinished ones.
        prompt_token_ids: at least one id.
        params: validated parameters; max_tokens None means all that fits.
        eos_token_ids: ids that end a continuation unless ignore_eos.
        bad_word_ids: the tokenised bad_words; a sequence's last id is never sampled after its other ids.
        stream: True sends tokens with every step (stop strings, streaming clients); False sends them once, at the end.
        priority: lower is sooner under the priority policy, must be 0 under others.
        arrival: monotonic seconds. cache_salt: keeps the prefix cache of tenants apart.
        grammar: what structured_outputs asks for; the engine reads this and not the parameters.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    stream: bool = False
    priority: int = 0
    arrival: float = 0.0
    cache_salt: str = ""
    grammar: Grammar | None = None


class TokenLogprobs(msgspec.Struct):
    """Logprobs of one position: the sampled (or prompt) token first, then the top k, ids with logprob and rank."""

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]


class SequenceEnd(msgspec.Struct):
    """A sequence that ended in this step.

    Attributes:
        request_id, index: which one; index is 0 to width - 1, with best_of the computing order, with beams the final rank.
        reason: finish reason. stop_token: the stop token id that matched, None for EOS.
        token_ids: all generated ids when the request does not stream (or is a beam), else empty.
        logprobs: one entry per generated token under the same condition, where asked for.
        cumulative_logprob: where logprobs, best_of or beams need it.
        error: message of reason "error".
    """

    request_id: str
    index: int
    reason: FinishReason
    stop_token: int | None = None
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float | None = None
    error: str | None = None


class StepOutput(msgspec.Struct):
    """Everything that one step has to say to the front.

    Attributes:
        streamed: (request_id, index) of streaming sequences that got a token. tokens: int32 [len(streamed)].
        logprobs: one per streamed entry, or empty when nobody asked; None for those that did not ask.
        started: (request_id, number of prompt tokens found in the prefix cache), once per request.
        prompt_logprobs: (request_id, entries) for prompt positions computed in this step, in order; position 0 has none.
        ended: sequences that ended. finished: request ids whose last sequence ended.
        planned: monotonic seconds at which those in ``started`` were given their rows.
        num_prompt_tokens, num_generated_tokens: computed in the step that this reports.
    """

    streamed: list[tuple[str, int]] = []
    tokens: Any = None
    logprobs: list[TokenLogprobs | None] = []
    started: list[tuple[str, int]] = []
    prompt_logprobs: list[tuple[str, list[TokenLogprobs]]] = []
    ended: list[SequenceEnd] = []
    finished: list[str] = []
    planned: float = 0.0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0

    def token_list(self) -> list[int]:
        """Tokens of ``streamed`` as plain integers."""
        return [] if self.tokens is None else np.asarray(self.tokens).tolist()
