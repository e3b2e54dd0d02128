"""Which software a run was made with."""

import platform
from importlib.metadata import version


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that bear on a run's numbers."""
    return {"python": platform.python_version()} | {name: version(name) for name in ("dist-mnist", "numpy", "torch")}
