"""RequestLog: a line in the log when a request begins and one when it has ended.

Owns the two lines; it does not know who else is told. Invariant: no text and no token of a client's is in them unless the
operator has said how much of the prompt may be, and nothing that a client sends can break a line in two.
"""

from collections.abc import Sequence

from octavo.log import get_logger
from octavo.server.timing import Timing

_log = get_logger(__name__)


class RequestLog:
    """An Observer of beginnings and ends.

    Args:
        max_len: characters of the prompt (ids, where the client sent ids) to log; None for nothing of it.
    """

    def __init__(self, max_len: int | None) -> None:
        self._max_len = max_len

    def opened(self, timing: Timing, prompt: str | None, prompt_token_ids: Sequence[int]) -> None:
        """The first line."""
        shown = ""
        if self._max_len is not None:
            # repr writes what cannot be printed, a newline too, as escapes.
            shown = f", prompt {(list(prompt_token_ids) if prompt is None else prompt)[: self._max_len]!r}"
        params = timing.params
        _log.info("request %s begins: %d prompt tokens, max_tokens %s, n %d%s", _name(timing), timing.prompt_tokens,
                  params.max_tokens, params.n, shown)

    def closed(self, timing: Timing, now: float) -> None:
        """The second line."""
        _log.info("request %s ended (%s): %d prompt tokens, %d of them cached, %d output tokens; begun after %s, first token "
                  "after %s, ended after %s", _name(timing), ", ".join(timing.reasons), timing.prompt_tokens,
                  timing.cached_tokens, timing.output_tokens, _since(timing, timing.begun), _since(timing, timing.first),
                  _since(timing, now))


def _name(timing: Timing) -> str:
    return timing.request_id if timing.origin is None else f"{timing.request_id} ({timing.origin.request_id})"


def _since(timing: Timing, moment: float | None) -> str:
    return "-" if moment is None else f"{moment - timing.arrival:.3f} s"
