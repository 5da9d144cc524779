"""The lines that install what is missing: the one place that messages take them from.

They work in any environment, whatever star-kernels was installed from: no line presumes that an index has it.
"""

from __future__ import annotations

import importlib.metadata
import re
import shlex

OLDEST_TORCH = (2, 11)  # of the compiled operators, which are tested with 2.13 and later

REBUILD = "to build it for this torch, in a clone of star-kernels: pip install --no-deps ."
REBUILD_CUDA = "to build it, in a clone of star-kernels and with nvcc: STAR_CUDA=1 pip install --no-deps ."


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def requirements(extra: str) -> list[str]:
    """What an extra of star-kernels asks for, as pip takes it; [] where star-kernels itself is not installed."""
    try:
        every = importlib.metadata.requires("star-kernels") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    pairs = [requirement.partition(";")[::2] for requirement in every]
    return [name.strip() for name, marker in pairs if re.search(rf"""extra\s*==\s*['"]{extra}['"]""", marker)]


def missing(extra: str) -> list[str]:
    """Those requirements of an extra that are not installed."""
    return [requirement for requirement in requirements(extra) if not _is_installed(_name(requirement))]


def install_line(extra: str, module: str) -> str | None:
    """The command that brings a module which could not be imported, with all that its extra lacks.

    Returns:
        None if the module is not the extra's, which is then complete.
    """
    every = requirements(extra)
    if not every:
        return f"in a clone of star-kernels: pip install '.[{extra}]'"
    top = module.partition(".")[0].lower().replace("_", "-")
    wanted = missing(extra) or [requirement for requirement in every if _name(requirement).lower() == top]
    return f"pip install {shlex.join(wanted)}" if wanted else None
