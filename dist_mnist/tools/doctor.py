"""Whether the ranks of a run go together: the cheap part, at the start of each run; and all of it, `dist-mnist doctor`.

All ranks tell what they have, what they would train with and what they see; rank 0 holds it side by side and measures
the way between them.
"""

import os
import secrets
import socket
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

from dist_mnist.distributed.collectives import broadcast_json, difference, gather_json
from dist_mnist.distributed.consistency import sees, software
from dist_mnist.distributed.device import device_name, num_cores, use_device
from dist_mnist.distributed.process_group import process_group
from dist_mnist.distributed.world import World
from dist_mnist.run.plan import prepare
from dist_mnist.utils.errors import MISTAKE, UserError

MEET_WITHIN_S = 60.0
CLOCK_TOLERANCE_S = 1.0  # machines that differ by 5 s take each other for lost
CLOCK_QUESTIONS = 20
SIZES = {"8 B": 2, "1 MB": 1 << 18, "16 MB": 1 << 22, "64 MB": 1 << 24}  # elements of 4 bytes; weights take about 13 MB
REPEATS = 7


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what it is like, and what is wrong with it, if anything."""

    what: str
    found: str
    problem: str | None = None


def main() -> None:
    """Entry point of `python -m dist_mnist.doctor`, under torchrun, or without."""
    from dist_mnist.cli.options import run_as_rank
    from dist_mnist.elastic.preemption import StopSignal

    run_as_rank(lambda given, stop: run(given), StopSignal())


def run(
    given: Mapping[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a page")] = False,
) -> None:
    """Compare all ranks that would train with these settings, and measure the way between them."""
    world, store = _world(given)
    world, facts = _facts(world, given)
    with process_group(_on_cpu(world), MEET_WITHIN_S, store):
        ranks = gather_json(_on_cpu(world), facts)
        findings = [*_compare(ranks), _shared_folder(world, given, ranks), _clocks(world, ranks)]
        speeds = []
        try:
            speeds = _measure(world, all(rank["device"].startswith("cuda") for rank in ranks))
        except RuntimeError as error:
            problem = "the ranks cannot sum over the network: look at its interfaces and firewalls (NCCL_SOCKET_IFNAME)"
            findings.append(Finding("all-reduce", str(error).splitlines()[0][:200], problem))
    if world.is_main:
        _print(ranks, findings, speeds, as_json)
    if any(finding.problem for finding in findings):
        sys.exit(MISTAKE)


def under_launcher() -> bool:
    """Whether this process is a rank that torchrun or srun started."""
    return "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def _world(given: Mapping[str, Any]) -> tuple[World, dist.Store | None]:
    """This process's place, as torchrun has it or srun; for the latter also a store to meet in."""
    if "RANK" in os.environ or not under_launcher():
        return World.from_environment(), None
    env = os.environ
    rank, size, local_rank = (int(env[name]) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
    tasks = [_repeated(part) for part in env["SLURM_STEP_TASKS_PER_NODE"].split(",")]
    per_node = [number for number, times in tasks for _ in range(times)]
    world = World(rank, size, local_rank, per_node[int(env["SLURM_NODEID"])], torch.device("cpu"))
    return world, _meet_in_a_file(world, _parent(given) / f".meeting-{env['SLURM_JOB_ID']}-{env['SLURM_STEP_ID']}")


def _repeated(part: str) -> tuple[int, int]:
    """`2(x3)`, which is Slurm's for 2,2,2, as (2, 3)."""
    number, _, times = part.partition("(x")
    return int(number), int(times.rstrip(")") or 1)


def _meet_in_a_file(world: World, path: Path) -> dist.Store:
    """A store that rank 0 keeps, at an address that the others read in a shared folder. Collective.

    Raises:
        UserError: a rank does not see the file.
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
                f"rank {world.rank} on {host} does not see {path.resolve()}, which rank 0 writes: start this in a "
                "folder that all machines share, or give a --run-dir in one"
            )
        time.sleep(0.1)
    return dist.TCPStore(words[0], int(words[1]), world.size, is_master=False)


def _parent(given: Mapping[str, Any]) -> Path:
    """The folder in which the run directory is, or would be."""
    return Path(given.get("run_dir") or Path("runs") / "any").parent


def _on_cpu(world: World) -> World:
    return World(world.rank, world.size, world.local_rank, world.local_size, torch.device("cpu"))


def _facts(world: World, given: Mapping[str, Any]) -> tuple[World, dict[str, Any]]:
    """What this rank has and would train with; what is amiss here is a fact as well."""
    facts: dict[str, Any] = {"rank": world.rank, "host": socket.gethostname(), "cores": num_cores(), "problem": None}
    facts |= {"settings": None, "data": None, "folder": None}
    try:
        world = use_device(world, given.get("device") or "auto", given.get("threads") or 0)
        plan = prepare(given, world.size)
        facts |= {"settings": plan.config.shared(), "data": plan.data.fingerprint, "folder": str(plan.folder.resolve())}
    except UserError as error:
        facts["problem"] = str(error)
    facts |= {"device": str(world.device), "name": device_name(world.device), "versions": software(world.device)}
    return world, facts


def _compare(ranks: list[dict[str, Any]]) -> list[Finding]:
    """Findings on what every rank has told of itself."""
    first = ranks[0]
    software = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    recipe = (first["settings"] or {}).get("recipe")
    problems: dict[str, list[str]] = {}
    for rank in ranks:
        if rank["problem"]:
            problems.setdefault(rank["problem"], []).append(f"{rank['rank']} on {rank['host']}")
    troubles = [f"rank {', '.join(who)}: {problem}" for problem, who in problems.items()]
    ready = f"{sum(rank['problem'] is None for rank in ranks)} of {len(ranks)} ranks"
    return [
        Finding("ready to train", ready, "; ".join(troubles) or None),
        Finding("versions", software, _odd(ranks, "versions")),
        Finding("settings", f"recipe {recipe!r}", _odd(ranks, "settings")),
        Finding("data", str(first["folder"]), _odd(ranks, "data")),
        Finding("devices", ", ".join(sorted({rank["name"] for rank in ranks})), _odd_devices(ranks)),
    ]


def _odd(ranks: list[dict[str, Any]], fact: str) -> str | None:
    """A sentence on the first rank whose `fact` is not rank 0's; ranks without one have said why already."""
    known = [rank for rank in ranks if rank[fact] is not None]
    odd = [rank for rank in known if rank[fact] != known[0][fact]]
    if not odd:
        return None
    who = ", ".join(f"{rank['rank']} on {rank['host']}" for rank in odd)
    return f"rank {who} differs in its {fact} from rank {known[0]['rank']}: {difference(odd[0][fact], known[0][fact])}"


def _odd_devices(ranks: list[dict[str, Any]]) -> str | None:
    kinds = sorted({rank["device"].split(":")[0] for rank in ranks})
    if len(kinds) == 1:
        return None
    on = {kind: [rank["rank"] for rank in ranks if rank["device"].startswith(kind)] for kind in kinds}
    return f"some ranks have GPUs and others none ({on}): they cannot train together; give --device cpu, or mend these"


def _shared_folder(world: World, given: Mapping[str, Any], ranks: list[dict[str, Any]]) -> Finding:
    """Whether a file that rank 0 writes where the run would be shows up everywhere. Collective."""
    group, folder = _on_cpu(world), _parent(given)
    path = folder / f".doctor-{broadcast_json(group, secrets.token_hex(4))}"
    error = None
    if world.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text("seen")
        except OSError as problem:
            error = f"{folder.resolve()} cannot be written ({problem.strerror}): give another --run-dir"
    error = broadcast_json(group, error)
    seen = gather_json(group, error is not None or sees(lambda: path.read_text() if path.exists() else None, group))
    if world.is_main:
        path.unlink(missing_ok=True)
    blind = [f"{rank['rank']} on {rank['host']}" for rank, sees in zip(ranks, seen, strict=True) if not sees]
    if blind:
        error = (
            f"rank {', '.join(blind)} does not see what rank 0 writes into {folder.resolve()}: give a --run-dir that "
            "all machines share"
        )
    return Finding("run directory", f"{folder.resolve()}{'' if error else ', seen by all ranks'}", error)


def _clocks(world: World, ranks: list[dict[str, Any]]) -> Finding:
    """How far each machine's clock is from that of rank 0's, asked for as NTP does. Collective."""
    firsts = {rank["host"]: rank["rank"] for rank in reversed(ranks)}
    offset = 0.0
    for rank in sorted(set(firsts.values()) - {0}):
        if world.rank in (0, rank):
            offset = _clock_offset(world, rank)
    offsets = gather_json(_on_cpu(world), offset)
    worst = max(ranks, key=lambda rank: abs(offsets[rank["rank"]]))
    difference = offsets[worst["rank"]]
    problem = None
    if abs(difference) > CLOCK_TOLERANCE_S:
        problem = (
            f"the clock of {worst['host']} differs by {difference:+.1f} s from that of {ranks[0]['host']}: let NTP set "
            "them, because machines of a run judge by them whether others are alive"
        )
    return Finding("clocks", f"at most {abs(difference) * 1e3:.1f} ms apart", problem)


def _clock_offset(world: World, rank: int) -> float:
    """Seconds by which this rank's clock is ahead of rank 0's; 0 on rank 0. Collective between the two.

    Source of the method: D. Mills, RFC 5905, section 8; of several answers that which came quickest counts.
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


def _measure(world: World, on_gpus: bool) -> list[dict[str, Any]]:
    """The time of an all-reduce by its size, and what part of it the wires see. Collective."""
    if world.size == 1:
        return []
    world = world if on_gpus else _on_cpu(world)
    group = dist.new_group(backend="nccl", timeout=timedelta(seconds=MEET_WITHIN_S)) if on_gpus else None
    found = []
    for name, elements in SIZES.items():
        values, seconds = torch.zeros(elements, device=world.device), []
        for _ in range(REPEATS + 1):
            began = time.perf_counter()
            dist.all_reduce(values, group=group)
            if on_gpus:
                torch.cuda.synchronize(world.device)
            seconds.append(time.perf_counter() - began)
        medians = gather_json(_on_cpu(world), statistics.median(seconds[1:]))
        wire = 2 * (world.size - 1) / world.size * 4 * elements  # bytes; what nccl-tests counts as bus bandwidth
        found.append({"size": name, "seconds": max(medians), "bus_gb_per_s": wire / max(medians) / 1e9})
    return found


def _print(ranks: list[dict[str, Any]], findings: list[Finding], speeds: list[dict[str, Any]], as_json: bool) -> None:
    from dataclasses import asdict

    from dist_mnist.cli.tables import doctor_page
    from dist_mnist.utils.files import to_json

    report = {"ranks": ranks, "findings": [asdict(finding) for finding in findings], "all_reduce": speeds}
    print(to_json(report, indent=2), flush=True) if as_json else doctor_page(report)


if __name__ == "__main__":
    main()
