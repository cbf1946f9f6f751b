"""EngineRequest and StepOutput: plain data with defaults that are not shared."""

import numpy as np

from octavo.messages import EngineRequest, SequenceEnd, StepOutput
from octavo.params import SamplingParams


def test_defaults_are_not_shared() -> None:
    StepOutput().ended.append(SequenceEnd("a", 0, "stop"))
    StepOutput().finished.append("a")
    SequenceEnd("a", 0, "stop").token_ids.append(1)
    assert StepOutput() == StepOutput(ended=[], finished=[])
    assert SequenceEnd("b", 0, "stop").token_ids == []


def test_tokens_become_plain_integers() -> None:
    found = StepOutput(streamed=[("a", 0), ("b", 1)], tokens=np.array([5, 7], np.int32)).token_list()
    assert found == [5, 7] and all(type(token) is int for token in found)
    assert StepOutput().token_list() == []


def test_a_request_holds_what_the_engine_needs() -> None:
    request = EngineRequest(request_id="r", prompt_token_ids=[1, 2], params=SamplingParams())
    assert (request.stream, request.priority, request.cache_salt, request.eos_token_ids) == (False, 0, "", ())
