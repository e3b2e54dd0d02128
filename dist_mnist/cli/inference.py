"""Commands that use trained networks: eval, predict, export."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from dist_mnist.cli.options import JsonOutput, print_json
from dist_mnist.utils.errors import MISTAKE, UserError, unknown

app = typer.Typer()

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
    from dist_mnist.cli.tables import result_tables
    from dist_mnist.distributed.device import use_device
    from dist_mnist.distributed.world import World
    from dist_mnist.evaluation.checkpoints import evaluate_checkpoints

    for what, value, valid in (
        ("split", split, ("test", "validation", "train")),
        ("device", device, ("auto", "cuda", "cpu")),
    ):
        if value not in valid:
            raise UserError(unknown(what, value, valid))
    world = use_device(World.from_environment().alone(), device)
    result = evaluate_checkpoints(checkpoints, split, data_dir, world, views=views)
    print_json(result) if as_json else result_tables(result)


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
    from dist_mnist.cli.tables import prediction_line
    from dist_mnist.distributed.device import use_device
    from dist_mnist.distributed.world import World
    from dist_mnist.evaluation.pictures import FITS
    from dist_mnist.evaluation.predict import predictions
    from dist_mnist.reporting.figures import draw

    for what, value, valid in (("fit", fit, FITS), ("device", device, ("auto", "cuda", "cpu"))):
        if value not in valid:
            raise UserError(unknown(what, value, valid))
    unreadable: list[UserError] = []
    world = use_device(World.from_environment().alone(), device)
    found, images_seen = predictions(images, checkpoints, fit, world, unreadable.append, views)
    if as_json:
        print_json(found)
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
    from dist_mnist.cli.tables import facts_table
    from dist_mnist.distributed.world import World
    from dist_mnist.evaluation.export import KINDS, export

    if kind not in KINDS:
        raise UserError(unknown("format", kind, KINDS))
    path = output or Path(checkpoint.resolve().stem + KINDS[kind].suffix)
    facts = export(checkpoint, kind, path, data_dir, World.from_environment().alone(), views)
    print_json(facts) if as_json else facts_table(str(path), facts)
