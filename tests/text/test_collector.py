"""octavo.text.collector: StepOutputs folded into RequestOutputs."""

import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import RequestError
from octavo.messages import SequenceEnd, StepOutput, TokenLogprobs
from octavo.outputs import CompletionOutput, FinishReason, Logprob, RequestOutput
from octavo.params import SamplingParams
from octavo.text.collector import Collector, Update, View
from octavo.text.deltas import Step
from octavo.text.vocabulary import Tokenizer

EOS = "</s>"


def entry(token: int, logprob: float, others: tuple[tuple[int, float], ...] = ()) -> TokenLogprobs:
    pairs = [(token, logprob), *others]
    return TokenLogprobs([t for t, _ in pairs], [p for _, p in pairs], [1, *range(1, len(pairs))])


def step(
    tokens: dict[tuple[str, int], int],
    ended: list[SequenceEnd] | None = None,
    finished: tuple[str, ...] = (),
    logprobs: dict[tuple[str, int], TokenLogprobs] | None = None,
) -> StepOutput:
    return StepOutput(
        streamed=list(tokens),
        tokens=np.array(list(tokens.values()), dtype=np.int32),
        ended=ended or [],
        finished=list(finished),
        logprobs=[] if logprobs is None else [logprobs.get(key) for key in tokens],
    )


def end(index: int, reason: FinishReason, request_id: str = "r", **values: Any) -> SequenceEnd:
    return SequenceEnd(request_id, index, reason, **values)


