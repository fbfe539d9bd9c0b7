"""Work in threads, a little ahead of whoever needs it, and how far it is."""

import collections
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

from training.reproducible import Processes

Item = TypeVar("Item")
Result = TypeVar("Result")


def decoding_threads(processes: Processes) -> int:
    """How many threads of this process may decode images: its share of the machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // processes.local_count, 1)


def in_order(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """`function` of each item, in order, computed by that many threads, which run ahead only as far as keeps them busy.

    Left by an error or Ctrl-C, they finish what they began and begin nothing more.
    """
    waiting: collections.deque = collections.deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class Progress:
    """How far a stage is, on the main process: a bar on a terminal, a line now and then where output is not one."""

    SECONDS = 20.0  # between two lines

    def __init__(self, total: int, what: str, processes: Processes) -> None:
        self.total, self.done, self.written = total, 0, time.monotonic()
        self.what = what if processes.count == 1 else f"{what} (process 1 of {processes.count})"
        self.lines = processes.is_main and total > 0 and not sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=self.what, disable=self.lines or not processes.is_main or not total)

    def add(self, count: int) -> None:
        self.done += count
        self.bar.update(count)
        if self.lines and (self.done == self.total or time.monotonic() - self.written > self.SECONDS):
            print(f"{self.what}: {self.done} of {self.total}", file=sys.stderr, flush=True)
            self.written = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
