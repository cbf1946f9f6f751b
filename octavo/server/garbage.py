"""The garbage collector of the server's processes.

Owns when it comes; it does not know what is allocated. Invariant: what a process was made of when it got ready is never
looked at again.
"""

import gc

YOUNG, MIDDLE, OLD = 20_000, 20, 20


def spare() -> None:
    """Collect once, and from now on only what is new, and not as often as for small programs.

    To be called when a process is ready: a look at everything takes a tenth of a second, in which no token leaves.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, MIDDLE, OLD)
