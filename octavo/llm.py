"""The offline API: LLM (a batch in, a list out) and LLMEngine (add requests, step, abort), under vLLM's names.

Owns the loop over ``Engine.step`` and nothing of what happens inside; it does not know blocks or tensors. Invariant:
results come back in input order, each request exactly once, and a request that is refused is refused before any other
request of its batch has started.
"""

import contextlib
import itertools
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from octavo import log
from octavo.config import EngineArgs, EngineConfig
from octavo.engine.engine import Engine
from octavo.engine.grammars import Grammars
from octavo.errors import ConfigError, RequestError
from octavo.models.hub import resolve
from octavo.outputs import RequestOutput
from octavo.params import SamplingParams
from octavo.text.chat import ChatTemplate, chat_prompt, load_chat_template
from octavo.text.collector import Collector
from octavo.text.intake import Intake, Prompt
from octavo.text.tokenizer import Tokenizer, load_tokenizer
from octavo.worker.group import check_supported, make_group

logger = log.get_logger(__name__)

DEFAULT_MAX_TOKENS = 16
Messages = Sequence[Mapping[str, Any]]


class LLMEngine:
    """A model with its scheduler: requests go in one by one, every ``step`` returns what changed.

    Args:
        config: validated options. Loading happens here; ModelError or ConfigError says what does not fit.
        patient: see Engine; a GPU then computes prompts in as few steps as it can (LLM does so).
    """

    def __init__(self, config: EngineConfig, *, patient: bool = False) -> None:
        if not config.disable_log_stats and not logger.hasHandlers():
            log.setup()  # the statistics line was asked for, and the program has set up no logging of its own
        check_supported(config)  # before anything is fetched
        self.config = config
        self.source = resolve(config)
        self.tokenizer: Tokenizer | None = None if config.skip_tokenizer_init else load_tokenizer(self.source, config)
        self.intake = Intake(self.source, config, self.tokenizer)
        self.group = make_group(config, self.source)
        try:
            patient = patient and self.group.info.device == "cuda"
            grammars = Grammars(None if self.tokenizer is None else self.get_tokenizer)
            self.engine = Engine(config, self.group, seed=config.seed, patient=patient, grammars=grammars)
        except BaseException:
            self.group.close()
            raise
        self.collector = Collector()
        info = self.group.info
        self._longest = min(info.max_model_len, info.num_blocks * info.block_size)
        self._kept: list[RequestOutput] = []
        self._template: ChatTemplate | None = None
        if config.chat_template is not None:
            self._template = load_chat_template(self.get_tokenizer(), config)

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> "LLMEngine":
        """An engine for EngineArgs (the same class as EngineConfig)."""
        return cls(engine_args)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer; ConfigError with skip_tokenizer_init."""
        if self.tokenizer is None:
            raise ConfigError("there is no tokenizer with skip_tokenizer_init.", "skip_tokenizer_init")
        return self.tokenizer

    @property
    def template(self) -> ChatTemplate:
        """The model's chat template, read on first use; ConfigError when it has none."""
        if self._template is None:
            self._template = load_chat_template(self.get_tokenizer(), self.config)
        if self._template is None:
            raise ConfigError(f"{self.source.name} has no chat template; give one with chat_template.", "chat_template")
        return self._template

    def default_params(self, max_tokens: int | None = DEFAULT_MAX_TOKENS) -> SamplingParams:
        """The model's sampling defaults (generation_config.json) with the given max_tokens."""
        return self.intake.default_params(max_tokens)

    def add_request(self, request_id: str, prompt: Prompt | None, sampling_params: SamplingParams | None = None,
                    prompt_token_ids: Sequence[int] | None = None, arrival_time: float | None = None,
                    priority: int = 0, *, stream: bool = True, cache_salt: str = "",
                    default_max_tokens: int | None = DEFAULT_MAX_TOKENS) -> None:
        """Queue a request.

        Args:
            request_id: unique among unfinished requests.
            prompt: text, ids, or a mapping of either; may be None when prompt_token_ids are given.
            sampling_params: None means the model's defaults with default_max_tokens, or fewer where no more fit.
            arrival_time: seconds on the monotonic clock. priority: lower is sooner under the priority policy.
            stream: False reports the request once, when it ends (cheaper).
            cache_salt: requests share prefixes only with requests of the same salt.
            default_max_tokens: counts only without sampling_params; None is all that fits.

        Raises:
            RequestError: the request cannot be served; nothing has been queued.
        """
        if prompt_token_ids is not None:
            text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
            prompt = {"prompt": text, "prompt_token_ids": prompt_token_ids}
        if prompt is None:
            raise RequestError("prompt or prompt_token_ids must be given, got neither.", "prompt")
        params = self.default_params(default_max_tokens) if sampling_params is None else sampling_params
        ready = self.intake.prepare(request_id, prompt, params, stream=stream, priority=priority,
                                    cache_salt=cache_salt, arrival=arrival_time)
        if sampling_params is None and params.max_tokens is not None:  # a default never refuses
            fits = self._longest - len(ready.request.prompt_token_ids)
            params = ready.request.params = params.clone(max_tokens=max(1, min(params.max_tokens, fits)))
        self.engine.add(ready.request)
        self.collector.add(request_id, ready.prompt, ready.request.prompt_token_ids, params, self.tokenizer,
                           "snapshots" if stream else "final")

    def step(self) -> list[RequestOutput]:
        """Compute one step; the requests that changed, as snapshots, or finished for good.

        Ctrl-C waits for the end of the step, so that the engine can be used afterwards; a second one does not. What such a
        step has found is what the next one returns.
        """
        if len(self.collector) or not self._kept:
            with _interrupt_afterwards():
                self._kept += self._step()
        outputs, self._kept = self._kept, []
        return outputs

    def keep(self, output: RequestOutput) -> None:
        """Hand an output back that belongs to somebody else: the next ``step`` returns it."""
        self._kept.append(output)

    def _step(self) -> list[RequestOutput]:
        update = self.collector.update(self.engine.step())
        for request_id in update.aborts:  # its end has been said: the id may be another request's before the next step
            self.engine.abort(request_id, report=False)
        for request_id, index in update.aborted_sequences:
            self.engine.abort(request_id, index)
        return update.outputs

    def abort_request(self, request_id: str | Sequence[str]) -> None:
        """End requests now; unknown and finished ids are no error."""
        names = [request_id] if isinstance(request_id, str) else request_id
        if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
            raise RequestError(f"request_id must be a string or a list of strings, got {request_id!r:.200}.", "request_id")
        for name in names:
            self.engine.abort(name, report=False)
            self.collector.abort(name)
        self._kept = [output for output in self._kept if output.request_id not in names]

    def has_unfinished_requests(self) -> bool:
        """True while a request waits or runs."""
        return len(self.collector) > 0 or bool(self._kept)

    def get_num_unfinished_requests(self) -> int:
        """Requests that wait or run."""
        return len(self.collector)

    def close(self) -> None:
        """Give back workers and memory; the engine cannot be used afterwards."""
        self.engine.close()


