"""What the engine's tests on a GPU share: tiny checkpoints, requests, and how two sets of answers are compared.

Owns the making of checkpoints from a config alone (no transformers: a bare GPU machine has none), with weights wide enough that
the logits are far from flat, and the meaning of "equal except at near ties". DEVICE is the GPU, or the CPU where there is none,
so that the tests themselves can be tried out there.

Two runs of the same request may differ by rounding wherever a product has so many rows that another kernel computes it (beyond
SKINNY_ROWS, see layers/weight.py; the last is cuBLAS's, which chooses its order of summation by the number of rows), and wherever
a token is computed once by the prefill and once by the decode kernel. Then a greedy continuation may part where two tokens are
nearly as likely, and everything behind that place is another text.
"""

import importlib.util
import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file

from octavo import LLM, RequestOutput, SamplingParams
from octavo.models import registry
from octavo.models.decoder import Decoder
from octavo.models.names import Name
from octavo.models.spec import DecoderSpec

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Asked = list[tuple[list[int], SamplingParams]]

# A Llama of the sizes that the kernels were made for: every product of few rows is one of ours.
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
}


def make_checkpoint(folder: Path, config: dict[str, Any], *, seed: int = 0) -> Path:
    """A random float32 checkpoint of a config, as a Hugging Face folder with one safetensors file."""
    generator = torch.Generator().manual_seed(seed)
    spec = registry.spec(config)
    expected = Decoder(spec, dtype=torch.float32, max_model_len=8).expected()
    waiting, tensors = set(expected), dict[str, torch.Tensor]()
    for entry in registry.family_of(config).NAMES:
        for layer in range(spec.num_layers) if "{i}" in entry.source else (None,):
            targets = entry.targets(layer)
            if waiting.issuperset(targets):  # of names for the same parameter the first is taken
                waiting -= set(targets)
                shape = _stored(entry, [expected[t] for t in targets], spec)
                tensors[entry.source.replace("{i}", str(layer))] = _values(targets[0], shape, spec, generator)
    assert not waiting, f"no tensor fills {sorted(waiting)[:3]}"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "float32", **config}), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _stored(entry: Name, shapes: list[tuple[int, ...]], spec: DecoderSpec) -> tuple[int, ...]:
    """The shape in the file of a tensor that holds parameters of these shapes: one after the other, or that transposed."""
    whole = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    for shape in (whole, whole[::-1]):
        try:
            if [tuple(part.shape) for part in entry.apply(torch.empty(shape), spec)] == shapes:
                return shape
        except (RuntimeError, ValueError):
            continue
    raise AssertionError(f"{entry.source}: no shape gives {shapes}")


def _values(target: str, shape: tuple[int, ...], spec: DecoderSpec, generator: torch.Generator) -> torch.Tensor:
    """Logits with a deviation of about 2, norms around the identity, biases that matter."""
    value = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 0.3 * value + (1.0 - spec.norm_offset if "norm" in target and target.endswith("weight") else 0.0)
    if target == "embed.weight":
        return value * (2.0 / math.sqrt(shape[1]) if spec.tied else 1.0)
    if target == "positions.weight":
        return value * (1.0 / math.sqrt(shape[1]) if spec.tied else 0.5)
    if target == "head.weight":
        return value * 2.0 / math.sqrt(shape[1])
    return value * 1.4 / math.sqrt(shape[1])


def write_tokenizer(folder: Path) -> Path:
    """Give a checkpoint of at least 260 tokens a vocabulary: bytes as GPT-2 writes them, then <s>, </s> and two more."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i + 4 for i, letter in enumerate(letters)} | {"<a>": 0}, [], unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    data["model"]["vocab"] |= {"<s>": 1, "</s>": 2, "<b>": 3}
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in ("<s>", "</s>")])
    backend.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def load_benchmark(name: str) -> ModuleType:
    """A script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.insert(0, str(ROOT / "benchmarks"))  # where a script finds its neighbours
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


# Requests and answers


