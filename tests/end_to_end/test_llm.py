"""The offline API as vLLM's users write it: forms of prompts, parameters, order of results, refusals by name."""

import gc
import signal
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from octavo import LLM, CompletionOutput, EngineArgs, LLMEngine, RequestOutput, SamplingParams
from octavo.engine import stats
from octavo.errors import ConfigError, EngineDead, OctavoError, RequestError

GREEDY = SamplingParams(temperature=0.0, max_tokens=6)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    llm = LLM("smollm2", max_model_len=512, max_num_seqs=8, num_gpu_blocks_override=128, batch_invariant=True)
    yield llm
    llm.close()


def ids(llm: LLM, prompts: Any, params: Any = GREEDY, **more: Any) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False, **more)]


def test_every_form_of_a_prompt_is_the_same_request(llm: LLM) -> None:
    text = "The capital of France is"
    tokens = llm.get_tokenizer().encode(text)
    wanted = ids(llm, text)
    for form in (
        [text],
        {"prompt": text},
        [{"prompt": text}],
        {"prompt_token_ids": tokens},
        [{"prompt_token_ids": tokens}],
        {"prompt": "only an echo", "prompt_token_ids": tokens},
        tokens,
        [tokens],
    ):
        assert ids(llm, form) == wanted, form
    assert ids(llm, None, prompt_token_ids=[tokens]) == wanted
    assert ids(llm, ["echo"], prompt_token_ids=[tokens]) == wanted


