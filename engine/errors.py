"""What a user can mend."""


class UserError(Exception):
    """A mistake of the user's: the scripts print its one line and exit with status 2."""
