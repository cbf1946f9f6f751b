"""Loader: from a ModelSource to a Decoder that is ready to run.

Owns the order: read the config, build the network, settle who takes which tensor, then read the weights. It knows no
family and no file format. Invariant: a decoder that is returned has every parameter from the checkpoint and the
checkpoint had nothing else; which tensors are missing or left over is known, and said, before the first weight is read.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch

from octavo.config import EngineConfig
from octavo.errors import ModelError
from octavo.models import registry, weights
from octavo.models.decoder import Decoder
from octavo.models.names import IGNORED, Name, match
from octavo.models.source import ModelSource
from octavo.models.spec import DecoderSpec
from octavo.models.upload import upload

LISTED = 10


def load_model(source: ModelSource, config: EngineConfig, dtype: torch.dtype, max_model_len: int, device: str = "cpu") -> Decoder:
    """Build the network of a source and load its weights.

    Args:
        source: the model. config: load_format is read.
        dtype: storage type of the matrices. max_model_len: longest sequence that the decoder will see, in tokens.
        device: "cpu" or "cuda".

    Raises:
        ModelError: the config, a file or a tensor cannot be used; the message names it.
    """
    spec = registry.spec(source.config)
    # Embeddings are scaled by the number as the weights' type holds it: that is what the checkpoint was trained with.
    spec = replace(spec, embedding_scale=float(torch.tensor(spec.embedding_scale, dtype=dtype)))
    if config.load_format == "dummy":
        decoder = _build(spec, dtype, max_model_len, device)
        for name, tensor in weights.dummy(decoder.expected(), spec, dtype, device):
            decoder.load(name, tensor)
        decoder.finish()
        return decoder
    checkpoint = weights.open_checkpoint(source, spec, dtype, config.load_format)
    family = registry.family_of(source.config)
    _check_layers(checkpoint, spec, family.NAMES)
    decoder = _build(spec, dtype, max_model_len, device)
    claims = _claims(checkpoint, spec, set(decoder.expected()), family.NAMES, family.IGNORED)
    # Popped, so that a file that could not be mapped gives its memory back tensor by tensor.
    read = ((name, checkpoint.pop(name)) for name, _, _ in claims)
    opened = upload(read, device) if device.startswith("cuda") else ((name, open_tensor()) for name, open_tensor in read)
    for (name, entry, targets), (_, whole) in zip(claims, opened, strict=True):
        for target, tensor in zip(targets, _parts(name, entry, len(targets), whole, spec), strict=True):
            decoder.load(target, tensor)
    decoder.finish()
    return decoder


def _build(spec: DecoderSpec, dtype: torch.dtype, max_model_len: int, device: str) -> Decoder:
    try:
        return Decoder(spec, dtype=dtype, max_model_len=max_model_len, device=device)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "alloc" not in str(error):
            raise
        sizes = f"{spec.vocab_size} tokens, hidden size {spec.hidden}, {spec.num_layers} layers"
        text = f"the network that the config describes ({sizes}) does not fit this machine's memory"
        raise ModelError(f"{text}: {error}.", "model") from error


def _check_layers(checkpoint: Iterable[str], spec: DecoderSpec, names: tuple[Name, ...]) -> None:
    """ModelError where the config asks for layers that have no tensor at all: said before the layers are built."""
    claims = (match(name, names) for name in checkpoint)
    found = {claim[1] for claim in claims if claim is not None and claim is not IGNORED and claim[1] is not None}
    absent = [i for i in range(spec.num_layers) if i not in found]
    if found and len(absent) > 0:
        text = f"the config says {spec.num_layers} layers, but it misses every tensor of layer {absent[0]}"
        raise ModelError(f"the checkpoint does not fit its config ({spec.family}): {text}.", "model")


def _claims(
    checkpoint: Iterable[str], spec: DecoderSpec, expected: set[str], names: tuple[Name, ...], ignored: tuple[str, ...]
) -> list[tuple[str, Name, tuple[str, ...]]]:
    """Which parameters each tensor of the checkpoint fills, in the checkpoint's order.

    Raises:
        ModelError: a tensor is left over, a parameter is missing, or two tensors fill the same one.
    """
    claims: list[tuple[str, Name, tuple[str, ...]]] = []
    left_over: list[str] = []
    taken: dict[str, str] = {}
    for name in checkpoint:
        found = match(name, names, ignored)
        if found is IGNORED:
            continue
        entry, layer = found if found is not None else (None, None)
        targets = entry.targets(layer) if entry is not None else ()
        if spec.tied and targets == ("head.weight",):
            continue  # a second copy of the embedding
        if entry is None or not expected.issuperset(targets):
            left_over.append(name)
            continue
        for target in targets:
            if target in taken:
                raise ModelError(f"the tensors {taken[target]!r} and {name!r} both hold {target}.", "model")
            taken[target] = name
        claims.append((name, entry, targets))
    missing = sorted(expected - taken.keys())
    if missing or left_over:
        problems = [*_listed("misses the parameters", missing), *_listed("has tensors that nothing uses:", left_over)]
        text = ", and it ".join(problems)
        raise ModelError(f"the checkpoint does not fit its config ({spec.family}): it {text}.", "model")
    return claims


def _listed(what: str, names: list[str]) -> list[str]:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return [f"{what} {', '.join(names[:LISTED])}{more}"] if names else []


def _parts(name: str, entry: Name, count: int, tensor: torch.Tensor, spec: DecoderSpec) -> tuple[torch.Tensor, ...]:
    """The parameters that a tensor holds; ModelError if its shape does not make as many as the table says."""
    try:
        parts = entry.apply(tensor, spec)
        if len(parts) != count:
            raise ValueError(f"it has {len(parts)} parts instead of {count}")
        return parts
    except (RuntimeError, ValueError, IndexError) as error:  # a transform that meets a shape it does not expect
        shape = list(tensor.shape)
        raise ModelError(f"tensor {name!r} of shape {shape} does not fit the config: {error}.", "model") from error
