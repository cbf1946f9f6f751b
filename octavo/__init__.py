"""Octavo: LLM inference with paged attention and continuous batching, on a CPU or one NVIDIA GPU.

Owns the public names and nothing else; each is imported on first use, so that ``import octavo`` is quick and loads no
torch. Invariant: ``__all__`` is the whole public surface of the package root.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from octavo.async_llm import AsyncEngineArgs, AsyncLLMEngine
    from octavo.config import EngineArgs, EngineConfig
    from octavo.llm import LLM, LLMEngine
    from octavo.outputs import CompletionOutput, RequestOutput
    from octavo.params import SamplingParams, StructuredOutputsParams

_HOME = {
    "LLM": "octavo.llm",
    "LLMEngine": "octavo.llm",
    "SamplingParams": "octavo.params",
    "StructuredOutputsParams": "octavo.params",
    "RequestOutput": "octavo.outputs",
    "CompletionOutput": "octavo.outputs",
    "EngineArgs": "octavo.config",
    "EngineConfig": "octavo.config",
    "AsyncLLMEngine": "octavo.async_llm",
    "AsyncEngineArgs": "octavo.async_llm",
}

__all__ = [
    "LLM",
    "AsyncEngineArgs",
    "AsyncLLMEngine",
    "CompletionOutput",
    "EngineArgs",
    "EngineConfig",
    "LLMEngine",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # found once; from now on a plain lookup
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
