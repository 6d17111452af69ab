"""The error of everything that a user can cause: the command line prints it as a sentence, never as a traceback."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class SoliError(Exception):
    """What was wrong, where, and what to do about it, in one sentence."""


@contextmanager
def library_errors(explain: Callable[[str], SoliError]) -> Iterator[None]:
    """Raises `explain(message)` in place of what a library raises: also of a panic of Rust code, which is no Exception.

    For libraries that compute what a file or a request says, and document no errors of their own.
    """
    try:
        yield
    except SoliError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # an interrupt
        raise explain(str(error)) from error
