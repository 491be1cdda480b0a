"""What a SLURM job runs: a DINOCell command, told who its other processes are, put back into the queue in time.

submitit pickles a `Job` and calls it in every task. The job comes back by itself after a time limit, a lost node or a
killed process; it does not after its end, an error of its own, ``scancel`` or Ctrl-C.
"""

import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinocell.launch.hooks import Main, set_export_hook
from dinocell.runtime.distributed import RENDEZVOUS
from dinocell.runtime.preemption import TIME_LIMIT, on_stop

_log = logging.getLogger(__name__)

# After these the cluster would end the job for good; after a SIGTERM it requeues by itself, or means it.
_REQUEUE_AFTER = (TIME_LIMIT, "SIGUSR1", "SIGUSR2")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command in a job.

    Attributes
    ----------
    main
        Takes the arguments of the command line and returns the exit code.
    arguments
        Of the command; ``{task}`` and ``{tasks}`` stand for the number of this job in its array, from 1, and how many.
    folder
        Of this launch, on a disk that all nodes see.
    task, tasks
        See ``arguments``.
    max_requeues
        How often the job may be put back.
    on_export
        Arguments of a command to be submitted, with ``{checkpoint}`` for each exported teacher, and the settings of
        those jobs.
    """

    main: Main
    arguments: tuple[str, ...]
    folder: Path
    task: int = 1
    tasks: int = 1
    max_requeues: int = 100
    on_export: tuple[str, ...] = ()
    export_settings: Any = None

    def __call__(self) -> int:
        """Run the command in this task, and return 0.

        Raises
        ------
        SystemExit
            With the command's exit code, if it is another one.
        """
        self._join_tasks()
        on_stop(self._requeue)
        if self.on_export:
            set_export_hook(self._submit_probe)
        code = self.main(fill_in(self.arguments, self.task, self.tasks))
        if code:
            # From 128 on a process was killed, and the batch script lets the job come back: this was told to stop.
            raise SystemExit(code if code < 128 else 3)
        return 0

    def checkpoint(self) -> Any:
        """Return the same call for submitit, which hears the signal outside a training loop, to put into the queue."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _join_tasks(self) -> None:
        """Say in torchrun's words what SLURM says in its own, and where to meet."""
        from submitit import JobEnvironment

        job = JobEnvironment()
        restart = os.environ.get("SLURM_RESTART_COUNT", "0")
        os.environ |= {
            "RANK": str(job.global_rank),
            "WORLD_SIZE": str(job.num_tasks),
            "LOCAL_RANK": str(job.local_rank),
            "LOCAL_WORLD_SIZE": str(job.num_tasks // job.num_nodes),
            "MASTER_ADDR": job.hostnames[0],
            RENDEZVOUS: str(self.folder / "rendezvous" / f"{job.job_id}-{restart}"),
        }

    def _requeue(self, reason: str) -> None:
        if reason not in _REQUEUE_AFTER:
            return
        if int(os.environ.get("SLURM_RESTART_COUNT", "0")) >= self.max_requeues:
            _log.warning("not put back into the queue: it has been %d times", self.max_requeues)
            return
        try:
            requeue(reason)
        except (OSError, subprocess.SubprocessError) as error:
            # A container may have no scontrol; where the batch script runs there is one.
            comes_back_mark(self.folder, os.environ["SLURM_JOB_ID"]).touch()
            sys.stderr.write(f"the batch script will do that ({error})\n")

    def _submit_probe(self, checkpoint: Path) -> None:
        from dinocell.launch.slurm import submit

        arguments = [argument.replace("{checkpoint}", str(checkpoint)) for argument in self.on_export]
        folder = self.folder / "probes" / checkpoint.parent.name
        try:
            submit(self.main, arguments, self.export_settings, folder)
        except Exception as error:  # the training does not depend on its probes
            _log.warning("%s: not submitted (%s)", shlex.join(arguments), error)


def requeue(reason: str) -> None:
    """Put this SLURM job back into the queue; SLURM ends it for that."""
    number = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{number}_{os.environ['SLURM_ARRAY_TASK_ID']}" if number else os.environ["SLURM_JOB_ID"]
    sys.stderr.write(f"job {job} goes back into the queue ({reason})\n")
    subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)


def comes_back_mark(folder: Path, job: str) -> Path:
    """Return the file by which a job asks its batch script to put it back into the queue."""
    return folder / f"comes_back-{job}"


def fill_in(arguments: Sequence[str], task: int, tasks: int) -> list[str]:
    """Put the number of a job in its array for ``{task}`` and ``{tasks}``; other braces are the command's own."""
    return [each.replace("{tasks}", str(tasks)).replace("{task}", str(task)) for each in arguments]
