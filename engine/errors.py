"""Errors that a user can fix."""


class UserError(Exception):
    """A user's mistake: the scripts print its one line and exit with status 2."""