def letters(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token per character."""
    return [tokenizer.encode(char)[0] for char in text]


def added(
    tokenizer: Tokenizer | None, view: View = "final", prompt_ids: tuple[int, ...] = (1, 2), **params: Any
) -> Collector:
    collector = Collector()
    collector.add("r", "the prompt", prompt_ids, SamplingParams(**params), tokenizer, view)
    return collector


def only(update: Update) -> RequestOutput:
    assert len(update.outputs) == 1
    return update.outputs[0]


def test_a_request_that_does_not_stream(byte_level: Tokenizer) -> None:
    collector = added(byte_level)
    assert collector.update(StepOutput(started=[("r", 16)])).outputs == []
    ids = byte_level.encode("Paris 🎉")
    output = only(collector.update(StepOutput(ended=[end(0, "length", token_ids=ids)], finished=["r"])))
    assert output == RequestOutput("r", "the prompt", [1, 2], None, output.outputs, True, 16)
    completion = output.outputs[0]
    assert (completion.text, completion.token_ids, completion.finish_reason) == ("Paris 🎉", ids, "length")
    assert (completion.index, completion.stop_reason, completion.cumulative_logprob, completion.logprobs) == (
        0,
        None,
        None,
        None,
    )
    assert len(collector) == 0


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("stop_token", "skip", "include", "text"),
    [
        (None, True, False, "ab"),
        (None, False, False, "ab"),
        (None, False, True, "ab</s>"),
        (None, True, True, "ab"),
        ("c", True, False, "ab"),
        ("c", True, True, "abc"),
    ],
)
def test_the_token_that_ends_it(
    byte_level: Tokenizer, streams: bool, stop_token: str | None, skip: bool, include: bool, text: str
) -> None:
    last = byte_level.token_to_id(stop_token or EOS) or 0
    stop = last if stop_token else None
    ids = [*letters(byte_level, "ab"), last]
    collector = added(byte_level, skip_special_tokens=skip, include_stop_str_in_output=include)
    if streams:
        for token in ids[:-1]:
            collector.update(step({("r", 0): token}))
        output = only(collector.update(step({("r", 0): last}, [end(0, "stop", stop_token=stop)], ("r",))))
    else:
        output = only(
            collector.update(StepOutput(ended=[end(0, "stop", stop_token=stop, token_ids=ids)], finished=["r"]))
        )
    completion = output.outputs[0]
    assert (completion.text, completion.token_ids) == (text, ids)
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)


def test_a_token_that_looks_like_eos_is_text_when_it_did_not_end_it(byte_level: Tokenizer) -> None:
    ids = letters(byte_level, "ab")
    collector = added(byte_level)
    for token in ids[:-1]:
        collector.update(step({("r", 0): token}))
    output = only(collector.update(step({("r", 0): ids[-1]}, [end(0, "length")], ("r",))))
    assert output.outputs[0].text == "ab"


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_cuts_everything(byte_level: Tokenizer, streams: bool, include: bool) -> None:
    ids = letters(byte_level, "abSTOPxyz")
    logprobs = [entry(token, -float(i + 1)) for i, token in enumerate(ids)]
    collector = added(byte_level, stop="STOP", logprobs=0, include_stop_str_in_output=include)
    if streams:
        outputs, aborts = [], []
        for token, lp in zip(ids, logprobs, strict=True):
            update = collector.update(step({("r", 0): token}, logprobs={("r", 0): lp}))
            outputs += update.outputs
            aborts += update.aborts
            assert update.aborted_sequences == []
        assert aborts == ["r"] and len(outputs) == 1
        output = outputs[0]
    else:
        update = collector.update(
            StepOutput(
                ended=[end(0, "length", token_ids=ids, logprobs=logprobs, cumulative_logprob=-45.0)], finished=["r"]
            )
        )
        assert update.aborts == []
        output = only(update)
    completion = output.outputs[0]
    assert completion.text == ("abSTOP" if include else "ab")
    assert completion.token_ids == ids[:6]
    assert completion.logprobs is not None and len(completion.logprobs) == 6
    assert completion.cumulative_logprob == -21.0
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "STOP")
    assert output.finished and len(collector) == 0


def test_one_of_three_stops_while_the_others_run(byte_level: Tokenizer) -> None:
    collector = added(byte_level, n=3, stop=["!"], view="snapshots")
    bang, other = byte_level.encode("!")[0], byte_level.encode("a")[0]
    update = collector.update(step({("r", 0): other, ("r", 1): bang, ("r", 2): other}))
    assert (update.aborts, update.aborted_sequences) == ([], [("r", 1)])
    snapshot = only(update)
    assert not snapshot.finished and [c.finish_reason for c in snapshot.outputs] == [None, "stop", None]
    update = collector.update(step({("r", 0): other, ("r", 1): other, ("r", 2): bang}))  # the engine is one step late
    assert (update.aborts, update.aborted_sequences) == ([], [("r", 2)])
    assert only(update).outputs[1].token_ids == [bang] and only(update).outputs[0].text == "aa"
    update = collector.update(step({("r", 0): bang}))
    assert (update.aborts, update.aborted_sequences) == (["r"], [])
    final = only(update)
    assert final.finished and [c.text for c in final.outputs] == ["aa", "", "a"]
    late = collector.update(step({("r", 0): other}, [end(0, "abort")], ("r",)))
    assert late == Update()


def test_the_engine_ends_a_sequence_in_the_step_that_cuts_it(byte_level: Tokenizer) -> None:
    collector = added(byte_level, stop=["!"])
    bang = byte_level.encode("!")[0]
    update = collector.update(step({("r", 0): bang}, [end(0, "length")], ("r",)))
    assert update.aborts == [] and only(update).outputs[0].finish_reason == "stop"
    assert only(update).outputs[0].stop_reason == "!"


def test_held_back_text_comes_with_the_end(byte_level: Tokenizer) -> None:
    collector = added(byte_level, stop=["STOP"], view="snapshots")
    for token in letters(byte_level, "xST"):
        update = collector.update(step({("r", 0): token}))
        assert only(update).outputs[0].text == "x"
    assert only(collector.update(StepOutput(ended=[end(0, "length")], finished=["r"]))).outputs[0].text == "xST"


def test_streaming_and_whole_give_the_same(byte_level: Tokenizer, spaces: Tokenizer) -> None:
    pseudo = random.Random(7)
    for tokenizer in (byte_level, spaces):
        for _ in range(100):
            ids = [pseudo.randrange(tokenizer.vocab_size) for _ in range(pseudo.randrange(1, 12))]
            prompt = tuple(pseudo.randrange(tokenizer.vocab_size) for _ in range(3))
            logprobs = [entry(token, -pseudo.random(), ((5, -1.0),)) for token in ids]
            whole, streamed = (added(tokenizer, prompt_ids=prompt, logprobs=1) for _ in range(2))
            wanted = only(
                whole.update(
                    StepOutput(
                        ended=[
                            end(
                                0,
                                "length",
                                token_ids=ids,
                                logprobs=logprobs,
                                cumulative_logprob=math.fsum(lp.logprobs[0] for lp in logprobs),
                            )
                        ],
                        finished=["r"],
                    )
                )
            )
            for token, lp in zip(ids, logprobs, strict=True):
                streamed.update(step({("r", 0): token}, logprobs={("r", 0): lp}))
            found = only(streamed.update(StepOutput(ended=[end(0, "length")], finished=["r"])))
            assert found.outputs[0].cumulative_logprob == pytest.approx(wanted.outputs[0].cumulative_logprob)
            found.outputs[0].cumulative_logprob = wanted.outputs[0].cumulative_logprob
            assert found == wanted


def test_logprobs_have_texts(byte_level: Tokenizer) -> None:
    token, other, eos = byte_level.encode(" is")[0], byte_level.encode("a")[0], byte_level.token_to_id(EOS) or 0
    collector = added(byte_level, logprobs=2, prompt_logprobs=1)
    collector.update(StepOutput(prompt_logprobs=[("r", [entry(other, -2.0, ((token, -0.5),))])]))
    output = only(
        collector.update(
            StepOutput(
                finished=["r"],
                ended=[
                    end(
                        0,
                        "length",
                        token_ids=[token],
                        logprobs=[TokenLogprobs([token, eos, token], [-0.7, -0.6, -0.7], [2, 1, 2])],
                        cumulative_logprob=-0.7,
                    )
                ],
            )
        )
    )
    text = byte_level.token_text(token)
    assert output.outputs[0].logprobs == [{token: Logprob(-0.7, 2, text), eos: Logprob(-0.6, 1, EOS)}]
    assert text.startswith(" ")
    assert output.prompt_logprobs == [None, {other: Logprob(-2.0, 1, "a"), token: Logprob(-0.5, 1, text)}]
    assert output.outputs[0].cumulative_logprob == -0.7


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_without_text(byte_level: Tokenizer, with_tokenizer: bool) -> None:
    collector = added(byte_level if with_tokenizer else None, detokenize=not with_tokenizer, logprobs=0)
    output = only(
        collector.update(
            StepOutput(
                finished=["r"],
                ended=[end(0, "length", token_ids=[5], logprobs=[entry(5, -1.0)], cumulative_logprob=-1.0)],
            )
        )
    )
    assert output.outputs[0].text == "" and output.outputs[0].logprobs == [{5: Logprob(-1.0, 1, None)}]


def test_best_of_returns_the_best_in_order(byte_level: Tokenizer) -> None:
    collector = added(byte_level, n=2, best_of=4)
    scores = [-3.0, -1.0, -2.0, -9.0]
    ends = [
        end(i, "length", token_ids=letters(byte_level, "abcd"[i]), cumulative_logprob=s) for i, s in enumerate(scores)
    ]
    assert collector.update(StepOutput(ended=ends[:3])).outputs == []  # never before all are known
    output = only(collector.update(StepOutput(ended=ends[3:], finished=["r"])))
    assert [(c.index, c.text, c.cumulative_logprob) for c in output.outputs] == [(0, "b", -1.0), (1, "c", -2.0)]


def test_best_of_never_shows_snapshots(byte_level: Tokenizer) -> None:
    collector = added(byte_level, n=1, best_of=2, view="snapshots")
    assert collector.update(step({("r", 0): 5, ("r", 1): 6})).outputs == []


def test_best_of_with_a_stop_string_ranks_what_is_left(byte_level: Tokenizer) -> None:
    collector = added(byte_level, n=1, best_of=2, stop="!")
    a, bang = letters(byte_level, "a!")
    keys = [("r", 0), ("r", 1)]
    collector.update(step(dict.fromkeys(keys, a), logprobs={keys[0]: entry(a, -1.0), keys[1]: entry(a, -3.0)}))
    update = collector.update(
        step({keys[0]: a, keys[1]: bang}, logprobs={keys[0]: entry(a, -5.0), keys[1]: entry(bang, -1.0)})
    )
    assert update.aborted_sequences == [("r", 1)]
    update = collector.update(step({keys[0]: bang}, logprobs={keys[0]: entry(bang, -1.0)}))
    completion = only(update).outputs[0]
    assert (completion.cumulative_logprob, completion.token_ids, completion.logprobs) == (-4.0, [a, bang], None)


def test_best_of_with_a_stop_string_needs_logprobs(byte_level: Tokenizer) -> None:
    collector = added(byte_level, n=1, best_of=2, stop="!")
    bang = byte_level.encode("!")[0]
    update = collector.update(step({("r", 0): bang}))
    output = only(update)
    assert update.aborts == ["r"] and output.outputs[0].finish_reason == "error"
    assert output.error is not None and "best_of" in output.error


def test_beams_come_in_the_engines_order(byte_level: Tokenizer) -> None:
    collector = added(byte_level, n=2, best_of=3, use_beam_search=True, temperature=0.0)
    ends = [end(i, "length", token_ids=letters(byte_level, "ab"[i]), cumulative_logprob=-5.0 + i) for i in (0, 1)]
    output = only(collector.update(StepOutput(ended=ends, finished=["r"])))
    assert [(c.index, c.text, c.cumulative_logprob) for c in output.outputs] == [(0, "a", -5.0), (1, "b", -4.0)]


def test_an_error_of_the_engine(byte_level: Tokenizer) -> None:
    collector = added(byte_level)
    output = only(collector.update(StepOutput(ended=[end(0, "error", error="NaN in the logits")], finished=["r"])))
    assert (output.error, output.outputs[0].finish_reason) == ("NaN in the logits", "error")


class Broken(Tokenizer):
    """Fails for one id, as a bug in a tokenizer would."""

    def stream(self, *args: Any) -> Any:
        raise RuntimeError("this tokenizer is broken")

    decode_generated = stream


def test_a_failure_stays_within_its_request(byte_level: Tokenizer) -> None:
    collector = Collector()
    broken = Broken(byte_level.backend)
    for name, tokenizer in (("good", byte_level), ("bad", broken), ("whole", broken)):
        collector.add(name, None, [1], SamplingParams(), tokenizer, view="snapshots")
    a = byte_level.encode("a")[0]
    update = collector.update(
        step({("bad", 0): a, ("good", 0): a}, [end(0, "length", "whole", token_ids=[a])], ("whole",))
    )
    by_id = {output.request_id: output for output in update.outputs}
    assert by_id["good"].outputs[0].text == "a" and not by_id["good"].finished
    for name in ("bad", "whole"):
        assert by_id[name].finished and by_id[name].outputs[0].finish_reason == "error"
        assert "this tokenizer is broken" in (by_id[name].error or "")
    assert update.aborts == ["bad"] and len(collector) == 1


def test_a_request_finished_without_a_result_ends_with_an_error(byte_level: Tokenizer) -> None:
    collector = added(byte_level, n=2)
    output = only(collector.update(StepOutput(ended=[end(0, "length", token_ids=[5])], finished=["r"])))
    assert [c.finish_reason for c in output.outputs] == ["length", "error"] and output.error


def test_abort_gives_what_there_is(byte_level: Tokenizer) -> None:
    collector = added(byte_level, n=2, stop=["ab"])
    (a,) = letters(byte_level, "a")
    collector.update(step({("r", 0): a}))
    output = collector.abort("r")
    assert output is not None and output.finished
    assert [(c.text, c.finish_reason) for c in output.outputs] == [("a", "abort"), ("", "abort")]
    assert collector.abort("r") is None and "r" not in collector
    assert collector.update(step({("r", 0): a}, [end(0, "abort")], ("r",))) == Update()


def test_an_id_in_use_is_refused(byte_level: Tokenizer) -> None:
    collector = added(byte_level)
    with pytest.raises(RequestError, match="'r'"):
        collector.add("r", None, [1], SamplingParams(), byte_level)


def test_several_tokens_of_a_sequence_in_one_step(byte_level: Tokenizer) -> None:
    a, b, eos = *letters(byte_level, "ab"), byte_level.token_to_id(EOS) or 0
    collector = added(byte_level)
    output = only(
        collector.update(
            StepOutput(
                streamed=[("r", 0)] * 3,
                tokens=np.array([a, b, eos], dtype=np.int32),
                ended=[end(0, "stop")],
                finished=["r"],
            )
        )
    )
    assert (output.outputs[0].text, output.outputs[0].token_ids) == ("ab", [a, b, eos])


def test_outputs_never_change_once_given(byte_level: Tokenizer) -> None:
    collector = added(byte_level, view="snapshots", logprobs=0)
    a = byte_level.encode("a")[0]
    first = only(collector.update(step({("r", 0): a}, logprobs={("r", 0): entry(a, -1.0)})))
    collector.update(step({("r", 0): a}, logprobs={("r", 0): entry(a, -1.0)}))
    assert first.outputs[0].text == "a" and first.outputs[0].token_ids == [a]
    assert first.outputs[0].logprobs is not None and len(first.outputs[0].logprobs) == 1


def test_every_request_leaves_one_final_output(byte_level: Tokenizer) -> None:
    """Random traffic: streams, stop strings, ends, aborts; late words of the engine are passed over."""
    pseudo, collector = random.Random(3), Collector()
    living: dict[str, dict[int, bool]] = {}
    finals: dict[str, int] = {}
    sizes = {}
    for number in range(600):
        if number < 200:
            name = str(number)
            params = SamplingParams(n=pseudo.randint(1, 3), stop=pseudo.choice([(), ("a",), ("ab", "c")]))
            collector.add(name, None, [1], params, byte_level, view="snapshots" if pseudo.random() < 0.5 else "final")
            living[name] = dict.fromkeys(range(params.n), True)
            sizes[name] = params.n
        tokens, ends, finished = {}, [], []
        for name, indices in list(living.items()):
            for index in [i for i, alive in indices.items() if alive]:
                tokens[name, index] = pseudo.randrange(byte_level.vocab_size)
                if pseudo.random() < 0.1:
                    ends.append(end(index, pseudo.choice(["stop", "length"]), name))
                    indices[index] = False
            if not any(indices.values()):
                finished.append(name)
                del living[name]
        update = collector.update(step(tokens, ends, tuple(finished)))
        for output in update.outputs:
            if output.finished:
                finals[output.request_id] = finals.get(output.request_id, 0) + 1
                assert len(output.outputs) == sizes[output.request_id]
                assert all(c.finish_reason in ("stop", "length") for c in output.outputs)
        for name in update.aborts:
            living.pop(name, None)
        for name, index in update.aborted_sequences:
            if name in living:
                living[name][index] = False
    assert finals == dict.fromkeys(map(str, range(200)), 1) and len(collector) == 0


def folded(steps: list[Step], n: int, request: RequestOutput) -> RequestOutput:
    """What a reader of the Steps knows at the end."""
    outputs = [CompletionOutput(index, "", []) for index in range(n)]
    told = RequestOutput("r", request.prompt, request.prompt_token_ids, outputs=outputs)
    for number, one in enumerate(steps):
        assert len({delta.index for delta in one.deltas}) == len(one.deltas) and not told.finished
        for delta in one.deltas:
            output = outputs[delta.index]
            assert output.finish_reason is None, "a Delta after the last one"
            output.text += delta.text
            output.token_ids += delta.token_ids
            if delta.logprobs is not None:
                assert len(delta.logprobs) == len(delta.token_ids)
                output.logprobs = (output.logprobs or []) + delta.logprobs
            output.finish_reason, output.stop_reason = delta.finish_reason, delta.stop_reason
        assert (one.num_cached_tokens is not None) == (number == 0)
        told.num_cached_tokens += one.num_cached_tokens or 0
        if one.prompt_logprobs is not None:
            assert told.prompt_logprobs is None
            told.prompt_logprobs = one.prompt_logprobs
        told.finished, told.error = one.finished, one.error or told.error
    return told


@settings(deadline=None)
@given(data=st.data())
def test_the_fold_of_the_steps_is_the_final_output(data: st.DataObject, byte_level: Tokenizer) -> None:
    """Whatever the steps, the stop strings, the number of continuations, and how each of them ends."""
    n, logprobs = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([None, 0, 1]))
    params = {
        "n": n, "stop": data.draw(st.sampled_from([(), ("ab",), ("b", "ca"), ("é🎉",)])), "logprobs": logprobs,
        "include_stop_str_in_output": data.draw(st.booleans()), "prompt_logprobs": data.draw(st.sampled_from([None, 1])),
        "max_tokens": 12, "stop_token_ids": [7], "skip_special_tokens": data.draw(st.booleans())}
    pieces = [byte_level.encode(char)[0] for char in "abc "] + byte_level.encode("é🎉") + [byte_level.encode(EOS)[0], 7]
    collectors = {view: added(byte_level, view, **params) for view in ("deltas", "final")}
    scripts = [data.draw(st.lists(st.sampled_from(pieces), min_size=1, max_size=10)) for _ in range(n)]
    ends = [data.draw(st.sampled_from(["stop", "length", "error"])) for _ in range(n)]
    steps: list[Step] = []
    final: list[RequestOutput] = []
    gone: set[int] = set()
    first = True
    while not final:
        out = StepOutput(started=[("r", 16)] if first else [])
        if first and params["prompt_logprobs"] is not None:
            out.prompt_logprobs = [("r", [entry(2, -1.0, ((5, -0.5),))])]
        first, tokens = False, []
        for index, script in enumerate(scripts):
            if index in gone or data.draw(st.booleans()):
                continue  # cut, over, or not in this step
            take = data.draw(st.integers(1, 3))
            now, scripts[index] = script[:take], script[take:]
            for token in now:
                out.streamed.append(("r", index))
                tokens.append(token)
                out.logprobs.append(None if logprobs is None else entry(token, -0.25))
            if not scripts[index]:
                gone.add(index)
                stop_token = 7 if ends[index] == "stop" and now[-1] == 7 else None
                error = "broken" if ends[index] == "error" else None
                out.ended.append(end(index, ends[index], stop_token=stop_token, error=error))
        out.tokens = np.array(tokens, np.int32)
        out.finished = ["r"] if len(gone) == n else []
        updates = {view: collector.update(out) for view, collector in collectors.items()}
        assert updates["deltas"].outputs == [] and updates["final"].steps == []
        assert updates["deltas"].aborts == updates["final"].aborts
        steps += [one for _, one in updates["deltas"].steps]
        final += updates["final"].outputs
        gone |= {index for _, index in updates["deltas"].aborted_sequences}
    told = folded(steps, n, final[0])
    for output in final[0].outputs:
        output.cumulative_logprob = None  # no part of a Step
        output.logprobs = output.logprobs or None
    assert told == final[0]
    assert not any(map(len, collectors.values()))
