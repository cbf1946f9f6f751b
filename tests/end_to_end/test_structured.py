"""Structured outputs through the whole engine: whatever a random model wants to say, it says it as it was asked to.

A tiny checkpoint with random weights, a byte-level tokenizer and an embedding that is larger than the vocabulary; everything
that changes the way of a request (neighbours, preemption, planning ahead, a pretended GPU) must leave its tokens alone.
"""

import json
import random
import re
import threading
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import save_tiny
from pretend import PretendGpu, use_references
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from octavo import LLM, EngineArgs, LLMEngine, RequestOutput, SamplingParams, StructuredOutputsParams
from octavo.engine.grammars import Grammars
from octavo.errors import RequestError
from octavo.messages import EngineRequest, Grammar
from octavo.text.matcher import Matcher, compile_grammar
from octavo.worker.cuda_runner import CudaRunner
from octavo.worker.group import GpuGroup

OPTIONS: dict[str, Any] = {"dtype": "float32", "seed": 7, "max_model_len": 384, "max_num_seqs": 24, "batch_invariant": True}
ENDS = (2, 3)
PERSON = {
    "type": "object", "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "maximum": 99,
                                                                                        "minimum": 0}},
    "required": ["name", "age"], "additionalProperties": False}
LIST = {"type": "array", "items": {"enum": ["ab", "é", 3]}, "maxItems": 4}
NEVER_DONE = "((((a{1,30}){1,30}){1,30}){1,30}){1,30}"  # its automaton is so large that the matcher gives up on the way


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("structured"), vocab=389)
    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = ['{"name": "abc", "age": 12}', '[{"x": true}, null]', "the quick brown fox and the lazy dog"] * 5
    backend.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=[AddedToken(name, special=True) for name in ("<pad>", "<s>", "</s>", "<|end|>")]))
    assert backend.token_to_id("<|end|>") == ENDS[1] and backend.get_vocab_size() < 389
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(ENDS)}))
    return folder


def make(model: Path, **options: Any) -> LLM:
    return LLM(str(model), **{**OPTIONS, "debug_checksums": True, **options})


@pytest.fixture(scope="module")
def llm(model: Path) -> Any:
    made = make(model)
    yield made
    made.close()


def structured(**constraint: Any) -> SamplingParams:
    more = {name: constraint.pop(name) for name in list(constraint) if name in SamplingParams.__dataclass_fields__}
    return SamplingParams(**{"max_tokens": 150, "structured_outputs": StructuredOutputsParams(**constraint), **more})


def run(llm: LLM, asked: list[tuple[list[int], SamplingParams]]) -> list[RequestOutput]:
    found = llm.generate([{"prompt_token_ids": p} for p, _ in asked], [s for _, s in asked], use_tqdm=False)
    llm.llm_engine.engine.check()
    return found


def answers(llm: LLM, asked: list[tuple[list[int], SamplingParams]]) -> list[Any]:
    return [[(c.token_ids, c.text, c.finish_reason) for c in output.outputs] for output in run(llm, asked)]


def requests(seed: int, count: int) -> list[tuple[list[int], SamplingParams]]:
    """Half of them constrained, with everything else that a row can ask for."""
    rng, found = random.Random(seed), []
    shared = [rng.randrange(4, 330) for _ in range(50)]
    kinds: list[Any] = [
        {"json": PERSON, "disable_any_whitespace": True}, None, {"regex": r"[a-c]{2,9}(xy)?"}, None, {"choice": ["red", "green"]},
        {"json": LIST}, None, {"grammar": 'root ::= "a" [0-9]{3} | "bcd"'}]
    for i in range(count):
        kind = kinds[i % len(kinds)]
        prompt = (shared[: rng.randint(1, 50)] if i % 3 == 0 else []) + [rng.randrange(4, 330) for _ in range(rng.randint(1, 30))]
        extras: dict[str, Any] = [
            {}, {"n": 3}, {"logprobs": 2}, {"temperature": 0.0}, {"top_p": 0.9, "repetition_penalty": 1.2}, {"min_tokens": 4},
            {"bad_words": ["a"]}, {"logit_bias": {60: 3.0}}, {"ignore_eos": True}][i % 9]
        params = StructuredOutputsParams(**kind) if kind else None
        found.append((prompt, SamplingParams(max_tokens=rng.randint(15, 60), seed=100 + i, structured_outputs=params, **extras)))
    return found


