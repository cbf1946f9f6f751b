"""The Jinja environment of chat templates, with Hugging Face's settings.

Owns compilation, the functions a template may call, and the bounds of a rendering (time, values, output); it does not
know messages or tokens. Invariant: a template is a stranger's code: it sees plain JSON data only, in the immutable
sandbox and within a budget, and whatever it raises becomes one of our errors with at most 200 characters of its own
words.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

from jinja2 import Template, nodes, pass_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace

from octavo.errors import ModelError, RequestError
from octavo.text.budget import MAX_BITS, Budget, Exceeded, current_budget

MAX_MESSAGE = 200
# A template repeats its input at most a few times and adds a few kB; more than this is a mistake or an attack.
MAX_FACTOR = 16
MAX_EXTRA = 1 << 20
MAX_JSON_MARK = 64  # characters of an indentation or a separator of tojson
# What no chat template needs, and what can take more than linear time or space in ways that cannot be foreseen.
NO_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
NO_METHODS = frozenset(("encode", "expandtabs", "from_bytes", "striptags", "to_bytes", "translate"))


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

    def __repr__(self) -> str:  # without what it holds, which can be itself
        return "<Namespace>"

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        current_budget.get().take(value)
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
    budget = current_budget.get()
    budget.fits(budget.size(value))
    for mark in (indent, *(separators or ())):
        if (len(mark) if isinstance(mark, str) else mark or 0) > MAX_JSON_MARK:
            raise Exceeded(f"asked tojson for marks of more than {MAX_JSON_MARK} characters")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if indent is None:
        return encoder.encode(value)
    parts, size = [], 0
    for part in encoder.iterencode(value):
        parts.append(part)
        size += len(part)
        budget.fits(size)
    return "".join(parts)


def _now(form: str) -> str:
    _check_length(form, 1000)
    return datetime.now().strftime(form)


def _check_length(text: Any, most: int) -> None:
    if isinstance(text, str) and len(text) > most:
        raise Exceeded(f"asked for a date in a form of more than {most} characters")


def _check_join(budget: Budget, mark: str, items: Any) -> list[Any]:
    listed = list(items)
    budget.fits(budget.size(listed) + len(mark) * len(listed))
    return listed


def _check_replace(budget: Budget, text: Any, old: Any, new: Any, *_: Any) -> None:
    if all(isinstance(value, str) for value in (text, old, new)):
        budget.fits(len(text) + text.count(old) * len(new))


def _check_format(budget: Budget, form: Any, values: Any) -> None:
    """``form % values``: every number in it may be a width, every value may be written at every place."""
    if not isinstance(form, (str, bytes)):
        return
    text = str(form)
    listed = values if isinstance(values, tuple) else (values,)
    _check_widths(budget, text)
    if "*" in text:
        budget.fits(sum(abs(value) for value in listed if isinstance(value, int)))
    budget.fits(len(text) + text.count("%") * (max((budget.size(value) for value in listed), default=0)))


def _check_widths(budget: Budget, text: str) -> None:
    total = 0
    for match in re.finditer(r"[0-9]+", text):
        total += int(match[0]) if len(match[0]) < 12 else sys.maxsize
    budget.fits(total)


def _sum(iterable: Any, start: Any = 0) -> Any:
    budget = current_budget.get()
    for item in iterable:
        budget.tick()
        start = budget.take(start + item)
    return start


class _Formatter(SandboxedFormatter):
    """``str.format`` with bounded widths."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        budget = current_budget.get()
        budget.tick()
        _check_widths(budget, format_spec)
        budget.fits(budget.size(value))
        return budget.take(super().format_field(value, format_spec))


