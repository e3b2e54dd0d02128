"""Commands that train and measure: train, doctor, bench, drill, rendezvous, recipes."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from dist_mnist.cli.options import JsonOutput, print_json, run_option, with_settings
from dist_mnist.config.choices import Device
from dist_mnist.config.overrides import Overrides
from dist_mnist.tools.choices import BenchPart, Fault
from dist_mnist.utils.errors import MISTAKE, as_utf8
from dist_mnist.utils.files import to_json

app = typer.Typer()

# Each also reads the environment variable that torchrun reads for the same option.
Nproc = Annotated[
    str,
    run_option(
        metavar="N",
        envvar="PET_NPROC_PER_NODE",
        help="processes on this node: a number; gpu: one per GPU; cpu: one per core; auto: one per GPU, or one if "
        "there is none",
    ),
]
Nnodes = Annotated[
    str,
    run_option(
        metavar="N|MIN:MAX",
        envvar="PET_NNODES",
        help="number of nodes of the job, or a range if it is elastic; run the same command on each node",
    ),
]
Endpoint = Annotated[
    str | None,
    run_option(
        metavar="HOST:PORT",
        envvar="PET_RDZV_ENDPOINT",
        help="rendezvous endpoint, the address at which the nodes of a job find each other; the same on all of them "
        "(default: PET_MASTER_ADDR and PET_MASTER_PORT, if a scheduler has set them)",
    ),
]
RunId = Annotated[
    str | None,
    run_option(
        metavar="NAME",
        envvar="PET_RDZV_ID",
        help="rendezvous id, unique among the jobs at the same endpoint (default: the run directory's name)",
    ),
]
bench_option = partial(typer.Option, rich_help_panel="Bench")


@app.command()
@with_settings
def train(
    overrides: Overrides,
    nproc: Nproc = "auto",
    nnodes: Nnodes = "1",
    rdzv_endpoint: Endpoint = None,
    rdzv_id: RunId = None,
    max_restarts: Annotated[
        int,
        run_option(
            min=0,
            metavar="N",
            envvar="PET_MAX_RESTARTS",
            help="largest number of restarts of the processes after failures",
        ),
    ] = 3,
    stop_code: Annotated[
        int,
        run_option(
            min=0,
            max=125,
            metavar="N",
            help="exit code when a stop request ended the run early, so that a scheduler can start it again",
        ),
    ] = 0,
    dry_run: Annotated[
        bool,
        run_option("--dry-run", metavar="", help="check settings, data and network, print the run directory, and exit"),
    ] = False,
) -> None:
    """Train a network and evaluate it on the test set. Starts processes (ranks) like torchrun -m dist_mnist.train."""
    from dist_mnist.config.overrides import as_options
    from dist_mnist.elastic.rendezvous import Nodes
    from dist_mnist.elastic.torchrun import check_is_single, num_processes, start_ranks
    from dist_mnist.run.plan import check_batch_divides, prepare

    nodes = Nodes.given(nnodes, rdzv_endpoint, rdzv_id)
    check_is_single(nodes)
    processes = num_processes(str(overrides.get("device", Device.AUTO)), nproc)
    plan = prepare(overrides, processes * nodes.max_nodes)
    for count in range(nodes.min_nodes, nodes.max_nodes):  # numbers of nodes that an elastic job may shrink to
        check_batch_divides(plan.config, processes * count)
    if dry_run and plan.config.model != "cnn":
        from dist_mnist.distributed.world import World
        from dist_mnist.run.network import make_network

        make_network(plan, World.from_environment().alone())
    if dry_run or not nodes.several:
        with plan.run.owned():
            pass  # the folder is writable, and no other process owns it
    if dry_run:
        plan.run.remove_if_empty()
        print(plan.run.path)
        return
    command = ["-m", "dist_mnist.train", *as_options(overrides)]
    run, stall_timeout_s = plan.run, plan.config.stall_timeout
    del plan  # frees its data, which may be in memory
    try:
        name, stays = as_utf8(run.path.name), stop_code > 0
        start_ranks(command, processes, nodes, name, stall_timeout_s, max_restarts, ranks_listen=True, stays=stays)
    finally:
        if not nodes.several:
            run.remove_if_empty()  # nothing was trained: the ranks found an error
    if stop_code and (run.stopped_path.exists() or not run.result_path.exists()):
        raise typer.Exit(stop_code)


@app.command()
@with_settings
def doctor(
    overrides: Overrides,
    nproc: Nproc = "auto",
    nnodes: Nnodes = "1",
    rdzv_endpoint: Endpoint = None,
    rdzv_id: RunId = None,
    as_json: JsonOutput = False,
) -> None:
    """Check that ranks can train together with these options, and time their all-reduce; exit code 2 on a problem.

    Start it the way you start training: alone, on each of several nodes, or by torchrun or srun.
    """
    from dist_mnist.cli.tables import doctor_page
    from dist_mnist.config.overrides import as_options
    from dist_mnist.config.settings import Config
    from dist_mnist.elastic.rendezvous import Nodes
    from dist_mnist.elastic.torchrun import num_processes, start_ranks, under_launcher

    if not under_launcher():
        nodes = Nodes.given(nnodes, rdzv_endpoint, rdzv_id)
        processes = num_processes(str(overrides.get("device", Device.AUTO)), nproc)
        if processes > 1 or nodes.several:
            command = ["-m", "dist_mnist", "doctor", *as_options(overrides), *(["--json"] if as_json else [])]
            start_ranks(command, processes, nodes, "doctor", Config.stall_timeout)
            return
    from dist_mnist.tools.doctor import examine  # imports torch, which an agent must do after setting its log level

    diagnosis = examine(overrides, lambda found: print_json(found) if as_json else doctor_page(found))
    if diagnosis.problems:
        raise typer.Exit(MISTAKE)


@app.command()
def recipes(as_json: JsonOutput = False) -> None:
    """List the recipes (named sets of settings) with their differences from the default."""
    from dist_mnist.cli.tables import recipes_table
    from dist_mnist.config.recipes import RECIPES

    if as_json:
        print_json([{"recipe": name, "about": one.about, "differences": one.settings} for name, one in RECIPES.items()])
    else:
        recipes_table(RECIPES)


@app.command("bench")
@with_settings
def run_bench(
    overrides: Overrides,
    part: Annotated[
        list[BenchPart] | None,
        bench_option(metavar="NAME", help=f"part to measure: {', '.join(BenchPart)}; may be repeated (default: all)"),
    ] = None,
    rounds: Annotated[int, bench_option(min=1, metavar="N", help="rounds; each measures all parts in turn")] = 5,
    as_json: JsonOutput = False,
) -> None:
    """Measure each part of a run on this machine and compare it with the hardware limit."""
    from dist_mnist.cli.tables import bench_page
    from dist_mnist.tools.bench import bench

    tell = partial(print, "measuring", file=sys.stderr, flush=True)
    result = bench(overrides, part or list(BenchPart), rounds, tell)
    print_json(result.as_json()) if as_json else bench_page(result)


@app.command()
def rendezvous(
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="N", help="port to listen on; 0: any free port")
    ] = 29400,
) -> None:
    """Serve a rendezvous endpoint while this command runs, and print its HOST:PORT.

    As a process of its own, on a training node or another one, it survives the
    failure of any training process.
    """
    from dist_mnist.elastic.rendezvous import keep_endpoint

    keep_endpoint(port)


@app.command()
def drill(
    fault: Annotated[
        list[Fault] | None,
        typer.Option(metavar="NAME", help=f"fault to inject: {', '.join(Fault)}; may be repeated (default: each)"),
    ] = None,
    times: Annotated[int, typer.Option(min=1, metavar="N", help="runs per fault")] = 1,
    phase: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="phase of rank 0 in which to inject the fault, such as checkpoint"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="network to train, as in train (default: a small CNN)")
    ] = None,
    nproc: Annotated[int, typer.Option(min=2, metavar="N", help="processes per run")] = 2,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="random seed of fault times and victim ranks")] = 0,
    folder: Annotated[Path | None, typer.Option(help="folder to keep runs and logs in (default: delete them)")] = None,
    as_json: JsonOutput = False,
) -> None:
    """Inject real faults into short runs; exit code 1 if a run does not end with the bits of the undisturbed run.

    \b
    kill      a rank, the parent of all ranks, or all of them get SIGKILL
    term      a rank or the parent gets SIGTERM, SIGINT or SIGUSR1
    stop      a rank is suspended, so that it stalls
    truncate  all are killed, and the newest checkpoint is truncated
    rot       all are killed, and a bit of the newest checkpoint is flipped
    flip      a bit of a rank's weights, EMA, optimizer state or gradient is
              flipped; the ranks have to find and name it (but for a gradient,
              whose sum all ranks get: only dist-mnist replay can find it)
    no-room   checkpoints can no longer be written, as on a full disk

    Prints a line for each run: the fault, its time, rank 0's step and phase
    then, the number of times the command was started, and the result.
    """
    import tempfile
    from collections import Counter

    from dist_mnist.cli.tables import drill_line
    from dist_mnist.tools.drill.faults import drill as disturb

    verdicts: Counter[str] = Counter()
    done = well = 0
    with tempfile.TemporaryDirectory() as scratch:
        for outcome in disturb(fault or list(Fault), times, nproc, seed, folder or Path(scratch), phase, model):
            print(to_json(outcome) if as_json else drill_line(outcome), flush=True)
            verdicts[outcome.verdict] += 1
            done, well = done + 1, well + outcome.well
    if not as_json:
        print(f"{well} of {done} runs ended as expected: {'; '.join(f'{n} {what}' for what, n in verdicts.items())}")
    if well < done:
        raise typer.Exit(1)
