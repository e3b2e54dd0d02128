"""Commands that use trained networks: eval, predict, serve, export."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from msgspec.structs import asdict

from dist_mnist.cli.options import JsonOutput, OwnModels, TestFraction, print_json
from dist_mnist.config.choices import Device
from dist_mnist.evaluation.choices import ExportFormat, Fit, Split
from dist_mnist.utils.errors import MISTAKE, UserError

app = typer.Typer()

Views = Annotated[
    int | None,
    typer.Option(
        help="test-time augmentation (TTA): views of each image whose predictions are averaged; N views take N times "
        "as long (default: as in the run)"
    ),
]
Checkpoints = Annotated[
    list[Path],
    typer.Option(
        "--ckpt",
        help="checkpoint file, or run directory for its best checkpoint; may be repeated to average predictions",
    ),
]
FitOption = Annotated[
    Fit,
    typer.Option(
        "--fit",
        help="digit: find the drawing, scale and centre it as in MNIST; whole: scale the whole picture; auto: like "
        "digit, but pictures of the network's input size stay unchanged. Gray pictures are inverted if needed to match "
        "the training images (light on dark, or dark on light)",
    ),
]
OnDevice = Annotated[Device, typer.Option(help="device to compute on; auto: a GPU if there is one")]


@app.command("eval")
def evaluate(
    checkpoints: Checkpoints,
    split: Annotated[Split, typer.Option(help="split to evaluate on; test50k: QMNIST's larger test set")] = Split.TEST,
    views: Views = None,
    model: OwnModels = None,
    data_dir: Annotated[Path | None, typer.Option(help="folder of idx files (default: as in training)")] = None,
    test_fraction: TestFraction = None,
    device: OnDevice = Device.AUTO,
    as_json: JsonOutput = False,
) -> None:
    """Evaluate a checkpoint: accuracy, loss, calibration and other metrics, and the confusion matrix."""
    from dist_mnist.cli.tables import result_tables
    from dist_mnist.distributed.device import use_device
    from dist_mnist.distributed.world import World
    from dist_mnist.evaluation.checkpoints.result import evaluate_checkpoints

    world = use_device(World.from_environment().alone(), device)
    result = evaluate_checkpoints(checkpoints, split, data_dir, world, views, model or (), test_fraction)
    print_json(result) if as_json else result_tables(result)


@app.command("predict")
def run_predict(
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE...", help="pictures (PNG, JPEG, ...), idx files, folders; -: standard input"),
    ],
    checkpoints: Checkpoints,
    fit: FitOption = Fit.AUTO,
    seen: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="picture to write that shows the network's input images")
    ] = None,
    views: Views = None,
    model: OwnModels = None,
    device: OnDevice = Device.AUTO,
    as_json: JsonOutput = False,
) -> None:
    """Classify pictures of any size, light on dark or dark on light. Exit code 2 if a picture cannot be read."""
    from dist_mnist.cli.tables import prediction_line
    from dist_mnist.distributed.device import use_device
    from dist_mnist.distributed.world import World
    from dist_mnist.evaluation.predict import predict_images
    from dist_mnist.reporting.figures import draw_predictions

    unreadable: list[UserError] = []
    world = use_device(World.from_environment().alone(), device)
    predictions, inputs, names = predict_images(images, checkpoints, fit, world, unreadable.append, views, model or ())
    if as_json:
        print_json(predictions)
    else:
        for prediction in predictions:
            print(prediction_line(prediction, names))
    if seen and predictions:
        draw_predictions(seen, predictions, inputs)
    for error in unreadable:
        print(f"error: {error}", file=sys.stderr)
    if unreadable:
        raise typer.Exit(MISTAKE)


@app.command("serve")
def run_serve(
    checkpoints: Checkpoints,
    host: Annotated[
        str, typer.Option(help="address to listen on; 0.0.0.0: all of this machine's, for others to reach")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="N", help="port to listen on; 0: any that is free")
    ] = 8000,
    fit: FitOption = Fit.AUTO,
    views: Views = None,
    model: OwnModels = None,
    device: OnDevice = Device.AUTO,
) -> None:
    """Serve a web page to draw on or drop pictures on, and POST /predict for programs; prints the URL.

    \b
    curl -F a=@a.png -F b=@b.jpg 'http://127.0.0.1:8000/predict?seen=1'
    {"predictions": [
      {"file": "a.png",            name of the picture
       "index": null,              always, here; as of dist-mnist predict --json
       "class": 3,                 number of the most probable class
       "name": "3",                name of that class
       "probabilities": [0.01, ...], of all classes
       "seen": "data:image/png;base64,..."},  only with ?seen=1:
                                   the image as the network gets it
      {"file": "b.jpg", "error": "why it could not be read"}]}

    \b
    Pictures come as files of multipart/form-data, up to 64, or one as the body
    itself (Content-Type: image/png and the like, or application/octet-stream).
    The answer has them in the same order. ?fit=NAME overrides --fit.
    Status 200: at least one could be read; 422: none. Any other error is
    {"error": "..."}: 400, 403 (another site's page asks), 413 (more than 16 MiB),
    415 (other Content-Type), or 503 (too many requests wait, see Retry-After; or
    the server ends). GET /model: names of the classes, shape of the images,
    limits. GET /healthz: 200 while it serves.
    """
    from dist_mnist.distributed.device import use_device
    from dist_mnist.distributed.world import World

    try:
        from dist_mnist.serving.server import serve
    except ModuleNotFoundError as error:
        raise UserError(f"dist-mnist serve needs the package {error.name}: pip install 'dist-mnist[serve]'") from None
    world = use_device(World.from_environment().alone(), device)
    serve(checkpoints, host, port, fit, world, views, model or ())


@app.command("export")
def run_export(
    checkpoint: Annotated[
        Path, typer.Option("--ckpt", help="checkpoint file, or run directory for its best checkpoint")
    ],
    kind: Annotated[ExportFormat, typer.Option("--format", help="format of the exported file")] = ExportFormat.ONNX,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="file to write (default: the name of --ckpt, in the working directory)"),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="folder of idx files to verify the exported model on (default: as in training)"),
    ] = None,
    test_fraction: TestFraction = None,
    views: Views = None,
    model: OwnModels = None,
    as_json: JsonOutput = False,
) -> None:
    """Export a model, with pixel normalisation included, and verify it against the original on test images."""
    from dist_mnist.cli.tables import facts_table
    from dist_mnist.distributed.world import World
    from dist_mnist.evaluation.export import KINDS, export

    path = output or Path(checkpoint.resolve().stem + KINDS[kind].suffix)
    world = World.from_environment().alone()
    facts = export(checkpoint, kind, path, data_dir, world, views, model or (), test_fraction)
    print_json(facts) if as_json else facts_table(str(path), asdict(facts))