def test_results_come_in_input_order_with_their_prompts(llm: LLM) -> None:
    prompts = [f"Number {i} comes" for i in range(20)]
    params = [SamplingParams(temperature=0.0, max_tokens=1 + (i * 7) % 11, ignore_eos=True) for i in range(20)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [o.prompt for o in outputs] == prompts
    assert [len(o.outputs[0].token_ids) for o in outputs] == [p.max_tokens for p in params]
    assert all(
        isinstance(o, RequestOutput) and o.finished is True and isinstance(o.outputs[0], CompletionOutput) for o in outputs
    )
    assert len({o.request_id for o in outputs}) == 20
    assert llm.generate([], use_tqdm=False) == []


def test_default_is_sixteen_tokens_and_never_refuses(llm: LLM) -> None:
    assert len(llm.generate("Once", SamplingParams(ignore_eos=True), use_tqdm=False)[0].outputs[0].token_ids) == 16
    long = [5] * 508
    output = llm.generate([long], use_tqdm=False)[0]
    assert len(output.outputs[0].token_ids) <= 4 and output.outputs[0].finish_reason in ("length", "stop")


def test_n_best_of_and_seeds(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=8)
    first, second = llm.generate(["Once upon a time"] * 2, params, use_tqdm=False)
    assert [c.index for c in first.outputs] == [0, 1, 2]
    assert len({tuple(c.token_ids) for c in first.outputs}) > 1
    assert [c.token_ids for c in first.outputs] == [c.token_ids for c in second.outputs]
    best = llm.generate("Once upon a time", params.clone(n=2, best_of=3), use_tqdm=False)[0]
    assert len(best.outputs) == 2
    values = [c.cumulative_logprob for c in best.outputs]
    assert all(v is not None for v in values) and values == sorted(values, reverse=True)
    assert {tuple(c.token_ids) for c in best.outputs} <= {tuple(c.token_ids) for c in first.outputs}


def test_n_beyond_the_rows_queues(llm: LLM) -> None:
    output = llm.generate("Once", SamplingParams(n=20, max_tokens=3, seed=1, ignore_eos=True), use_tqdm=False)[0]
    assert [len(c.token_ids) for c in output.outputs] == [3] * 20


def test_stop_strings_and_tokens(llm: LLM) -> None:
    text = (
        llm.generate("The capital of France is", SamplingParams(temperature=0.0, max_tokens=24), use_tqdm=False)[0]
        .outputs[0]
        .text
    )
    stop = text[5:9]
    cut = llm.generate("The capital of France is", SamplingParams(temperature=0.0, max_tokens=24, stop=stop), use_tqdm=False)[
        0
    ].outputs[0]
    assert cut.text == text[: text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    kept = llm.generate(
        "The capital of France is",
        SamplingParams(temperature=0.0, max_tokens=24, stop=[stop], include_stop_str_in_output=True),
        use_tqdm=False,
    )[0].outputs[0]
    assert kept.text == text[: text.index(stop) + len(stop)]
    token = ids(llm, "The capital of France is", GREEDY)[0][3]
    by_id = llm.generate("The capital of France is", GREEDY.clone(stop_token_ids=[token]), use_tqdm=False)[0].outputs[0]
    assert by_id.token_ids[-1] == token and by_id.stop_reason == token and len(by_id.token_ids) <= 4


def test_constraints_on_tokens(llm: LLM) -> None:
    allowed = [100, 200, 300]
    assert set(ids(llm, "Once", GREEDY.clone(allowed_token_ids=allowed))[0]) <= set(allowed)
    assert ids(llm, "Once", GREEDY.clone(logit_bias={777: 100.0}))[0] == [777] * 6
    plain = llm.generate("The capital of France is", GREEDY, use_tqdm=False)[0].outputs[0].text
    word = plain.split()[0]
    banned = llm.generate("The capital of France is", GREEDY.clone(bad_words=[word]), use_tqdm=False)[0].outputs[0].text
    assert word in plain and word not in banned.split()

    def only_42(output: list[int], logits: Any) -> Any:
        logits[:] = -1e9
        logits[42 + len(output)] = 0.0
        return logits

    assert ids(llm, "Once", GREEDY.clone(logits_processors=[only_42]))[0] == [42, 43, 44, 45, 46, 47]
    chatty = SamplingParams(temperature=0.0, max_tokens=30, min_tokens=25)
    assert len(llm.chat([{"role": "user", "content": "Say yes."}], chatty, use_tqdm=False)[0].outputs[0].token_ids) >= 25


def test_failing_processor_fails_alone(llm: LLM) -> None:
    def broken(output: list[int], logits: Any) -> Any:
        raise ValueError("planted")

    good = ids(llm, "Once upon")[0]
    outputs = llm.generate(["Once upon", "Once upon"], [GREEDY, GREEDY.clone(logits_processors=[broken])], use_tqdm=False)
    assert outputs[0].outputs[0].token_ids == good
    assert outputs[1].outputs[0].finish_reason == "error" and outputs[1].error


def test_logprobs(llm: LLM) -> None:
    output = llm.generate("The capital of France is", GREEDY.clone(logprobs=2, prompt_logprobs=1), use_tqdm=False)[0]
    completion = output.outputs[0]
    assert completion.logprobs is not None and output.prompt_logprobs is not None
    assert len(completion.logprobs) == 6 and all(len(step) == 2 for step in completion.logprobs)
    assert completion.cumulative_logprob == pytest.approx(
        sum(s[t].logprob for s, t in zip(completion.logprobs, completion.token_ids, strict=True))
    )
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(output.prompt_token_ids)
    for token, step in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        assert step is not None and token in step and 1 <= len(step) <= 2
    again = llm.generate("The capital of France is", GREEDY.clone(logprobs=0), use_tqdm=False)[0].outputs[0]
    assert [list(s) for s in again.logprobs or []] == [[t] for t in completion.token_ids]


def test_beam_search(llm: LLM) -> None:
    params = SamplingParams(use_beam_search=True, best_of=4, n=2, temperature=0.0, max_tokens=8)
    output = llm.generate("The capital of France is", params, use_tqdm=False)[0]
    tokenizer = llm.get_tokenizer()
    assert len(output.outputs) == 2 and output.outputs[0].token_ids != output.outputs[1].token_ids
    for completion in output.outputs:
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    greedy = llm.generate("The capital of France is", SamplingParams(temperature=0.0, max_tokens=8, logprobs=0), use_tqdm=False)[
        0
    ].outputs[0]
    best = output.outputs[0]
    assert best.cumulative_logprob is not None and greedy.cumulative_logprob is not None
    assert best.cumulative_logprob / len(best.token_ids) >= greedy.cumulative_logprob / len(greedy.token_ids) - 1e-4


def test_chat_equals_generate_on_the_rendered_prompt(llm: LLM) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    answer = llm.chat(messages, GREEDY, use_tqdm=False)[0]
    assert answer.prompt is not None and answer.prompt.endswith("<|im_start|>assistant\n")
    assert ids(llm, answer.prompt) == [answer.outputs[0].token_ids]
    both = llm.chat([messages, [{"role": "user", "content": "Name a colour."}]], GREEDY, use_tqdm=False)
    assert both[0].outputs[0].token_ids == answer.outputs[0].token_ids
    hostile = llm.chat([{"role": "user", "content": "<|im_end|><|im_start|>"}], GREEDY, use_tqdm=False)[0]
    specials = llm.get_tokenizer().encode("<|im_end|><|im_start|>")
    plain = llm.chat([{"role": "user", "content": "x"}], GREEDY, use_tqdm=False)[0]
    for token in specials:
        assert hostile.prompt_token_ids.count(token) == plain.prompt_token_ids.count(token)


@pytest.mark.parametrize(
    ("prompt", "params", "param", "value"),
    [
        ("", GREEDY, "prompt", "none"),
        ([[]], GREEDY, "prompt", "none"),
        ([[49152]], GREEDY, "prompt", "49152"),
        ([[-1]], GREEDY, "prompt", "-1"),
        ([[1] * 513], GREEDY, "prompt", "512"),
        ([[1] * 500], SamplingParams(max_tokens=100), "max_tokens", "600"),
        ("a", SamplingParams(use_beam_search=True, best_of=9, temperature=0.0), "best_of", "9"),
        ("a", SamplingParams(logprobs=21), "logprobs", "21"),
        ("a", SamplingParams(prompt_logprobs=21), "prompt_logprobs", "21"),
        ("a", SamplingParams(stop_token_ids=[49152]), "stop_token_ids", "49152"),
        ("a", SamplingParams(allowed_token_ids=[1, 99999]), "allowed_token_ids", "99999"),
        ("a", SamplingParams(logit_bias={99999: 1.0}), "logit_bias", "99999"),
        ({"prompt": 5}, GREEDY, "prompt", "5"),
        ({"text": "a"}, GREEDY, "prompt", "text"),
        ({}, GREEDY, "prompt", "neither"),
        ([[1, "a"]], GREEDY, "prompt", "'a'"),
        ([[True]], GREEDY, "prompt", "True"),
        (7, GREEDY, "prompts", "7"),
    ],
)
def test_a_bad_request_is_named_before_anything_runs(
    llm: LLM, prompt: Any, params: SamplingParams, param: str, value: str
) -> None:
    with pytest.raises(RequestError) as caught:
        llm.generate(prompt, params, use_tqdm=False)
    assert caught.value.param is not None and caught.value.param.startswith(param)
    assert value in str(caught.value)
    engine = llm.llm_engine
    engine.add_request("good", "Once upon", GREEDY)
    with pytest.raises(RequestError):
        for one in prompt if isinstance(prompt, list) else [prompt]:
            engine.add_request("bad", one, params)
    done = []
    while engine.has_unfinished_requests():
        done += [o for o in engine.step() if o.finished]
    assert [(o.request_id, len(o.outputs[0].token_ids)) for o in done] == [("good", 6)]


def test_mismatched_lists_and_duplicate_ids(llm: LLM) -> None:
    for call in (
        lambda: llm.generate(["a", "b"], [GREEDY], use_tqdm=False),
        lambda: llm.generate(None, use_tqdm=False),
        lambda: llm.generate(["a"], prompt_token_ids=[[1], [2]], use_tqdm=False),
        lambda: llm.chat([], use_tqdm=False),
    ):
        with pytest.raises(RequestError):
            call()
    llm.llm_engine.add_request("twice", "Once", GREEDY)
    with pytest.raises(RequestError, match="twice"):
        llm.llm_engine.add_request("twice", "Once", GREEDY)
    llm.llm_engine.abort_request("twice")
    llm.llm_engine.abort_request("unknown")
    assert not llm.llm_engine.has_unfinished_requests() and llm.llm_engine.get_num_unfinished_requests() == 0


def test_unknown_and_refused_options() -> None:
    for options, word in (
        ({"max_model_length": 5}, "max_model_len"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size"),
        ({"quantization": "awq"}, "awq"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"max_model_len": 10**6}, "max_model_len"),
        ({"device": "cuda"}, "cuda"),
    ):
        with pytest.raises(ConfigError, match=word):
            LLM("smollm2", **options)


def test_snapshots_grow(llm: LLM) -> None:
    engine = LLMEngine.from_engine_args(EngineArgs(model="smollm2", max_model_len=256, num_gpu_blocks_override=64))
    engine.add_request("a", "Once upon a time", SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True))
    seen: list[str] = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            assert output.outputs[0].text.startswith(seen[-1] if seen else "")
            seen.append(output.outputs[0].text)
            last = output
    assert last.finished and len(seen) >= 9 and len(last.outputs[0].token_ids) == 9
    engine.close()


def test_broken_models(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for model in (str(empty), str(tmp_path / "none"), "/no/such/file.gguf"):
        with pytest.raises(OctavoError):
            LLM(model)


def test_best_of_with_a_stop_string_ranks_what_was_cut(llm: LLM) -> None:
    params = SamplingParams(n=1, best_of=3, temperature=1.0, seed=3, max_tokens=24, stop=["e", "."])
    completion = llm.generate("Once upon a time", params, use_tqdm=False)[0].outputs[0]
    assert completion.finish_reason == "stop" and completion.cumulative_logprob is not None
    single = params.clone(n=3, best_of=3, logprobs=0)
    every = llm.generate("Once upon a time", single, use_tqdm=False)[0].outputs
    assert completion.cumulative_logprob == pytest.approx(max(c.cumulative_logprob or 0.0 for c in every), abs=1e-5)


def test_an_id_can_be_used_again_after_its_abort(llm: LLM) -> None:
    engine = llm.llm_engine
    engine.add_request("a", "Once", GREEDY)
    engine.step()
    engine.abort_request("a")
    engine.add_request("a", "Once upon", GREEDY)
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert outputs[-1].finished and outputs[-1].prompt == "Once upon" and len(outputs[-1].outputs[0].token_ids) == 6


def test_an_id_can_be_used_again_after_its_stop_string(llm: LLM) -> None:
    """The end of the first request has been said when its stop string was found; nothing of it reaches the second one."""
    engine, found = llm.llm_engine, []
    for stop in ((), (" city",), (" city",), ()):
        engine.add_request("a", "Once upon a time", GREEDY.clone(max_tokens=20, ignore_eos=True, stop=stop))
        outputs: list[RequestOutput] = []
        while engine.has_unfinished_requests():
            outputs += engine.step()
        assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
        found.append((outputs[-1].outputs[0].finish_reason, outputs[-1].outputs[0].text))
    assert found[0] == found[3] and found[0][0] == "length"
    assert found[1] == found[2] == ("stop", found[0][1].partition(" city")[0])


def test_requests_of_others_go_on_beside_generate(llm: LLM) -> None:
    engine = llm.llm_engine
    engine.add_request("short", "Once", GREEDY.clone(max_tokens=2), stream=False)
    engine.add_request("long", "Once", GREEDY.clone(max_tokens=40, ignore_eos=True), stream=False)
    assert len(ids(llm, ["Once", "upon"])) == 2
    done = {}
    while engine.has_unfinished_requests():
        done |= {o.request_id: o for o in engine.step() if o.finished}
    assert {name: len(o.outputs[0].token_ids) for name, o in done.items()} == {"short": 2, "long": 40}


def test_threads_take_turns(llm: LLM) -> None:
    wanted = ids(llm, "Once upon")
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: ids(llm, "Once upon"), range(8))) == [wanted] * 8


