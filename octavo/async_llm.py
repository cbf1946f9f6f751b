"""AsyncLLMEngine: the engine for programs that have an event loop of their own, under vLLM's names.

Owns the thread that steps an LLMEngine and the way of outputs into the callers' event loops; it does not know HTTP (the
server keeps its engine in another process, see server/). Invariant: only the engine's thread touches the LLMEngine, and
every ``generate`` ends with a finished output or an exception.
"""

import asyncio
import contextlib
import itertools
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable

from octavo.config import EngineArgs, EngineConfig
from octavo.errors import EngineDead
from octavo.llm import LLMEngine
from octavo.log import get_logger
from octavo.outputs import RequestOutput
from octavo.params import SamplingParams
from octavo.text.intake import Prompt
from octavo.text.vocabulary import Tokenizer

AsyncEngineArgs = EngineArgs
LONG_PROMPT = 2_000
"""Characters from which on a prompt is tokenised in a thread of its own."""

logger = get_logger(__name__)


class AsyncLLMEngine:
    """A model whose answers are async iterators.

    Args:
        config: validated options. Loading happens here, and takes its time: ModelError or ConfigError says what does not fit.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.engine = LLMEngine(config)
        self._requests: dict[str, _Mailbox] = {}
        self._work: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._numbers = itertools.count()
        self._closed = False
        self._dead: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="octavo-engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> "AsyncLLMEngine":
        """An engine for AsyncEngineArgs (the same class as EngineConfig)."""
        return cls(engine_args)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer; ConfigError with skip_tokenizer_init."""
        return self.engine.get_tokenizer()

    async def generate(self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None, *,
                       priority: int = 0, cache_salt: str = "") -> AsyncIterator[RequestOutput]:
        """Answer one prompt.

        Args:
            prompt: text, token ids, or a mapping with either. sampling_params: None is the model's defaults, 16 tokens.
            request_id: unique among unfinished requests; None makes one.
            priority, cache_salt: as in LLMEngine.add_request.

        Yields:
            The state so far whenever it has changed; a reader that is slow sees fewer states, and always the last one.
            Leaving the iteration early ends the request.

        Raises:
            RequestError: the request is refused. EngineDead: the engine has ended.
        """
        name = f"async-{next(self._numbers)}" if request_id is None else request_id
        if isinstance(prompt, str) and len(prompt) >= LONG_PROMPT and self.engine.tokenizer is not None:
            ids = await asyncio.to_thread(self.engine.tokenizer.encode, prompt)
            prompt = {"prompt": prompt, "prompt_token_ids": ids}
        mailbox = _Mailbox()

        def add() -> None:
            try:
                self.engine.add_request(name, prompt, sampling_params, priority=priority, cache_salt=cache_salt)
            except Exception as error:  # the caller's mistake, or ours: either way the caller is told
                mailbox.put(error)
            else:
                self._requests[name] = mailbox

        self._do(add)
        try:
            finished = False
            while not finished:
                output = await mailbox.get()
                finished = output.finished
                yield output
        finally:
            # Only what this call has added: the id may be another's, and then the request was refused.
            with contextlib.suppress(EngineDead):
                self._do(lambda: self._forget(name, mailbox))

    async def abort(self, request_id: str) -> None:
        """End a request now: its iterator yields what there is, with finish reason "abort". Unknown ids are no error."""
        self._do(lambda: self._abort(request_id))

    async def check_health(self) -> None:
        """EngineDead when the engine has ended."""
        if self._dead is not None or self._closed:
            raise EngineDead("the engine has ended.") from self._dead

    def close(self) -> None:
        """End the thread and give back workers and memory; what still runs ends with EngineDead."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _do(self, work: Callable[[], None]) -> None:
        """Have the engine's thread do something between two steps."""
        with self._wake:
            if not self._closed and self._dead is None:
                self._work.append(work)
                self._wake.notify()
                return
        raise EngineDead("the engine has ended.") from self._dead

    def _run(self) -> None:
        try:
            while self._wait():
                while self._work:
                    self._work.popleft()()
                if self.engine.has_unfinished_requests():
                    for output in self.engine.step():
                        if (mailbox := self._requests.get(output.request_id)) is not None:
                            mailbox.put(output)
                            if output.finished:
                                del self._requests[output.request_id]
        except BaseException as error:
            logger.exception("the engine has ended")
            self._dead = error
        finally:
            with self._wake:
                self._closed = True
            while self._work:
                self._work.popleft()()
            for mailbox in self._requests.values():
                mailbox.put(EngineDead("the engine has ended."))
            self.engine.close()

    def _wait(self) -> bool:
        with self._wake:
            while not (self._closed or self._work or self.engine.has_unfinished_requests()):
                self._wake.wait()
            return not self._closed

    def _abort(self, name: str) -> None:
        output = self.engine.collector.abort(name)
        self.engine.engine.abort(name, report=False)
        if output is not None and (mailbox := self._requests.pop(name, None)) is not None:
            mailbox.put(output)

    def _forget(self, name: str, mailbox: "_Mailbox") -> None:
        if self._requests.get(name) is mailbox:
            del self._requests[name]
            self.engine.abort_request(name)


class _Mailbox:
    """The newest state of a request, from the engine's thread to one event loop. What is not fetched is replaced."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._content: RequestOutput | Exception | None = None
        self._lock = threading.Lock()

    def put(self, content: RequestOutput | Exception) -> None:
        """Called by the engine's thread."""
        with self._lock:
            self._content = content
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._arrived.set)

    async def get(self) -> RequestOutput:
        """The newest state, once; raises what was put as an exception."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            with self._lock:
                content, self._content = self._content, None
            if isinstance(content, Exception):
                raise content
            if content is not None:
                return content

