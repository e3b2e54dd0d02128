"""Commands that train and measure: train, doctor, bench, drill, rendezvous, recipes."""

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_mnist.cli.options import JsonOutput, Nproc, print_json, with_settings
from dist_mnist.config.settings import unknown
from dist_mnist.utils.errors import UserError
from dist_mnist.utils.files import to_json

app = typer.Typer()

Nnodes = Annotated[
    str,
    typer.Option(metavar="N|MIN:MAX", rich_help_panel="Run", help="machines that take part; each starts this command"),
]


Endpoint = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", rich_help_panel="Run", help="where several machines meet")
]


RunId = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", rich_help_panel="Run", help="tells this run from others that meet there (default: its)"
    ),
]


@app.command()
@with_settings
def train(
    given: Mapping[str, Any],
    nproc: Nproc = 0,
    nnodes: Nnodes = "1",
    rdzv_endpoint: Endpoint = None,
    rdzv_id: RunId = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, metavar="N", rich_help_panel="Run", help="times that failed processes start again")
    ] = 3,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", rich_help_panel="Run", help="only check settings and data, and print the run directory"
        ),
    ] = False,
) -> None:
    """Train a CNN and evaluate it on the test set: the same as torchrun -m dist_mnist.train, which this starts."""
    from dist_mnist.elastic.rendezvous import Machines
    from dist_mnist.elastic.torchrun import num_processes, start_torchrun
    from dist_mnist.run.plan import check_shares, prepare

    machines = Machines(nnodes, rdzv_endpoint, rdzv_id)
    suitable = num_processes(given.get("device") or "auto")
    nproc = nproc or suitable
    plan = prepare(given, nproc * machines.most)
    for count in range(machines.least, machines.most):  # of machines that may be left
        check_shares(plan.config, nproc * count)
    if dry_run or not machines.several:
        with plan.run.owned():
            pass  # the folder can be written, and no other run is at work in it
    if dry_run:
        plan.run.remove_if_empty()
        print(plan.run.path)
        return
    start_torchrun("dist_mnist.train", given, nproc, machines, plan.run.path.name, max_restarts)


@app.command()
@with_settings
def doctor(
    given: Mapping[str, Any],
    nproc: Nproc = 0,
    nnodes: Nnodes = "1",
    rdzv_endpoint: Endpoint = None,
    rdzv_id: RunId = None,
    as_json: JsonOutput = False,
) -> None:
    """Compare the ranks that would train with these options, and measure the way between them; exit code 2 if not well.

    Start it as training is started: alone, on each of several machines, or by torchrun or srun, which give the ranks.
    """
    from dist_mnist.elastic.rendezvous import Machines
    from dist_mnist.elastic.torchrun import num_processes, start_torchrun
    from dist_mnist.tools.doctor import run, under_launcher

    if under_launcher():
        run(given, as_json)
        return
    machines = Machines(nnodes, rdzv_endpoint, rdzv_id)
    nproc = nproc or num_processes(given.get("device") or "auto")
    start_torchrun("dist_mnist.tools.doctor", {**given, "json": True} if as_json else given, nproc, machines, "doctor")


@app.command()
def recipes(as_json: JsonOutput = False) -> None:
    """List the recipes, the named sets of defaults, with what makes each differ from the default one."""
    from dist_mnist.cli.tables import recipes_table
    from dist_mnist.config.recipes import ABOUT, RECIPES

    found = [{"recipe": name, "about": ABOUT[name], "differences": RECIPES[name]} for name in RECIPES]
    print_json(found) if as_json else recipes_table(found)


PARTS = ("input", "loop", "phases", "evaluation", "saving", "starting", "scaling", "model")


@app.command("bench")
@with_settings
def run_bench(
    given: Mapping[str, Any],
    part: Annotated[
        list[str], typer.Option(metavar="NAME", rich_help_panel="Bench", help=f"{', '.join(PARTS)}; may be repeated")
    ] = [],  # noqa: B006 (Typer's way to say: all)
    rounds: Annotated[int, typer.Option(min=1, metavar="N", rich_help_panel="Bench", help="of measuring by turns")] = 5,
    as_json: JsonOutput = False,
) -> None:
    """Measure each part of a run on this machine beside its limit: where the time goes, and what is left to gain."""
    if strange := [name for name in part if name not in PARTS]:
        raise UserError(unknown("part", strange[0], PARTS))
    from dist_mnist.cli.tables import bench_page
    from dist_mnist.tools.bench import bench

    tell = partial(print, "measuring", file=sys.stderr, flush=True)
    result = bench(given, part or list(PARTS), rounds, tell)
    print_json(result) if as_json else bench_page(result)


@app.command()
def rendezvous(
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="0: any that is free")] = 29400,
) -> None:
    """Keep the place where machines meet, for as long as this command runs, and print its HOST:PORT.

    Kept on a machine that does not train, or apart from the training on one that does, it outlives every one of them.
    """
    from dist_mnist.elastic.rendezvous import keep_meeting_place

    keep_meeting_place(port)


@app.command()
def drill(
    fault: Annotated[
        list[str], typer.Option(metavar="NAME", help="kill, term, stop, truncate, flip or no-room; may be repeated")
    ] = [],  # noqa: B006 (Typer's way to say: none)
    times: Annotated[int, typer.Option(min=1, metavar="N", help="how often to do each")] = 1,
    phase: Annotated[
        str | None, typer.Option(metavar="NAME", help="do it in this phase of rank 0, such as checkpoint or validation")
    ] = None,
    nproc: Annotated[int, typer.Option(min=2, metavar="N", help="processes of each run, which watch one another")] = 2,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="of the moments and of who is hit")] = 0,
    folder: Annotated[Path | None, typer.Option(help="where runs and their logs are kept (default: nowhere)")] = None,
    as_json: JsonOutput = False,
) -> None:
    """Disturb short trainings by real faults; exit code 1 if one does not end with the same bits as undisturbed."""
    import tempfile
    from dataclasses import asdict

    from dist_mnist.cli.tables import drill_line
    from dist_mnist.tools.drill import FAULTS
    from dist_mnist.tools.drill import drill as disturb

    if strange := [name for name in fault if name not in FAULTS]:
        raise UserError(unknown("fault", strange[0], FAULTS))
    different = done = 0
    with tempfile.TemporaryDirectory() as scratch:
        for outcome in disturb(fault or list(FAULTS), times, nproc, seed, folder or Path(scratch), phase):
            print(to_json(asdict(outcome)) if as_json else drill_line(outcome), flush=True)
            different, done = different + (not outcome.same or bool(outcome.left)), done + 1
    if not as_json:
        print(f"{done - different} of {done} ended with the same bits as the undisturbed run and left nothing behind")
    if different:
        raise typer.Exit(1)
