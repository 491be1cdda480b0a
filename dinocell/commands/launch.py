"""``dinocell launch``: run any command as a SLURM job or in several local processes, and report its status."""

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from dinocell.errors import ConfigError, DinocellError

Main = Callable[[Sequence[str]], int]
"""Run the arguments of a command line and return the exit code."""

Check = Callable[[Sequence[str], bool], None]
"""Validate a command line without running it: its arguments and, if the flag is true, its recipe and settings."""

_EXAMPLES = """examples:
  dinocell launch --nodes 4 --gpus-per-node 8 --cpus-per-task 8 --time 24:00:00 -- \\
      pretrain vitl16_hpaone data.shards='[shards/hpa]' output=runs/hpa
  dinocell launch status runs/hpa
  dinocell launch logs runs/hpa --follow
  dinocell launch --array 16 -- shards build --source phenix --input plates/ --output shards/jump --slice {task}/{tasks}
  dinocell launch --cluster local --processes 2 -- pretrain debug data.shards='[shards/mine]' output=runs/two"""


def register(subparsers: Any, *, main: Main, check: Check) -> None:
    """Add ``launch`` to the commands; ``main`` runs a command line in the job, ``check`` validates it before."""
    summary = "run any dinocell command as a SLURM job, or in several processes on this machine"
    parser = subparsers.add_parser(
        "launch",
        help=summary,
        usage="dinocell launch [settings] -- COMMAND ...\n       dinocell launch status RUN\n"
        "       dinocell launch logs RUN [--follow] [--rank N]",
        description=f"{summary[0].upper()}{summary[1:]}. A run that reaches its time limit or loses a node or a "
        "process is requeued automatically and resumes.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cluster = parser.add_argument_group("resources")
    cluster.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes (1)")
    cluster.add_argument("--gpus-per-node", type=int, metavar="N", help="GPUs per node; one process per GPU")
    cluster.add_argument("--tasks-per-node", type=int, metavar="N", help="processes per node (one per GPU)")
    cluster.add_argument("--cpus-per-task", type=int, metavar="N", help="CPU cores per process")
    cluster.add_argument("--mem", metavar="SIZE", help="memory per node, such as 480G")
    cluster.add_argument(
        "--time", type=_minutes, default=24 * 60, metavar="LIMIT", help="[days-]h:mm[:ss] or minutes (a day)"
    )
    for name, meaning in (
        ("partition", "partition"),
        ("account", "account"),
        ("qos", "quality of service"),
        ("constraint", "features of the nodes"),
        ("exclude", "nodes to exclude"),
        ("dependency", "job dependency, such as afterok:1234"),
        ("comment", "comment stored with the job"),
    ):
        cluster.add_argument(f"--{name}", metavar="TEXT", help=meaning)
    cluster.add_argument("--sbatch", action="append", default=[], metavar="KEY=VALUE", help="any other sbatch option")
    job = parser.add_argument_group("the job")
    job.add_argument("--name", default="dinocell", help="job name (dinocell)")
    job.add_argument(
        "--setup",
        action="append",
        default=[],
        metavar="LINE",
        help="shell line before the command, such as 'module load cuda'",
    )
    job.add_argument("--env", action="append", default=[], metavar="KEY=VALUE", help="environment variable")
    job.add_argument("--container-image", metavar="IMAGE", help="for srun --container-image (pyxis)")
    job.add_argument(
        "--signal-before",
        type=int,
        default=120,
        metavar="S",
        help="seconds before the time limit at which the run saves (120)",
    )
    job.add_argument("--max-requeues", type=int, default=100, metavar="N", help="maximum number of requeues (100)")
    job.add_argument(
        "--array",
        type=int,
        default=1,
        metavar="N",
        help="submit N jobs; {task} and {tasks} are replaced by index and number",
    )
    job.add_argument(
        "--then", default="", metavar="COMMAND", help="a dinocell command to run when all jobs have succeeded"
    )
    job.add_argument(
        "--on-export",
        default="",
        metavar="COMMAND",
        help="a dinocell command to submit for each exported teacher ({checkpoint}), such as a probe",
    )
    job.add_argument(
        "--folder", type=Path, help="folder of script, logs and record (launch/ in the run's output, or launches/)"
    )
    job.add_argument("--dry-run", action="store_true", help="print the sbatch script and submit nothing")
    job.add_argument(
        "--cluster", choices=("slurm", "local"), default="slurm", help="local: start processes on this machine"
    )
    job.add_argument(
        "--processes", type=int, metavar="N", help="number of processes with --cluster local (--gpus-per-node, or 1)"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(run=partial(_run, main, check))


def _run(main: Main, check: Check, options: argparse.Namespace) -> None:
    command = options.command
    if command[:1] in (["status"], ["logs"]):
        _show(command)
        return
    arguments = command[1:] if command[:1] == ["--"] else command
    if not arguments:
        raise DinocellError("launch: expected a command after --, such as: dinocell launch --nodes 2 -- pretrain debug")
    settings = _settings(options)
    folder = options.folder or _folder_of(arguments)
    for name in ("array", "processes"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ConfigError(f"--{name}: expected at least 1, got {getattr(options, name)}")
    probes, then = shlex.split(options.on_export), shlex.split(options.then)
    if probes and "{checkpoint}" not in options.on_export:
        raise ConfigError("--on-export: expected {checkpoint} somewhere in the command")
    for words in filter(None, (arguments, probes, then)):
        _validate(check, words, options)
    if options.cluster == "local":
        _run_local(options, settings, arguments, folder)
        return
    from dinocell.launch.slurm import script, submit

    one_task = {"nodes": 1, "tasks_per_node": 1, "dependency": None}
    if options.dry_run:
        print(script(arguments, settings, folder, tasks=options.array))
        if then:
            print(script(then, replace(settings, **{**one_task, "dependency": "afterok:JOB"}), folder / "then"))
        return
    alone = replace(settings, **one_task, gpus_per_node=1 if settings.gpus_per_node else None)
    jobs = submit(main, arguments, settings, folder, tasks=options.array, on_export=probes, export_settings=alone)
    print(f"submitted {', '.join(jobs)}; logs and record in {folder}")
    run = shlex.quote(str(_output_of(arguments) or folder))
    print(f"status: dinocell launch status {run}   log: dinocell launch logs {run} --follow   cancel: scancel JOB")
    if then:
        ids = ":".join(sorted({job.split("_")[0] for job in jobs}))
        after = replace(settings, **{**one_task, "dependency": f"afterok:{ids}"})
        following = submit(main, then, after, folder / "then")
        print(f"submitted {following[0]}, which starts after them")


def _validate(check: Check, arguments: Sequence[str], options: argparse.Namespace) -> None:
    """Reject here what would only fail in the queue, as far as it can be checked before.

    Not checked are recipes for a container, which has other files, and settings from variables that only the job has.
    """
    from dinocell.launch.slurm import fill_in

    texts = [*arguments, *(Path(word).read_text(errors="replace") for word in arguments if _is_recipe_file(word))]
    needs_job = options.container_image is not None or any("${oc.env:" in text for text in texts)
    check(fill_in(arguments, 1, options.array), not needs_job)


def _is_recipe_file(argument: str) -> bool:
    return argument.endswith((".yaml", ".yml")) and Path(argument).is_file()


def _run_local(options: argparse.Namespace, settings: Any, arguments: Sequence[str], folder: Path) -> None:
    from dinocell.launch.local import run_here
    from dinocell.launch.slurm import SlurmSettings, fill_in

    default = SlurmSettings(gpus_per_node=settings.gpus_per_node, env=settings.env)  # which apply here, too
    changed = [name for name in ("then", "on_export") if getattr(options, name)]
    changed += [f.name for f in fields(default) if getattr(settings, f.name) != getattr(default, f.name)]
    if changed:
        option = _OPTIONS.get(changed[0], changed[0]).replace("_", "-")
        raise ConfigError(f"--{option}: applies to SLURM, not to --cluster local")
    processes = options.processes or options.gpus_per_node or 1
    if options.dry_run:
        print(f"{processes} processes: dinocell {shlex.join(arguments)}")
        return
    for task in range(1, options.array + 1):
        code = run_here(fill_in(arguments, task, options.array), processes, folder, env=settings.env)
        if code:
            sys.exit(code)


# Options that are not called as their fields of `SlurmSettings`.
_OPTIONS = {"time_min": "time", "signal_s": "signal_before", "container": "container_image", "extra": "sbatch"}


def _settings(options: argparse.Namespace) -> Any:
    from dinocell.launch.slurm import SlurmSettings

    chosen = {field.name: getattr(options, _OPTIONS.get(field.name, field.name)) for field in fields(SlurmSettings)}
    chosen |= {name: _pairs(name, chosen[name]) for name in ("env", "extra")} | {"setup": tuple(options.setup)}
    return SlurmSettings(**chosen)


def _pairs(name: str, pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise ConfigError(f"--{_OPTIONS.get(name, name)}: expected KEY=VALUE, got {pair!r}")
    return dict(pair.split("=", 1) for pair in pairs)


def _folder_of(arguments: Sequence[str]) -> Path:
    """Return the folder of the launch: in the run folder if the command names one, the same for a whole array."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    output = _output_of(arguments)
    if output is not None and "{task}" not in str(output) and "{tasks}" not in str(output):
        return (output / "launch" / stamp).absolute()
    return (Path("launches") / f"{stamp}-{arguments[0]}").absolute()


def _output_of(arguments: Sequence[str]) -> Path | None:
    return next((Path(word.split("=", 1)[1]) for word in arguments if word.startswith("output=")), None)


def _minutes(text: str) -> int:
    """Parse a time limit: minutes, h:mm, h:mm:ss or d-h:mm:ss."""
    if text.isdecimal():
        return int(text)
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d)(?::(\d\d))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected [days-]h:mm[:ss] or minutes, got {text!r}")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return (days * 24 + hours) * 60 + minutes + (seconds > 0)


def _show(command: Sequence[str]) -> None:
    action = command[0]
    parser = argparse.ArgumentParser(prog=f"dinocell launch {action}")
    parser.add_argument("folder", metavar="RUN", type=Path, help="output folder of the run, or folder of the launch")
    if action == "logs":
        parser.add_argument("--follow", action="store_true", help="continue until the run has ended")
        parser.add_argument("--rank", type=int, default=0, metavar="N", help="rank of the process (0)")
    options = parser.parse_args(command[1:])
    from dinocell.launch.status import follow, last_step, log_of, states

    if action == "status":
        for state in states(options.folder):
            print(state)
            if state.error:
                print(f"    {state.error}")
        step = last_step(options.folder)
        if step:
            print(step)
    elif options.follow:
        for text in follow(options.folder, options.rank):
            print(text, end="", flush=True)
    else:
        print(log_of(options.folder, options.rank).read_text(encoding="utf-8", errors="replace"), end="")
