"""Names: the table between the tensors of a checkpoint and the parameters of the decoder.

Owns the entry type and the lookup. It does not know any family (each brings its own table), nor shapes. Invariant:
every tensor name is claimed by one entry, ignored by a stated pattern, or left over; there is no fourth answer.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final, Literal

from octavo.models.spec import DecoderSpec

if TYPE_CHECKING:  # whoever only wants to know a model's config or tokenizer loads no torch
    import torch

    Transform = Callable[[torch.Tensor, DecoderSpec], torch.Tensor | tuple[torch.Tensor, ...]]
else:
    Transform = Callable

_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")


class _Ignored(Enum):
    IGNORED = "ignored"


IGNORED: Final = _Ignored.IGNORED


@dataclass(frozen=True, slots=True)
class Name:
    """One line of a family's table.

    Attributes:
        source: name in the checkpoint, ``{i}`` for the number of the layer.
        target: parameter of the decoder with the same ``{i}``; several where one tensor holds several parameters.
        transform: from the stored tensor to the parameter, in [out, in] order, or to one tensor per target. None takes
            it as it is.
    """

    source: str
    target: str | tuple[str, ...]
    transform: Transform | None = None

    def __post_init__(self) -> None:
        assert isinstance(self.target, str) or self.transform is not None, "several targets need a transform"

    def targets(self, layer: int | None) -> tuple[str, ...]:
        """Names of the parameters for one layer (None for a tensor outside the layers)."""
        patterns = (self.target,) if isinstance(self.target, str) else self.target
        return patterns if layer is None else tuple(p.replace("{i}", str(layer)) for p in patterns)

    def apply(self, tensor: "torch.Tensor", spec: DecoderSpec) -> "tuple[torch.Tensor, ...]":
        """The parameters that a stored tensor holds, in the order of ``targets``."""
        if self.transform is None:
            return (tensor,)
        parts = self.transform(tensor, spec)
        return parts if isinstance(parts, tuple) else (parts,)


def under(prefixes: tuple[str, ...], names: tuple[Name, ...]) -> tuple[Name, ...]:
    """The table with every source under each prefix: checkpoints of one family differ in the name of their root."""
    return tuple(Name(prefix + n.source, n.target, n.transform) for prefix in prefixes for n in names)


def match(
    name: str, names: tuple[Name, ...], ignored: tuple[str, ...] = ()
) -> tuple[Name, int | None] | Literal[_Ignored.IGNORED] | None:
    """Find who claims a tensor.

    Args:
        name: of the tensor in the checkpoint.
        names: table of the family.
        ignored: fnmatch patterns of tensors that carry nothing (masks, frequencies that are computed).

    Returns:
        The entry and the number of the layer (None outside the layers), IGNORED, or None for a left-over tensor.
    """
    table = _table(names)
    if name in table:
        return table[name], None
    if (number := _NUMBER.search(name)) and (digits := number.group()) == str(int(digits)):
        entry = table.get(f"{name[: number.start()]}{{i}}{name[number.end() :]}")
        if entry is not None:
            return entry, int(digits)
    return IGNORED if any(fnmatchcase(name, pattern) for pattern in ignored) else None


@functools.cache
def _table(names: tuple[Name, ...]) -> dict[str, Name]:
    table = {n.source: n for n in names}
    assert len(table) == len(names), "two entries of a table have the same source"
    return table
