"""The one exception for what a user can put right."""


class UserError(ValueError):
    """A mistake in the input, in one sentence: what was expected, what was found, where, and what to do.

    Entry points print the sentence without a traceback and leave with exit code 2.
    """


NO_GPU = "--device cuda: there is no usable GPU on this machine; leave the option out to train on the CPU"
