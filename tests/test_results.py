"""No drift: the numbers in READMEs and on pages are those of the JSON and CSV files that are committed beside them."""

import ast
import csv
import json
import re
from pathlib import Path

import pytest

from benchmarks import compare_diffusers, scaling, tricks, what_breaks
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


def table_under(head: str, text: str) -> set[tuple[str, ...]]:
    """The rows of the one table that begins with this line."""
    _, body = text.split(head + "\n")
    return rows(body.split("\n\n")[0].split("\n", 1)[1])  # without the line of dashes


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


def test_what_each_trick_brings() -> None:
    results = kept(tricks.RESULTS)
    for name in dict.fromkeys(result["device_name"] for result in results):
        table = tricks.table([result for result in results if result["device_name"] == name])
        assert rows(table) <= rows(ABOUT_BENCHMARKS)


def test_the_gallery_of_faults() -> None:
    results = kept(what_breaks.RESULTS)
    assert {result["row"] for result in results} == set(what_breaks.ROWS)
    assert what_breaks.PAGE.read_text(encoding="utf-8") == what_breaks.page(results)
    for row in what_breaks.ROWS:
        assert (what_breaks.FOLDER / what_breaks.file_of(row)).is_file()


def test_the_lora_of_the_shipped_model() -> None:
    columns = ("turquoise on white, of those that ask for it", "R-precision of the others", "colours of the others")
    here = table_under(f"| of 32 unseen captions each | {' | '.join(columns)} |", README)
    there = table_under(f"| | {' | '.join(columns)} |", ABOUT_RESULTS)
    reports = read(RESULTS / "turquoise" / "unseen.json")
    assert len(here) == len(there) == len(reports)
    for name, report in reports.items():
        found = (report["turquoise"]["on_white_in_the_colour"], report["r_precision"], report["on_white_in_the_colour"])
        shares = tuple(f"{share:.0%}" for share in found)
        assert ("without the LoRA" if name == "without" else f"`--{name}`", *shares) in here
        assert ("without it" if name == "without" else name.removeprefix("lora_"), *shares) in there


def test_the_report_of_the_shipped_model() -> None:
    report = read(RESULTS / "monsters" / "report.json")
    assert (RESULTS / "monsters" / "report.md").read_text(encoding="utf-8") == in_words(report)
    assert rows(in_words(report)) <= rows(ABOUT_RESULTS)
    obeyed = report["obedience"]
    for number in (obeyed["r_precision"], obeyed["on_white_in_the_colour"]):
        assert f"{number:.0%}" in README.replace(" %", "%")
    of_real_images = report["attributes"]["real_images"]
    patterns, tails = (of_real_images[name]["obeyed"] for name in ("pattern", "tail"))
    assert f"hardly tells even in real drawings ({patterns:.0%} and {tails:.0%} right)" in README.replace(" %", "%")
    head = next(line for line in in_words(report).splitlines() if line.startswith("|"))
    measured = table_under(head, in_words(report))
    left_out = {row for row in measured if row[0].split(",")[0] in ("tail", "belly", "pattern")}
    assert table_under(head, README) == measured - left_out and len(left_out) == 3
    (ceiling,) = [line for line in in_words(report).splitlines() if line.startswith("What the VAE allows")]
    assert ceiling in ABOUT_RESULTS.splitlines()


def along(file: str, column: str) -> dict[str, float]:
    """A column of a run's metrics.csv, by step."""
    with open(RESULTS / file, encoding="utf-8") as lines:
        return {row["step"]: float(row[column]) for row in csv.DictReader(lines) if row[column]}


def test_figures_along_a_run() -> None:
    table = {(row[0].split(",")[0], *row[1:]) for row in rows(ABOUT_RESULTS)}
    losses = along("monsters/metrics.csv", "validation_loss")
    for step in ("1000", "2000", "3000", "3900"):
        assert (step, f"{losses[step]:.4f}") in table
    losses, trained = (along("pokemon/metrics_128.csv", column) for column in ("validation_loss", "loss"))
    for step in ("250", "750", "1500", "2500", "3500"):
        assert (step, f"{losses[step]:.4f}", f"{trained[step]:.3f}") in table
    columns = ("loss", "image_to_text_r1", "text_to_image_r1")
    losses, images, texts = (along("clip/metrics.csv", column) for column in columns)
    for step, digits in (("500", 2), ("1000", 3), ("3000", 3), ("6500", 3)):
        assert (step, f"{losses[step]:.{digits}f}", f"{images[step]:.0%}", f"{texts[step]:.0%}") in table
    psnr, ssim = (along("vae/metrics.csv", column) for column in ("psnr", "ssim"))
    assert ("both", f"{psnr['2000']:.1f} dB", f"{ssim['2000']:.4f}") in table  # "both, half-way (step 2000)"


