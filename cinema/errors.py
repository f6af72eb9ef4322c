"""Errors meant for people: the command line prints their one sentence and no traceback."""


class UserError(ValueError):
    """Something the user can mend; the message says what is wrong, where, and what to do."""
