"""Pre-flight check whether a group of ranks can train together, without training: `dist-mnist doctor`.

Each rank reports its hardware, software, settings and data. All reports are compared with that of rank 0, and the
network between the ranks is measured.
"""

import os
import secrets
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from operator import attrgetter
from pathlib import Path

import torch
import torch.distributed as dist

from dist_mnist.config.choices import Device
from dist_mnist.config.overrides import Overrides
from dist_mnist.distributed.collectives import broadcast_json, difference, gather_json
from dist_mnist.distributed.consistency import RankFacts, is_visible, software_versions
from dist_mnist.distributed.cores import num_cores
from dist_mnist.distributed.device import device_name, use_device
from dist_mnist.distributed.process_group import process_group
from dist_mnist.distributed.world import World
from dist_mnist.elastic.torchrun import become_rank, launched
from dist_mnist.model.source import ModelSource
from dist_mnist.run.network import make_network
from dist_mnist.run.plan import prepare
from dist_mnist.utils.errors import UserError

MEET_WITHIN_S = 60.0
CLOCK_TOLERANCE_S = 1.0  # nodes whose clocks differ by 5 s consider each other lost
CLOCK_QUESTIONS = 20
SIZES = {"8 B": 2, "1 MB": 1 << 18, "16 MB": 1 << 22, "64 MB": 1 << 24}  # elements of 4 bytes; weights are about 13 MB
REPEATS = 7


@dataclass(frozen=True)
class RankReport(RankFacts):
    """The report of a rank: the facts that must be equal on all ranks, and those that may differ."""

    rank: int
    host: str
    cores: int
    device: str  # such as cuda:0
    name: str  # human-readable name of the device
    folder: str | None  # data folder
    problem: str | None  # why this rank cannot train


@dataclass(frozen=True)
class Finding:
    """One check: its name, what was found, and the problem, if any."""

    what: str
    found: str
    problem: str | None = None


@dataclass(frozen=True)
class AllReduceTime:
    """The time of an all-reduce over all ranks, and its bus bandwidth."""

    size: str
    seconds: float
    bus_gb_per_s: float


@dataclass(frozen=True)
class Diagnosis:
    """All results of the doctor, equal on every rank."""

    ranks: Sequence[RankReport]
    findings: Sequence[Finding]
    all_reduce: Sequence[AllReduceTime]

    @property
    def problems(self) -> list[Finding]:
        """The failed checks, which keep these ranks from training together."""
        return [finding for finding in self.findings if finding.problem]


def examine(given: Overrides, show: Callable[[Diagnosis], None]) -> Diagnosis:
    """Compare all ranks that would train with the settings `given`, and measure the network between them. Collective.

    Rank 0 calls `show` while the others wait, because torchrun ends all ranks as soon as one exits with an error.

    Raises:
        UserError: under srun, a rank cannot read the shared folder that serves as rendezvous.
    """
    world, store = _world(given)  # on the CPU: gloo carries everything except the timing of GPUs
    device, report = _report(world, given)
    with process_group(world, MEET_WITHIN_S, store):
        ranks = [RankReport(**reported) for reported in gather_json(world, asdict(report))]
        if store and world.is_main:
            _meeting(given).unlink(missing_ok=True)  # all ranks have read it
        findings = [*_compare(ranks), _shared_folder(world, given, ranks), _clocks(world, ranks)]
        times = []
        try:
            on_gpus = all(rank.device.startswith("cuda") for rank in ranks)
            times = _time_all_reduce(replace(world, device=device) if on_gpus else world)
        except RuntimeError as error:
            problem = "the all-reduce failed: check network interfaces and firewalls (NCCL_SOCKET_IFNAME)"
            findings.append(Finding("all-reduce", str(error).splitlines()[0][:200], problem))
        diagnosis = Diagnosis(ranks, findings, times)
        if world.is_main:
            show(diagnosis)
    return diagnosis


