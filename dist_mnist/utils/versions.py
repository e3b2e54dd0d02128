"""Which software a run was made with."""

import platform
from importlib.metadata import version

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that bear on a run's numbers."""
    others = {name: version(name) for name in ("numpy", "torch")}
    return {"python": platform.python_version(), "dist-mnist": __version__} | others
