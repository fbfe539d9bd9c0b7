"""Are we faster than diffusers? The same weights, inputs, dtype and threads, timed in turn in one process.

    python -m benchmarks.compare_diffusers          # all rows, without SD 1.5
    python -m benchmarks.compare_diffusers --rows unet vae_decode --models pokemon sd15 --dtypes float32
    python -m benchmarks.compare_diffusers --rows train --models sd15 --apart   # memory holds one side only
    python -m benchmarks.compare_diffusers --table                  # what was measured, as a table
    python -m benchmarks.compare_diffusers --profile --rows unet    # where each side's time goes, by kind of kernel

Several take turns: this repository; diffusers as its documentation uses it, in the same dtype and, if that is bfloat16,
in float32, too, its default; and diffusers tuned with what we do (memory layout, large pages, fused optimizer,
`--compile`). A ratio is their time over ours in the same round: above 1, ours is faster. The table has the median over
the rounds and, in brackets, the smallest and the largest. Memory is the peak of a process of its own (CPU), or of what
PyTorch allocated (CUDA). In one process all sides have large pages (see benchmarks/__init__.py and vae_model.py); with
`--apart` each turn is a process of its own, which warms up before it is timed, and the documented side has none. Such
results are kept beside those of one process. Results are added to compare_diffusers.json.
"""

import argparse
import gc
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from torch import nn
from torch.autograd.profiler_util import FunctionEvent

from benchmarks.contestants import MODELS, ROOT, SIDES, Case, Training, build
from benchmarks.measuring import device_option, keep, kept, machine, parse, positive, print_to_the_end, seconds
from noise_schedule import NoiseSchedule
from sampling.packed import pack
from stable_diffusion_model import StableDiffusion

RESULTS = Path(__file__).with_suffix(".json")
ROWS = ("unet", "train", "pictures", "vae_encode", "vae_decode", "sampling")
STEPS = 20  # of sampling
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

# ----------------------------------------------------------------------------------------------------------------------


def compiled(network: nn.Module, case: Case, side: str) -> nn.Module:
    return torch.compile(network) if case.compile and side in ("ours", "tuned") else network


def unet(case: Case, side: str) -> Callable[[], object]:
    """The guidance batch of one image through the U-Net."""
    model, device, dtype = MODELS[case.model], case.device, case.torch_dtype
    network = compiled(build(case, side).unet, case, side)
    h = model.side // 8
    x, context = (torch.randn(2, *shape).to(device, dtype) for shape in ((4, h, h), (77, model.unet.context_dim)))
    t = torch.full((2,), 500, device=device)
    if side == "ours":  # as `StableDiffusion.sample` does
        pack(network)
    return no_grad(lambda: network(x, t, context))


