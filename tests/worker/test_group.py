"""A local group gives the same results at once or from its thread, in order, and passes exceptions on; a GPU's hands them on."""

import threading
from pathlib import Path

import pytest
import torch

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.models.source import ModelSource
from octavo.plan import StepPlan, StepResult
from octavo.worker import group as module
from octavo.worker.group import GpuGroup, LocalGroup, check_supported, for_serving, make_group
from octavo.worker.runner import ModelRunner

CONFIG = EngineConfig(model="tiny", max_num_seqs=4, num_gpu_blocks_override=32, swap_space=0, block_size=8)
SOURCE = ModelSource("folder", Path("."), {})


class Recorder:
    """A runner that writes down what it is asked for, waits for a gate, and fails where the epoch is odd."""

    def __init__(self):
        self.info, self.seen, self.gate = None, [], threading.Event()

    def run(self, plan):
        self.gate.wait(10)
        self.seen.append(plan.step)
        if plan.epoch % 2:
            raise RuntimeError(f"step {plan.step} failed")
        return StepResult(epoch=plan.epoch, step=plan.step)

    def set_processors(self, row, generation, fns, constraint):
        self.seen.append((row, generation, fns, constraint))


def test_a_synchronous_group_has_finished_when_submit_returns():
    runner = Recorder()
    runner.gate.set()
    group = LocalGroup(CONFIG, SOURCE, runner=runner)
    assert not group.asynchronous
    pending = group.submit(StepPlan(epoch=0, step=3))
    assert runner.seen == [3] and pending.done() and pending.result().step == 3


def test_an_asynchronous_group_returns_before_the_step_has_run_and_keeps_the_order():
    runner = Recorder()
    group = LocalGroup(CONFIG, SOURCE, asynchronous=True, runner=runner)
    assert group.asynchronous
    pending = [group.submit(StepPlan(epoch=0, step=i)) for i in range(5)]
    assert runner.seen == [] and not any(p.done() for p in pending)
    threading.Timer(0.05, runner.gate.set).start()
    group.set_processors(1, 2, ["f"], "c")
    assert [p.result().step for p in pending] == [0, 1, 2, 3, 4]
    assert runner.seen == [0, 1, 2, 3, 4, (1, 2, ["f"], "c")]
    group.close()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_exception_comes_out_of_result_and_the_group_goes_on(asynchronous):
    runner = Recorder()
    runner.gate.set()
    group = LocalGroup(CONFIG, SOURCE, asynchronous=asynchronous, runner=runner)
    failed, fine = group.submit(StepPlan(epoch=1, step=0)), group.submit(StepPlan(epoch=0, step=1))
    with pytest.raises(RuntimeError, match="step 0 failed"):
        failed.result()
    assert failed.done() and fine.result().step == 1
    group.close()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_closed_group_refuses_plans(asynchronous):
    runner = Recorder()
    runner.gate.set()
    group = LocalGroup(CONFIG, SOURCE, asynchronous=asynchronous, runner=runner)
    last = group.submit(StepPlan(epoch=0, step=0))
    group.close()
    group.close()
    assert last.result().step == 0
    with pytest.raises(RuntimeError, match="closed"):
        group.submit(StepPlan(epoch=0, step=1))
    with pytest.raises(RuntimeError, match="closed"):
        group.set_processors(0, 1, [])


def test_overlapped_steps_on_the_real_runner_say_what_synchronous_ones_say(tiny):
    """Three decode steps are in the queue before the first token has been seen: the token stays in its row."""
    prompt = [5, 9, 2, 40, 33, 7, 7, 1]
    found = []
    for asynchronous in (False, True):
        runner = ModelRunner(CONFIG, SOURCE, decoder=tiny.decoder(tiny.spec()))
        group = LocalGroup(CONFIG, SOURCE, asynchronous=asynchronous, runner=runner)
        host = tiny.Host(None)
        plans = [host.plan({0: 8}, new=[host.new(0, prompt, range(4))])]
        for _ in range(5):
            host.take(plans[-1], StepResult(epoch=0, step=0, tokens=tiny.ints([0])))  # lengths only
            plans.append(host.plan({0: 1}))
        pending = [group.submit(plan) for plan in plans]
        found.append([int(p.result().tokens[0]) for p in pending])
        group.close()
    assert found[0] == found[1] and len(set(found[0])) > 1


