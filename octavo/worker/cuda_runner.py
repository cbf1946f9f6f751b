"""CudaRunner: plans in, results out, on a GPU that is never waited for but once a step.

Owns the model, the pools, the rows and the order of a step: changes of the rows, moves of blocks, forward, sampling. A step is
launched and left to itself; its tokens stay in the rows of the device, where the next step finds them, and come to the host
through pinned memory. Decode steps and small mixed steps are replayed graphs, one for the forward pass and one for sampling;
larger ones, and the sampling of mixed steps and of rows that ask for more than a token, are launched kernel by kernel.

What a failed step leaves is as in ModelRunner: the tables as if it had succeeded, with token 0; a device whose context is lost
ends the engine. Invariants: everything that computes runs on one stream, in the order of the plans (blocks move beside it, see
BlockMover); the only waits are for the event at the end of a step (DevicePending), for edits that must see a row's last token,
and for changes that do not fit one array of staging; after the constructor no kernel of the common path allocates memory.
"""

import gc
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from octavo import ops
from octavo.config import EngineConfig
from octavo.errors import DeviceLost
from octavo.layers.workspace import Arena
from octavo.log import get_logger
from octavo.models import registry
from octavo.models.decoder import Decoder
from octavo.models.loader import load_model
from octavo.models.source import ModelSource
from octavo.plan import Constraint, GroupInfo, Int32, StepPlan
from octavo.worker import staging
from octavo.worker.attention_sizes import attention_sizes
from octavo.worker.cuda_sampler import CudaSampler
from octavo.worker.device import SLOTS, DeviceRows
from octavo.worker.gpu import Gpu
from octavo.worker.graphs import MIXED_SIZES, sizes
from octavo.worker.logit_edits import LogitEdits, Processor
from octavo.worker.memory import MemoryPlan, plan_memory, resolve_dtype, step_bytes
from octavo.worker.mover import BlockMover
from octavo.worker.pairs import checked_pairs
from octavo.worker.pending import DevicePending
from octavo.worker.tables import Index, Tables

logger = get_logger(__name__)


