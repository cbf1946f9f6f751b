"""Delta and Step: what one engine step adds to a request, for fronts that stream.

Owns two shapes; it does not know how they are made or sent. Invariant: the Deltas of a continuation, put together in
order, are its CompletionOutput, whatever the steps were.
"""

import msgspec

from octavo.outputs import FinishReason, PositionLogprobs


class Delta(msgspec.Struct):
    """What one step adds to one continuation.

    Attributes:
        index: 0 to n - 1.
        text: new text: never half a character, never the beginning of a stop string that is completed later.
        token_ids: new ids; their text may come later.
        logprobs: one dict per new id, None unless asked for.
        finish_reason, stop_reason: set once, in the continuation's last Delta; see CompletionOutput.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class Step(msgspec.Struct):
    """What one engine step says about one request.

    Attributes:
        deltas: continuations that changed, each at most once.
        finished: nothing comes after this.
        prompt_logprobs: as in RequestOutput; all of them at once, in the Step that completes them.
        num_cached_tokens: prompt tokens found in the prefix cache; in the first Step only.
        error: message of a continuation that ended with "error".
    """

    deltas: list[Delta]
    finished: bool = False
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    num_cached_tokens: int | None = None
    error: str | None = None
