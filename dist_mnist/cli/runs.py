"""Commands for finished runs and their checkpoints: sweep, compare, report, ckpt."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer
from msgspec.structs import asdict

from dist_mnist.cli.options import JsonOutput, Nproc, OwnModels, TestFraction, print_json, run_option, with_settings
from dist_mnist.config.choices import Device
from dist_mnist.config.fields import SettingValue
from dist_mnist.config.overrides import Overrides
from dist_mnist.distributed.cores import num_cores
from dist_mnist.tools.choices import Choice, Replayed, SearchMethod
from dist_mnist.utils.errors import UserError, tell, warn
from dist_mnist.utils.files import shell_word, to_json
from dist_mnist.utils.schema import parse

if TYPE_CHECKING:
    from dist_mnist.run.records import CheckpointInfo

REPLAY_STALL_S = 300.0
MOST_PER_CORE = 8  # processes of a replay, unless --nproc asks for more
search_option = partial(typer.Option, rich_help_panel="Search")
app = typer.Typer()
ckpt = typer.Typer(no_args_is_help=True)


Runs = Annotated[list[Path], typer.Argument(help="run directories")]


@app.command()
@with_settings
def sweep(
    overrides: Overrides,
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME=VALUE...",
            help="settings; a name that is repeated has several values. In a search a value may be an interval: "
            "uniform:LOW:HIGH, loguniform:LOW:HIGH, or int:LOW:HIGH for whole numbers",
        ),
    ],
    nproc: Nproc = 0,
    dry_run: Annotated[
        bool,
        run_option("--dry-run", metavar="", help="check settings and data of all runs, print their folders, and exit"),
    ] = False,
    search: Annotated[
        SearchMethod | None,
        search_option(
            metavar="NAME",
            help="draw values instead of combining them: random; tpe: by a model of the results so far; halving: at "
            "random, and only the best third of the trials continues after validations 1, 3, 9 and so on",
        ),
    ] = None,
    trials: Annotated[
        int | None, search_option(min=1, metavar="N", help="total number of trials, over all nodes that search")
    ] = None,
    prune: Annotated[
        bool,
        search_option("--prune", metavar="", help="stop trials whose validations fall behind the median of the others"),
    ] = False,
    search_seed: Annotated[int, search_option(min=0, metavar="N", help="random seed of the values that are drawn")] = 0,
) -> None:
    """Train every combination of some settings, or search for the best, in folders of --run-dir (default: runs/sweep).

    A grid trains each combination, one after the other. bash makes several words of one with braces:

    \b
    dist-mnist sweep recipe={notebook,notebook-bn} seed={0,1,2} --epochs=5

    A search draws from intervals and values, and ranks trials by their best
    validation accuracy. The same command, given again or on other nodes that
    share the folder, resumes it:

    \b
    dist-mnist sweep --search=tpe --trials=30 lr=loguniform:0.01:0.5 \\
        batch_size=int:50:500 model={cnn,resnet} --epochs=2
    """
    others = {name: value for name, value in overrides.items() if name != "run_dir"}
    others = {"nproc": nproc, **others} if nproc else others
    parent = overrides.run_dir or Path("runs/sweep")
    if search is None and (trials or prune or search_seed):
        raise UserError("--trials, --prune and --search-seed are for a search: give --search too")
    if search and not trials:
        raise UserError("a search has an end: give --trials N")
    if search and trials:
        run_search(words, parent, others, search, trials, prune, search_seed, dry_run)
    else:
        run_grid(words, parent, others, dry_run)


def run_grid(words: list[str], parent: Path, others: Mapping[str, SettingValue], dry_run: bool) -> None:
    """Train all combinations and compare them."""
    from dist_mnist.tools.sweep.grid import Sweep

    planned = Sweep(words, parent, others)
    planned.check()
    if dry_run:
        return print(*planned.runs, sep="\n")
    finished, failed = planned.run()
    if finished:
        print()
        run_compare(finished, model=planned.own_models)
        if planned.columns:
            print(f"curves of all runs: tensorboard --logdir {shell_word(parent)}")
    if planned.asked_to_stop:
        print(f"stopped with {len(finished)} of {len(planned.runs)} runs finished; run the same command to resume")
    for path in failed:
        tell(f"error: the run in {path} failed: see above")
    if failed:
        raise typer.Exit(1)


def run_search(
    words: list[str],
    parent: Path,
    others: Mapping[str, SettingValue],
    method: SearchMethod,
    trials: int,
    prune: bool,
    seed: int,
    dry_run: bool,
) -> None:
    """Work on a search until its trials are finished, and show all of them; exit code 1 if every one failed."""
    from dist_mnist.cli.tables import search_table
    from dist_mnist.tools.sweep.search import Search

    search = Search(words, parent, others, method, trials, prune, seed)
    if dry_run:
        search.check_space()
        return print(parent)
    search.check()
    search.run()
    rows = search.rows()
    search_table(rows)
    if best := next((row for row in rows if row.state == "complete"), None):
        print(f"to repeat the best trial: {search.command(best)}")
        if search.draws:
            print(f"curves of all trials: tensorboard --logdir {shell_word(parent)}, tab HPARAMS")
    if unfinished := sum(row.state == "unfinished" for row in rows) + max(0, trials - len(rows)):
        print(f"{unfinished} of {trials} trials are unfinished; run the same command to resume those without a worker")
    elif not best:
        tell(f"error: no trial finished, so there is no best: see the table, and the logs in {search.folder}")
        raise typer.Exit(1)


@app.command("compare")
def run_compare(
    runs: Runs,
    mean: Annotated[
        bool, typer.Option("--mean", metavar="", help="average runs that differ only in their seed")
    ] = False,
    model: OwnModels = None,
    as_json: JsonOutput = False,
) -> None:
    """Show runs in one table; for two runs, also McNemar's test of their difference on the same test images."""
    from dist_mnist.cli.tables import compare_page, means_page
    from dist_mnist.reporting.compare import compare, compare_pair, means, predict_own_test
    from dist_mnist.run.records import read_run

    found = [read_run(path) for path in runs]
    if mean:
        averages = means(found)
        print_json({"means": averages}) if as_json else means_page(averages)
        return
    rows, pair = compare(found), compare_pair(found, partial(predict_own_test, code=model or ()))
    print_json({"runs": rows, "contest": pair}) if as_json else compare_page(rows, pair)


