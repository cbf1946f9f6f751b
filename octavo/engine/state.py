"""EngineState: what is true between two steps. Who runs in which row, who waits, who holds which block, what is to be said.

Owns the moves of a sequence (place, leave, fork, drop, end) and keeps rows, pools and queue in step with each other; it
does not decide anything: the scheduler chooses who moves, update finds out who has ended.

Invariant: every block reference belongs to exactly one row's table, every host block reference to one swapped sequence, to
the list of those that the next plan still reads, or to a prefix that the step under way saves; every unfinished sequence is
in a row or in the queue. ``check`` proves it.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from octavo.config import EngineConfig
from octavo.engine.blocks import BlockPool
from octavo.engine.cache import PrefixCache
from octavo.engine.policy import POLICIES, WaitingQueue
from octavo.engine.request import Request, Sequence, Status
from octavo.engine.rows import FREE, HOST, NEVER, PREFILL, Index, RowTable
from octavo.engine.stats import Stats
from octavo.engine.tier import HostTier, Saves
from octavo.messages import SequenceEnd, StepOutput
from octavo.outputs import FinishReason
from octavo.params import LogitsProcessor
from octavo.plan import Constraint, GroupInfo, Int32


@dataclass(slots=True)
class StepRecord:
    """What the host remembers of a submitted step until its result comes.

    Attributes:
        step: number of the plan. rows, generations, ends: who computed, and up to which token.
        sample_rows, sample_generations: who sampled; the very same arrays where everybody who computed did.
        num_decodes, num_prompt_tokens: computed tokens of either kind.
        swapped: sequences whose blocks the step copied to host memory. swapped_bytes: moved in either direction.
        saved: evicted prefixes that the step copied to host memory; their host blocks are reserved until its result comes.
        scored: by row, requests whose prompt logprobs it computes: they are the request's, and count even when the sequence
            in the row has ended meanwhile, since siblings that were forked from it have computed nothing of the prompt.
        processors: rows that start with logits processors or a grammar. checksum: of the rows, in debug mode only.
    """

    step: int
    rows: Index
    generations: Int32
    ends: Int32
    sample_rows: Index
    sample_generations: Int32
    num_decodes: int
    num_prompt_tokens: int
    swapped: list[Sequence] = field(default_factory=list)
    swapped_bytes: int = 0
    saved: Saves | None = None
    scored: dict[int, Request] = field(default_factory=dict)
    processors: list[tuple[int, int, tuple[LogitsProcessor, ...], Constraint | None]] = field(default_factory=list)
    checksum: int | None = None

    def involves(self, row: int, generation: int) -> bool:
        """True when this owner of the row computes or samples in the step."""
        return bool(((self.rows == row) & (self.generations == generation)).any()
                    or ((self.sample_rows == row) & (self.sample_generations == generation)).any())


class EngineState:
    """The state of one engine.

    Args:
        config: options. info: what the group measured.

    Attributes:
        host_ready: whether blocks can move to host memory without waiting for it first. expect_host: asks to make it so.
        table, pool, host_pool, cache, tier, queue: see their files. requests: by id, unfinished ones.
        sequences: per row, its owner. free_rows: a stack. reserved_rows: of them, kept for the beams of running requests.
        prefilling: running sequences with prompt left to compute, in order of admission. forked: rows that may share the
            block they write next. fresh: sequences in rows that no plan has announced. ended: rows to end in the next plan.
        forced: tokens that the host chose, for the next plan. swap_out: pairs for it, with their sequences in swapping.
        departed: by (row, generation), sequences that left a row with a step under way. pending: that step.
        host_release: host blocks that the next plan still reads. stream_names: who streamed last, with rows and generations.
    """

    def __init__(self, config: EngineConfig, info: GroupInfo, host_ready: Callable[[], bool] = lambda: True,
                 expect_host: Callable[[], None] = lambda: None) -> None:
        self.config, self.info, self.host_ready, self.expect_host = config, info, host_ready, expect_host
        self.block_size = info.block_size
        self.table = RowTable(info.max_num_seqs, info.max_model_len, info.block_size)
        self.pool = BlockPool(info.num_blocks)
        self.host_pool = BlockPool(info.num_host_blocks)
        self.cache = PrefixCache(self.pool, info.block_size, enabled=config.enable_prefix_caching)
        self.tier = HostTier(self.pool, self.host_pool, enabled=config.enable_prefix_caching, ready=host_ready)
        self.policy = POLICIES[config.scheduling_policy]()
        self.queue = WaitingQueue(self.policy)
        self.requests: dict[str, Request] = {}
        self.sequences: list[Sequence | None] = [None] * info.max_num_seqs
        self.free_rows = list(range(info.max_num_seqs - 1, -1, -1))
        self.reserved_rows = 0
        self.prefilling: list[Sequence] = []
        self.forked: set[int] = set()
        self.fresh: list[Sequence] = []
        self.ended: list[int] = []
        self.forced: list[tuple[Sequence, int]] = []
        self.swap_out: list[tuple[int, int]] = []
        self.swapping: list[Sequence] = []
        self.departed: dict[tuple[int, int], Sequence] = {}
        self.pending: StepRecord | None = None
        self.host_release: list[int] = []
        self.stream_names: tuple[Index, Int32, list[tuple[str, int]]] | None = None
        self.changed = True  # which rows decode has changed since somebody looked
        self.num_host_rows = 0
        self.out = StepOutput()
        self.stats = Stats(kv_blocks=info.num_blocks)

    # -- rows ----------------------------------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        """Rows with an owner."""
        return len(self.sequences) - len(self.free_rows)

    def row_is_free(self, request: Request) -> bool:
        """True when a sequence of ``request`` may take a row: beams need one for each of them at the start."""
        if request.beams is None:
            return len(self.free_rows) > self.reserved_rows
        return request.beams.num_rows > 0 or len(self.free_rows) - self.reserved_rows >= request.width

    def place(self, sequence: Sequence, blocks: list[int], computed: int, published: int) -> None:
        """Give a row to a waiting sequence: ``blocks`` are its own now and hold ``computed`` tokens.

        Args:
            published: how many of the blocks need no publishing any more.
        """
        request, table, row = sequence.request, self.table, self.free_rows.pop()
        assert sequence.tokens is not None and sequence.status is Status.WAITING
        next_publish = (published + 1) * self.block_size if self.cache.enabled else int(NEVER)
        table.place(row, sequence.tokens, request.num_prompt, computed, blocks, request.max_total, next_publish)
        table.set_kind(row, request.stop_ids, streams=request.stream, beam=request.beams is not None)
        sequence.row, sequence.status, sequence.tokens, sequence.announced = row, Status.RUNNING, None, False
        sequence.computed = 0
        self.sequences[row] = sequence
        self.fresh.append(sequence)
        self.num_host_rows += request.host_bound
        self.changed = True
        beams = request.beams
        if beams is not None:
            self.reserved_rows += -1 if beams.num_rows else request.width - 1
            beams.num_rows += 1

    def leave(self, sequence: Sequence) -> None:
        """Take the row from a running sequence and give its blocks back; its tokens are the caller's to keep."""
        request, row = sequence.request, sequence.row
        if self.table.state[row] == PREFILL and sequence in self.prefilling:
            self.prefilling.remove(sequence)
        if sequence.announced:
            self.ended.append(row)
        else:
            self.fresh.remove(sequence)
        if request.host_bound:
            self.num_host_rows -= 1
            self.forced = [entry for entry in self.forced if entry[0] is not sequence]
        self.forked.discard(row)
        self.pool.release(self.table.clear(row))
        self.sequences[row] = None
        self.free_rows.append(row)
        sequence.row = -1
        self.changed = True
        beams = request.beams
        if beams is not None:
            beams.num_rows -= 1
            self.reserved_rows += 1 if beams.num_rows else 1 - request.width

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Place ``child`` with the blocks and the computed tokens of the running ``parent``; nothing is copied yet."""
        table, row = self.table, parent.row
        computed = int(table.computed[row])
        count = -(-computed // self.block_size)
        blocks: list[int] = table.blocks[row, :count].tolist()
        self.pool.share(blocks)
        self.place(child, blocks, computed, computed // self.block_size)
        table.written[child.row] = table.written[row]
        if computed % self.block_size:
            self.forked.update((row, child.row))

    def park(self, sequence: Sequence) -> None:
        """Take a running sequence out of its row and back into the queue, with what it knows."""
        row, pending = sequence.row, self.pending
        generation = int(self.table.generation[row])
        if pending is not None and pending.involves(row, generation):
            self.departed[row, generation] = sequence
        sequence.tokens = self.table.known_tokens(row)
        self.leave(sequence)
        sequence.status = Status.WAITING
        self.queue.push(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Let an unfinished sequence go, wherever it is, without a word."""
        if sequence.status is Status.RUNNING:
            self.leave(sequence)
        elif sequence.status is Status.WAITING:
            if sequence.host_blocks and sequence in self.swapping:  # no plan has copied them yet, and none shall
                gone = set(sequence.host_blocks)
                self.swap_out = [pair for pair in self.swap_out if pair[1] not in gone]
                self.swapping.remove(sequence)
            self.host_release.extend(sequence.host_blocks)
            sequence.host_blocks = []
            if self.departed:
                self.departed = {key: other for key, other in self.departed.items() if other is not sequence}
        waited = sequence.status is Status.WAITING
        sequence.status, sequence.tokens = Status.ENDED, None
        if waited:
            self.queue.removed()

    # -- ends ----------------------------------------------------------------------------------------------------------

    def finish(
        self, sequence: Sequence, reason: FinishReason, stop_token: int | None = None, error: str | None = None) -> None:
        """End a sequence and report it; the last one of a request closes the request."""
        request = sequence.request
        ids: list[int] = []
        if not request.stream:
            tokens = sequence.tokens
            ids = self.table.output(sequence.row) if tokens is None else tokens[request.num_prompt :].tolist()
        self.drop(sequence)
        self.report(request, SequenceEnd(
            request.id, sequence.index, reason, stop_token, ids, None if request.stream else sequence.logprobs,
            sequence.cumulative if request.sums_logprobs else None, error))

    def report(self, request: Request, end: SequenceEnd) -> None:
        """Say that a continuation has ended; the last one closes the request."""
        self.out.ended.append(end)
        self.stats.finished[end.reason] += 1
        request.unfinished -= 1
        if request.unfinished == 0:
            del self.requests[request.id]
            self.out.finished.append(request.id)

    def end_request(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """End everything that is left of a request."""
        if request.beams is not None:
            for sequence in request.sequences:
                if sequence.status is not Status.ENDED:
                    self.drop(sequence)
            for rank in range(request.params.n - request.unfinished, request.params.n):
                self.report(request, SequenceEnd(request.id, rank, reason, error=error))
            return
        if not request.spawned:
            self.spawn_waiting(request)
        for sequence in request.sequences:
            if sequence.status is not Status.ENDED:
                self.finish(sequence, reason, error=error)

    def spawn_waiting(self, request: Request) -> None:
        """Let the continuations that do not exist yet wait, each for a row of its own."""
        request.spawned = True
        for index in range(len(request.sequences), request.width):
            sequence = Sequence(request, index, digests=list(request.sequences[0].digests))
            request.sequences.append(sequence)
            self.queue.push(sequence)

    def release_host(self) -> None:
        """Give back the host blocks that the plan before this one was the last to read."""
        if self.host_release:
            self.host_pool.release(self.host_release)
            self.host_release = []

    def take_output(self) -> StepOutput:
        """What there is to say; a new page is begun."""
        out, self.out = self.out, StepOutput()
        return out

    def has_news(self) -> bool:
        """True when ``take_output`` would return something that somebody waits for."""
        return bool(self.out.ended or self.out.finished)

    # -- proof ---------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Prove the invariants of rows, pools, queue and requests; O(everything), for tests and idle times."""
        table = self.table
        self.pool.check()
        self.host_pool.check()
        table.check()
        held: Counter[int] = Counter()
        for row, owner in enumerate(self.sequences):
            assert (owner is None) == (table.state[row] == FREE) == (row in self.free_rows), f"row {row}: {owner}"
            if owner is not None:
                assert owner.row == row and owner.status is Status.RUNNING and owner.request.id in self.requests
                mine = table.blocks[row, : table.num_blocks[row]].tolist()
                assert len(set(mine)) == len(mine), f"row {row} holds a block twice: {mine}"
                held.update(mine)
        assert len(set(self.free_rows)) == len(self.free_rows)
        assert [held[b] for b in range(self.pool.num_blocks)] == self.pool.refs, "references and tables differ"
        self._check_writers()
        waiting = list(self.queue)
        hosted = Counter(self.host_release)
        if self.pending is not None and self.pending.saved is not None:
            hosted.update(self.pending.saved.host)
        assert not self.tier.saves.host, "prefixes were evicted without a plan that saves them"
        for sequence in waiting:
            hosted.update(sequence.host_blocks)
            assert sequence.row == -1 and sequence.tokens is not None and sequence.request.id in self.requests
        assert [hosted[b] for b in range(self.host_pool.num_blocks)] == self.host_pool.refs, "host blocks leak"
        assert len(waiting) == len(set(map(id, waiting))) == len(self.queue)
        alive = [s for r in self.requests.values() for s in r.sequences if s.status is not Status.ENDED]
        assert {id(s) for s in alive} == {id(s) for s in waiting} | {id(s) for s in self.sequences if s is not None}
        assert not self.departed, "a result came and its departed sequences did not get it"
        for sequence in self.prefilling:
            assert table.state[sequence.row] == PREFILL and sequence.status is Status.RUNNING
        assert self.num_host_rows == sum(s is not None and s.request.host_bound for s in self.sequences)
        assert 0 <= self.reserved_rows <= len(self.free_rows)

    def _check_writers(self) -> None:
        """No block is written next by two rows, unless both are marked as forked and copy before they write."""
        table = self.table
        for row in np.flatnonzero(table.state != FREE).tolist():
            at = int(table.computed[row])
            if at < table.capacity[row] and at < table.length[row] and table.state[row] <= HOST:
                block = int(table.blocks[row, at // self.block_size])
                assert self.pool.refs[block] == 1 or row in self.forked, f"row {row} would write shared block {block}"
