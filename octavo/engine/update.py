"""Update: a StepResult becomes tokens, published blocks, ends of sequences and the words of a StepOutput.

Owns what a token means (an end token, a stop id, the limit); it does not plan and does not know text. The common case is
vectorised: tokens are written, lengths moved and ends found for all rows at once; Python touches rows that publish a block,
end, ask for logprobs or stream.

Invariant: a token lands in the sequence that the step was planned for, or nowhere: rows are matched by (row, generation),
and a sequence that left its row meanwhile is found among the departed.
"""

import numpy as np
import numpy.typing as npt

from octavo.engine.beam import Candidate
from octavo.engine.request import Request, Sequence, Status
from octavo.engine.rows import HOST, Index
from octavo.engine.state import EngineState, StepRecord
from octavo.messages import TokenLogprobs
from octavo.plan import Int32, RowLogprobs, StepResult

BAD_LOGITS = (
    "No token could be sampled: the logits were not finite, every token was masked, or a logits processor failed.")

BAD_GRAMMAR = "The grammar of structured_outputs could not be followed to its end:"

Marks = dict[int, TokenLogprobs]
"""By identity of the sequence, the logprobs of the token that it got in this step."""

Departed = tuple[int, int, Sequence]
"""The row that a sequence had, its place among the sampled tokens of the step or -1, and the sequence."""


def apply_result(state: EngineState, record: StepRecord, result: StepResult) -> None:
    """Fold the result of the step that ``record`` describes into the state."""
    table = state.table
    rows, ends = record.rows, record.ends
    departed = _take_departed(state, record)
    same = record.sample_rows is rows
    if result.bad.size:  # first of all: what such a row has computed must not be published
        _fail_bad(state, record, result.bad, departed)
        same = False
    live = table.generation.take(rows) == record.generations
    if not live.all():
        rows, ends = rows[live], ends[live]
    table.written[rows] = ends
    if record.saved is not None:
        state.tier.confirm(record.saved)
    if state.cache.enabled:
        full = (ends >= table.next_publish.take(rows)).nonzero()[0]
        if full.size:
            _publish(state, rows[full], ends[full])
    marks = _logprobs(state, record, result.logprobs, departed) if result.logprobs else {}
    if result.prompt_logprobs:
        _prompt_logprobs(state, record, result.prompt_logprobs)
    if not same:
        live = table.generation.take(record.sample_rows) == record.sample_generations
    _append_tokens(state, record.sample_rows, result.tokens, live, marks)
    for _, place, sequence in departed:
        if sequence.status is not Status.ENDED:
            _append_apart(state, sequence, int(result.tokens[place]) if place >= 0 else -1, marks)
    if state.num_host_rows:
        _advance_beams(state, record)
    state.out.num_prompt_tokens += record.num_prompt_tokens


def fail_step(state: EngineState, record: StepRecord, error: BaseException) -> None:
    """End the requests that took part in a step that raised; what it should have written, saved or restored is not published."""
    message = f"A step of the engine failed ({type(error).__name__})."
    hit: dict[int, Request] = {}
    for rows, generations in ((record.rows, record.generations), (record.sample_rows, record.sample_generations)):
        for row in rows[state.table.generation.take(rows) == generations].tolist():
            owner = state.sequences[row]
            assert owner is not None
            hit[id(owner.request)] = owner.request
    for (row, generation), sequence in list(state.departed.items()):
        if record.involves(row, generation):
            del state.departed[row, generation]
            hit[id(sequence.request)] = sequence.request
    if record.saved is not None:
        state.tier.abandon(record.saved)
    for sequence in record.swapped:  # the copy in host memory may be missing: its blocks are computed again
        if sequence.status is Status.WAITING:
            state.host_release += sequence.host_blocks
            sequence.host_blocks, sequence.computed = [], 0
    for request in hit.values():
        if request.id in state.requests:
            state.end_request(request, "error", message)


def _publish(state: EngineState, rows: Index, ends: Int32) -> None:
    """Give names to the blocks of ``rows`` that are full up to ``ends``."""
    table, cache, size = state.table, state.cache, state.block_size
    published = table.next_publish.take(rows) // size - 1
    full = ends // size
    table.next_publish[rows] = (full + 1) * size
    one = full == published + 1
    chains = []
    for i, row in enumerate(rows.tolist()):
        sequence = state.sequences[row]
        assert sequence is not None
        if one[i] and len(sequence.digests) == published[i]:
            chains.append((sequence.digests, sequence.request.root))
        else:
            one[i] = False
            cache.publish(sequence.digests, sequence.request.root, table.tokens[row], table.blocks[row],
                          int(published[i]), int(full[i]))
    if chains:
        if len(chains) < len(rows):
            rows, published = rows[one], published[one]
        tokens = table.tokens[rows[:, None], published[:, None] * size + np.arange(size)]
        cache.publish_each(chains, tokens, table.blocks[rows, published])


