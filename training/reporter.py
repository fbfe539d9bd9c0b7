"""The bookkeeping of a training loop: steps, stop signals, the finite check, metrics, and what is due when.

A loop reads

    for step in reporter.steps():
        loss, norm = train_step(…)
        reporter.record(loss=loss, gradient_norm=norm, learning_rate=rate)
        if reporter.due("validation"):
            reporter.log(validation_loss=…)
        if reporter.due("checkpoint"):
            folder.save_checkpoint({…} | reporter.state(), …)

and the same for a VAE, a CLIP and a U-Net. The device is waited for only where a row is written or something is due.
"""

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sampling.packed import give_memory_back
from training.reproducible import Processes
from training.run_folder import DivergedError, RunFolder
from training.script import StopRequest, UserError

CHECK_EVERY = 100  # steps between looks at the numbers where no row of metrics is asked for


class PostponedError(Exception):
    """A stop was asked for in the middle of something that can be done again."""


class Reporter:
    """What all training scripts do beside the step; `folder` is None on all processes but the first.

    `duties`: name → interval in steps, 0 = never; each is due at the end, too. On a stop only the checkpoint is due;
    the rest is done when the run is resumed, so that a stopped run leaves the same files as one that was not.
    """

    def __init__(
        self,
        options: Any,
        folder: RunFolder | None,
        processes: Processes,
        duties: dict[str, int],
        state: dict | None = None,
        data: str = "",
    ) -> None:
        """`state`: of the checkpoint that a resumed run goes on from; `data`: a digest of what is trained on.

        UserError if that is not the data that the checkpoint was trained on, or if all steps are taken already.
        """
        if state and state.get("data", data) != data:
            raise UserError(
                f"--resume: the data set is not what it was ({options.dataset}: its images, its captions, or the "
                "networks that encode them); start a new run."
            )
        self.data = data
        self.options, self.folder, self.processes, self.duties = options, folder, processes, duties
        self.interval = options.log_every or CHECK_EVERY
        state = state or {"step": 0}
        self.first_step = self.step = state["step"]  # steps done
        self.undone: set[str] = set(state.get("undone", []))  # due at this step, not done yet
        self.recent: list[dict[str, Tensor]] = [  # of each step since the last row
            dict(zip(state["recent_names"], row.to(processes.device), strict=True)) for row in state.get("recent", [])
        ]
        self.rate: float = state.get("learning_rate", 0.0)
        self.best: float = state.get("best_validation", math.inf)
        self.wandb_id: str | None = state.get("wandb_id")
        self.wandb: Any = None
        self.stop = StopRequest()
        self.stopping = False
        self.saved_step = self.first_step if state["step"] else -1
        self.is_terminal = sys.stderr.isatty()
        self.bar: tqdm | None = None
        self._time_from_here()
        if options.max_steps < self.first_step:
            raise UserError(
                f"--max_steps {options.max_steps}: the run in {options.output_dir} has taken {self.first_step} steps; "
                "ask for more."
            )

    # ------------------------------------------------------------------------------------------------------------------
    # The loop
    # ------------------------------------------------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """The steps that are left, from 0; ends early when a stop is asked for."""
        while self.step < self.options.max_steps and not self.stopping:
            yield self.step

    @contextlib.contextmanager
    def running(self) -> Iterator["Reporter"]:
        """Around the loop: the progress bar, and signals that wait for the checkpoint."""
        shown = self.is_terminal and self.processes.is_main
        with (
            self.stop,
            tqdm(total=self.options.max_steps, initial=self.first_step, unit="step", disable=not shown) as bar,
        ):
            self.bar = bar
            self._time_from_here()
            try:
                yield self
            finally:
                self.bar = None
                if self.wandb is not None:
                    self._wandb(lambda run: run.finish())

    def record(self, learning_rate: float, **values: Tensor) -> None:
        """Ends a step: `values` are scalars on the device, `loss` and `gradient_norm` among them.

        A step whose gradient norm is not finite was skipped by the optimizer (`clip_and_step`); it is counted, and
        where no step of an interval was finite, `DivergedError` ends the run.
        """
        self.rate = learning_rate
        self.recent.append({name: value.detach().float() for name, value in values.items()})
        self.step += 1
        if self.step == self.first_step + 1 and getattr(self.options, "compile", False):
            values["loss"].item()  # waits for the device
            took = time.perf_counter() - self.timed_at
            self.say(f"step {self.step}: took {took:.0f} s, since torch.compile compiled what the next ones run")
            self._time_from_here()
        if self.bar is not None:
            self.bar.update()
        self.stopping = self.processes.any(self.stop.asked)
        is_last = self.step == self.options.max_steps
        self.undone = {name for name, every in self.duties.items() if every and (is_last or self.step % every == 0)} | (
            {"checkpoint"} if is_last or self.stopping else set()
        )
        if self.step % self.interval == 0 or is_last:
            self._end_interval()

    def _end_interval(self) -> None:
        names, rows = self._gathered()
        self.recent.clear()
        finite = [row for row in rows if math.isfinite(row[names.index("gradient_norm")])]
        if not finite:
            raise DivergedError(
                f"step {self.step}: no gradient of the last {len(rows)} steps was finite. They changed nothing: "
                "go on from the last checkpoint, if there is one, by --resume with a lower --learning_rate, or with "
                "--precision float32; else start again with those."
            )
        means = {name: sum(column) / len(finite) for name, column in zip(names, zip(*finite, strict=True), strict=True)}
        if self.options.log_every:
            speed = (self.step - self.timed_step) * self.options.batch_size / (time.perf_counter() - self.timed_at)
            skipped = len(rows) - len(finite)
            self.log(**means, learning_rate=self.rate, **({"skipped_steps": skipped} if skipped else {}))
            self._show(means["loss"], speed, skipped)
        self._time_from_here()

    def _gathered(self) -> tuple[list[str], list[list[float]]]:
        """The values of the steps since the last row, one list a step, as means over the processes."""
        names = list(self.recent[0]) if self.recent else []
        if not names:
            return names, []
        stacked = torch.stack([torch.stack([row[name] for name in names]) for row in self.recent])  # (steps, values)
        return names, self.processes.mean(stacked).tolist()

    def due(self, duty: str) -> bool:
        """Whether `duty` is to be done now; asked once a step, it then counts as done."""
        now = duty in self.undone and (duty == "checkpoint" or not self.stopping)
        if now:
            self.undone.discard(duty)
        return now

    @contextlib.contextmanager
    def interruptible(self, duty: str) -> Iterator[None]:
        """Around something long; a stop (`check_stop`) leaves it to the next run."""
        give_memory_back()  # what steps took is of other sizes, and would be kept beside; and the other way round
        try:
            yield
        except PostponedError:
            self.undone.add(duty)
        give_memory_back()
        left = self.processes.any(duty in self.undone)
        if left:
            self.undone |= {duty, "checkpoint"}
        self.stopping = self.stopping or left
        self._time_from_here()

    def check_stop(self, together: bool = False) -> None:
        """Raises `PostponedError` if a stop was asked for; called now and then by what is `interruptible`.

        `together`: all processes call it equally often, and it raises on all of them where one was asked.
        """
        if self.processes.any(self.stop.asked) if together else self.stop.asked:
            raise PostponedError

    # ------------------------------------------------------------------------------------------------------------------
    # Rows, checkpoints
    # ------------------------------------------------------------------------------------------------------------------

    def log(self, **values: float) -> None:
        """A row of metrics.csv, and of W&B."""
        if self.folder is not None:
            self.folder.log(self.step, **values)
            self._wandb(lambda run: run.log(values, step=self.step))
        self._time_from_here()

    def log_image(self, name: str, file: Path) -> None:
        """An image for W&B."""

        def send(run: Any) -> None:
            import wandb

            run.log({name: wandb.Image(str(file))}, step=self.step)

        self._wandb(send)

    def say(self, text: str) -> None:
        """A line on the screen, above the bar; from the first process alone."""
        if self.processes.is_main:
            tqdm.write(text, file=sys.stdout)

    def _show(self, loss: float, speed: float, skipped: int) -> None:
        if not self.processes.is_main:
            return
        self.folder.log_speed(self.step, speed)
        if skipped:
            self.say(f"step {self.step}: {skipped} steps skipped, whose gradients were not finite")
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f}, {speed:.1f} images/s")
        if not (self.is_terminal and sys.stdout.isatty()):
            print(f"step {self.step}/{self.options.max_steps}: loss {loss:.4f}, {speed:.1f} images/s", flush=True)

    def _time_from_here(self) -> None:
        """Images/s leave out what is done between steps."""
        self.timed_step, self.timed_at = self.step, time.perf_counter()

    def is_best(self, score: float) -> bool:
        """Whether `score` (lower is better) is the best of this run so far, which is remembered."""
        is_best = score < self.best
        self.best = score if is_best else self.best
        return is_best

    def state(self) -> dict:
        """What a checkpoint holds of this: all that makes the next row, and what is left to do at this step.

        Called by all processes, since the rows are means over them.
        """
        names, rows = self._gathered()
        return {
            "step": self.step,
            "undone": sorted(self._left_undone()),
            "recent_names": names,
            "recent": torch.tensor(rows),
            "learning_rate": self.rate,
            "best_validation": self.best,
            "wandb_id": self.wandb_id,
            "data": self.data,
        }

    def _left_undone(self) -> set[str]:
        """What the resumed run has to do at this step; the checkpoint again, if its validation may make it the best."""
        every = self.duties["checkpoint"]
        regular = self.step == self.options.max_steps or bool(every and self.step % every == 0)
        again = {"checkpoint"} if regular and "validation" in self.undone else set()
        return self.undone - {"checkpoint"} | again

    def saved(self) -> None:
        """Called when the checkpoint of this step is on the disk."""
        self.saved_step = self.step

    def finish(self) -> bool:
        """After the loop: whether it reached its end. Otherwise says whether it was saved, and how to go on."""
        if self.step >= self.options.max_steps and not self.undone:
            return True
        if self.processes.is_main:
            saved = (
                "and saved; go on" if self.saved_step == self.step else "but NOT saved; go on from the last checkpoint"
            )
            print(
                f"Stopped at step {self.step} {saved} with --resume --output_dir {self.options.output_dir}", flush=True
            )
        return False

    # ------------------------------------------------------------------------------------------------------------------
    # Weights & Biases
    # ------------------------------------------------------------------------------------------------------------------

    def start_wandb(self, project: str) -> None:
        """auto: online if logged in, else offline with a line that says how to log in. Never a prompt that blocks.

        A resumed run goes on with the W&B run that it began. W&B being down or broken never costs a training run.
        """
        mode = self.options.wandb
        if self.folder is None or mode == "off" or os.environ.get("WANDB_MODE") == "disabled":
            return
        try:
            import wandb
        except ImportError as error:
            if mode == "auto":
                return
            raise UserError("--wandb: the package is not installed; pip install wandb, or pass --wandb off.") from error
        try:
            logged_in = wandb.login(prompt=False)
        except Exception as error:  # no network, a wrong key
            print(f"W&B: no login ({_first_line(error)}).")
            logged_in = False
        if mode == "online" and not logged_in:
            raise UserError("--wandb online: you are not logged in; run `wandb login`, or pass --wandb offline or off.")
        if mode == "auto" and not logged_in:
            print(
                "W&B: not logged in, so this run is kept offline; `wandb login` changes that, --wandb off silences it."
            )
        for attempt in ["online", "offline"] if logged_in and mode != "offline" else ["offline"]:
            try:
                self.wandb = wandb.init(
                    project=project,
                    dir=self.folder.path,
                    config=asdict(self.options),
                    mode=attempt,
                    id=self.wandb_id,
                    resume="allow" if self.wandb_id else None,
                    settings=wandb.Settings(silent=True, init_timeout=60),
                    name=self.folder.path.name,
                )
                self.wandb_id = self.wandb.id
                return
            except Exception as error:
                print(
                    f"W&B: could not start {attempt} ({_first_line(error)}); metrics.csv has everything.",
                )

    def _wandb(self, use: Any) -> None:
        """Calls `use` with the W&B run; after its first error, which is reported, W&B is left out."""
        if self.wandb is None:
            return
        try:
            use(self.wandb)
        except Exception as error:
            self.wandb = None
            self.say(f"W&B: failed ({_first_line(error)}), and is left out from here on; metrics.csv has everything.")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
