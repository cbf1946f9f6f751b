"""octavo bench: flags reach the benchmark, the last line is JSON, and contradictions are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from octavo.cli import main


def last(capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    text = capsys.readouterr().out
    return text, json.loads(text.splitlines()[-1])


def test_latency(engines: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "latency", "--model", "some/Tiny", "--input-len", "5", "--output-len", "4", "--batch-size", "2",
             "--num-iters-warmup", "1", "--num-iters", "3", "--load-format", "dummy"]
    assert main(words) == 0
    text, found = last(capsys)
    assert set(found["figures"]) >= {f"tiny/batch2_5_4/{name}" for name in ("mean_s", "median_s", "p90_s", "ttft_s")}
    assert "some/Tiny: 2 requests, 10 prompt and 8 output tokens" in text
    assert found["command"] == "octavo " + " ".join(words)
    assert engines[-1].config.skip_tokenizer_init and engines[-1].config.load_format == "dummy"
    calls = engines[-1].llm.calls
    assert len(calls) == 1 + 3 + 3 and all(len(p["prompt_token_ids"]) == 5 for p, *_ in [c[0] for c in calls])


def test_throughput_with_lengths(tmp_path: Path, engines: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mix.json"
    path.write_text("[[3, 4], [5, 6], [1, 1]]")
    assert main(["bench", "throughput", "--model", "m", "--lengths", str(path), "--num-prompts", "2"]) == 0
    _, found = last(capsys)
    assert set(found["figures"]) == {f"m/mix/t0/{n}" for n in ("output_tok_s", "total_tok_s", "request_s", "elapsed_s")}
    prompts, params = engines[-1].llm.calls[-1]
    assert [len(p["prompt_token_ids"]) for p in prompts] == [3, 5] and [p.max_tokens for p in params] == [4, 6]
    assert all(p.ignore_eos and not p.detokenize and p.greedy for p in params)


def test_throughput_of_one_shape(engines: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "throughput", "--model", "m", "--num-prompts", "3", "--input-len", "2", "--output-len", "2",
                 "--temperature", "1"]) == 0
    _, found = last(capsys)
    assert found["figures"]["m/batch3_2_2/t1/output_tok_s"]["unit"] == "tok/s"
    assert engines[-1].llm.calls[-1][1][0].temperature == 1.0


@pytest.mark.parametrize(("words", "name"), [
    (["throughput", "--lengths", "/no/such"], "lengths"),
    (["throughput", "--lengths", "/no/such", "--input-len", "4"], "input_len"),
    (["throughput", "--num-prompts", "0"], "num_prompts"),
    (["throughput", "--temperature", "nan"], "temperature"),
    (["latency", "--batch-size", "0"], "num_prompts"),
    (["latency", "--output-len", "0"], "output_len"),
])
def test_a_mistake_is_found_before_the_model_is_loaded(
    words: list[str], name: str, engines: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *words, "--model", "m"]) == 1
    assert name in capsys.readouterr().err and not engines


def test_a_kind_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench"])
    assert caught.value.code == 2 and "KIND" in capsys.readouterr().err
