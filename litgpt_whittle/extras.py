"""Optional packages, checked when they are needed."""

from __future__ import annotations

from importlib import import_module

from litgpt_whittle.errors import UserError


def require(package: str, extra: str, what: str) -> None:
    """Check that an optional package is installed.

    Args:
        package: The package's import name.
        extra: The extra of this project that installs it.
        what: The feature that needs it, for the message.

    Raises:
        UserError: If the package cannot be imported.
    """
    try:
        import_module(package)
    except ImportError as error:
        raise UserError(f"{what} needs {package} ({error}); run pip install 'litgpt-whittle[{extra}]'") from None
