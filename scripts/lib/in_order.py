"""Work done by several threads whose results are taken in the order of the jobs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_order(
    jobs: Iterable[Job], work: Callable[[Job], Result], *, threads: int, stopped: Event | None = None
) -> Iterator[Result]:
    """
    Results of jobs in their order, computed by threads that run at most one job each ahead.

    Args:
        stopped: set once no more results are wanted, after an error or Ctrl-C too; long jobs look at it.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(max_workers=threads) as pool:
        try:
            for job in jobs:
                waiting.append(pool.submit(work, job))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            if stopped is not None:
                stopped.set()
