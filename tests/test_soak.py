"""A long run does not grow: memory and open files stay flat. SOAK_STEPS=5000 makes it long."""

import os
from pathlib import Path

import pytest

from tests.children import start
from tests.tiny import tiny_parts, training_arguments

STEPS = int(os.environ.get("SOAK_STEPS", "240"))


def measure_every(steps: int, file: str) -> None:
    """Called in the child: from now on it writes its memory (MB) and number of open files down every so many steps."""
    from training.reporter import Reporter

    record = Reporter.record

    def recording(self: Reporter, *args: object, **values: object) -> None:
        record(self, *args, **values)
        if self.step % steps == 0:
            resident = next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]
            with open(file, "a") as output:
                output.write(f"{int(resident) / 1024:.1f} {len(os.listdir('/proc/self/fd'))}\n")

    Reporter.record = recording


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_and_open_files_stay_flat(tmp_path: Path) -> None:
    every = STEPS // 12
    schedule = f"--max_steps {STEPS} --checkpoint_every {every} --validate_every {every} --preview_every {every}"
    argv = training_arguments(tiny_parts(tmp_path / "parts"), *schedule.split(), "--log_every", "10")
    argv += ["--output_dir", str(tmp_path / "run")]
    measured = tmp_path / "measured"
    child = start(
        "train_stable_diffusion", argv, tmp_path / "cache", tmp_path / "printed", measure_every, every, str(measured)
    )
    assert child.wait(3600) == 0, child.output()
    memory, files = zip(*(map(float, line.split()) for line in measured.read_text().splitlines()), strict=True)
    print("MB:", memory, "open files:", files)
    assert max(memory[4:]) - memory[3] < 60, memory  # the first checkpoints and previews load what they need
    assert len(set(files[1:])) == 1, files
