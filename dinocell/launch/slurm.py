"""SLURM jobs through submitit: the settings, the sbatch script, the submission, and its record."""

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dinocell.errors import ConfigError, DinocellError
from dinocell.launch.hooks import Main, set_export_hook
from dinocell.runtime.distributed import RENDEZVOUS
from dinocell.runtime.files import write_atomically
from dinocell.runtime.preemption import TIME_LIMIT, on_stop
from dinocell.runtime.run_folder import environment

RECORD = "launch.json"


@dataclass(frozen=True, kw_only=True)
class SlurmSettings:
    """What is asked of the cluster; None leaves it to the cluster's own default.

    Attributes
    ----------
    gpus_per_node, tasks_per_node
        A task is a process of the run: as many as GPUs, unless said otherwise; 1 without GPUs.
    time_min
        Time limit of a start, in minutes; a run that needs more comes back.
    signal_s
        How long before the time limit the run is told to save.
    setup, env
        Lines of shell, and variables, before the command.
    container
        Image for ``srun --container-image`` (pyxis, enroot).
    extra
        Further sbatch settings by name.
    """

    name: str = "dinocell"
    nodes: int = 1
    gpus_per_node: int | None = None
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    time_min: int = 24 * 60
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    dependency: str | None = None
    comment: str | None = None
    signal_s: int = 120
    max_requeues: int = 100
    setup: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    container: str | None = None
    extra: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = {"nodes": self.nodes, "time": self.time_min, "gpus-per-node": self.gpus_per_node}
        counts |= {"tasks-per-node": self.tasks_per_node, "cpus-per-task": self.cpus_per_task}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ConfigError(f"--{name}: expected at least 1, got {value}")
        if not 0 < self.signal_s < 60 * self.time_min:
            # SLURM would tell the run to save and come back as soon as it has begun, again and again.
            raise ConfigError(
                f"--signal-before: expected at least 1 and less than the time limit of {60 * self.time_min} s, "
                f"got {self.signal_s}"
            )
        if self.max_requeues < 0:
            raise ConfigError(f"--max-requeues: expected at least 0, got {self.max_requeues}")

    @property
    def num_tasks(self) -> int:
        """Processes of the run."""
        return self.nodes * (self.tasks_per_node or self.gpus_per_node or 1)

    def parameters(self, folder: Path) -> dict[str, Any]:
        """Return submitit's names of the settings, for a launch into ``folder``."""
        named = {
            "job_name": self.name,
            "nodes": self.nodes,
            "ntasks_per_node": self.tasks_per_node or self.gpus_per_node or 1,
            "gpus_per_node": self.gpus_per_node,
            "cpus_per_task": self.cpus_per_task,
            "mem": self.mem,
            "time": self.time_min,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "exclude": self.exclude,
            "dependency": self.dependency,
            "comment": self.comment,
            "signal_delay_s": self.signal_s,
            "setup": [*(f"export {key}={shlex.quote(value)}" for key, value in self.env.items()), *self.setup],
            "teardown": _after(self.max_requeues, folder),
            "stderr_to_stdout": True,
            # A process that dies takes the others along, instead of leaving them to wait for it.
            "srun_args": [
                "--kill-on-bad-exit=1",
                *([f"--container-image={self.container}"] if self.container else []),
            ],
            "additional_parameters": {"requeue": True, **self.extra},
        }
        return {key: value for key, value in named.items() if value is not None}


def _after(max_requeues: int, folder: Path) -> list[str]:
    """Return the end of the batch script: a start of which a process was killed, or that asks for it, comes back.

    An error does not, and neither does what was told to end (SIGINT is 130, SIGTERM 143).
    """
    mark = f'{shlex.quote(str(comes_back_mark(folder.absolute(), "")))}"$SLURM_JOB_ID"'
    return [
        "code=$?",
        'why=""',
        'if [ "$code" -gt 128 ] && [ "$code" -ne 130 ] && [ "$code" -ne 143 ]; then',
        '  why="a process was killed (exit code $code)"',
        "fi",
        f"if [ -e {mark} ]; then",
        f"  rm -f {mark}",
        '  why="it was told to stop, has saved, and asks for it"',
        "fi",
        f'if [ -n "$why" ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_requeues} ]; then',
        '  echo "$why: the job goes back into the queue"',
        '  scontrol requeue "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"',
        "  sleep 60",
        "fi",
        "exit $code",
    ]


