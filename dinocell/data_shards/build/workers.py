"""Run tasks in worker processes that end when this process does, however it ends."""

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
    """Call ``function`` on each task and yield the results as they are ready, in no particular order.

    With one worker or task, everything runs in this process. An exception of a task, or leaving the loop early, ends
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
    receiver, sender = context.Pipe(duplex=False)
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(receiver,))
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
        sender.close()  # workers that are still busy exit at once
        executor.shutdown(wait=False, cancel_futures=True)


def _start_worker(parent: Connection) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()
    import cv2

    cv2.setNumThreads(1)  # there is one process per core


def _exit_with(parent: Connection) -> None:
    try:
        parent.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)
