"""Pairs of blocks in a plan, checked before anything is copied.

Owns one function that both runners use. Invariant: what it returns names blocks that exist.
"""

import numpy as np
import torch
from torch import Tensor

from octavo.plan import Int32


def checked_pairs(pairs: Int32, num_sources: int, num_targets: int, what: str) -> Tensor:
    """Source and destination blocks as a tensor int32 [n, 2] of the host; RuntimeError when one does not exist."""
    if pairs.min() < 0 or pairs[:, 0].max() >= num_sources or pairs[:, 1].max() >= num_targets:
        raise RuntimeError(
            f"a plan wants to {what} blocks {pairs.tolist()} between pools of {num_sources} and {num_targets}."
        )
    return torch.from_numpy(np.array(pairs))
