"""The codec of the process border: everything legal survives the way, nothing illegal does."""

import dataclasses
import math
import struct
import time
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.config import EngineConfig
from octavo.engine.stats import Stats
from octavo.errors import RequestError
from octavo.messages import EngineRequest, SequenceEnd, StepOutput, TokenLogprobs
from octavo.params import SamplingParams
from octavo.plan import GroupInfo
from octavo.server import ipc

PARAMS = SamplingParams(
    n=2, best_of=3, presence_penalty=0.5, frequency_penalty=-1.0, repetition_penalty=1.1, temperature=0.7, top_p=0.9, top_k=40,
    min_p=0.05, seed=2**64 - 1, stop=["\n", "é"], stop_token_ids=[7], ignore_eos=True, include_stop_str_in_output=True,
    max_tokens=None, min_tokens=3, logprobs=5, prompt_logprobs=0, skip_special_tokens=False, logit_bias={3: -100.0, 9: 1},
    allowed_token_ids=[1, 2, 3], bad_words=["no"], length_penalty=0.5, early_stopping="never")
REQUEST = EngineRequest(
    request_id="a", prompt_token_ids=[1, 2, 2**31 - 1], params=PARAMS, eos_token_ids=(2,), bad_word_ids=((4, 5), (6,)),
    stream=True, priority=-3, arrival=12.5, cache_salt="tenant")


def plain(message: object) -> dict:
    return msgspec.msgpack.decode(ipc.encode_request(message))


def test_a_request_arrives_as_it_was_sent() -> None:
    assert ipc.decode_request(ipc.encode_request(ipc.Add(REQUEST))) == ipc.Add(REQUEST)
    assert ipc.decode_request(ipc.encode_request(ipc.Abort("a", 3))) == ipc.Abort("a", 3)
    assert ipc.decode_request(ipc.encode_request(ipc.Abort("a"))) == ipc.Abort("a")


def test_every_field_of_the_parameters_travels() -> None:
    sent = plain(ipc.Add(REQUEST))["request"]["params"]
    assert set(sent) == {f.name for f in dataclasses.fields(SamplingParams)}


def test_ids_may_be_an_array() -> None:
    request = msgspec.structs.replace(REQUEST, prompt_token_ids=np.array([1, 5], np.int32))
    assert ipc.decode_request(ipc.encode_request(ipc.Add(request))).request.prompt_token_ids == [1, 5]


def test_functions_do_not_travel() -> None:
    request = EngineRequest(request_id="a", prompt_token_ids=[1],
                            params=SamplingParams(logits_processors=[lambda ids, logits: logits]))
    with pytest.raises(RequestError, match="logits_processors") as caught:
        ipc.encode_request(ipc.Add(request))
    assert caught.value.param == "logits_processors"


@pytest.mark.parametrize("change", [
    {"request_id": "\ud800"}, {"priority": 2**70}, {"prompt_token_ids": b"x" * (ipc.MAX_FRAME + 1)}])
def test_what_cannot_be_sent_is_the_clients_mistake(change: dict) -> None:
    with pytest.raises(RequestError):
        ipc.encode_request(ipc.Add(msgspec.structs.replace(REQUEST, **change)))


@pytest.mark.parametrize(("name", "value"), [
    ("top_p", 7.0), ("top_p", math.nan), ("temperature", -1.0), ("temperature", math.inf), ("n", 0), ("n", 10**6),
    ("n", True), ("seed", -1), ("logit_bias", {3: 1e9}), ("logit_bias", {"3": 1.0}), ("stop", "text"), ("stop", [3]),
    ("stop", [""]), ("stop_token_ids", [-1]), ("logits_processors", ["os.system"]), ("max_tokens", 0), ("max_tokens", "9"),
    ("early_stopping", "maybe"), ("allowed_token_ids", []), ("ignore_eos", 1), ("min_p", None), ("bad_words", None)])
def test_bytes_never_make_illegal_parameters(name: str, value: object) -> None:
    message = plain(ipc.Add(REQUEST))
    message["request"]["params"][name] = value
    with pytest.raises(ipc.BadFrame):
        ipc.decode_request(msgspec.msgpack.encode(message))


@pytest.mark.parametrize(("name", "value"), [
    ("request_id", 3), ("request_id", None), ("prompt_token_ids", None), ("prompt_token_ids", ["a"]), ("params", {"n": 0}),
    ("params", []), ("arrival", math.nan), ("arrival", math.inf), ("priority", 0.5), ("eos_token_ids", {"a": 1})])
def test_bytes_never_make_an_illegal_request(name: str, value: object) -> None:
    message = plain(ipc.Add(REQUEST))
    message["request"][name] = value
    with pytest.raises(ipc.BadFrame):
        ipc.decode_request(msgspec.msgpack.encode(message))