def _world(given: Overrides) -> tuple[World, dist.Store | None]:
    """Return the world as set by torchrun or another launcher; under srun also a store for the rendezvous."""
    found = launched()
    if found is None or found.launcher != "srun":
        become_rank()
        return World.from_environment(), None
    world = World(found.rank, found.size, found.local_rank, found.local_size, torch.device("cpu"))
    return world, _meet_in_a_file(world, _meeting(given))


def _meet_in_a_file(world: World, path: Path) -> dist.Store:
    """Return a store hosted by rank 0; the other ranks read its address from a file in a shared folder. Collective.

    Raises:
        UserError: a rank cannot find the file.
    """
    host = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    if world.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        store = dist.TCPStore(host, 0, world.size, is_master=True, wait_for_workers=False)
        path.write_text(f"{host} {store.port}\n")
        return store
    until = time.monotonic() + MEET_WITHIN_S
    while not (words := path.read_text().split() if path.exists() else []):
        if time.monotonic() > until:
            raise UserError(
                f"rank {world.rank} on {host} cannot find {path.resolve()}, which rank 0 writes: start in a folder "
                "that all nodes share, or give a --run-dir in one"
            )
        time.sleep(0.1)
    return dist.TCPStore(words[0], int(words[1]), world.size, is_master=False)


def _meeting(given: Overrides) -> Path:
    """Return the file in which the ranks of a step of srun find rank 0."""
    return _parent(given) / f".meeting-{os.environ['SLURM_JOB_ID']}-{os.environ['SLURM_STEP_ID']}"


def _parent(given: Overrides) -> Path:
    """Return the folder of the (future) run directory."""
    return (given.run_dir or Path("runs") / "any").parent


def _report(world: World, given: Overrides) -> tuple[torch.device, RankReport]:
    """Return the device that this rank would train on, and its report, which includes errors in settings or data."""
    settings = data = network = folder = problem = None
    try:
        world = use_device(world, str(given.get("device", Device.AUTO)))
        plan = prepare(given, world.size)
        settings, data, folder = plan.config.shared(), plan.data.fingerprint, str(plan.folder.resolve())
        network = {"model": ModelSource.parse(plan.config.model).name, **make_network(plan, world).facts}
    except UserError as error:
        problem = str(error)
    device = world.device
    report = RankReport(
        settings, data, network, software_versions(device), world.rank, socket.gethostname(), num_cores(), str(device),
        device_name(device), folder, problem,
    )  # fmt: skip
    return device, report


def _compare(ranks: list[RankReport]) -> list[Finding]:
    """Return the findings from the reports of all ranks."""
    first = ranks[0]
    software = ", ".join(f"{name} {version}" for name, version in first.versions.items())
    problems: dict[str, list[RankReport]] = {}
    for rank in ranks:
        if rank.problem:
            problems.setdefault(rank.problem, []).append(rank)
    troubles = [f"{_names(who)}: {problem}" for problem, who in problems.items()]
    ready = f"{sum(rank.problem is None for rank in ranks)} of {len(ranks)} ranks"
    return [
        Finding("ready to train", ready, "; ".join(troubles) or None),
        Finding("versions", software, _difference("versions", ranks)),
        Finding("settings", f"recipe {(first.settings or {}).get('recipe')!r}", _difference("settings", ranks)),
        Finding("data", str(first.folder), _difference("data", ranks)),
        Finding("network", (first.network or {}).get("model") or "", _difference("network", ranks)),
        Finding("devices", ", ".join(sorted({rank.name for rank in ranks})), _odd_devices(ranks)),
    ]


def _names(ranks: list[RankReport]) -> str:
    return "rank " + ", ".join(f"{rank.rank} on {rank.host}" for rank in ranks)


def _difference(what: str, ranks: list[RankReport]) -> str | None:
    """Describe the ranks whose `what` differs from the first rank's; ranks that lack it have reported why."""
    fact = attrgetter(what)
    known = [rank for rank in ranks if fact(rank) is not None]
    odd = [rank for rank in known if fact(rank) != fact(known[0])]
    if not odd:
        return None
    return f"{_names(odd)} differs in its {what} from rank {known[0].rank}: {difference(fact(odd[0]), fact(known[0]))}"


