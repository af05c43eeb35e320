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
