"""Run tasks in processes that end when this one does, however it ends."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import Connection
from typing import TypeVar

from dinocell.errors import ShardError

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_tasks(function: Callable[[Task], Result], tasks: Sequence[Task], *, workers: int) -> Iterator[Result]:
    """Call ``function`` on each task and return the results as they come, in no particular order.

    With one worker or task, everything happens in this process. An exception of a task, or leaving the loop early, ends
    all workers.

    Raises
    ------
    ShardError
        If a worker is killed (out of memory, most often).
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")  # forking a process with threads is not safe
    ends, alive = context.Pipe(duplex=False)
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(ends,))
    try:
        waiting = iter(tasks)
        running: set[Future[Result]] = {executor.submit(function, task) for task in islice(waiting, 2 * workers)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
                running |= {executor.submit(function, task) for task in islice(waiting, 1)}
    except BrokenProcessPool:
        raise ShardError(
            "a worker process was killed, most often because memory ran out; run again with fewer --workers "
            "to continue (a script that builds shards must do so under 'if __name__ == \"__main__\":')"
        ) from None
    finally:
        alive.close()  # at this, workers that are still busy end at once
        executor.shutdown(wait=False, cancel_futures=True)


def _start_worker(parent: Connection) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    import cv2

    cv2.setNumThreads(1)  # there is a process a core


def _end_with(parent: Connection) -> None:
    try:
        parent.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)