def mixed_requests(seed: int, count: int, vocab: int, *, longest: int = 120, output: int = 40, shared: bool = True) -> Asked:
    """Greedy and sampled requests with and without extras; half of the prompts begin alike if ``shared``."""
    rng = random.Random(seed)
    common = [rng.randrange(3, vocab) for _ in range(longest * 3 // 5)]
    found = []
    for i in range(count):
        prompt = [rng.randrange(3, vocab) for _ in range(rng.randint(1, longest if not shared else longest * 2 // 5))]
        if shared and i % 2:
            prompt = common[: rng.randint(1, len(common))] + prompt
        extras: dict[str, Any] = [
            {"temperature": 0.0},
            {"temperature": 1.0},
            {"temperature": 0.0, "repetition_penalty": 1.2},
            {"temperature": 0.7, "top_p": 0.8},
            {"temperature": 0.0, "frequency_penalty": 0.4, "presence_penalty": 0.2},
            {"temperature": 1.3, "top_k": 12},
            {"temperature": 1.0, "n": 3},
            {"temperature": 1.0, "min_p": 0.05, "logit_bias": {7: 2.0, 9: -3.0}},
        ][i % 8]
        found.append((prompt, SamplingParams(
            max_tokens=rng.randint(output // 8 + 1, output), seed=1000 + i, logprobs=5, ignore_eos=i % 3 != 0, detokenize=False,
            **extras)))
    return found


@dataclass
class Answer:
    """One continuation, and with the first of a request what was said about its prompt.

    Attributes:
        tokens, reason; logprobs, prompt_logprobs: per position, token -> nat. greedy: every token is the one with the highest
            logprob of those that are reported.
    """

    tokens: list[int]
    reason: str | None
    logprobs: list[dict[int, float]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, float]] = field(default_factory=list)
    greedy: bool = True


def answers(outputs: Sequence[RequestOutput], asked: Asked) -> list[Answer]:
    """The continuations of all requests in one list; a request that failed is an error here."""
    found = []
    for output, (_, params) in zip(outputs, asked, strict=True):
        assert output.error is None, output.error
        prompt = [_plain(position) for position in output.prompt_logprobs or [] if position is not None]
        for completion in output.outputs:
            assert completion.finish_reason in ("stop", "length"), completion.finish_reason
            found.append(Answer(completion.token_ids, completion.finish_reason,
                                [_plain(position) for position in completion.logprobs or []], prompt, _by_raw_logprobs(params)))
            prompt = []
    return found


def _by_raw_logprobs(params: SamplingParams) -> bool:
    """The token with the highest logprob that is reported wins: no chance, and nothing that changes the logits before."""
    changed = params.repetition_penalty != 1.0 or params.frequency_penalty or params.presence_penalty or params.logit_bias
    return params.greedy and not changed and params.allowed_token_ids is None and not params.logits_processors


def _plain(position: dict[int, Any]) -> dict[int, float]:
    return {token: entry.logprob for token, entry in position.items()}


def ask(model: Path | str, asked: Asked, *, alone: bool = False, check: Callable[[LLM], None] | None = None,
        **options: Any) -> list[Answer]:
    """Answers of a new engine on DEVICE; ``check`` is called before it is closed."""
    made: dict[str, Any] = {"device": DEVICE, "skip_tokenizer_init": True, "seed": 7, "max_num_seqs": 32, "max_model_len": 256,
                            "num_gpu_blocks_override": 640, "swap_space": 0.05}
    llm = LLM(str(model), **{**made, **options})
    try:
        outputs = []
        for batch in [[one] for one in asked] if alone else [asked]:
            prompts = [{"prompt_token_ids": ids} for ids, _ in batch]
            outputs += llm.generate(prompts, [params for _, params in batch], use_tqdm=False)
        drain(llm)
        llm.llm_engine.engine.check()
        assert llm.llm_engine.engine.stats.kv_used == 0 == llm.llm_engine.engine.stats.host_used
        assert llm.llm_engine.engine.stats.failed_steps == 0
        if check is not None:
            check(llm)
    finally:
        llm.close()
    return answers(outputs, asked)


def drain(llm: LLM) -> None:
    """Collect what is still on its way: with overlap the last step's result comes one call later."""
    while llm.llm_engine.engine.has_work():
        llm.llm_engine.step()


@dataclass
class Difference:
    """How far two sets of answers are apart, over everything up to the first token that differs.

    Attributes:
        largest, mean: of the differences of logprobs in nat. parted: continuations whose tokens differ. total: of them.
        widest: largest gap, in nat, between the two tokens at a place where greedy continuations part.
    """

    largest: float = 0.0
    mean: float = 0.0
    parted: int = 0
    total: int = 0
    widest: float = 0.0


def difference(ours: list[Answer], theirs: list[Answer]) -> Difference:
    """Compare answers to the same requests."""
    assert len(ours) == len(theirs)
    found, values = Difference(total=len(ours)), list[float]()
    for mine, other in zip(ours, theirs, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(mine.tokens, other.tokens, strict=False)) if a != b), None)
        if same is None and mine.tokens != other.tokens:
            same = min(len(mine.tokens), len(other.tokens))  # one ended: its end token is where they part
        upto = len(mine.tokens) if same is None else same + 1
        pairs = [*zip(mine.prompt_logprobs, other.prompt_logprobs, strict=True),
                 *zip(mine.logprobs[:upto], other.logprobs[:upto], strict=False)]
        values += [abs(a[token] - b[token]) for a, b in pairs for token in a.keys() & b.keys()
                   if math.isfinite(a[token]) or math.isfinite(b[token])]
        if same is not None:
            found.parted += 1
            if mine.greedy and same < min(len(mine.tokens), len(other.tokens)) and mine.logprobs:
                found.widest = max(found.widest, _gap(mine, other, same))
    if values:
        found.largest, found.mean = max(values), sum(values) / len(values)
    return found


def _gap(mine: Answer, other: Answer, at: int) -> float:
    """By how many nat the tokens differ that the two chose, in the answer that sees them closer together."""
    def gap(place: dict[int, float]) -> float:
        return abs(place.get(mine.tokens[at], -math.inf) - place.get(other.tokens[at], math.inf))

    return min(gap(mine.logprobs[at]), gap(other.logprobs[at]))


def assert_near(ours: list[Answer], theirs: list[Answer], *, largest: float, mean: float, tie: float, parted: float) -> None:
    """Equal up to rounding: see Difference. ``parted``: share of the continuations that may differ in a token."""
    found = difference(ours, theirs)
    assert found.largest <= largest and found.mean <= mean, found
    assert found.widest <= tie and found.parted <= parted * found.total, found


def assert_same(ours: list[Answer], theirs: list[Answer]) -> None:
    """Equal to the bit: tokens, reasons, logprobs of all of them."""
    assert len(ours) == len(theirs)
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.tokens == other.tokens and mine.reason == other.reason, (i, mine.tokens, other.tokens)
        for step, (a, b) in enumerate(zip(mine.logprobs, other.logprobs, strict=True)):
            assert a == b, (i, step, a, b)