def vae_decode(case: Case, side: str) -> Callable[[], object]:
    """One image's latents through the decoder."""
    return vae_half(case, side, lambda vae: vae.decode, (4, MODELS[case.model].side // 8))


def vae_encode(case: Case, side: str) -> Callable[[], object]:
    """One image through the encoder."""
    return vae_half(case, side, lambda vae: vae.encode, (3, MODELS[case.model].side))


def vae_half(case: Case, side: str, half: Callable, shape: tuple[int, int]) -> Callable[[], object]:
    vae = build(case, side).vae
    x = torch.randn(1, shape[0], shape[1], shape[1]).to(case.device, case.torch_dtype)
    if case.compile and side in ("ours", "tuned"):
        vae.encoder, vae.decoder = torch.compile(vae.encoder), torch.compile(vae.decoder)
    return no_grad(lambda: half(vae)(x))


def sampling(case: Case, side: str) -> Callable[[], object]:
    """A prompt to one image: text encoder, guided steps of DPM-Solver++(2M), VAE, PIL."""
    parts, prompt, pixels = build(case, side), "a blue water type pokemon, laughing", MODELS[case.model].side
    how = {"guidance_scale": 7.5, "height": pixels, "width": pixels}
    if side == "ours":
        model = StableDiffusion(parts.text_encoder, parts.unet, parts.vae, NoiseSchedule())
        model.to(case.device, case.torch_dtype).unet = compiled(model.unet, case, side)
        return lambda: model.sample(prompt, steps=STEPS, sampler="dpm++2m", progress=False, **how)
    pipeline = StableDiffusionPipeline(
        vae=parts.vae,
        unet=parts.unet,
        scheduler=DPMSolverMultistepScheduler(**BETAS, steps_offset=1),
        text_encoder=parts.text_encoder.model,
        tokenizer=parts.text_encoder.tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(case.device, case.torch_dtype)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet = compiled(pipeline.unet, case, side)
    return lambda: pipeline(prompt, num_inference_steps=STEPS, **how)


def train(case: Case, side: str) -> Callable[[], object]:
    """One step of the optimizer on latents and text encodings that are at hand."""
    return training(case, side, cached=True)


def pictures(case: Case, side: str) -> Callable[[], object]:
    """One step from images and captions: ours gathers cached latents, theirs encodes, as `train_text_to_image` does.

    What encoding once took is not counted: over an epoch, it is what theirs spends on it in every epoch.
    """
    return training(case, side, cached=False)


def training(case: Case, side: str, cached: bool) -> Callable[[], object]:
    model, parts, device = MODELS[case.model], build(case, side), torch.device(case.device)
    (pixels_a_side, N), width = model.training_on(case.device), model.unet.context_dim
    h = pixels_a_side // 8
    if side == "ours":
        moments = torch.randn(N, 1, 8, h, h, device=device, dtype=torch.float16)
        contexts = torch.randn(N + 1, 77, width, device=device, dtype=torch.float16)
        return Training(parts.unet, moments, contexts, N, case.torch_dtype, case.compile).step

    parameters = list(parts.unet.train().parameters())
    network = compiled(parts.unet, case, side)
    fused = {"fused": True} if side == "tuned" else {}
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-2, **fused)
    scheduler = DDPMScheduler(**BETAS)
    if not cached:  # accelerate's mixed precision: the frozen networks in the low one, the U-Net under autocast
        vae, text = (part.to(device, case.torch_dtype) for part in (parts.vae, parts.text_encoder.model))
        pixels = torch.randn(N, 3, pixels_a_side, pixels_a_side, device=device, dtype=case.torch_dtype)
    ids = torch.randint(2, 100, (N, 77), device=device)
    latents, context = torch.randn(N, 4, h, h, device=device), torch.randn(N, 77, width, device=device)

    def their_step() -> None:
        x, c = latents, context
        if not cached:
            with torch.no_grad():
                x, c = vae.encode(pixels).latent_dist.sample().float() * 0.18215, text(ids)[0]
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (N,), device=device)
        with torch.autocast(device.type, case.torch_dtype, enabled=case.dtype != "float32"):
            prediction = network(scheduler.add_noise(x, noise, t), t, c, return_dict=False)[0]
        F.mse_loss(prediction.float(), noise).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return their_step


def no_grad(work: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return work()

    return run


WORK = {"unet": unet, "train": train, "pictures": pictures, "vae_encode": vae_encode, "vae_decode": vae_decode}
WORK |= {"sampling": sampling}

# ----------------------------------------------------------------------------------------------------------------------
# Measuring
# ----------------------------------------------------------------------------------------------------------------------


def measure(case: Case, rounds: int, apart: bool = False) -> dict:
    """Seconds of each side in each round, their ratios, and the peak memory of each side."""
    if apart:
        turns = [{side: in_a_process(case, side) for side in order} for order in orders(case.sides(), rounds)]
        times = {side: [turn[side]["seconds"] for turn in turns] for side in case.sides()}
        memory = {side: max(turn[side]["memory_mb"] for turn in turns) for side in times}
    else:
        times = time_in_turn(case, rounds)
        memory = {side: peak_memory(case, side) for side in times}
    result = asdict(case) | {"apart": apart, "seconds": times, "memory_mb": memory}
    for side in case.sides()[1:]:
        ratios = [theirs / ours for theirs, ours in zip(times[side], times["ours"], strict=True)]
        result[side] = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    return result


def time_in_turn(case: Case, rounds: int) -> dict[str, list[float]]:
    """Seconds by side, after all have warmed up (with --compile, compiled)."""
    torch._dynamo.reset()  # else what was compiled for earlier cases counts towards its limit, and it gives up silently
    sides = case.sides()
    works = {side: work_of(case, side) for side in sides}
    for side in sides:
        warm_up(works[side], case)
    times: dict[str, list[float]] = {side: [] for side in sides}
    for order in orders(sides, rounds):
        for side in order:
            times[side].append(seconds(works[side], case.device))
    return times


def orders(sides: tuple[str, ...], rounds: int) -> list[tuple[str, ...]]:
    """Who follows whom in each round: each is first, last and behind each of the others in turn."""
    return [(sides[k % len(sides) :] + sides[: k % len(sides)])[:: 1 if k % 2 else -1] for k in range(rounds)]


def work_of(case: Case, side: str) -> Callable[[], object]:
    """What a side does in a row, to be called again and again."""
    if side == "documented in float32":
        case, side = replace(case, dtype="float32"), "documented"
    return WORK[case.row](case, side)


def peak_memory(case: Case, side: str) -> float | None:
    """Peak of a side that warms up and does its work, in MB; on a CPU in a process of its own, None if that fails."""
    if case.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return alone(side, case)["memory_mb"] - before / 1e6
    try:
        return in_a_process(case, side)["memory_mb"]
    except RuntimeError as error:
        print(f"no memory of {side}: {error}", file=sys.stderr)
        return None


def in_a_process(case: Case, side: str) -> dict[str, float]:
    """What `alone` gives in a process of its own. RuntimeError if that fails."""
    command = [sys.executable, "-m", "benchmarks.compare_diffusers", "--alone", side, json.dumps(asdict(case))]
    pages = {"THP_MEM_ALLOC_ENABLE": str(int(side in ("ours", "tuned")))}  # large ones, as `vae_model.py` asks for
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | pages)
    if ended.returncode < 0:
        raise RuntimeError(f"killed by signal {-ended.returncode}, perhaps for lack of memory")
    if ended.returncode:
        raise RuntimeError((ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1])
    return json.loads(ended.stdout.splitlines()[-1])


def warm_up(work: Callable[[], object], case: Case) -> float:
    """Does it twice, or once where that takes over half a minute, unless it compiles; the seconds of the last time."""
    once = seconds(work, case.device)
    return once if once > 30 and not case.compile else seconds(work, case.device)


def alone(side: str, case: Case) -> dict[str, float]:
    """A side warms up and does its work: peak memory in MB, and seconds, the median of all turns in a second."""
    work = work_of(case, side)
    turns = 1 + int(1 / max(warm_up(work, case), 0.05))
    result = {"seconds": statistics.median(seconds(work, case.device) for _ in range(turns))}
    if case.device == "cuda":
        return result | {"memory_mb": torch.cuda.max_memory_allocated() / 1e6}
    # Not `resource.getrusage`: a child begins with its parent's peak there.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return result | {"memory_mb": int(status.split("VmHWM:")[1].split()[0]) / 1e3}


KERNELS = {  # operators by what they do, outside of the optimizer
    "convolutions": ("convolution", "conv2d"),
    "matrix products": ("mm", "linear", "matmul"),
    "attention": ("attention", "softmax"),
    "norms": ("_norm",),
}


def profile(case: Case, side: str) -> dict[str, float]:
    """Seconds of one turn by kind of kernel, the time inside operators themselves: the fastest turn of five."""
    work = work_of(case, side)
    work(), work()
    turns = []
    for _ in range(5):
        with torch.profiler.profile(activities=torch.profiler.supported_activities()) as profiler:
            work()
        spent = dict.fromkeys([*KERNELS, "optimizer", "the rest"], 0.0)
        for event in profiler.events():
            own = event.self_device_time_total if case.device == "cuda" else event.self_cpu_time_total
            spent[kind_of(event)] += own / 1e6
        turns.append(spent)
    return min(turns, key=lambda spent: sum(spent.values()))


def kind_of(event: FunctionEvent) -> str:
    """What an operator does: "optimizer" for whatever a step of it calls, else by its name."""
    above: FunctionEvent | None = event
    while above:
        if above.name.startswith("Optimizer."):
            return "optimizer"
        above = above.cpu_parent
    return next((kind for kind, parts in KERNELS.items() if any(part in event.name for part in parts)), "the rest")


def profile_table(case: Case) -> str:
    """Markdown: of each kind of kernel, its time as a share of the whole of ours."""
    spent = {side: profile(case, side) for side in case.sides()}
    whole = sum(spent["ours"].values())
    lines = [f"| {case.row}, {case.model}, {case.dtype} | {' | '.join(spent)} |", "| --- " * (1 + len(spent)) + "|"]
    for kind in spent["ours"]:
        lines.append(f"| {kind} | {' | '.join(f'{times[kind] / whole:.0%}' for times in spent.values())} |")
    lines.append(f"| together | {' | '.join(f'{sum(times.values()) / whole:.0%}' for times in spent.values())} |")
    return "\n".join(lines)


def table(results: list[dict]) -> str:
    """Markdown, a row for each case."""
    head = (
        "| row | model | dtype | diffusers | diffusers, tuned | diffusers, float32 | memory: ours, theirs, tuned (MB) |"
    )
    lines = [head, "| --- " * 7 + "|"]
    for result in results:
        ratios = [result.get(side) for side in SIDES[1:]]
        cells = [f"{r['median']:.2f}× ({r['least']:.2f}…{r['most']:.2f})" if r else "" for r in ratios]
        memory = ", ".join(f"{result['memory_mb'][side] or math.nan:.0f}" for side in SIDES[:3])
        how = result["dtype"] + ", compiled" * result["compile"]
        lines.append(f"| {' | '.join([result['row'], result['model'], how, *cells, memory])} |")
    return "\n".join(lines)


def tables(results: list[dict]) -> str:
    """Of each machine, the cases that were timed in one process, then those with a process for each turn."""
    parts = []
    for name in dict.fromkeys(result["device_name"] for result in results):
        here = [result for result in results if result["device_name"] == name]
        together, apart = ([r for r in here if r.get("apart", False) == way] for way in (False, True))
        parts.append(f"{name}:")
        parts += [table(together)] if together else []
        parts += ["each turn in a process of its own:", table(apart)] if apart else []
    return "\n".join(parts)


def main() -> None:
    if sys.argv[1:2] == ["--alone"]:
        print(json.dumps(alone(sys.argv[2], Case(**json.loads(sys.argv[3])))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW")
    parser.add_argument("--models", nargs="+", default=["quickstart", "pokemon"], choices=list(MODELS), metavar="MODEL")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="auto", type=device_option, help="auto, cpu or cuda")
    parser.add_argument("--compile", action="store_true", help="torch.compile ours and the tuned")
    parser.add_argument("--rounds", type=positive, default=8, metavar="N")
    parser.add_argument("--apart", action="store_true", help="each turn in a process of its own")
    parser.add_argument("--table", action="store_true", help="only print what was measured")
    parser.add_argument("--profile", action="store_true", help="only print where the time goes")
    options = parse(parser, RESULTS)
    choices = itertools.product(options.models, options.rows, options.dtypes)
    cases = [Case(row, model, dtype, options.device.type, options.compile) for model, row, dtype in choices]
    if options.profile:
        print("\n\n".join(profile_table(case) for case in cases))
        return
    for case in [] if options.table else cases:
        try:
            result = measure(case, options.rounds, options.apart) | machine(options.device.type)
        except RuntimeError as error:
            if not options.apart:
                raise
            # A turn was ended, above all where memory did not suffice for it.
            print(f"{case.row}, {case.model}, {case.dtype}: left out ({error}).", file=sys.stderr)
            continue
        keep(RESULTS, [result], ("row", "model", "dtype", "device_name", "compile", "apart"))
        print(table([result]).splitlines()[-1], flush=True)
    print_to_the_end(tables(kept(RESULTS)))


if __name__ == "__main__":
    main()