class LLM:
    """A model for offline batches.

    Args:
        model: local folder, GGUF file, hub id, or ``smollm2``.
        kwargs: any field of EngineConfig; an unknown name is a ConfigError that names it.

    Statistics are logged only with ``disable_log_stats=False``, as in vLLM.
    """

    def __init__(self, model: str, **kwargs: Any) -> None:
        kwargs.setdefault("disable_log_stats", True)
        self.llm_engine = LLMEngine(EngineConfig.from_kwargs(model=model, **kwargs), patient=True)
        self._ids = itertools.count()
        self._lock = threading.Lock()  # one batch at a time: a second thread's call waits for the first

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer: ``encode(text)`` gives list[int], ``decode(ids)`` text."""
        return self.llm_engine.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """The model's own sampling defaults (generation_config.json), 16 tokens."""
        return self.llm_engine.default_params()

    def generate(self, prompts: Prompt | Sequence[Prompt] | None = None,
                 sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, use_tqdm: bool = True, *,
                 prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
                 priority: Sequence[int] | None = None) -> list[RequestOutput]:
        """Complete prompts.

        Args:
            prompts: a text, ids, ``{"prompt": ...}``, ``{"prompt_token_ids": [...]}``, or a list of these.
            sampling_params: one for all, one per prompt, or None for the model's defaults with 16 tokens.
            use_tqdm: show a progress bar.
            prompt_token_ids: ids per prompt, as vLLM 0.1.0 took them; prompts are then only echoed.
            priority: one per prompt, lower is sooner (priority policy only).

        Returns:
            One RequestOutput per prompt, in input order.

        Raises:
            RequestError: a prompt or a parameter is refused; nothing has been computed.
        """
        batch = _batch(prompts, prompt_token_ids)
        return self._run(batch, _spread("sampling_params", sampling_params, len(batch)),
                         _spread("priority", priority, len(batch)), DEFAULT_MAX_TOKENS, use_tqdm)

    def chat(self, messages: Messages | Sequence[Messages],
             sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, use_tqdm: bool = True, *,
             chat_template: str | None = None, add_generation_prompt: bool = True, continue_final_message: bool = False,
             tools: Sequence[Mapping[str, Any]] | None = None,
             chat_template_kwargs: Mapping[str, Any] | None = None) -> list[RequestOutput]:
        """Answer conversations through the model's chat template.

        Args:
            messages: one conversation (a list of ``{"role", "content"}``) or a list of them.
            sampling_params: as in generate; None is the model's defaults with all the tokens that fit.
            chat_template: text that replaces the model's template for this call.
            add_generation_prompt, continue_final_message, tools, chat_template_kwargs: as in Hugging Face's templates.

        Returns:
            One RequestOutput per conversation, in input order; ``prompt`` is the rendered text.

        Raises:
            RequestError: a message or a parameter is refused; nothing has been computed.
        """
        if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
            raise RequestError(f"messages must be a list of messages or of conversations, got {messages!r:.200}.", "messages")
        if not messages:
            raise RequestError("messages must not be empty, got [].", "messages")
        given = chat_template_kwargs or {}
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise RequestError(f"chat_template_kwargs must map names to values, got {given!r:.200}.", "chat_template_kwargs")
        talks: Any = [messages] if isinstance(messages[0], Mapping) else messages
        tokenizer = self.get_tokenizer()
        template = self.llm_engine.template
        if chat_template is not None:
            template = ChatTemplate(chat_template, tokenizer.special_tokens, "the given chat_template")
        batch: list[Prompt] = []
        for talk in talks:
            text, ids = chat_prompt(template, tokenizer, talk, tools, add_generation_prompt, continue_final_message,
                                    **given)
            batch.append({"prompt": text, "prompt_token_ids": ids})
        return self._run(batch, _spread("sampling_params", sampling_params, len(batch)), [None] * len(batch), None, use_tqdm)

    def close(self) -> None:
        """Give back workers and memory."""
        self.llm_engine.close()

    def _run(self, batch: list[Prompt], params: Sequence[SamplingParams | None], priority: Sequence[int | None],
             max_tokens: int | None, use_tqdm: bool) -> list[RequestOutput]:
        names = [str(next(self._ids)) for _ in batch]
        with self._lock:
            return self._run_alone(names, batch, params, priority, max_tokens, use_tqdm)

    def _run_alone(self, names: list[str], batch: list[Prompt], params: Sequence[SamplingParams | None],
                   priority: Sequence[int | None], max_tokens: int | None, use_tqdm: bool) -> list[RequestOutput]:
        engine, added = self.llm_engine, list[str]()
        try:
            for name, prompt, given, rank in zip(names, batch, params, priority, strict=True):
                with _naming(len(added), len(batch)), _interrupt_afterwards():
                    engine.add_request(name, prompt, given, priority=0 if rank is None else rank, stream=False,
                                       default_max_tokens=max_tokens)
                    added.append(name)
            return self._collect(names, use_tqdm)
        except BaseException:  # a refused prompt, Ctrl-C: nobody will ask for the others
            engine.abort_request(added)
            raise

    def _collect(self, names: list[str], use_tqdm: bool) -> list[RequestOutput]:
        done: dict[str, RequestOutput] = {}
        ours, others = set(names), list[RequestOutput]()  # requests that somebody added to the engine by hand go on too
        bar = _progress(len(names)) if use_tqdm else None
        try:
            while len(done) < len(names):
                for output in self.llm_engine.step():
                    if output.request_id not in ours:
                        others.append(output)
                    elif output.finished:
                        done[output.request_id] = output
                        if bar is not None:
                            bar.update(1)
        finally:
            if bar is not None:
                bar.close()
            for output in others:
                self.llm_engine.keep(output)
        return [done[name] for name in names]


