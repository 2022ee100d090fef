"""The one error a user is meant to read."""


class UserError(Exception):
    """What is wrong and what to do about it, in one line.

    The command-line programs print its message alone and leave with exit code 2; every other exception is a defect of
    niso and keeps its traceback.
    """


class RecordError(UserError):
    """One record cannot be read, parsed or decoded; those beside it may be."""
