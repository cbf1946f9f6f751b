"""What a launch has to know about the code that runs: see csrc/cuda/launch.h."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NO_PTX = 42
SAMPLE = f"""
import sys, torch
from octavo import ops
from octavo.ops import reference

ops.load_cuda()
rows, vocab = 3, 70001
logits = 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(1))
none, one, number = torch.zeros(rows), torch.ones(rows), torch.arange(rows, dtype=torch.int32)
columns = [one, none.int(), one, none, number.long(), number, number]
wanted = torch.full((8 * rows,), -77, dtype=torch.int32)  # what follows the rows' tokens stays
found = wanted.cuda()  # no kernel of torch's is launched: these may have no PTX
reference.sample(wanted[:rows], logits, *columns)
try:
    ops.sample(found[:rows], logits.cuda(), *(c.cuda() for c in columns))
except RuntimeError as error:
    if "kernel image" not in str(error) and "PTX" not in str(error):
        raise
    sys.exit({NO_PTX})
assert torch.equal(found.cpu(), wanted), (found, wanted)
"""


def test_code_that_the_driver_makes_from_ptx():
    """Code for 8.0 on a newer GPU knows no clusters and waits for no kernel: it must not be launched as if it did."""
    done = subprocess.run([sys.executable, "-c", SAMPLE], env={**os.environ, "CUDA_FORCE_PTX_JIT": "1"}, cwd=ROOT, check=False,
                          capture_output=True, text=True, timeout=300)
    if done.returncode == NO_PTX:
        pytest.skip("this build has no PTX: OCTAVO_CUDA_ARCHS=8.0+PTX makes one")
    assert done.returncode == 0, done.stderr