@app.command("report")
def run_report(
    runs: Runs,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="file to write (default: report.html in the run directory, or in its parent for several runs)",
        ),
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="folder of the test images (default: as in training)")] = None,
    test_fraction: TestFraction = None,
    model: OwnModels = None,
) -> None:
    """Write one HTML page about a run, or about several side by side; it opens anywhere, also offline."""
    from dist_mnist.distributed.device import use_device
    from dist_mnist.distributed.world import World
    from dist_mnist.reporting.html import write_page
    from dist_mnist.run.records import read_run

    found = [read_run(path) for path in runs]
    path = output or (runs[0] if len(runs) == 1 else runs[0].resolve().parent) / "report.html"
    write_page(found, path, data_dir, use_device(World.from_environment().alone()), model or (), test_fraction)
    print(path)


@app.command("log")
def run_log(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run directory; no process may be training in it")],
    to: Annotated[list[str], typer.Option(metavar="NAME", help="tracker: mlflow or wandb; may be repeated")],
) -> None:
    """Send a tracker the records of a run that it lacks; for a finished run also its result and files."""
    from dist_mnist.reporting.listeners.follower import log_run

    for name in to:
        log_run(run, name)
        print(f"{name} has all of {run}")


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run directory, or a copy of one")],
    first: Annotated[
        int, typer.Option("--from", min=0, metavar="STEP", help="step of the checkpoint to start from")
    ] = 0,
    last: Annotated[
        int | None,
        typer.Option("--to", min=1, metavar="STEP", help="step of the checkpoint to end with (default: the last)"),
    ] = None,
    every: Annotated[int, typer.Option(min=1, metavar="N", help="compare with every Nth checkpoint")] = 1,
    data_dir: Annotated[Path | None, typer.Option(help="folder of the same data (default: as in training)")] = None,
    device: Annotated[Device | None, typer.Option(help="device to compute on (default: as in training)")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="CPU threads of each process (default: as in training)")
    ] = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="number of processes (default: as in training)")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="FILE.py:NAME", help="class or function of your own network, as in training")
    ] = None,
    as_json: JsonOutput = False,
    results: Annotated[
        Path | None, typer.Option(hidden=True, help="file in which ranks return results to this command")
    ] = None,
) -> None:
    """Train each segment between two checkpoints of a run again, and compare the bits; exit code 1 if any differ.

    Data, settings and the numbers of processes and threads are those of the
    run. If equal bits cannot be expected, as on another processor, a warning
    says so and the comparison has a tolerance. The run directory is not changed.
    """
    from dist_mnist.cli.tables import replay_line
    from dist_mnist.config.overrides import as_options
    from dist_mnist.elastic.rendezvous import Nodes
    from dist_mnist.elastic.torchrun import start_ranks, under_launcher
    from dist_mnist.run.checkpoints.store import store_of
    from dist_mnist.run.plan import check_batch_divides

    newest = store_of(run).newest_info()
    if newest is None:
        raise UserError(f"{run}: there is no valid checkpoint in its folder checkpoints/")
    settings = Overrides({"data_dir": data_dir, "device": device, "threads": threads, "model": model, "run_dir": run})
    processes = nproc or _processes_of(newest, run)
    check_batch_divides(newest.config(run), processes)
    if processes > 1 and not under_launcher():
        with TemporaryDirectory(prefix="dist-mnist-replay-") as folder:
            file = Path(folder) / "results.json"
            words = [f"--from={first}", f"--every={every}", *([f"--to={last}"] if last else []), f"--results={file}"]
            given = {name: value for name, value in settings.items() if name != "run_dir" and value is not None}
            command = ["-m", "dist_mnist", "replay", str(run), *words, *as_options(given)]
            start_ranks([*command, *(["--json"] if as_json else [])], processes, Nodes("1"), "replay", REPLAY_STALL_S)
            found = parse(file.read_bytes(), list[Replayed])
    else:
        from dist_mnist.tools.replay import replay as replay_segments

        def tell(one: Replayed) -> None:
            if not as_json:
                print(replay_line(one), flush=True)

        choice = Choice(first=first, last=last, every=every)
        found = replay_segments(run, settings, choice, warn, tell)
        if results:
            if found:
                results.write_text(to_json(found))
            return
    if as_json:
        print_json({"run": str(run), "segments": found})
    if not all(one.reproduced for one in found):
        raise typer.Exit(1)


