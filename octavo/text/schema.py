"""JSON schemas as clients send them, made fit for a grammar compiler, or refused.

Owns the bounds (size, nesting, numbers that would make an automaton explode) and what is annotation only and may be
dropped; it does not compile. Invariant: what leaves here is a JSON object of bounded size and depth, in which nothing that
restricts an answer has been dropped.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

MAX_MULTIPLE = 10_000
"""The automaton of "a multiple of m" has m states (that of 10 million takes minutes and gigabytes), and where several apply
to one number it has as many as their least common multiple."""

# Without ``unknown``: what the compiler turns into a rule. Other names are annotations, as the standard has it.
FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"})
DRAFTS = ("http://json-schema.org/draft-", "https://json-schema.org/draft/")

MERGING = frozenset({"allOf", "anyOf", "oneOf", "$ref"})  # with these, several may apply to one number
ONE = ("items", "additionalItems", "additionalProperties", "contains", "not", "if", "then", "else", "propertyNames",
       "unevaluatedItems", "unevaluatedProperties")
MANY = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


class SchemaError(ValueError):
    """A schema that cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a constraint may be. There is none for the time that compiling takes: it follows from these.

    Attributes:
        schema_bytes, schema_depth: of a JSON schema. regex_bytes: of a regex.
        cache_bytes: what may be remembered of constraints that have been found good.
    """

    schema_bytes: int = 64 << 10
    schema_depth: int = 64
    regex_bytes: int = 4 << 10
    cache_bytes: int = 256 << 20


DEFAULT = Limits()


def read_schema(source: str | dict[str, Any], limits: Limits = DEFAULT) -> dict[str, Any]:
    """The schema of a text, or a copy of one that is parsed.

    Raises:
        SchemaError: it is no JSON object, too large, too deep, or has a number that no automaton should be built of.
    """
    try:
        text = source if isinstance(source, str) else json.dumps(source)
        if len(text.encode("utf-8", "surrogatepass")) > limits.schema_bytes:
            raise SchemaError(f"the schema has more than {limits.schema_bytes} bytes")
        schema = json.loads(text, parse_constant=_no_constant)
    except SchemaError:
        raise
    except RecursionError as error:
        raise SchemaError(f"the schema is nested more than {limits.schema_depth} deep") from error
    except ValueError as error:
        raise SchemaError(f"the schema is not valid JSON ({error!s:.100})") from error
    if not isinstance(schema, dict):
        raise SchemaError(f"the schema must be a JSON object, got {schema!r:.100}")
    check_bounds(schema, limits)
    return schema


def check_bounds(schema: Any, limits: Limits = DEFAULT) -> None:
    """SchemaError when a parsed schema is too deep, or the multiples that it asks for are too large."""
    multiples: list[Decimal] = []
    merges = False
    level = [schema]
    for _ in range(limits.schema_depth):
        for value in level:
            if isinstance(value, dict):
                merges = merges or not MERGING.isdisjoint(value)
                if "multipleOf" in value:
                    multiples.append(_multiple(value["multipleOf"]))
        level = [child for value in level for child in _children(value)]
        if not level:
            break
    else:
        raise SchemaError(f"the schema is nested more than {limits.schema_depth} deep")
    groups = [multiples] if merges else [[multiple] for multiple in multiples]
    if any(_states(group) > MAX_MULTIPLE for group in groups):
        raise SchemaError("multipleOf asks for multiples of too large a number, or several that together do")


def relax(schema: dict[str, Any], *, closed: bool) -> dict[str, Any]:
    """The schema without annotations that the compiler would stumble over. The argument is not changed.

    Args:
        closed: objects with properties get ``additionalProperties: false`` unless they say otherwise.
    """
    relaxed = _relax(schema, closed)
    draft = relaxed.get("$schema")
    if draft is not None and not (isinstance(draft, str) and draft.startswith(DRAFTS)):
        del relaxed["$schema"]
    assert isinstance(relaxed, dict)
    return relaxed


def _relax(schema: Any, closed: bool) -> Any:
    if not isinstance(schema, dict):
        return schema
    found = {key: value for key, value in schema.items() if key != "x-guidance"}
    name = found.get("format")
    if isinstance(name, str) and name not in FORMATS:
        del found["format"]
    if found.get("uniqueItems") is False:
        del found["uniqueItems"]
    if closed and "properties" in found:
        found.setdefault("additionalProperties", False)
    for key in ONE:
        if isinstance(found.get(key), dict):
            found[key] = _relax(found[key], closed)
    for key in MANY:
        if isinstance(found.get(key), list):
            found[key] = [_relax(child, closed) for child in found[key]]
    for key in NAMED:
        if isinstance(found.get(key), dict):
            found[key] = {name: _relax(child, closed) for name, child in found[key].items()}
    return found


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def _states(multiples: list[Decimal]) -> int:
    digits = max((-int(multiple.as_tuple().exponent) for multiple in multiples), default=0)
    return math.lcm(*(int(multiple.scaleb(max(digits, 0))) for multiple in multiples))


def _multiple(value: Any) -> Decimal:
    """The number behind a multipleOf; 1 where it is something else (a property may have that name)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Decimal(1)
    try:
        number = abs(Decimal(repr(value)).normalize())
    except InvalidOperation as error:
        raise SchemaError(f"multipleOf must be a number, got {value!r:.100}") from error
    if not number or number > MAX_MULTIPLE or -int(number.as_tuple().exponent) > 9:
        raise SchemaError(f"multipleOf must be above 0, at most {MAX_MULTIPLE}, with at most 9 decimals, got {value!r:.100}")
    return number


def _no_constant(name: str) -> Any:
    raise SchemaError(f"the schema holds {name}, which is not JSON")
