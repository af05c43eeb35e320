"""The one exception that stands for a user's mistake, so that the commands can show it without a traceback."""

from __future__ import annotations

from typing import Any


class UserError(ValueError):
    """A mistake in what the user asked for, told in one line: the rule, the value, the remedy."""

    last: UserError | None = None
    """The latest one, which a parser of arguments may have put into an error of its own"""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        UserError.last = self

    @classmethod
    def inside(cls, error: BaseException) -> UserError | None:
        """The last mistake, where another error tells of it among others.

        Where an argument may be of several types, jsonargparse tells what each of them had against it.
        """
        return cls.last if cls.last is not None and str(cls.last) in str(error) else None