def _append_tokens(
    state: EngineState, rows: Index, tokens: Int32, live: npt.NDArray[np.bool_], marks: Marks) -> None:
    """Append the sampled tokens to the rows that still belong to who sampled them, and end those that are done."""
    table, out = state.table, state.out
    if state.num_host_rows:
        live = live & ~table.beams.take(rows)
    if not live.all():
        rows, tokens = rows[live], tokens[live]
    if not rows.size:
        return
    at = table.known.take(rows)
    table.tokens[rows, at] = tokens
    at += 1
    table.known[rows] = at
    stops = table.stops
    done = stops[0].take(rows) == tokens
    for column in stops[1:]:
        done |= column.take(rows) == tokens
    done |= at >= table.limit.take(rows)
    if table.num_many_stops:
        for i in np.flatnonzero(table.many_stops.take(rows)).tolist():
            owner = state.sequences[int(rows[i])]
            assert owner is not None
            done[i] |= int(tokens[i]) in owner.request.stop_set
    out.num_generated_tokens += len(rows)
    streaming = table.streams.take(rows).nonzero()[0]
    if streaming.size:
        _stream(state, rows[streaming], tokens[streaming], marks)
    ended = done.nonzero()[0]
    if ended.size:
        for row, token in zip(rows[ended].tolist(), tokens[ended].tolist(), strict=True):
            sequence = state.sequences[row]
            assert sequence is not None
            _end(state, sequence, token)


def _end(state: EngineState, sequence: Sequence, token: int) -> None:
    request = sequence.request
    if token in request.stop_set:
        state.finish(sequence, "stop", None if token in request.end_ids else token)
    else:
        state.finish(sequence, "length")


def _stream(state: EngineState, rows: Index, tokens: Int32, marks: Marks) -> None:
    """Say the tokens of streaming rows; the list of names is made anew only when other rows stream than last time."""
    out, kept = state.out, state.stream_names
    generations = state.table.generation.take(rows)
    if kept is None or not (np.array_equal(kept[0], rows) and np.array_equal(kept[1], generations)):
        names = [s.streamed for r in rows.tolist() if (s := state.sequences[r]) is not None]
        kept = state.stream_names = (rows, generations, names)
    if out.streamed:  # an output that was not collected yet goes on
        out.streamed = [*out.streamed, *kept[2]]
        out.tokens = np.concatenate((out.tokens, tokens))
    else:
        out.streamed, out.tokens = kept[2], tokens
    if marks or out.logprobs:
        out.logprobs += [None] * (len(out.streamed) - len(rows) - len(out.logprobs))
        out.logprobs += [marks.get(id(state.sequences[r])) for r in rows.tolist()]


def _append_apart(state: EngineState, sequence: Sequence, token: int, marks: Marks) -> None:
    """The token of a step that was under way when its sequence left the row."""
    if token < 0:
        return
    assert sequence.tokens is not None
    sequence.tokens = np.append(sequence.tokens, np.int32(token)).astype(np.int32)
    request, out = sequence.request, state.out
    out.num_generated_tokens += 1
    if request.stream:
        before = len(out.streamed)
        out.streamed = [*out.streamed, sequence.streamed]
        out.tokens = np.array([token], np.int32) if out.tokens is None else np.append(out.tokens, np.int32(token))
        if marks or out.logprobs:
            out.logprobs += [None] * (before - len(out.logprobs))
            out.logprobs.append(marks.get(id(sequence)))
    if token in request.stop_set or len(sequence.tokens) >= request.max_total:
        _end(state, sequence, token)


def _take_departed(state: EngineState, record: StepRecord) -> list[Departed]:
    """Sequences that left their rows while this step was under way."""
    if not state.departed:
        return []
    found: list[Departed] = []
    for (row, generation), sequence in state.departed.items():
        places = np.flatnonzero((record.sample_rows == row) & (record.sample_generations == generation))
        found.append((row, int(places[0]) if places.size else -1, sequence))
    state.departed = {}
    return found


def _owners(state: EngineState, record: StepRecord, departed: list[Departed]) -> dict[int, Sequence]:
    """Who owned each row when the step was planned, of those who are still there."""
    owners: dict[int, Sequence] = {}
    for rows, generations in ((record.rows, record.generations), (record.sample_rows, record.sample_generations)):
        for row in rows[state.table.generation.take(rows) == generations].tolist():
            owner = state.sequences[row]
            assert owner is not None
            owners[row] = owner
    for row, _, sequence in departed:
        owners[row] = sequence
    return owners


def _entry(found: RowLogprobs, i: int) -> TokenLogprobs:
    """Position ``i`` of ``found``: the token itself, then the best ones."""
    top = found.top_tokens[i].tolist()
    return TokenLogprobs(
        [int(found.tokens[i]), *top], [float(found.logprobs[i]), *found.top_logprobs[i].tolist()],
        [int(found.ranks[i]), *range(1, len(top) + 1)])


