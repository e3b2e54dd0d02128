"""The chain of a run's checkpoints: each names the digest of its predecessor, and the chain outlives the files.

`chain.jsonl` in the run directory has a line for every checkpoint ever written. Lines of pruned checkpoints stay, so
that `dist-mnist replay` can verify these, too.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from msgspec import Struct

from dist_mnist.run.checkpoints.file import Checkpoint, arrays_digest
from dist_mnist.run.records import CheckpointInfo, RunResult
from dist_mnist.utils.errors import UserError
from dist_mnist.utils.files import append_line, to_json
from dist_mnist.utils.schema import Count, parse

NAME = "chain.jsonl"


class Link(Struct, frozen=True, kw_only=True):
    """A line of chain.jsonl: a checkpoint's digests."""

    step: Count
    sha256: str  # of the checkpoint: its description and its arrays
    parent: str | None  # `sha256` of its predecessor; None for a run's first
    arrays_sha256: str
    settings_sha256: str  # of the settings that affect the result
    data: str  # the data's fingerprint

    @classmethod
    def of(cls, sha256: str, info: CheckpointInfo) -> "Link | None":
        """Return a checkpoint's link; None for one from a version without the chain."""
        if info.arrays_sha256 is None or info.settings_sha256 is None:
            return None
        return cls(
            step=info.step,
            sha256=sha256,
            parent=info.parent,
            arrays_sha256=info.arrays_sha256,
            settings_sha256=info.settings_sha256,
            data=info.data.fingerprint,
        )


class Chain:
    """The links of a run, oldest first."""

    def __init__(self, run_dir: Path):
        self.path = run_dir / NAME

    @cached_property
    def links(self) -> Sequence[Link]:
        """The links in the file when this was first accessed, and those added since.

        Raises:
            UserError: the file cannot be read, or does not match its schema.
        """
        try:
            lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror})") from None
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # its writer was killed
        try:
            return [parse(line, Link) for line in lines]
        except ValueError as error:
            raise UserError(f"{self.path} cannot be read, as its content is invalid: {error}") from None

    def set_aside_if_damaged(self, tell: Callable[[str], None]) -> None:
        """Rename the file if it cannot be read, and `tell` of it; the chain then starts anew.

        Raises:
            OSError: the folder is not writable.
        """
        try:
            self.links  # noqa: B018 (reads the file)
        except UserError as error:
            aside = self.path.with_suffix(".damaged")
            self.path.rename(aside)
            tell(f"{error}. It was set aside as {aside.name}; no chain verifies earlier checkpoints any more.")

    def find(self, sha256: str | None) -> Link | None:
        """Return the link of a checkpoint, if there is one."""
        return next((link for link in self.links if link.sha256 == sha256), None)

    def before(self, link: Link) -> Iterator[Link]:
        """Yield the link's known ancestors, nearest first."""
        parent = self.find(link.parent)
        while parent and parent.step < link.step:  # a forged chain may be circular
            yield parent
            link, parent = parent, self.find(parent.parent)

    def enter(self, sha256: str, info: CheckpointInfo) -> None:
        """Append a checkpoint's link, durably, unless it exists.

        Raises:
            OSError: the file cannot be written.
        """
        link = Link.of(sha256, info)
        if link and self.find(sha256) is None:
            append_line(self.path, to_json(link).encode())
            self.links = [*self.links, link]


def fault_of(checkpoint: Checkpoint, chain: Chain) -> str | None:
    """Describe what is wrong with a valid checkpoint's place in the chain; None if nothing is."""
    info = checkpoint.info
    link = Link.of(checkpoint.sha256, info)
    if link is None:
        return None if not chain.links else "it has no digests for the chain, unlike the run's other checkpoints"
    if link.arrays_sha256 != arrays_digest(checkpoint.arrays):
        return "its arrays do not match the digest in its description"
    if link.settings_sha256 != info.config(checkpoint.path).sha256():
        return "its settings do not match the digest in its description"
    if chain.find(link.sha256) != link:
        same_step = [other for other in chain.links if other.step == link.step]
        return f"{NAME} has another checkpoint of step {link.step}" if same_step else f"it is not in {NAME}"
    ancestors = list(chain.before(link))
    for other in ancestors:
        if (other.settings_sha256, other.data) != (link.settings_sha256, link.data):
            what = "data" if other.data != link.data else "settings"
            return f"it follows step {other.step}, which was trained with other {what}"
    first = ancestors[-1] if ancestors else link
    return None if first.parent is None else f"{NAME} lacks the predecessor of step {first.step}"


def fault_of_result(result: RunResult | None, chain: Chain) -> str | None:
    """Describe what is wrong with the digest in result.json; None if nothing is, or it has none."""
    for sha256 in result.checkpoint_sha256 if result else ():
        if (link := chain.find(sha256)) is None:
            return f"its checkpoint ({sha256[:16]}...) is not in {NAME}"
        if result and link.step != result.step:
            return f"its step is {result.step}, and its checkpoint's step is {link.step}"
    return None