def test_the_group_loads_a_model(tiny, tmp_path):
    architecture = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 50,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "float16",
    }  # fmt: skip
    group = LocalGroup(CONFIG.replace(load_format="dummy"), ModelSource("folder", tmp_path, architecture))
    assert group.runner.kv.dtype == group.runner.memory.dtype == torch.bfloat16
    assert group.info.max_model_len == 50 and group.info.num_host_blocks == 0
    host = tiny.Host(group.runner)
    host.step({0: 3, 1: 5}, new=[host.new(0, [1, 2, 3], [0]), host.new(1, [4, 5, 6, 7, 8], [1], temperature=0.7)])
    result = host.step({1: 1, 0: 1})
    assert ((result.tokens >= 0) & (result.tokens < 64)).all()


def test_an_unknown_model_is_refused_at_start(tmp_path):
    config = {"architectures": ["Nonsense"]}
    with pytest.raises(ValueError, match="Nonsense"):
        LocalGroup(CONFIG, ModelSource("folder", tmp_path, config))


class Gpu:
    """A runner that launches what it is given, and says what was asked of it."""

    def __init__(self):
        self.info, self.asked = "info", []

    def submit(self, plan):
        self.asked.append(plan.step)
        if plan.epoch % 2:
            raise RuntimeError(f"step {plan.step} contradicts the tables")
        return f"step {plan.step}, under way"

    def set_processors(self, row, generation, fns, constraint):
        self.asked.append((row, generation, fns, constraint))

    def close(self):
        self.asked.append("close")


def test_the_group_of_a_gpu_launches_in_the_calling_thread():
    runner = Gpu()
    group = GpuGroup(CONFIG, SOURCE, runner=runner)
    assert group.asynchronous and group.info == "info" and group.runner is runner
    group.set_processors(1, 2, ["f"], "c")
    assert group.submit(StepPlan(epoch=0, step=0)) == "step 0, under way"
    with pytest.raises(RuntimeError, match="step 1 contradicts"):  # nothing was launched: there is nothing to wait for
        group.submit(StepPlan(epoch=1, step=1))
    assert group.submit(StepPlan(epoch=0, step=2)) == "step 2, under way"
    assert runner.asked == [(1, 2, ["f"], "c"), 0, 1, 2]


def test_a_closed_group_of_a_gpu_refuses_plans_and_closes_its_runner_once():
    runner = Gpu()
    group = GpuGroup(CONFIG, SOURCE, runner=runner)
    group.close()
    group.close()
    with pytest.raises(RuntimeError, match="closed"):
        group.submit(StepPlan(epoch=0, step=0))
    with pytest.raises(RuntimeError, match="closed"):
        group.set_processors(0, 1, [])
    assert runner.asked == ["close"]


@pytest.mark.parametrize(
    ("device", "usable", "expected"),
    [("cpu", True, "cpu"), ("cuda", False, "cuda"), ("auto", True, "cuda"), ("auto", False, "cpu")],
)
def test_the_device_decides_which_group_is_made_and_what_is_checked(monkeypatch, device, usable, expected):
    class Made(Gpu):
        def __init__(self, config, source):
            super().__init__()
            self.given = config, source

    checked = []
    monkeypatch.setattr("octavo.worker.memory.usable", lambda: usable)
    monkeypatch.setattr(module, "ModelRunner", Made)
    monkeypatch.setattr(module, "CudaRunner", Made)
    monkeypatch.setattr(module, "check_cpu", lambda config: checked.append("cpu"))
    monkeypatch.setattr(module, "check_gpu", lambda config: checked.append("cuda"))
    config = CONFIG.replace(device=device)
    group = make_group(config, SOURCE)
    assert type(group) is {"cpu": LocalGroup, "cuda": GpuGroup}[expected]
    assert group.runner.given == (config, SOURCE)
    check_supported(config)
    assert checked == [expected]


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    config = CONFIG.replace(device="cuda")
    for refuse in (lambda: check_supported(config), lambda: make_group(config, SOURCE)):
        with pytest.raises(ConfigError, match="device cuda needs a torch with CUDA"):
            refuse()


@pytest.mark.parametrize(("given", "expected"), [
    ({}, (256, 8192)), ({"max_num_seqs": 1024}, (1024, 8192)), ({"max_num_seqs": 10_000}, (10_000, 10_000)),
    ({"max_num_batched_tokens": 100}, (100, 100)), ({"max_num_batched_tokens": 16384, "max_num_seqs": 8}, (8, 16384)),
    ({"enable_chunked_prefill": False}, (256, None))])
def test_a_server_on_a_gpu_has_defaults_of_its_own(monkeypatch, given, expected):
    config = EngineConfig(model="m", **given)
    monkeypatch.setattr("octavo.worker.group.resolve_device", lambda config: "cuda")
    found = for_serving(config)
    assert (found.max_num_seqs, found.max_num_batched_tokens) == expected
    monkeypatch.setattr("octavo.worker.group.resolve_device", lambda config: "cpu")
    assert for_serving(config) is config