def _odd_devices(ranks: list[RankReport]) -> str | None:
    kinds = sorted({rank.device.split(":")[0] for rank in ranks})
    if len(kinds) == 1:
        return None
    on = {kind: [rank.rank for rank in ranks if rank.device.startswith(kind)] for kind in kinds}
    return f"only some ranks have GPUs ({on}), so they cannot train together: give --device cpu, or repair the others"


def _shared_folder(world: World, given: Overrides, ranks: list[RankReport]) -> Finding:
    """Check whether a file that rank 0 writes next to the future run directory is visible on all nodes. Collective."""
    folder = _parent(given)
    path = folder / f".doctor-{broadcast_json(world, secrets.token_hex(4))}"
    problem = None
    if world.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text("written")
        except OSError as error:
            problem = f"cannot write to {folder.resolve()} ({error.strerror}): give another --run-dir"
    problem = broadcast_json(world, problem)
    visible = problem is not None or is_visible(lambda: path.read_text() if path.exists() else None, world)
    visible_on = gather_json(world, visible)
    if world.is_main:
        path.unlink(missing_ok=True)
    if blind := [rank for rank, sees in zip(ranks, visible_on, strict=True) if not sees]:
        problem = (
            f"{_names(blind)} cannot find a file that rank 0 wrote to {folder.resolve()}: give a --run-dir on storage "
            "that all nodes share"
        )
    return Finding("run directory", f"{folder.resolve()}{'' if problem else ', visible to all ranks'}", problem)


def _clocks(world: World, ranks: list[RankReport]) -> Finding:
    """Measure the offset of each node's clock from that of rank 0's node, as in NTP. Collective."""
    first_ranks = {rank.host: rank.rank for rank in reversed(ranks)}
    offset = 0.0
    for rank in sorted(set(first_ranks.values()) - {0}):
        if world.rank in (0, rank):
            offset = _clock_offset(world, rank)
    worst, offset = max(zip(ranks, gather_json(world, offset), strict=True), key=lambda pair: abs(pair[1]))
    problem = None
    if abs(offset) > CLOCK_TOLERANCE_S:
        problem = (
            f"the clock of {worst.host} differs by {offset:+.1f} s from that of {ranks[0].host}: synchronise them by "
            "NTP, because nodes use their clocks to detect lost nodes"
        )
    return Finding("clocks", f"at most {abs(offset) * 1e3:.1f} ms apart", problem)


def _clock_offset(world: World, rank: int) -> float:
    """Return the seconds by which this rank's clock is ahead of rank 0's; 0 on rank 0. Collective between the two.

    Method: D. Mills, RFC 5905, section 8, using the exchange with the shortest round trip.
    """
    question, answer = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    found = []
    for _ in range(CLOCK_QUESTIONS):
        if world.is_main:
            dist.recv(question, rank)
            dist.send(answer.fill_(time.time()), rank)
        else:
            asked = time.time()
            dist.send(question, 0)
            dist.recv(answer, 0)
            answered = time.time()
            found.append((answered - asked, (asked + answered) / 2 - float(answer)))
    return min(found)[1] if found else 0.0


def _time_all_reduce(world: World) -> list[AllReduceTime]:
    """Return the time of an all-reduce of each size, on the devices of `world`. Collective."""
    if world.size == 1:
        return []
    on_gpus, group = world.device.type == "cuda", None
    if on_gpus:
        group = dist.new_group(backend="nccl", timeout=timedelta(seconds=MEET_WITHIN_S))
    found = []
    for name, elements in SIZES.items():
        values, seconds = torch.zeros(elements, device=world.device), []
        for _ in range(REPEATS + 1):
            began = time.perf_counter()
            dist.all_reduce(values, group=group)
            if on_gpus:
                torch.cuda.synchronize(world.device)
            seconds.append(time.perf_counter() - began)
        slowest_s = max(gather_json(replace(world, device=torch.device("cpu")), statistics.median(seconds[1:])))
        bus_bytes = 2 * (world.size - 1) / world.size * 4 * elements  # bus bandwidth as defined by nccl-tests
        found.append(AllReduceTime(name, slowest_s, bus_bytes / slowest_s / 1e9))
    return found
