"""octavo bench serve: flags become requests, results have vLLM's keys, and mistakes are found before the clock starts."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from stand_in import StandIn, error

from octavo.cli import main

KEYS = {"date", "endpoint_type", "backend", "model_id", "tokenizer_id", "num_prompts", "request_rate", "burstiness",
        "max_concurrency", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens",
        "request_throughput", "request_goodput", "output_throughput", "total_token_throughput", "max_output_tokens_per_s",
        "max_concurrent_requests",
        *(f"{kind}_{name}_ms" for kind in ("mean", "median", "std", "p99") for name in ("ttft", "tpot", "itl"))}


def bench(server: StandIn, *words: str) -> int:
    return main(["bench", "serve", "--port", str(server.port), *words])


def last(capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    text = capsys.readouterr().out
    return text, json.loads(text.splitlines()[-1])


def sent(server: StandIn) -> list[Any]:
    """Bodies of the requests that were measured: those with more than one token, for the first looks ask for one."""
    bodies = [seen.body for seen in server.seen if seen.body is not None]
    return [body for body in bodies if (body.get("max_tokens") or body.get("max_completion_tokens") or 0) > 1]


def test_completions(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(server, "--num-prompts", "6", "--random-input-len", "20", "--random-output-len", "4", "--ignore-eos") == 0
    text, found = last(capsys)
    assert set(found) == KEYS
    assert (found["completed"], found["failed"], found["num_prompts"], found["model_id"]) == (6, 0, 6, "stand-in")
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (120, 24)
    assert (found["request_rate"], found["burstiness"], found["max_concurrency"]) == ("inf", 1.0, None)
    assert found["backend"] == found["endpoint_type"] == "openai" and found["request_goodput"] is None
    assert "Serving Benchmark Result" in text and "Mean TTFT (ms):" in text and "P99 ITL (ms):" in text
    bodies = sent(server)
    assert len(bodies) == 6 and all(len(body["prompt"]) == 20 and body["max_tokens"] == 4 for body in bodies)
    assert all(body["ignore_eos"] is True and body["temperature"] == 0.0 and body["model"] == "stand-in" for body in bodies)
    assert all("top_p" not in body for body in bodies)


def test_chats_have_texts_of_the_length_asked_for(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    """The stand-in counts one and a half tokens per word and seven around a message: that is measured and made up for."""
    assert bench(server, "--backend", "openai-chat", "--num-prompts", "4", "--random-input-len", "100",
                 "--random-output-len", "3", "--top-p", "0.9", "--extra-body", '{"user": "me"}', "--header", "X-A=b=c") == 0
    _, found = last(capsys)
    assert abs(found["total_input_tokens"] - 400) <= 8 and found["total_output_tokens"] == 12
    bodies = sent(server)
    assert len(bodies) == 4 and bodies[0]["max_completion_tokens"] == 3 and bodies[0]["top_p"] == 0.9
    assert bodies[0]["user"] == "me" and "ignore_eos" not in bodies[0]
    assert server.seen[-1].path == "/v1/chat/completions" and server.seen[-1].headers["x-a"] == "b=c"


def test_a_server_that_takes_no_ids_gets_words(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    server.ids_allowed = False
    assert bench(server, "--num-prompts", "2", "--random-input-len", "60", "--random-output-len", "2") == 0
    captured = capsys.readouterr()
    assert "prompts are words" in captured.err and isinstance(sent(server)[0]["prompt"], str)
    assert json.loads(captured.out.splitlines()[-1])["total_input_tokens"] == 120


def test_no_usage(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    server.usage = False
    assert bench(server, "--backend", "openai-chat", "--num-prompts", "2", "--random-input-len", "5",
                 "--random-output-len", "3") == 0
    captured = capsys.readouterr()
    assert "reports no usage" in captured.err and json.loads(captured.out.splitlines()[-1])["total_output_tokens"] == 6


def test_a_lengths_file_as_in_octavo_bench_throughput(
    server: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mix.json"
    path.write_text("[[3, 4], [5, 6], [2, 2]]")
    assert bench(server, "--lengths", str(path), "--num-prompts", "2") == 0
    found = [(len(body["prompt"]), body["max_tokens"], body["ignore_eos"]) for body in sent(server)]
    assert found == [(3, 4, True), (5, 6, True)]
    assert last(capsys)[1]["total_output_tokens"] == 10
    server.seen.clear()
    assert bench(server, "--lengths", str(path), "--no-ignore-eos") == 0
    assert len(sent(server)) == 3 and "ignore_eos" not in sent(server)[0]


def test_prefixes(server: StandIn) -> None:
    assert bench(server, "--num-prompts", "3", "--random-input-len", "4", "--random-prefix-len", "6",
                 "--random-output-len", "2") == 0
    bodies = sent(server)
    assert len({tuple(body["prompt"][:6]) for body in bodies}) == 1 and {len(body["prompt"]) for body in bodies} == {10}
    server.seen.clear()
    assert bench(server, "--dataset-name", "prefix_repetition", "--num-prompts", "4", "--prefix-repetition-num-prefixes", "2",
                 "--prefix-repetition-prefix-len", "8", "--prefix-repetition-suffix-len", "3",
                 "--prefix-repetition-output-len", "2") == 0
    assert len({tuple(body["prompt"][:8]) for body in sent(server)}) == 2


def test_texts_of_files_are_counted_by_the_server(
    server: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "one two three four"}\n{"prompt": "five six"}\n')
    assert bench(server, "--dataset-name", "custom", "--dataset-path", str(path), "--custom-output-len", "3") == 0
    assert [body["prompt"] for body in sent(server)] == ["one two three four", "five six"]
    assert sum(seen.path == "/tokenize" for seen in server.seen) == 2
    talk = [{"conversations": [{"value": "w " * 8}, {"value": "v " * 6}]}] * 2
    path.write_text(json.dumps(talk))
    server.seen.clear()
    assert bench(server, "--dataset-name", "sharegpt", "--dataset-path", str(path), "--num-prompts", "1") == 0
    assert [body["max_tokens"] for body in sent(server)] == [9]
    server.override = lambda seen: error(404, "no") if seen.path == "/tokenize" else None
    assert bench(server, "--dataset-name", "sharegpt", "--dataset-path", str(path)) == 1
    assert "give --tokenizer" in capsys.readouterr().err


def test_warm_ups_are_not_counted_and_not_repeated(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(server, "--num-prompts", "3", "--num-warmups", "2", "--random-input-len", "5", "--random-output-len", "2") == 0
    assert len(sent(server)) == 5 and last(capsys)[1]["num_prompts"] == 3
    assert len({tuple(body["prompt"]) for body in sent(server)}) == 5


def test_traffic(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(server, "--num-prompts", "10", "--random-input-len", "2", "--random-output-len", "2", "--request-rate", "200",
                 "--burstiness", "0.5", "--max-concurrency", "2", "--goodput", "ttft:10000", "tpot:10000",
                 "--percentile-metrics", "ttft,e2el", "--metric-percentiles", "50,99.9") == 0
    _, found = last(capsys)
    assert (found["request_rate"], found["burstiness"], found["max_concurrency"]) == (200.0, 0.5, 2)
    assert found["max_concurrent_requests"] <= 2 and found["request_goodput"] == found["request_throughput"]
    assert found["duration"] > 0.045 and "p99.9_e2el_ms" in found and "mean_itl_ms" not in found
    assert bench(server, "--num-prompts", "3", "--random-output-len", "2", "--ramp-up-strategy", "linear",
                 "--ramp-up-start-rps", "100", "--ramp-up-end-rps", "200") == 0
    _, found = last(capsys)
    assert (found["ramp_up_strategy"], found["ramp_up_start_rps"], found["ramp_up_end_rps"]) == ("linear", 100.0, 200.0)


def test_files(server: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "run.png"
    assert bench(server, "--num-prompts", "2", "--random-output-len", "3", "--save-detailed",
                 "--result-dir", str(tmp_path / "new"), "--metadata", "gpu=H100", "note=a=b", "--plot", str(picture)) == 0
    _, printed = last(capsys)
    (path,) = (tmp_path / "new").iterdir()
    assert path.name == f"openai-infqps-stand-in-{printed['date']}.json"
    found = json.loads(path.read_text())
    assert set(found) == KEYS | {"gpu", "note", "input_lens", "output_lens", "ttfts", "itls", "generated_texts", "errors"}
    assert (found["gpu"], found["note"], found["output_lens"]) == ("H100", "a=b", [3, 3])
    assert found["generated_texts"] == ["w0 w1 w2 "] * 2 and [len(gaps) for gaps in found["itls"]] == [2, 2]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert bench(server, "--num-prompts", "1", "--random-output-len", "2", "--save-result", "--result-dir", str(tmp_path),
                 "--result-filename", "r.json", "--max-concurrency", "4") == 0
    assert set(json.loads((tmp_path / "r.json").read_text())) == KEYS


def test_failures_are_counted_with_their_reasons(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    refused = iter([False, True, False, True, False])

    def override(seen: Any) -> bytes | None:
        wanted = (seen.body or {}).get("max_tokens", 0) > 1
        return error(503, "full") if wanted and next(refused) else None

    server.override = override
    assert bench(server, "--num-prompts", "5", "--random-output-len", "2", "--max-concurrency", "1") == 1
    captured = capsys.readouterr()
    found = json.loads(captured.out.splitlines()[-1])
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (3, 2, 6)
    assert "failed, 2 x: the server answered 503: full" in captured.err


def test_connections_that_drop(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    server.override = lambda seen: None
    usual = server.answer

    def answer(seen: Any) -> bytes:
        if (seen.body or {}).get("max_tokens", 0) > 1:
            server.drop_after = 300
        return usual(seen)

    server.answer = answer  # type: ignore[method-assign]
    assert bench(server, "--num-prompts", "3", "--random-output-len", "5", "--plot", "unused.png") == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["failed"] == 3 and "middle of its answer" in captured.err


@pytest.mark.parametrize(("words", "name"), [
    (["--num-prompts", "0"], "num_prompts"), (["--goodput", "ttft"], "goodput"), (["--request-rate", "0"], "request_rate"),
    (["--percentile-metrics", "x"], "percentile_metrics"), (["--metric-percentiles", "x"], "metric_percentiles"),
    (["--dataset-name", "custom"], "dataset_path"), (["--dataset-path", "x"], "dataset_path"), (["--lengths", "/no"], "lengths"),
    (["--lengths", "/no", "--dataset-name", "custom", "--dataset-path", "x"], "lengths"), (["--header", "x"], "header"),
    (["--metadata", "x"], "metadata"), (["--endpoint", "v1 x"], "endpoint"),
    (["--base-url", "h:1"], "base_url"), (["--plot", "x.gif"], "plot"), (["--random-range-ratio", "2"], "random_range_ratio"),
    (["--num-warmups", "-1"], "num_warmups"), (["--ramp-up-strategy", "linear"], "ramp_up"), (["--port", "70000"], "base_url"),
    (["--random-prefix-len", "-1"], "random_prefix_len"), (["--api-key", "a\nb"], "api_key"),
])
def test_a_mistake_is_found_before_the_server_is_asked(
    server: StandIn, words: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(server, *words) == 1
    captured = capsys.readouterr()
    assert name in captured.err and captured.err.count("\n") == 1 and not captured.out and not server.seen


@pytest.mark.parametrize("words", [["--profile"], ["--dataset-name", "sonnet"], ["--backend", "tgi"], ["--extra-body", "{"],
                                   ["--extra-body", "[]"]])
def test_what_vllm_has_and_we_lack_is_refused_by_name(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "serve", *words])
    assert caught.value.code == 2 and words[0] in capsys.readouterr().err


def test_a_picture_without_matplotlib(
    server: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert bench(server, "--plot", "x.png") == 1
    assert "pip install 'octavo[plot]'" in capsys.readouterr().err and not server.seen


@pytest.mark.parametrize(("behave", "message"), [
    (lambda s: setattr(s, "override", lambda seen: error(401, "no key")), "answered 401: no key"),
    (lambda s: setattr(s, "override", lambda seen: error(404, "no") if seen.method == "POST" else None), "answered 404: no"),
    (lambda s: setattr(s, "model", None), "serves no model"), (lambda s: setattr(s, "port", 1), "cannot reach http://127.0.0.1:1"),
    (lambda s: setattr(s, "override", lambda seen: b"what?\r\n"), "not HTTP"),
])
def test_a_server_that_cannot_be_measured(
    server: StandIn, behave: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    behave(server)
    assert bench(server, "--num-prompts", "3") == 1
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_a_busy_client_is_said(server: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    async def busy(stop: Any) -> float:
        await stop.wait()
        return 0.93

    monkeypatch.setattr("octavo.commands.bench_run.busiest", busy)
    assert bench(server, "--num-prompts", "1", "--random-output-len", "2") == 0
    assert "this client was busy for 93% of a second" in capsys.readouterr().err


def test_names(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--base-url", server.url, "--model", "/a/b", "--served-model-name", "x", "--num-prompts", "1",
                 "--random-output-len", "2", "--endpoint", "/v1/completions", "--backend", "vllm"]) == 0
    _, found = last(capsys)
    assert (found["model_id"], found["tokenizer_id"], found["backend"]) == ("x", "x", "vllm")
    assert sent(server)[0]["model"] == "x" and all(seen.path != "/v1/models" for seen in server.seen)
