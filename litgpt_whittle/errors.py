"""The exception for invalid user input, which commands print without a traceback."""

from __future__ import annotations

from typing import Any


class UserError(ValueError):
    """Invalid user input, as a one-line message: the rule, the value, the remedy."""

    last: UserError | None = None
    """The most recent instance; an argument parser may have wrapped it in another error"""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        UserError.last = self

    @classmethod
    def inside(cls, error: BaseException | str) -> UserError | None:
        """Return the last UserError if the message of another error contains it, else None.

        If an argument allows several types, jsonargparse lists the errors of all types in one message.
        """
        return cls.last if cls.last is not None and str(cls.last) in str(error) else None
