"""A pytest plugin (-p first_of_each) for sanitizers: of every test function one case, and nothing beyond SECONDS.

Owns the choice: an instrumented kernel is a hundred times slower, so of a kernel's cases the one is taken that goes through most
of it at the least size, loops inside a case are cut down, and tests that call the same kernel again to compare bits are left out.
Invariant: what was chosen and could not be run to its end is named in a line that begins with LEFT.
"""

import os
import signal
import time
from collections.abc import Generator
from typing import Any

import pytest
from hazards import BEGINS, LEFT

SECONDS = 75
STARTED = time.monotonic()
# Graphs cannot be captured while every tensor is an allocation of its own; the others are sizes for the plain run.
NEVER = ("graph", "capture", "many", "long", "31_bits")
# Tests of bits, of statistics and of lists of work by the size: more launches of kernels that the other tests launch too. In
# test_attention_decode.py they are 208 of 298 launches of attention, in test_gemm.py 411 of 1,950. memcheck keeps those whose
# lists and tables are longer than elsewhere; racecheck, at least twice as slow, does not.
REPEATS = {
    "memcheck": ("_does_not_depend_on_the_others", "_follow_the_exact_distribution", "_every_bit_of_the_random"),
    "racecheck": (
        "_does_not_depend_on_the_others", "_follow_the_exact_distribution", "_every_bit_of_the_random", "same_bits", "same_alone",
        "bits_do_not_depend", "mixed_with_prompts", "_a_thousand_decodes", "looks_ahead", "contract", "refused", "is_an_error",
    ),
}
# Part of the case's id, where neither "odd" or "small" nor the first is the one: a window of one token has next to no work, nor
# has a vocabulary of one; test_attention_sm90.py has the kernel for Hopper, so the portable one is for test_attention_prefill.py.
CASES = {
    "test_head_dims": "128-torch.bfloat16", "test_e4m3_cache": "128-torch.bfloat16", "test_groups": "(7, 1)-64",
    "test_windows": "[64]", "test_block_sizes": "[8]", "test_features": "ones-all",
    "test_every_type_and_head_dim": "act0-None-128-True", "test_every_group": "heads2-True",
    "test_every_block_size": "True-None-8", "test_large_scores": "[True]",
    "test_windows_soft_caps_and_slopes": "[64-True-5.0-64-True]", "test_plain_float32": "[20-act0-None",
    "test_plain_half_types": "[20-heads2-act0-None", "test_plain_windows_soft_caps_and_slopes": "[17-True-5.0-8]",
    "test_bits_do_not_depend_on_the_batch_or_on_chunks": "128-None-0-False-True",
    "test_blocks_of_the_cache": "[16-dtype0-128]", "test_groups_of_heads": "[64-heads2]", "test_window": "[100-128]",
    "test_the_gpu_draws_what_the_reference_draws": "[300-5003", "test_token_logprobs": "[5003", "test_norms": "[1024-dtype1",
    "test_norms_after_the_addition": "[1024-dtype1", "test_norms_to_e4m3": "[1024-dtype1",
    "test_penalties_are_the_reference_to_the_bit": "[1003]", "test_a_row_without_an_answer_gives_minus_one": "[200-columns2]",
    "test_greedy_takes_the_best_and_the_lowest_of_equals": "[49152]", "test_logprobs_are_the_same_bits_in_any_batch": "[5]",
}
# The large ones among the chosen: they come last, so that what there is no time for is one of them.
LAST = ("wide_cut", "mislead", "same_bits", "same_alone", "bits_do_not_depend", "mixed_with_prompts", "thousand", "looks_ahead")
# What a module loops over inside a case. With these test_gemm.py makes 413 launches instead of 1,950 and test_gemm_tile.py 250 of
# 1,714: at the 14 ms of memcheck that was seen (27 s for 1,950), and five to ten times that for racecheck, both end in time.
LOOPS: dict[str, dict[str, Any]] = {
    "test_gemm": {"ROWS": (1, 9, 17, 64)},
    "test_gemm_tile": {"ROWS": (1, 17, 40, 128), "GATED_SHAPES": ((8, 8), (200, 1016), (1000, 264), (1024, 512))},
    "test_attention_decode": {"ROOMS": (None,)},  # after two runs with room for partial results
    "test_activation": {"WIDTHS": (7, 100, 3072, 14337, 33000)},
}
_left: list[str] = []
_reporter: Any = None


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keep one case of each function, and shorten what it loops over."""
    tool = os.environ.get("SANITIZER", "memcheck")
    kept: dict[str, Any] = {}
    for item in items:
        name, _, case = item.nodeid.partition("[")
        function = name.rpartition("::")[2]
        if any(word in function for word in (*NEVER, *REPEATS[tool])):
            continue
        wanted = (CASES[function],) if function in CASES else ("odd", "small")
        fits = any(word in f"[{case}" for word in wanted)
        if name not in kept or (fits and not kept[name][0]):
            kept[name] = (fits, item)
    chosen = sorted((item for _, item in kept.values()), key=lambda item: any(word in item.nodeid for word in LAST))
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
    for module in {item.module for item in chosen}:
        for name, value in LOOPS.get(module.__name__.rpartition(".")[2], {}).items():
            assert hasattr(module, name), f"{module.__name__} has no {name} any more"
            setattr(module, name, value)


def pytest_runtest_logstart(nodeid: str) -> None:
    """Name a case as it begins, should it never end."""
    if _reporter is not None:
        _reporter.write(f"\n{BEGINS}{nodeid}\n")


def pytest_runtest_setup(item: Any) -> None:
    """Leave out what there is no time for."""
    if time.monotonic() > STARTED + SECONDS:
        _leave(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: Any) -> Generator[None, object, object]:
    """End what does not end in time. The signal comes between two calls of Python: a kernel that hangs is for who started us."""
    signal.signal(signal.SIGALRM, lambda *_: _leave(item))
    signal.setitimer(signal.ITIMER_REAL, max(0.01, STARTED + SECONDS - time.monotonic()))
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _leave(item: Any) -> None:
    _left.append(item.name)
    pytest.skip("no time left under the sanitizer")


def pytest_sessionstart(session: Any) -> None:
    """Take the reporter: what is printed past it is captured."""
    global _reporter
    _reporter = session.config.pluginmanager.get_plugin("terminalreporter")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name what was left out."""
    if _left:
        terminalreporter.write_line(LEFT + ", ".join(_left))