class CudaRunner:
    """One GPU: weights, KV and rows.

    Args:
        config: options. source: the model. decoder, gpu: used instead of making them (tests).

    Attributes:
        info: what the engine has to know. memory: the table behind it. kv: as in ModelRunner.
        steps, graph_steps: steps that computed something, and those of them whose forward pass was a replayed graph.

    Raises:
        ConfigError: an option does not fit this machine. ModelError: the checkpoint cannot be used.
    """

    def __init__(
        self, config: EngineConfig, source: ModelSource, decoder: Decoder | None = None, gpu: Gpu | None = None
    ) -> None:
        self._gpu = gpu = gpu or Gpu(config)
        spec = registry.spec(source.config) if decoder is None else decoder.spec
        self.memory: MemoryPlan = plan_memory(spec, config, resolve_dtype(config, source), gpu.memory())
        for note in self.memory.notes:
            logger.info(note)
        m, device = self.memory, gpu.name
        self._stream = gpu.stream()
        with gpu.use(self._stream), torch.inference_mode():
            self._decoder = decoder or load_model(source, config, m.dtype, m.max_model_len, device)
            gpu.trim()
            shape = (spec.num_layers, 2, m.num_blocks + 1, m.block_size, spec.num_kv_heads, spec.head_dim)
            self.kv = torch.empty(shape, dtype=m.kv_dtype, device=device)
            self.tables = Tables(m.max_num_seqs, m.max_model_len, m.block_size, m.num_blocks)
            attention = attention_sizes(spec, m.dtype, m.max_num_seqs, m.max_num_batched_tokens, m.max_model_len)
            self._rows = DeviceRows(
                m.max_num_seqs, m.max_num_batched_tokens, self.tables.blocks.shape[1], m.block_size, attention, spec.vocab_size,
                gpu,
            )
            act = self._decoder.act_dtype
            self._arena = Arena(step_bytes(spec, m.max_num_batched_tokens, act), device)
            self._hidden = self._arena.take((m.max_num_batched_tokens, spec.hidden), act)
            self._gathered = torch.empty((m.max_num_seqs, spec.hidden), dtype=act, device=device)
            self._logits = torch.empty((m.max_num_seqs, spec.vocab_size), dtype=torch.float32, device=device)
            self._edits = LogitEdits(self.tables, spec.vocab_size, device, gpu.pinned)
            self._sampler = CudaSampler(
                self.tables, self._edits, self._rows, gpu, processed=config.logprobs_mode == "processed_logprobs")
            self._host = gpu.host_pool((*shape[:2], m.num_host_blocks, *shape[3:]), m.kv_dtype)
            self._mover = BlockMover(self.kv, self._host, m.num_staged, gpu, self._stream)
            self._events = [gpu.event() for _ in range(SLOTS)]
            self._last: DevicePending | None = None
            self._slots: list[DevicePending | None] = [None] * SLOTS
            self._debug = config.debug_checksums
            self.steps = self.graph_steps = 0
            self._row_sizes = sizes(m.max_num_seqs)
            self._mixed_sizes = tuple(size for size in MIXED_SIZES if size <= m.max_num_batched_tokens)
            self._functions: dict[str, Callable[[int], None]] = {
                "decode": partial(self._forward, 1), "mixed": partial(self._forward, None), "all": self._sample_all,
            }
            self._graphs = None if config.enforce_eager else gpu.graphs()
            self._warm_up()
            self._host.start()
        self.info = GroupInfo(
            num_blocks=m.num_blocks, num_host_blocks=m.num_host_blocks, block_bytes=m.block_bytes, block_size=m.block_size,
            max_model_len=m.max_model_len, max_num_seqs=m.max_num_seqs, max_num_batched_tokens=m.max_num_batched_tokens,
            vocab_size=spec.vocab_size, device="cuda",
        )

    def set_processors(
        self, row: int, generation: int, processors: Sequence[Processor], constraint: Constraint | None = None
    ) -> None:
        """Register what the host has for a row before the plan that starts it with this generation."""
        self._edits.set_processors(row, generation, processors, constraint)

    def submit(self, plan: StepPlan) -> DevicePending:
        """Launch one step. What goes wrong while it computes is raised by the pending's ``result``.

        Raises:
            RuntimeError: the plan contradicts the tables.
        """
        with self._gpu.use(self._stream), torch.inference_mode():
            started = time.perf_counter()
            earlier = self._slots[plan.step % SLOTS]
            if earlier is not None:  # its staging and its results are about to be written again
                earlier.settle()
            self.tables.apply(plan)
            self._edits.apply(plan)
            pending = DevicePending(self, plan, started, self._last)
            self._move(plan, pending)
            if plan.rows.size:
                self._compute(plan, pending)
            else:
                self._send(plan, pending.slot, staging.NONE, staging.NONE, staging.NONE)
            if self._debug:
                pending.checksum = self._checksum()
            self._events[pending.slot].record(self._stream)
            self._host.stepped()
            self._last = self._slots[pending.slot] = pending
            return pending

    def close(self) -> None:
        """Wait for the device and give its memory and the host's back; nothing can be submitted afterwards."""
        try:
            self._stream.synchronize()
            self._mover.settle()
            for pending in self._slots:
                if pending is not None:
                    pending.settle()
        finally:
            self._host.close()
            self._slots, self._last, self._graphs, self._functions = [None] * SLOTS, None, None, {}
            for name in ("kv", "_decoder", "_rows", "_arena", "_hidden", "_gathered", "_logits", "_edits", "_sampler", "_host",
                         "_mover"):
                delattr(self, name)
            gc.collect()  # tensors and functions refer to each other
            self._gpu.trim()

    def host_ready(self) -> bool:
        """Whether blocks can move to host memory without waiting for it first."""
        return self._host.ready

    def expect_host(self) -> None:
        """Blocks will move to host memory before long."""
        self._host.expect()

    def wait(self, slot: int) -> None:
        """Wait for the end of the step that uses a slot.

        Raises:
            DeviceLost: the device's context is lost.
        """
        try:
            self._events[slot].synchronize()
        except torch.AcceleratorError as error:
            raise DeviceLost(f"the GPU's context is lost: {error}") from error

    def done(self, slot: int) -> bool:
        """Whether it has ended."""
        return bool(self._events[slot].query())

    def tokens(self, slot: int, num: int) -> Int32:
        """What it sampled."""
        return self._rows.result(slot, num)

    def _compute(self, plan: StepPlan, pending: DevicePending) -> None:
        self.tables.check(plan)
        self.steps += 1
        rows = plan.sample_rows.astype(np.intp)
        try:
            self._launch(plan, rows, pending)
        except torch.AcceleratorError as error:
            raise DeviceLost(f"the GPU's context is lost: {error}") from error
        except Exception as error:
            pending.error = error
            self._pass_over(plan, rows)
            # The step that was planned meanwhile counts on this one's changes, which may not have reached the device: once more.
            self._stream.synchronize()
            self._send(plan, pending.slot, staging.NONE, staging.NONE, staging.NONE)
            return
        pending.expect(rows, self.tables)
        self._pass_over(plan, rows)  # what the tokens are is known later

    def _launch(self, plan: StepPlan, sampling: Index, pending: DevicePending) -> None:
        num_seqs = len(plan.rows)
        starts = np.zeros(num_seqs + 1, np.int64)
        np.cumsum(plan.counts, out=starts[1:])
        num_tokens = int(starts[-1])
        self._send(plan, pending.slot, plan.rows, staging.token_ids(plan, self.tables, starts), starts)
        self._run_forward(num_tokens, num_seqs, int(plan.counts.max()))
        self._prompts(plan, starts, num_tokens, pending)
        num = len(sampling)
        if not num:
            return
        if self._sampler.asks(sampling):
            if pending.before is not None and self._edits.needs_output(sampling):
                pending.before.settle()
            self._edits.begin(sampling)
            pending.finish = self._sampler.sample(plan, self._some_logits(num))
            return
        in_order = num == num_tokens and bool((plan.sample_from == np.arange(num)).all())
        if in_order:
            self._run("all", self._row_sizes, num)
        else:
            self._sample_some(num)

    def _send(self, plan: StepPlan, slot: int, rows: Int32, ids: Int32, starts: Index | Int32) -> None:
        """Pack the plan and copy it to the device; more changes than one array holds go ahead of it."""
        *ahead, last = staging.changes(plan)
        host = self._rows.staging[slot]
        for part in ahead:
            self._rows.send(slot, staging.pack(host, slot=slot, changed=part))
            self._rows.begin(0, 0, 0)
            self._stream.synchronize()  # the array is written again: rare, and the only place where that happens
        if not rows.size:
            self._rows.send(slot, staging.pack(host, slot=slot, changed=last, new=staging.parameters(plan.new)))
            self._rows.begin(0, 0, 0)
            return
        beam = self.tables.beam.take(plan.sample_rows)
        samples = np.where(beam, np.int32(-1), plan.sample_rows) if beam.any() else plan.sample_rows
        length = staging.pack(
            host, slot=slot, rows=rows, starts=plan.starts, counts=plan.counts, ids=ids, changed=last,
            new=staging.parameters(plan.new), samples=samples, sources=(starts[plan.sample_from + 1] - 1).astype(np.int32),
            places=plan.sample_pos,
        )
        self._rows.send(slot, length)

    def _run_forward(self, num_tokens: int, num_seqs: int, max_query: int) -> None:
        if max_query == 1:
            replayed = self._run("decode", self._row_sizes, num_tokens)
        elif self._mixed_sizes and num_tokens <= self._mixed_sizes[-1]:
            replayed = self._run("mixed", self._mixed_sizes, num_tokens)
        else:
            replayed = False
            self._pass(num_tokens, num_seqs, max_query)
        self.graph_steps += replayed

    def _run(self, key: str, ladder: tuple[int, ...], wanted: int) -> bool:
        """Replay the function at the smallest size of the ladder that fits, or call it; True when it was a replay."""
        size = ladder[bisect_left(ladder, wanted)]
        if self._graphs is None:
            self._functions[key](size)
            return False
        self._graphs.replay(key, size)
        return True

    def _forward(self, max_query: int | None, num_tokens: int) -> None:
        """A forward pass padded to ``num_tokens``; the sequences are as many, or all rows."""
        num_seqs = min(num_tokens, self._rows.num_rows)
        self._pass(num_tokens, num_seqs, max_query or num_tokens)

    def _pass(self, num_tokens: int, num_seqs: int, max_query: int) -> None:
        ids, positions, meta = self._rows.begin(num_tokens, num_seqs, max_query)
        self._arena.restart()
        self._decoder.forward(ids, positions, self.kv, meta, self._arena)

    def _sample_all(self, num: int) -> None:
        """Sample from the first ``num`` hidden states, in order."""
        self._rows.draw(num, self._decoder.logits(self._hidden[:num], self._logits[:num]))
        self._rows.end(num)

    def _sample_some(self, num: int) -> None:
        """Sample from the hidden states that staging names."""
        self._rows.draw(num, self._some_logits(num))
        self._rows.end(num)

    def _some_logits(self, num: int) -> Tensor:
        hidden = torch.index_select(self._hidden, 0, self._rows.sources(num), out=self._gathered[:num])
        return self._decoder.logits(hidden, self._logits[:num])

    def _prompts(self, plan: StepPlan, starts: Index, num_tokens: int, pending: DevicePending) -> None:
        pending.prompts = self._sampler.score_prompts(plan, starts, self._hidden[:num_tokens], self._decoder.logits)

    def _pass_over(self, plan: StepPlan, rows: Index) -> None:
        """Count the step as computed, with token 0 for each of the sampling ``rows``: one that is planned meanwhile fits."""
        beam = self.tables.beam[rows]
        if beam.any():
            rows = rows[~beam]
        self.tables.write(rows, np.zeros(len(rows), np.int32))
        self.tables.advance(plan)

    def _move(self, plan: StepPlan, pending: DevicePending) -> None:
        """Swap out, copy, swap in."""
        device, host = self.memory.num_blocks, self.memory.num_host_blocks
        if len(plan.swap_out):
            pending.swaps += self._mover.out(checked_pairs(plan.swap_out, device, host, "swap out"))
        if len(plan.copies):
            ops.copy_blocks(self.kv, checked_pairs(plan.copies, device, device, "copy"))
        if len(plan.swap_in):
            pending.swaps += self._mover.into(checked_pairs(plan.swap_in, host, device, "swap in"))

    def _warm_up(self) -> None:
        """Run every kernel at the largest step and capture all sizes: milliseconds each. All tokens are padding."""
        m = self.memory
        self._rows.send(0, staging.pack(self._rows.staging[0], slot=0))
        self._pass(m.max_num_batched_tokens, m.max_num_seqs, m.max_num_batched_tokens)
        self._sample_some(m.max_num_seqs)
        if self._graphs is None:
            return
        started = time.perf_counter()
        for key, ladder in (("decode", self._row_sizes), ("all", self._row_sizes), ("mixed", self._mixed_sizes)):
            for size in ladder:
                self._functions[key](size)  # a kernel that is new at this size is loaded outside the capture
                self._graphs.capture(key, size, self._functions[key])
        logger.debug("%d graphs captured in %.2f s", len(self._graphs), time.perf_counter() - started)
        self._stream.synchronize()

    def _checksum(self) -> int:
        """Of the host's tables, after the block tables of the device were compared with them."""
        rows = self.tables.active()
        device = self._rows.block_tables.cpu().numpy()
        for row in rows.tolist():
            held = self.tables.num_blocks[row]
            if not np.array_equal(device[row, :held], self.tables.blocks[row, :held]):
                raise RuntimeError(f"block tables of row {row} differ between host and device.")
        return self.tables.checksum()
