"""SLURM jobs through submitit: settings, sbatch script, submission, record, and the job itself."""

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dinocell.errors import ConfigError, DinocellError
from dinocell.runtime.distributed import RENDEZVOUS
from dinocell.runtime.files import write_atomically
from dinocell.runtime.preemption import TIME_LIMIT, on_stop
from dinocell.runtime.run_folder import environment

RECORD = "launch.json"

Main = Callable[[Sequence[str]], int]
"""Run the arguments of a command line and return the exit code."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SlurmSettings:
    """Resources and options of a job; None keeps the default of the cluster."""

    name: str = "dinocell"
    nodes: int = 1
    gpus_per_node: int | None = None
    tasks_per_node: int | None = None  # processes of the run: by default one per GPU, 1 without GPUs
    cpus_per_task: int | None = None
    mem: str | None = None
    time_min: int = 24 * 60  # limit of each start; a run that needs more is requeued
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    dependency: str | None = None
    comment: str | None = None
    signal_s: int = 120  # before the limit, when the run receives the signal to save
    max_requeues: int = 100
    setup: tuple[str, ...] = ()  # shell lines before the command
    env: Mapping[str, str] = field(default_factory=dict)
    container: str | None = None  # image for ``srun --container-image`` (pyxis, enroot)
    extra: Mapping[str, str] = field(default_factory=dict)  # further sbatch options by name

    def __post_init__(self) -> None:
        minimum = dict.fromkeys(("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "time_min"), 1)
        for name, low in {**minimum, "max_requeues": 0}.items():
            value = getattr(self, name)
            if value is not None and value < low:
                option = name.removesuffix("_min").replace("_", "-")
                raise ConfigError(f"--{option}: expected at least {low}, got {value}")
        if not 0 < self.signal_s < 60 * self.time_min:
            # Otherwise SLURM would signal the run right after its start, and requeue it again and again.
            limit = f"the time limit of {60 * self.time_min} s"
            raise ConfigError(f"--signal-before: expected at least 1 and less than {limit}, got {self.signal_s}")

    def parameters(self, folder: Path) -> dict[str, Any]:
        """Return the settings under submitit's names, for a launch into ``folder``."""
        container = [f"--container-image={self.container}"] if self.container else []
        same = ("nodes", "gpus_per_node", "cpus_per_task", "mem", "partition", "account", "qos", "constraint")
        named = {name: getattr(self, name) for name in (*same, "exclude", "dependency", "comment")} | {
            "job_name": self.name,
            "ntasks_per_node": self.tasks_per_node or self.gpus_per_node or 1,
            "time": self.time_min,
            "signal_delay_s": self.signal_s,
            "setup": [*(f"export {key}={shlex.quote(value)}" for key, value in self.env.items()), *self.setup],
            "teardown": _after(self.max_requeues, folder),
            "stderr_to_stdout": True,
            # If one process fails, end the others instead of letting them wait for it.
            "srun_args": ["--kill-on-bad-exit=1", *container],
            "additional_parameters": {"requeue": True, **self.extra},
        }
        return {key: value for key, value in named.items() if value is not None}


def _after(max_requeues: int, folder: Path) -> list[str]:
    """Return the end of the batch script, which requeues a job with a killed process or with a marker file.

    Errors are not requeued, and neither are jobs ended by SIGINT (130) or SIGTERM (143).
    """
    mark = f'{shlex.quote(str(requeue_marker(folder.absolute(), "")))}"$SLURM_JOB_ID"'
    return [
        "code=$?",
        'why=""',
        'if [ "$code" -gt 128 ] && [ "$code" -ne 130 ] && [ "$code" -ne 143 ]; then',
        '  why="a process was killed (exit code $code)"',
        "fi",
        f"if [ -e {mark} ]; then",
        f"  rm -f {mark}",
        '  why="it was interrupted, saved a checkpoint and requested it"',
        "fi",
        f'if [ -n "$why" ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_requeues} ]; then',
        '  echo "$why: the job is requeued"',
        '  scontrol requeue "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"',
        "  sleep 60",
        "fi",
        "exit $code",
    ]


