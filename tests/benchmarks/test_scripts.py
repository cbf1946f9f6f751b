"""The benchmark scripts of the GPU, at tiny size on the CPU: every flag, the names of the figures, and what they are made of."""

import gc
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from octavo.errors import OctavoError

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 300, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loads a script as a module, with its neighbours in reach."""
    monkeypatch.syspath_prepend(FOLDER)

    def load(name: str) -> ModuleType:
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model under a name that has targets."""
    folder = tmp_path_factory.mktemp("models") / "llama-3.2-1b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
    return folder


def last(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# The arithmetic


@pytest.mark.parametrize(("model", "weights", "kv", "sharegpt", "nano"), [
    ("qwen3-0.6b", 1.192e9, 112, 47_799, 25_527), ("llama-3.2-1b", 2.471e9, 32, 71_030, 51_019),
    ("llama-3.1-8b", 15.01e9, 128, 12_605, 9_809)])
def test_ceilings_of_the_three_models(script: Any, model: str, weights: float, kv: int, sharegpt: float, nano: float) -> None:
    ceiling = script("ceiling")
    net, rates = ceiling.Network.read(FOLDER / "models" / model), ceiling.Rates()
    assert net.weight_bytes == pytest.approx(weights, rel=1e-3) and net.kv_bytes == kv * 1024
    for name, wanted in (("sharegpt_like", sharegpt), ("nano", nano)):
        lengths = json.loads((FOLDER / "workloads" / f"{name}.json").read_text(encoding="utf-8"))
        assert ceiling.output_rate(net, rates, lengths) == pytest.approx(wanted, rel=1e-3)


def test_a_decode_step_is_bytes_over_bandwidth(script: Any) -> None:
    ceiling = script("ceiling")
    net = ceiling.Network.read(FOLDER / "models" / "qwen3-0.6b")
    step = ceiling.step_seconds(net, ceiling.Rates(), tokens=1, rows=1, kv_tokens=512)
    assert step == pytest.approx(0.42e-3, rel=0.02)
    assert ceiling.decode_rate(net, ceiling.Rates(), 1, 511, 2) == pytest.approx(1 / step)
    assert ceiling.decode_rate(net, ceiling.Rates(), 32, 511, 2) == pytest.approx(32 / 1.02e-3, rel=0.02)
    assert ceiling.first_token_seconds(net, ceiling.Rates(), 1, 128) == pytest.approx(
        ceiling.step_seconds(net, ceiling.Rates(), tokens=128, rows=1, kv_tokens=0, prompt_pairs=128 * 64))


def test_ceiling_as_a_command(script: Any, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script("ceiling").main([str(tiny), str(FOLDER / "workloads" / "nano.json")]) == 0
    assert "nano" in capsys.readouterr().out


# The engine's figures


def test_workloads(script: Any, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--models", str(tiny), "--requests", "3", "--iterations", "1", "--engine", '{"max_num_seqs": 40}']
    assert script("engine_gpu").main(words) == 0
    found = last(capsys)
    assert found["notes"] == [] and found["command"].endswith(" ".join(words))
    figures = {name.removeprefix("llama-3.2-1b/"): figure for name, figure in found["figures"].items()}
    assert set(figures) >= {
        "single_128_256/decode_tok_s", "single_128_256/ttft_s", "batch32_128_128/decode_tok_s", "sharegpt_like/t0/output_tok_s",
        "sharegpt_like/t1/output_tok_s", "nano/t0/output_tok_s", "nano/t1/output_tok_s", "load_s"}
    single = figures["single_128_256/decode_tok_s"]
    assert 0 < single["value"] < single["ceiling"] and (single["target"], single["peer"], single["unit"]) == (900, 602, "tok/s")
    assert figures["nano/t1/output_tok_s"]["requests"] == 3 and figures["nano/t1/output_tok_s"]["peer"] == 27249


def test_what_does_not_fit_the_budget_is_named(script: Any, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--models", str(tiny), "--here", "--budget", "0.5", "--workloads", "batch32", "nano"]
    assert script("engine_gpu").main(words) == 0
    assert [note.split(" was left out")[0] for note in last(capsys)["notes"]] == [
        "llama-3.2-1b/batch32_128_128", "llama-3.2-1b/nano/t0/output_tok_s", "llama-3.2-1b/nano/t1/output_tok_s"]


def test_a_model_that_fails_costs_its_own_figures(
    script: Any, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "hidden_act": "mish"}), encoding="utf-8")
    words = ["--device", "cpu", "--models", str(tmp_path), str(tiny), "--here", "--workloads", "nano", "--temperatures", "0",
             "--requests", "2"]
    assert script("engine_gpu").main(words) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert any("llama-3.2-1b/nano/t0/output_tok_s" in line["figures"] for line in lines)
    assert "mish" in lines[-1]["notes"][0]


def test_starts(script: Any, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--models", str(tiny), "--workloads", "--startup", "--checkpoint", "--checkpoint-dir",
             str(tmp_path)]
    assert script("engine_gpu").main(words) == 0
    found = last(capsys)
    assert found["notes"] == []
    values = {name: figure["value"] for name, figure in found["figures"].items()}
    base, start = values["torch/import_and_first_product_s"], values["llama-3.2-1b/start_to_first_token_s"]
    assert start > base > 0 and values["llama-3.2-1b/checkpoint_to_first_token_s"] > base
    assert values["llama-3.2-1b/start_above_torch_s"] == pytest.approx(start - base, abs=0.02)
    assert found["figures"]["llama-3.2-1b/start_above_torch_s"]["target"] == 3
    assert not list(tmp_path.iterdir()), "the checkpoint is gone again"


def test_a_checkpoint_has_every_tensor_once(script: Any, tmp_path: Path) -> None:
    from safetensors import safe_open

    startup = script("startup")
    model, folder = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    folder.mkdir()
    config = {**TINY, "num_hidden_layers": 5, "tie_word_embeddings": False}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert startup.write_checkpoint(model, folder) == startup.checkpoint_bytes(config)
    files = sorted(folder.glob("*.safetensors"))
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            found |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            assert all(opened.get_tensor(name).isfinite().all() for name in opened.keys())  # noqa: SIM118
    assert found == startup.tensors_of(config) and len(files) == startup.SHARDS


# Arrivals, idle time, traffic


def test_poisson(
    script: Any, tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gc, "freeze", lambda: None)  # it is for a process of its own
    words = ["--device", "cpu", "--model", str(tiny), "--offline", "20000", "--requests", "20", "--warmup", "3"]
    assert script("poisson").main(words) == 0
    found = last(capsys)
    figures = {name.removeprefix("llama-3.2-1b/poisson80/"): figure["value"] for name, figure in found["figures"].items()}
    assert figures["itl_p99_ms"] >= figures["itl_p50_ms"] > 0 and figures["ttft_p99_ms"] >= figures["ttft_p50_ms"] > 0
    assert figures["itl_p99_over_decode_step"] == pytest.approx(figures["itl_p99_ms"] / figures["decode_step_ms"], rel=1e-2)
    assert "graph_share" in figures or any("graph_share is missing" in note for note in found["notes"])


def test_idle_on_a_cpu_knows_the_step_alone(script: Any, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script("idle").main(["--device", "cpu", "--model", str(tiny), "--batch", "2", "--steps", "5", "--prompt", "8"]) == 0
    found = last(capsys)
    assert found["figures"]["llama-3.2-1b/decode_batch2/step_us"]["value"] > 0 and "CPU" in found["notes"][0]


def test_a_trace_is_read(script: Any) -> None:
    """Six steps of 100 us: two kernels of 40 and 50 us with 2 us between them, so 8 us to the next step; one wait a step."""
    idle, events = script("idle"), list[dict[str, Any]]()

    def put(cat: str, name: str, ts: float, dur: float, correlation: int | None = None) -> None:
        events.append({"cat": cat, "name": name, "ts": ts, "dur": dur,
                       "args": {} if correlation is None else {"correlation": correlation}})

    for step in range(6):
        at = 100.0 * step
        put("user_annotation", idle.MARK, at, 30)
        put("cuda_runtime", "cudaGraphLaunch", at + 5, 3, 10 * step)
        put("cuda_runtime", "cudaLaunchKernel", at + 9, 3, 10 * step + 1)
        put("cuda_runtime", "cudaEventSynchronize", at + 40, 30, 10 * step + 2)
        put("kernel", "void octavo::cuda::a<int>(int*)", at + 150, 40, 10 * step)  # they run a step behind
        put("kernel", "b", at + 192, 50, 10 * step + 1)
        put("gpu_memcpy", "Memcpy DtoH", at + 242, 1, 10 * step + 1)
    put("cuda_runtime", "cudaDeviceSynchronize", 700, 1, 99)  # the profiler's own, behind the last step
    found = idle.analyse(events)
    assert found.steps == 4 and found.window_us == pytest.approx(3 * 100 + 92) and found.gap_us == pytest.approx(3 * 8)
    assert found.idle_share == pytest.approx(24 / 392) and found.covered_us == pytest.approx(4 * 91)
    assert found.waits(idle.EVENT_WAIT) == 4 and found.waits(idle.FULL_WAIT) == 0
    assert {name: kernel.count for name, kernel in found.kernels.items()} == {
        "void octavo::cuda::a<int>(int*)": 4, "b": 4, "Memcpy DtoH": 4}
    assert idle.short("void octavo::cuda::a<int>(int*)") == "a<int>"
    assert idle.short("void (anonymous namespace)::k<f(int)>(float)") == "k<f(int)>"
    put("cuda_runtime", "cudaStreamSynchronize", 250, 1, 98)
    assert idle.analyse(events).waits(idle.FULL_WAIT) == 1
    assert idle.analyse([]).steps == 0


def test_soak(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert script("soak_gpu").main(["--device", "cpu", "--minutes", "0.04", "--rounds", "3", "--blocks", "100"]) == 0
    figures = last(capsys)["figures"]
    assert figures["soak/requests"]["value"] > 20 and figures["soak/aborted"]["value"] > 0


def test_a_soak_beside_others_keeps_to_its_share_of_the_gpu(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = list[float]()
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the next step, making the engine, says so
    for words, wanted in (([], []), (["--memory", "0.1"], [0.1])):
        with pytest.raises(OctavoError, match=r"GPU|cuda"):
            script("soak_gpu").main(["--minutes", "0.01", *words])
        assert shares == wanted


# The server


def test_the_server_beside_the_engine(script: Any, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server_gpu = script("server_gpu")
    words = ["--device", "cpu", "--model", str(tiny), "--requests", "12", "--rows", "24", "--engine", "--max-num-batched-tokens",
             "2048"]
    assert server_gpu.main(words) == 0
    found = last(capsys)
    assert found["command"].endswith(" ".join(words))
    figures = {name.removeprefix("llama-3.2-1b/sharegpt_like/"): figure for name, figure in found["figures"].items()}
    run = {"ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms", "api_us_per_token", "api_busiest_thread",
           "engine_us_per_token", "engine_busiest_thread", "tokens_per_chunk", "client_busy", "output_tok_s"}
    start = {"start_to_ready_s", "of_offline"}
    assert set(figures) == {"offline/output_tok_s", *(f"server_poisson/{name}" for name in run), *(
        f"{server}/{name}" for server in ("server", "server_24_rows", "server_2_processes") for name in run | start)}
    values = {name: figure["value"] for name, figure in figures.items()}
    assert values["server/of_offline"] == pytest.approx(values["server/output_tok_s"] / values["offline/output_tok_s"], rel=2e-3)
    assert [name for name, figure in figures.items() if "target" in figure] == ["server/of_offline"]
    assert values["server/itl_p99_ms"] >= values["server/itl_p50_ms"] >= 0 and values["server/tokens_per_chunk"] >= 1
    assert values["server/engine_us_per_token"] > 0 and values["server/start_to_ready_s"] > 0
    assert len(found["notes"]) == 1 and "the API processes computed for" in found["notes"][0]


def test_a_server_that_cannot_start_costs_its_own_figures(
    script: Any, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--device", "cpu", "--model", str(tiny), "--requests", "1", "--parts", "rows", "--rows", "0"]
    assert script("server_gpu").main(words) == 1
    said = capsys.readouterr().out
    found = json.loads(said.splitlines()[-1])
    assert found["figures"] == {} and "max_num_seqs" in said
    assert found["notes"] == ["llama-3.2-1b/rows: RuntimeError: the server ended with 1 before it was ready"]


def test_a_part_without_time_is_named(script: Any, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script("server_gpu").main(["--device", "cpu", "--model", str(tiny), "--budget", "1", "--quick"]) == 1
    assert [note.split(" was left out")[0] for note in last(capsys)["notes"]] == ["llama-3.2-1b/offline", "llama-3.2-1b/defaults"]


def test_a_made_up_vocabulary_is_whole(script: Any, tmp_path: Path) -> None:
    from octavo.text.folder_vocab import vocabulary_from_folder
    from octavo.text.tokenizer import Tokenizer

    config = {"vocab_size": 5000, "bos_token_id": 3, "eos_token_id": 4999}
    script("server_gpu").write_tokenizer(tmp_path, config)
    tokenizer = Tokenizer(*vocabulary_from_folder(tmp_path))
    texts = tokenizer.pieces()
    assert tokenizer.vocab_size == 5000 == len(set(texts)) and tokenizer.special_ids == {3, 4999}
    assert tokenizer.eos_token_ids == (4999,) and tokenizer.kind == "bytes"
    assert tokenizer.decode(tokenizer.encode("a \u00e4\u732b")) == "a \u00e4\u732b"
    assert 3.5 < sum(map(len, texts[300:4999])) / 4699 < 4.5


# The engine alone


@pytest.mark.parametrize("flags", [[], ["--overlap", "--stream"], ["--host-blocks", "4"]])
def test_the_overhead_of_an_engine_is_measured(script: Any, capsys: pytest.CaptureFixture[str], flags: list[str],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["engine_overhead.py", "--rows", "16", "--steps", "40", *flags])
    script("engine_overhead").main()
    found = last(capsys)
    (result,) = found["results"]
    assert "threads" in found["machine"] and "commit" in found and found["versions"]["octavo"]
    assert result["rows"] == 16 and result["finished"] == 2 and result["running_at_end"] == 14 and result["mean_us"] > 0


@pytest.mark.parametrize("against", [False, True])
def test_attention_of_a_cpu_is_measured_against_another_checkout(
    script: Any, capsys: pytest.CaptureFixture[str], against: bool
) -> None:
    words = ["--threads", "1", "--dtypes", "bfloat16", "--models", "SmolLM2-135M", "--steps", "1x40", "--budget", "0.01",
             "--rounds", "2"]
    script("cpu_attention").main([*words, *(["--against", str(FOLDER.parent)] if against else [])])
    found = last(capsys)
    (figure,) = found["figures"]
    assert figure["us"] > 0 and figure["read_gb_per_s"] > 0 and found["machine"] and (found["against"] is None) != against
    assert figure.get("same_bits", False) == against == ("gain" in figure) and figure["keys"] == 40
    with pytest.raises(SystemExit):
        script("cpu_attention").main(["--models", "none-such"])


def test_products_of_a_cpu_are_measured(script: Any) -> None:
    timing = script("cpu_timing")
    assert timing.seconds(lambda i: sum(range(1000 * (i % 2))), 0.0) > 0 and script("cpu_gemm").seconds is timing.seconds
