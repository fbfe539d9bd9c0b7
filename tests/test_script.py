"""How a script starts and ends: nobody looks for garbage where there is none."""

import gc
import sys
import warnings
from collections.abc import Iterator

import pytest

from training.script import UserError, quick_imports, run


@pytest.fixture(autouse=True)
def _nothing_stays_frozen() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.enable()
    gc.unfreeze()


@pytest.mark.parametrize("fails", [False, True])
def test_no_garbage_is_looked_for_during_imports_but_afterwards_it_is(fails: bool) -> None:
    assert gc.isenabled()
    try:
        with quick_imports():
            assert not gc.isenabled()
            if fails:
                raise ImportError("no such module")
    except ImportError:
        assert fails
    assert gc.isenabled() and gc.get_freeze_count() > 0


@pytest.mark.parametrize("error", [None, UserError("--output: no"), KeyboardInterrupt(), ZeroDivisionError("a bug")])
def test_nor_is_it_at_the_end_of_a_script_whatever_ends_it(error: BaseException | None, monkeypatch, capsys) -> None:
    def main(argv: list[str]) -> None:
        assert gc.isenabled()
        gc.unfreeze()  # what the imports made
        if error:
            raise error

    monkeypatch.setattr(sys, "argv", ["script.py"])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    if error:
        with pytest.raises((SystemExit, ZeroDivisionError)):
            run(main)
    else:
        run(main)
    assert gc.get_freeze_count() > 0
