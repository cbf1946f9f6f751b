"""SamplingParams: every value out of range is an error that names field and value; what exists is valid."""

import copy
import dataclasses
import inspect
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.absent import SAMPLING
from octavo.errors import RequestError
from octavo.params import MAX_BIAS, MAX_STOP, MAX_STOP_CHARS, SamplingParams, StructuredOutputsParams

NAN, INF = float("nan"), float("inf")
NUMBERS = ("presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "min_p",
           "length_penalty")
INTEGERS = ("n", "best_of", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs")
SWITCHES = ("ignore_eos", "include_stop_str_in_output", "detokenize", "skip_special_tokens",
            "spaces_between_special_tokens", "use_beam_search")
LISTS = ("stop_token_ids", "allowed_token_ids", "bad_words", "logits_processors")

BAD: list[tuple[str, Any]] = [
    *[(name, value) for name in NUMBERS for value in (NAN, INF, -INF, "1", None, True, [1.0], 10**400)],
    *[(name, value) for name in INTEGERS for value in (1.5, "1", True, NAN, INF, 2**70, -2)],
    *[(name, value) for name in SWITCHES for value in (0, 1, "true", None)],
    *[(name, value) for name in LISTS for value in (3, "text", {"a": 1})],
    ("n", 0), ("n", 129), ("n", None), ("best_of", 0), ("best_of", 129),
    ("presence_penalty", -2.01), ("presence_penalty", 2.01), ("frequency_penalty", 2.01),
    ("repetition_penalty", 0.0), ("repetition_penalty", -1.0), ("repetition_penalty", 1e39), ("repetition_penalty", 1e-46),
    ("temperature", -0.01), ("temperature", 1e39), ("length_penalty", 2000.0), ("length_penalty", -2000.0),
    ("top_p", 0.0), ("top_p", 1.01), ("top_k", None), ("top_k", 2**31), ("min_p", -0.1), ("min_p", 1.01),
    ("seed", -1), ("seed", 2**64), ("max_tokens", 0), ("max_tokens", -1), ("min_tokens", None), ("logprobs", -1),
    ("stop", 3), ("stop", [3]), ("stop", [""]), ("stop", ["x" * (MAX_STOP_CHARS + 1)]),
    ("stop", ["x"] * (MAX_STOP + 1)),
    ("stop_token_ids", [-1]), ("stop_token_ids", [1.0]), ("stop_token_ids", [True]),
    ("allowed_token_ids", []), ("allowed_token_ids", [-1]), ("bad_words", [""]), ("bad_words", ["x"] * (MAX_BIAS + 1)),
    ("logit_bias", [1]), ("logit_bias", {-1: 1.0}), ("logit_bias", {"1": 1.0}), ("logit_bias", {1: 101.0}),
    ("logit_bias", {1: NAN}), ("logit_bias", {1: -INF}), ("logit_bias", {i: 0.0 for i in range(MAX_BIAS + 1)}),
    ("logits_processors", [3]), ("early_stopping", "yes"), ("early_stopping", None), ("early_stopping", 1),
    ("structured_outputs", {"regex": "a"}), ("structured_outputs", "a"),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_an_error_that_names_field_and_value(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert name in str(caught.value)
    assert len(str(caught.value)) < 600
    short = repr(value) if not isinstance(value, list | dict) else ""
    if 0 < len(short) < 50:
        assert short in str(caught.value)


@pytest.mark.parametrize(("name", "values"), [
    ("n", (1, 128)), ("top_k", (-1, 0, 1, 2**31 - 1)), ("top_p", (1e-9, 1, 1.0)), ("min_p", (0, 1.0)),
    ("temperature", (0, 0.0, 100.0)), ("seed", (0, 2**64 - 1, None)), ("max_tokens", (1, None)),
    ("logprobs", (None, 0, 5)), ("presence_penalty", (-2, 2)), ("repetition_penalty", (1e-3, 5, 1000)),
    ("early_stopping", (True, False, "never")), ("length_penalty", (-3.0, 0.0, 2)),
    ("logit_bias", ({}, {5: -100, 6: 100.0})),
])
def test_good_values_are_kept(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize(("values", "param"), [
    ({"n": 3, "best_of": 2}, "best_of"),
    ({"max_tokens": 4, "min_tokens": 5}, "min_tokens"),
    ({"stop": ["x"], "detokenize": False}, "stop"),
    ({"temperature": 0.0, "best_of": 2}, "best_of"),
    ({"use_beam_search": True, "temperature": 0.0}, "best_of"),
    ({"use_beam_search": True, "n": 2}, "temperature"),
    ({"use_beam_search": True, "n": 2, "temperature": 0.0, "top_p": 0.5}, "top_p"),
    ({"use_beam_search": True, "n": 2, "temperature": 0.0, "top_k": 5}, "top_k"),
    ({"use_beam_search": True, "n": 2, "temperature": 0.0, "min_p": 0.5}, "min_p"),
    ({"use_beam_search": True, "n": 2, "temperature": 0.0, "stop": ["x"]}, "stop"),
    ({"use_beam_search": True, "n": 2, "temperature": 0.0, "logit_bias": {1: 1.0}}, "logit_bias"),
    ({"use_beam_search": True, "n": 2, "temperature": 0.0, "min_tokens": 1}, "min_tokens"),
])
def test_values_that_do_not_go_together(values: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**values)
    assert caught.value.param == param


def test_beam_search_and_greedy_n_are_allowed() -> None:
    assert SamplingParams(use_beam_search=True, n=2, best_of=4, temperature=0.0).width == 4
    assert SamplingParams(temperature=0.0, n=3).width == 3


def test_defaults() -> None:
    params = SamplingParams()
    assert (params.n, params.width, params.temperature, params.max_tokens, params.greedy) == (1, 1, 1.0, 16, False)
    assert SamplingParams(temperature=0).greedy


def test_a_stop_string_becomes_a_tuple() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=None).stop == ()  # type: ignore[arg-type]  # as OpenAI's clients send it


def test_from_dict_names_an_unknown_field() -> None:
    assert SamplingParams.from_dict({"temperature": 0.5}).temperature == 0.5
    with pytest.raises(RequestError, match="temprature") as caught:
        SamplingParams.from_dict({"temprature": 0.5})
    assert (caught.value.param, caught.value.code) == ("temprature", "unsupported_field")


@pytest.mark.parametrize("name", SAMPLING)
def test_a_parameter_of_vllm_s_is_refused_with_what_stands_in_its_place(name: str) -> None:
    def changed(values: dict[str, Any]) -> SamplingParams:
        return SamplingParams().clone(**values)

    makers: list[Any] = [lambda values: SamplingParams(**values), SamplingParams.from_dict, changed]
    for make in makers:
        with pytest.raises(RequestError, match=f"{name} is a sampling parameter of vLLM that Octavo does not have: ") as caught:
            make({name: 1})
        assert SAMPLING[name] in str(caught.value) and (caught.value.param, caught.value.code) == (name, "unsupported_field")
    assert name not in {f.name for f in dataclasses.fields(SamplingParams)}


def test_a_name_that_nobody_has_is_python_s_own_error() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=0.5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"SamplingParams.*positional"):
        SamplingParams(3)  # type: ignore[misc]


def test_the_constructor_is_a_dataclass_s_to_tools_and_subclasses() -> None:
    assert list(inspect.signature(SamplingParams).parameters) == [f.name for f in dataclasses.fields(SamplingParams)]
    params = SamplingParams(temperature=0.5, stop="x", logit_bias={3: 1.0})
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == dataclasses.replace(params) == params

    @dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
    class More(SamplingParams):
        extra_args: int = 0  # a name of vLLM's, which a subclass may have

    assert More(extra_args=2, n=3).clone(temperature=0.0) == More(extra_args=2, n=3, temperature=0.0)


def test_it_is_frozen_and_clone_checks_again() -> None:
    params = SamplingParams()
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]
    assert params.clone(n=2) == SamplingParams(n=2)
    with pytest.raises(RequestError):
        params.clone(n=0)


@given(st.fixed_dictionaries({}, optional={
    "temperature": st.floats(), "top_p": st.floats(), "min_p": st.floats(), "repetition_penalty": st.floats(),
    "top_k": st.integers(-3, 10), "n": st.integers(-1, 130), "max_tokens": st.none() | st.integers(-1, 5),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3),
}))
def test_whatever_is_given_is_valid_or_refused(values: dict[str, Any]) -> None:
    try:
        params = SamplingParams(**values)
    except RequestError as error:
        assert error.param in values
        return
    assert params.temperature >= 0 and math.isfinite(params.temperature)
    assert 0 < params.top_p <= 1 and 0 <= params.min_p <= 1 and params.repetition_penalty > 0
    assert 1 <= params.n <= 128 and params.top_k >= -1 and all(params.stop)


