"""The Jinja environment of chat templates, with Hugging Face's settings.

Owns compilation, the functions a template may call, and the bound on what it writes; it does not know messages or
tokens. Invariant: a template is a stranger's code: it sees plain JSON data only, in the immutable sandbox, and whatever
it raises becomes one of our errors with at most 200 characters of its own words.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from octavo.errors import ModelError, RequestError

MAX_MESSAGE = 200
# A template repeats its input at most a few times and adds a few kB; more than this is a mistake or an attack.
MAX_FACTOR = 16
MAX_EXTRA = 1 << 20


class _Generation(Extension):
    """``{% generation %}...{% endgeneration %}`` marks the model's words for training; here it only renders them."""

    tags = {"generation"}  # noqa: RUF012  (declared so by Jinja)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, not the bare body: its variables end with it, as where the marks mean something.
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> Any:
        return caller()


class _TemplateNamespace(Namespace):
    """``namespace()`` without underscore names, which would lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no named self, so that namespace(self=...) works
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class _Dict:
    """``dict(...)`` and ``dict.fromkeys`` without the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace may not hold the name {name!r}")


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
             sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise, strftime_now=_now, dict=_Dict(), namespace=_TemplateNamespace)
    return environment


@lru_cache(maxsize=64)
def compile_template(text: str, origin: str = "chat template") -> Template:
    """Compile a template; ModelError with the place if it is no Jinja."""
    try:
        return _environment().from_string(text)
    except Exception as error:  # also RecursionError and whatever a hostile text brings out of the parser
        line = getattr(error, "lineno", None)
        where = f" in line {line}" if line is not None else ""
        raise ModelError(f"{origin} is broken{where}: {str(error)[:MAX_MESSAGE]}", "chat_template") from error


def run(template: Template, variables: Mapping[str, Any], input_chars: int) -> str:
    """Render.

    Args:
        input_chars: characters of the input, which bound the output.

    Raises:
        RequestError: the template refused its input, failed on it, or wrote too much.
    """
    limit, size = MAX_FACTOR * input_chars + MAX_EXTRA, 0
    parts: list[str] = []
    try:
        for part in template.generate(**variables):
            parts.append(part)
            size += len(part)
            if size > limit:
                raise RequestError(f"messages: the chat template wrote more than {limit} characters.", "messages")
    except RequestError:
        raise
    except TemplateError as error:
        message = str(error.message or error)[:MAX_MESSAGE]
        raise RequestError(f"messages do not fit the chat template: {message}", "messages") from error
    except Exception as error:  # TypeError, RecursionError, MemoryError, ...: the template's own code failed
        message = f"{type(error).__name__}: {error}"[:MAX_MESSAGE]
        raise RequestError(f"messages do not fit the chat template: {message}", "messages") from error
    return "".join(parts)
