"""Strict JSON: the bytes of a body become a typed request or a RequestError, nothing else.

Owns the reading of bodies and the sentences about what is wrong with one; it does not know what fields mean. Invariants:
what is read is valid UTF-8 and JSON as RFC 8259 has it (no NaN, no number beyond a double, no lone surrogate, nothing
before or after), nested at most max_depth deep, in the types that were asked for (true is no integer, neither is 1.0 nor
"1"); reading takes time linear in the length. Of members with the same name the last one counts. An escaped NUL in a
string is a character like others.
"""

import difflib
import functools
import re
from typing import Any, TypeVar

import msgspec
import numpy as np

from octavo.errors import RequestError
from octavo.server.errors import clip

T = TypeVar("T", bound=msgspec.Struct)

MAX_CONTAINERS = 100_000
"""Arrays and objects in a body: more of them take seconds to build and belong to no request that could be served."""
MAX_COMMAS = 1_000_000
"""Commas in a body, for the same reason; those within texts count too, and a text with as many fits no model."""
BLOCK = 1 << 18
"""Bytes that are measured at a time."""

_members = msgspec.json.Decoder(dict[str, msgspec.Raw])
_FAULT = re.compile(r"(?P<what>.*?)(?: - at (?:`key` in )?`\$\.?(?P<where>.*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_TYPES = re.compile(r"`([a-z]+(?: \| [a-z]+)*)`")
_WORDS = {"int": "integer", "float": "number", "str": "string", "bool": "boolean"}


def decode(body: bytes, kind: type[T], *, max_depth: int = 128) -> T:
    """Read a body as a struct.

    Args:
        kind: forbids unknown fields; a field that may be null has the default None, so that null counts as absent.
        max_depth: arrays and objects within each other, the outermost included.

    Raises:
        RequestError: with the path of the field as ``param``, where one is at fault; code unsupported_field when the
            field is not known.
        TypeError: ``kind`` is not as described.
    """
    decoder = _decoder(kind)
    if body.count(b",") > MAX_COMMAS:
        raise RequestError(f"The body holds more than {MAX_COMMAS} commas: as many values belong to no request.")
    # Most bodies have fewer opening brackets than levels are allowed: then counting them is all it takes.
    brackets = body.count(b"[") + body.count(b"{")
    if brackets > MAX_CONTAINERS and measure(body, max_depth)[1] > MAX_CONTAINERS:
        raise RequestError(f"The body holds more than {MAX_CONTAINERS} arrays and objects.")
    try:
        if not body.isascii():
            body.decode()
        request: T = decoder.decode(body)
    except (ValueError, RecursionError):
        request = _decode_with_care(body, kind, max_depth)
    if brackets > max_depth and measure(body, max_depth)[0] > max_depth:
        raise _too_deep(max_depth)
    return request


def measure(body: bytes, limit: int) -> tuple[int, int]:
    """How deep valid JSON is nested and how many arrays and objects it holds; ends at the first place deeper than ``limit``."""
    # Without escaped backslashes and quotes, every quote left begins or ends a string.
    text = np.frombuffer(body.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
    inside, depth, deepest, containers = 0, 0, 0, 0
    for start in range(0, len(text), BLOCK):
        block = text[start : start + BLOCK]
        outside = 1 - ((np.cumsum(block == ord('"'), dtype=np.int32) + inside) & 1)
        # "[" and "{" differ in one bit, and so do "]" and "}"; no other character is like them without that bit.
        plain = block & 0xDF
        opened = (plain == ord("[")) * outside
        depths = np.cumsum(opened - (plain == ord("]")) * outside, dtype=np.int32)
        deepest, containers = max(deepest, depth + int(depths.max())), containers + int(opened.sum())
        if deepest > limit:
            break
        inside, depth = 1 - int(outside[-1]), depth + int(depths[-1])
    return deepest, containers


@functools.cache
def _decoder(kind: type[T]) -> msgspec.json.Decoder[T]:
    if not kind.__struct_config__.forbid_unknown_fields:
        raise TypeError(f"{kind.__name__} must forbid unknown fields")
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, msgspec.inspect.StructType)
    for field in info.fields:
        if _takes_null(field.type) and field.default is not None:
            raise TypeError(f"{kind.__name__}.{field.name} takes null, so its default must be None")
    return msgspec.json.Decoder(kind)


def _takes_null(kind: msgspec.inspect.Type) -> bool:
    if isinstance(kind, msgspec.inspect.UnionType):
        return any(_takes_null(part) for part in kind.types)
    if isinstance(kind, msgspec.inspect.Metadata):
        return _takes_null(kind.type)
    return isinstance(kind, msgspec.inspect.NoneType | msgspec.inspect.AnyType)


def _decode_with_care(body: bytes, kind: type[T], max_depth: int) -> T:
    """The second look at a body that is not simply right: null members go, the rest is read again."""
    known = kind.__struct_encode_fields__
    kept = {}
    try:
        body.decode()
        for name, value in _members.decode(body).items():
            if bytes(value) == b"null":
                continue
            if name in known:
                kept[name] = value
            else:
                raise _unknown(name, name, known)
        request: T = _decoder(kind).decode(msgspec.json.encode(kept))
    except RecursionError:
        raise _too_deep(max_depth) from None
    except UnicodeDecodeError as exc:
        raise RequestError(f"The body is not valid UTF-8 (byte {exc.start}).") from None
    except msgspec.ValidationError as exc:
        if isinstance(exc.__cause__, RequestError):
            raise exc.__cause__ from None
        raise _fault(str(exc)) from None
    except msgspec.DecodeError as exc:
        if not body.strip():
            raise RequestError("The body is empty; it must be a JSON object.") from None
        raise RequestError(f"The body is not valid JSON: {clip(str(exc))}.") from None
    return request


def _fault(text: str) -> RequestError:
    """msgspec's sentence about a value, as ours."""
    match = _FAULT.fullmatch(text)
    assert match is not None
    what, where = match["what"], match["where"] or ""
    if missing := _MISSING.fullmatch(what):
        name = _join(where, missing[1])
        return RequestError(f"{name} is required.", name)
    if unknown := _UNKNOWN.fullmatch(what):
        return _unknown(_join(where, unknown[1]), unknown[1], ())
    if not where and what.startswith("Expected `object`"):
        return RequestError(f"The body must be a JSON object, not {_name(what.split('`')[3])}.")
    said = _TYPES.sub(lambda found: _name(found[1]), clip(what))
    return RequestError(f"{where or 'The body'}: {said[:1].lower()}{said[1:]}.", where or None)


def _unknown(path: str, name: str, known: tuple[str, ...]) -> RequestError:
    near = difflib.get_close_matches(name[:64], known, 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return RequestError(f"{clip(path)} is not a field that this server knows.{hint}", clip(path), "unsupported_field")


def _too_deep(max_depth: int) -> RequestError:
    return RequestError(f"The body is nested deeper than {max_depth} levels.")


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _name(types: str) -> str:
    """`str | array | null` in JSON's words."""
    words: list[Any] = [_WORDS.get(word, word) for word in types.split(" | ")]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