def script(arguments: Sequence[str], settings: SlurmSettings, folder: Path, *, tasks: int = 1) -> str:
    """Return the sbatch script that `submit` would hand in."""
    from submitit.slurm.slurm import _make_sbatch_string

    parameters = settings.parameters(folder)
    if tasks > 1:
        parameters["map_count"] = tasks
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    text: str = _make_sbatch_string(command=command, folder=folder, **parameters)
    return f"{text}\n# which runs: dinocell {shlex.join(arguments)}\n"


def submit(
    main: Main,
    arguments: Sequence[str],
    settings: SlurmSettings,
    folder: Path,
    *,
    tasks: int = 1,
    on_export: Sequence[str] = (),
    export_settings: SlurmSettings | None = None,
) -> list[str]:
    """Submit a command and return the numbers of its jobs, one for each of ``tasks``.

    Parameters
    ----------
    main
        Runs the arguments of a command line.
    folder
        For the record, the script and the logs; on a disk that all nodes see.
    tasks
        Jobs of an array.
    on_export, export_settings
        See `Job`.

    Raises
    ------
    DinocellError
        If there is no SLURM here, or it refuses.
    """
    if shutil.which("sbatch") is None:
        raise DinocellError("sbatch: not found; submit from a machine of the cluster, or use --cluster local")
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    folder.mkdir(parents=True, exist_ok=True)
    executor = SlurmExecutor(folder=folder, max_num_timeout=settings.max_requeues)
    executor.update_parameters(**settings.parameters(folder))
    jobs = [
        Job(
            main=main,
            arguments=tuple(arguments),
            folder=folder,
            task=number + 1,
            tasks=tasks,
            max_requeues=settings.max_requeues,
            on_export=tuple(on_export),
            export_settings=export_settings,
        )
        for number in range(tasks)
    ]
    try:
        with _outside_of_jobs():
            if tasks == 1:
                submitted = [executor.submit(jobs[0])]
            else:
                with executor.batch():
                    submitted = [executor.submit(job) for job in jobs]
    except (FailedJobError, FailedSubmissionError) as error:
        raise DinocellError(f"sbatch refuses: {_last_line(error)}") from error
    numbers = [job.job_id for job in submitted]
    _record(folder, arguments, settings, numbers)
    return numbers


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Without the variables of the job that this process runs in, which would count as settings of the new one."""
    kept = {name: os.environ.pop(name) for name in list(os.environ) if _belongs_to_job(name)}
    try:
        yield
    finally:
        os.environ |= kept


def _belongs_to_job(name: str) -> bool:
    if name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "DINOCELL_RENDEZVOUS"):
        return True
    return name.startswith(("SLURM_", "SBATCH_", "SRUN_", "SUBMITIT_")) and name != "SLURM_CONF"


def _record(folder: Path, arguments: Sequence[str], settings: SlurmSettings, jobs: Sequence[str]) -> None:
    """Write what was submitted, so that it can be found, and submitted again."""
    recipe = next((Path(each) for each in arguments if each.endswith((".yaml", ".yml")) and Path(each).is_file()), None)
    if recipe is not None:
        shutil.copyfile(recipe, folder / recipe.name)
    content = {
        "jobs": list(jobs),
        "arguments": list(arguments),
        "line": shlex.join(["dinocell", *arguments]),
        "settings": asdict(settings),
        "submitted": datetime.now(UTC).isoformat(timespec="seconds"),
        "directory": str(Path.cwd()),
        "environment": environment(),
    }
    write_atomically(folder / RECORD, json.dumps(content, indent=1) + "\n")


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("sbatch: ").removeprefix("error: ") if lines else type(error).__name__


# --- job -----------------------------------------------------------------------------------------------------------
#
# What a SLURM job runs: a DINOCell command, told who its other processes are, put back into the queue in time.
#
# submitit pickles a `Job` and calls it in every task. The job comes back by itself after a time limit, a lost node or a
# killed process; it does not after its end, an error of its own, ``scancel`` or Ctrl-C.

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
