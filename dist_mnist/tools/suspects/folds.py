"""Cross-validation over a run's training images: train once for each fold, and predict the held-out images.

Fold runs are ordinary run directories, so an interrupted command resumes.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from msgspec import Struct

from dist_mnist.config.resolve import as_given
from dist_mnist.config.settings import is_own_code, named_again
from dist_mnist.data.dataset import IdxDataset
from dist_mnist.distributed.world import World
from dist_mnist.run.records import read_run
from dist_mnist.tools.suspects.confident import find_label_errors
from dist_mnist.tools.sweep.grid import Sweep
from dist_mnist.utils.errors import UserError, os_error_as, short, warn
from dist_mnist.utils.files import atomic_write, path_of, path_text, to_json

NEVER = 10**9  # steps between validations: only the last step is validated, so that no checkpoint is selected by a fold


class Suspect(Struct, frozen=True, kw_only=True):
    """A training image whose label is probably wrong; labels are classes, from 0."""

    index: int  # in the file of training images, from 0
    given: int
    given_name: str
    suggested: int
    suggested_name: str
    self_confidence: float  # held-out probability of the given label
    suggested_confidence: float
    margin: float  # self-confidence minus the largest probability of another class


class Suspects(Struct, frozen=True, kw_only=True):
    """Schema of suspects.json: the suspects among the training images, the most suspicious first."""

    run: str
    data: str
    folds: int
    images: int
    estimated_errors: float  # estimated number of wrong labels
    held_out_accuracy: float  # accuracy of the fold runs' networks on held-out images, with the labels as given
    suspects: tuple[Suspect, ...]


class FoldRuns:
    """Training runs with the settings of one run, each holding out a different fold.

    Args:
        run: run directory; its settings are used, not its weights.
        folder: folder for the fold runs and the result files.
        code: the user's own network, as in `load_models`.
        nproc: processes of each fold run; 0 for the default of `dist-mnist train`.

    Raises:
        UserError: there is no such run, or its network is the user's own and `code` is empty.
    """

    def __init__(
        self,
        run: Path,
        folder: Path,
        folds: int,
        data_dir: Path | None = None,
        code: Sequence[str] = (),
        nproc: int = 0,
    ):
        summary = read_run(run)
        self.run, self.folder, self.folds, self.code = run, folder, folds, tuple(code)
        self.data_dir = data_dir or path_of(summary.config.data.folder)
        settings = as_given(summary.settings)
        if is_own_code(model := str(settings.get("model", ""))):
            if not code:
                raise UserError(
                    f"{run} trains your own network, whose code is never loaded from a run: name it again, such as "
                    f"--model {short(named_again(model), 200)}"
                )
            settings["model"] = code[0]
        if "init" in settings:
            warn(
                f"{run} started from the weights of {settings['init']}: wrong labels in the images that those were "
                "trained on may go undetected"
            )
        settings |= {"data_dir": self.data_dir, "validate_every": NEVER, "tensorboard": False, "nproc": nproc}
        settings = {name: value for name, value in settings.items() if name not in ("dataset", "profile")}
        self.sweep = Sweep([f"validation_fold={fold + 1}/{folds}" for fold in range(folds)], folder, settings)

    def train(self) -> bool:
        """Train the unfinished fold runs; return whether all are finished. Stop requests are forwarded to the run.

        Raises:
            UserError: the settings are invalid, or a run failed; its own output says why.
        """
        self.sweep.check()
        _, failed = self.sweep.run()
        if failed:
            raise UserError(f"{failed[0]} failed: see above; the same command resumes")
        return not self.sweep.asked_to_stop

    def find(self, world: World) -> tuple[Suspects, IdxDataset]:
        """Return the suspects and the training images. Runs in one process.

        Raises:
            UserError: the fold runs or the data cannot be read, or do not belong together.
        """
        from dist_mnist.evaluation.checkpoints.load import load_models
        from dist_mnist.evaluation.checkpoints.split import open_split
        from dist_mnist.evaluation.choices import Split
        from dist_mnist.evaluation.evaluate import predict

        parts = []
        for path in self.sweep.runs:
            models = load_models([path], world, code=self.code)
            images = open_split(models, Split.VALIDATION, self.data_dir).dataset
            found = predict([models[0].network], images, world).numpy()
            parts.append((images.rows_of(np.arange(len(images))).rows, images.sample_labels, found))
        rows, labels, probabilities = map(np.concatenate, zip(*parts, strict=True))
        if len(np.unique(rows)) != len(rows):
            raise UserError(f"{self.folder}: its fold runs hold out some images twice; give another --output")
        in_file = np.argsort(rows)
        rows, labels, probabilities = rows[in_file], labels[in_file], probabilities[in_file]
        errors, names = find_label_errors(probabilities, labels), models[0].info.data.names
        suspects = tuple(
            Suspect(
                index=int(rows[at]), given=int(labels[at]), given_name=names[labels[at]], suggested=int(suggested),
                suggested_name=names[suggested], self_confidence=float(probabilities[at, labels[at]]),
                suggested_confidence=float(probabilities[at, suggested]), margin=float(margin),
            )
            for at, suggested, margin in zip(errors.positions, errors.suggested, errors.margins, strict=True)
        )  # fmt: skip
        return Suspects(
            run=path_text(self.run), data=path_text(self.data_dir), folds=self.folds, images=len(rows),
            estimated_errors=errors.estimate, held_out_accuracy=float(np.mean(probabilities.argmax(1) == labels)),
            suspects=suspects,
        ), images  # fmt: skip


def write_suspects(folder: Path, found: Suspects) -> tuple[Path, Path]:
    """Write suspects.json and suspects.csv (a line for each suspect), and return their paths.

    Raises:
        UserError: a file cannot be written.
    """
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(Suspect.__struct_fields__)
    writer.writerows([getattr(one, name) for name in Suspect.__struct_fields__] for one in found.suspects)
    paths = folder / "suspects.json", folder / "suspects.csv"
    for path, text in zip(paths, (to_json(found, indent=2) + "\n", table.getvalue()), strict=True):
        with os_error_as(f"{path}: cannot be written"), atomic_write(path) as file:
            file.write(text.encode())
    return paths