def script(arguments: Sequence[str], settings: SlurmSettings, folder: Path, *, tasks: int = 1) -> str:
    """Return the sbatch script that `submit` would submit."""
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
    """Submit a command and return its job IDs, one per task.

    Record, script and logs go into ``folder``; ``tasks`` is the size of the job array; for the others see `Job`. It is
    a :class:`DinocellError` if SLURM is not installed here, or rejects the job.
    """
    if shutil.which("sbatch") is None:
        raise DinocellError("sbatch: not found; submit from a node of the cluster, or use --cluster local")
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    folder.mkdir(parents=True, exist_ok=True)
    executor = SlurmExecutor(folder=folder, max_num_timeout=settings.max_requeues)
    executor.update_parameters(**settings.parameters(folder))
    job = Job(
        main=main,
        arguments=tuple(arguments),
        folder=folder,
        tasks=tasks,
        max_requeues=settings.max_requeues,
        on_export=tuple(on_export),
        export_settings=export_settings,
    )
    try:
        with _outside_of_jobs(), executor.batch() if tasks > 1 else nullcontext():
            submitted = [executor.submit(replace(job, task=task)) for task in range(1, tasks + 1)]
    except (FailedJobError, FailedSubmissionError) as error:
        raise DinocellError(f"sbatch rejected the job: {_last_line(error)}") from error
    job_ids = [job.job_id for job in submitted]
    _record(folder, arguments, settings, job_ids)
    return job_ids


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Hide the environment variables of the current job, which would become settings of the new one."""
    kept = {name: os.environ.pop(name) for name in list(os.environ) if _belongs_to_job(name)}
    try:
        yield
    finally:
        os.environ |= kept


def _belongs_to_job(name: str) -> bool:
    if name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", RENDEZVOUS):
        return True
    return name.startswith(("SLURM_", "SBATCH_", "SRUN_", "SUBMITIT_")) and name != "SLURM_CONF"


def _record(folder: Path, arguments: Sequence[str], settings: SlurmSettings, jobs: Sequence[str]) -> None:
    """Record what was submitted, so that it can be found and submitted again."""
    recipe = next((Path(word) for word in arguments if word.endswith((".yaml", ".yml")) and Path(word).is_file()), None)
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


# After these signals SLURM would end the job for good; after SIGTERM it requeues by itself, or the end is intended.
_REQUEUE_AFTER = (TIME_LIMIT, "SIGUSR1", "SIGUSR2")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A DINOCell command as a job, which submitit pickles and calls in every task.

    The job is requeued automatically after a time limit, a node failure or a killed process, but not after completion,
    an error, ``scancel`` or Ctrl-C.

    In ``arguments``, ``{task}`` and ``{tasks}`` are replaced by the index of this job in its array, from 1, and the
    size of the array. ``folder`` is that of this launch, on a disk that all nodes can access. The command ``on_export``
    is submitted for each exported teacher (``{checkpoint}``), with ``export_settings``.
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
        """Run the command in this task, and return 0, or exit with the command's code."""
        self._join_tasks()
        on_stop(self._requeue)
        if self.on_export:
            set_export_hook(self._submit_probe)
        code = self.main(fill_in(self.arguments, self.task, self.tasks))
        if code:
            # Codes from 128 would make the batch script requeue the job, but this one was interrupted on purpose.
            raise SystemExit(code if code < 128 else 3)
        return 0

    def checkpoint(self) -> Any:
        """Return the same call for submitit, which requeues it on a signal outside a training loop."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _join_tasks(self) -> None:
        """Set torchrun's environment variables from SLURM's, and the rendezvous file."""
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
            _log.warning("not requeued: the maximum of %d requeues is reached", self.max_requeues)
            return
        array_job = os.environ.get("SLURM_ARRAY_JOB_ID")
        job = f"{array_job}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array_job else os.environ["SLURM_JOB_ID"]
        sys.stderr.write(f"job {job} is requeued ({reason})\n")
        try:  # SLURM ends the job in order to requeue it
            subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            # A container may have no scontrol; the batch script runs outside the container.
            requeue_marker(self.folder, os.environ["SLURM_JOB_ID"]).touch()
            sys.stderr.write(f"the batch script will requeue it ({error})\n")

    def _submit_probe(self, checkpoint: Path) -> None:
        arguments = [argument.replace("{checkpoint}", str(checkpoint)) for argument in self.on_export]
        folder = self.folder / "probes" / checkpoint.parent.name
        try:
            submit(self.main, arguments, self.export_settings, folder)
        except Exception as error:  # the training does not depend on its probes
            _log.warning("%s: not submitted (%s)", shlex.join(arguments), error)


_export_hook: Callable[[Path], None] | None = None


def set_export_hook(hook: Callable[[Path], None] | None) -> None:
    """Call ``hook`` with each teacher that this process exports; None removes the hook."""
    global _export_hook
    _export_hook = hook


def exported(checkpoint: Path) -> None:
    """Call the hook, if there is one; pretraining gets this function as its export callback."""
    if _export_hook is not None:
        _export_hook(checkpoint)


def requeue_marker(folder: Path, job: str) -> Path:
    """Return the marker file by which a job requests to be requeued by its batch script."""
    return folder / f"requeue-{job}"


def fill_in(arguments: Sequence[str], task: int, tasks: int) -> list[str]:
    """Replace ``{task}`` and ``{tasks}`` by the index of a job in its array and the size of the array."""
    return [word.replace("{tasks}", str(tasks)).replace("{task}", str(task)) for word in arguments]
