"""How a script starts, stops and fails: what the user can mend is one sentence, bugs keep their traceback.

Imports nothing heavy, so that `--help` is there at once.
"""

import contextlib
import gc
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

if not sys.stderr.isatty():  # a file gets plain lines; these libraries look when they are imported
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


class UserError(ValueError):
    """Something that the user gave, or the machine lacks: the text says in one sentence what it is and what to do."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, where nothing needs to be saved first."""


@contextlib.contextmanager
def user_errors(hint: str = "") -> Iterator[None]:
    """Turns ValueErrors into `UserError`; around calls that read or check what the user gave, and nothing else.

    `hint` is added where a file or the hub does not give what is asked for.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        if not hint:
            raise
        raise UserError(str(error).removesuffix(".") + hint) from error
    except ValueError as error:
        raise UserError(str(error)) from error


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Around large imports: a quarter of their time would go into looking for garbage among objects that all stay."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # nor is it looked for among them later
        gc.enable()


def run(main: Callable[[list[str]], None]) -> None:
    """Runs `main` on the command line; whatever ends it early is one line, unless it is a bug.

    A `UserError`, an OSError (disk, network, permissions) and a lack of memory end the program with status 1, Ctrl-C
    with 130 and SIGTERM with 143. DEBUG=1 in the environment keeps the traceback of all but the signals.
    """
    gc.freeze()  # what the imports made
    gc.enable()
    _handle(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a locale without × must not end a run
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # for users, who need no line of our code
    try:
        main([os.fsencode(argument).decode("utf-8", "replace") for argument in sys.argv[1:]])  # whatever the locale
    except KeyboardInterrupt as stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # no second traceback while the interpreter cleans up
        print("\nStopped. The same command goes on with what was prepared so far.", file=sys.stderr, flush=True)
        _leave_group()
        sys.exit(143 if isinstance(stop, Terminated) else 130)
    except (UserError, OSError) as error:
        if os.environ.get("DEBUG"):
            raise
        sys.exit(f"error: {error}")
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError" or os.environ.get("DEBUG"):  # torch's, which may not be loaded
            raise
        first_line = str(error).splitlines()[0]
        sys.exit(f"error: out of memory ({first_line}): try a smaller --batch_size or --resolution.")
    else:
        _leave_group()
    finally:
        gc.freeze()  # else the interpreter looks through all objects once more when it ends, which takes a second
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # from here on there is nothing to say


def _leave_group() -> None:
    """Ends the communication of a job of several processes, if there is one."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# Signals
# ----------------------------------------------------------------------------------------------------------------------


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would break what the first one ends in order
    raise Terminated


def _show_uncaught(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    """As Python does, but for Ctrl-C, such as during the imports, which is one line."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nStopped.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _show_uncaught


def _handle(number: int, handler: Callable) -> Any:
    """Installs a handler for this process alone: a forked worker, which inherits it, dies of the signal as usual."""
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            handler(number, frame)
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    return signal.signal(number, handle)


class StopRequest:
    """Within this context, the first Ctrl-C or SIGTERM only sets `asked`, so that a loop can save; the second ends."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._before = {number: _handle(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
