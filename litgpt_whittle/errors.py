"""The one exception that stands for a user's mistake, so that the commands can show it without a traceback."""


class UserError(ValueError):
    """A mistake in what the user asked for, told in one line: the rule, the value, the remedy."""
