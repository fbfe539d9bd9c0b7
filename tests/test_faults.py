"""Every line of the objective is held by a test: faults are put into a copy of the code, one at a time, and found.

Each fault is one replacement in one file, and the test that must fail because of it. Without a fault all these tests
pass, which is what the rest of the suite shows. Takes some minutes: python -m pytest tests/test_faults.py -m long
"""

import faulthandler
import multiprocessing
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.children import fork, redirect, use_code_in
from tests.conftest import ROOT


@dataclass(frozen=True)
class Fault:
    """`old` becomes `new` in `file`; then `test` fails."""

    name: str
    file: str
    old: str
    new: str
    test: str


UNET, VAE, CLIP = "train_stable_diffusion.py", "train_vae.py", "train_clip.py"
REPORTER, FOLDER, REPRODUCIBLE = "training/reporter.py", "training/run_folder.py", "training/reproducible.py"
STEP = "test_training.py::test_a_step_weighs_by_min_snr_and_clips_as_its_options_say"
BATCH = "test_training.py::test_a_batch_has_mirrors_dropped_captions_posterior_noise_scale_and_all_timesteps"
JUDGED = "test_training.py::test_a_run_judges_samples_and_saves_the_average_and_sets_the_rate[0.9]"
COPIES = "test_evaluation.py::test_planted_copies_are_counted"
KILLED, STOPPED = "test_interruptions.py::test_killed_and_resumed", "test_interruptions.py::test_stopped_and_resumed"
DAMAGED = "test_run_folder.py::test_a_damaged_newest_checkpoint_is_said_and_the_one_before_is_used"

