"""``dinocell launch``: any command as a SLURM job, or in several processes here; and what became of it."""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from dinocell.errors import ConfigError, DinocellError
from dinocell.launch.hooks import Check, Main

_DAY_MIN = 24 * 60
_EXAMPLES = """examples:
  dinocell launch --nodes 4 --gpus-per-node 8 --cpus-per-task 8 --time 24:00:00 -- \\
      pretrain vitl16_hpaone data.shards='[shards/hpa]' output=runs/hpa
  dinocell launch status runs/hpa
  dinocell launch logs runs/hpa --follow
  dinocell launch --array 16 -- shards build --source phenix --input plates/ --output shards/jump --slice {task}/{tasks}
  dinocell launch --cluster local --processes 2 -- pretrain debug data.shards='[shards/mine]' output=runs/two"""


def register(subparsers: Any, *, main: Main, check: Check) -> None:
    """Add ``launch`` to the commands; ``main`` runs a command line in the job, ``check`` looks at it before."""
    summary = "run any dinocell command as a SLURM job, or in several processes on this machine"
    parser = subparsers.add_parser(
        "launch",
        help=summary,
        usage="dinocell launch [settings] -- COMMAND ...\n       dinocell launch status RUN\n"
        "       dinocell launch logs RUN [--follow] [--rank N]",
        description=f"{summary[0].upper()}{summary[1:]}. A run that hits its time limit, loses a node or a process "
        "comes back by itself and goes on where it was.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cluster = parser.add_argument_group("what is asked of the cluster")
    cluster.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (1)")
    cluster.add_argument("--gpus-per-node", type=int, metavar="N", help="GPUs of each, and processes on it")
    cluster.add_argument("--tasks-per-node", type=int, metavar="N", help="processes on each, if not one a GPU")
    cluster.add_argument("--cpus-per-task", type=int, metavar="N", help="cores of a process")
    cluster.add_argument("--mem", metavar="SIZE", help="main memory of a node, such as 480G")
    cluster.add_argument(
        "--time", type=_minutes, default=_DAY_MIN, metavar="LIMIT", help="[days-]h:mm[:ss] or minutes (a day)"
    )
    for name, meaning in (
        ("partition", "partition"),
        ("account", "account"),
        ("qos", "quality of service"),
        ("constraint", "features of the nodes"),
        ("exclude", "nodes to leave out"),
        ("dependency", "such as afterok:1234"),
        ("comment", "kept with the job"),
    ):
        cluster.add_argument(f"--{name}", metavar="TEXT", help=meaning)
    cluster.add_argument("--sbatch", action="append", default=[], metavar="KEY=VALUE", help="any other sbatch setting")
    job = parser.add_argument_group("the job")
    job.add_argument("--name", default="dinocell", help="of the job (dinocell)")
    job.add_argument("--setup", action="append", default=[], metavar="LINE", help="shell before it: 'module load cuda'")
    job.add_argument("--env", action="append", default=[], metavar="KEY=VALUE", help="environment variable")
    job.add_argument("--container-image", metavar="IMAGE", help="for srun --container-image (pyxis)")
    job.add_argument("--signal-before", type=int, default=120, metavar="S", help="save so long before the limit (120)")
    job.add_argument("--max-requeues", type=int, default=100, metavar="N", help="times that it may come back (100)")
    job.add_argument(
        "--array", type=int, default=1, metavar="N", help="N jobs; {task} and {tasks} stand for their number"
    )
    job.add_argument("--then", metavar="COMMAND", help="a dinocell command to run when all jobs have ended well")
    job.add_argument(
        "--on-export",
        metavar="COMMAND",
        help="a dinocell command to submit for each exported teacher, {checkpoint}: a probe",
    )
    job.add_argument(
        "--folder", type=Path, help="for script, logs and record (launch/ in the run's output, or launches/)"
    )
    job.add_argument("--dry-run", action="store_true", help="print the sbatch script and submit nothing")
    job.add_argument("--cluster", choices=("slurm", "local"), default="slurm", help="local: processes on this machine")
    job.add_argument("--processes", type=int, metavar="N", help="with --cluster local (--gpus-per-node, or 1)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(run=partial(_run, main, check))


def _run(main: Main, check: Check, options: argparse.Namespace) -> None:
    command = options.command
    if command[:1] in (["status"], ["logs"]):
        _look(command)
        return
    arguments = command[1:] if command[:1] == ["--"] else command
    if not arguments:
        raise DinocellError("launch: expected a command after --, such as: dinocell launch --nodes 2 -- pretrain debug")
    settings = _settings(options)
    folder = options.folder or _folder_of(arguments)
    if options.array < 1:
        raise ConfigError(f"--array: expected at least 1, got {options.array}")
    probes = shlex.split(options.on_export) if options.on_export else []
    if probes and "{checkpoint}" not in options.on_export:
        raise ConfigError("--on-export: expected {checkpoint} somewhere in the command")
    then = shlex.split(options.then) if options.then else []
    for each in filter(None, (arguments, probes, then)):
        _check_before(check, each, options)
    if options.cluster == "local":
        _run_local(options, arguments, folder)
        return
    from dinocell.launch.slurm import script, submit

    one_task = {"nodes": 1, "tasks_per_node": 1, "dependency": None}
    if options.dry_run:
        print(script(arguments, settings, folder, tasks=options.array))
        if then:
            print(script(then, _settings(options, **{**one_task, "dependency": "afterok:JOB"}), folder / "then"))
        return
    alone = _settings(options, **one_task, gpus_per_node=1 if settings.gpus_per_node else None)
    jobs = submit(main, arguments, settings, folder, tasks=options.array, on_export=probes, export_settings=alone)
    print(f"submitted {', '.join(jobs)}; logs and record in {folder}")
    run = shlex.quote(str(_output_of(arguments) or folder))
    print(f"state: dinocell launch status {run}   log: dinocell launch logs {run} --follow   end it: scancel JOB")
    if then:
        ids = ":".join(sorted({job.split("_")[0] for job in jobs}))
        after = _settings(options, **{**one_task, "dependency": f"afterok:{ids}"})
        following = submit(main, then, after, folder / "then")
        print(f"submitted {following[0]}, which waits for them")


def _check_before(check: Check, arguments: Sequence[str], options: argparse.Namespace) -> None:
    """Refuse here what would wait in the queue only to fail, as far as it can be seen from here.

    A container has files of its own, and a setting may ask for a variable that only the job has.
    """
    from dinocell.launch.slurm import fill_in

    texts = [*arguments, *(Path(each).read_text(errors="replace") for each in arguments if _is_recipe_file(each))]
    waits_for_job = options.container_image is not None or any("${oc.env:" in text for text in texts)
    check(fill_in(arguments, 1, options.array), not waits_for_job)


def _is_recipe_file(argument: str) -> bool:
    return argument.endswith((".yaml", ".yml")) and Path(argument).is_file()


# What means nothing without SLURM, and what each is unless it was given.
_SLURM_ONLY: dict[str, Any] = {
    "nodes": 1,
    "time": _DAY_MIN,
    "signal_before": 120,
    "max_requeues": 100,
    "name": "dinocell",
    "sbatch": [],
    "setup": [],
    **dict.fromkeys(("tasks_per_node", "cpus_per_task", "mem", "partition", "account", "qos", "constraint", "exclude")),
    **dict.fromkeys(("dependency", "comment", "then", "on_export", "container_image")),
}


def _run_local(options: argparse.Namespace, arguments: Sequence[str], folder: Path) -> None:
    from dinocell.launch.local import run_here
    from dinocell.launch.slurm import fill_in

    for name, usual in _SLURM_ONLY.items():
        if getattr(options, name) != usual:
            raise ConfigError(f"--{name.replace('_', '-')}: is for SLURM, not for --cluster local")
    if options.processes is not None and options.processes < 1:
        raise ConfigError(f"--processes: expected at least 1, got {options.processes}")
    processes = options.processes or options.gpus_per_node or 1
    if options.dry_run:
        print(f"{processes} processes: dinocell {shlex.join(arguments)}")
        return
    for task in range(1, options.array + 1):
        code = run_here(fill_in(arguments, task, options.array), processes, folder, env=_pairs("--env", options.env))
        if code:
            sys.exit(code)


def _settings(options: argparse.Namespace, **changes: Any) -> Any:
    from dinocell.launch.slurm import SlurmSettings

    chosen = {
        "name": options.name,
        "nodes": options.nodes,
        "gpus_per_node": options.gpus_per_node,
        "tasks_per_node": options.tasks_per_node,
        "cpus_per_task": options.cpus_per_task,
        "mem": options.mem,
        "time_min": options.time,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "constraint": options.constraint,
        "exclude": options.exclude,
        "dependency": options.dependency,
        "comment": options.comment,
        "signal_s": options.signal_before,
        "max_requeues": options.max_requeues,
        "setup": tuple(options.setup),
        "env": _pairs("--env", options.env),
        "container": options.container_image,
        "extra": _pairs("--sbatch", options.sbatch),
    }
    return SlurmSettings(**{**chosen, **changes})


def _pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    for each in given:
        if "=" not in each:
            raise ConfigError(f"{option}: expected KEY=VALUE, got {each!r}")
    return dict(each.split("=", 1) for each in given)


def _folder_of(arguments: Sequence[str]) -> Path:
    """Return the launch's own folder: in the run folder, where the command names one, the same for all of an array."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    output = _output_of(arguments)
    if output is not None and "{task}" not in str(output) and "{tasks}" not in str(output):
        return (output / "launch" / stamp).absolute()
    return (Path("launches") / f"{stamp}-{arguments[0]}").absolute()


def _output_of(arguments: Sequence[str]) -> Path | None:
    return next((Path(each.split("=", 1)[1]) for each in arguments if each.startswith("output=")), None)


def _minutes(text: str) -> int:
    """Parse a time limit: minutes, h:mm, h:mm:ss or d-h:mm:ss."""
    if text.isdecimal():
        return int(text)
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d)(?::(\d\d))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected [days-]h:mm[:ss] or minutes, got {text!r}")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return (days * 24 + hours) * 60 + minutes + (seconds > 0)


def _look(command: Sequence[str]) -> None:
    action = command[0]
    parser = argparse.ArgumentParser(prog=f"dinocell launch {action}")
    parser.add_argument("folder", metavar="RUN", type=Path, help="the run's output, or the launch's folder")
    if action == "logs":
        parser.add_argument("--follow", action="store_true", help="go on until the run has ended")
        parser.add_argument("--rank", type=int, default=0, metavar="N", help="of the process (0)")
    options = parser.parse_args(command[1:])
    from dinocell.launch.status import follow, last_step, log_of, states

    if action == "status":
        for state in states(options.folder):
            print(state)
            if state.complaint:
                print(f"    {state.complaint}")
        step = last_step(options.folder)
        if step:
            print(step)
    elif options.follow:
        for text in follow(options.folder, options.rank):
            print(text, end="", flush=True)
    else:
        print(log_of(options.folder, options.rank).read_text(encoding="utf-8", errors="replace"), end="")