@contextlib.contextmanager
def _naming(index: int, count: int) -> Iterator[None]:
    """Say which prompt of a batch was refused."""
    try:
        yield
    except RequestError as error:
        if count == 1:
            raise
        raise RequestError(f"prompt {index} of {count}: {error}", error.param, error.code) from error


@contextlib.contextmanager
def _interrupt_afterwards() -> Iterator[None]:
    """Hold back the first Ctrl-C until the block has ended; only the main thread gets signals."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # or the program has its own
        yield
        return
    held: list[int] = []

    def hold(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        held.append(number)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if held:  # also where the block has failed: who presses Ctrl-C wants the end of everything
            raise KeyboardInterrupt


def _progress(total: int) -> Any:
    from tqdm.auto import tqdm  # only when a bar is shown: its import costs 30 ms

    return tqdm(total=total, desc="Processed prompts", unit="req", dynamic_ncols=True)


def _batch(prompts: Any, prompt_token_ids: Any) -> list[Prompt]:
    """The list of prompts behind every accepted form."""
    if prompts is None and prompt_token_ids is None:
        raise RequestError("either prompts or prompt_token_ids must be given, got neither.", "prompts")
    texts = None if prompts is None else _listed("prompts", prompts)
    if prompt_token_ids is None:
        return texts or []
    ids = _listed("prompt_token_ids", prompt_token_ids)
    if texts is not None and len(texts) != len(ids):
        raise RequestError(
            f"prompts and prompt_token_ids must have the same length, got {len(texts)} and {len(ids)}.", "prompt_token_ids")
    if texts is None:
        return ids
    return [{"prompt": text, "prompt_token_ids": row} for text, row in zip(texts, ids, strict=True)]


def _listed(name: str, value: Any) -> list[Any]:
    """[value] when it is a single prompt (text, mapping, list of ids), else its elements; an empty list stays empty."""
    if isinstance(value, (str, Mapping)):
        return [value]
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, bytes) or not hasattr(value, "__iter__"):
        raise RequestError(f"{name} must be a prompt or a list of prompts, got {value!r:.200}.", name)
    elements = list(value)
    return [elements] if elements and all(isinstance(e, int) for e in elements) else elements


def _spread(name: str, value: Any, count: int) -> list[Any]:
    """One value for all, or a list with one per prompt."""
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise RequestError(f"{name} must have one entry per prompt, got {len(value)} for {count} prompts.", name)
    return list(value)