class _Code(CodeGenerator):
    """Compiles a template so that loops count, values are measured and nothing is computed beforehand."""

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        line = node.lineno
        node.body.insert(0, nodes.ExprStmt(_tick_node(line), lineno=line))
        if node.test is not None:
            node.test = nodes.And(_tick_node(line), node.test, lineno=line)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        joined = "(markup_join if context.eval_ctx.autoescape else str_join)"
        self.write(f"environment.taken({joined}(environment.parts((")
        for arg in node.nodes:
            self.visit(arg, frame)
            self.write(", ")
        self.write("))))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self.write("environment.taken(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self.write("environment.taken(")
        super().visit_Dict(node, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        load = node.ctx == "load"
        self.write("environment.taken(" if load else "")
        super().visit_Tuple(node, frame)
        self.write(")" if load else "")


def _tick_node(line: int) -> nodes.Expr:
    return nodes.EnvironmentAttribute("turn", lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    """The immutable sandbox with a budget: every call, filter, test, operation and turn of a loop is counted."""

    code_generator_class = _Code
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    @property
    def turn(self) -> bool:
        """True; reading it counts one turn of a loop."""
        current_budget.get().tick()
        return True

    def taken(self, value: Any) -> Any:
        return current_budget.get().take(value)

    def parts(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        budget = current_budget.get()
        budget.tick()
        budget.fits(sum(budget.size(value) for value in values))
        return values

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = current_budget.get()
        budget.tick()
        if operator == "%":
            _check_format(budget, left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > MAX_BITS:
                raise Exceeded(f"made a number of more than {MAX_BITS} bits")
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(value, (str, bytes, list, tuple)):
                    budget.fits(budget.size(value) * times)
        return budget.take(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if attr in NO_METHODS and isinstance(obj, (str, bytes, int)):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def write(*args: Any, **kwargs: Any) -> str:
            if value.__name__ == "format_map":
                args, kwargs = (), dict(*args, **kwargs)
            return _Formatter(self).vformat(str(value.__self__), args, kwargs)

        return write

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = current_budget.get()
        budget.tick()
        budget.given(*args, *kwargs.values())
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            if __obj.__name__ == "join" and args:
                args = (_check_join(budget, owner, args[0]), *args[1:])
            elif __obj.__name__ == "replace" and len(args) > 1:
                _check_replace(budget, owner, *args)
        return budget.take(super().call(__context, __obj, *args, **kwargs))


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter within the budget. One that asks for the context is never computed at compile time."""
    wants = getattr(getattr(function, "jinja_pass_arg", None), "name", "")

    @wraps(function)
    def call(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = current_budget.get()
        budget.tick()
        budget.given(*args, *kwargs.values())
        if name in ("join", "replace", "indent", "format", "round", "sum"):
            value, args, kwargs = _foresee(budget, context, name, value, args, kwargs)
        if name == "sum":
            return _sum(value, *args, **kwargs)
        first = {"context": (context,), "eval_context": (context.eval_ctx,), "environment": (context.environment,)}
        return budget.take(function(*first.get(wants, ()), value, *args, **kwargs))

    return pass_context(call)


def _foresee(budget: Budget, context: Context, name: str, value: Any, args: tuple[Any, ...],
             kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Refuse what a filter would make too large; its arguments, with iterators that had to be read as lists."""
    if name == "join":
        value = _check_join(budget, str(args[0] if args else kwargs.get("d", "")), value)
    elif name == "replace":
        old, new = (args[i] if len(args) > i else kwargs.get(key) for i, key in enumerate(("old", "new")))
        _check_replace(budget, str(value), str(old), str(new))
    elif name == "indent":
        width = args[0] if args else kwargs.get("width", 4)
        budget.fits(len(str(value)) + len(str(value).splitlines()) * (width if isinstance(width, int) else len(str(width))))
    elif name == "format":
        _check_format(budget, str(value), (*args, *kwargs.values()))
    elif name == "round":
        digits = args[0] if args else kwargs.get("precision", 0)
        if isinstance(digits, int) and abs(digits) > 1000:
            raise Exceeded("rounded to more than 1000 digits")
    else:
        attribute = args[0] if args else kwargs.get("attribute")
        start = args[1] if len(args) > 1 else kwargs.get("start", 0)
        if attribute is not None:
            value = context.environment.call_filter("map", value, kwargs={"attribute": attribute}, context=context)
        return value, (start,), {}
    return value, args, kwargs


def _ticking(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        current_budget.get().tick()
        return function(*args, **kwargs)

    return call


@lru_cache(maxsize=1)
def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, loopcontrols],
        finalize=lambda value: current_budget.get().take(value))
    for name in NO_FILTERS:
        del environment.filters[name]
    del environment.globals["lipsum"]
    environment.filters["tojson"] = _to_json
    for name, function in dict[str, Any](environment.filters).items():
        environment.filters[name] = _bounded(name, function)
    for name, test in dict[str, Any](environment.tests).items():
        environment.tests[name] = _ticking(test)
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
        RequestError: the template refused its input, failed on it, or went over a bound (chat_template).
    """
    limit, size = MAX_FACTOR * input_chars + MAX_EXTRA, 0
    parts: list[str] = []
    token = current_budget.set(Budget(limit))
    try:
        for part in template.generate(variables):
            parts.append(part)
            size += len(part)
            if size > limit:
                raise Exceeded(f"wrote more than {limit} characters")
    except Exceeded as error:
        raise RequestError(f"the chat template {error}.", "chat_template") from error
    except TemplateError as error:
        message = str(error.message or error)[:MAX_MESSAGE]
        raise RequestError(f"messages do not fit the chat template: {message}", "messages") from error
    except Exception as error:  # TypeError, RecursionError, MemoryError, ...: the template's own code failed
        message = f"{type(error).__name__}: {error}"[:MAX_MESSAGE]
        raise RequestError(f"messages do not fit the chat template: {message}", "messages") from error
    finally:
        current_budget.reset(token)
    return "".join(parts)