def test_figures_in_sentences_about_runs() -> None:
    text = " ".join(ABOUT_RESULTS.split())
    first, last = (along("monsters/metrics.csv", "loss")[step] for step in ("50", "3900"))
    assert f"training loss (weighted by min-SNR) fell from {first:.2f} to {last:.3f}" in text
    losses = along("pokemon/metrics_256.csv", "validation_loss")
    trained = along("pokemon/metrics_256.csv", "loss")["750"]
    assert f"to {trained:.3f}, the validation loss to {losses['750']:.4f}" in text
    both = along("vae/metrics.csv", "psnr")["3900"], along("vae/metrics.csv", "ssim")["3900"]
    each = [row for row in rows(ABOUT_RESULTS) if row[0] in ("monsters", "real Pokémon images") and "dB" in row[1]]
    assert sum(float(row[1].removesuffix(" dB")) for row in each) / 2 == pytest.approx(both[0], abs=0.06)
    assert sum(float(row[2]) for row in each) / 2 == pytest.approx(both[1], abs=1e-4)


def test_the_report_on_real_images() -> None:
    report = read(RESULTS / "pokemon" / "report_128.json")
    kinds = ("nearest_training_image", "nearest_training_image_of_other_training_images")
    own, others = (f"{report[kind]['mean']:.3f}, {report[kind]['smallest']:.3f}" for kind in kinds)
    copies = f"{report['share_of_copies'] * report['samples']:.0f} of {report['samples']}"
    names = ("r_precision", "r_precision_of_real_images", "r_precision_of_shuffled_images")
    obeyed, real, anew = (f"{report['obedience'][name]:.0%}" for name in names)
    clip, captions = "by the CLIP that was trained on the same images", f"{report['samples']} captions"
    psnr, ssim = (report["vae_ceiling"][name] for name in ("psnr", "ssim"))
    assert {
        (f"R-precision among {captions}, {clip}", f"{obeyed} (real images: {real}, dealt out anew: {anew})"),
        ("distance to the nearest training image (RMS at 64×64, mean, smallest)", own),
        ("the same of each training image to all others", others),
        ("copies: nearer than 99% of training images are to another", copies),
        ("what the VAE allows on such images", f"{psnr:.1f} dB, {ssim:.3f}"),
    } <= rows(ABOUT_RESULTS)
    assert f"{copies} samples are nearer to a training image" in README


def test_pages_agree_on_the_quickstart() -> None:
    """Its runs are too many to commit; what two pages say of them is the same, seed by seed."""
    preset = [row for row in rows(ABOUT_BENCHMARKS) if "660" in row and re.search(r"seed \d$", row[0])]
    of_four, first = zip(*(row[-2:] for row in sorted(preset, key=lambda row: row[0][-1])), strict=True)
    assert len(preset) == 3
    for shares in (of_four, first):
        one, two, three = (share.removesuffix("%") for share in shares)
        assert f"{one}, {two} and {three} %" in README


# ----------------------------------------------------------------------------------------------------------------------
# The README's table of equations
# ----------------------------------------------------------------------------------------------------------------------

EQUATIONS = [row for row in rows(README) if len(row) == 4 and re.search(r"`\w.* in \[`", row[2])]
CITED = r"\b(Equation|Eq\.|Section|Appendix|Figure) ([\d.]*\d|[A-Z])\b"


def source_of(name: str, file: str) -> str:
    """The source of a function, class or Class.method; the test fails if the file has none."""
    code = (ROOT / file).read_text(encoding="utf-8")
    node: ast.AST = ast.parse(code)
    for part in name.split("."):
        (node,) = [one for one in node.body if getattr(one, "name", None) == part]
    return ast.get_source_segment(code, node)


@pytest.mark.parametrize("row", sorted(EQUATIONS), ids=lambda row: row[2].split("`")[1])
def test_an_equation_stands_where_the_readme_says(row: tuple[str, ...]) -> None:
    """Each function is in the file, and what the paper's equation is called stands there, too."""
    _, _, functions, papers = row
    names, file = re.findall(r"`([\w.]+)`", functions.split(" in [")[0]), re.findall(r"\(([\w.]+)\)", functions)[0]
    sources = [source_of(name, file) for name in names]
    about = ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8")))
    cited = {(kind.replace("Eq.", "Equation"), n) for kind, n in re.findall(CITED, "\n".join([*sources, about]))}
    assert set(re.findall(CITED, papers)) <= cited and re.search(CITED, papers)


def test_no_equation_of_the_table_is_left_out() -> None:
    table = README.split("| what | equation | function | paper |\n")[1].split("\n\n")[0].splitlines()
    assert len(EQUATIONS) == len(table) - 1 >= 14