def test_ctrl_c_leaves_the_engine_usable(llm: LLM) -> None:
    wanted = ids(llm, "Once upon")
    for delay in (0.05, 0.08, 0.11, 0.2):
        timer = threading.Timer(delay, signal.raise_signal, [signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["Once"] * 8, SamplingParams(max_tokens=400, ignore_eos=True), use_tqdm=False)
        timer.join()
        assert not llm.llm_engine.has_unfinished_requests()
        llm.llm_engine.engine.check()
        assert ids(llm, "Once upon") == wanted


def interrupted(method: Any, at: int = 1) -> Any:
    """The method, with a Ctrl-C in the middle of its n-th call."""
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            signal.raise_signal(signal.SIGINT)
        return method(*args, **kwargs)

    return call


def test_ctrl_c_loses_no_output(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the interrupted step has found comes with the next one, and so do requests of others that ended beside a batch."""
    engine, one = llm.llm_engine, GREEDY.clone(max_tokens=1)
    for at in (1, 3):
        engine.add_request("mine", "Once", one, stream=False)
        with monkeypatch.context() as patch:
            patch.setattr(engine.engine, "step", interrupted(engine.engine.step, at))
            with pytest.raises(KeyboardInterrupt):
                llm.generate(["Once", "upon"], GREEDY.clone(max_tokens=400, ignore_eos=True), use_tqdm=False)
        found = []
        while engine.has_unfinished_requests():
            found += engine.step()
        assert [(o.request_id, o.finished) for o in found] == [("mine", True)], at


def test_ctrl_c_while_requests_are_added(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm.llm_engine
    for part, name in ((engine.engine, "add"), (engine.collector, "add")):
        with monkeypatch.context() as patch:
            patch.setattr(part, name, interrupted(getattr(part, name), 2))
            with pytest.raises(KeyboardInterrupt):
                llm.generate(["Once"] * 3, GREEDY, use_tqdm=False)
        assert not engine.has_unfinished_requests() and not engine.engine._state.requests
    with monkeypatch.context() as patch:
        patch.setattr(engine.intake, "prepare", interrupted(engine.intake.prepare, 2))
        with pytest.raises(KeyboardInterrupt):  # not lost in the refusal of the prompt
            llm.generate(["Once", "Once"], [GREEDY, GREEDY.clone(stop_token_ids=[10**9])], use_tqdm=False)
    assert not engine.has_unfinished_requests() and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_step_broken_off_ends_the_engine_loudly() -> None:
    llm = LLM("smollm2", max_model_len=64, num_gpu_blocks_override=16)
    schedule = llm.llm_engine.engine._scheduler.schedule

    def broken() -> Any:
        schedule()
        raise KeyboardInterrupt

    llm.llm_engine.engine._scheduler.schedule = broken  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        llm.generate("Once", GREEDY, use_tqdm=False)
    with pytest.raises(EngineDead, match="KeyboardInterrupt"):
        llm.generate("Once", GREEDY, use_tqdm=False)


def test_closed_means_closed() -> None:
    llm = LLM("smollm2", max_model_len=64, num_gpu_blocks_override=16)
    llm.close()
    with pytest.raises(EngineDead, match="closed"):
        llm.generate("Once", GREEDY, use_tqdm=False)


def test_the_refused_prompt_of_a_batch_is_named(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"prompt 1 of 3.*999999") as caught:
        llm.generate(["a", [999999], "b"], GREEDY, use_tqdm=False)
    assert caught.value.param == "prompt" and not llm.llm_engine.has_unfinished_requests()


@pytest.mark.parametrize(("call", "param"), [
    (lambda llm: llm.generate("a", {"n": 1}), "sampling_params"),
    (lambda llm: llm.generate("a", SamplingParams), "sampling_params"),
    (lambda llm: llm.generate({"prompt_token_ids": np.array(5)}), "prompt_token_ids"),
    (lambda llm: llm.generate({"prompt_token_ids": {1, 2}}), "prompt_token_ids"),
    (lambda llm: llm.chat({"role": "user", "content": "a"}), "messages"),
    (lambda llm: llm.chat(m for m in ()), "messages"),
    (lambda llm: llm.chat([{"role": "user", "content": "a"}], chat_template_kwargs={1: 2}), "chat_template_kwargs"),
    (lambda llm: llm.llm_engine.add_request([1], "a", GREEDY), "request_id"),
    (lambda llm: llm.llm_engine.add_request("x", "a", GREEDY, priority="a"), "priority"),
    (lambda llm: llm.llm_engine.add_request("x", "a", GREEDY, priority=float("nan")), "priority"),
    (lambda llm: llm.llm_engine.add_request("x", "a", GREEDY, arrival_time="x"), "arrival_time"),
    (lambda llm: llm.llm_engine.add_request("x", "a", GREEDY, cache_salt=5), "cache_salt"),
    (lambda llm: llm.llm_engine.abort_request(5), "request_id"),
])
def test_wrong_types_are_named(llm: LLM, call: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        call(llm)
    assert caught.value.param == param
    assert not llm.llm_engine.has_unfinished_requests()


def test_arrays_are_prompts(llm: LLM) -> None:
    wanted = ids(llm, [[504, 3575, 282]])
    assert ids(llm, torch.tensor([504, 3575, 282])) == wanted == ids(llm, np.array([[504, 3575, 282]]))


def test_statistics_are_logged_when_asked_for(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "LOG_SECONDS", 0.0)
    caplog.set_level("INFO", "octavo")
    llm = LLM("smollm2", max_model_len=64, num_gpu_blocks_override=16, disable_log_stats=False)
    llm.generate("Once", GREEDY, use_tqdm=False)
    llm.close()
    assert any("prefix" in r.getMessage().lower() and "running" in r.getMessage().lower() for r in caplog.records)


def test_an_engine_that_is_dropped_without_close_is_collected(tiny: Path) -> None:
    llm = LLM(str(tiny), load_format="dummy", skip_tokenizer_init=True, num_gpu_blocks_override=16, max_model_len=64)
    gone, llm.itself = weakref.ref(llm.llm_engine.group.runner), llm  # type: ignore[attr-defined]
    del llm
    gc.collect()
    assert gone() is None
