"""Versions of the software that makes a run."""

import platform

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect a run's numbers."""
    from importlib.metadata import version  # slow to import, and most commands do not need it

    others = {name: version(name) for name in ("numpy", "torch")}
    return {"python": platform.python_version(), "dist-mnist": __version__} | others