def _processes_of(info: "CheckpointInfo", run: Path) -> int:
    """Return how many processes trained a run; refuse more than this machine can start, as `info` is not trusted."""
    processes, cores = info.computed_by.processes if info.computed_by else 1, num_cores()
    if processes > MOST_PER_CORE * cores:
        raise UserError(
            f"{run} was trained by {processes} processes, more than {MOST_PER_CORE} per core on the {cores} cores "
            "available here: set the number to start by --nproc"
        )
    return processes


@ckpt.command("list")
def ckpt_list(run_dir: Annotated[Path, typer.Argument(help="run directory")], as_json: JsonOutput = False) -> None:
    """List the checkpoints of a run, oldest first."""
    from dist_mnist.cli.tables import checkpoints_table
    from dist_mnist.run.directory import RunDirectory

    rows = RunDirectory(run_dir).checkpoints.summary()
    print_json(rows) if as_json else checkpoints_table(rows)


@ckpt.command("verify")
def ckpt_verify(
    path: Annotated[Path, typer.Argument(help="run directory, or one checkpoint file")], as_json: JsonOutput = False
) -> None:
    """Verify the SHA-256 of checkpoints and the chain of the run; exit code 1 if one is wrong."""
    from dist_mnist.cli.tables import verification_table
    from dist_mnist.run.checkpoints.store import verify

    rows = verify(path)
    print_json(rows) if as_json else verification_table(rows)
    if any(row.fault for row in rows):
        raise typer.Exit(1)


@ckpt.command("show")
def ckpt_show(
    path: Annotated[Path, typer.Argument(help="checkpoint file, or run directory for its best checkpoint")],
) -> None:
    """Verify a checkpoint, and print its metadata and the dtypes and shapes of its arrays as JSON."""
    from dist_mnist.run.checkpoints.file import arrays_digest
    from dist_mnist.run.checkpoints.store import load_best
    from dist_mnist.utils.files import path_text

    found = load_best(path)
    layout = {name: f"{array.dtype} {list(array.shape)}" for name, array in found.arrays.items()}
    digest = arrays_digest(found.arrays)
    print_json({"file": path_text(found.path), **asdict(found.info), "arrays_sha256": digest, "arrays": layout})
