"""Two real processes (gloo, on the CPU) train what one does, to the last bit; they stop, fail and restart together."""

import filecmp
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.children import Child, signal_at, start
from tests.conftest import ROOT
from tests.tiny import tiny_parts, training_arguments

SCHEDULE = (
    "--max_steps 6 --checkpoint_every 2 --validate_every 3 --preview_every 6 --log_every 3 --noise_offset 0.1".split()
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    tiny_parts(folder / "parts")
    return folder


def start_job(folder: Path, output: Path, count: int, *more: str, trap: dict[int, tuple] | None = None) -> list[Child]:
    """`torchrun --nproc_per_node count`, without torchrun's seconds; `trap`: rank → what is called there first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    argv = [*training_arguments(folder / "parts", *SCHEDULE), "--output_dir", str(output), *more]
    children = []
    for rank in range(count):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        printed = output.with_name(f"{output.name}_{len(list(output.parent.glob('*.txt')))}_{rank}.txt")
        given = {name: str(value) for name, value in environment.items()} if count > 1 else {}
        before = (trap or {}).get(rank, (None,))
        children.append(start("train_stable_diffusion", argv, folder / "cache", printed, *before, environment=given))
    return children


def train(folder: Path, output: Path, count: int, *more: str) -> Path:
    for child in start_job(folder, output, count, *more):
        assert child.wait() == 0, child.output()
    return output


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """One process that works through each batch in two halves."""
    return train(folder, folder / "alone", 1, "--gradient_accumulation", "2")


def assert_same_run(run: Path, other: Path) -> None:
    ours, theirs = (torch.load(r / "checkpoints" / "step_00000006.pt", weights_only=True) for r in (run, other))
    for part in ("unet", "ema"):
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in theirs[part]), part
    for a, b in zip(ours["optimizer"]["state"].values(), theirs["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in b)
    for name in ("metrics.csv", "samples/step_000006.png"):
        assert filecmp.cmp(run / name, other / name, shallow=False), name


def test_two_processes_train_what_one_does_in_two_halves(folder: Path, alone: Path) -> None:
    assert_same_run(train(folder, folder / "together", 2), alone)


def test_the_number_of_processes_may_change_in_mid_run(folder: Path, alone: Path) -> None:
    """2 → 1 → 2: stopped at steps 2 and 4 by a signal, each time resumed by another number of processes."""
    run = folder / "changing"
    plans = [(2, (), 2), (1, ("--resume", "--gradient_accumulation", "2"), 2)]
    for count, more, step in plans:
        for child in start_job(folder, run, count, *more, trap={0: (signal_at, "step", step, signal.SIGTERM)}):
            assert child.wait() == 0 and "Traceback" not in child.output(), child.output()
    train(folder, run, 2, "--resume", "--gradient_accumulation", "1")
    assert_same_run(run, alone)


@pytest.mark.parametrize(
    ("place", "moments", "step"),
    [("step", {0: 2}, 2), ("step", {1: 3}, 3), ("step", {0: 2, 1: 4}, 2), ("validation", {1: 5}, 3)],
)
def test_a_signal_on_one_process_stops_all_after_the_same_step(
    folder: Path, alone: Path, tmp_path: Path, place: str, moments: dict[int, int], step: int
) -> None:
    trap = {rank: (signal_at, place, count, signal.SIGTERM) for rank, count in moments.items()}
    children = start_job(folder, tmp_path / "run", 2, trap=trap)
    for child in children:
        assert child.wait() == 0 and "Traceback" not in child.output(), child.output()
    assert f"Stopped at step {step} and saved" in children[0].output()
    assert "validation loss" not in children[0].output()  # a stop within one leaves it to the next run
    assert_same_run(train(folder, tmp_path / "run", 2, "--resume"), alone)


def test_processes_that_cannot_share_a_batch_are_refused(folder: Path, tmp_path: Path) -> None:
    for child in start_job(folder, tmp_path / "run", 2, "--batch_size", "3"):
        assert child.wait() == 1 and "--batch_size 3 must be divisible" in child.output()


FAILING = """
import os, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import datasets, torch
import train_stable_diffusion as script
from training import memory_forecast
from training.script import run

torch.set_num_threads(1)
memory_forecast.rehearse_step = lambda *_: 0
memory_forecast.rehearse_rest = lambda *_: dict.fromkeys(("preview", "encoding"), 0)
calls, train_step = 0, script.train_step

def fails_once(*args):
    global calls
    calls += 1
    if calls == 4 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        raise RuntimeError("the fourth step failed on purpose")
    return train_step(*args)

script.train_step = fails_once
run(script.main)
"""


@pytest.mark.long
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_rank_that_fails_ends_the_job_with_its_own_error_and_torchrun_goes_on(
    folder: Path, alone: Path, tmp_path: Path, restarts: int
) -> None:
    """Under the real torchrun: without restarts the error is shown; with one, the run ends as if nothing had been."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(root=str(ROOT)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    argv = [*training_arguments(folder / "parts", *SCHEDULE), "--output_dir", str(tmp_path / "run")]
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, "--max-restarts", str(restarts), str(script), *argv],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert "the fourth step failed on purpose" in done.stderr
    assert (done.returncode == 0) == bool(restarts), done.stderr
    if restarts:
        assert_same_run(tmp_path / "run", alone)
