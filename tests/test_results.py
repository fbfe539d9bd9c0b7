"""No drift: the numbers in READMEs and on pages are those of the JSON and CSV files that are committed beside them."""

import csv
import json
from pathlib import Path

import pytest

from benchmarks import compare_diffusers, scaling, what_breaks
from benchmarks.measuring import kept
from evaluation.report import in_words
from tests.conftest import ROOT

RESULTS = ROOT / "stable_diffusion_results"
README, ABOUT_RESULTS, ABOUT_BENCHMARKS = (
    (folder / "README.md").read_text(encoding="utf-8") for folder in (ROOT, RESULTS, ROOT / "benchmarks")
)


def rows(text: str) -> set[tuple[str, ...]]:
    """The rows of all Markdown tables, cell by cell; "37 %" is "37%"."""
    lines = [line.replace(" %", "%") for line in text.splitlines() if line.startswith("|")]
    return {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines}


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_what_was_measured_against_diffusers() -> None:
    for result in kept(compare_diffusers.RESULTS):
        (row,) = rows(compare_diffusers.table([result]).splitlines()[-1])
        assert row in rows(ABOUT_BENCHMARKS), row
    shown = {row for row in rows(README) if row[0] in compare_diffusers.ROWS}
    assert shown and shown <= rows(ABOUT_BENCHMARKS)


def test_what_was_measured_of_growth() -> None:
    for line in rows(scaling.table(kept(scaling.RESULTS)).split("\n", 2)[2]):
        assert line[1:] in {row[-len(line[1:]) :] for row in rows(ABOUT_BENCHMARKS)}, line


def test_the_gallery_of_faults() -> None:
    results = kept(what_breaks.RESULTS)
    assert {result["row"] for result in results} == set(what_breaks.ROWS)
    assert what_breaks.PAGE.read_text(encoding="utf-8") == what_breaks.page(results)
    for row in what_breaks.ROWS:
        assert (what_breaks.FOLDER / what_breaks.file_of(row)).is_file()


def test_the_lora_of_the_shipped_model() -> None:
    for report in read(RESULTS / "turquoise" / "unseen.json").values():
        found = (report["turquoise"]["on_white_in_the_colour"], report["r_precision"], report["on_white_in_the_colour"])
        for text in (README, ABOUT_RESULTS):
            assert tuple(f"{share:.0%}" for share in found) in {row[1:] for row in rows(text)}


def test_the_report_of_the_shipped_model() -> None:
    report = read(RESULTS / "monsters" / "report.json")
    assert (RESULTS / "monsters" / "report.md").read_text(encoding="utf-8") == in_words(report)
    assert rows(in_words(report)) <= rows(ABOUT_RESULTS)
    obeyed = report["obedience"]
    for number in (obeyed["r_precision"], obeyed["on_white_in_the_colour"]):
        assert f"{number:.0%}" in README.replace(" %", "%")
    named = {row[0] for row in rows(in_words(report))} - {"", "---", "all"}
    shown = {row for row in rows(README) if row[0] in named}
    assert shown and shown <= rows(in_words(report))


@pytest.mark.parametrize(
    ("file", "column", "steps"),
    [
        ("monsters/metrics.csv", "validation_loss", ["1000", "2000", "3000", "3900"]),
        ("pokemon/metrics_128.csv", "validation_loss", ["250", "750", "1500", "2500", "3500"]),
    ],
)
def test_losses_along_a_run(file: str, column: str, steps: list[str]) -> None:
    with open(RESULTS / file, encoding="utf-8") as lines:
        values = {row["step"]: float(row[column]) for row in csv.DictReader(lines) if row[column]}
    table = {(row[0].split(",")[0].replace(",", ""), row[1]) for row in rows(ABOUT_RESULTS) if len(row) > 1}
    for step in steps:
        assert (step, f"{values[step]:.4f}") in table, step


def test_the_report_on_real_images() -> None:
    report = read(RESULTS / "pokemon" / "report_128.json")
    text = " ".join(" ".join(row) for row in rows(ABOUT_RESULTS))
    for kind in ("nearest_training_image", "nearest_training_image_of_other_training_images"):
        assert f"{report[kind]['mean']:.3f}, {report[kind]['smallest']:.3f}" in text
    assert f"{report['share_of_copies'] * report['samples']:.0f} of {report['samples']}" in text
    assert f"{report['obedience']['r_precision']:.0%}" in text
    assert f"{report['vae_ceiling']['psnr']:.1f} dB, {report['vae_ceiling']['ssim']:.3f}" in text
