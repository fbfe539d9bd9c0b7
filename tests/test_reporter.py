"""The clock of a training loop: what is due when, what a row means, and W&B, which never costs a run."""

import sys
import types
from pathlib import Path

import pytest
import torch

from tests.tiny import folder_at
from training.presets import UNetOptions
from training.reporter import Reporter
from training.reproducible import Processes
from training.run_folder import DivergedError, RunFolder
from training.script import UserError

ALONE = Processes(0, 1, torch.device("cpu"))
COLUMNS = ("step", "loss", "gradient_norm", "learning_rate", "validation_loss", "skipped_steps")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = folder_at(tmp_path / "run")
    folder.start(UNetOptions(), COLUMNS)
    yield folder
    folder.close()


def reporter(folder: RunFolder, state: dict | None = None, **options: object) -> Reporter:
    options = {"max_steps": 10, "log_every": 4, "wandb": "off"} | options
    return Reporter(UNetOptions(**options), folder, ALONE, {"validation": 3, "preview": 0, "checkpoint": 5}, state)


def take_steps(reporter: Reporter, values: list[float], stop_at: int = 0) -> dict[int, list[str]]:
    """Takes steps with these losses; returns what was due after each."""
    due: dict[int, list[str]] = {}
    losses = iter(values)
    for step in reporter.steps():
        if step + 1 == stop_at:
            reporter.stop.asked = True
        value = torch.tensor(next(losses))
        reporter.record(loss=value, gradient_norm=value, learning_rate=0.1)
        if names := [name for name in ("validation", "preview", "checkpoint") if reporter.due(name)]:
            due[reporter.step] = names
    return due


def rows(folder: RunFolder) -> list[str]:
    return (folder.path / "metrics.csv").read_text().splitlines()[1:]


def test_duties_come_at_their_intervals_and_at_the_end(folder: RunFolder) -> None:
    due = take_steps(reporter(folder), [float(i) for i in range(10)])
    assert due == {
        3: ["validation"],
        5: ["checkpoint"],
        6: ["validation"],
        9: ["validation"],
        10: ["validation", "checkpoint"],
    }
    assert rows(folder) == ["4,1.5,1.5,0.1,,", "8,5.5,5.5,0.1,,", "10,8.5,8.5,0.1,,"]


def test_on_a_stop_only_the_checkpoint_is_due_and_the_rest_is_left_to_the_resumed_run(folder: RunFolder) -> None:
    first = reporter(folder)
    assert take_steps(first, [float(i) for i in range(10)], stop_at=6) == {
        3: ["validation"],
        5: ["checkpoint"],
        6: ["checkpoint"],
    }
    state = first.state()
    assert state["undone"] == ["validation"]
    assert not first.finish()
    second = reporter(folder, state)
    assert second.due("validation") and not second.due("validation") and not second.due("checkpoint")
    assert next(second.steps()) == 6
    take_steps(second, [6.0, 7.0, 8.0, 9.0])
    assert rows(folder) == ["4,1.5,1.5,0.1,,", "8,5.5,5.5,0.1,,", "10,8.5,8.5,0.1,,"]  # as if it had not stopped


class OneOfTwo(Processes):
    """The other process was asked to stop."""

    def any(self, flag: bool) -> bool:
        return True


def test_what_another_process_left_undone_is_left_undone_by_all(folder: RunFolder) -> None:
    this = Reporter(UNetOptions(), folder, OneOfTwo(0, 2, torch.device("cpu")), {"preview": 3, "checkpoint": 5})
    with this.interruptible("preview"):
        pass  # done here
    assert this.state()["undone"] == ["preview"]
    assert not list(this.steps()) and this.due("checkpoint") and not this.due("preview")


