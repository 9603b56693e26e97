"""The root of every error that is the user's to mend."""


class CapError(Exception):
    """One line for the user: what is wrong, and with which file. Anything else is our bug.

    Each module raises its own kind; only the command line turns one into a message and exit code 1.
    """
