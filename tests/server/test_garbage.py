"""octavo.server.garbage: what a process was made of is not looked at again."""

import gc

from octavo.server import garbage


def test_what_is_there_is_left_alone() -> None:
    before, kept = gc.get_threshold(), [[] for _ in range(1000)]
    try:
        garbage.spare()
        assert gc.get_freeze_count() > len(kept)
        assert not any(one is kept[0] for one in gc.get_objects())
        assert gc.get_threshold() == (garbage.YOUNG, garbage.MIDDLE, garbage.OLD)
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)
