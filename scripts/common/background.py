"""Threads that work ahead of whoever needs the result."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item, Made = TypeVar("Item"), TypeVar("Made")


def prefetch(make: Callable[[Item], Made], items: Iterable[Item], workers: int, ahead: int = 0) -> Iterator[Made]:
    """`map(make, items)` with `workers` threads, `ahead` items or 2 x `workers` ahead, whichever is more; 0 workers: no threads.

    An exception of `make` is raised where its item's turn comes.
    """
    if workers == 0:
        yield from map(make, items)
        return
    pool = ThreadPoolExecutor(workers)
    waiting = deque()
    try:
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > max(ahead, 2 * workers):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def coming(make: Callable[[], Made], *, begins_now: bool) -> Iterator[Callable[[], Made]]:
    """A function that returns what `make` makes: in a thread that begins now, or when it is called."""
    if not begins_now:
        yield make
        return
    pool = ThreadPoolExecutor(1)
    try:
        yield pool.submit(make).result
    finally:
        pool.shutdown(wait=False)  # who stops early does not wait for what nobody wants any more
