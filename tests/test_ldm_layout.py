"""The original single-file layout: known names of the published files, and agreement with diffusers' own conversion."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from diffusion_model import UNetConfig
from published import unet_dict, vae_dict
from published.ldm_checkpoint import LDMCheckpoint, is_ldm, read_ldm, read_ldm_vae, write_ldm
from published.weight_files import read_checkpoint
from vae_model import VAEConfig

SD1 = UNetConfig(block_out_channels=(32, 64, 64, 64), context_dim=64)
SD2 = UNetConfig(
    block_out_channels=(64, 128), attention_levels=(True, False), num_attention_heads=(1, 2), context_dim=64,
    use_linear_projection=True, layers_per_block=1, transformer_depth=2,
)  # fmt: skip
SMALL_VAE = VAEConfig(block_out_channels=(32, 64, 64, 64))


def make(unet: UNetConfig, vae: VAEConfig, act: str = "quick_gelu", layers: int = 2, **others) -> LDMCheckpoint:
    """A random model of diffusers' and transformers' own making, as one checkpoint."""
    text = CLIPTextConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=1,
        max_position_embeddings=77, hidden_act=act, bos_token_id=98, eos_token_id=99,
    )  # fmt: skip
    return LDMCheckpoint(
        unet_config=unet,
        unet=UNet2DConditionModel.from_config(unet_dict(unet)).state_dict(),
        vae_config=vae,
        vae=AutoencoderKL.from_config(vae_dict(vae)).state_dict(),
        text_config=text.to_dict(),
        text_encoder=CLIPTextModel(text).state_dict(),
        **others,
    )


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def anonymous(path) -> None:
    """Take the metadata off a file, which no published one has."""
    save_file(load_file(path), path)


@pytest.fixture(scope="module")
def published_sd1() -> dict[str, tuple]:
    """The names and shapes that SD 1.5 has when it is written here: full size, without the memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_dict(UNetConfig())).state_dict()
        vae = AutoencoderKL.from_config(vae_dict(VAEConfig())).state_dict()
        config = CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        )  # quick_gelu is the default
        text = CLIPTextModel(config).state_dict()
    return written(LDMCheckpoint(UNetConfig(), unet, VAEConfig(), vae, config.to_dict(), text))


@pytest.fixture(scope="module")
def published_sd2() -> dict[str, tuple]:
    config = UNetConfig(num_attention_heads=(5, 10, 20, 20), context_dim=1024, use_linear_projection=True)
    text_config = CLIPTextConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"
    )
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_dict(config)).state_dict()
        text = CLIPTextModel(text_config).state_dict()
    return written(LDMCheckpoint(config, unet, text_config=text_config.to_dict(), text_encoder=text))


def written(checkpoint: LDMCheckpoint) -> dict[str, tuple]:
    """What `write_ldm` would write, caught before it reaches the disk."""
    caught = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "published.ldm_checkpoint.write_safetensors", lambda path, tensors, metadata: caught.update(tensors)
        )
        write_ldm("nowhere", checkpoint)
    return {name: tuple(tensor.shape) for name, tensor in caught.items()}


# Names and shapes as they stand in v1-5-pruned-emaonly.safetensors.
KNOWN_SD1 = {
    "model.diffusion_model.time_embed.0.weight": (1280, 320),
    "model.diffusion_model.time_embed.2.bias": (1280,),
    "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    "model.diffusion_model.input_blocks.1.0.emb_layers.1.weight": (320, 1280),
    "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
    "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.ff.net.0.proj.weight": (2560, 320),
    "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
    "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
    "model.diffusion_model.input_blocks.11.0.out_layers.3.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_out.0.bias": (1280,),
    "model.diffusion_model.middle_block.2.in_layers.2.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.0.0.in_layers.0.weight": (2560,),
    "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.8.2.conv.bias": (640,),
    "model.diffusion_model.output_blocks.9.0.in_layers.2.weight": (320, 960, 3, 3),
    "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias": (320,),
    "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
    "first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3),
    "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
    "first_stage_model.encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
    "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    "first_stage_model.encoder.norm_out.weight": (512,),
    "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
    "first_stage_model.decoder.mid.block_2.conv2.bias": (512,),
    "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
    "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
    "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
    "first_stage_model.post_quant_conv.weight": (4, 4, 1, 1),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77),
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
    "cond_stage_model.transformer.text_model.encoder.layers.11.self_attn.q_proj.weight": (768, 768),
    "cond_stage_model.transformer.text_model.final_layer_norm.bias": (768,),
}
# … and in v2-1_768-ema-pruned.safetensors.
KNOWN_SD2 = {
    "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320),
    "model.diffusion_model.output_blocks.5.1.transformer_blocks.0.attn2.to_v.weight": (1280, 1024),
    "cond_stage_model.model.positional_embedding": (77, 1024),
    "cond_stage_model.model.token_embedding.weight": (49408, 1024),
    "cond_stage_model.model.ln_final.weight": (1024,),
    "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": (3072, 1024),
    "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias": (3072,),
    "cond_stage_model.model.transformer.resblocks.22.attn.out_proj.weight": (1024, 1024),
    "cond_stage_model.model.transformer.resblocks.22.mlp.c_fc.weight": (4096, 1024),
    "cond_stage_model.model.transformer.resblocks.22.ln_2.bias": (1024,),
}


