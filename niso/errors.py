"""The one error a user is meant to read."""


class UserError(Exception):
    """What is wrong and what to do about it, in one line.

    The command-line programs print its message alone and leave with its exit code; every other exception is a defect of
    niso and keeps its traceback.
    """

    code = 2


class LostError(UserError):
    """Something outside was lost, not a mistake: the same command again may succeed."""

    code = 1


class RecordError(UserError):
    """One record cannot be read, parsed or decoded; those beside it may be."""