def test_memory_is_given_back_around_what_is_long(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr("training.reporter.give_memory_back", lambda: seen.append("given back"))
    with reporter(folder).interruptible("validation"):
        seen.append("validation")
    assert seen == ["given back", "validation", "given back"]


def test_a_checkpoint_comes_again_if_the_validation_that_is_left_may_make_it_the_best(folder: RunFolder) -> None:
    options = {"max_steps": 10, "log_every": 4, "wandb": "off"}
    first = Reporter(UNetOptions(**options), folder, ALONE, {"validation": 3, "preview": 0, "checkpoint": 3})
    due = take_steps(first, [1.0] * 10, stop_at=6)
    assert due[6] == ["checkpoint"] and first.state()["undone"] == ["checkpoint", "validation"]
    second = Reporter(UNetOptions(**options), folder, ALONE, first.duties, first.state())
    assert second.due("validation") and second.due("checkpoint")
    assert second.is_best(1.0) and not second.is_best(float("nan")) and not second.is_best(2.0) and second.is_best(0.5)


def test_saved_is_said_only_of_what_was_saved(folder: RunFolder, capsys: pytest.CaptureFixture) -> None:
    first = reporter(folder)
    take_steps(first, [1.0] * 10, stop_at=2)
    first.finish()
    assert "NOT saved" in capsys.readouterr().out
    first.saved()
    first.finish()
    assert "Stopped at step 2 and saved" in capsys.readouterr().out


def test_steps_that_are_not_finite_are_counted_and_an_interval_of_them_ends_the_run(folder: RunFolder) -> None:
    nan = float("nan")
    with pytest.raises(DivergedError, match=r"step 8: no gradient of the last 4 steps was finite"):
        take_steps(reporter(folder), [1.0, nan, nan, 3.0, nan, nan, nan, nan])
    assert rows(folder) == ["4,2,2,0.1,,2"]
    with pytest.raises(DivergedError):  # looked at also where no rows are wanted
        take_steps(reporter(folder, log_every=0, max_steps=300), [nan] * 200)
    assert rows(folder) == ["4,2,2,0.1,,2"]


def test_fewer_steps_than_were_taken_are_refused(folder: RunFolder) -> None:
    with pytest.raises(UserError, match=r"--max_steps 10: .* has taken 11 steps"):
        reporter(folder, {"step": 11})


# ----------------------------------------------------------------------------------------------------------------------
# Weights & Biases
# ----------------------------------------------------------------------------------------------------------------------


class StandInWandb(types.ModuleType):
    """The calls of W&B that we make; each may be told to fail."""

    def __init__(self, logged_in: bool = True, fails: tuple[str, ...] = ()) -> None:
        super().__init__("wandb")
        self.logged_in, self.fails, self.calls, self.rows = logged_in, fails, [], []

    def login(self, prompt: bool) -> bool:
        if "login" in self.fails:
            raise ConnectionError("the network is unreachable")
        return self.logged_in

    def init(self, **arguments: object) -> "StandInWandb":
        self.calls.append(arguments)
        if arguments["mode"] in self.fails:
            raise TimeoutError("no answer from the server\nin 60 seconds")
        self.id = arguments["id"] or "fresh-id"
        return self

    def log(self, values: dict, step: int) -> None:
        if "log" in self.fails:
            raise RuntimeError("broken pipe")
        self.rows.append((step, values))

    def finish(self) -> None: ...

    Settings = Image = staticmethod(lambda *args, **kwargs: (args, kwargs))


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> object:
    def install(**arguments: object) -> StandInWandb:
        wandb = StandInWandb(**arguments)
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        return wandb

    return install


def test_a_resumed_run_goes_on_with_its_wandb_run(folder: RunFolder, install: object) -> None:
    wandb = install()
    first = reporter(folder, wandb="auto")
    first.start_wandb("project")
    take_steps(first, [1.0] * 10, stop_at=5)
    second = reporter(folder, first.state(), wandb="auto")
    second.start_wandb("project")
    assert [(call["mode"], call["id"], call["resume"]) for call in wandb.calls] == [
        ("online", None, None),
        ("online", "fresh-id", "allow"),
    ]
    assert wandb.rows[0][0] == 4 and wandb.rows[0][1]["loss"] == 1.0


@pytest.mark.parametrize(("fails", "modes"), [(("online",), ["online", "offline"]), (("login",), ["offline"]),
                                              (("online", "offline"), ["online", "offline"])])  # fmt: skip
def test_wandb_that_cannot_be_reached_costs_a_line(
    folder: RunFolder, install: object, capsys: pytest.CaptureFixture, fails: tuple[str, ...], modes: list[str]
) -> None:
    wandb = install(fails=fails)
    run = reporter(folder, wandb="auto")
    run.start_wandb("project")
    assert [call["mode"] for call in wandb.calls] == modes
    said = capsys.readouterr()
    assert "W&B" in said.out and "Traceback" not in said.out + said.err
    take_steps(run, [1.0] * 10)
    assert len(rows(folder)) == 3


def test_wandb_that_breaks_in_mid_run_costs_a_line(
    folder: RunFolder, install: object, capsys: pytest.CaptureFixture
) -> None:
    install(fails=("log",))
    run = reporter(folder, wandb="auto")
    run.start_wandb("project")
    take_steps(run, [1.0] * 10)
    assert capsys.readouterr().out.count("W&B: failed (broken pipe)") == 1
    assert len(rows(folder)) == 3


def test_wandb_online_without_a_login_is_a_sentence(folder: RunFolder, install: object) -> None:
    install(logged_in=False)
    with pytest.raises(UserError, match="wandb login"):
        reporter(folder, wandb="online").start_wandb("project")
