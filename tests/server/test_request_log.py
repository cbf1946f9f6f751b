"""The log of requests: two lines, and no text unless asked for."""

import logging

import pytest

from octavo.errors import ConfigError
from octavo.params import SamplingParams
from octavo.server.config import ServerConfig
from octavo.server.request_log import RequestLog
from octavo.server.timing import Origin, Timing

SECRET = "my secret\nINFO fake line\x1b[31m and more"


def lines(caplog: pytest.LogCaptureFixture, max_len: int | None, prompt: str | None) -> list[str]:
    timing = Timing("0.ab.7", 100.0, SamplingParams(max_tokens=12, n=2), 5, Origin("req-1"))
    log = RequestLog(max_len)
    with caplog.at_level(logging.INFO, "octavo.server.request_log"):
        log.opened(timing, prompt, [11, 22, 33, 44, 55])
        timing.begun, timing.first, timing.cached_tokens, timing.counts = 100.25, 100.5, 3, [4, 6]
        timing.reasons = ["stop", "length"]
        log.closed(timing, 102.0)
    return caplog.messages


def test_a_request_has_two_lines_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    first, second = lines(caplog, None, SECRET)
    assert first == "request 0.ab.7 (req-1) begins: 5 prompt tokens, max_tokens 12, n 2"
    assert second == ("request 0.ab.7 (req-1) ended (stop, length): 5 prompt tokens, 3 of them cached, 10 output tokens; "
                      "begun after 0.250 s, first token after 0.500 s, ended after 2.000 s")


def test_so_much_of_the_prompt_as_was_asked_for_cannot_break_a_line(caplog: pytest.LogCaptureFixture) -> None:
    first, second = lines(caplog, 25, SECRET)
    assert first.endswith(r", prompt 'my secret\nINFO fake line\x1b'") and len((first + second).splitlines()) == 1


def test_ids_are_cut_too_and_nothing_may_be_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    assert lines(caplog, 2, None)[0].endswith(", prompt [11, 22]")
    caplog.clear()
    assert lines(caplog, 0, SECRET)[0].endswith(", prompt ''")


def test_a_request_that_never_began(caplog: pytest.LogCaptureFixture) -> None:
    timing = Timing("r", 100.0, SamplingParams(), 5)
    timing.reasons = ["abort"]
    with caplog.at_level(logging.INFO, "octavo.server.request_log"):
        RequestLog(None).closed(timing, 100.5)
    assert "request r ended (abort)" in caplog.text and "begun after -, first token after -, ended after 0.500 s" in caplog.text


def test_a_length_without_a_log_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_log_len \(5\) needs enable_log_requests"):
        ServerConfig(max_log_len=5)
    assert ServerConfig(max_log_len=5, enable_log_requests=True).max_log_len == 5