def test_sd1_is_written_with_the_published_names(published_sd1):
    assert KNOWN_SD1.items() <= published_sd1.items()
    parts = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
    assert [sum(name.startswith(part) for name in published_sd1) for part in parts] == [686, 248, 197]
    assert len(published_sd1) == 686 + 248 + 197


def test_sd2_is_written_with_the_published_names(published_sd2):
    assert KNOWN_SD2.items() <= published_sd2.items()
    parts = ("model.diffusion_model.", "cond_stage_model.model.transformer.resblocks.", "cond_stage_model.")
    assert [sum(name.startswith(part) for name in published_sd2) for part in parts] == [686, 23 * 12, 23 * 12 + 4]


@pytest.mark.parametrize(("unet", "act"), [(SD1, "quick_gelu"), (SD2, "gelu")], ids=["SD 1", "SD 2"])
@pytest.mark.parametrize("with_metadata", [True, False])
def test_what_is_written_is_read_back_and_read_alike_by_diffusers(tmp_path, unet, act, with_metadata):
    model = make(unet, SMALL_VAE, act)
    path = tmp_path / "model.safetensors"
    write_ldm(path, model)
    if not with_metadata:
        anonymous(path)
    ours, file = read_ldm(path), load_file(path)
    assert (ours.unet_config, ours.vae_config) == (unet, SMALL_VAE)
    assert same(ours.unet, model.unet)
    assert same(ours.vae, model.vae)
    assert same(ours.text_encoder, model.text_encoder)
    wanted = CLIPTextConfig(**model.text_config).to_dict() | {"projection_dim": ours.text_config["projection_dim"]}
    assert CLIPTextConfig(**ours.text_config).to_dict() == wanted

    assert same(ours.unet, convert_ldm_unet_checkpoint(dict(file), unet_dict(unet)))
    assert same(ours.vae, convert_ldm_vae_checkpoint(dict(file), vae_dict(SMALL_VAE)))
    if act == "gelu":
        theirs = convert_open_clip_checkpoint(CLIPTextModel(CLIPTextConfig(**ours.text_config)), file)
    else:
        theirs = convert_ldm_clip_checkpoint(file)
        theirs.pop("text_model.embeddings.position_ids")
    assert same(ours.text_encoder, {name.removeprefix("text_model."): tensor for name, tensor in theirs.items()})


