"""Worker processes that end when the process that started them ends, however that happens."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager


@contextmanager
def worker_processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes, started at the first task; tasks that have not begun when the block ends are dropped.

    Without `follow_main_process`, the workers of a main process that was killed would wait for tasks for ever.
    """
    pool = ProcessPoolExecutor(count, initializer=follow_main_process)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def follow_main_process() -> None:
    """Called in each worker when it starts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main one decides what it means
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the handler that the main process may have installed
    threading.Thread(target=_exit_after_main_process, daemon=True).start()


def _exit_after_main_process() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)  # at once, in the middle of a task
