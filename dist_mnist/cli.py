"""The `dist-mnist` command. Each sub-command is a few lines that call the library; heavy imports wait inside."""

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_mnist.config import unknown
from dist_mnist.errors import MISTAKE, UserError, warn
from dist_mnist.files import to_json
from dist_mnist.options import user_errors, with_settings

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, help="Train and use CNNs on small images in the idx format."
)
data = typer.Typer(no_args_is_help=True)
ckpt = typer.Typer(no_args_is_help=True)
app.add_typer(data, name="data", help="Download, generate and inspect data sets.")
app.add_typer(ckpt, name="ckpt", help="Look at checkpoints.")

Folder = Annotated[Path, typer.Argument(help="folder of idx files")]
JsonOutput = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2."""
    with user_errors():
        app()


def _print_version(wanted: bool) -> None:
    if wanted:
        from dist_mnist.versions import versions

        own, *others = sorted(versions().items())
        print("{} {} ({})".format(*own, ", ".join(map(" ".join, others))))
        raise typer.Exit


@app.callback()
def _(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print versions and exit.")
    ] = False,
) -> None: ...


Nproc = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="N",
        rich_help_panel="Run",
        help="processes on this machine; 0: one for each GPU, or one on a CPU",
    ),
]
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
    from dist_mnist.launch import num_processes, start_torchrun
    from dist_mnist.machines import Machines
    from dist_mnist.plan import check_shares, prepare

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
    from dist_mnist.doctor import run, under_launcher
    from dist_mnist.launch import num_processes, start_torchrun
    from dist_mnist.machines import Machines

    if under_launcher():
        run(given, as_json)
        return
    machines = Machines(nnodes, rdzv_endpoint, rdzv_id)
    nproc = nproc or num_processes(given.get("device") or "auto")
    start_torchrun("dist_mnist.doctor", {**given, "json": True} if as_json else given, nproc, machines, "doctor")


@app.command()
def recipes(as_json: JsonOutput = False) -> None:
    """List the recipes, the named sets of defaults, with what makes each differ from the default one."""
    from dist_mnist.config import ABOUT, RECIPES
    from dist_mnist.tables import recipes_table

    found = [{"recipe": name, "about": ABOUT[name], "differences": RECIPES[name]} for name in RECIPES]
    _print_json(found) if as_json else recipes_table(found)


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
    from dist_mnist.bench import bench
    from dist_mnist.tables import bench_page

    tell = partial(print, "measuring", file=sys.stderr, flush=True)
    result = bench(given, part or list(PARTS), rounds, tell)
    _print_json(result) if as_json else bench_page(result)


@app.command()
def rendezvous(
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="0: any that is free")] = 29400,
) -> None:
    """Keep the place where machines meet, for as long as this command runs, and print its HOST:PORT.

    Kept on a machine that does not train, or apart from the training on one that does, it outlives every one of them.
    """
    from dist_mnist.machines import keep_meeting_place

    keep_meeting_place(port)


Views = Annotated[
    int | None,
    typer.Option(help="views of each image that are averaged, which takes as long (default: as its run did)"),
]


@app.command("eval")
def evaluate(
    checkpoints: Annotated[
        list[Path], typer.Option("--ckpt", help="checkpoint file, or run directory for its best; several are averaged")
    ],
    split: Annotated[str, typer.Option(metavar="<test|validation|train>", help="what to evaluate on")] = "test",
    views: Views = None,
    data_dir: Annotated[Path | None, typer.Option(help="folder of idx files (default: as in training)")] = None,
    device: Annotated[str, typer.Option(metavar="<auto|cuda|cpu>", help="where to compute")] = "auto",
    as_json: JsonOutput = False,
) -> None:
    """Evaluate a checkpoint: accuracy, loss, a table of the classes and the confusion matrix."""
    from dist_mnist.distributed import World, use_device
    from dist_mnist.evaluate import evaluate_checkpoints
    from dist_mnist.tables import result_tables

    for what, value, valid in (
        ("split", split, ("test", "validation", "train")),
        ("device", device, ("auto", "cuda", "cpu")),
    ):
        if value not in valid:
            raise UserError(unknown(what, value, valid))
    world = use_device(World.from_environment().alone(), device)
    result = evaluate_checkpoints(checkpoints, split, data_dir, world, views=views)
    _print_json(result) if as_json else result_tables(result)


@app.command("predict")
def run_predict(
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE...", help="pictures (PNG, JPEG, ...), idx files, folders, - for standard input"),
    ],
    checkpoints: Annotated[
        list[Path], typer.Option("--ckpt", help="checkpoint file, or run directory for its best; several are averaged")
    ],
    fit: Annotated[
        str,
        typer.Option(
            metavar="<auto|digit|whole>",
            help="find what is drawn, scale and centre it as MNIST's digits; or scale the whole picture; auto: as "
            "digits, but pictures of the network's size as they are",
        ),
    ] = "auto",
    seen: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="write a picture of what the network saw")
    ] = None,
    views: Views = None,
    device: Annotated[str, typer.Option(metavar="<auto|cuda|cpu>", help="where to compute")] = "auto",
    as_json: JsonOutput = False,
) -> None:
    """Say what is on pictures: light on dark or dark on light, of any size. Exit code 2 if one could not be read."""
    from dist_mnist.distributed import World, use_device
    from dist_mnist.pictures import FITS
    from dist_mnist.predict import draw, predictions
    from dist_mnist.tables import prediction_line

    for what, value, valid in (("fit", fit, FITS), ("device", device, ("auto", "cuda", "cpu"))):
        if value not in valid:
            raise UserError(unknown(what, value, valid))
    unreadable: list[UserError] = []
    world = use_device(World.from_environment().alone(), device)
    found, images_seen = predictions(images, checkpoints, fit, world, unreadable.append, views)
    if as_json:
        _print_json(found)
    else:
        for one in found:
            print(prediction_line(one))
    if seen and found:
        draw(seen, found, images_seen)
    for error in unreadable:
        print(f"error: {error}", file=sys.stderr)
    if unreadable:
        raise typer.Exit(MISTAKE)


@app.command("export")
def run_export(
    checkpoint: Annotated[Path, typer.Option("--ckpt", help="checkpoint file, or run directory for its best")],
    kind: Annotated[
        str, typer.Option("--format", metavar="<safetensors|onnx|torch-export>", help="what to write")
    ] = "onnx",
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="where to (default: the name of --ckpt, here)")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="folder of idx files to try it on (default: as in training)")
    ] = None,
    views: Views = None,
    as_json: JsonOutput = False,
) -> None:
    """Write a network for other programs, its normalisation inside, and hold it against the original on test images."""
    from dist_mnist.distributed import World
    from dist_mnist.export import KINDS, export
    from dist_mnist.tables import facts_table

    if kind not in KINDS:
        raise UserError(unknown("format", kind, KINDS))
    path = output or Path(checkpoint.resolve().stem + KINDS[kind].suffix)
    facts = export(checkpoint, kind, path, data_dir, World.from_environment().alone(), views)
    _print_json(facts) if as_json else facts_table(str(path), facts)


Runs = Annotated[list[Path], typer.Argument(help="run directories")]


@app.command()
@with_settings
def sweep(
    given: Mapping[str, Any],
    words: Annotated[list[str], typer.Argument(metavar="NAME=VALUE...", help="settings, each with one or more values")],
    nproc: Nproc = 0,
) -> None:
    """Train every combination of some settings, one after the other, in folders of --run-dir (default: runs/sweep).

    A name that is given several times has several values: sweep recipe={notebook,notebook-bn} seed={0,1,2} --epochs=5
    """
    from dist_mnist.sweep import Sweep

    others = {name: value for name, value in given.items() if name != "run_dir"}
    parent = given.get("run_dir", Path("runs/sweep"))
    planned = Sweep(words, parent, {"nproc": nproc, **others})
    planned.check()
    finished, failed = planned.run()
    if finished:
        print()
        _compare(finished, mean=False, as_json=False)
        print(f"watch all: tensorboard --logdir {parent}")
    if planned.asked_to_stop:
        print(f"stopped with {len(finished)} of {len(planned.runs)} finished; the same command goes on")
    for path in failed:
        print(f"error: {path} failed: see above", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


@app.command()
def compare(
    runs: Runs,
    mean: Annotated[bool, typer.Option("--mean", help="one line for runs that differ in their seed alone")] = False,
    as_json: JsonOutput = False,
) -> None:
    """Show runs in one table; of two, also whether one is better than the other on the same test images."""
    _compare(runs, mean, as_json)


def _compare(paths: list[Path], mean: bool, as_json: bool) -> None:
    from dist_mnist.compare import compare, contest, means, read_run
    from dist_mnist.tables import compare_page

    runs = [read_run(path) for path in paths]
    result = {"means": means(runs)} if mean else {"runs": compare(runs), "contest": contest(runs)}
    _print_json(result) if as_json else compare_page(result)


@app.command("report")
def run_report(
    runs: Runs,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html", help="where to (default: report.html in the run's folder, or beside several)"
        ),
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="folder of the test images (default: as in training)")] = None,
) -> None:
    """Write a run, or several beside one another, as one HTML page that opens anywhere, without network."""
    from dist_mnist.compare import read_run
    from dist_mnist.distributed import World, use_device
    from dist_mnist.page import write_page

    found = [read_run(path) for path in runs]
    path = output or (runs[0] if len(runs) == 1 else runs[0].resolve().parent) / "report.html"
    write_page(found, path, data_dir, use_device(World.from_environment().alone()))
    print(path)


@data.command("get")
def data_get(
    name: Annotated[str, typer.Argument(help="mnist, fashion-mnist or kmnist")],
    folder: Annotated[Path | None, typer.Option("--data-dir", help="where to (default: data/<name>)")] = None,
) -> None:
    """Download a known data set, unless it is there already; what is downloaded is held against its SHA-256."""
    from dist_mnist.data.catalog import known
    from dist_mnist.data.sources import DEFAULT_ROOT, get

    print(get(known(name).name, folder or DEFAULT_ROOT / name))


@data.command("make")
def data_make(
    folder: Annotated[Path, typer.Option("--data-dir", help="where to")] = Path("data/synthetic"),
    num_train: Annotated[int, typer.Option(min=1, help="images for training")] = 60_000,
    num_test: Annotated[int, typer.Option(min=1, help="images for testing")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="the same seed makes the same images")] = 0,
) -> None:
    """Generate handwritten-like digits in MNIST's format."""
    from dist_mnist.data.locate import has_files
    from dist_mnist.data.synthetic import write_digits

    if has_files(folder):
        raise UserError(f"{folder} holds a data set already; it is left as it is: give another --data-dir")
    try:
        write_digits(folder, seed=seed, num_train=num_train, num_test=num_test)
    except OSError as error:
        raise UserError(f"{folder}: data cannot be stored there ({error.strerror}); give another --data-dir") from None
    print(folder)


