"""Optional packages, asked for where they are needed."""

from __future__ import annotations

from importlib import import_module

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
