"""RequestOutput and CompletionOutput: the names that users of vLLM read."""

from octavo.outputs import CompletionOutput, Logprob, RequestOutput


def test_finished_is_an_attribute_of_the_request_and_a_method_of_a_completion() -> None:
    running = CompletionOutput(0, "a", [1])
    ended = CompletionOutput(0, "a", [1], finish_reason="stop")
    assert not running.finished() and ended.finished()
    assert RequestOutput("0", "p", [1], outputs=[ended], finished=True).finished is True


def test_defaults_are_not_shared() -> None:
    RequestOutput("0", None, []).outputs.append(CompletionOutput(0, "", []))
    assert RequestOutput("1", None, []).outputs == []


def test_logprob() -> None:
    assert Logprob(-0.5) == Logprob(logprob=-0.5, rank=None, decoded_token=None)