def test_a_training_checkpoint_is_read_without_its_extras(tmp_path):
    """A .ckpt as CompVis saved it: nested, with the schedule's tables, the average and the loss among the tensors."""
    model = make(SD1, SMALL_VAE)
    write_ldm(tmp_path / "model.safetensors", model)
    tensors = load_file(tmp_path / "model.safetensors")
    averaged = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor + 1
        for name, tensor in tensors.items() if name.startswith("model.")
    }  # fmt: skip
    extras = {"betas": torch.ones(1000), "first_stage_model.loss.logvar": torch.zeros(())}
    torch.save({"state_dict": tensors | averaged | extras, "global_step": 470000, "epoch": 3}, tmp_path / "model.ckpt")
    ours = read_ldm(tmp_path / "model.ckpt")
    assert same(ours.unet, model.unet) and same(ours.vae, model.vae) and same(ours.text_encoder, model.text_encoder)
    theirs = convert_ldm_unet_checkpoint(tensors | averaged | extras, unet_dict(SD1), extract_ema=True)
    assert same(read_ldm(tmp_path / "model.ckpt", ema=True).unet, theirs)


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
def test_a_vae_of_its_own_is_read(tmp_path, prefix):
    model = make(SD1, SMALL_VAE)
    write_ldm(tmp_path / "model.safetensors", LDMCheckpoint(vae_config=SMALL_VAE, vae=model.vae))
    tensors = {
        prefix + name.removeprefix("first_stage_model."): tensor
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    torch.save({"state_dict": tensors | {"loss.logvar": torch.zeros(())}}, tmp_path / "vae.ckpt")
    config, vae = read_ldm_vae(tmp_path / "vae.ckpt")
    assert config == SMALL_VAE and same(vae, model.vae)


def test_the_last_layer_of_open_clip_is_left_out(tmp_path):
    """SD 2.x reads ViT-H's last layer but one; its files hold the 24th too, and what compares with images."""
    model = make(SD2, SMALL_VAE, act="gelu", layers=23)
    path = tmp_path / "model.safetensors"
    write_ldm(path, model)
    tensors = load_file(path)
    last = {name: t for name, t in tensors.items() if ".resblocks.22." in name}
    tensors |= {name.replace(".22.", ".23."): tensor + 1 for name, tensor in last.items()}
    tensors |= {"cond_stage_model.model.logit_scale": torch.ones(())}
    tensors |= {"cond_stage_model.model.text_projection": torch.ones(64, 64)}
    save_file(tensors, path)
    ours = read_ldm(path)
    assert same(ours.text_encoder, model.text_encoder)
    assert ours.text_config["num_hidden_layers"] == 23


@pytest.mark.parametrize("factor", [0.5, 0.13])
def test_a_vae_of_another_scale_gives_the_same_images_with_the_scale_of_the_layout(tmp_path, factor):
    config = VAEConfig(block_out_channels=(32, 32), layers_per_block=1, scaling_factor=factor)
    vae = AutoencoderKL.from_config(vae_dict(config))
    write_ldm(tmp_path / "model.safetensors", LDMCheckpoint(vae_config=config, vae=vae.state_dict()))
    read, tensors = read_ldm_vae(tmp_path / "model.safetensors")
    assert read.scaling_factor == 0.18215
    rescaled = AutoencoderKL.from_config(vae_dict(read))
    rescaled.load_state_dict(tensors)
    images, latents = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        ours, theirs = vae.encode(images).latent_dist, rescaled.encode(images).latent_dist
        torch.testing.assert_close(theirs.mean * 0.18215, ours.mean * factor, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(theirs.std * 0.18215, ours.std * factor, rtol=1e-4, atol=1e-5)
        images = vae.decode(latents / factor).sample
        torch.testing.assert_close(rescaled.decode(latents / 0.18215).sample, images, rtol=1e-4, atol=1e-5)


def test_what_shapes_do_not_show_is_kept_in_the_metadata(tmp_path):
    config = UNetConfig(block_out_channels=(32, 64), attention_levels=(False, True), num_attention_heads=(2, 4),
                        norm_num_groups=16, context_dim=64)  # fmt: skip
    path = tmp_path / "model.safetensors"
    write_ldm(path, make(config, SMALL_VAE, prediction_type="v_prediction", zero_terminal_snr=True))
    read = read_ldm(path)
    assert read.unet_config == config
    assert (read.prediction_type, read.zero_terminal_snr) == ("v_prediction", True)
    anonymous(path)
    read = read_ldm(path)
    assert read.unet_config.num_attention_heads == 8  # SD 1.x, for want of anything better
    assert (read.prediction_type, read.zero_terminal_snr) == ("v_prediction", True)
    assert read_ldm(path, prediction_type="epsilon").prediction_type == "epsilon"


def test_v_prediction_of_sd2_is_guessed(tmp_path):
    config = UNetConfig(block_out_channels=(64, 64, 64, 64), context_dim=1024, use_linear_projection=True,
                        num_attention_heads=1)  # fmt: skip
    unet = UNet2DConditionModel.from_config(unet_dict(config)).state_dict()
    bias = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
    for spread, step, expected in [(0.03, None, "epsilon"), (0.2, None, "v_prediction"), (0.2, 875000, "epsilon")]:
        unet[bias] = torch.linspace(-2, 2, 64) * spread
        write_ldm(tmp_path / "model.safetensors", LDMCheckpoint(config, unet))
        torch.save(
            {"state_dict": load_file(tmp_path / "model.safetensors"), "global_step": step}, tmp_path / "model.ckpt"
        )
        assert read_ldm(tmp_path / "model.ckpt").prediction_type == expected


def test_foreign_checkpoints_are_refused_in_one_sentence(tmp_path):
    path = tmp_path / "model.safetensors"
    write_ldm(path, make(SD1, SMALL_VAE))
    good = load_file(path)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    cases = {
        "SDXL": good | {"model.diffusion_model.label_emb.0.0.weight": torch.ones(2, 2)},
        "inpainting U-Net with 9": good | {first: torch.ones(32, 9, 3, 3)},
        "not a Stable Diffusion checkpoint": {"lora_unet_mid_block.alpha": torch.ones(1)},
        "lacks 'out.2.weight'": {n: t for n, t in good.items() if not n.endswith("model.out.2.weight")},
        "unequal": {n: t for n, t in good.items() if ".input_blocks.2.1." not in n},
        "VQ": good | {"first_stage_model.quant_conv.weight": torch.ones(4, 4, 1, 1)},
    }
    for words, tensors in cases.items():
        save_file(tensors, path)
        with pytest.raises(ValueError, match=words) as error:
            read_ldm(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    save_file({"encoder.mid_block.attentions.0.to_q.weight": torch.ones(2, 2)}, path)
    with pytest.raises(ValueError, match="pass its folder"):
        read_ldm_vae(path)
    save_file(good, path, metadata={"ldm_checkpoint": "{"})
    with pytest.raises(ValueError, match="damaged metadata"):
        read_ldm(path)
    save_file(good, path, metadata={"ldm_checkpoint": json.dumps({"unet": {"colour": 1}})})
    with pytest.raises(ValueError, match="colour"):
        read_ldm(path)


def test_layouts_are_told_apart(tmp_path):
    model = make(SD1, SMALL_VAE)
    assert not is_ldm(model.unet) and not is_ldm(model.vae)
    write_ldm(tmp_path / "model.safetensors", model)
    assert is_ldm(read_checkpoint(tmp_path / "model.safetensors")[0])