@pytest.fixture(scope="module")
def asked() -> list[tuple[list[int], SamplingParams]]:
    return requests(1, 36)


@pytest.fixture(scope="module")
def expected(llm: LLM, asked: Any) -> list[Any]:
    return answers(llm, asked)


def test_a_random_model_writes_what_was_asked_for(llm: LLM) -> None:
    schemas = [(PERSON, True), (LIST, False)]
    asked = [([5 + i], structured(json=schema, disable_any_whitespace=tight, n=3, seed=i, max_tokens=300))
             for i in range(6) for schema, tight in schemas]
    ended = 0
    for (_, params), output in zip(asked, run(llm, asked), strict=True):
        constraint = params.structured_outputs
        assert constraint is not None
        for completion in output.outputs:
            assert completion.finish_reason in ("stop", "length") and completion.stop_reason is None
            if completion.finish_reason == "stop":
                ended += 1
                jsonschema.validate(json.loads(completion.text), constraint.json)
                assert completion.token_ids[-1] in ENDS and not set(completion.token_ids[:-1]) & {0, 1, *ENDS}
    assert ended > 25


def test_every_kind(llm: LLM) -> None:
    asked = [([9], structured(seed=i, **kind)) for i in range(4) for kind in (
        {"regex": r"\d{3}-[xyz]"}, {"choice": ["red", "a b"]}, {"grammar": 'start: "<" /[ab]+/ ">"'}, {"json_object": True})]
    texts = [output.outputs[0].text for output in run(llm, asked) if output.outputs[0].finish_reason == "stop"]
    patterns = (r"[0-9]{3}-[xyz]", "red|a b", "<[ab]+>", r"\{.*\}")
    assert len(texts) >= 10 and all(any(re.fullmatch(p, text, re.DOTALL) for p in patterns) for text in texts)


def test_both_end_tokens_end_a_grammar(llm: LLM) -> None:
    ends = {o.outputs[0].token_ids[-1] for o in run(llm, [([i], structured(choice=["a"], seed=i)) for i in range(4, 40)])}
    assert ends == set(ENDS)


@pytest.mark.parametrize(
    "options",
    [{"async_scheduling": True}, {"max_num_batched_tokens": 32}, {"enable_prefix_caching": False},
     {"max_model_len": 192, "num_gpu_blocks_override": 12, "preemption_mode": "recompute", "swap_space": 0.01},
     {"max_model_len": 192, "num_gpu_blocks_override": 12, "preemption_mode": "swap", "swap_space": 0.01}],
    ids=lambda options: ",".join(options),
)
def test_tokens_do_not_depend_on_the_way(model: Path, asked: Any, expected: list[Any], options: dict[str, Any]) -> None:
    llm = make(model, **options)
    assert answers(llm, asked) == expected
    stats = llm.llm_engine.engine.stats
    if "preemption_mode" in options:
        assert getattr(stats, "preempted_" + options["preemption_mode"]) > 3
    llm.close()


def test_alone_as_with_others_and_others_as_without(llm: LLM, asked: Any, expected: list[Any]) -> None:
    for i in (0, 2, 5, 7):
        assert answers(llm, [asked[i]]) == [expected[i]]
    free = [(i, one) for i, one in enumerate(asked) if one[1].structured_outputs is None]
    assert answers(llm, [one for _, one in free]) == [expected[i] for i, _ in free]


