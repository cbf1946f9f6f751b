"""What a model and the options say about a request before anybody asks anything."""

from pathlib import Path

import pytest

from octavo.config import EngineConfig
from octavo.models.source import ModelSource
from octavo.text.intake import Intake


@pytest.mark.parametrize(("option", "temperature"), [("auto", 0.6), ("vllm", 1.0), ("octavo", 1.0)])
def test_whose_sampling_defaults_hold(option: str, temperature: float) -> None:
    """The end tokens of the model's file count in any case."""
    source = ModelSource("folder", Path(), {"eos_token_id": 9}, {"temperature": 0.6, "eos_token_id": 7})
    config = EngineConfig(model="m", generation_config=option, override_generation_config={"top_k": 5})
    intake = Intake(source, config, None)
    params = intake.default_params(8)
    assert (params.temperature, params.top_k, params.max_tokens) == (temperature, 5, 8) and 7 in intake.eos_token_ids
