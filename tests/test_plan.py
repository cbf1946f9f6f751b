"""StepPlan and StepResult survive the way between processes, to the byte; what does not belong in them is refused."""

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.plan import (
    NewRow,
    RowLogprobs,
    RowSampling,
    StepPlan,
    StepResult,
    decode_plan,
    decode_result,
    encode,
)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def same(a: Any, b: Any) -> bool:
    """Equal in type, and arrays equal in dtype, shape and bytes."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, msgspec.Struct):
        return type(a) is type(b) and all(same(getattr(a, n), getattr(b, n)) for n in a.__struct_fields__)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


FULL = RowSampling(
    temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, presence=1.0, frequency=-1.0, repetition=1.2, seed=2**64 - 1,
    index=3, logprobs=2, prompt_logprobs=0, bias_ids=(1, 2), bias_values=(0.5, -100.0), allowed=(1, 2, 3),
    bad_words=((1, 2), (3,)), min_tokens=4, stop_ids=(2,), processors=True, beam=True,
)
PLAN = StepPlan(
    epoch=2, step=7, rows=ints(0, 3), starts=ints(0, 16), counts=ints(16, 1), sample_rows=ints(3), sample_from=ints(1),
    sample_pos=ints(5), sample_generations=ints(9),
    new=[NewRow(0, 1, ints(5, 6, 7), 3, 0, ints(4), FULL), NewRow(1, 2, ints(), 0, 0, ints(), RowSampling())],
    ended=ints(8), append_rows=ints(3), append_index=ints(1), append_blocks=ints(11), forced_rows=ints(2),
    forced_tokens=ints(99), copies=np.array([[1, 2], [3, 4]], np.int32), swap_out=np.array([[5, 0]], np.int32),
)
LOGPROBS = RowLogprobs(3, 5, ints(4, 5), floats(-0.5, -np.inf), ints(1, 2), ints(4, 9).reshape(2, 1),
                       floats(-0.5, np.nan).reshape(2, 1))
RESULT = StepResult(epoch=2, step=7, tokens=ints(4, -1), bad=ints(1), logprobs=[LOGPROBS], prompt_logprobs=[LOGPROBS],
                    seconds=0.25, swap_seconds=0.5, checksum=2**63)


def test_a_plan_comes_back_as_it_was() -> None:
    assert same(decode_plan(encode(PLAN)), PLAN)


def test_a_result_comes_back_as_it_was() -> None:
    assert same(decode_result(encode(RESULT)), RESULT)


def test_an_empty_plan_comes_back_with_its_shapes() -> None:
    back = decode_plan(encode(StepPlan(epoch=0, step=0)))
    assert same(back, StepPlan(epoch=0, step=0))
    assert back.copies.shape == (0, 2) and back.rows.dtype == np.int32


def test_same_can_fail() -> None:
    assert not same(PLAN, StepPlan(epoch=2, step=7))
    assert not same(ints(1), floats(1.0))


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40), st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1))
def test_any_numbers_come_back(values: list[int], epoch: int, step: int) -> None:
    plan = StepPlan(epoch=epoch, step=step, rows=ints(*values), ended=ints(*values[::2]))
    assert same(decode_plan(encode(plan)), plan)


@pytest.mark.parametrize("data", [b"", b"\x00", b"\xc1", b"not a plan", encode(PLAN)[:-1], encode(PLAN) + b"\x00"])
def test_malformed_bytes_are_refused(data: bytes) -> None:
    with pytest.raises((msgspec.DecodeError, ValueError)):
        decode_plan(data)


@given(st.integers(0, len(encode(PLAN)) - 1))
def test_a_cut_plan_is_refused(length: int) -> None:
    with pytest.raises((msgspec.DecodeError, ValueError)):
        decode_plan(encode(PLAN)[:length])


def test_a_result_is_not_a_plan() -> None:
    with pytest.raises((msgspec.DecodeError, ValueError)):
        decode_plan(msgspec.msgpack.encode({"epoch": "x", "step": 0}))


@pytest.mark.parametrize("char", ["O", "d", "U", "V4"])
def test_arrays_of_other_types_are_refused(char: str) -> None:
    """Never object arrays: only int32 and float32 travel."""
    data = msgspec.msgpack.encode({"epoch": 0, "step": 0, "rows": (char, (1,), b"\x00" * 8)})
    with pytest.raises((msgspec.DecodeError, ValueError)):
        decode_plan(data)


def test_an_array_whose_bytes_do_not_fit_its_shape_is_refused() -> None:
    data = msgspec.msgpack.encode({"epoch": 0, "step": 0, "rows": ("i", (3,), b"\x00" * 8)})
    with pytest.raises((msgspec.DecodeError, ValueError)):
        decode_plan(data)


def test_what_is_no_array_cannot_be_encoded() -> None:
    with pytest.raises(NotImplementedError):
        encode(StepPlan(epoch=0, step=0, rows=object()))  # type: ignore[arg-type]


def test_sampling_is_frozen() -> None:
    with pytest.raises(AttributeError):
        FULL.seed = 1  # type: ignore[misc]
