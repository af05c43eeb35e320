"""The exception for invalid user input, which commands print without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Invalid user input, as a one-line message: the rule, the value, the remedy."""


def find_user_error(error: BaseException | None) -> UserError | None:
    """Return the first UserError among an exception and its chain of causes; None if there is none."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error
