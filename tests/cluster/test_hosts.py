"""Several machines: runs over hosts with addresses of their own, which are cut off, lost, and join again."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from dist_mnist.run.directory import RunDirectory
from helpers import HANGS_AFTER_S, hosts
from helpers.hosts import Host
from helpers.runs import SMALL, descendants, digest, end, reaches, wait_for

pytestmark = pytest.mark.skipif(hosts.why_not() is not None, reason=f"hosts in namespaces: {hosts.why_not()}")
ROOT = Path(__file__).resolve().parents[2]
DIST_MNIST = (sys.executable, "-m", "dist_mnist")
EXACT = ("--invariant", "--microbatches=2", "--checkpoint-every=5")
WHOLE = (*EXACT, "--steps=240")
# Until it is asked to stop. Learning rates do not depend on the length, so it can be held against a shorter run.
ENDLESS = (*EXACT, "--steps=1000000", "--schedule=constant", "--warmup-fraction=0")


@dataclass(frozen=True)
class Started:
    """A command on a host, with what it has said so far."""

    process: subprocess.Popen
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text()

    def ends(self) -> int:
        try:
            return self.process.wait(timeout=HANGS_AFTER_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it did not end; it said:\n{self.said}")


@pytest.fixture
def network(tmp_path) -> Iterator[Callable[..., list[Host]]]:
    """`network("a", "b")` makes a head and hosts of these names; they are gone after the test, with all in them."""
    with ExitStack() as stack:
        yield lambda *names: stack.enter_context(hosts.network(tmp_path, *names))


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Started]]:
    """`start(host, *command)` starts a command there; it belongs to the host, and ends with it."""
    started = []

    def start(host: Host, *command: object, env: dict[str, str] | None = None) -> Started:
        log = tmp_path / f"{host.name}-{len(started)}.log"
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **(env or {})}
        with log.open("w") as file:
            there = host.command("env", f"--chdir={tmp_path}", *command)
            process = subprocess.Popen(there, env=environment, stdout=file, stderr=file, start_new_session=True)
        started.append(process)
        return Started(process, log)

    yield start
    for process in started:
        if process.poll() is None:
            end(process)


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    """The run directory of these tests."""
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def train(start, digits, run) -> Callable[..., Started]:
    """`train(host, *options)` types the command for training there."""

    def train(host: Host, *options: str, env: dict[str, str] | None = None) -> Started:
        settings = (f"--data-dir={digits}", f"--run-dir={run.path}", *SMALL)
        return start(host, *DIST_MNIST, "train", "--nproc=1", *settings, *options, env=env)

    return train


@pytest.fixture
def undisturbed(tmp_path, digits) -> Callable[..., str]:
    """`undisturbed(*options)`: the digest of a run of one process that nothing happens to."""

    def undisturbed(*options: str) -> str:
        run = RunDirectory(tmp_path / "undisturbed")
        settings = (f"--data-dir={digits}", f"--run-dir={run.path}", *SMALL, *options)
        command = [sys.executable, "-m", "dist_mnist.train", *settings]
        subprocess.run(command, check=True, capture_output=True, timeout=HANGS_AFTER_S)
        return digest(run)

    return undisturbed


@pytest.fixture
def multinode(start, tmp_path) -> Callable[..., Started]:
    """`multinode(host, *options)` runs launch/multinode.sh there; in place of ssh it has a way into the hosts."""
    launch = tmp_path / "repository" / "launch"
    launch.mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "multinode.sh", launch)
    (launch / "setup.sh").write_text(f"echo {sys.executable}\n")

    def multinode(head: Host, others: list[Host], *options: str) -> Started:
        way = tmp_path / "ssh"
        lines = [f'{host.name}) exec {" ".join(host.command("bash", "-c"))} "$2" ;;' for host in others]
        way.write_text("\n".join(["#!/bin/bash", 'case "$1" in', *lines, "esac", "exit 255\n"]))
        way.chmod(0o755)
        names = ",".join(host.name for host in others)
        return start(
            head, "bash", launch / "multinode.sh", "--hosts", names, *options, env={"DIST_MNIST_SSH": str(way)}
        )

    return multinode


def owner(run: RunDirectory) -> str:
    return json.loads((run.path / ".owner").read_text())["host"]


def steps_logged(run: RunDirectory) -> list[int]:
    records = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    return [record["step"] for record in records if record["kind"] == "train"]


def know(host: Host, name: str, of: Host, folder: Path) -> None:
    """Let a host know another by one more name."""
    table = folder / f"hosts-{host.name}"
    table.write_text((folder / "hosts").read_text() + f"{of.address} {name}\n")
    host.run("mount", "--bind", table, "/etc/hosts")


def test_training_on_two_hosts_ends_with_the_bits_of_one(network, train, run, undisturbed):
    _, a, b = network("a", "b")
    options = (*WHOLE, "--nnodes=2", "--rdzv-endpoint=a:29400")
    second = train(b, *options)
    first = train(a, *options)
    assert (first.ends(), second.ends()) == (0, 0), first.said + second.said
    assert digest(run) == undisturbed(*WHOLE)
    said = [started.said for started in (first, second)]
    assert sum("test accuracy" in text for text in said) == 1, "rank 0 speaks, and nobody else"
    assert not any("Traceback" in text or "Warning" in text or "[W" in text for text in said)


def test_nodes_of_kubeflows_operator_train_one_run(network, train, run, tmp_path):
    """Node 0 keeps the endpoint, even while its name is in no directory yet."""
    _, a, b = network("a", "b")
    name = "dist-mnist-node-0-0.dist-mnist"
    know(b, name, a, tmp_path)
    told = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": name, "PET_MASTER_PORT": "29400"}
    started = [train(host, "--steps=2", env={**told, "PET_NODE_RANK": str(i)}) for i, host in enumerate((a, b))]
    assert [one.ends() for one in started] == [0, 0], started[0].said + started[1].said
    assert "2 steps of 50 images on 2 processes" in started[0].said + started[1].said
    assert run.result_path.exists()


def test_pods_of_the_elastic_manifest_meet_again_after_one_was_asked_to_leave(
    network, start, train, run, undisturbed, tmp_path
):
    head, a, b = network("a", "b")
    _, deployment, job = yaml.safe_load_all((ROOT / "launch" / "kubernetes-elastic.yaml").read_text())
    (serving,), (node,) = (found["spec"]["template"]["spec"]["containers"] for found in (deployment, job))
    rendezvous = start(head, *DIST_MNIST, *serving["command"][1:], *serving["args"])
    wait_for(lambda: "head:29400" in rendezvous.said, rendezvous.process)
    for host in (a, b):
        know(host, "dist-mnist-rendezvous", head, tmp_path)
    ours = ("--run-dir", "--epochs")
    told = {"$(JOB_ID)": "e5a1", "1:4": "1:2"}  # its microbatches are two
    options = [
        re.sub("[$].*|1:4", lambda found: told[found[0]], word) for word in node["args"] if not word.startswith(ours)
    ]
    first = [train(host, *options, *ENDLESS) for host in (a, b)]
    wait_for(lambda: any("on 2 processes" in one.said for one in first), *(one.process for one in first))
    wait_for(reaches(run, 10), *(one.process for one in first))
    os.kill(descendants(first[1].process.pid)[-1], signal.SIGTERM)
    assert [one.ends() for one in first] == [75, 75], first[0].said + first[1].said
    stopped = json.loads(run.stopped_path.read_text())["step"]
    short = (*ENDLESS, f"--steps={stopped + 2}")
    again = [train(host, *options, *short) for host in (a, b)]
    assert [one.ends() for one in again] == [0, 0], again[0].said + again[1].said
    assert f"resume    after step {stopped}" in again[0].said + again[1].said
    assert digest(run) == undisturbed(*short)


def test_host_cut_off_is_done_without_and_comes_back(network, start, train, run, undisturbed):
    head, a, b = network("a", "b")
    meeting = start(head, *DIST_MNIST, "rendezvous")
    wait_for(lambda: "head:29400" in meeting.said, meeting.process)
    options = (*ENDLESS, "--nnodes=1:2", "--rdzv-endpoint=head:29400", "--stall-timeout=10", "--log-every=1")
    started = {host.name: train(host, *options) for host in (a, b)}
    wait_for(reaches(run, 10), *(one.process for one in started.values()))
    lost, left = (a, b) if owner(run) == "a" else (b, a)
    rank_0 = max(processes_of(lost))  # it stands still, so that it keeps its lock on the run directory
    os.kill(rank_0, signal.SIGSTOP)
    lost.link("down")
    cut_at, step = time.monotonic(), steps_logged(run)[-1]
    wait_for(lambda: owner(run) == left.name and steps_logged(run)[-1] > step + 1)
    print(f"cut off to training again without it: {time.monotonic() - cut_at:.1f} s")
    assert "is taken over from its last owner (process " in started[left.name].said
    os.kill(rank_0, signal.SIGCONT)
    assert started[lost.name].ends() == 1
    print(f"cut off to its own end: {time.monotonic() - cut_at:.1f} s")
    assert f"{lost.name} ends: the rendezvous endpoint head:29400 has not answered" in started[lost.name].said
    lost.link("up")

    def both_said() -> str:
        return again.said + started[left.name].said.split("is taken over from")[1]

    joined_at, again = time.monotonic(), train(lost, *options)
    wait_for(lambda: "on 2 processes on CPU" in both_said(), again.process)
    step = steps_logged(run)[-1]
    wait_for(lambda: steps_logged(run)[-1] > step + 10, again.process)
    print(f"started again to training with it: {time.monotonic() - joined_at:.1f} s")
    os.kill(descendants(again.process.pid)[-1], signal.SIGTERM)
    assert (again.ends(), started[left.name].ends()) == (0, 0), both_said()
    stopped = json.loads(run.stopped_path.read_text())["step"]
    settings = [option for option in ENDLESS if not option.startswith("--steps")]
    assert digest(run) == undisturbed(*settings, f"--steps={stopped}")
    assert steps_logged(run) == list(range(1, stopped + 1)), "only one of them has written at any time"


def test_host_of_rank_0_lost_for_good_is_done_without(network, start, train, run):
    head, *three = network("a", "b", "c")
    meeting = start(head, *DIST_MNIST, "rendezvous")
    wait_for(lambda: "head:29400" in meeting.said, meeting.process)
    options = ("--steps=60", "--nnodes=2:3", "--rdzv-endpoint=head:29400", "--checkpoint-every=5", "--log-every=1")
    started = {host.name: train(host, *options) for host in three}
    wait_for(reaches(run, 12), *(one.process for one in started.values()))
    lost = next(host for host in three if host.name == owner(run))
    step, lost_at = steps_logged(run)[-1], time.monotonic()
    lost.kill()
    wait_for(lambda: steps_logged(run)[-1] > step + 1)
    print(f"lost to training again with two: {time.monotonic() - lost_at:.1f} s")
    left = [started[host.name] for host in three if host is not lost]
    assert [one.ends() for one in left] == [0, 0], left[0].said + left[1].said
    assert "60 steps of 50 images on 2 processes" in left[0].said + left[1].said
    assert run.result_path.exists() and run.checkpoints.paths()[-1] == run.checkpoints.path(60)


def test_multinode_script_interrupted_saves_and_resumes(network, multinode, digits, run, undisturbed):
    head, *others = network("a", "b")
    options = (f"--data-dir={digits}", f"--run-dir={run.path}", "--nproc=1", *SMALL, *WHOLE)
    started = multinode(head, others, *options)
    wait_for(reaches(run, 10), started.process)
    started.process.send_signal(signal.SIGINT)
    assert started.ends() == 0, started.said
    stopped = json.loads(run.stopped_path.read_text())
    assert f"stopped   after step {stopped['step']}, and saved" in started.said
    assert [len(processes_of(host)) for host in others] == [1, 1], "nothing runs on any host"
    again = multinode(head, others, *options)
    assert again.ends() == 0, again.said
    assert digest(run) == undisturbed(*WHOLE)
    assert "Traceback" not in started.said + again.said


def test_mistake_on_one_host_ends_the_run_on_all(network, multinode, digits, run):
    head, a, b = network("a", "b")
    b.run("mount", "-t", "tmpfs", "none", digits)  # an empty folder, where the other has data
    options = (f"--data-dir={digits}", f"--run-dir={run.path}", "--nproc=1", *SMALL, "--steps=40")
    diagnosis = multinode(head, [a, b], "--doctor", *options)
    assert diagnosis.ends() == 2, diagnosis.said
    assert f"on b: {digits}: no file found" in diagnosis.said
    started = multinode(head, [a, b], *options)
    assert started.ends() == 2, started.said
    assert f"error: {digits}: no file found for train images" in started.said
    assert "Traceback" not in started.said and not run.metrics_path.exists()
    assert [len(processes_of(host)) for host in (a, b)] == [1, 1], "nothing runs on any host"


def test_doctor_over_hosts_finds_a_folder_that_is_not_shared(network, start, digits, tmp_path):
    _, a, b = network("a", "b")
    options = ("--nnodes=2", "--rdzv-endpoint=a:29400", "--nproc=1", f"--data-dir={digits}", "--device=cpu", "--json")
    started = [start(host, *DIST_MNIST, "doctor", *options) for host in (a, b)]
    assert [one.ends() for one in started] == [0, 0], started[0].said + started[1].said
    report = json.loads(started[0].said or started[1].said)
    assert {rank["host"] for rank in report["ranks"]} == {"a", "b"}
    findings = {finding["what"]: finding for finding in report["findings"]}
    assert findings.keys() == {
        "ready to train", "versions", "settings", "data", "network", "devices", "run directory", "clocks",
    }  # fmt: skip
    assert all(finding["problem"] is None for finding in findings.values())
    assert all(row["seconds"] > 0 and row["bus_gb_per_s"] > 0 for row in report["all_reduce"])
    b.run("mount", "-t", "tmpfs", "none", tmp_path / "runs")  # what a writes there, b does not see
    started = [start(host, *DIST_MNIST, "doctor", *options) for host in (a, b)]
    assert [one.ends() for one in started] == [2, 2]
    report = json.loads(started[0].said or started[1].said)
    wrong = [finding for finding in report["findings"] if finding["problem"]]
    assert [finding["what"] for finding in wrong] == ["run directory"]
    assert "cannot find a file that rank 0 wrote" in wrong[0]["problem"]


def processes_of(host: Host) -> list[int]:
    namespace, found = os.readlink(f"/proc/{host.pid}/ns/pid"), []
    for link in Path("/proc").glob("[0-9]*/ns/pid"):
        with suppress(OSError):
            if os.readlink(link) == namespace and "State:\tZ" not in (link.parents[1] / "status").read_text():
                found.append(int(link.parents[1].name))
    return found
