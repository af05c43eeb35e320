"""Optional packages, asked for where they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from litgpt_whittle.errors import UserError


def require(package: str, extra: str, what: str) -> None:
    """Refuses what needs a package that is not installed.

    Args:
        package: The package, by the name that it is imported by.
        extra: The extra of this project that installs it.
        what: What needs it.

    Raises:
        UserError: If it cannot be imported.
    """
    try:
        import_module(package)
    except ImportError as error:
        raise UserError(f"{what} needs {package} ({error}); run pip install 'litgpt-whittle[{extra}]'") from None


@contextmanager
def naming_packages(data: Any) -> Iterator[None]:
    """Tells of a package that a data module needs.

    Raises:
        UserError: If one is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"{type(data).__name__} needs the package {error.name}; install it, or choose other data such as HFText"
        ) from None
