"""What is said of a user's mistakes and of what deserves a look."""

import sys

# Exit codes of ranks that have told why themselves.
MISTAKE = 2  # of the user
STALLED = 3


class UserError(ValueError):
    """A mistake in the input, in one sentence: what was expected, what was found, where, and what to do.

    Entry points print the sentence without a traceback and leave with exit code `MISTAKE`.
    """


NO_GPU = "--device cuda: there is no usable GPU on this machine; leave the option out to train on the CPU"


def warn(text: str) -> None:
    """Say on standard error what a user should look at, though the program goes on."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
