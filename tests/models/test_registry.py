"""Registry: which architectures exist, and what is refused before a network is built."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from octavo.errors import ModelError
from octavo.models import llama, registry
from octavo.models.spec import LayerSpec

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize("architecture", registry.FAMILIES)
def test_the_module_of_an_architecture_claims_it(architecture: str) -> None:
    module = registry.family_of({"architectures": [architecture]})
    assert architecture in module.ARCHITECTURES
    assert set(module.ARCHITECTURES) <= registry.FAMILIES.keys()


def test_only_the_family_that_is_asked_for_is_imported() -> None:
    code = (
        "import sys; from octavo.models import registry; registry.family_of({'architectures': ['OPTForCausalLM']});"
        "loaded = [m for m in ('opt', 'gemma', 'qwen', 'neox') if f'octavo.models.{m}' in sys.modules]; print(loaded)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['opt']"


def test_an_unknown_architecture_names_those_that_are_known() -> None:
    text = "MambaForCausalLM is not known; known are .*GPT2LMHeadModel.*Qwen3ForCausalLM"
    with pytest.raises(ModelError, match=text) as info:
        registry.spec({"architectures": ["MambaForCausalLM"]})
    assert info.value.param == "architectures"


@pytest.mark.parametrize(("config", "words"), [
    ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM is a mixture of experts"),
    ({"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM is a mixture of experts"),
    ({"architectures": ["PhiMoEForCausalLM"]}, "a mixture of experts"),
    ({"architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 256}, "DeepseekV3ForCausalLM is a mixture of experts"),
    ({"architectures": ["GptOssForCausalLM"], "num_local_experts": 32}, "a mixture of experts"),
    ({"architectures": ["EagleLlamaForCausalLM"]}, "a draft for speculative decoding"),
    ({"architectures": ["MedusaModel"]}, "a draft for speculative decoding"),
    ({"architectures": ["LlamaForCausalLMEagle3"]}, "a draft for speculative decoding"),
    ({"architectures": ["Other"], "speculators_model_type": "eagle3"}, "a draft for speculative decoding"),
])
def test_a_kind_of_network_that_does_not_exist_yet_is_called_by_its_name(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=f"{words}.*does not exist in Octavo yet") as info:
        registry.spec(config)
    assert info.value.param == "architectures"


@pytest.mark.parametrize("named", [None, [], "LlamaForCausalLM", [3], {}])
def test_a_config_must_name_its_architecture(named: Any) -> None:
    with pytest.raises(ModelError, match="architectures"):
        registry.spec({"architectures": named})


def test_the_first_known_architecture_counts() -> None:
    assert registry.architecture_of({"architectures": ["Other", "OPTForCausalLM"]}) == "OPTForCausalLM"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "wide"}, "wide"),
        ({"hidden_size": 0}, "LlamaForCausalLM"),
        ({"hidden_size": 1 << 40}, "hidden is 1099511627776"),
        ({"num_hidden_layers": 0}, "num_hidden_layers .* from 1 to 2000, got 0"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"head_dim": 7}, "dims rotate"),
        ({"rope_theta": -1.0}, "rope base"),
        ({"rope_theta": 0}, "rope base"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -2.0}}, "factor"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": float("nan")}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 1}}, "low_freq"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        ({"rms_norm_eps": 1.0}, "rms_norm_eps"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 6.0}, r"rope_theta \(6.0\) and rope_parameters \(5.0\)"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4}, "rope_scaling": {"type": "linear", "factor": 2}},
         r"rope_scaling\.factor"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"is quantised \(gptq\)"),
        ({"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}, r"is quantised \(fp8\)"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, r"is quantised \(compressed-tensors\)"),
        ({"num_local_experts": 8}, "num_local_experts = 8"),
        ({"speculators_config": {"algorithm": "eagle3"}}, "speculators_config is a draft for speculative decoding"),
        ({"vocab_size": -5}, "vocab_size"),
    ],
)
def test_an_impossible_config_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        registry.spec({**LLAMA, **changes})


def test_a_family_that_fails_is_a_model_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a strange config does to a family's arithmetic, the user learns which config it was."""
    for error in (KeyError("n_embd"), TypeError("str and int"), ZeroDivisionError("by zero")):

        def failing(config: dict[str, Any], error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(llama, "spec", failing)
        with pytest.raises(ModelError, match="LlamaForCausalLM"):
            registry.spec(LLAMA)


def test_a_spec_that_points_nowhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    good = registry.spec(LLAMA)
    monkeypatch.setattr(llama, "spec", lambda config: replace(good, layers=(LayerSpec(rope=1),)))
    with pytest.raises(ModelError, match="rope table"):
        registry.spec(LLAMA)
