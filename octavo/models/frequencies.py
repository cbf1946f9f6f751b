"""The frequencies of a RopeSpec: plain, or scaled in one of the ways in which checkpoints stretch their context.

Owns the formulas of linear, dynamic, llama3, yarn and longrope; the table of cosines is layers/rope.py's. Frequencies
are float32 and rounded in the order in which the networks were trained, so that logits agree closely with Hugging
Face. Invariant: they depend on the spec and on max_model_len, both fixed when the model is built. So where the original
code changes its frequencies as a sequence grows (dynamic, longrope), every token here gets those of the longest
sequence that the engine admits, and cached keys stay valid.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from octavo.models.spec import RopeSpec


def frequencies(spec: RopeSpec, max_model_len: int) -> tuple[Tensor, float]:
    """Radians per position, float32 [rotary_dim / 2], and the factor that multiplies cosines and sines."""
    return _SCALINGS[spec.scaling](spec, max_model_len)


def _powers(spec: RopeSpec, base: float) -> Tensor:
    """base ** (2i / rotary_dim), float32."""
    exponents: Tensor = torch.arange(0, spec.rotary_dim, 2, dtype=torch.float32) / spec.rotary_dim
    return torch.pow(base, exponents)


def _none(spec: RopeSpec, max_model_len: int) -> tuple[Tensor, float]:
    return 1.0 / _powers(spec, spec.base), 1.0


def _linear(spec: RopeSpec, max_model_len: int) -> tuple[Tensor, float]:
    return 1.0 / _powers(spec, spec.base) / spec.factor, 1.0


def _dynamic(spec: RopeSpec, max_model_len: int) -> tuple[Tensor, float]:
    """A larger base once sequences may pass the trained length; unscaled below it."""
    length, d = max(max_model_len, spec.original_max_len), spec.rotary_dim
    growth = spec.factor * length / spec.original_max_len - (spec.factor - 1)
    return 1.0 / _powers(spec, spec.base * growth ** (d / (d - 2))), 1.0


def _llama3(spec: RopeSpec, max_model_len: int) -> tuple[Tensor, float]:
    """Short waves stay, long waves are divided by factor, the band between them is blended."""
    plain = 1.0 / _powers(spec, spec.base)
    wavelength = 2 * math.pi / plain
    longest, shortest = spec.original_max_len / spec.low_freq_factor, spec.original_max_len / spec.high_freq_factor
    share = (spec.original_max_len / wavelength - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    blended = (1 - share) * plain / spec.factor + share * plain
    scaled = torch.where(wavelength > longest, plain / spec.factor, blended)
    return torch.where(wavelength < shortest, plain, scaled), 1.0


def _yarn(spec: RopeSpec, max_model_len: int) -> tuple[Tensor, float]:
    """A ramp over the dims from plain (fast) to divided by factor (slow), and a gain on cosines and sines."""

    def dim_of(rotations: float) -> float:
        return spec.rotary_dim * math.log(spec.original_max_len / (rotations * 2 * math.pi)) / (2 * math.log(spec.base))

    low, high = dim_of(spec.beta_fast), dim_of(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.rotary_dim - 1)
    ramp = (torch.arange(spec.rotary_dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    plain_share = 1 - ramp.clamp(0, 1)
    powers = _powers(spec, spec.base)
    return 1.0 / (spec.factor * powers) * (1 - plain_share) + 1.0 / powers * plain_share, _yarn_magnitude(spec)


def _yarn_magnitude(spec: RopeSpec) -> float:
    def gain(weight: float) -> float:
        return 1.0 if spec.factor <= 1 else 0.1 * weight * math.log(spec.factor) + 1.0

    if spec.attention_factor is not None:
        return spec.attention_factor
    if spec.mscale and spec.mscale_all_dim:
        return gain(spec.mscale) / gain(spec.mscale_all_dim)
    return gain(1.0)


def _longrope(spec: RopeSpec, max_model_len: int) -> tuple[Tensor, float]:
    """A divisor per frequency, from the long list where sequences may pass the trained length."""
    divisors = spec.long_factor if max_model_len > spec.original_max_len else spec.short_factor
    magnitude = spec.attention_factor
    if magnitude is None:
        stretch = math.log(spec.factor) / math.log(spec.original_max_len)
        magnitude = 1.0 if spec.factor <= 1 else math.sqrt(1 + stretch)
    return 1.0 / (torch.tensor(divisors, dtype=torch.float32) * _powers(spec, spec.base)), magnitude


_SCALINGS: dict[str, Callable[[RopeSpec, int], tuple[Tensor, float]]] = {
    "none": _none, "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope,
}
