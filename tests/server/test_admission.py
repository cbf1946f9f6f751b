"""octavo.server.admission: nothing is counted twice or lost, and Retry-After is what the clock says."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.errors import CapacityError
from octavo.server.admission import MAX_RETRY, MIN_RETRY, WINDOW, Admission, Ticket


class Clock:
    """Seconds that pass when told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def admission(requests: int = 4, tokens: int = 1000, size: int = 10_000) -> tuple[Admission, Clock]:
    clock = Clock()
    return Admission(requests, tokens, size, clock), clock


def refused(call: Callable[[], object]) -> CapacityError:
    with pytest.raises(CapacityError) as info:
        call()
    return info.value


def waiting(door: Admission, tokens: int = 1) -> Ticket:
    ticket = door.enter()
    ticket.wait(tokens)
    return ticket


def served(door: Admission) -> None:
    ticket = waiting(door)
    ticket.begin()
    ticket.leave(done=True)


def test_so_many_wait_and_no_more() -> None:
    door, _ = admission(requests=2)
    first, second = waiting(door), waiting(door)
    assert "2 requests wait already" in str(refused(door.enter))
    first.begin()  # it runs: there is room for one that waits
    third = door.enter()
    third.wait(1)
    assert door.waiting == 2 and len(door.tickets) == 3
    refused(door.enter)
    second.leave()
    door.enter().leave()


def test_who_is_still_being_read_takes_no_place() -> None:
    door, _ = admission(requests=2)
    readers = [door.enter() for _ in range(50)]
    assert door.waiting == 0
    for ticket in readers[:2]:
        ticket.wait(1)
    refused(lambda: readers[2].wait(1))  # but it finds none when it has been read
    assert door.waiting == 2
    readers[2].leave()
    assert door.waiting == 2 and len(door.tickets) == 49


def test_prompt_tokens_that_wait_are_bounded_but_a_long_prompt_alone_is_not() -> None:
    door, _ = admission(tokens=100)
    alone = waiting(door, 5000)
    assert "5000 prompt tokens" in str(refused(lambda: door.enter().wait(1)))
    alone.begin()
    assert door.tokens == 0
    waiting(door, 60)
    waiting(door, 40)
    refused(lambda: door.enter().wait(1))
    assert door.tokens == 100 and door.waiting == 2


def test_bytes_that_are_held_are_bounded_until_the_end_of_a_request() -> None:
    door, _ = admission(size=100)
    first, second = door.enter(), door.enter()
    first.hold(5000)  # alone, as much as it likes
    assert "bytes" in str(refused(lambda: second.hold(1)))
    first.wait(1)
    first.begin()
    refused(lambda: second.hold(1))  # it runs, and its body is still there
    first.leave()
    for size in (10, 60, 100):  # it comes piece by piece
        second.hold(size)
        assert door.bytes == size
    second.leave()
    assert door.bytes == 0


def test_a_closed_door_says_why() -> None:
    door, _ = admission()
    ticket = door.enter()
    door.closed = "The server is shutting down."
    assert str(refused(door.enter)) == "The server is shutting down."
    refused(lambda: ticket.wait(1))


def test_the_oldest_wait() -> None:
    door, clock = admission()
    assert door.oldest_wait() == 0.0
    first = waiting(door)
    clock.now += 2.0
    waiting(door)
    clock.now += 3.0
    assert door.oldest_wait() == 5.0
    first.begin()
    assert door.oldest_wait() == 3.0


def test_retry_after_is_half_of_the_queue_at_the_measured_rate() -> None:
    door, clock = admission(requests=100)
    for _ in range(10):  # one every half second
        served(door)
        clock.now += 0.5
    for _ in range(40):
        waiting(door)
    assert door.retry_after() == pytest.approx(0.5 * 40 / 2.0)
    assert refused(lambda: [door.enter().wait(1) for _ in range(61)]).retry_after == pytest.approx(0.5 * 100 / 2.0)


def test_retry_after_has_bounds() -> None:
    door, clock = admission(requests=10_000, tokens=10**9)
    assert door.retry_after() == MIN_RETRY  # nothing is known
    served(door)
    served(door)
    assert door.retry_after() == MIN_RETRY  # both at once
    clock.now += WINDOW - 1.0
    for _ in range(5000):
        waiting(door)
    assert door.retry_after() == MAX_RETRY
    clock.now += 2.0  # what is longer ago than the window counts no more
    assert door.retry_after() == MIN_RETRY


def test_what_was_not_served_does_not_count_for_the_rate() -> None:
    door, clock = admission(requests=1000)
    for _ in range(50):
        waiting(door).leave()
        clock.now += 0.1
    for _ in range(100):
        waiting(door)
    assert door.retry_after() == MIN_RETRY


STEPS = st.lists(st.tuples(st.sampled_from(["enter", "hold", "wait", "begin", "leave"]), st.integers(0, 7), st.integers(1, 80)),
                 max_size=60)


@given(STEPS)
def test_counts_are_those_of_the_tickets_inside(steps: list[tuple[str, int, int]]) -> None:
    door, _ = admission(requests=3, tokens=100, size=150)
    tickets: list[Ticket] = []
    for name, number, size in steps:
        ticket = tickets[number % len(tickets)] if tickets else None
        try:
            if name == "enter":
                tickets.append(door.enter())
            elif ticket is not None and ticket in door.tickets:
                if name == "hold":
                    ticket.hold(size)
                elif name == "wait" and not ticket.waiting and ticket._tokens == 0:
                    ticket.wait(size)
                elif name == "begin":
                    ticket.begin()
            if name == "leave" and ticket is not None:
                ticket.leave(done=size % 2 == 0)
                ticket.leave()  # again
        except CapacityError as error:
            assert MIN_RETRY <= error.retry_after <= MAX_RETRY
        inside = list(door.tickets)
        assert door.waiting == sum(ticket.waiting for ticket in inside) <= 3
        assert door.tokens == sum(ticket._tokens for ticket in inside if ticket.waiting)
        assert door.bytes == sum(ticket._bytes for ticket in inside)
    for ticket in tickets:
        with ticket:
            pass
    assert (door.waiting, door.tokens, door.bytes, len(door.tickets)) == (0, 0, 0, 0)