@data.command("info")
def data_info(folder: Folder, as_json: JsonOutput = False) -> None:
    """Say what a folder of idx files holds."""
    from dist_mnist.data.dataset import describe
    from dist_mnist.tables import facts_table

    facts = describe(folder)
    _print_json(facts) if as_json else facts_table(str(folder), facts)


@ckpt.command("list")
def ckpt_list(run_dir: Annotated[Path, typer.Argument(help="run directory")], as_json: JsonOutput = False) -> None:
    """List the checkpoints of a run, oldest first."""
    from dist_mnist.run_directory import RunDirectory
    from dist_mnist.tables import checkpoints_table

    rows = RunDirectory(run_dir).summary()
    _print_json(rows) if as_json else checkpoints_table(rows)


@ckpt.command("verify")
def ckpt_verify(
    path: Annotated[Path, typer.Argument(help="run directory, or one checkpoint file")], as_json: JsonOutput = False
) -> None:
    """Read checkpoints whole and hold them against their SHA-256; exit code 1 if one is damaged."""
    from dist_mnist.run_directory import verify
    from dist_mnist.tables import verification_table

    rows = verify(path)
    _print_json(rows) if as_json else verification_table(rows)
    if any(row["damage"] for row in rows):
        raise typer.Exit(1)


@ckpt.command("show")
def ckpt_show(
    path: Annotated[Path, typer.Argument(help="checkpoint file, or run directory for its best")],
) -> None:
    """Print what a checkpoint says of itself, and its arrays, as JSON; its content is verified."""
    from dist_mnist.checkpoint import arrays_digest
    from dist_mnist.run_directory import load_best

    path, arrays, info = load_best(path, warn)
    digest = arrays_digest(arrays)
    layout = {name: f"{array.dtype} {list(array.shape)}" for name, array in arrays.items()}
    _print_json({"file": str(path), **info, "arrays_sha256": digest, "arrays": layout})


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

    from dist_mnist.drill import FAULTS
    from dist_mnist.drill import drill as disturb
    from dist_mnist.tables import drill_line

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


def _print_json(value: Any) -> None:
    print(to_json(value, indent=2))


if __name__ == "__main__":
    main()
