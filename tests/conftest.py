"""What every test shares: the repository on the path, no network, no W&B, and the real images if they are there."""

import copy
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
for name in ("CI", "BUILD_NUMBER"):
    os.environ.pop(name, None)  # else pytest shows how two files differ, line by line, which may take it an hour
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors gain nothing from threads that wait for each other

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_signal_handlers() -> Iterator[None]:
    """A training script catches SIGTERM for as long as its process lives; the workers of later tests must die of it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


rehearsals: dict[str, int | dict[str, int]] = {}


@pytest.fixture(autouse=True)
def _rehearsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What memory a run of the same sizes takes need not be foretold anew for every test."""

    def once(rehearse: Callable, *how: object) -> int | dict[str, int]:
        key = f"{rehearse} {how}"
        if key not in rehearsals:
            rehearsals[key] = rehearse(*how)
        return copy.copy(rehearsals[key])

    if forecast := sys.modules.get("training.memory_forecast"):
        for name in ("rehearse_step", "rehearse_rest"):
            monkeypatch.setattr(forecast, name, functools.partial(once, getattr(forecast, name)))


@pytest.fixture(scope="session")
def pokemon_folder() -> Path:
    """The real captioned images, which are not part of the repository; tests that need them skip without."""
    folder = ROOT.parent / "shared" / "pokemon"
    if not folder.is_dir():
        pytest.skip("the real images are not beside this checkout")
    return folder
