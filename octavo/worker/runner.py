"""ModelRunner: a plan in, a result out, on a CPU.

Owns the model, the KV pool, the host pool and the order of a step; it does not know requests, text or who sends plans.
Order: identity, changes of the rows, moves of blocks, the decoder, sampling, and only then the new lengths.

A step that fails while it computes leaves the tables as if it had succeeded, with token 0 for every row that samples:
the host ends the requests of that step and no other, and a step that was planned meanwhile still fits. A plan whose
changes contradict the tables (see Tables.apply) is another matter: host and device have parted, and the group has to be
started again.

Invariant: KV that a step reads was written by that step or an earlier one; the pools are never initialised.
"""

import time
from collections.abc import Sequence

import numpy as np
import torch

from octavo import ops
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.log import get_logger
from octavo.models import registry
from octavo.models.decoder import Decoder
from octavo.models.loader import load_model
from octavo.models.source import ModelSource
from octavo.plan import Constraint, GroupInfo, StepPlan, StepResult
from octavo.worker.batch import build
from octavo.worker.logit_edits import LogitEdits, Processor
from octavo.worker.machine import machine_memory
from octavo.worker.memory import MemoryPlan, plan_memory, resolve_dtype
from octavo.worker.pairs import checked_pairs
from octavo.worker.sampler import Sampler
from octavo.worker.tables import Tables

logger = get_logger(__name__)


def check_cpu(config: EngineConfig) -> None:
    """ConfigError when this machine or this version cannot do what the options ask of a CPU; nothing is loaded."""
    if config.batch_invariant and not ops.built():
        raise ConfigError(
            f"batch_invariant needs the compiled kernels, and they are not built. {ops.REBUILD}", "batch_invariant"
        )


class ModelRunner:
    """One device: weights, KV and rows.

    Args:
        config: options. source: the model. decoder: used instead of loading one (tests).

    Attributes:
        info: what the engine has to know. memory: the table behind it.
        kv, host_kv: [num_layers, 2, blocks, block_size, kv_heads, head_dim]; kv has one scratch block beyond those that
            a plan names.

    Raises:
        ConfigError: an option does not fit this machine. ModelError: the checkpoint cannot be used.
    """

    def __init__(self, config: EngineConfig, source: ModelSource, decoder: Decoder | None = None) -> None:
        check_cpu(config)
        spec = registry.spec(source.config) if decoder is None else decoder.spec
        self.memory: MemoryPlan = plan_memory(spec, config, resolve_dtype(config, source), machine_memory())
        for note in self.memory.notes:
            logger.info(note)
        m = self.memory
        self._decoder = decoder or load_model(source, config, m.dtype, m.max_model_len)
        shape = (spec.num_layers, 2, m.num_blocks + 1, m.block_size, spec.num_kv_heads, spec.head_dim)
        self.kv = torch.empty(shape, dtype=m.kv_dtype)
        self.host_kv = torch.empty((*shape[:2], m.num_host_blocks, *shape[3:]), dtype=m.kv_dtype)
        self.tables = Tables(m.max_num_seqs, m.max_model_len, m.block_size, m.num_blocks)
        self._edits = LogitEdits(self.tables, spec.vocab_size)
        self._sampler = Sampler(self.tables, self._edits, processed=config.logprobs_mode == "processed_logprobs")
        self._debug = config.debug_checksums
        self.info = GroupInfo(
            num_blocks=m.num_blocks,
            num_host_blocks=m.num_host_blocks,
            block_bytes=m.block_bytes,
            block_size=m.block_size,
            max_model_len=m.max_model_len,
            max_num_seqs=m.max_num_seqs,
            max_num_batched_tokens=m.max_num_batched_tokens,
            vocab_size=spec.vocab_size,
            device="cpu",
        )

    def set_processors(
        self, row: int, generation: int, processors: Sequence[Processor], constraint: Constraint | None = None
    ) -> None:
        """Register what the host has for a row before the plan that starts it with this generation."""
        self._edits.set_processors(row, generation, processors, constraint)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Do one step.

        Raises:
            RuntimeError: the plan contradicts the tables, or an operator refused its input; what then holds is written
                at the top of this file.
        """
        result = StepResult(epoch=plan.epoch, step=plan.step)
        self.tables.apply(plan)
        self.tables.check(plan)
        try:
            self._compute(plan, result)
        except Exception:
            self._pass_over(plan)
            raise
        self.tables.advance(plan)
        if self._debug:
            result.checksum = self.tables.checksum()
        return result

    def _compute(self, plan: StepPlan, result: StepResult) -> None:
        self._edits.apply(plan)
        self._edits.begin(plan.sample_rows.astype(np.intp))
        result.swap_seconds = self._move(plan)
        if plan.rows.size:
            started = time.perf_counter()
            self._forward(plan, result)
            result.seconds = time.perf_counter() - started

    def _forward(self, plan: StepPlan, result: StepResult) -> None:
        batch = build(plan, self.tables)
        hidden = self._decoder.forward(batch.ids, batch.positions, self.kv, batch.meta)
        result.prompt_logprobs = self._sampler.score_prompts(plan, batch, hidden, self._decoder.logits)
        if plan.sample_rows.size:
            logits = self._decoder.logits(hidden if batch.logits is None else hidden[batch.logits])
            if batch.logits_of is not None:  # siblings: one row of logits, several draws
                logits = logits[batch.logits_of]
            sampled = self._sampler.sample(plan, logits)
            result.tokens, result.bad, result.logprobs = sampled.tokens, sampled.bad, sampled.logprobs

    def _pass_over(self, plan: StepPlan) -> None:
        """Count a failed step's tokens as computed and sampled, token 0 each: a step that was planned before the host
        could know of the failure still fits, and costs only the requests that have failed."""
        rows = plan.sample_rows.astype(np.intp)
        rows = rows[~self.tables.beam[rows]]
        nothing = np.zeros(len(rows), np.int32)
        self._edits.advance(rows, nothing)
        self.tables.write(rows, nothing)
        self.tables.advance(plan)

    def _move(self, plan: StepPlan) -> float:
        """Swap out, copy, swap in; the seconds that swapping took."""
        seconds = 0.0
        device, host = self.memory.num_blocks, self.memory.num_host_blocks
        if len(plan.swap_out):
            started = time.perf_counter()
            ops.swap_blocks(self.kv, self.host_kv, checked_pairs(plan.swap_out, device, host, "swap out"))
            seconds += time.perf_counter() - started
        if len(plan.copies):
            ops.copy_blocks(self.kv, checked_pairs(plan.copies, device, device, "copy"))
        if len(plan.swap_in):
            started = time.perf_counter()
            ops.swap_blocks(self.host_kv, self.kv, checked_pairs(plan.swap_in, host, device, "swap in"))
            seconds += time.perf_counter() - started
        return seconds