@pytest.mark.parametrize("data", [
    b"", b"\x00", b"\xc1", b"\x81\xa4type\xa4step", msgspec.msgpack.encode({"type": "shutdown"}), msgspec.msgpack.encode([1, 2]),
    msgspec.msgpack.encode({"type": "abort"}), msgspec.msgpack.encode({"type": "abort", "request_id": "a", "index": "b"}),
    b"\x91" * 100_000, b"\xdf" + struct.pack(">I", 2**32 - 1), b"\xdd" + struct.pack(">I", 2**32 - 1), bytes(ipc.MAX_FRAME + 1)])
def test_garbage_is_a_bad_frame(data: bytes) -> None:
    with pytest.raises(ipc.BadFrame):
        ipc.decode_request(data)
    with pytest.raises(ipc.BadFrame):
        ipc.decode_heartbeat(data)
    with pytest.raises(ipc.BadFrame):
        ipc.decode_output(data[:1000])


def test_a_truncated_message_is_a_bad_frame() -> None:
    data = ipc.encode_request(ipc.Add(REQUEST))
    for end in range(len(data)):
        with pytest.raises(ipc.BadFrame):
            ipc.decode_request(data[:end])
    with pytest.raises(ipc.BadFrame):
        ipc.decode_request(data + b"\x00")


@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=8))
def test_damage_gives_a_legal_message_or_a_bad_frame(place: int, patch: bytes) -> None:
    data = bytearray(ipc.encode_request(ipc.Add(REQUEST)))
    place %= len(data)
    data[place : place + len(patch)] = patch
    try:
        message = ipc.decode_request(bytes(data))
    except ipc.BadFrame:
        return
    if isinstance(message, ipc.Add):
        dataclasses.replace(message.request.params)  # checks every value again


def test_an_output_arrives_as_it_was_sent() -> None:
    marks = TokenLogprobs([3, 4], [-0.5, -1.5], [1, 2])
    out = StepOutput(
        streamed=[("a", 0), ("b", 1)], tokens=np.array([2**31 - 1, -1], np.int32), logprobs=[None, marks], started=[("a", 16)],
        prompt_logprobs=[("a", [marks])], finished=["b"], num_prompt_tokens=7, num_generated_tokens=2,
        ended=[SequenceEnd("b", 1, "stop", stop_token=5, token_ids=[1, 5], logprobs=[marks], cumulative_logprob=-2.0)])
    got = ipc.decode_output(ipc.encode_output(ipc.Stepped(out))).output
    assert got.token_list() == [2**31 - 1, -1] and got.tokens.dtype == np.int32
    got.tokens = out.tokens = None
    assert got == out
    empty = ipc.Stepped(StepOutput())
    assert ipc.decode_output(ipc.encode_output(empty)) == empty
    for message in (ipc.Refused("a", "why", "n", None), ipc.CutOff()):
        assert ipc.decode_output(ipc.encode_output(message)) == message


def test_half_a_token_is_a_bad_frame() -> None:
    data = msgspec.msgpack.encode({"type": "step", "output": {"tokens": b"abc"}})
    with pytest.raises(ipc.BadFrame):
        ipc.decode_output(data)
    with pytest.raises(ipc.BadFrame):
        ipc.decode_output(msgspec.msgpack.encode({"type": "step", "output": {"tokens": [1, 2]}}))


def test_a_heartbeat_arrives_as_it_was_sent() -> None:
    info = GroupInfo(num_blocks=4, num_host_blocks=0, block_bytes=1024, block_size=16, max_model_len=64, max_num_seqs=4,
                     max_num_batched_tokens=64, vocab_size=100, device="cpu")
    beat = ipc.Heartbeat(epoch=2, pid=7, phase="ready", progress=1.0, sent=3.5, step_seconds=0.25, bad_frames=1, cut_off=2,
                         stats=Stats(running=3, finished=Counter(stop=4)), info=info)
    got = ipc.decode_heartbeat(ipc.encode_heartbeat(beat))
    assert got == beat and isinstance(got.stats.finished, Counter)


def test_the_options_arrive_as_they_were_set(tmp_path: Path) -> None:
    config = EngineConfig.from_kwargs(model=tmp_path, seed=2**64 - 1, hf_overrides={"a": [1, {"b": None}]}, swap_space=0.5)
    start, got = ipc.decode_start(ipc.encode_start(config, tmp_path, 3, 100, "hang:1:2"))
    assert got == config.replace(model=str(tmp_path))
    assert (start.directory, start.epoch, start.max_waiting, start.faults) == (str(tmp_path), 3, 100, "hang:1:2")


def test_a_step_of_256_sequences_is_read_in_microseconds() -> None:
    out = StepOutput(streamed=[(f"0.abcdef.{i}", 0) for i in range(256)], tokens=np.arange(256, dtype=np.int32))
    data = ipc.encode_output(ipc.Stepped(out))
    best = math.inf
    for _ in range(200):
        begun = time.perf_counter()
        ipc.decode_output(data)
        best = min(best, time.perf_counter() - begun)
    assert best < 150e-6
