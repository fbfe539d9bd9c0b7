"""All options of the training scripts and of the evaluation, and the presets: every hyper-parameter in one place.

Marked `fixed` is what makes a run the run it is: it may not change on --resume. 0 switches off wherever it says so.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from training.options import option
from training.script import UserError

if TYPE_CHECKING:
    from noise_schedule import NoiseSchedule

_HERE = Path(__file__).resolve().parent.parent
DEFAULT_DATASET = "svjack/pokemon-blip-captions-en-zh"
PREDICTIONS = ("epsilon", "v_prediction")
DEVICE = "auto (the best there is), cuda, cuda:1, mps or cpu"


@dataclass
class UNetOptions:
    """Train the U-Net of a latent diffusion model on captioned images; a preset sets some of the options."""

    # fmt: off
    preset: str = option("pokemon", "monsters, turquoise, turquoise_lora, pokemon_cpu, pokemon, finetune or lora", fixed=True, group="what it learns from")
    dataset: str = option(DEFAULT_DATASET, "hub id, folder of captioned images, monsters, monsters:N, or monsters:N:turquoise, half of which have a new colour", fixed=True)
    split: str = option("train", "split of the data set", fixed=True)
    revision: str | None = option(None, "revision of a data set on the hub", fixed=True)
    caption_column: str | None = option(None, "column with the captions; default: text, en_text or caption. CLIP reads English", fixed=True)
    caption: str | None = option(None, "one caption for all images of a data set that has none", fixed=True)
    on_bad_image: str = option("error", "error or skip: what to do about files that cannot be read", fixed=True, choices=("error", "skip"))
    resolution: int = option(512, "side of the images in pixels, divisible by 8", fixed=True, at_least=8, at_most=4096)
    mirror: bool = option(True, "mirror half of the images; not if captions say left", fixed=True)
    validation_share: float = option(0.05, "share of the images held out to measure the validation loss; 0 = none", fixed=True, at_least=0, below=1)

    vae: str | None = option(None, "VAE: file, folder or hub id; default: the preset's, or --pretrained's own (always that for a LoRA)", fixed=True, group="what it starts from")
    text_encoder: str | None = option(None, "CLIP: folder or hub id; default: the preset's, or --pretrained's own (always that for a LoRA)", fixed=True)
    pretrained: str | None = option(None, "start from this whole model: folder, hub id or single file", fixed=True)
    output_dir: str = option("stable_diffusion_results/pokemon", "the run folder")
    resume: bool = option(False, "go on with the run in --output_dir from its last checkpoint")
    overwrite: bool = option(False, "delete the run in --output_dir and start again")
    seed: int = option(0, "seed of all random numbers", fixed=True, at_least=0, at_most=2**40)

    lora_rank: int = option(0, "train low-rank changes of this rank beside the frozen weights of --pretrained; 0 = off: train all weights", fixed=True, at_least=0, at_most=4096, group="LoRA")
    lora_alpha: float = option(0.0, "their strength is alpha / rank; 0 = the rank, so 1", fixed=True, at_least=0)
    lora_layers: str = option("attention", "which layers are changed: attention, feed_forward (and attention) or all", fixed=True, choices=("attention", "feed_forward", "all"))

    block_out_channels: list[int] = option([128, 256, 384, 512], "channels, one value per resolution, finest first", fixed=True, at_least=1, group="the U-Net, if it starts from scratch")
    attention_levels: list[int] = option([0, 1, 1, 1], "1 where the level attends to the text", fixed=True, at_least=0, at_most=1)
    num_attention_heads: list[int] = option([8], "one number, or one per level", fixed=True, at_least=1)
    layers_per_block: int = option(2, "residual blocks per level", fixed=True, at_least=1)
    norm_num_groups: int = option(32, "groups of the group norms", fixed=True, at_least=1)

    prediction_type: str | None = option(None, "epsilon or v_prediction; default: --pretrained's own, else epsilon", fixed=True, choices=PREDICTIONS, group="the objective")
    zero_terminal_snr: bool = option(False, "end the schedule in pure noise (Lin et al. 2024); needs v_prediction", fixed=True)
    min_snr_gamma: float = option(5.0, "gamma of the min-SNR weighting (Hang et al. 2023); 0 = off", fixed=True, at_least=0, at_most=1e6)
    noise_offset: float = option(0.0, "strength of noise shared by a whole channel, for dark and bright images; 0 = off", fixed=True, at_least=0)
    caption_dropout: float = option(0.1, "share of captions replaced by the empty one, which guidance needs; 0 = off", fixed=True, at_least=0, at_most=1)

    max_steps: int = option(15_000, "training steps in all", at_least=1, group="optimisation")
    batch_size: int = option(32, "images per step, over all processes and accumulation", fixed=True, at_least=1)
    gradient_accumulation: int = option(1, "micro-batches into which each process splits its share of a batch; more need less memory", at_least=1)
    optimizer: str = option("adamw", "adamw, or muon: more is learned from each step, and steps take a little longer", fixed=True, choices=("adamw", "muon"))
    learning_rate: float = option(2e-4, "at its peak, after the warm-up; then a cosine down to 0", above=0)
    warmup_steps: int = option(500, "steps of linear warm-up; 0 = off", at_least=0)
    weight_decay: float = option(0.01, "of AdamW, on matrices and filters, not on gains and biases; 0 = off", at_least=0)
    gradient_clip: float = option(1.0, "largest gradient norm; 0 = off", at_least=0)
    ema_decay: float = option(0.9995, "of the averaged weights, which are saved and sampled; 0 = off, which saves memory", at_least=0, below=1)
    ema_on_cpu: bool = option(False, "keep the average in the CPU's memory: less on the GPU, slower steps")
    precision: str = option("auto", "auto, float32 or bfloat16: what the networks compute in", choices=("auto", "float32", "bfloat16"))
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, a third slower")
    compile: bool = option(False, "torch.compile the U-Net: minutes to start, then perhaps faster")
    device: str = option("auto", DEVICE)

    log_every: int = option(20, "steps between rows of metrics.csv; 0 = off", at_least=0, group="reports and checkpoints")
    validate_every: int = option(500, "steps between validation losses, and at the end; 0 = off", at_least=0)
    preview_every: int = option(1000, "steps between sheets of samples, and at the end; 0 = off", at_least=0)
    checkpoint_every: int = option(1000, "steps between checkpoints; 0 = off; the end is always saved", at_least=0)
    keep_checkpoints: int = option(2, "how many of the newest checkpoints are kept; the best of those at which it was validated, too", at_least=1)
    preview_prompts: list[str] = option([], "prompts of the previews; default: captions of the data set")
    preview_steps: int = option(25, "sampling steps of the previews", at_least=1, at_most=1000)
    preview_guidance: float = option(3.0, "guidance scale of the previews; 1 = off")
    final_samples: int = option(0, "monsters that it never saw, drawn and judged at the end; 0 = off, as for other data sets", at_least=0)
    save_precision: str = option("float32", "of the weights in OUTPUT_DIR/model: float32, bfloat16 or float16", choices=("float32", "bfloat16", "float16"))
    wandb: str = option("auto", "auto (online if logged in), online, offline or off", choices=("auto", "online", "offline", "off"))
    # fmt: on


# What two CPU cores can train in minutes or an hour: small latents, a small U-Net, Muon.
_TWO_CORES = {"resolution": 128, "batch_size": 64, "optimizer": "muon", "preview_steps": 15, "log_every": 10}
_SMALL = {"attention_levels": [0, 1, 1], "num_attention_heads": [4], "layers_per_block": 1, "norm_num_groups": 16}

PRESETS: dict[str, dict] = {
    # The quickstart: everything is drawn, small and cheap. Two CPU cores, minutes, no download, no account. What each
    # choice is worth is measured by benchmarks/quickstart.py.
    "monsters": _TWO_CORES
    | _SMALL
    | {
        "dataset": "monsters:2000",
        "mirror": False,  # they look to either side; a new monster costs little more than a mirror, and teaches more
        "output_dir": "stable_diffusion_results/my_monsters",
        "block_out_channels": [48, 96, 144],
        "max_steps": 660,
        "learning_rate": 6e-3,
        "warmup_steps": 50,
        "weight_decay": 0.1,
        "ema_decay": 0.99,
        "validate_every": 330,
        "preview_every": 132,
        "checkpoint_every": 330,
        "final_samples": 32,
        "wandb": "off",
    },
    # What the quickstart's model learns in a few more minutes: a colour that it has never seen, nor its name.
    "turquoise": _TWO_CORES
    | {
        "pretrained": "stable_diffusion_results/my_monsters/model",
        "dataset": "monsters:400:turquoise",
        "mirror": False,
        "output_dir": "stable_diffusion_results/my_turquoise",
        "max_steps": 150,
        "learning_rate": 1.5e-3,
        "warmup_steps": 10,
        "ema_decay": 0.95,
        "validate_every": 75,
        "preview_every": 50,
        "checkpoint_every": 75,
        "final_samples": 32,
        "wandb": "off",
    },
    # Real images in an hour or two on two cores.
    "pokemon_cpu": _TWO_CORES
    | _SMALL
    | {
        "output_dir": "stable_diffusion_results/pokemon_cpu",
        "block_out_channels": [48, 96, 144],
        "max_steps": 3500,
        "learning_rate": 4e-3,
        "warmup_steps": 100,
        "ema_decay": 0.998,
        "validate_every": 250,
        "preview_every": 250,
        "checkpoint_every": 250,
    },
    # From scratch on some hundred captioned images, with the published VAE and CLIP.
    "pokemon": {},
    # From the weights of Stable Diffusion 1.5: small steps, little memory.
    "finetune": {
        "pretrained": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "output_dir": "stable_diffusion_results/finetune",
        "max_steps": 3000,
        "batch_size": 4,
        "gradient_accumulation": 4,
        "learning_rate": 1e-5,
        "warmup_steps": 100,
        "ema_decay": 0.0,
        "gradient_checkpointing": True,
        "preview_guidance": 7.5,
        "save_precision": "float16",
    },
}
# The same colour as a LoRA: thirty turquoise monsters, and thirty others, so that it does not forget them.
PRESETS["turquoise_lora"] = PRESETS["turquoise"] | {
    "dataset": "monsters:60:turquoise",
    "output_dir": "stable_diffusion_results/my_turquoise_lora",
    "validation_share": 0.0,
    "lora_rank": 16,
    "max_steps": 240,
    "batch_size": 32,
    "learning_rate": 4e-3,
    "ema_decay": 0.99,
    "preview_every": 80,
    "checkpoint_every": 120,
}
# From Stable Diffusion 1.5 with a few MB of new weights: thirty images and a GPU of 8 GB are enough.
PRESETS["lora"] = PRESETS["finetune"] | {
    "lora_rank": 8,
    "output_dir": "stable_diffusion_results/my_lora",
    "max_steps": 1000,
    "learning_rate": 2e-4,
    "warmup_steps": 50,
    "ema_decay": 0.99,
    "validate_every": 250,
    "preview_every": 250,
    "checkpoint_every": 250,
}
_SHIPPED = {"vae": str(_HERE / "vae_model.pth"), "text_encoder": str(_HERE / "stable_diffusion_results" / "clip")}
_PUBLISHED = {"vae": "stabilityai/sd-vae-ft-mse", "text_encoder": "openai/clip-vit-large-patch14"}
PARTS = {
    "monsters": _SHIPPED,
    "turquoise": _SHIPPED,
    "turquoise_lora": _SHIPPED,
    "pokemon_cpu": _PUBLISHED | {"vae": _SHIPPED["vae"]},
    "pokemon": _PUBLISHED,
    "finetune": _PUBLISHED,
    "lora": _PUBLISHED,
}  # where no --pretrained brings them

_WHOLE = (
    f"go on from the whole model that ships: --pretrained {_HERE / 'stable_diffusion_results' / 'monsters' / 'model'}."
)
_IN_PARTS = f"take what ships: --vae {_SHIPPED['vae']} --text_encoder {_SHIPPED['text_encoder']}"


def what_to_do(options: UNetOptions) -> str:
    """How an error about a missing model ends."""
    quickstart = PRESETS["turquoise"]["pretrained"]
    if options.pretrained == quickstart and not Path(quickstart).exists():
        return "; train it first: --preset monsters."
    return f"; or {_WHOLE}" if options.pretrained else f"; or {_IN_PARTS}, or {_WHOLE}"


def check_objective(options: UNetOptions, schedule: "NoiseSchedule") -> None:
    """A pretrained U-Net goes on predicting what it learned to predict; UserError if something else is asked for."""
    if options.prediction_type not in (None, schedule.prediction_type):
        raise UserError(
            f"--prediction_type {options.prediction_type}: {options.pretrained} predicts {schedule.prediction_type}, "
            "which it goes on doing; leave the option out."
        )
    if options.zero_terminal_snr and not schedule.zero_terminal_snr:
        raise UserError(
            f"--zero_terminal_snr: the schedule of {options.pretrained} ends before pure noise; leave the option out."
        )


@dataclass
class VAEOptions:
    """Train the autoencoder. The defaults made `vae_model.pth`, for which they won short trials (one GPU)."""

    # fmt: off
    dataset: list[str] = option(["monsters:1000"], "one or more of: monsters[:N], a folder of captioned images, a hub id", fixed=True, group="what it learns from")
    on_bad_image: str = option("error", "error or skip: what to do about files that cannot be read", fixed=True, choices=("error", "skip"))
    resolution: int = option(512, "images are loaded at this size (pixels)", fixed=True, at_least=8, at_most=4096)
    crop: int = option(192, "training sees random crops of this size (pixels), divisible by 8", fixed=True, at_least=8)
    blank_weight: float = option(0.02, "chance of a blank crop relative to a full one; large numbers: crops anywhere", fixed=True, above=0)
    validation_images: int = option(40, "held out, of each data set", fixed=True, at_least=1)

    pretrained: str | None = option(None, "start from this VAE: file, folder or hub id", fixed=True, group="what it starts from")
    output_dir: str = option("stable_diffusion_results/my_vae", "the run folder")
    resume: bool = option(False, "go on with the run in --output_dir from its last checkpoint")
    overwrite: bool = option(False, "delete the run in --output_dir and start again")
    seed: int = option(0, "seed of all random numbers", fixed=True, at_least=0, at_most=2**40)
    block_out_channels: list[int] = option([32, 64, 128, 128], "channels, one value per resolution, finest first", fixed=True, at_least=1)
    layers_per_block: int = option(2, "residual blocks per level", fixed=True, at_least=1)
    norm_num_groups: int = option(8, "groups of the group norms", fixed=True, at_least=1)

    l1_weight: float = option(1.0, "of the mean absolute error; 0 = off", fixed=True, at_least=0, group="the objective")
    l2_weight: float = option(20.0, "of the mean squared error, which is what PSNR measures; 0 = off", fixed=True, at_least=0)
    kl_weight: float = option(1e-6, "of the KL, per pixel value as in LDM; 0 = off", fixed=True, at_least=0)
    discriminator_start: int = option(-1, "step at which it joins in; -1 = never", fixed=True, at_least=-1)
    discriminator_weight: float = option(0.5, "factor on the adversarial loss, besides its adaptive weight", fixed=True, at_least=0)

    max_steps: int = option(4000, "training steps in all", at_least=1, group="optimisation")
    batch_size: int = option(32, "crops per step", fixed=True, at_least=1)
    learning_rate: float = option(1e-3, "at its peak; warmed up, then a cosine to 2 %", above=0)
    warmup_steps: int = option(200, "steps of linear warm-up; 0 = off", at_least=0)
    gradient_clip: float = option(1.0, "largest gradient norm; 0 = off", at_least=0)
    ema_decay: float = option(0.999, "of the averaged weights, which are saved", fixed=True, at_least=0, below=1)
    precision: str = option("auto", "auto, float32 or bfloat16", choices=("auto", "float32", "bfloat16"))
    compile: bool = option(False, "torch.compile the network: minutes to start, then perhaps faster")
    device: str = option("auto", DEVICE)

    log_every: int = option(20, "steps between rows of metrics.csv; 0 = off", at_least=0, group="reports and checkpoints")
    validate_every: int = option(500, "steps between measurements, and at the end; 0 = off", at_least=0)
    checkpoint_every: int = option(1000, "steps between checkpoints; 0 = off; the end is always saved", at_least=0)
    keep_checkpoints: int = option(2, "how many of the newest checkpoints are kept; the best of those at which it was validated, too", at_least=1)
    wandb: str = option("auto", "auto (online if logged in), online, offline or off", choices=("auto", "online", "offline", "off"))
    # fmt: on


@dataclass
class CLIPOptions:
    """Train a small CLIP from scratch. The defaults are for a GPU."""

    # fmt: off
    dataset: list[str] = option(["monsters"], "one or more of: monsters (fresh ones without end), monsters:N, a folder of captioned images, a hub id", fixed=True, group="what it learns from")
    on_bad_image: str = option("error", "error or skip: what to do about files that cannot be read", fixed=True, choices=("error", "skip"))
    validation_images: int = option(100, "held out, of each data set", fixed=True, at_least=1)
    mirror: bool = option(True, "mirror half of the images; not if captions say left", fixed=True)
    fresh_monsters: int = option(16, "new monsters drawn for each step; the rest of the batch is drawn from --pool", fixed=True, at_least=1)
    pool: int = option(16_384, "how many of the newest monsters are kept to draw batches from", fixed=True, at_least=1)
    workers: int = option(-1, "processes that draw; -1 = one less than there are cores", at_least=-1)

    pretrained: str | None = option(None, "start from this CLIP, tokenizer and shape included: a folder or hub id", fixed=True, group="what it starts from")
    output_dir: str = option("stable_diffusion_results/my_clip", "the run folder")
    resume: bool = option(False, "go on with the run in --output_dir from its last checkpoint")
    overwrite: bool = option(False, "delete the run in --output_dir and start again")
    seed: int = option(0, "seed of all random numbers", fixed=True, at_least=0, at_most=2**40)
    image_size: int = option(96, "pixels a side, divisible by --patch_size", fixed=True, at_least=8)
    patch_size: int = option(8, "pixels a side of what the vision transformer reads as one token", fixed=True, at_least=1)
    vision_width: int = option(192, "width of the vision transformer", fixed=True, at_least=1)
    vision_layers: int = option(5, "its layers", fixed=True, at_least=1)
    text_width: int = option(192, "width of the text transformer, which is the U-Net's context_dim, too", fixed=True, at_least=1)
    text_layers: int = option(4, "its layers", fixed=True, at_least=1)
    head_width: int = option(32, "of each attention head, in both networks", fixed=True, at_least=1)
    projection_width: int = option(128, "of the space where images and captions meet", fixed=True, at_least=1)
    vocabulary_size: int = option(1536, "tokens at most; 514 of them are bytes and marks", fixed=True, at_least=514)

    max_steps: int = option(8000, "training steps in all", at_least=1, group="optimisation")
    batch_size: int = option(512, "images per step; larger is better, since each image is compared with all captions", fixed=True, at_least=2)
    learning_rate: float = option(1e-3, "at its peak; warmed up, then a cosine to 1 %", above=0)
    warmup_steps: int = option(200, "steps of linear warm-up; 0 = off", at_least=0)
    weight_decay: float = option(0.1, "of AdamW, on matrices and filters, not on gains and biases; 0 = off", at_least=0)
    gradient_clip: float = option(1.0, "largest gradient norm; 0 = off", at_least=0)
    ema_decay: float = option(0.998, "of the averaged weights, which are saved", fixed=True, at_least=0, below=1)
    precision: str = option("auto", "auto, float32 or bfloat16", choices=("auto", "float32", "bfloat16"))
    device: str = option("auto", DEVICE)

    log_every: int = option(25, "steps between rows of metrics.csv; 0 = off", at_least=0, group="reports and checkpoints")
    validate_every: int = option(250, "steps between measurements, and at the end; 0 = off", at_least=0)
    checkpoint_every: int = option(500, "steps between checkpoints; 0 = off; the end is always saved", at_least=0)
    keep_checkpoints: int = option(2, "how many of the newest checkpoints are kept; the best of those at which it was validated, too", at_least=1)
    wandb: str = option("auto", "auto (online if logged in), online, offline or off", choices=("auto", "online", "offline", "off"))
    # fmt: on


@dataclass
class EvaluationOptions:
    """Measure a model: does it follow its prompts, does it copy, what does its VAE allow?"""

    # fmt: off
    model: str = option(str(_HERE / "stable_diffusion_results" / "monsters" / "model"), "the model: folder, hub id or single file", group="what is measured")
    lora: list[str] = option([], "one or more LoRAs, added to the model: files, folders or hub ids")
    lora_scale: list[float] = option([], "how strongly each --lora counts; those without count fully")
    checkpoint: str = option("", "a checkpoint of the run that made it (checkpoints/step_….pt): how well its raw weights predict, beside the averaged ones")
    dataset: str = option("monsters:5000", "what it was trained on: hub id, folder of captioned images, or monsters:N")
    split: str = option("train", "split of the data set")
    revision: str | None = option(None, "revision of a data set on the hub")
    caption_column: str | None = option(None, "column with the captions; default: text, en_text or caption")
    caption: str | None = option(None, "caption of all images, for a data set without captions")
    on_bad_image: str = option("error", "error or skip: what to do about files that cannot be read", choices=("error", "skip"))
    clip: str = option(str(_HERE / "stable_diffusion_results" / "clip"), "judges whether images show their prompts: folder or hub id of a whole CLIP")
    num_samples: int = option(100, "images to sample", at_least=2)
    seed: int = option(0, "of the first image; the others count on", at_least=0, at_most=2**40)

    resolution: int = option(512, "side of the images in pixels, divisible by 8", at_least=8, at_most=4096, group="how it samples")
    batch_size: int = option(4, "images sampled at once", at_least=1)
    steps: int = option(15, "sampling steps", at_least=1, at_most=1000)
    sampler: str = option("dpm++2m", "ddpm, ddim, euler, euler_a or dpm++2m", choices=("ddpm", "ddim", "euler", "euler_a", "dpm++2m"))
    guidance_scale: float = option(3.0, "classifier-free guidance; 1 = off")
    precision: str = option("auto", "auto, float32 or bfloat16: what the networks compute in", choices=("auto", "float32", "bfloat16"))
    device: str = option("auto", DEVICE)

    output_dir: str = option("stable_diffusion_results/evaluation", "where the report goes", group="the report")
    reuse: bool = option(False, "take the images that are already in --output_dir")
    # fmt: on