def test_a_temperature_too_small_to_divide_by_is_greedy() -> None:
    assert SamplingParams(temperature=1e-6).temperature == 0.0 and SamplingParams(temperature=1e-46, best_of=1).greedy
    assert SamplingParams(temperature=1e-4).temperature == 1e-4


def test_numbers_of_numpy_become_pythons() -> None:
    params = SamplingParams(temperature=np.float32(0.5), max_tokens=np.int64(3), seed=np.int32(7))
    assert (type(params.temperature), type(params.max_tokens), type(params.seed)) == (float, int, int)


def test_a_valid_object_stays_valid() -> None:
    bias = {5: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[-1] = 1e9
    assert params.logit_bias == {5: 1.0} and isinstance(hash(params), int)


@pytest.mark.parametrize("values", [
    {}, {"regex": "a", "choice": ["a"]}, {"json_object": False}, {"json_object": 1}, {"json": 3}, {"json": {"a": NAN}},
    {"json": {"a": object()}}, {"regex": 3}, {"grammar": b"x"}, {"choice": "abc"}, {"choice": [1]}, {"choice": 3},
    {"regex": "a", "whitespace_pattern": " "}, {"regex": "a", "disable_any_whitespace": True},
    {"json_object": True, "disable_additional_properties": True}, {"json": {}, "disable_any_whitespace": 1},
    {"json": {}, "whitespace_pattern": 1}, {"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True},
    {"regx": "a"}], ids=repr)
def test_structured_outputs_that_are_no_constraint(values: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        StructuredOutputsParams.from_dict(values)
    assert caught.value.param == "structured_outputs" and len(str(caught.value)) < 600


def test_structured_outputs_are_values() -> None:
    schema = {"type": "object"}
    one = StructuredOutputsParams(json=schema, json_object=False)
    schema["type"] = "array"
    assert one.json == {"type": "object"} and one == StructuredOutputsParams(json={"type": "object"})
    assert StructuredOutputsParams(choice=["a"]).choice == ("a",)
    params = SamplingParams(structured_outputs=one)
    assert hash(params) == hash(SamplingParams(structured_outputs=one)) and params.clone(n=2).structured_outputs is one
    with pytest.raises(RequestError) as caught:
        SamplingParams(structured_outputs=one, use_beam_search=True, n=2, temperature=0.0)
    assert caught.value.param == "structured_outputs"