@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}, {"async_scheduling": False},
                                     {"max_model_len": 192, "num_gpu_blocks_override": 12, "preemption_mode": "recompute"}],
                         ids=lambda options: ",".join(options) or "default")
def test_a_pretended_gpu(model: Path, asked: Any, expected: list[Any], options: dict[str, Any],
                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.llm.check_supported", lambda config: None)
    monkeypatch.setattr("octavo.llm.make_group", lambda config, source: GpuGroup(
        config, source, runner=CudaRunner(config, source, gpu=PretendGpu())))
    use_references(monkeypatch)
    llm = make(model, **{"batch_invariant": False, **options})
    assert answers(llm, asked) == expected
    llm.close()


def test_a_grammar_wins_over_wishes_that_leave_it_nothing(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    a, b = (tokenizer.token_to_id(letter) for letter in "ab")
    for more in ({"min_tokens": 20}, {"ignore_eos": True}, {"bad_words": ["a", "b"]}, {"allowed_token_ids": [50]}):
        output = run(llm, [([7], structured(regex="aaab", max_tokens=30, **more))])[0].outputs[0]
        assert (output.text, output.finish_reason) == ("aaab", "stop"), more
    stopped = run(llm, [([7], structured(regex="aaab", stop_token_ids=[a], min_tokens=20))])[0].outputs[0]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", a) and b is not None
    longer = run(llm, [([7], structured(regex="[ab]{1,200}", max_tokens=30, ignore_eos=True, seed=i)) for i in range(3)])
    assert all(o.outputs[0].finish_reason == "length" and not set(ENDS) & set(o.outputs[0].token_ids) for o in longer)
    least = run(llm, [([7], structured(regex="[ab]{1,200}", min_tokens=6, seed=i)) for i in range(8)])
    assert all(len(o.outputs[0].token_ids) > 6 for o in least)
    only = run(llm, [([7], structured(regex="[ab]{6}", bad_words=["a"], seed=i)) for i in range(3)])
    assert all(a not in o.outputs[0].token_ids and o.outputs[0].finish_reason == "stop" for o in only)


def test_stop_strings_logprobs_processors_and_best_of(llm: LLM) -> None:
    output = run(llm, [([8], structured(choice=["red fox"], stop=["d"]))])[0].outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("re", "stop", "d")
    output = run(llm, [([8], structured(choice=["red"], logprobs=2, temperature=0.0))])[0].outputs[0]
    assert output.logprobs is not None and all(len(step) >= 2 for step in output.logprobs)  # the model's own, not the mask's
    outputs = run(llm, [([8], structured(regex="[ab]{4}", n=2, best_of=5, seed=3))])[0].outputs
    assert len(outputs) == 2 and all(re.fullmatch("[ab]{4}", o.text) for o in outputs)
    with_a = [token for token, piece in enumerate(llm.get_tokenizer().pieces()) if b"a" in piece]

    def never_a(ids: list[int], logits: Any) -> Any:
        logits[with_a] = -float("inf")
        return logits

    assert run(llm, [([8], structured(regex="[ab]{4}", logits_processors=[never_a]))])[0].outputs[0].text == "bbbb"


@pytest.mark.parametrize("ahead", [False, True])
def test_a_matcher_that_fails_ends_its_own_request(model: Path, ahead: bool) -> None:
    llm = make(model, async_scheduling=ahead)
    good = [([5, 6], structured(json=PERSON, seed=1)), ([7], SamplingParams(max_tokens=20, seed=2))]
    alone = answers(llm, good)
    bad = ([9], structured(regex=NEVER_DONE, max_tokens=60, logit_bias={2: -100.0, 3: -100.0}))
    *others, failed = run(llm, [*good, bad])
    assert [[(c.token_ids, c.text, c.finish_reason) for c in o.outputs] for o in others] == alone
    assert failed.outputs[0].finish_reason == "error"
    assert answers(llm, good) == alone
    llm.close()


def test_refusals(llm: LLM, tiny: Path) -> None:
    for kind in ({"regex": "("}, {"json": {"not": {}}}, {"choice": []}, {"grammar": " "}):
        with pytest.raises(RequestError) as caught:
            run(llm, [([1], structured(**kind))])
        assert caught.value.param == "structured_outputs"
    bare = LLM(str(tiny), skip_tokenizer_init=True, **OPTIONS)
    with pytest.raises(RequestError, match="skip_tokenizer_init"):
        run(bare, [([1], structured(regex="a"))])
    with pytest.raises(RequestError, match="tokenizer"):
        bare.llm_engine.engine.add(EngineRequest(request_id="x", prompt_token_ids=[1], params=SamplingParams(),
                                                 eos_token_ids=ENDS, grammar=Grammar("regex", "start: /a/")))
    assert not bare.llm_engine.engine.has_work()
    bare.close()


class Slow(Grammars):
    """Compiles when it is told to."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gate = threading.Event()

    def _compile(self, request: Any) -> Matcher:
        self.gate.wait(20)
        return super()._compile(request)


@pytest.fixture
def slow(model: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("octavo.llm.Grammars", Slow)
    engine = LLMEngine(EngineArgs(model=str(model), **OPTIONS))
    yield engine
    engine.engine._grammars.gate.set()
    engine.close()


def drain(engine: LLMEngine) -> dict[str, RequestOutput]:
    done = {}
    while engine.has_unfinished_requests():
        done |= {output.request_id: output for output in engine.step() if output.finished}
    return done


def test_others_run_while_a_grammar_is_compiled(slow: LLMEngine) -> None:
    slow.add_request("g", [5], structured(choice=["ab"]))
    slow.add_request("free", [5], SamplingParams(max_tokens=5))
    with pytest.raises(RequestError, match="in use"):
        slow.engine.add(EngineRequest(request_id="g", prompt_token_ids=[1], params=SamplingParams()))
    while len(slow.collector) > 1:
        slow.step()
    assert slow.engine.stats.waiting == 1 and slow.engine.has_work() and slow.step() == []
    slow.engine._grammars.gate.set()
    assert drain(slow)["g"].outputs[0].text == "ab"


def test_an_abort_while_a_grammar_is_compiled(slow: LLMEngine) -> None:
    for name in ("a", "b", "c"):
        slow.add_request(name, [5], structured(choice=["ab"], n=2))
    slow.abort_request("a")
    slow.engine.abort("b")
    slow.engine.abort("c", 1)
    slow.engine.check()
    out = [end for _ in range(3) for end in slow.step() if end.finished]
    assert [o.request_id for o in out] == ["b"] and {c.finish_reason for c in out[0].outputs} == {"abort"}
    slow.engine._grammars.gate.set()
    assert [(c.finish_reason, c.text) for c in drain(slow)["c"].outputs] == [("stop", "ab"), ("abort", "")]


def test_a_grammar_that_only_the_engine_refuses(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm.llm_engine.engine

    def ended(text: str) -> Any:
        engine.add(EngineRequest(request_id="x", prompt_token_ids=[1], params=SamplingParams(n=2), eos_token_ids=ENDS,
                                 grammar=Grammar("regex", text)))
        ends = []
        while engine.has_work():
            ends += engine.step().ended
        engine.check()
        return ends

    for text in ("start: /(/", "nonsense"):
        assert [(end.reason, "structured_outputs" in (end.error or "")) for end in ended(text)] == [("error", True)] * 2

    def boom(*args: Any) -> Matcher:
        raise KeyboardInterrupt  # as little an Exception as a panic of the library

    monkeypatch.setattr("octavo.engine.grammars.compile_grammar", boom)
    assert [end.reason for end in ended("start: /a/")] == ["error"] * 2
    monkeypatch.setattr("octavo.engine.grammars.compile_grammar", compile_grammar)
    assert [end.reason for end in ended("start: /a/")] == ["stop"] * 2
