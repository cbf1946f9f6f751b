"""What a caller receives: RequestOutput with its CompletionOutputs, and Logprob.

Owns names and shapes that users of vLLM know; it does not know how they are made. Invariant: plain data, safe to keep,
never changed by the engine once handed out.
"""

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True)
class Logprob:
    """One token's log-probability in nats.

    Attributes:
        logprob: natural logarithm of the model's raw distribution (see ``logprobs_mode``).
        rank: 1 for the most likely token; ties count the lower id first.
        decoded_token: the token's own text, None when the request asked for no detokenising.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]


@dataclass(slots=True)
class CompletionOutput:
    """One of the n continuations of a request.

    Attributes:
        index: 0 to n - 1; continuations are returned in this order, with ``best_of`` and beam search the best first.
        text: decoded text, cut before a stop string unless ``include_stop_str_in_output``; "" without detokenising.
        token_ids: generated ids, an EOS or stop token included, cut where the text is cut by a stop string.
        cumulative_logprob: sum over the generated tokens; None unless logprobs, best_of or beam search ask for it.
        logprobs: one dict per generated token, None unless asked for.
        finish_reason: "stop", "length", "abort", "error", or None while running.
        stop_reason: the stop string or stop token id that matched, None for EOS and everything else.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """True once this continuation has ended."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """The state of a request: final when ``finished``, else a snapshot of what there is so far.

    Attributes:
        request_id: as given to ``add_request``; LLM counts "0", "1", ...
        prompt: the text, None when only token ids were given.
        prompt_token_ids: the ids that were computed.
        prompt_logprobs: None for the first prompt token, then one dict per token; None unless asked for.
        outputs: n continuations.
        finished: True when all n have ended.
        num_cached_tokens: prompt tokens found in the prefix cache.
        error: the message of a request that ended with finish_reason "error", else None.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    num_cached_tokens: int = 0
    error: str | None = None
