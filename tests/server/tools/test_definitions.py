"""Tools and tool_choice: every mistake is a RequestError that names its place."""

import pytest

from octavo.errors import RequestError
from octavo.server.tools.definitions import MAX_CHARS, MAX_TOOLS, NOTHING, ToolChoice, check_tool_choice, check_tools
from octavo.text.schema import Limits


def tool(name="f", **more):
    return {"type": "function", "function": {"name": name, **more}}


def test_good_tools():
    schema = {"properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": "string", "format": "unheard-of"}}}
    found = check_tools([
        tool(parameters=schema, description=None, strict=None), tool("a.b-C_9", strict=True), tool("g", parameters={})])
    assert [one.name for one in found] == ["f", "a.b-C_9", "g"]
    assert [one.strict for one in found] == [False, True, False]
    assert found[0].schema == {"type": "object", **schema} and found[1].schema == NOTHING
    assert found[0].definition["function"]["parameters"] is schema
    assert check_tools(None) == check_tools([]) == []
    assert len(check_tools([tool(f"f{i}") for i in range(MAX_TOOLS)])) == MAX_TOOLS


def deep(levels: int) -> dict:
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(("tools", "place"), [
    ("f", "tools must be a list"), ({}, "tools must be a list"), ([1], r"tools\[0\] must be an object"),
    ([{"function": {"name": "f"}}], r"tools\[0\]\.type"), ([tool() | {"type": "retrieval"}], "'retrieval'"),
    ([{"type": "function"}], r"tools\[0\]\.function must be an object"),
    ([tool(), tool("")], r"tools\[1\]\.function\.name"), ([tool("a b")], "'a b'"), ([tool("a" * 65)], r"function\.name"),
    ([tool("f\n")], r"function\.name"), ([tool(None)], r"function\.name"), ([tool(), tool()], "used twice"),
    ([tool(description=1)], "description"), ([tool(strict="yes")], "strict"),
    ([tool(parameters=[])], r"function\.parameters must be"), ([tool(parameters={"type": "string"})], r"parameters\.type"),
    ([tool(parameters={"properties": {"a": {"type": "strnig"}}})], "strnig"),
    ([tool(parameters={"properties": {"a": {"$ref": "#/$defs/B"}}})], "cannot be used"),
    ([tool(parameters={"properties": {"a": {"$ref": "http://x.test/y"}}})], "cannot be used"),
    ([tool(parameters={"properties": {"a": {"type": "string", "pattern": "("}}})], "cannot be used"),
    ([tool(parameters={"properties": {"a": {"type": "string", "format": "unheard-of"}}}, strict=True)], "unheard-of"),
    ([tool(parameters=deep(33))], "nested more than 64 deep"), ([tool(parameters=deep(400))], "nested more than 64 deep"),
    ([tool(parameters=deep(50_000))], "nested more than 64 deep"),
    ([tool(parameters={"description": "a" * (64 << 10)})], "more than 65536 bytes"),
    ([tool(f"f{i}", parameters={"description": "a" * (MAX_CHARS // 20)}) for i in range(21)], "longer than"),
    ([tool(parameters={"properties": {"a": {"type": "integer", "multipleOf": 999983}}})], "multipleOf"),
    ([tool(f"f{i}") for i in range(MAX_TOOLS + 1)], "at most"),
])
def test_bad_tools(tools, place):
    with pytest.raises(RequestError, match=place) as caught:
        check_tools(tools)
    assert caught.value.param == "tools" and len(str(caught.value)) < 600


def test_limits_of_a_schema_can_be_others():
    limits = Limits(schema_bytes=200, schema_depth=6)
    assert check_tools([tool(parameters=deep(2))], limits) and check_tools([tool(parameters=deep(31))])
    for schema in (deep(3), {"description": "a" * 200}):
        with pytest.raises(RequestError, match=r"tools\[0\]\.function\.parameters cannot be used"):
            check_tools([tool(parameters=schema)], limits)


NAMED = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(("choice", "given", "found"), [
    (None, True, ToolChoice("auto")), (None, False, ToolChoice("none")), ("none", True, ToolChoice("none")),
    ("none", False, ToolChoice("none")), ("auto", True, ToolChoice("auto")), ("required", True, ToolChoice("required")),
    (NAMED, True, ToolChoice("named", "f"))])
def test_good_choices(choice, given, found):
    assert check_tool_choice(choice, check_tools([tool()] if given else None)) == found


@pytest.mark.parametrize(("choice", "given"), [
    ("auto", False), ("required", False), (NAMED, False), ("any", True), ("named", True), (1, True), ([], True), ({}, True),
    (True, True), ({"type": "function", "function": {"name": "nope"}}, True),
    ({"type": "function", "function": {"name": []}}, True),
    ({"type": "function", "function": "f"}, True), ({"type": "allowed_tools"}, True)])
def test_bad_choices(choice, given):
    with pytest.raises(RequestError) as caught:
        check_tool_choice(choice, check_tools([tool()] if given else None))
    assert caught.value.param == "tool_choice"
