"""Scheduler: who computes which tokens now. ``schedule`` turns the state into a StepPlan.

Owns the order of work in a step (rows that decode, prompts under way, admission from the queue) and the token budget;
it does not know tensors, text or time. There is no prefill phase and no decode phase: a row has tokens without KV,
computes some of them, and samples when it has computed all. Rows with one such token are planned by vectorised numpy;
Python touches those that need a block, start, or compute a chunk.

Invariant: a step computes at most ``max_num_batched_tokens`` tokens, each row's tokens in order without a gap; all
preemption of a step happens before its first block is given out, so a plan never moves a block that it also hands to
somebody.
"""

import math
from collections import Counter

import numpy as np

from octavo.engine.assembly import NO_INTS, NO_ROWS, Assembly, Draft
from octavo.engine.preempt import Preemption
from octavo.engine.request import Request, Sequence
from octavo.engine.rows import DECODE, DRAIN, HOST, PREFILL, Index
from octavo.engine.state import EngineState, StepRecord
from octavo.plan import Int32, StepPlan

MIXED_PROMPT_TOKENS = 512
"""Most prompt tokens of a step in which others decode: near the knee of the GEMMs a step takes little longer than one
that only decodes. When nobody decodes, the whole budget goes to prompts."""

HEADROOM_ROWS = 4
"""Admission leaves a free block for every fourth running row: a row needs one every block_size steps, so a newcomer is
not preempted at once for the growth of those that run already."""

HOST_SOON = 2
"""Host memory is asked for once fewer than one in so many blocks hold nothing: pinning it takes a while."""


