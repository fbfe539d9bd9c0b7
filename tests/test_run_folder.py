"""The run folder: what is in it is whole, the disk may be full, and nobody else writes there."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.children import start
from tests.conftest import ROOT
from tests.tiny import folder_at
from training import run_folder
from training.presets import UNetOptions
from training.run_folder import DivergedError, RunFolder, atomically, environment, load_checkpoint
from training.script import UserError

CPU = torch.device("cpu")
COLUMNS = ("step", "loss", "validation_loss")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = folder_at(tmp_path / "run")
    folder.start(UNetOptions(), COLUMNS)
    yield folder
    folder.close()


def state(step: int, value: float = 1.0) -> dict:
    return {"step": step, "weights": torch.full((1000,), float(value)), "nested": [{"more": torch.ones(2)}]}


def names(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in (folder.path / "checkpoints").iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# Whole or not there
# ----------------------------------------------------------------------------------------------------------------------


def test_what_fails_while_it_is_written_leaves_what_was_there(tmp_path: Path) -> None:
    file, room = tmp_path / "file", tmp_path / "room"
    file.write_text("old")
    room.mkdir()
    (room / "inside").write_text("old")
    for path in (file, room / "inside", room):
        with pytest.raises(RuntimeError), atomically(path) as temporary:
            if path == room:
                temporary.mkdir()
            else:
                temporary.write_text("half")
            raise RuntimeError
    assert file.read_text() == (room / "inside").read_text() == "old"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "inside", "room"]
    with atomically(room) as temporary:
        temporary.mkdir()
        (temporary / "other").write_text("new")
    assert [p.name for p in room.iterdir()] == ["other"]


def test_content_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(Path, "replace", lambda self, to: (events.append("rename"), replace(self, to))[1])
    with atomically(tmp_path / "file") as temporary:
        temporary.write_text("content")
    assert events == [str(tmp_path / ".file.tmp"), "rename", str(tmp_path)]


def test_a_folder_that_was_being_replaced_when_the_power_went_is_put_back(tmp_path: Path) -> None:
    (tmp_path / "run" / ".model.old").mkdir(parents=True)
    (tmp_path / "run" / ".model.old" / "weights").write_text("old")
    (tmp_path / "run" / ".model.tmp").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / ".step_00000005.pt.tmp").write_text("half")
    folder_at(tmp_path / "run", resume=True).close()
    assert (tmp_path / "run" / "model" / "weights").read_text() == "old"
    assert sorted(p.name for p in (tmp_path / "run").rglob("*")) == ["checkpoints", "model", "weights"]


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------


def test_the_last_few_and_the_best_are_kept(folder: RunFolder) -> None:
    for step in range(1, 6):
        folder.save_checkpoint(state(step, step), keep=2, is_best=step == 2)
    assert names(folder) == ["best.pt", "step_00000004.pt", "step_00000005.pt"]
    assert torch.load(folder.path / "checkpoints" / "best.pt", weights_only=True)["weights"][0] == 2
    assert load_checkpoint(folder.path, CPU)["step"] == 5


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign", "pickle"])
def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_is_used(
    folder: RunFolder, capsys: pytest.CaptureFixture, damage: str
) -> None:
    for step in (1, 2):
        folder.save_checkpoint(state(step, step), keep=2)
    newest = folder.path / "checkpoints" / "step_00000002.pt"
    content = bytearray(newest.read_bytes())
    match damage:
        case "cut":
            content = content[: len(content) // 2]
        case "flipped":
            place = content.index(torch.full((1000,), 2.0).numpy().tobytes()[:400]) + 200
            content[place] ^= 64
        case "empty":
            content = b""
        case "foreign":
            torch.save([1, 2], newest)
            content = newest.read_bytes()
        case "pickle":
            torch.save({"step": 2, "run": subprocess.run}, newest)
            content = newest.read_bytes()
    newest.write_bytes(content)
    assert load_checkpoint(folder.path, CPU)["step"] == 1
    assert "step_00000002.pt: damaged" in capsys.readouterr().err
    (folder.path / "checkpoints" / "step_00000001.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint .* can be read"):
        load_checkpoint(folder.path, CPU)


def test_a_run_that_went_back_behind_a_damaged_checkpoint_keeps_what_it_writes(folder: RunFolder) -> None:
    for step in (6, 9):
        folder.save_checkpoint(state(step), keep=2)
    (folder.path / "checkpoints" / "step_00000009.pt").write_bytes(b"damaged")
    folder.save_checkpoint(state(7), keep=1)
    assert names(folder) == ["step_00000007.pt"] and load_checkpoint(folder.path, CPU)["step"] == 7


def test_the_best_checkpoint_is_there_when_no_other_can_be_read(folder: RunFolder) -> None:
    folder.save_checkpoint(state(1), keep=1, is_best=True)
    folder.save_checkpoint(state(2), keep=1)
    (folder.path / "checkpoints" / "step_00000002.pt").write_bytes(b"damaged")
    assert load_checkpoint(folder.path, CPU)["step"] == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_written(folder: RunFolder, value: float) -> None:
    folder.save_checkpoint(state(1), keep=1)
    bad = state(2)
    bad["nested"][0]["more"][1] = value
    with pytest.raises(DivergedError, match="--resume"):
        folder.save_checkpoint(bad, keep=1)
    assert names(folder) == ["step_00000001.pt"] and load_checkpoint(folder.path, CPU)["step"] == 1


def test_a_full_disk_is_said_before_writing_with_what_is_needed(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.save_checkpoint(state(1), keep=1)
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100})())
    with pytest.raises(UserError, match=r"takes 5\.00 MB and the disk has 0\.00 MB left"):
        folder.save_checkpoint(state(2) | {"more": torch.zeros(1_250_000)}, keep=1)
    assert names(folder) == ["step_00000001.pt"] and load_checkpoint(folder.path, CPU)["step"] == 1


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file data/0"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 290176 vs 290068"),
        RuntimeError("basic_ios::clear: iostream error"),
    ],
)
def test_a_disk_that_fills_up_while_writing_loses_nothing(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    folder.save_checkpoint(state(1), keep=1)

    def fails(content: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(UserError, match="the disk is full"):
        folder.save_checkpoint(state(2), keep=1)
    assert names(folder) == ["step_00000001.pt"] and load_checkpoint(folder.path, CPU)["step"] == 1


# ----------------------------------------------------------------------------------------------------------------------
# One process at a time
# ----------------------------------------------------------------------------------------------------------------------


def hold(path: str, seconds: float) -> None:
    """Called in a child: takes the folder and sleeps."""
    import time

    folder = folder_at(path)
    print("taken", flush=True)
    time.sleep(seconds)
    folder.close()


def test_two_runs_on_one_folder_the_second_refuses(tmp_path: Path) -> None:
    import time

    child = start("train_vae", ["--help"], tmp_path, tmp_path / "printed", hold, str(tmp_path / "run"), 60.0)
    while "taken" not in (child.output() if child.printed.exists() else ""):
        time.sleep(0.05)
    with pytest.raises(UserError, match=f"process {child.process.pid} is writing there"):
        folder_at(tmp_path / "run")
    child.process.kill()
    child.process.join()
    folder_at(tmp_path / "run").close()  # a run that was killed holds nothing
    assert not list((tmp_path / "run").iterdir())


def test_a_folder_that_cannot_be_written_to_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output_dir .*file/run: cannot be written to"):
        folder_at(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    "product",
    [
        *("model/model_index.json", "vae_model.pth", "clip/config.json", "best_model/x", "checkpoints/best.pt"),
        "pytorch_lora_weights.safetensors",
    ],
)
def test_what_a_run_left_is_not_overwritten_unasked(tmp_path: Path, product: str) -> None:
    path = tmp_path / "run" / product
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    with pytest.raises(UserError, match="--overwrite"):
        folder_at(tmp_path / "run")
    folder_at(tmp_path / "run", resume=True).close()
    assert path.read_text() == "precious"
    folder = folder_at(tmp_path / "run", overwrite=True)
    assert path.read_text() == "precious"  # not before it starts
    folder.start(UNetOptions(), COLUMNS)
    folder.close()
    assert not path.exists()


def test_files_that_are_not_the_runs_stay_as_they_are(tmp_path: Path) -> None:
    for name in (".profile.old", "notes", ".notes.old", ".draft.tmp", "vae_model.pth"):
        (tmp_path / name).write_text(name)
    with pytest.raises(UserError, match=r"holds a vae_model\.pth already"):
        folder_at(tmp_path)
    folder_at(tmp_path, resume=True).close()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        name: name for name in (".profile.old", "notes", ".notes.old", ".draft.tmp", "vae_model.pth")
    }


# ----------------------------------------------------------------------------------------------------------------------
# Metrics and config
# ----------------------------------------------------------------------------------------------------------------------


def test_rows_that_come_again_are_dropped_and_a_cut_one_does_not_matter(folder: RunFolder) -> None:
    for step in (10, 20, 30):
        folder.log(step, loss=step / 7)
        folder.log(step, validation_loss=step / 3)
    with open(folder.path / "metrics.csv", "a") as file:
        file.write("40,0.12")  # cut short
    folder.resume(UNetOptions(max_steps=7), 20, COLUMNS, undone=["validation_loss"])
    assert (folder.path / "metrics.csv").read_text() == (
        "step,loss,validation_loss\n10,1.42857,\n10,,3.33333\n20,2.85714,\n"
    )
    config = json.loads((folder.path / "config.json").read_text())
    assert config["resumed"][0]["after_step"] == 20 and config["resumed"][0]["changed"] == {"max_steps": 7}
    assert config["options"]["max_steps"] == 7


def test_a_damaged_row_is_named(folder: RunFolder) -> None:
    folder.log(1, loss=1.0)
    (folder.path / "metrics.csv").write_text("step,loss,validation_loss\n1,\x00\x00\n2,1,\n")
    with pytest.raises(UserError, match="line 2 is damaged"):
        folder.metrics()


@pytest.mark.parametrize("text", ["1,2,3\n", "stepp,loss\n1,2\n", "step,loss\n1,garbage0.78\n2,1\n"])
def test_damaged_metrics_are_a_sentence(folder: RunFolder, text: str) -> None:
    (folder.path / "metrics.csv").write_text(text)
    with pytest.raises(UserError, match=r"metrics\.csv: (the first line|line 2)"):
        folder.resume(UNetOptions(), 5, COLUMNS, [])


def test_missing_metrics_are_said(folder: RunFolder, capsys: pytest.CaptureFixture) -> None:
    (folder.path / "metrics.csv").unlink()
    folder.resume(UNetOptions(), 5, COLUMNS, [])
    assert "metrics.csv is missing" in capsys.readouterr().err


def test_a_disk_that_safetensors_finds_full_is_a_sentence(folder: RunFolder) -> None:
    def fails(path: Path) -> None:
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(UserError, match="the disk is full"):
        folder.write_folder("model", fails)


def test_no_git_is_no_reason_not_to_train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment()["commit"] == "unknown"


def test_a_locale_that_cannot_print_a_text_ends_nothing_and_arguments_are_utf8(tmp_path: Path) -> None:
    code = "from training.script import run; run(lambda argv: print('2 \\u00d7 3', argv[0] == '\\u72d0', flush=True))"
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, "狐"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.stdout == b"2 \\xd7 3 True\n", done.stderr


def test_texts_are_utf8_whatever_the_locale(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    import locale

    monkeypatch.setattr(locale, "getpreferredencoding", lambda *_: "ascii")
    folder.write_text("prompts.txt", "皮卡丘\n")
    assert (folder.path / "prompts.txt").read_bytes() == "皮卡丘\n".encode()
