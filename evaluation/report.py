"""A report of `evaluate_stable_diffusion.py` as Markdown: tables of numbers, with intervals and controls."""

from collections.abc import Iterable, Sequence
from itertools import zip_longest

from evaluation.attention import table
from evaluation.statistics import below_by_chance, share_interval

NOT_AVAILABLE = "n.a."


def _loras(report: dict) -> Iterable[tuple[str, float]]:
    return zip_longest(report["lora"], report.get("lora_scale", ()), fillvalue=1.0)


def in_words(report: dict) -> str:
    """The whole of report.md."""
    how = f"{report['steps']} steps of {report['sampler']}, guidance {report['guidance_scale']:g}"
    lines = [
        f"# {report['model']}",
        "",
        f"{report['samples']} samples at {report['resolution']}×{report['resolution']}, {how}, seeds from "
        f"{report['seed']}, {report['precision']}; trained on {report['dataset']}"
        + "".join(f"; with {lora}" + f" at {scale:g}" * (scale != 1) for lora, scale in _loras(report))
        + ". In brackets: an interval that holds the true value in 19 of 20 cases"
        + (" (too narrow for prediction errors of so few images)." if report["samples"] < 8 else "."),
        "",
    ]
    if "obedience" in report:
        lines += _table(("", "samples", "real images", "samples dealt out anew"), _obedience(report))
    else:
        lines += ["All captions are the same: whether images obey them cannot be told."]
    if "against_real_images" in report:
        lines += _quality(report["against_real_images"], report["samples"])
    head, rows = ("prediction error at t", "mean squared error", ""), _errors(report["prediction_error"])
    if "prediction_error_of_raw_weights" in report:
        raw = _errors(report["prediction_error_of_raw_weights"])
        head, rows = (*head, "raw weights", ""), [(*row, *more[1:]) for row, more in zip(rows, raw, strict=True)]
    lines += ["", *_table(head, rows)]
    if "images" in report["prediction_error"]:  # older reports do not say
        lines += ["", _noised(report["prediction_error"])]
    copying = report["copying"]
    rows = []
    for measure in ("distance", "calibrated"):
        cells = [copying[name][measure] for name in ("samples", "images_that_are_no_copies")]
        share = _share(copying[f"share_of_copies_by_{measure}"], report["samples"])
        rows.append((measure, *map(_distances, cells), share))
    if "share_of_copies_by_either" in copying:
        share = _share(copying["share_of_copies_by_either"], report["samples"])
        rows.append(("either, by chance up to twice as many", "", "", share))
    chance = copying.get("share_by_chance")  # an older report does not have it, nor one without limits
    called = f"samples called copies ({f'{chance:.1%}' if chance else '1%'} by chance)"
    head = ("nearest training image (mean, smallest)", "samples", "images that are no copies", called)
    lines += ["", *_table(head, rows)]
    if "share_by_chance" not in copying and report["dataset"].startswith("monsters"):  # limits from as many images
        passed = below_by_chance(report["samples"])
        lines += ["", f"Limits that come from only {report['samples']} images are passed by {passed:.1%} of others."]
    ceiling = report["vae_ceiling"]
    psnr = f"{ceiling['psnr']:.1f} dB PSNR" + _interval(ceiling.get("psnr_interval"), 1)
    ssim = f"{ceiling['ssim']:.3f} SSIM" + _interval(ceiling.get("ssim_interval"), 3)
    lines += ["", f"What the VAE allows on such images: {psnr}, {ssim}.", ""]
    if "attention_on_parts" in report:
        lines += _attention(report["attention_on_parts"]["parts"])
    return "\n".join(lines)


def _quality(found: dict, count: int) -> list[str]:
    """Against as many real images; beside the samples, other real images and pure noise, where the report has them."""
    controls = found.get("controls", {})
    sets = [found, *controls.values()]
    meaning = {
        "precision": "samples that are like a real image",
        "recall": "real images that are like a sample",
        "coverage": "real images that have a sample near them",
    }
    kids = (f"{one['kid']:.4f} ({one['low']:.4f}…{one['high']:.4f})" for one in sets)
    rows = [("KID", *kids, "0 = one distribution")]
    rows += [(name, *(_share(one[name], count) for one in sets), text) for name, text in meaning.items()]
    names = ("samples", *(name.replace("_", " ") for name in controls)) if controls else ("",)
    lines = ["", *_table(("against real images, by the CLIP's features", *names, ""), rows)]
    blind = [name for name in meaning if controls and controls["noise"][name] >= 0.9]
    if blind:
        lines += ["", f"Pure noise scores 90% and more in {' and '.join(blind)}: here that says nothing about samples."]
    return lines


def _attention(parts: dict[str, dict]) -> list[str]:
    """Which words look at their own parts, over all, by timestep and by layer; and which do not."""
    weak = [name for name, part in parts.items() if part["overall"] < 2]
    rows = []
    for layer in next(iter(parts.values()))["by_layer"]:
        scores = (f"{part['by_layer'][layer]:.2f}" for part in parts.values())
        rows.append((layer.removesuffix(".transformer_blocks.0.attn2"), *scores))
    return [
        "How much more of a word's attention falls into its part's box than the area would give (in brackets: of the",
        "words for other parts); then by layer. "
        + (f"Less than 2 over all: {', '.join(weak)}." if weak else "All reach 2."),
        "",
        *table(parts).splitlines(),
        "",
        *_table(("layer", *parts), rows),
        "",
    ]


def _distances(cell: dict[str, float | None]) -> str:
    return NOT_AVAILABLE if cell["mean"] is None else f"{cell['mean']:.3f}, {cell['smallest']:.3f}"


def _share(value: float | None, count: int) -> str:
    if value is None:
        return NOT_AVAILABLE
    low, high = share_interval(value, count)
    return f"{value:.0%} ({low:.0%}…{high:.0%})"


def _interval(ends: Sequence[float] | None, digits: int) -> str:
    """Nothing where an older report has none."""
    return f" ({ends[0]:.{digits}f}…{ends[1]:.{digits}f})" if ends else ""


def _noised(found: dict) -> str:
    """What the prediction error was measured on."""
    if found["seen_in_training"]:
        return f"Noise was added to {found['images']} training images: of unseen ones, errors may be greater."
    return f"Noise was added to drawings of {found['images']} unseen monsters."


def _obedience(report: dict) -> list[tuple[str, ...]]:
    found, count = report["obedience"], report["samples"]
    names = ("r_precision", "r_precision_of_real_images", "r_precision_of_shuffled_images")
    rows = [(f"R-precision among {count} captions", *(_share(found[name], count) for name in names))]
    if "on_white_in_the_colour" in found:
        rows.append(("a monster on white, by its pixels", _share(found["on_white"], count), "", ""))
        rows.append(("… in the colour asked for", _share(found["on_white_in_the_colour"], count), "", ""))
    for name, own in report.get("attributes", {}).get("samples", {}).items():
        sets = [report["attributes"][which][name] for which in ("samples", "real_images", "shuffled_samples")]
        shares = [_share(one["obeyed"], own["asked"]) for one in sets]
        rows.append((f"{name}, by the CLIP ({own['asked']} captions)", *shares))
    return rows


def _errors(found: dict) -> list[tuple[str, ...]]:
    rows = [("all", found["mean"], found["interval"])]
    tenths = zip(found["by_tenths"], found["intervals_of_tenths"], strict=True)
    rows += [(f"{i} to {i + 1} tenths", mean, interval) for i, (mean, interval) in enumerate(tenths)]
    return [(name, f"{mean:.4f}", f"({low:.4f}…{high:.4f})") for name, mean, (low, high) in rows]


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
