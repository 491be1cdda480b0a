"""A real SLURM of two nodes on this machine, for tests: its own munge, controller and daemons in a temporary folder."""

import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "scancel")
NODES = ("n1", "n2")


def missing() -> str:
    """Say what a cluster here would lack; empty if nothing."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if lacking:
        return f"no {', '.join(lacking)} (Debian: slurm-wlm, munge)"
    for node in NODES:
        try:
            socket.gethostbyname(node)
        except OSError:
            return f"the name {node} is not known: add '127.0.0.1 {' '.join(NODES)}' to /etc/hosts"
    return ""


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextmanager
def cluster(folder: Path) -> Iterator[Path]:
    """Start it, put it into the environment, and stop it; yield the folder with its logs."""
    me = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(stat.S_IRUSR | stat.S_IWUSR)
    ports = [_free_port() for _ in range(4)]
    settings = {
        "ClusterName": "ci",
        "SlurmctldHost": "localhost",
        "SlurmctldPort": ports[0],
        "SlurmdPort": ports[1],
        "SlurmUser": me,
        "SlurmdUser": me,
        "AuthType": "auth/munge",
        # With the usual five minutes a job that was put back would wait for two.
        "AuthInfo": f"socket={folder}/munge.socket,cred_expire=5",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool-%n",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd-%n.pid",
        "SlurmctldLogFile": folder / "slurmctld.log",
        "SlurmdLogFile": folder / "slurmd-%n.log",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SwitchType": "switch/none",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": "sched_interval=2,bf_interval=2",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "JobCompType": "jobcomp/none",
        "ReturnToService": 2,
        "KillWait": 5,
        "JobRequeue": 1,
    }
    lines = [f"{name}={value}" for name, value in settings.items()]
    cores = min(2, os.cpu_count() or 1)
    nodes = f"NodeName=n[1-2] NodeHostname=localhost Port=[{ports[2]},{ports[3]}] CPUs={cores} RealMemory=1000"
    lines.append(f"{nodes} State=UNKNOWN")
    lines.append("PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP")
    (folder / "state").mkdir()
    configuration = folder / "slurm.conf"
    configuration.write_text("\n".join(lines) + "\n")
    before = {name: os.environ.get(name) for name in ("SLURM_CONF", "PATH")}
    os.environ |= {"SLURM_CONF": str(configuration), "PATH": _path()}
    files = {name: f"{folder}/munge.{name}" for name in ("socket", "pid", "log", "seed")}
    try:
        subprocess.run(
            [
                *("munged", "--force", f"--key-file={key}", f"--socket={files['socket']}"),
                *(f"--pid-file={files['pid']}", f"--log-file={files['log']}", f"--seed-file={files['seed']}"),
            ],
            check=True,
            capture_output=True,
        )
        subprocess.run(["slurmctld", "-f", configuration], check=True, capture_output=True)
        for node in NODES:
            subprocess.run(["slurmd", "-f", configuration, "-N", node], check=True, capture_output=True)
        _wait_for_nodes()
        yield folder
    finally:
        for name in ("slurmd-n1.pid", "slurmd-n2.pid", "slurmctld.pid", "munge.pid"):
            _end(folder / name)
        for variable, value in before.items():
            if value is None:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = value


def _wait_for_nodes(limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        shown = subprocess.run(["sinfo", "-h", "-N", "-t", "idle"], capture_output=True, text=True, check=False).stdout
        if all(node in shown for node in NODES):
            return
        time.sleep(0.2)
    raise TimeoutError("the nodes did not come up")


def _end(pid_file: Path) -> None:
    try:
        os.kill(int(pid_file.read_text()), signal.SIGTERM)
    except (OSError, ValueError):
        return


def job_field(job: str, name: str) -> str:
    """Return a field of ``scontrol show job``, empty if SLURM has forgotten the job."""
    shown = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True, check=False).stdout
    words = dict(word.split("=", 1) for word in shown.split() if "=" in word)
    return words.get(name, "")


def wait_for(job: str, states: tuple[str, ...], limit_s: float = 120.0) -> str:
    """Wait until a job is in one of the states, and return it."""
    end = time.monotonic() + limit_s
    state = ""
    while time.monotonic() < end:
        state = job_field(job, "JobState")
        if state in states:
            return state
        time.sleep(0.2)
    raise TimeoutError(f"job {job} is {state}, expected {' or '.join(states)}")
