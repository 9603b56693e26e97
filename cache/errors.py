"""The base class of all errors that the user can fix."""


class CapError(Exception):
    """An error with a one-line message for the user: which file, and what is wrong with it.

    Each module raises a subclass of its own. Only the command line turns one into a message and
    exit code 1. Any other exception is a bug of this program.
    """
