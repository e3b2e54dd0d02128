"""A real Slurm cluster for tests: a controller and two nodes with two fake GPUs each, as hosts in namespaces.

It does not touch this machine's own configuration: daemons, keys, state and logs are in one folder and in the hosts,
and end with them. Lost nodes are detected sooner than on a stock cluster, to shorten the tests.
"""

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from helpers import HANGS_AFTER_S, hosts
from helpers.hosts import Host

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
NODES = ("n1", "n2")
CPUS_PER_NODE = 4  # fake as well, so that there is room for two jobs
CREDENTIALS_S = 3.0  # after which Slurm does not confuse a new start's credentials with the revoked ones

CONFIGURATION = """
ClusterName=test
SlurmctldHost=control
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
TCPTimeout=2
GresTypes=gpu
NodeName={nodes} CPUs={cpus} RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP MaxTime=INFINITE PriorityTier=1
PartitionName=urgent Nodes=ALL State=UP MaxTime=INFINITE PriorityTier=2
"""


def why_not() -> str | None:
    """Return why this machine cannot run the cluster; None if it can."""
    path = os.environ["PATH"] + ":/usr/sbin"
    missing = [program for program in PROGRAMS if not shutil.which(program, path=path)]
    if missing:
        return f"needs {', '.join(missing)} (Debian, Ubuntu: apt-get install slurm-wlm munge)"
    return hosts.why_not()


@dataclass(frozen=True)
class Slurm:
    """A running cluster, seen from its login node, which is the controller."""

    control: Host
    nodes: dict[str, Host]
    folder: Path

    def run(self, *command: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        """Run a command on the login node, assert success, and return its output."""
        done = self.try_run(*command, cwd=cwd, env=env)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def try_run(
        self, *command: object, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node; the exit code may be any."""
        there = self.control.command("env", f"--chdir={cwd or self.folder}", *command)
        environment = os.environ | {"SLURM_CONF": f"{self.folder}/slurm.conf"} | (env or {})
        return subprocess.run(there, env=environment, capture_output=True, text=True, timeout=HANGS_AFTER_S)

    def fact(self, job: str, name: str) -> str:
        """Return the field `name` of a job from `scontrol show job`."""
        words = self.run("scontrol", "show", "job", job, "--oneliner").split()
        return dict(word.partition("=")[::2] for word in words)[name]


@dataclass
class Login:
    """A user on the login node, in a clone of the repository that is set up."""

    slurm: Slurm
    root: Path
    jobs: list[str] = field(default_factory=list)

    def sbatch(self, *words: object) -> str:
        """Submit a job and return its number."""
        self.jobs.append(self.slurm.run("sbatch", "--parsable", *words, cwd=self.root).split(";")[0])
        return self.jobs[-1]

    def said(self, job: str) -> str:
        """Return the job's main log so far."""
        log = self.root / f"slurm-{job}.out"
        return log.read_text() if log.exists() else ""

    def wait_for(self, job: str, condition: Callable[[], object], what: str = "it did not come to that") -> None:
        """Wait until the job has brought about a condition; the error of a timeout includes its log."""
        deadline = time.monotonic() + HANGS_AFTER_S
        while not condition():
            assert time.monotonic() < deadline, f"{what}; job {job} is {self.state(job)}, and said:\n{self.said(job)}"
            time.sleep(0.1)

    def state(self, job: str) -> str:
        """Return the job's state, such as RUNNING."""
        return self.slurm.fact(job, "JobState")

    def ends(self, job: str) -> tuple[str, str]:
        """Wait until a job has ended for good; return its state and exit code."""
        unfinished = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED")
        self.wait_for(job, lambda: self.state(job) not in unfinished, "it did not end")
        return self.state(job), self.slurm.fact(job, "ExitCode")

    def starts_again(self, job: str) -> None:
        """Wait until a job is requeued and has started again: within seconds instead of Slurm's two minutes."""
        self.wait_for(job, lambda: self.slurm.fact(job, "Restarts") == "1", "it was not requeued")
        self.wait_for(job, lambda: self.state(job) == "PENDING", "its first start did not end")
        time.sleep(CREDENTIALS_S)
        self.slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now")
        self.wait_for(job, lambda: self.state(job) == "RUNNING", "it did not start again")

    def logout(self) -> None:
        """Cancel all jobs of this user and wait until the queue is empty."""
        self.slurm.try_run("scancel", "--signal=KILL", "--full", *self.jobs)
        self.slurm.try_run("scancel", *self.jobs)
        deadline = time.monotonic() + HANGS_AFTER_S
        while queued := self.slurm.run("squeue", "--noheader"):
            assert time.monotonic() < deadline, f"jobs are left: {queued}"
            time.sleep(0.1)


@contextmanager
def cluster(folder: Path) -> Iterator[Slurm]:
    """Context manager: the running cluster."""
    with hosts.network(folder, "control", *NODES) as (_, control, *nodes):
        _configure(folder)
        slurm = Slurm(control, dict(zip(NODES, nodes, strict=True)), folder)
        _daemon(control, folder, "munged", "--foreground", "--force", *_munge_options(folder))
        _wait_for((folder / "munge.socket").exists, folder)
        _daemon(control, folder, "slurmctld", "-D")
        for node in nodes:
            _daemon(node, folder, "slurmd", "-D", "-N", node.name)
        _wait_for(lambda: slurm.try_run("sinfo", "-ho", "%T:%D", "-p", "main").stdout.strip() == "idle:2", folder)
        yield slurm


def _configure(folder: Path) -> None:
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(folder=folder, nodes=f"n[1-{len(NODES)}]", cpus=CPUS_PER_NODE)
    )
    for number in range(2):
        os.mknod(folder / f"gpu{number}", 0o20666, os.makedev(1, 3))  # like /dev/null
    (folder / "gres.conf").write_text(f"NodeName=n[1-{len(NODES)}] Name=gpu File={folder}/gpu[0-1]\n")
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)


def _munge_options(folder: Path) -> list[str]:
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    return [f"--{option}={folder}/munge.{name}" for option, name in files.items()]


def _daemon(host: Host, folder: Path, *command: str) -> None:
    """Start a daemon on a host; it ends with the host."""
    with open(folder / f"{command[0]}-{host.name}.out", "w") as log:
        environment = os.environ | {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": os.environ["PATH"] + ":/usr/sbin"}
        subprocess.Popen(
            host.command(*command), env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip


def _wait_for(condition: Callable[[], object], folder: Path) -> None:
    deadline = time.monotonic() + HANGS_AFTER_S
    while not condition():
        if time.monotonic() > deadline:
            said = "\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in sorted(folder.glob("*.[lo][ou][gt]")))
            raise AssertionError(f"the cluster did not come up:\n{said}")
        time.sleep(0.1)