class Scheduler:
    """Makes plans.

    Args:
        state: of the engine. epoch: of the group. mixed_tokens: most prompt tokens of a step in which others decode.
    """

    def __init__(self, state: EngineState, epoch: int = 0, *, mixed_tokens: int = MIXED_PROMPT_TOKENS) -> None:
        self.state, self._mixed_tokens = state, mixed_tokens
        self.preemption = Preemption(state)
        self._few_free = state.pool.num_blocks // HOST_SOON
        self.record: StepRecord | None = None
        self._assembly = Assembly(state, epoch)
        self._decoding: Index = NO_ROWS
        self._decoding32: Int32 = NO_INTS

    def schedule(self) -> StepPlan | None:
        """The next plan, and its ``record``; None when there is nothing to compute before the step under way ends."""
        state = self.state
        state.release_host()
        if state.pool.num_free < self._few_free:
            state.expect_host()
        preempted, rows, growing, starts = self._make_room()
        draft = Draft(state.info.max_num_batched_tokens - len(rows), len(rows) > 0)
        assert draft.budget >= 0, "more rows decode than max_num_batched_tokens"
        if state.forked:
            self._copy_on_write(rows, draft)
        if growing.size:
            self._grow(rows[growing], draft)
        samples = self._advance(rows, starts)
        if state.prefilling:
            self._continue_prompts(draft, len(rows))
        if not preempted:  # a victim's last token may be under way: it does not come back before it has got it
            self._admit(draft, len(rows))
            if not len(rows) and not draft.rows and state.pending is None and state.queue.head() is not None:
                self._unblock(draft)
        if not len(rows) and not draft.rows:
            return None
        rows32 = self._decoding32 if rows is self._decoding else rows.astype(np.int32)
        plan, self.record = self._assembly.build(rows, rows32, starts, samples, draft)
        return plan

    # -- rows that decode ----------------------------------------------------------------------------------------------

    def _decode_rows(self) -> Index:
        state, table = self.state, self.state.table
        if state.changed:
            self._decoding = table.in_state(DECODE)
            self._decoding32 = self._decoding.astype(np.int32)
            state.changed = False
        if not state.num_host_rows:
            return self._decoding
        ready = (table.state == HOST) & (table.known == table.length) & (table.length == table.computed + 1)
        return np.concatenate((self._decoding, np.flatnonzero(ready)))

    def _make_room(self) -> tuple[bool, Index, Index, Int32]:
        """Preempt until the rows that decode can have the blocks they need.

        Returns:
            whether somebody was preempted; the rows; which of them need a block at their end; their next tokens.
        """
        state, table, preempted = self.state, self.state.table, False
        while True:
            rows = self._decode_rows()
            starts = table.computed.take(rows)
            growing = np.flatnonzero(starts >= table.capacity.take(rows))
            needed = len(growing) + (self._num_copies(rows) if state.forked else 0)
            if needed <= state.pool.num_available:
                return preempted, rows, growing, starts
            victim = self.preemption.youngest()
            assert victim is not None
            alone = all(s is None or s.request is victim.request for s in state.sequences)
            if alone and (victim.request.beams is not None or state.num_running == 1):
                # Admission has checked that a request fits alone, so this is a bug: it costs that request only.
                state.end_request(victim.request, "error", "The KV pool is too small for this request alone.")
                continue
            self.preemption.preempt(victim)
            preempted = True

    def _num_copies(self, rows: Index) -> int:
        """Blocks that forked rows among ``rows`` need for copies: all sharers of a block but the last one."""
        state, table = self.state, self.state.table
        writers: Counter[int] = Counter()
        for row in state.forked.intersection(rows.tolist()):
            at = int(table.computed[row])
            if at < table.capacity[row]:
                writers[int(table.blocks[row, at // state.block_size])] += 1
        refs = state.pool.refs
        return sum(min(count, refs[block] - 1) for block, count in writers.items())

    def _copy_on_write(self, rows: Index, draft: Draft) -> None:
        """Give forked rows that write now a block of their own, unless they are the last that hold it."""
        state, table, pool = self.state, self.state.table, self.state.pool
        appended: list[tuple[int, int, int]] = []
        for row in sorted(state.forked.intersection(rows.tolist())):
            state.forked.discard(row)
            at = int(table.computed[row])
            if at >= table.capacity[row]:
                continue
            index = at // state.block_size
            block = int(table.blocks[row, index])
            if pool.refs[block] > 1:
                own = pool.take(1)[0]
                draft.copies.append((block, own))
                pool.release([block])
                table.set_block(row, index, own)
                owner = state.sequences[row]
                assert owner is not None
                if owner.announced:
                    appended.append((row, index, own))
        if appended:
            draft.append(*np.array(appended, np.int32).T.copy())

    def _grow(self, rows: Index, draft: Draft) -> None:
        """Append a block to each of ``rows``."""
        state, table = self.state, self.state.table
        blocks = np.array(state.pool.take(len(rows)), np.int32)
        index = table.num_blocks.take(rows)
        table.blocks[rows, index] = blocks
        table.num_blocks[rows] = index + 1
        table.capacity[rows] += state.block_size
        rows32 = rows.astype(np.int32)
        if state.fresh:  # a beam that is announced in this plan brings its block along
            known = np.array([s.announced for r in rows.tolist() if (s := state.sequences[r]) is not None], np.bool_)
            rows32, index, blocks = rows32[known], index[known], blocks[known]
        draft.append(rows32, index, blocks)

    def _advance(self, rows: Index, starts: Int32) -> Int32:
        """Move the lengths of ``rows`` past this step; returns the places of the tokens they sample."""
        state, table = self.state, self.state.table
        ends = starts + 1
        table.computed[rows] = ends
        lengths = ends + 1
        if state.num_host_rows:
            lengths -= table.beams.take(rows)  # the host chooses their next token
        table.length[rows] = lengths
        last = lengths >= table.limit.take(rows)
        if last.any():
            last &= table.state.take(rows) == DECODE
            table.state[rows[last]] = DRAIN
            state.changed = True
        return ends

    # -- prompts -------------------------------------------------------------------------------------------------------

    def _continue_prompts(self, draft: Draft, num_decodes: int) -> None:
        for sequence in list(self.state.prefilling):
            row = sequence.row
            remaining = int(self.state.table.length[row]) - int(self.state.table.computed[row])
            chunk = self._chunk(int(self.state.table.computed[row]), remaining, draft)
            if chunk == 0:
                break
            self._compute(sequence, chunk, remaining, draft, num_decodes)

    def _chunk(self, computed: int, remaining: int, draft: Draft) -> int:
        """Tokens of one prompt in this step; 0 when it has to wait."""
        state = self.state
        config, budget = state.config, draft.budget
        if not config.enable_chunked_prefill and remaining <= state.info.max_num_batched_tokens:
            return remaining if remaining <= budget else 0
        if draft.mixed:
            budget = min(budget, self._mixed_tokens - sum(draft.counts))
        chunk = min(remaining, budget)
        if config.long_prefill_token_threshold:
            chunk = min(chunk, config.long_prefill_token_threshold)
        if chunk <= 0:
            return 0
        if chunk < remaining:  # end at a block where that leaves something to do: others can share from there
            aligned = (computed + chunk) // state.block_size * state.block_size
            chunk = aligned - computed if aligned > computed else chunk
        return chunk

    def _compute(self, sequence: Sequence, chunk: int, remaining: int, draft: Draft, num_decodes: int) -> None:
        """Plan ``chunk`` of the ``remaining`` tokens of a row, and its sampling when that is all."""
        table, row, request = self.state.table, sequence.row, sequence.request
        start = int(table.computed[row])
        source = num_decodes + len(draft.rows)
        draft.compute(row, start, chunk)
        if request.params.prompt_logprobs is not None:
            draft.scored[row] = request
        table.computed[row] = start + chunk
        if chunk < remaining:
            if table.state[row] == PREFILL and sequence not in self.state.prefilling:
                self.state.prefilling.append(sequence)
            return
        if sequence in self.state.prefilling:
            self.state.prefilling.remove(sequence)
        self._sample(sequence, source, start + chunk, draft)
        if not request.spawned and request.beams is None:
            self._spawn(sequence, source, draft)

    def _sample(self, sequence: Sequence, source: int, position: int, draft: Draft) -> None:
        """Let a row sample from the last logits of entry ``source`` of the plan; from now on it decodes."""
        state, table, row = self.state, self.state.table, sequence.row
        draft.sample(row, source, position)
        request = sequence.request
        if request.beams is not None:
            table.state[row] = HOST
            return
        table.length[row] = position + 1
        if position + 1 >= request.max_total:
            table.state[row] = DRAIN
        else:
            table.state[row] = HOST if request.host_bound else DECODE
        state.changed = True

    def _spawn(self, leader: Sequence, source: int, draft: Draft) -> None:
        """The prompt of n continuations is computed: those for which there is a row sample from the same logits."""
        state, request = self.state, leader.request
        request.spawned = True
        for index in range(len(request.sequences), request.width):
            child = Sequence(request, index, digests=list(leader.digests))
            request.sequences.append(child)
            # Each will need a block of its own in the next step.
            if not state.row_is_free(request) or state.pool.num_available <= len(draft.sample_rows):
                state.queue.push(child)
                continue
            state.fork(leader, child)
            self._sample(child, source, request.num_prompt, draft)

    # -- admission -----------------------------------------------------------------------------------------------------

    def _admit(self, draft: Draft, num_decodes: int, *, headroom: bool = True) -> None:
        """Start waiting sequences in their order; the first that does not fit ends admission, so nobody is passed."""
        state = self.state
        while draft.budget > 0:
            head = state.queue.head()
            if head is None or not state.row_is_free(head.request):
                return
            if not self._start(head, draft, num_decodes, headroom):
                return

    def _start(self, sequence: Sequence, draft: Draft, num_decodes: int, headroom: bool) -> bool:
        """Give the head of the queue a row, blocks for all its tokens and its first chunk; False when it must wait."""
        state, request, size = self.state, sequence.request, self.state.block_size
        pool, tokens = state.pool, sequence.tokens
        assert tokens is not None
        if sequence.host_blocks and state.pending is not None and sequence in state.pending.swapped:
            return False  # the step that copies its blocks to host memory may still fail
        total = len(tokens)
        found = self._shared_blocks(sequence, total)
        if found is None:
            return False
        blocks, hosted, cached = found
        fresh = math.ceil(total / size) - len(blocks)
        computed, swapped = (len(blocks) + len(hosted)) * size, 0
        if sequence.computed > computed:
            swapped = math.ceil(sequence.computed / size)
            computed = sequence.computed
            assert computed < total, "a swapped sequence has a token that was not computed yet"
        chunk = self._chunk(computed, total - computed, draft)
        spare = state.num_running // HEADROOM_ROWS if headroom else 0
        if chunk == 0 or fresh + spare + pool.num_idle(blocks) > pool.num_available:
            return False
        state.queue.pop()
        pool.share(blocks)
        num_shared = len(blocks)
        if hosted:  # reserved before ``take``, which may save an evicted prefix in the oldest host block
            state.host_pool.share(hosted)
            state.host_release += hosted
        blocks += pool.take(fresh)
        draft.swap_in += zip(hosted, blocks[num_shared:], strict=False)
        draft.swap_in += [(sequence.host_blocks[i], blocks[i]) for i in range(num_shared, swapped)]
        state.host_release += sequence.host_blocks
        sequence.host_blocks = []
        self._note_start(request, cached * size, len(hosted) * size)
        state.place(sequence, blocks, computed, num_shared)
        self._compute(sequence, chunk, total - computed, draft, num_decodes)
        return True

    def _shared_blocks(self, sequence: Sequence, total: int) -> tuple[list[int], list[int], int] | None:
        """Blocks that a sequence need not compute, host blocks that go on after them, how many of both the cache gave.

        None: a sibling is computing the prompt that they share, so it pays to wait for it; where it also owes the prompt's
        logprobs, nobody else may start, lest the positions that a shared block skips are never scored.
        """
        state, request = self.state, sequence.request
        scorer = request.scorer
        if scorer is not None and scorer is not sequence:
            return None
        blocks: list[int] = []
        hosted: list[int] = []
        reads = scorer is None
        if reads:
            state.cache.extend(sequence.digests, request.root, self._tokens(sequence))
            blocks = state.cache.match(sequence.digests, total)
        cached = len(blocks)
        if request.width > 1:
            table, full = state.table, (min(total, request.num_prompt + 1) - 1) // state.block_size
            for sibling in request.sequences:
                if sibling.row < 0 or len(blocks) >= full:
                    continue
                if table.written[sibling.row] < full * state.block_size:
                    return None
                blocks = table.blocks[sibling.row, :full].tolist()
        if reads and not sequence.host_blocks:  # a swapped sequence has all its blocks, to the last token
            hosted = state.tier.match(sequence.digests, len(blocks), total, state.block_size)
            cached += len(hosted)
        return blocks, hosted, cached

    @staticmethod
    def _tokens(sequence: Sequence) -> Int32:
        assert sequence.tokens is not None
        return sequence.tokens

    def _note_start(self, request: Request, cached: int, hosted: int) -> None:
        """Tell the front that a request has started, once; ``hosted`` of its ``cached`` tokens were in the host tier."""
        if not request.started:
            request.started = True
            stats = self.state.stats
            stats.prefix_queries += request.num_prompt
            stats.prefix_hits += cached
            stats.prefix_hits_host += hosted
            size = self.state.block_size
            if cached + size == request.num_prompt and self.state.cache.holds(request.sequences[0].digests, cached):
                stats.prefix_again += size
            self.state.out.started.append((request.id, cached))

    def _unblock(self, draft: Draft) -> None:
        """Nothing can be computed though somebody waits: beams hold rows or blocks while another beam waits for them.

        The youngest give way until the head of the queue fits; a head that does not fit into an empty pool is a bug.
        """
        state = self.state
        self._admit(draft, 0, headroom=False)
        while not draft.rows:
            head, victim = state.queue.head(), self.preemption.youngest()
            assert head is not None
            if victim is None:
                state.end_request(head.request, "error", "The KV pool is too small for this request alone.")
                return
            self.preemption.preempt(victim)
            self._admit(draft, 0, headroom=False)
