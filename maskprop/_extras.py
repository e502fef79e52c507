"""Optional dependencies, imported where they are used and named by the extra that brings them."""

from __future__ import annotations

import importlib
from types import ModuleType

from maskprop.errors import MissingExtraError


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: dotted name of the module, for example `"matplotlib.pyplot"`.
        extra: the extra of maskprop that installs it.
        purpose: what needs it, as the subject of a sentence.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: the package is not installed. A package that is there but broken raises its own
            error, which says more.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise MissingExtraError(
            f"{purpose} needs the package '{package}', which is not installed. "
            f"Install it with: pip install 'maskprop[{extra}]'"
        ) from error
