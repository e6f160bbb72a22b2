"""Threads that work a few items ahead of a loop; the order of the items is kept."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item, Made = TypeVar("Item"), TypeVar("Made")


def prefetched(make: Callable[[Item], Made], items: Iterable[Item], workers: int, ahead: int = 0) -> Iterator[Made]:
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
