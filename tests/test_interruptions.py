"""A run may be killed or stopped at any moment: resumed, it ends with the bytes of one that was not."""

import contextlib
import filecmp
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.children import Child, signal_at, start
from tests.tiny import folder_at, tiny_parts, training_arguments

SCHEDULE = "--max_steps 8 --checkpoint_every 3 --validate_every 2 --preview_every 4 --log_every 4".split()

# What a run does, in the order of its life, and how often: the n-th time that it comes there, it is struck.
PLACES = [
    ("encoding", 1), ("encoding", 5), ("loading", 1), ("step", 1), ("step", 3), ("step", 6), ("step", 8),
    ("average", 4), ("row", 2), ("row", 5), ("validation", 20), ("preview", 3), ("decoding", 2), ("checkpoint", 1),
    ("checkpoint", 2), ("flush", 30), ("rename", 1), ("replace", 2), ("replace", 9), ("replace", 14), ("model", 2),
    ("model", 4), ("plot", 2), ("validation", 15),
]  # fmt: skip


class Runs:
    """Runs of one tiny script in folders of their own; they share the drawn monsters, not the encoded ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.arguments = training_arguments(tiny_parts(folder / "parts"), *SCHEDULE)
        self.count = 0

    def start(self, output: Path, *more: str, trap: tuple = (), cache: Path | None = None) -> Child:
        self.count += 1
        argv = [*self.arguments, "--output_dir", str(output), *more]
        return start("train_stable_diffusion", argv, cache or self.folder / "cache", output.with_suffix(".txt"), *trap)

    def go_on(self, output: Path, cache: Path | None = None) -> str:
        """Starts the run in `output` again as a user would, lets it end well, and returns what it printed."""
        resume = ["--resume"] if list((output / "checkpoints").glob("step_*.pt")) else []
        child = self.start(output, *resume, cache=cache)
        assert child.wait() == 0, child.output()
        return child.output()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def reference(runs: Runs) -> Path:
    """A run that nobody disturbed."""
    child = runs.start(runs.folder / "undisturbed")
    assert child.wait() == 0, child.output()
    return runs.folder / "undisturbed"


def assert_same_run(run: Path, reference: Path) -> None:
    """The same bytes of weights, average, optimizer, metrics and previews, and nothing half written beside them."""
    ours, theirs = (torch.load(r / "checkpoints" / "step_00000008.pt", weights_only=True) for r in (run, reference))
    for part in ("unet", "ema"):
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in theirs[part]), part
    for a, b in zip(ours["optimizer"]["state"].values(), theirs["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in b)
    names = [
        "metrics.csv",
        "model/unet/diffusion_pytorch_model.safetensors",
        "best_model/unet/diffusion_pytorch_model.safetensors",
    ]
    names += [f"samples/{name}" for name in ("step_000004.png", "step_000008.png", "prompts.txt")]
    for name in names:
        assert filecmp.cmp(run / name, reference / name, shallow=False), name
    best = [torch.load(r / "checkpoints" / "best.pt", weights_only=True) for r in (run, reference)]
    assert best[0]["step"] == best[1]["step"] and best[0]["best_validation"] == best[1]["best_validation"]
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept[0] == "best.pt" and kept[-1] == "step_00000008.pt" and len(kept) == 3  # a stop saves one between
    assert not [path for path in run.rglob(".*")]


@pytest.mark.parametrize(("place", "count"), PLACES)
def test_killed_and_resumed(runs: Runs, reference: Path, tmp_path: Path, place: str, count: int) -> None:
    cache = tmp_path / "cache" if place == "encoding" else None
    child = runs.start(tmp_path / "run", trap=(signal_at, place, count, signal.SIGKILL), cache=cache)
    assert child.wait() == -signal.SIGKILL, child.output()
    runs.go_on(tmp_path / "run", cache)
    assert_same_run(tmp_path / "run", reference)


@pytest.mark.parametrize(
    ("index", "place", "count"),
    [pytest.param(i, *place, marks=[pytest.mark.long] * (i % 4 in (1, 2))) for i, place in enumerate(PLACES)],
)
def test_stopped_and_resumed(runs: Runs, reference: Path, tmp_path: Path, index: int, place: str, count: int) -> None:
    """One line, no traceback, "saved" only with a checkpoint of that very step; then as if nothing had been."""
    number = (signal.SIGINT, signal.SIGTERM)[index % 2]
    cache = tmp_path / "cache" if place == "encoding" else None
    child = runs.start(tmp_path / "run", trap=(signal_at, place, count, number), cache=cache)
    code = child.wait()
    printed = child.output()
    assert "Traceback" not in printed
    if place in ("step", "average"):
        assert f"Stopped at step {count} and saved" in printed
    if place == "preview":
        assert "Stopped at step 8 and saved" in printed  # the third call is in the second preview, of two calls each
    if (place, count) == ("validation", 15):  # in the second one: it is left to the next run, not waited for
        assert "Stopped at step 4 and saved" in printed and "step 4: validation loss" not in printed
    if code == 0 and "Stopped at step" in printed:
        step = int(printed.rpartition("Stopped at step ")[2].split()[0])
        assert "and saved" in printed and (tmp_path / "run" / "checkpoints" / f"step_{step:08d}.pt").is_file()
    elif code:
        assert code == 128 + number and "Stopped." in printed
    runs.go_on(tmp_path / "run", cache)
    assert_same_run(tmp_path / "run", reference)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_killed_and_stopped_at_random_moments(runs: Runs, reference: Path, tmp_path: Path, seed: int) -> None:
    """Struck again and again, by the clock, until it has got through."""
    chance = random.Random(seed)
    for _ in range(8):
        resume = ["--resume"] if list((tmp_path / "run" / "checkpoints").glob("step_*.pt")) else []
        child = runs.start(tmp_path / "run", *resume)
        child.process.join(chance.uniform(0.2, 2.5))
        if child.process.exitcode is None:
            number = chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            if child.process.is_alive():
                os.kill(child.process.pid, number)
        child.wait()
        assert "Traceback" not in child.output(), child.output()
    if not (tmp_path / "run" / "checkpoints" / "step_00000008.pt").exists() or "Done" not in child.output():
        runs.go_on(tmp_path / "run")
    assert_same_run(tmp_path / "run", reference)


# ----------------------------------------------------------------------------------------------------------------------
# Workers
# ----------------------------------------------------------------------------------------------------------------------


def wait_until_nobody_is_left(child: Child, seconds: float = 20) -> None:
    """Fails if a process of the child's group is alive after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(child.process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(child.process.pid, signal.SIGKILL)
    raise AssertionError("a worker is left")


