"""Which software a run was made with."""

import platform

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that bear on a run's numbers."""
    from importlib.metadata import version  # slow to import, and most commands do without

    others = {name: version(name) for name in ("numpy", "torch")}
    return {"python": platform.python_version(), "dist-mnist": __version__} | others
