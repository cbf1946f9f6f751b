"""Grammars: requests whose grammar is being compiled, until they may join the queue.

Owns the threads that compile and who waits for them; it does not know rows or steps. The front has compiled the same text
before, so it is milliseconds, and the step loop does not wait for them unless it has nothing else to do.

Invariant: a request that has been taken in comes out exactly once, by ``ready`` or by ``take``.
"""

import concurrent.futures
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from octavo.engine.request import Request
from octavo.errors import RequestError
from octavo.log import get_logger
from octavo.text.matcher import Matcher, compile_grammar
from octavo.text.vocabulary import Tokenizer

THREADS = 2
PATIENCE = 0.02
"""Seconds that ``wait`` takes at most: meanwhile nobody hears of an abort."""

_log = get_logger(__name__)


class Grammars:
    """The compiling of one engine.

    Args:
        load: gives the model's tokenizer, when first needed; None when there is none.
    """

    def __init__(self, load: Callable[[], Tokenizer] | None) -> None:
        self._load, self._lock = load, threading.Lock()
        self._tokenizer: Tokenizer | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._waiting: dict[str, tuple[Request, Future[Matcher]]] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    def __len__(self) -> int:
        return len(self._waiting)

    def start(self, request: Request) -> None:
        """Take in a request that has a grammar; RequestError without a tokenizer."""
        if self._load is None:
            raise RequestError("structured_outputs needs a tokenizer.", "structured_outputs")
        if self._threads is None:
            self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="octavo-grammars")
        self._waiting[request.id] = request, self._threads.submit(self._compile, request)

    def ready(self) -> list[Request]:
        """Requests whose compiling has ended, in the order in which they came; ``matcher`` is set, perhaps with an error."""
        done = [request for request, future in self._waiting.values() if future.done()] if self._waiting else []
        for request in done:
            _, future = self._waiting.pop(request.id)
            request.matcher = future.result()
        return done

    def take(self, request_id: str) -> Request | None:
        """Give a request back that will not need its grammar any more; None when it is not here."""
        request, future = self._waiting.pop(request_id, (None, None))
        if future is not None:
            future.cancel()
        return request

    def wait(self) -> None:
        """Wait a moment for a request to become ready, if one is here."""
        futures = [future for _, future in self._waiting.values()]
        concurrent.futures.wait(futures, PATIENCE, concurrent.futures.FIRST_COMPLETED)

    def close(self) -> None:
        """Give the threads back."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def _compile(self, request: Request) -> Matcher:
        grammar = request.source.grammar
        assert grammar is not None and self._load is not None
        try:
            with self._lock:
                if self._tokenizer is None:
                    self._tokenizer = self._load()
            return compile_grammar(grammar.text, self._tokenizer, request.source.eos_token_ids)
        except BaseException as error:  # a panic of the library is no Exception; this request ends, the engine goes on
            _log.exception("a grammar could not be compiled")
            return Matcher.failed(f"{type(error).__name__} while it was compiled")
