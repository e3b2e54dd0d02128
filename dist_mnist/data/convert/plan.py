"""The plan of an import: which classes to import, and which pictures for training and for testing."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dist_mnist.data.convert.choices import Colour, Layout, Split
from dist_mnist.data.convert.readers.labels import chosen_classes, draw
from dist_mnist.data.convert.readers.source import Part, Source, join
from dist_mnist.utils.errors import UserError, short


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """How to import; the help of `dist-mnist data import` describes the fields."""

    size: tuple[int, int] | None = None  # height, width
    colour: Colour = Colour.AS_IS
    invert: bool = False
    test_fraction: float | None = None
    merge_validation: bool = False
    classes: tuple[str, ...] | None = None
    limit: int | None = None
    seed: int = 0
    jobs: int = 0  # 0: one per core
    skip_bad: bool = False
    layout: Layout | None = None
    label_column: str | None = None
    pixel_max: float | None = None


@dataclass(frozen=True)
class Plan:
    """What to import: the parts of a source in turn, with new labels (-1: skipped) and the choice of test pictures."""

    source: Source
    classes: tuple[str, ...]
    is_fixed: bool  # whether classes without training pictures are kept
    parts: tuple[tuple[Part, np.ndarray, np.ndarray], ...]  # part, labels (N,) int32, is_test (N,) bool
    notes: tuple[str, ...]

    @property
    def total(self) -> int:
        """Number of pictures to read."""
        return sum(int((labels >= 0).sum()) for _, labels, _ in self.parts)


def make_plan(source: Source, options: ImportOptions) -> Plan:
    """Plan which pictures of a source to import, and into which split.

    Raises:
        UserError: the training or test split is missing, or a class has no training pictures.
    """
    parts, notes = _train_and_test(source, options)
    classes, new_labels = chosen_classes(source.classes, options.classes)
    labels = {split: new_labels[part.labels] for split, part in parts.items()}
    left_out = sum(int((found < 0).sum()) for found in labels.values())
    if left_out:
        notes.append(f"skipped {left_out} pictures of classes that --classes does not name")
    is_fixed = source.is_fixed and options.classes is None
    notes += check_classes(labels[Split.TRAIN], classes, is_fixed)
    if Split.TEST not in parts and options.test_fraction is None:
        raise UserError(
            f"the source has {len(parts[Split.TRAIN].labels)} pictures but no test split: --test-fraction 0.15 holds "
            "out some for it, --test-fraction 0 none"
        )
    is_test = {split: np.full(len(found), split == Split.TEST) for split, found in labels.items()}
    if options.test_fraction:
        is_test[Split.TRAIN] = _draw(labels[Split.TRAIN], options.test_fraction, options.seed)
    if options.limit is not None:
        _limit(labels, is_test, options.limit, len(classes), options.seed)
        notes.append(f"imported at most {options.limit} pictures per split, sampled by seed {options.seed}")
    planned = tuple((part, labels[split], is_test[split]) for split, part in parts.items())
    return Plan(source, classes, is_fixed, planned, (*source.notes, *notes))


def without(plan: Plan, unusable: np.ndarray, options: ImportOptions) -> Plan:
    """Return the plan without the pictures of the indices `unusable` (n,) among `total`, and with a new test split."""
    assert options.test_fraction
    [(part, old_labels, _)] = plan.parts  # a test split is sampled only if the source has none
    labels = old_labels.copy()
    labels[np.flatnonzero(labels >= 0)[unusable]] = -1
    return replace(plan, parts=((part, labels, _draw(labels, options.test_fraction, options.seed)),))


def _train_and_test(source: Source, options: ImportOptions) -> tuple[dict[Split, Part], list[str]]:
    """Return the splits to use, and a note on a validation split, which folders of idx files do not have."""
    parts = {split: part for split, part in source.parts.items() if len(part.labels)}
    notes = []
    validation = parts.pop(Split.VALIDATION, None)
    count = 0 if validation is None else len(validation.labels)
    if Split.TRAIN not in parts:
        raise UserError(f"the source has no training split, only {', '.join(source.parts)}; training needs one")
    if validation is not None and options.merge_validation:
        parts[Split.TRAIN] = join([parts[Split.TRAIN], validation])
        notes.append(f"added the validation split ({count} pictures) to the training split")
    elif validation is not None and Split.TEST not in parts:
        parts[Split.TEST] = validation
        notes.append(f"used the validation split ({count} pictures) as the test split, because there is no other")
    elif validation is not None:
        notes.append(f"skipped the validation split ({count} pictures); --merge-validation adds it to training")
    if Split.TEST in parts and options.test_fraction is not None:
        raise UserError(
            f"--test-fraction {options.test_fraction}: the source has a test split of {len(parts[Split.TEST].labels)} "
            "pictures; omit the option" + (", or add --merge-validation" if count else "")
        )
    return {split: parts[split] for split in (Split.TRAIN, Split.TEST) if split in parts}, notes


def check_classes(train_labels: np.ndarray, classes: Sequence[str], is_fixed: bool) -> list[str]:
    """Return a note on classes without training pictures, which are allowed if the classes are fixed.

    Raises:
        UserError: they are not fixed and a class is empty, or there are fewer than two classes.
    """
    counts = np.bincount(train_labels[train_labels >= 0], minlength=len(classes))
    if len(classes) < 2:
        raise UserError(f"there is only one class, {', '.join(map(repr, classes))}; training needs at least two")
    if empty := [name for name, count in zip(classes, counts, strict=True) if count == 0]:
        found = f"{len(empty)} of {len(classes)} classes have no training pictures: {short(', '.join(empty), 200)}"
        if not is_fixed or len(empty) == len(classes):
            raise UserError(f"{found}; name the classes to import by --classes a,b,c")
        return [f"{found}; they are in classes.json"]
    return []


def _draw(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    used = np.flatnonzero(labels >= 0)
    drawn = np.zeros(len(labels), bool)
    drawn[used[draw(labels[used], round(fraction * len(used)), ("import-test", seed), spare=1)]] = True
    if not drawn.any():
        raise UserError(f"--test-fraction {fraction} of {len(used)} pictures is less than one picture; increase it")
    return drawn


def _limit(
    labels: dict[Split, np.ndarray], is_test: dict[Split, np.ndarray], limit: int, classes: int, seed: int
) -> None:
    """Limit the training and the test pictures to `limit` each."""
    if limit < classes:
        raise UserError(f"--limit {limit} is less than one picture for each of the {classes} classes")
    for split, found in labels.items():
        for for_test in (False, True):
            rows = np.flatnonzero((found >= 0) & (is_test[split] == for_test))
            if len(rows) > limit:
                found[rows[~draw(found[rows], limit, ("import-limit", for_test, seed), least=1)]] = -1