@pytest.mark.parametrize(
    "signals",
    [
        [signal.SIGTERM] * 2,
        pytest.param([signal.SIGTERM], marks=pytest.mark.long),
        pytest.param([signal.SIGINT], marks=pytest.mark.long),
        pytest.param([signal.SIGKILL], marks=pytest.mark.long),
    ],
)
def test_a_stop_while_monsters_are_drawn_leaves_no_worker(runs: Runs, tmp_path: Path, signals: list[int]) -> None:
    child = runs.start(tmp_path / "run", "--dataset", "monsters:3000", "--resolution", "128", cache=tmp_path / "cache")
    time.sleep(1.5)
    for number in signals:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.process.pid, number)
        time.sleep(0.02)
    code = child.wait(30)
    assert code == (-9 if signals[0] == signal.SIGKILL else 128 + signals[0]) and "Traceback" not in child.output()
    wait_until_nobody_is_left(child)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_whole_job_of_a_clip_saves_it_or_ends_it(tmp_path: Path, number: int) -> None:
    """Its workers, which draw, neither die of a stop that is meant for the main process, nor outlive that."""
    small = "--image_size 32 --patch_size 16 --vision_width 32 --vision_layers 1 --text_width 32 --text_layers 1"
    small += " --head_width 16 --projection_width 16 --vocabulary_size 900 --batch_size 8 --validation_images 2"
    more = "--workers 2 --fresh_monsters 4 --pool 64 --max_steps 100000 --log_every 1 --wandb off --device cpu"
    argv = [*small.split(), *more.split(), "--dataset", "monsters", "--output_dir", str(tmp_path / "run")]
    child = start("train_clip", argv, tmp_path / "cache", tmp_path / "printed")
    end = time.monotonic() + 60
    while "step 3/" not in (child.output() if child.printed.exists() else "") and time.monotonic() < end:
        time.sleep(0.05)
    if number == signal.SIGTERM:
        os.killpg(child.process.pid, number)
        assert child.wait(60) == 0 and "and saved" in child.output() and "Traceback" not in child.output()
    else:
        child.process.kill()
        child.wait()
    wait_until_nobody_is_left(child)
    folder_at(tmp_path / "run", resume=True).close()  # nobody holds it
