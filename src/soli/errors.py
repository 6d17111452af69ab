"""The error of everything that a user can cause: the command line prints it as a sentence, never as a traceback."""


class SoliError(Exception):
    """What was wrong, where, and what to do about it, in one sentence."""