def _logprobs(state: EngineState, record: StepRecord, found: list[RowLogprobs], departed: list[Departed]) -> Marks:
    """Hand logprobs of sampled tokens to their sequences and candidates to their beams."""
    owners, marks = _owners(state, record, departed), Marks()
    for entry in found:
        sequence = owners.get(entry.row)
        if sequence is None:
            continue
        beams = sequence.request.beams
        if beams is not None:
            if sequence.row >= 0:  # else it lost its row, and will compute and report again
                beams.report(sequence.index, entry)
            continue
        sequence.cumulative += float(entry.logprobs[0])
        params = sequence.request.params
        # With best_of beyond n the front ranks what it cuts at a stop string, and needs the logprob of every token.
        if params.logprobs is not None or sequence.request.width > params.n:
            mark = marks[id(sequence)] = _entry(entry, 0)
            if sequence.logprobs is not None:
                sequence.logprobs.append(mark)
    return marks


def _prompt_logprobs(state: EngineState, record: StepRecord, found: list[RowLogprobs]) -> None:
    """Send prompt logprobs on; positions that were sent before a preemption or an abort are not sent again."""
    for entry in found:
        request = record.scored[entry.row]
        if state.requests.get(request.id) is not request:
            continue
        skip = request.prompt_scored - entry.start
        assert skip >= 0, f"prompt logprobs of {request.id} begin at {entry.start}, {request.prompt_scored} is due"
        if skip < len(entry.tokens):
            state.out.prompt_logprobs.append((request.id, [_entry(entry, i) for i in range(skip, len(entry.tokens))]))
            request.prompt_scored = entry.start + len(entry.tokens)


def _fail_bad(state: EngineState, record: StepRecord, bad: Int32, departed: list[Departed]) -> None:
    """End the requests whose logits were not finite; the others of the step are not touched."""
    owners = _owners(state, record, departed)
    for row in record.sample_rows[bad].tolist():
        sequence = owners.get(row)
        if sequence is not None and sequence.request.id in state.requests:
            failed = "" if sequence.matcher is None else sequence.matcher.error
            state.end_request(sequence.request, "error", f"{BAD_GRAMMAR} {failed:.200}." if failed else BAD_LOGITS)


def _advance_beams(state: EngineState, record: StepRecord) -> None:
    """Move every beam search whose beams have all reported one token on."""
    table, hit = state.table, dict[int, Request]()
    for row in record.sample_rows[table.beams.take(record.sample_rows)].tolist():
        owner = state.sequences[row]
        if owner is not None and owner.request.beams is not None:
            hit[id(owner.request)] = owner.request
    for request in hit.values():
        beams = request.beams
        live = [sequence for sequence in request.sequences if sequence.status is not Status.ENDED]
        assert beams is not None
        indices = [sequence.index for sequence in live]
        if not beams.ready(indices):
            continue
        survivors = beams.advance(indices, [table.output(sequence.row) for sequence in live])
        if survivors:
            _regroup(state, request, live, survivors)
            state.out.num_generated_tokens += len(survivors)
            continue
        for sequence in live:
            state.drop(sequence)
        for end in beams.results(request.id):
            state.report(request, end)
        assert request.id not in state.requests, f"{request.id} is over with too few hypotheses"


def _regroup(state: EngineState, request: Request, live: list[Sequence], survivors: list[Candidate]) -> None:
    """Give every surviving candidate a row: the first child of a beam stays in it, the others fork."""
    table, beams = state.table, request.beams
    assert beams is not None
    parents = {candidate.parent for candidate in survivors}
    for place, sequence in enumerate(live):
        if place not in parents:
            state.drop(sequence)
    indices = iter(sorted(set(range(request.width)) - {live[place].index for place in parents}))
    heirs: list[tuple[Sequence, float]] = []
    stay: list[tuple[Sequence, int]] = []
    seen: set[int] = set()
    for candidate in survivors:
        sequence = live[candidate.parent]
        if candidate.parent in seen:
            tokens = np.append(table.known_tokens(sequence.row), np.int32(candidate.token)).astype(np.int32)
            child = Sequence(request, next(indices), tokens, list(sequence.digests))
            state.fork(sequence, child)
            table.state[child.row] = HOST
            sequence = child
        else:
            seen.add(candidate.parent)
            stay.append((sequence, candidate.token))
        heirs.append((sequence, candidate.total))
    for sequence, token in stay:
        row = sequence.row
        table.tokens[row, table.known[row]] = token
        table.known[row] += 1
        table.length[row] += 1
        state.forced.append((sequence, token))
    request.sequences = [sequence for sequence, _ in heirs]
    beams.adopt([(sequence.index, total) for sequence, total in heirs])
