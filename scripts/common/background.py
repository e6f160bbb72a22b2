"""Threads that work ahead of the code that needs their results."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")


def prefetch(function: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int = 0) -> Iterator[Result]:
    """`map(function, items)` in `workers` threads, up to max(`ahead`, 2 x `workers`) items ahead; 0 workers: no threads.

    Results keep the order of `items`. An exception is raised where the result of its item is due.
    """
    if workers == 0:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers)
    pending: deque[Future] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > max(ahead, 2 * workers):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class Deferred(Generic[Result]):
    """Like a Future, but `result()` computes the value when it is called."""

    result: Callable[[], Result]


@contextmanager
def in_background(function: Callable[[], Result], *, start: bool) -> Iterator[Future | Deferred]:
    """Yield an object whose `result()` returns `function()`: computed in a thread from now on if `start`, else when it is called.

    Leaving the block does not wait for the thread.
    """
    if not start:
        yield Deferred(function)
        return
    pool = ThreadPoolExecutor(1)
    try:
        yield pool.submit(function)
    finally:
        pool.shutdown(wait=False)