FAULTS = [
    # The batch
    Fault("no scaling factor", UNET, "model.vae.scale_latents(posterior.sample(noise=spread))", "posterior.sample(noise=spread)", BATCH),
    Fault("no posterior noise", UNET, "posterior.sample(noise=spread)", "posterior.mode()", BATCH),
    Fault("mirrors unasked", UNET, " < 0.5) & options.mirror", " < 0.5)", BATCH),
    Fault("mirror ignored", UNET, "mirrored[mine], dropped[mine]", "mirrored[mine] & False, dropped[mine]", BATCH),
    Fault("caption dropout off", UNET, "< options.caption_dropout", "< 0", BATCH),
    Fault("half of the timesteps", "noise_schedule.py", "(evenly * T).long()", "(evenly * T / 2).long()", BATCH),
    Fault("the same noise in every step", UNET, 'options.seed, "step", step)', 'options.seed, "step", 0)', BATCH),
    Fault("the same noise from every seed", UNET, 'options.seed, "step", step)', '0, "step", step)', BATCH),
    Fault("noise offset ignored", UNET, "noise + options.noise_offset * shift", "noise", BATCH),
    Fault("processes see the same slice", UNET, "slice(processes.rank * N // processes.count,", "slice(0 * N // processes.count,", "test_training.py::test_processes_take_slices_of_one_batch"),
    Fault("images drawn with replacement", REPRODUCIBLE, "positions[epochs == e] % count", "positions[epochs == e] // 2 % count", "test_training.py::test_every_image_once_an_epoch"),
    Fault("held-out images trained on", "training/captioned_latents.py", "return order[held_out:], order[:held_out]", "return order, order[:held_out]", "test_training.py::test_split_is_fixed_and_complete"),
    # The loss
    Fault("min-SNR unused by the loss", UNET, "schedule.loss_weight(batch.t, gamma) * error", "error", "test_training.py::test_loss_is_the_weighted_error"),
    Fault("min-SNR not passed on", UNET, "options.min_snr_gamma or None", "None", STEP),
    Fault("the network sees clean latents", UNET, "prediction = unet(x_t,", "prediction = unet(batch.latents,", "test_training.py::test_the_network_is_shown_the_noisy_latents_and_the_timestep_and_the_words"),
    Fault("autocast off", UNET, "precision != torch.float32, cache_enabled", "False, cache_enabled", "test_training.py::test_a_step_computes_in_the_precision_asked_for"),
    Fault("parts of a batch not averaged", UNET, ".mean() / parts", ".mean()", "test_training.py::test_a_step_adds_up_its_parts_to_the_gradient_of_the_mean"),
    Fault("only the last part learned from", UNET, "total += loss.detach()", "total += loss.detach(); i < parts - 1 and optimizer.zero_grad()", "test_training.py::test_a_step_adds_up_its_parts_to_the_gradient_of_the_mean"),
    Fault("validation at one timestep", "evaluation/timestep_loss.py", "((place + 0.5) / count", "((place * 0 + 0.5) / count", "test_training.py::test_validation_is_spread_over_the_timesteps_and_over_the_images"),
    Fault("tenths in the wrong order", UNET, "for k in sorted(merged)", "for k in sorted(merged)[::-1]", "test_training.py::test_each_tenth_of_the_timesteps_is_logged_and_plotted"),
    Fault("validation weighted", UNET, "Batch(latents, noise, t, context), None)", "Batch(latents, noise, t, context), 5.0)", "test_training.py::test_validation_is_spread_over_the_timesteps_and_over_the_images"),
    Fault("validation on unscaled latents", UNET, "model.vae.scale_latents(DiagonalGaussian.from_moments(moments).mode())", "DiagonalGaussian.from_moments(moments).mode()", "test_training.py::test_validation_is_spread_over_the_timesteps_and_over_the_images"),
    Fault("captions dropped in validation", UNET, "drop_caption=never)", "drop_caption=~never)", "test_training.py::test_validation_is_spread_over_the_timesteps_and_over_the_images"),
    Fault("a LoRA in a disk's own folder has no name", "published/lora_files.py", ' or "lora"', "", "test_lora.py::test_a_lora_is_called_by_what_says_most"),
    Fault("what half precision loses is written in it", "published/lora_files.py", "lower if rounded else exact", "lower if lower.isfinite().all() else exact", "test_lora.py::test_what_half_precision_cannot_hold_is_written_in_float32"),
    Fault("a part of a LoRA stays", "stable_diffusion_model.py", "            self.unload_lora(name)\n", "", "test_lora.py::test_a_lora_whose_loading_was_interrupted_leaves_nothing"),
    Fault("turquoise monsters judged by the others' images", "evaluation/obedience.py", "colours(images[count:],", "colours(images[:count],", "test_evaluation.py::test_turquoise_monsters_are_unseen_ones_and_judged_by_their_own_images"),
    Fault("turquoise monsters that were trained on", "evaluation/obedience.py", "monsters.TURQUOISE + FIRST_UNSEEN)", "monsters.TURQUOISE)", "test_evaluation.py::test_turquoise_monsters_are_unseen_ones_and_judged_by_their_own_images"),
    Fault("a stop is not looked for while it validates", UNET, "reporter.check_stop(together=True)", "pass", STOPPED + "[23-validation-15]"),
    Fault("validated on training images", UNET, "validation_losses(self.model.unet, self.data, self.held_out,", "validation_losses(self.model.unet, self.data, self.chosen,", JUDGED),
    # The update
    Fault("learning rate never set", UNET, 'group["lr"] = rate', "pass", JUDGED),
    Fault("no warm-up", REPRODUCIBLE, "return peak * (step + 1) / warmup", "return peak", "test_training.py::test_learning_rate_shape"),
    Fault("no clipping", REPRODUCIBLE, "clip_grad_norm_(parameters, max_norm or math.inf)", "clip_grad_norm_(parameters, math.inf)", "test_training.py::test_gradients_are_clipped_to_the_norm_asked_for_and_0_switches_it_off"),
    Fault("clipping not passed on", UNET, "clip_and_step(optimizer, options.gradient_clip)", "clip_and_step(optimizer, 0.0)", STEP),
    Fault("steps of NaN taken", REPRODUCIBLE, "optimizer.found_inf, optimizer.grad_scale = (~norm.isfinite()).float(), None", "pass", "test_training.py::test_a_gradient_that_is_not_finite_changes_nothing"),
    Fault("norms and biases decay", REPRODUCIBLE, '"weight_decay": 0.0}', '"weight_decay": weight_decay}', "test_training.py::test_gains_and_biases_do_not_decay"),
    Fault("EMA with its weights swapped", REPRODUCIBLE, "_foreach_lerp_(averages, current, 1 - decay)", "_foreach_lerp_(averages, current, decay)", "test_training.py::test_the_average_moves_by_one_minus_its_decay"),
    Fault("EMA on another device with its weights swapped", REPRODUCIBLE, "average.lerp_(parameter.to(average.device), 1 - decay)", "average.lerp_(parameter.to(average.device), decay)", "test_training.py::test_an_average_on_another_device_moves_as_far"),
    Fault("EMA never updated", UNET, "self.ema.update(self.unet, step)", "pass", KILLED + "[average-4]"),
    Fault("EMA remembers its start", REPRODUCIBLE, "min(self.decay, (1 + step) / (10 + step))", "self.decay", "test_training.py::test_the_average_moves_by_one_minus_its_decay"),
    Fault("another decay of the average", UNET, "EMA(self.unet, options.ema_decay, average_on)", "EMA(self.unet, 0.99, average_on)", JUDGED),
    Fault("weight decay not passed on", "training/optimizers.py", "AdamW(decay_groups(network, weight_decay)", "AdamW(decay_groups(network, 0.01)", JUDGED),
    # What is judged and saved
    Fault("raw weights saved, validated and previewed", UNET, "model.unet = self.ema.module if self.ema else self.unet", "model.unet = self.unet", JUDGED),
    Fault("raw weights validated", UNET, "validation_losses(self.model.unet,", "validation_losses(self.unet,", JUDGED),
    Fault("the prompt alone in the guidance batch", "guidance.py", "torch.cat([empty, context])), context", "torch.cat([context, context])), context", "test_sampling.py::test_a_negative_prompt_counts"),
    Fault("keys of the wrong text", "stable_diffusion_model.py", "prepared(context))", "prepared(contexts[0][0]))", "test_sampling.py::test_the_text_is_projected_once_and_not_in_every_step"),
    Fault("the text projected in every step", "stable_diffusion_model.py", "functools.cache(self.unet.keys_and_values)", "self.unet.keys_and_values", "test_sampling.py::test_the_text_is_projected_once_and_not_in_every_step"),
    Fault("raw weights previewed", UNET, "return self.model.sample(", "self.model.unet = self.unet; return self.model.sample(", JUDGED),
    Fault("raw weights saved", UNET, "lambda path: low_rank.write(", "lambda path: setattr(self.model, 'unet', self.unet) or low_rank.write(", JUDGED),
    Fault("every checkpoint called the best", REPORTER, "is_best = score < self.best", "is_best = True", "test_training.py::test_the_best_model_is_the_one_with_the_lowest_validation_loss"),
    # What is reported of copies
    Fault("a training image is its own nearest", "evaluate_stable_diffusion.py", "but=torch.arange(len(known))", "but=None", COPIES + "[True]"),
    Fault("half of the samples called copies", "evaluation/copying.py", "v.quantile(0.01)", "v.quantile(0.9)", COPIES + "[False]"),
    Fault("mirrored copies not found", "evaluation/copying.py", "torch.cat([training, training.flip(-1)])", "torch.cat([training, training])", COPIES + "[False]"),
    # Attention
    Fault("attention not scaled where it is spelled out", "diffusion_model.py", "(q * q.shape[-1] ** -0.5) @ k.mT", "q @ k.mT", "test_unet.py::test_attention_and_its_gradients_are_those_of_pytorch[dtype1-77]"),
    Fault("attention spelled out where nothing is trained", "diffusion_model.py", "if q.requires_grad and q.device", "if q.device", "test_unet.py::test_of_few_queries_only_training_in_bfloat16_on_a_cpu_leaves_pytorchs_kernel"),
    # Memory layout
    Fault("CPUs train channels-last", "diffusion_model.py", 'channels_last = torch.device(device).type == "cuda"', 'channels_last = torch.device(device).type != "cuda"', "test_unet.py::test_on_a_cpu_it_is_laid_out_contiguous"),
    Fault("VAE contiguous on CPUs", "vae_model.py", 'if x.device.type == "cpu" else x', 'if x.device.type == "cuda" else x', "test_vae.py::test_feature_maps_are_channels_last_on_a_cpu_and_weights_and_outputs_as_files_want_them"),
    Fault("moments stay as they lay", REPRODUCIBLE, "torch.empty_like(parameter, dtype=value.dtype).copy_(value)", "value", "test_optimizers.py::test_a_run_goes_on_in_another_memory_layout[adamw]"),
    # Resuming
    Fault("metrics not forgotten on resume", FOLDER, 'if int(row["step"]) <= step]', "]", KILLED + "[row-5]"),
    Fault("losses of the open interval forgotten", REPORTER, 'state.get("recent", [])', "[]", KILLED + "[checkpoint-2]"),
    Fault("optimizer not resumed", UNET, 'load_optimizer(self.optimizer, state["optimizer"])', "pass", KILLED + "[step-6]"),
    Fault("average not resumed", UNET, 'state.get("ema", state["unet"])', 'state["unet"]', KILLED + "[step-6]"),
    Fault("what a stop left undone is forgotten", REPORTER, 'set(state.get("undone", []))', "set()", STOPPED + "[5-step-6]"),
    Fault("a fixed option may change", "training/options.py", 'if f.metadata.get("fixed")]', 'if f.metadata.get("fixed") is None]', "test_training.py::test_resuming_checks_everything_before_it_writes_anything"),
    # Saved means saved
    Fault("a stop is not heard", REPORTER, "self.stopping = self.processes.any(self.stop.asked)", "self.stopping = False", STOPPED + "[4-step-3]"),
    Fault("a stop saves nothing", REPORTER, '{"checkpoint"} if is_last or self.stopping else set()', '{"checkpoint"} if is_last else set()', STOPPED + "[3-step-1]"),
    Fault("checksums not looked at", FOLDER, "(damaged := archive.testzip()) is not None", "False", DAMAGED + "[flipped]"),
    Fault("written in place", FOLDER, 'path.with_name(f".{path.name}.tmp"), path', "path, path", KILLED + "[checkpoint-2]"),
    Fault("not flushed before the rename", FOLDER, "            _flush(file)\n", "            pass\n", "test_run_folder.py::test_content_is_on_the_disk_before_it_takes_its_name"),
    Fault("NaN saved", FOLDER, "if not all_finite([t for", "if False and all_finite([t for", "test_run_folder.py::test_weights_that_are_not_finite_are_never_written[nan]"),
    Fault("all checkpoints kept", FOLDER, "for old in checkpoints_in(self.path)[keep:]:", "for old in []:", "test_run_folder.py::test_the_last_few_and_the_best_are_kept"),
    Fault("a model overwritten unasked", FOLDER, "if present and not resume and not overwrite:", "if False:", "test_run_folder.py::test_what_a_run_left_is_not_overwritten_unasked"),
    Fault("no lock", FOLDER, "            self._take_lock()\n", "            pass\n", "test_run_folder.py::test_two_runs_on_one_folder_the_second_refuses"),
    Fault("a skipped step keeps checkpoints away", FOLDER, 'if name != "recent" for t', "for t", "test_training.py::test_a_skipped_step_keeps_no_checkpoint_from_being_written"),
    Fault("damaged later checkpoints outlive good ones", FOLDER, "if p.name > path.name]:", "if False]:", "test_run_folder.py::test_a_run_that_went_back_behind_a_damaged_checkpoint_keeps_what_it_writes"),
    Fault("another data set resumed", REPORTER, 'if state and state.get("data", data) != data:', "if False:", "test_training.py::test_a_changed_data_set_is_not_resumed"),
    # Processes
    Fault("gradients never synchronised", UNET, "contextlib.nullcontext() if i == parts - 1 else without_synchronisation(unet)", "without_synchronisation(unet)", "test_processes.py::test_two_processes_train_what_one_does_in_two_halves"),
    Fault("a stop is not told to the others", REPORTER, "self.stopping = self.processes.any(self.stop.asked)", "self.stopping = self.stop.asked", "test_processes.py::test_a_signal_on_one_process_stops_all_after_the_same_step[step-moments1-3]"),
    # The VAE
    Fault("KL weight ignored", VAE, "options.kl_weight * kl", "1e-6 * kl", "test_train_vae.py::test_the_loss_adds_its_terms_with_their_weights"),
    Fault("the generator never adversarial", VAE, "loss = loss + options.discriminator_weight * weight * fooled", "pass", "test_train_vae.py::test_the_discriminator_joins_in_when_it_is_told_to"),
    Fault("the generator pleases the wrong side", VAE, "fooled = -self.discriminator", "fooled = self.discriminator", "test_train_vae.py::test_the_decoder_learns_to_look_real"),
    Fault("the discriminator never trained", VAE, "clip_and_step(self.critic, options.gradient_clip)", "pass", "test_train_vae.py::test_the_discriminator_joins_in_when_it_is_told_to"),
    Fault("the discriminator learns to please", VAE, "self.critic.zero_grad(set_to_none=True)", "pass", "test_train_vae.py::test_the_discriminator_learns_from_its_own_loss_alone"),
    Fault("the VAE's raw weights saved", VAE, "standardised(self.ema,", "standardised(self.vae,", "test_train_vae.py::test_stopped_run_resumes_with_the_same_bits"),
    Fault("latents not standardised", VAE, "copied.standardise_latents(", "_ = (", "test_train_vae.py::test_latents_are_standardised_and_reconstructions_stay"),
    Fault("the mean left in", "vae_model.py", "offset + back[:, :, 0, 0] @ mean", "offset", "test_train_vae.py::test_latents_are_standardised_and_reconstructions_stay"),
    Fault("the VAE's learning rate never set", VAE, 'self.optimizer.param_groups[0]["lr"] = rate', "pass", "test_train_vae.py::test_rates_are_set_and_the_best_is_the_one_with_the_highest_psnr"),
    Fault("the worst VAE called the best", VAE, 'score = -scores["psnr"]', 'score = scores["psnr"]', "test_train_vae.py::test_rates_are_set_and_the_best_is_the_one_with_the_highest_psnr"),
    Fault("the VAE's raw weights measured", VAE, "measure(self.ema, images)", "measure(self.vae, images)", "test_train_vae.py::test_rates_are_set_and_the_best_is_the_one_with_the_highest_psnr"),
    Fault("the same posterior noise in every step", VAE, "options.seed * 1_000_003 + step)", "options.seed * 1_000_003)", "test_train_vae.py::test_each_step_draws_its_own_posterior_noise"),
    # The CLIP
    Fault("CLIP's learning rate never set", CLIP, 'group["lr"] = rate', "pass", "test_train_clip.py::test_rates_mirror_held_out_images_and_the_judged_model"),
    Fault("CLIP's raw weights judged", CLIP, "retrieval(self.ema.module,", "retrieval(self.model,", "test_train_clip.py::test_rates_mirror_held_out_images_and_the_judged_model"),
    Fault("the worst CLIP called the best", CLIP, "score = -scores[SCORES[0]]", "score = scores[SCORES[0]]", "test_train_clip.py::test_rates_mirror_held_out_images_and_the_judged_model"),
    Fault("CLIP trained on held-out images", CLIP, "images[order[n:]], [captions[i] for i in order[n:]]", "images[order], [captions[i] for i in order]", "test_train_clip.py::test_rates_mirror_held_out_images_and_the_judged_model"),
    Fault("CLIP mirrors unasked", CLIP, "augment(images, options.mirror,", "augment(images, True,", "test_train_clip.py::test_rates_mirror_held_out_images_and_the_judged_model"),
    Fault("CLIP's raw weights saved", CLIP, "averaged = copy.deepcopy(self.ema.module)", "averaged = copy.deepcopy(self.model)", "test_train_clip.py::test_stopped_run_ends_with_the_same_bits"),
    Fault("one half of CLIP's loss", CLIP, "F.cross_entropy(logits.T, own)", "F.cross_entropy(logits, own)", "test_train_clip.py::test_loss_is_transformers_own"),
    Fault("the temperature unbounded", CLIP, "model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)", "pass", "test_train_clip.py::test_the_temperature_stays_within_the_papers_bound"),
    # The evaluation
    Fault("`evaluate` always obedient", "evaluation/obedience.py", "a and b == c for a, b, c in", "True for a, b, c in", "test_evaluation.py::test_colours_counts_what_was_asked_for"),
    Fault("KID of the real images with themselves", "evaluation/statistics.py", "- 2 * mean(xy, i, j)", "- 2 * mean(xx, i, j)", "test_evaluation.py::test_kid_is_0_for_one_distribution_and_not_for_two"),
    Fault("coverage counts samples", "evaluation/statistics.py", "real_radius[:, None]).any(dim=1)", "real_radius[:, None]).any(dim=0)", "test_evaluation.py::test_precision_recall_and_coverage_know_what_is_missing"),
    Fault("distances not calibrated", "evaluation/copying.py", "distance / crowd.clamp(min=1e-12)", "distance", "test_evaluation.py::test_a_pale_image_is_near_to_many_and_no_copy"),
    Fault("wrong articles give the wrong captions away", "evaluation/attributes.py", "_with_articles(as_named(phrase).sub(other, caption, 1))", "as_named(phrase).sub(other, caption, 1)", "test_evaluation.py::test_variants_exchange_one_phrase_for_each_other_value"),
    Fault("one caption for all prediction errors", "evaluation/timestep_loss.py", "context[indices])", "context[indices * 0])", "test_evaluation.py::test_prediction_errors_are_those_of_the_steps_loss_and_repeat_themselves"),
    Fault("attention recorded for good", "evaluation/attention.py", "            hook.remove()", "            pass", "test_attention.py::test_recording_changes_no_bit_and_ends_with_the_block"),
    Fault("attention over the pixels, not the words", "evaluation/attention.py", "q.shape[-1] ** -0.5, dim=-1)", "q.shape[-1] ** -0.5, dim=-2)", "test_attention.py::test_the_weights_are_those_that_made_the_output"),
    Fault("attention not against the box's area", "evaluation/attention.py", " / inside.float().mean()", "", "test_attention.py::test_looking_is_measured_against_the_area_of_the_box"),
    Fault("the other words are the same words", "evaluation/attention.py", "for other in words if other != part", "for other in words", "test_attention.py::test_words_that_look_at_their_parts_score_high"),
    Fault("attention to a drawing without noise", "evaluation/attention.py", "model.unet(model.schedule.add_noise(latents, noise, times).to(model.dtype)", "model.unet(latents.to(model.dtype)", "test_attention.py::test_the_drawing_is_looked_at_through_its_noise"),
    Fault("the worst monster called the usual one", "evaluation/attention.py", "statistics.median(values) if values", "min(values) if values", "test_attention.py::test_scores_are_medians_over_the_monsters"),
    Fault("the tail looked for in the whole monster", "evaluation/attention.py", '(TAIL.get(monster.tail, ()), "tail")', '(TAIL.get(monster.tail, ()), "body")', "test_attention.py::test_parts_are_named_as_in_the_caption_and_lie_where_they_are_drawn"),
    Fault("attributes of the samples called those of real images", "evaluate_stable_diffusion.py", '"real_images": real,', '"real_images": made,', "test_evaluation.py::test_each_figure_is_of_the_images_it_names"),
    Fault("R-precision of the samples called that of real images", "evaluation/obedience.py", "self.r_precision(real, captions)", "self.r_precision(images, captions)", "test_evaluation.py::test_the_controls_are_the_real_images_and_other_captions"),
    Fault("the U-Net not told the timestep in the prediction error", "evaluation/timestep_loss.py", "model.unet(x_t.to(model.dtype), t, context", "model.unet(x_t.to(model.dtype), t * 0, context", "test_evaluation.py::test_the_unet_is_shown_noisy_latents_their_timestep_and_their_caption"),
    Fault("real images and samples exchanged", "evaluate_stable_diffusion.py", "for images in (real, made)]", "for images in (made, real)]", "test_report.py::test_quality_is_of_the_samples_and_noise_is_its_control"),
    Fault("images of another model reused", "evaluate_stable_diffusion.py", "fingerprint(model.unet, model.text_encoder.model, model.vae)", '"0"', "test_report.py::test_images_of_other_weights_and_broken_ones_are_made_anew"),
    Fault("pairs (i, i) counted by KID", "evaluation/statistics.py", "[i[:, None] != j[None]].mean()", ".mean()", "test_evaluation.py::test_kid_is_0_for_one_distribution_and_not_for_two"),
    Fault("others' images overwritten by an evaluation", "evaluate_stable_diffusion.py", "if not is_ours:", "if False:", "test_report.py::test_images_of_others_are_not_overwritten"),
    Fault("images of another schedule reused", "evaluate_stable_diffusion.py", 'f"{weights} {config}"', "weights", "test_report.py::test_images_of_another_schedule_are_made_anew"),
    Fault("the control taken from the front of the folder", "evaluate_stable_diffusion.py", "left = evenly(sorted(set(range(len(training))) - set(shown)), len(shown))", "left = sorted(set(range(len(training))) - set(shown))[: len(shown)]", "test_report.py::test_controls_are_spread_over_the_folder"),
    Fault("the same seeds in each batch of an evaluation", "evaluate_stable_diffusion.py", "range(options.seed + start, options.seed + start + len(part))", "range(options.seed, options.seed + len(part))", "test_report.py::test_seeds_count_on_from_batch_to_batch"),
    Fault("the same noise in each chunk of the prediction error", "evaluation/timestep_loss.py", "torch.randn(x0.shape, generator=generator)", "torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))", "test_evaluation.py::test_prediction_errors_are_those_of_the_steps_loss_and_repeat_themselves"),
    Fault("a tenth's interval made for all images", "evaluation/timestep_loss.py", "int((counts[:, i] > 0).sum())", "images", "test_evaluation.py::test_a_tenths_interval_is_that_of_the_images_it_has"),
    # Muon
    Fault("Muon forgets its momentum", "training/optimizers.py", "torch.stack(momenta).lerp_(gradient, (1 - MOMENTUM) * go)", "gradient.clone()", "test_optimizers.py::test_matrices_are_stepped_as_by_pytorchs_muon"),
    Fault("Muon takes steps of NaN", "training/optimizers.py", "go = 1.0 if skip is None else 1.0 - skip", "go = 1.0", "test_optimizers.py::test_a_gradient_that_is_not_finite_changes_nothing[muon]"),
    Fault("steps of tall matrices too small", "training/optimizers.py", "max(ahead.shape[1:]) ** 0.5", "ahead.shape[2] ** 0.5", "test_optimizers.py::test_matrices_are_stepped_as_by_pytorchs_muon"),
    # The cache
    Fault("rows of another encoder taken", "training/encoded_cache.py", ", zlib.crc32(self.folder.name.encode()))", ")", "test_bad_input.py::test_rows_of_another_encoder_do_not_fit"),
    # The comparison
    Fault("their gradients not clipped", "benchmarks/compare_diffusers.py", "        nn.utils.clip_grad_norm_(parameters, 1.0)\n", "", "test_benchmarks.py::test_all_sides_do_the_same_work[train-float32]"),
    Fault("memory as it is left, not its peak", "benchmarks/compare_diffusers.py", "VmHWM:", "VmRSS:", "test_benchmarks.py::test_memory_is_the_peak_and_not_what_is_left"),
    Fault("the smallest ratio called the largest", "benchmarks/compare_diffusers.py", '"least": min(ratios), "most": max(ratios)', '"least": max(ratios), "most": min(ratios)', "test_benchmarks.py::test_a_ratio_is_a_median_with_the_smallest_and_the_largest"),
    Fault("a turn timed that was not warmed up after compiling", "benchmarks/compare_diffusers.py", "once > 30 and not case.compile", "once > 30", "test_benchmarks.py::test_a_turn_alone_is_warmed_up_and_a_median"),
    Fault("what an optimizer calls is not the optimizer's", "benchmarks/compare_diffusers.py", "above = above.cpu_parent", "above = None", "test_benchmarks.py::test_the_profile_is_the_fastest_turn_by_what_operators_do_themselves[cpu]"),
    Fault("our latents not scaled", "benchmarks/contestants.py", "lambda latents: latents * 0.18215", "lambda latents: latents", "test_benchmarks.py::test_our_training_is_laid_out_and_scaled_as_the_script_does_it"),
    # Guidance
    Fault("scale 0 outside of the interval, too", "guidance.py", "torch.cat([empty, context])), context", "torch.cat([empty, context])), (empty if self.scale == 0 else context)", "test_sampling.py::test_guidance_between_two_noise_levels"),
    # LoRA
    Fault("--lora_alpha ignored", "training/low_rank.py", "options.lora_alpha or options.lora_rank", "options.lora_rank", "test_train_lora.py::test_only_the_low_rank_weights_are_trained_and_kept"),
    Fault("half of what peft learned taken for all", "published/lora_files.py", "if start.lower().startswith(CHANGE_THE_BASE):", "if False:", "test_lora.py::test_what_changed_the_base_weights_as_well_is_refused"),
    Fault("only the last of a pattern's alternatives", "published/lora_files.py", "opened[-1][1].update(at)", "pass", "test_lora.py::test_patterns_of_alpha_mean_what_they_mean_to_peft"),
    Fault("merged weights left beside a change of scale", "lora.py", "            layer.changes[name].scale = scale\n    if was_merged:\n        merge(network)", "            layer.changes[name].scale = scale", "test_lora.py::test_merged_or_beside_it_is_the_same"),
    Fault("a change added beside merged weights", "lora.py", '    unmerge(network)\n    made = [add_to', '    made = [add_to', "test_lora.py::test_several_add_up"),
    Fault("loaded changes in another precision", "published/lora_files.py", ".to(layer.weight.dtype).requires_grad_(False)", ".requires_grad_(False)", "test_lora.py::test_what_is_loaded_has_the_models_precision_and_is_not_trained"),
    Fault("half of a LoRA loaded", "stable_diffusion_model.py", "        pairs = [pair for kind, net in self._networks().items() for pair in find_layers(net, changes[kind], kind, file)]\n", "        for kind, net in self._networks().items():\n            attach(find_layers(net, changes[kind], kind, file), name)\n        pairs = []\n", "test_lora.py::test_a_lora_of_which_one_half_fits_changes_nothing"),
    Fault("an unloaded LoRA still counts", "lora.py", "            del layer.changes[name]\n", "            pass\n", "test_lora.py::test_a_lora_is_unloaded"),
    Fault("patterns of alpha ignored", "published/lora_files.py", "            alpha = other\n", "            pass\n", "test_lora.py::test_alpha_by_diffusers_metadata"),
    Fault("peft's own options ignored", "published/lora_files.py", 'path.stem == "adapter_model" and', "False and", "test_lora.py::test_a_folder_of_peft_gives_its_image"),
    Fault("one layer changed twice", "published/lora_files.py", "layers[name] is other for other", "False for other", "test_lora.py::test_bad_files_are_one_sentence_and_change_nothing"),
    Fault("a LoRA that begins elsewhere", "lora.py", "nn.init.zeros_(self.up.weight)", "nn.init.ones_(self.up.weight)", "test_lora.py::test_it_begins_as_the_model_that_it_changes[all]"),
    Fault("alpha forgotten beside the weight", "lora.py", "return self.scale * self.alpha / self.rank * self.up(self.down(x))", "return self.scale * self.up(self.down(x))", "test_lora.py::test_equation_3"),
    Fault("alpha forgotten in the weight", "lora.py", "return self.scale * self.alpha / self.rank * (up @", "return self.scale * (up @", "test_lora.py::test_merged_or_beside_it_is_the_same"),
    Fault("merged and beside it, too", "lora.py", "for change in () if self.unmerged else self.changes.values():", "for change in self.changes.values():", "test_lora.py::test_merged_or_beside_it_is_the_same"),
    Fault("the weight not given back", "lora.py", "layer.weight, layer.unmerged = weight, ()", "layer.unmerged = ()", "test_lora.py::test_merged_or_beside_it_is_the_same"),
    Fault("saved without its changes", "stable_diffusion_model.py", "stack.enter_context(lora.as_one_network(network))", "pass", "test_lora.py::test_a_model_with_loras"),
    Fault("alpha forgotten in the file", "published/lora_files.py", "change.up.weight.detach() * change.alpha / change.rank", "change.up.weight.detach()", "test_lora.py::test_writing_multiplies_alpha_in_and_reading_gives_it_back"),
    Fault("kohya's alpha ignored", "published/lora_files.py", "if alpha is None else float(alpha)", "if alpha is None else float(len(down))", "test_lora.py::test_every_layout_says_the_same[kohya]"),
    Fault("diffusers' alpha ignored", "published/lora_files.py", 'alpha = config.get(f"{network}.lora_alpha", rank)', "alpha = rank", "test_lora.py::test_a_file_of_theirs_gives_their_image[True]"),
    Fault("the text encoder's changes left out", "stable_diffusion_model.py", "for pair in find_layers(net, changes[kind], kind, file)]", "for pair in find_layers(net, changes[kind], kind, file) if kind == 'unet']", "test_lora.py::test_a_file_of_theirs_gives_their_image[False]"),
    Fault("the base trained as well", "training/low_rank.py", "copy=True), requires_grad=False)", "copy=True))", "test_train_lora.py::test_only_the_low_rank_weights_are_trained_and_kept"),
    Fault("a file's own numbers taken for a copy", "published/weight_files.py", "tensor.to(dtype, copy=True)", "tensor.to(dtype)", "test_weight_files.py::test_a_module_without_numbers_gets_copies_or_what_is_in_the_file"),
    Fault("a model in bfloat16 read in float32", "stable_diffusion_model.py", "load_model(folder_or_hub_id, dtype := dtype or torch.float32)", "load_model(folder_or_hub_id, torch.float32)", "test_interchange.py::test_a_model_is_read_in_the_type_that_it_is_to_have"),
    Fault("a LoRA's base left in its file", "training/low_rank.py", "p.detach().to(dtype, copy=True)", "p.detach().to(dtype)", "test_train_lora.py::test_the_base_is_never_there_in_float32"),
    Fault("encoding foretold beside what training needs", "training/memory_forecast.py", '{"encoding": trained + sum(optimizer.values()) + average}', '{"encoding": trained}', "test_finetune.py::test_the_worst_moment_is_foretold_whichever_it_is"),
    Fault("each process encodes as if it were alone", "training/captioned_latents.py", " * processes.local_count\n", "\n", "test_pokemon_dataset.py::test_no_more_is_encoded_beside_each_other_than_memory_has_room_for"),
    Fault("the base copied for the average", REPRODUCIBLE, "copy.deepcopy(module, frozen)", "copy.deepcopy(module)", "test_train_lora.py::test_the_average_shares_what_is_frozen"),
    Fault("a LoRA's overflow in float16", "published/lora_files.py", "lower if rounded else exact", "lower", "test_lora.py::test_what_half_precision_cannot_hold_is_written_in_float32"),
    # Attention in blocks
    Fault("scores of keys that are not scaled", "layers.py", "beta=0, alpha=d**-0.5", "beta=0", "test_layers.py::test_blocks_are_attention"),
    Fault("queries of a block before the last lost", "layers.py", "for i in range(0, n, queries))", "for i in range(0, n - queries + 1, queries))", "test_layers.py::test_blocks_are_attention"),
    Fault("every head attends to the first one's keys", "layers.py", "columns[head], beta", "columns[: len(row)], beta", "test_layers.py::test_blocks_are_attention"),
    Fault("all scores at once", "layers.py", "SCORES_OF // (queries * keys)", "len(q) * q.shape[1]", "test_layers.py::test_no_more_scores_than_said_are_there_at_a_time"),
    Fault("few queries at a time, however many keys", "layers.py", "max(QUERIES_OF, SCORES_OF // keys)", "max(1, SCORES_OF // keys)", "test_layers.py::test_no_more_scores_than_said_are_there_at_a_time"),
    Fault("few queries in blocks", "layers.py", "and q.shape[2] >= QUERIES_FROM", "and q.shape[2] >= 1", "test_layers.py::test_blocks_are_for_inference_in_bfloat16_on_a_cpu_that_has_it"),
    Fault("little attention in blocks", "layers.py", "        and math.prod(q.shape[1:]) * k.shape[2] >= PRODUCTS_FROM\n", "", "test_layers.py::test_blocks_are_for_inference_in_bfloat16_on_a_cpu_that_has_it"),
    Fault("blocks where PyTorch's kernel has AMX", "layers.py", " and not torch.cpu._is_amx_tile_supported()", "", "test_layers.py::test_blocks_are_for_inference_in_bfloat16_on_a_cpu_that_has_it"),
    Fault("blocks in float32", "layers.py", "q.dtype == k.dtype == v.dtype == torch.bfloat16", "q.dtype == k.dtype == v.dtype", "test_layers.py::test_blocks_are_for_inference_in_bfloat16_on_a_cpu_that_has_it"),
    Fault("the VAE's attention by PyTorch's kernel", "vae_model.py", "self.to_out[0](dot_product_attention(q, k, v)", "self.to_out[0](F.scaled_dot_product_attention(q, k, v)", "test_layers.py::test_both_networks_attend_in_blocks"),
    Fault("blocks for values of another width", "layers.py", "        and k.shape == v.shape\n", "", "test_layers.py::test_what_pytorchs_attention_takes_and_blocks_do_not_is_left_to_it"),
    Fault("traces of one size", "layers.py", "        and not torch.jit.is_tracing()\n", "", "test_layers.py::test_a_trace_holds_at_other_sizes"),
    Fault("blocks without oneDNN", "layers.py", " and torch.backends.mkldnn.enabled):", "):", "test_layers.py::test_blocks_are_for_inference_in_bfloat16_on_a_cpu_that_has_it"),
    # What is in the place of a layer, or looks at it
    Fault("pixels repeated in one direction only", "layers.py", "twice = tuple(size) == (2 * x.shape[-2], 2 * x.shape[-1])", "twice = size[1] == 2 * x.shape[-1]", "test_layers.py::test_repeated_pixels_are_written_out_where_it_does_not_pay"),
    Fault("hooks behind a convolution passed over", "layers.py", "layer._forward_hooks, layer._forward_pre_hooks, *GLOBAL_HOOKS", "layer._forward_pre_hooks, *GLOBAL_HOOKS", "test_layers.py::test_repeated_pixels_are_written_out_where_it_does_not_pay"),
    Fault("hooks of all layers passed over", "layers.py", "layer._forward_pre_hooks, *GLOBAL_HOOKS", "layer._forward_pre_hooks", "test_layers.py::test_repeated_pixels_are_written_out_where_it_does_not_pay"),
    Fault("another forward passed over", "layers.py", '{"forward", "_conv_forward"} & vars(layer)', '{"_conv_forward"} & vars(layer)', "test_layers.py::test_repeated_pixels_are_written_out_where_it_does_not_pay"),
    Fault("a compiled convolution passed over", "layers.py", "layer._compiled_call_impl is not None or ", "", "test_layers.py::test_repeated_pixels_are_written_out_where_it_does_not_pay"),
    Fault("a weight looked at twice", "layers.py", "weight = self.weight.detach()", "weight = self.weight", "test_layers.py::test_a_weight_that_another_thread_empties_meanwhile_is_computed_with_as_it_was"),
    Fault("only Conv3x3 behind an upsampling", "layers.py", "if isinstance(conv, Conv3x3):", "if True:", "test_layers.py::test_another_programs_convolution_is_used"),
    Fault("another convolution for all passed over", "layers.py", "            and nn.Conv2d._conv_forward is PYTORCHS_OWN", "            and True", "test_layers.py::test_another_programs_convolution_is_used"),
    Fault("what a hook holds overwritten", "vae_model.py", " and not is_watched(layer)", "", "test_layers.py::test_a_block_of_the_vae_overwrites_nothing_that_others_hold"),
    Fault("the input of a block overwritten", "vae_model.py", "return h.add_(x) if", "return x.add_(h) if", "test_layers.py::test_a_block_of_the_vae_overwrites_nothing_that_others_hold"),
    Fault("what another norm gives overwritten", "vae_model.py", "type(layer) in (nn.GroupNorm, Conv3x3)", "True", "test_layers.py::test_a_block_of_the_vae_overwrites_nothing_that_others_hold"),
    Fault("filters of repeated pixels added up in bfloat16", "layers.py", "_halves(weight.to(torch.promote_types(weight.dtype, torch.float32)), 2)", "_halves(weight, 2)", "test_layers.py::test_of_repeated_is_that_up_to_its_type_and_an_image_has_the_same_bits_in_any_batch"),
    Fault("large maps in bfloat16 never ordered", "sampling/packed.py", "return x.dtype == torch.float32 and self.is_large(", "return self.is_large(", "test_layers.py::test_packing_leaves_large_maps_to_it_and_weights_as_they_were"),
    # Winograd's convolutions
    Fault("a filter's value at -2 taken at 2", "layers.py", "even.sub_(g1, alpha=2)", "even.add_(g1, alpha=2)", "test_layers.py::test_it_is_the_direct_convolution"),
    Fault("the bias on the first product, which one output has", "layers.py", "(None, bias, None, None, None, None)", "(bias, None, None, None, None, None)", "test_layers.py::test_it_is_the_direct_convolution"),
    Fault("the last rows beside the map lost", "layers.py", "range(0, fours, at_once)", "range(0, h // 4, at_once)", "test_layers.py::test_it_is_the_direct_convolution"),
    Fault("the way to convolve chosen by the batch", "layers.py", "and size[0] * size[1] >= PIXELS_FROM", "and len(x) * size[0] * size[1] >= PIXELS_FROM", "test_layers.py::test_elsewhere_it_is_pytorchs_own"),
    Fault("little work by many calls", "layers.py", "self.in_channels * self.out_channels >= WORK_FROM", "self.in_channels * self.out_channels >= 0", "test_layers.py::test_little_work_is_pytorchs_own"),
    Fault("gradients lost in a large map", "layers.py", "        and not torch.is_grad_enabled()\n", "", "test_layers.py::test_elsewhere_it_is_pytorchs_own"),
    Fault("large maps in float32 under autocast", "layers.py", '        and not torch.is_autocast_enabled("cpu")\n', "", "test_layers.py::test_elsewhere_it_is_pytorchs_own"),
    Fault("large maps convolved by F(4, 3) when compiled", "layers.py", "        not torch.compiler.is_compiling()\n        and", "       ", "test_layers.py::test_compiled_it_is_pytorchs_own"),
    Fault("images that can be tiled padded with zeros", "layers.py", 'and self.padding_mode == "zeros"', "and True", "test_layers.py::test_elsewhere_it_is_pytorchs_own"),
    Fault("F(4, 3) in bfloat16", "layers.py", "if x.dtype == torch.float32 and self.is_large(", "if self.is_large(", "test_layers.py::test_elsewhere_it_is_pytorchs_own"),
    Fault("the first of two equal pixels taken for the second", "layers.py", "torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)", "torch.stack([first + middle, last], dim), torch.stack([first, middle + last], dim)", "test_layers.py::test_repeated_pixels_are_convolved_as_if_they_were_written_out"),
    Fault("a weight that was ordered and emptied behind an upsampling", "layers.py", "many and weight.numel() and", "many and", "test_layers.py::test_packing_leaves_large_maps_to_it_and_weights_as_they_were"),
    Fault("hooks of an upsampling's convolution passed over", "layers.py", "and not is_watched(self)", "", "test_layers.py::test_repeated_pixels_are_written_out_where_it_does_not_pay"),
    Fault("F(4, 3) where torch.func has no operators for it", "layers.py", "        and torch._C._functorch.maybe_current_level() is None\n", "", "test_layers.py::test_within_torch_func_it_is_pytorchs_own"),
    Fault("repeated pixels of an odd size", "layers.py", "if twice and many", "if many", "test_layers.py::test_repeated_pixels_are_written_out_where_it_does_not_pay"),
    Fault("changes lost behind an upsampling", "lora.py", "beside = not self.unmerged", "beside = self.unmerged", "test_layers.py::test_low_rank_changes_are_added_and_it_is_a_conv3x3_again_without_them"),
    Fault("weights of large maps ordered", "sampling/packed.py", "return x.dtype == torch.float32 and self.is_large(x, x.shape[-2:])", "return False", "test_layers.py::test_packing_leaves_large_maps_to_it_and_weights_as_they_were"),
    Fault("weights left in another layout", "sampling/packed.py", "plain.new_empty_strided(plain.shape, layer.strides).copy_(plain)", "plain.contiguous()", "test_packed.py::test_the_unet_is_as_it_was_afterwards_and_within_no_weight_is_held_twice"),
    Fault("weights held twice", "sampling/packed.py", "weight.new_empty(0)", "weight", "test_packed.py::test_the_unet_is_as_it_was_afterwards_and_within_no_weight_is_held_twice"),
    Fault("an error leaves weights packed", "sampling/packed.py", "        yield\n    finally:\n", "        yield\n    except ZeroDivisionError:\n        pass\n    else:\n", "test_packed.py::test_an_error_or_an_interrupt_within_loses_nothing"),
    Fault("a callback's changes lost in packed weights", "stable_diffusion_model.py", 'belong, even while it samples."""\n        unpack(self.unet)', 'belong, even while it samples."""', "test_packed.py::test_what_changes_the_model_itself_unpacks_it"),
    Fault("padding taken for zeros", "sampling/packed.py", 'layer.padding_mode == "zeros" and', "", "test_packed.py::test_layers_that_compute_otherwise_are_left_alone"),
    Fault("float32 under autocast", "sampling/packed.py", '        or torch.is_autocast_enabled("cpu")\n', "", "test_packed.py::test_shared_weights_other_dtypes_autocast_and_compiled_networks_are_left_alone"),
    Fault("empty weights saved in a callback", "sampling/packed.py", "_as_it_was(self)._save_to_state_dict(", "super()._save_to_state_dict(", "test_packed.py::test_whoever_asks_a_packed_network_gets_it_as_it_was"),
    Fault("the forecast counts the average, which is not trained", "train_stable_diffusion.py", "forecast_run(self.options, self.unet,", "forecast_run(self.options, self.model.unet,", "test_train_lora.py::test_the_forecast_counts_what_is_trained"),
    Fault("results of the last checkpoint lost by a kill", UNET, "self.write_results(state.get(\"is_best\", False))", "pass", "test_interruptions.py::test_killed_and_resumed[model-4]"),
    Fault("--lora_layers ignored", "training/low_rank.py", "lora.targets(unet, options.lora_layers)", "lora.targets(unet)", "test_train_lora.py::test_the_forecast_counts_what_is_trained"),
    Fault("the text encoder's alpha read from the U-Net's", "published/lora_files.py", 'config.get(f"{network}.lora_alpha", rank)', 'config.get("unet.lora_alpha", rank)', "test_lora.py::test_each_network_has_its_own_alpha"),
    Fault("every LoRA called lora", "published/lora_files.py", "folder.parent.name + of_a_run[folder.name] if folder.name in of_a_run else folder.name", "folder.name", "test_lora.py::test_a_lora_is_called_by_what_says_most"),
    Fault("changes beside a packed weight lost", "sampling/packed.py", "and (type(layer) not in PLAIN or merged)", "", "test_packed.py::test_layers_with_low_rank_changes_compute_as_ever"),
    Fault("another thread's layers packed under its hands", "sampling/packed.py", "            if not others:  # else one", "            if True:  # else one", "test_packed.py::test_nothing_is_packed_under_the_hands_of_another_sampling"),
    Fault("the first of two samplings unpacks for both", "sampling/packed.py", "            others.discard(this)\n            if not others:", "            others.discard(this)\n            if True:", "test_packed.py::test_the_last_of_several_samplings_unpacks"),
    Fault("a callback's changes lost in what was prepared", "stable_diffusion_model.py", "if fixed else lambda c:", "if True else lambda c:", "test_packed.py::test_a_callback_may_change_and_save_the_model_between_steps"),
    Fault("other threads compute with packed weights", "sampling/packed.py", 'getattr(THIS_THREAD, "packed", False) and not', "True and not", "test_packed.py::test_other_threads_compute_with_the_weights_as_they_were"),
    Fault("emptied weights' memory kept while others are ordered", "sampling/packed.py", "if THIS_THREAD.emptied >= GIVE_BACK_EVERY:", "if False:", "test_packed.py::test_memory_is_given_back_while_weights_are_ordered"),
    Fault("packed or not by the number of images", "stable_diffusion_model.py", "packed(self.unet, len(grid) * fixed)", "packed(self.unet, len(grid) * len(contexts) * fixed)", "test_packed.py::test_what_is_packed_depends_on_the_steps_and_not_on_the_number_of_images"),
    Fault("layers packed inside a compiled block", "sampling/packed.py", 'or hasattr(module, "_orig_mod") or of_its_own', "", "test_packed.py::test_a_network_with_compiled_parts_is_left_alone"),
    Fault("a thread goes on with packed weights", "sampling/packed.py", "THIS_THREAD.packed = before", "pass", "test_packed.py::test_who_samples_within_a_sampling_leaves_it_as_it_was"),
    Fault("weights ordered anew for each image of the command line", "sample_stable_diffusion.py", "with packed(model.unet, options.steps):", "with contextlib.nullcontext():", "test_sample_command.py::test_a_cpu_orders_the_weights_once_for_all_images"),
    Fault("compiling counted as speed", "training/reporter.py", "since torch.compile compiled what the next ones run\")\n            self._time_from_here()", "since torch.compile compiled what the next ones run\")", "test_training.py::test_what_compiling_takes_is_said_and_counts_as_no_speed"),
    Fault("--compile ignored", UNET, "torch.compile(self.unet) if options.compile", "self.unet if options.compile", "test_training.py::test_what_compiling_takes_is_said_and_counts_as_no_speed"),
    Fault("a LoRA saved in another precision", "training/low_rank.py", "write_lora(folder / FILE, model.unet, dtype=dtype)", "write_lora(folder / FILE, model.unet, dtype=torch.float16)", "test_train_lora.py::test_only_the_low_rank_weights_are_trained_and_kept"),
    Fault("the forecast trains all weights of a LoRA's base", "training/memory_forecast.py", "adapt = partial(low_rank.adapt, options=options, precision=precision) if options.lora_rank else as_it_is", "adapt = as_it_is", "test_train_lora.py::test_the_forecast_counts_what_is_trained"),
    Fault("the base of a bfloat16 run in float32", UNET, "low_rank.build_model(options, self.precision)", "low_rank.build_model(options, torch.float32)", "test_train_lora.py::test_the_frozen_matrices_are_in_the_precision_of_the_run"),
    Fault("part of a LoRA resumed", "training/low_rank.py", "if state.keys() != trained:", "if False:", "test_train_lora.py::test_a_checkpoint_of_another_lora_says_what_is_other"),
    Fault("a finetuning resumed from another base", "training/options.py", 'if getattr(options, "lora_rank", 0):', 'if hasattr(options, "lora_rank"):', "test_train_lora.py::test_only_the_base_of_a_lora_may_have_moved[finetune-False]"),
    Fault("another base taken for the same", UNET, 'if state.get("base", "") != self.base:', "if False:", "test_train_lora.py::test_another_base_is_no_base_to_resume_on"),
    Fault("the average not taken up again", UNET, 'low_rank.load_trained(self.ema.module, state.get("ema", state["unet"]), self.trained)', "pass", "test_train_lora.py::test_a_resumed_run_ends_with_the_same_bits"),
    Fault("timesteps drawn one by one", "noise_schedule.py", "torch.rand(1, generator=generator, device=device)) / n", "torch.rand(n, generator=generator, device=device)) / n", "test_noise_schedule.py::test_timesteps_are_drawn_evenly_and_equally_often"),
    Fault("the saved VAE not standardised", VAE, "vae = standardised(self.ema, self.sets.standardising_sample(), generator)", "vae = self.ema", "test_train_vae.py::test_stopped_run_resumes_with_the_same_bits"),
    Fault("the tenths' curves called by each other's names", UNET, "enumerate(self.TENTHS)}", "zip((8, 7, 6, 5, 4, 3, 2, 1, 0, 9), self.TENTHS)}", "test_training.py::test_each_tenth_of_the_timesteps_is_logged_and_plotted"),
    Fault("latents unscaled twice in the gallery", "benchmarks/what_breaks.py", 'mock.patch.object(VAE, "unscale_latents", lambda self, latents: latents)', 'mock.patch.object(VAE, "unscale_latents", lambda self, latents: 2 * latents)', "test_benchmarks.py::test_faults_do_what_they_say"),
    Fault("the gallery asks for monsters that were trained on", "benchmarks/what_breaks.py", "if ROWS[row].model else UNSEEN)", "if ROWS[row].model else UNSEEN, 0)", "test_benchmarks.py::test_the_gallery_is_sampled_with_the_fault"),
    Fault("the gallery trained without its options", "benchmarks/what_breaks.py", "[*argv, *quiet, *ROWS[row].options]", "[*argv, *quiet]", "test_benchmarks.py::test_the_gallery_is_trained_with_the_options_of_its_row[no caption dropout]"),
    Fault("the gallery's eight noises for all samples", "benchmarks/what_breaks.py", "seeds=start, progress", "seeds=0, progress", "test_benchmarks.py::test_the_gallery_is_sampled_with_the_fault"),
    Fault("pixels in a box by their corners", "evaluation/attention.py", "(torch.arange(width) + 0.5) / width, (torch.arange(height) + 0.5) / height", "torch.arange(width) / width, torch.arange(height) / height", "test_attention.py::test_a_pixel_is_in_a_box_if_its_middle_is"),
    Fault("a word's map stretched to the corners", "evaluation/attention.py", "align_corners=False", "align_corners=True", "test_attention.py::test_a_map_is_scaled_up_about_its_pixels_middles"),
    Fault("a sheet of those that name fewest parts", "evaluation/attention.py", "key=parts, reverse=True)[:6]", "key=parts)[:6]", "test_attention.py::test_the_sheet_is_of_the_six_that_name_most_parts_each_word_at_its_brightest"),
    Fault("all tenths in one colour", "training/plots.py", 'colormaps["viridis"](i / len(panel))', 'colormaps["viridis"](0.5)', "test_training.py::test_the_tenths_are_coloured_in_their_order"),
    Fault("a base in half precision known only in that", "training/low_rank.py", "fingerprint(parts.unet, dtype=torch.float32)", "fingerprint(parts.unet)", "test_train_lora.py::test_the_base_is_never_there_in_float32[stored1]"),
    Fault("a LoRA trained for another prediction than its base's", "training/low_rank.py", "check_objective(options, parts.schedule)", "pass", "test_train_lora.py::test_a_base_that_cannot_be_is_refused_in_one_sentence"),
    Fault("what another process left undone taken for done", REPORTER, "left = self.processes.any(duty in self.undone)", "left = duty in self.undone", "test_reporter.py::test_what_another_process_left_undone_is_left_undone_by_all"),
    Fault("a validation of the VAE logged twice", VAE, '["psnr"] if "validation" in state["undone"] else []', "[]", "test_train_vae.py::test_a_validation_that_was_stopped_is_left_to_the_next_run_and_logged_once"),
    Fault("a stop waits for CLIP's validation", CLIP, "self.reporter.check_stop()", "pass", "test_train_clip.py::test_a_validation_that_was_stopped_is_left_to_the_next_run_and_logged_once"),
    Fault("a large sum in half precision taken for damage", "published/weight_files.py", "tensor.sum(dtype=torch.float32)", "tensor.sum()", "test_weight_files.py::test_a_sum_beyond_what_half_precision_holds_is_no_damage"),
]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_found(fault: Fault, tmp_path: Path) -> None:
    copy = copy_of_the_code(tmp_path / "copy")
    file = copy / fault.file
    text = file.read_text(encoding="utf-8")
    assert text.count(fault.old) == 1, f"{fault.file} must hold this once: {fault.old}"
    file.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    process = fork(run_test, str(copy), f"tests/{fault.test}", str(tmp_path / "printed"))
    process.join(300)
    process.kill()  # else a test that hangs would go on beside the others
    printed = (tmp_path / "printed").read_text(encoding="utf-8", errors="replace")
    assert process.exitcode == pytest.ExitCode.TESTS_FAILED, f"no test failed:\n{printed[-3000:]}"


def copy_of_the_code(copy: Path) -> Path:
    """The code and its tests, with links to what is large."""
    copy.mkdir()
    for path in ROOT.iterdir():
        if path.suffix == ".py" or path.name == "pyproject.toml":
            shutil.copy(path, copy)
        elif path.name == "tests" or (path / "__init__.py").is_file():
            shutil.copytree(path, copy / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.name in ("vae_model.pth", "stable_diffusion_results"):
            (copy / path.name).symlink_to(path)
    return copy


def run_test(copy: str, test: str, printed: str, *more: str) -> None:
    """Called in a child: one test of the copy, or some of a file; the exit code says how it went."""
    redirect(printed)
    use_code_in(copy)
    os.chdir(copy)
    from tests import children

    children.CONTEXT = multiprocessing.get_context("fork")  # a server here would import all modules once more
    faulthandler.dump_traceback_later(280)  # says where a test hangs
    options = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=", "--rootdir", copy)
    sys.exit(pytest.main([test, *options, *more]))
