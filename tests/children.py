"""Training in a process of its own, which a test may kill, stop or starve at any moment.

`start` forks from a server that has the heavy modules imported, so that a child begins within a fraction of a second.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.children_imports"])


@dataclass
class Child:
    """One running script: its process, and the file with all that it printed."""

    process: multiprocessing.Process
    printed: Path

    def wait(self, timeout: float = 120) -> int:
        """Its exit code, negative for a signal; fails if it hangs."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"the script hangs; it printed:\n{self.output()}")
        return self.process.exitcode

    def output(self) -> str:
        return self.printed.read_text(encoding="utf-8", errors="replace")


def start(
    script: str, argv: list[str], cache: Path, printed: Path, before: Callable | None = None, *more: object,
    environment: dict[str, str] | None = None,
) -> Child:  # fmt: skip
    """Runs `python SCRIPT.py *argv` in a child; `before(*more)` is called there first, to set a trap."""
    arguments = (str(ROOT), script, argv, str(cache), str(printed), environment or {}, before, more)
    return Child(fork(_run, *arguments), printed)


def fork(function: Callable, *arguments: object) -> multiprocessing.Process:
    """A process that calls `function`, with the heavy modules imported."""
    os.environ.setdefault("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))  # for the server
    process = CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process


def use_code_in(root: str) -> None:
    """Forgets the modules of this repository, and imports those in `root`, a copy of it, from here on."""
    sys.path[:] = [root, os.path.join(root, "tests"), *(path for path in sys.path if Path(path) not in HERE)]
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "/nowhere")
        if ROOT in file.parents and "site-packages" not in file.parts:
            del sys.modules[name]


HERE = (ROOT, ROOT / "tests")


def redirect(printed: str) -> None:
    """Sends all that this process prints to a file."""
    output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(output), "w", buffering=1, encoding="utf-8") for _ in range(2))


def _run(
    root: str, script: str, argv: list[str], cache: str, printed: str, environment: dict[str, str],
    before: Callable | None, more: tuple,
) -> None:  # fmt: skip
    redirect(printed)
    os.setpgrp()  # so that a signal can be sent to it and its workers alone
    if root != str(ROOT):
        use_code_in(root)
    import datasets
    import torch
    from matplotlib.figure import Figure

    from training import captioned_latents, memory_forecast
    from training.script import run

    os.chdir(root)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    torch.set_num_threads(1)
    # The dearest parts of a tiny run, which have tests of their own.
    memory_forecast.rehearse_step = lambda *_: 0
    memory_forecast.rehearse_rest = lambda *_: dict.fromkeys(("preview", "encoding"), 0)
    Figure.savefig = lambda self, file, **_: Path(file).write_bytes(b"a plot")
    sys.argv = [f"{script}.py", *argv]
    captioned_latents.PIXELS_AT_ONCE["cpu"] = 1  # image by image: moments enough to be killed in
    module = __import__(script)
    if before is not None:
        before(*more)
    run(module.main)


# ----------------------------------------------------------------------------------------------------------------------
# Traps: a signal at the n-th time that something happens
# ----------------------------------------------------------------------------------------------------------------------


def signal_at(place: str, count: int, number: int) -> None:
    """Arranges that this process sends itself signal `number` when it comes to `place` for the `count`-th time."""
    import torch

    import stable_diffusion_model
    import train_stable_diffusion as script
    import vae_model
    from training import captioned_latents, run_folder

    calls = 0

    def strike() -> bool:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), number)
            time.sleep(0.01)  # so that Python looks at it here
            return True
        return False

    def before(owner: object, name: str) -> None:
        function = getattr(owner, name)

        def struck(*args: object, **kwargs: object) -> object:
            strike()
            return function(*args, **kwargs)

        setattr(owner, name, struck)

    def half_a_checkpoint(state: dict, path: Path) -> None:
        save(state, path)
        if calls + 1 == count:
            with open(path, "r+b") as file:
                file.truncate(path.stat().st_size // 2)
        strike()

    def half_a_row(folder: run_folder.RunFolder, name: str, columns: tuple, row: dict) -> None:
        if calls + 1 == count:
            with open(folder.path / name, "a", encoding="utf-8") as file:
                file.write(f"{row['step']},0.")
        if not strike() or number != signal.SIGKILL:
            append(folder, name, columns, row)

    save, append = torch.save, run_folder.RunFolder._append
    match place:
        case "encoding":
            before(vae_model.VAE, "encode")
        case "loading":
            before(captioned_latents, "prepare")
            script.prepare = captioned_latents.prepare
        case "step":
            before(script, "train_step")
        case "average":
            before(script.EMA, "update")
        case "validation":
            before(script, "diffusion_loss")
        case "preview":
            before(stable_diffusion_model.StableDiffusion, "_predict")
        case "decoding":
            before(stable_diffusion_model.StableDiffusion, "decode_latents")
        case "checkpoint":
            torch.save = half_a_checkpoint
        case "row" if number == signal.SIGKILL:
            run_folder.RunFolder._append = half_a_row
        case "row":
            before(run_folder.RunFolder, "_append")
        case "flush":
            before(run_folder, "_flush")
        case "rename":
            before(Path, "rename")
        case "replace":
            before(Path, "replace")
        case "model":
            before(stable_diffusion_model.StableDiffusion, "save_pretrained")
        case "plot":
            before(run_folder.RunFolder, "plot")
        case _:
            raise AssertionError(place)
