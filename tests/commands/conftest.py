"""A fake octavo.llm for the commands: an engine that answers without a model, and records what it was asked."""

import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "client"))

from stand_in import StandIn, running

from octavo.config import EngineConfig
from octavo.errors import RequestError
from octavo.outputs import CompletionOutput, RequestOutput
from octavo.params import SamplingParams

DEFAULTS = SamplingParams(temperature=0.5, top_p=0.9, max_tokens=16)  # as a model's generation_config.json could say


def chat_prompt(template: str, tokenizer: None, messages: Any) -> tuple[str, list[int]]:
    """octavo.text.chat's function of that name: a conversation as one line per message."""
    assert template == "template"
    text = "\n".join(f"{m['role']}: {m['content']}" for m in messages)
    return text, [len(text)]


class FakeEngine:
    """LLMEngine's surface: a request is answered with its last line, a word a step; ``refuse`` is refused.

    Requests with stream=False are answered as FakeLLM does, one a step, the last one first.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.template = "template"
        self.group = types.SimpleNamespace(info=types.SimpleNamespace(
            vocab_size=100, max_model_len=200, num_blocks=10, block_size=16))
        self.whole: list[RequestOutput] = []
        self.requests: list[tuple[str, Any, SamplingParams]] = []
        self.running: dict[str, list[str]] = {}
        self.closed = False
        self.on_step: Callable[[], None] = lambda: None

    @classmethod
    def from_engine_args(cls, config: EngineConfig) -> "FakeEngine":
        LOADED.append(cls(config))
        return LOADED[-1]

    def get_tokenizer(self) -> None:
        return None

    def default_params(self, max_tokens: int | None = 16) -> SamplingParams:
        return DEFAULTS.clone(max_tokens=max_tokens)

    def add_request(
        self, request_id: str, prompt: Any, sampling_params: SamplingParams, *, stream: bool = True
    ) -> None:
        self.requests.append((request_id, prompt, sampling_params))
        if not stream and prompt != "refuse":
            self.whole.append(answer(request_id, prompt, sampling_params))
            return
        text = (prompt if isinstance(prompt, str) else prompt["prompt"]).splitlines()[-1].removeprefix("user: ")
        if text == "refuse":
            raise RequestError("prompt is refused, got 'refuse'.", "prompt")
        self.running[request_id] = text.upper().split()

    def step(self) -> list[RequestOutput]:
        self.on_step()
        outputs = [self.whole.pop()] if self.whole else []
        for name, words in list(self.running.items()):
            index = sum(r[0] == name for r in self.requests)
            shown = self.shown.setdefault(name, [])
            shown.append(words.pop(0))
            done = not words
            if done:
                del self.running[name]
            error = "the engine failed" if shown[-1] == "FAIL" else None
            completion = CompletionOutput(0, " ".join(shown), [index], finish_reason="stop" if done else None)
            outputs.append(RequestOutput(name, "", [1], outputs=[completion], finished=done, error=error))
        return outputs

    @property
    def shown(self) -> dict[str, list[str]]:
        return self.__dict__.setdefault("_shown", {})

    def abort_request(self, request_id: str) -> None:
        self.running.pop(request_id, None)

    def has_unfinished_requests(self) -> bool:
        return bool(self.running or self.whole)

    def close(self) -> None:
        self.closed = True


class FakeLLM:
    """LLM's surface: every prompt is answered with itself in capitals; ``fail`` ends with an error."""

    def __init__(self, **options: Any) -> None:
        self.llm_engine = FakeEngine.from_engine_args(EngineConfig.from_kwargs(**options))
        self.calls: list[tuple[list[Any], Any]] = []
        self.llm_engine.llm = self  # type: ignore[attr-defined]

    def get_default_sampling_params(self) -> SamplingParams:
        return DEFAULTS

    def generate(self, prompts: Any, sampling_params: Any = None, use_tqdm: bool = True) -> list[RequestOutput]:
        self.calls.append((prompts, sampling_params))
        each = [sampling_params] * len(prompts) if isinstance(sampling_params, SamplingParams) else sampling_params
        return [answer(str(i), *asked) for i, asked in enumerate(zip(prompts, each, strict=True))]

    def close(self) -> None:
        self.llm_engine.close()


def answer(name: str, prompt: Any, params: SamplingParams) -> RequestOutput:
    """The prompt in capitals; ``fail`` ends with an error."""
    text = prompt if isinstance(prompt, str) else prompt.get("prompt")
    ids = prompt["prompt_token_ids"] if text is None else [1, 2]
    if text == "fail":
        outputs = [CompletionOutput(0, "", [], finish_reason="error")]
        return RequestOutput(name, text, ids, outputs=outputs, finished=True, error="logits were not finite")
    outputs = [CompletionOutput(i, (text or "").upper(), [7] * (params.max_tokens or 3), finish_reason="length")
               for i in range(params.n)]
    return RequestOutput(name, text, ids, outputs=outputs, finished=True)


LOADED: list[FakeEngine] = []


@pytest.fixture(autouse=True)
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeEngine]]:
    """The engines that commands made, with octavo.llm replaced by the fakes."""
    LOADED.clear()
    module = types.ModuleType("octavo.llm")
    module.LLM, module.LLMEngine = FakeLLM, FakeEngine  # type: ignore[attr-defined]
    chat = types.ModuleType("octavo.text.chat")
    chat.chat_prompt = chat_prompt  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "octavo.llm", module)
    monkeypatch.setitem(sys.modules, "octavo.text.chat", chat)
    yield LOADED
    assert all(engine.closed for engine in LOADED), "a command left its engine open"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A running server in OpenAI's shape."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    yield from running(StandIn())
