"""How a script starts and ends: what the user can mend is one sentence, what is our fault keeps its traceback.

Imports nothing heavy, so that `--help` is there at once.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator


class UserError(ValueError):
    """Something that the user gave, or the machine lacks: the text says in one sentence what it is and what to do."""


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns ValueErrors into `UserError`; around calls that read or check what the user gave, and nothing else."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def run(main: Callable[[list[str]], None]) -> None:
    """Runs `main` on the command line. A `UserError`, an OSError (disk, network, permissions) and a lack of memory end
    the program with one sentence and status 1; DEBUG=1 in the environment keeps their tracebacks, too."""
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        if os.environ.get("DEBUG"):
            raise
        sys.exit(f"error: {error}")
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError" or os.environ.get("DEBUG"):  # torch's, which may not be loaded
            raise
        first_line = str(error).splitlines()[0]
        sys.exit(f"error: out of memory ({first_line}): try a smaller --batch_size or a lower resolution.")
