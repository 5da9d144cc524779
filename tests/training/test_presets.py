"""Each preset's code path on a small model with SD3.5's structure, what a run of it costs, and what options keep."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.optimizer import patch_optimizer_step
from safetensors.torch import load_file, save_file

from builders import small_sd35
from star import config as configuration
from star import train as training
from star.config import ConfigError
from star.presets import PRESETS, preset
from star.rewards import Scores
from star.train import Trainer
from star.training import plan as planning
from star.training.conditions import PromptEncoder
from star.training.credit import Credit
from star.training.pipeline import load_pipeline
from star.training.rollout import draw_window

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

PROMPTS = [
    "a photo of a red bench left of two green cats",
    'a sign that says "Hello World"',
    "a dog above a cow",
    "portrait of an old man with a long white beard, oil painting",
]
SD35M = [name for name in PRESETS if "sd35m" in name]


def brightness(images, prompts, metadata):
    return Scores(images.mean((1, 2, 3)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd35")
    small_sd35(PROMPTS).save_pretrained(folder / "pipeline")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


def scaled(folder, out, name, **changes):
    """A preset with a small model and few images; everything else as it is."""
    config = preset(name)
    base = {
        "model": {"path": str(folder / "pipeline"), "height": 64, "width": 64, "frozen_dtype": "bfloat16"},
        "sampling": {"prompts_per_iteration": 2, "images_per_prompt": 2, "prompts": str(folder / "prompts.txt")},
        # float16 needs a GPU. With so few images one update averages.
        "optimization": {"iterations": 1, "micro_batch": 2, "mixed_precision": "bfloat16", "ema_every": 1},
        "scoring": {"count": 0, "prompts": None, "every": 0},
        "run": {"out": str(out), "reward": "test_presets:brightness", "figures": False},
    }
    for section, values in changes.items():
        base.setdefault(section, {}).update(values)
    return configuration.update(config, base)


@pytest.mark.parametrize("name", SD35M)
def test_one_iteration_of_each_preset(folder, tmp_path, name):
    config = scaled(folder, tmp_path / "run", name)
    trainer = Trainer(config)
    metrics = trainer.step()
    # Of one update, every pass meets the policy that sampled, which is the reference too.
    moved = config.optimization.updates_per_iteration > 1
    if preset(name).loss.objective == "nft":
        assert (metrics["old_deviation"] > 0) == moved
    else:
        assert metrics["ratio_first"] == 1.0
    assert metrics["nonfinite"] == 0 and metrics["grad_norm"] > 0
    assert metrics["updates_skipped"] == 0 and metrics["weights_max"] > 1
    fast = name.endswith("fast")
    assert (metrics["kl"] > 0) == (not fast and moved)
    assert all(p.dtype == torch.float32 for p in trainer.policy.parameters.values())
    assert trainer.pipeline.text_encoder_3.dtype == torch.bfloat16 and trainer.pipeline.vae.dtype == torch.float32
    assert configuration.load(tmp_path / "run/config.yaml") == config


def test_a_run_of_a_preset_leaves_an_adapter_that_plain_diffusers_loads(folder, tmp_path):
    """The averaged one: with a decay of (1 + n) / (10 + n) two updates leave it elsewhere than the trained one."""
    precision = {"mixed_precision": "no", "learning_rate": 1e-2}
    config = scaled(
        folder, tmp_path / "run", "ocr-sd35m-fast", model={"frozen_dtype": "float32"}, optimization=precision
    )
    assert training.train(config)["iterations"] == 1

    def image(pipeline):
        return pipeline(
            PROMPTS[0], height=64, width=64, num_inference_steps=2, guidance_scale=1.0, max_sequence_length=32,
            generator=torch.Generator().manual_seed(0), output_type="pt",
        ).images  # fmt: skip

    plain = load_pipeline(str(folder / "pipeline"))
    base = image(plain)
    plain.load_lora_weights(str(tmp_path / "run/lora"))
    resumed = Trainer(dataclasses.replace(config, run=dataclasses.replace(config.run, resume=True)))
    with resumed.policy.averaged():
        averaged = image(resumed.pipeline)
    trained = image(resumed.pipeline)
    torch.testing.assert_close(image(plain), averaged, rtol=0, atol=1e-4)
    assert not torch.equal(base, averaged) and not torch.equal(trained, averaged)


def test_published_settings():
    """By hand from flow_grpo's config/grpo.py, not from our table."""
    normal, fast = preset("geneval-sd35m"), preset("pickscore-sd35m-fast")
    assert (normal.sampling.steps, normal.sampling.guidance_scale, normal.sampling.noise_level) == (10, 4.5, 0.7)
    assert normal.sampling.trained_steps == tuple(range(9)) and not normal.sampling.window
    assert (normal.loss.clip_range, normal.loss.kl_coef, normal.loss.adv_clip) == (1e-4, 0.04, 5.0)
    assert normal.loss.global_std and preset("pickscore-sd35m").loss.kl_coef == 0.01
    optimization = normal.optimization
    assert (optimization.learning_rate, optimization.weight_decay, optimization.max_grad_norm) == (3e-4, 1e-4, 1.0)
    assert (optimization.ema_decay, optimization.ema_every, optimization.updates_per_iteration) == (0.9, 8, 2)
    assert (normal.model.lora_rank, normal.model.lora_alpha, normal.model.max_sequence_length) == (32, 64, 128)
    assert (fast.sampling.sampler, fast.sampling.noise_level, fast.sampling.guidance_scale) == ("cps", 0.8, 1.0)
    assert (fast.sampling.window, fast.sampling.trained_steps) == (3, (0, 1, 2, 3, 4))
    assert (fast.sampling.prompts_per_iteration, fast.sampling.images_per_prompt) == (64, 18)
    assert (fast.loss.clip_range, fast.loss.kl_coef) == (1e-5, 0.0)
    for name in SD35M:
        for gpus in (1, 2, 4, 8, 16, 32):
            preset(name).check(gpus)


def test_the_window_is_drawn_anew_and_stays_inside():
    drawn = [draw_window((0, 1, 2, 3, 4), 3, f"0/{i}") for i in range(40)]
    assert set(drawn) == {(0, 1, 2), (1, 2, 3), (2, 3, 4)}
    assert draw_window((0, 1, 2, 3, 4), 3, "0/7") == drawn[7] and draw_window((4, 6), 0, "0/7") == (4, 6)


# --- options that keep the bits -------------------------------------------------------------------------------------


def exact(folder, out, **changes):
    config = scaled(folder, out, "geneval-sd35m", model={"frozen_dtype": "float32"}, sampling={"steps": 4,
                    "trained_steps": [0, 1]}, optimization={"mixed_precision": "no"})  # fmt: skip
    metrics = Trainer(configuration.update(config, changes)).step()
    return {name: value for name, value in metrics.items() if not name.startswith(("seconds/", "memory"))}


def test_storage_encoders_and_compilation_do_not_change_the_run(folder, tmp_path):
    expected = exact(folder, tmp_path / "a")
    options = {"sampling": {"rollout_device": "cpu"}, "model": {"offload_encoders": True}}
    assert exact(folder, tmp_path / "b", **options) == expected
    compiled = exact(folder, tmp_path / "c", model={"compile": "aot_eager"})
    assert compiled["ratio_first"] == 1.0
    for name, value in expected.items():
        assert compiled[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_embeddings_do_not_depend_on_the_cache_which_is_bounded(folder):
    pipeline = load_pipeline(str(folder / "pipeline"))
    encode = PromptEncoder(pipeline, 32, cached=3, offload=False)
    calls = []
    original = encode.encode_one
    encode.encode_one = lambda prompt: calls.append(prompt) or original(prompt)
    first = encode(PROMPTS[:2], 4.5)
    again = encode(PROMPTS[:2], 4.5)
    assert calls == [*PROMPTS[:2], ""] and torch.equal(first.text.embeds, again.text.embeds)
    encode(PROMPTS[2:], 1.0)
    assert len(encode.cache) == 3 and PROMPTS[0] not in encode.cache and "" in encode.cache
    fresh = encode(PROMPTS[:2], 4.5)
    assert torch.equal(fresh.text.embeds, first.text.embeds)
    assert torch.equal(fresh.negative.pooled, first.negative.pooled)
    plain = PromptEncoder(pipeline, 32, cached=0, offload=False)(PROMPTS[:2], 4.5)
    for own, cached in ((plain.text, first.text), (plain.negative, first.negative)):
        torch.testing.assert_close(own.embeds, cached.embeds, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own.pooled, cached.pooled, rtol=1e-4, atol=1e-5)


def test_a_gradient_scaler_lowers_its_scale_where_an_update_is_skipped(folder, tmp_path, monkeypatch):
    """accelerate takes float16 on GPUs only; what it would do there is done here by hand."""
    trainer = Trainer(scaled(folder, tmp_path, "geneval-sd35m-fast", optimization={"mixed_precision": "no"},
                             model={"frozen_dtype": "float32"}))  # fmt: skip
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    policy, accelerator = trainer.policy, trainer.accelerator
    accelerator.scaler = policy.optimizer.scaler = scaler
    policy.optimizer._accelerate_step_called = False
    policy.optimizer._optimizer_original_step_method = policy.optimizer.optimizer.step
    policy.optimizer._optimizer_patched_step_method = patch_optimizer_step(
        policy.optimizer, policy.optimizer.optimizer.step
    )
    accelerator.unscale_gradients = lambda *_: scaler.unscale_(policy.optimizer.optimizer)
    before = [p.detach().clone() for p in policy.parameters.values()]
    with monkeypatch.context() as patch:
        patch.setattr(training, "compute_advantages", lambda scores, *_: torch.full_like(scores.reward, torch.nan))
        assert trainer.step()["updates_skipped"] == 2
    assert scaler.get_scale() == 2.0**8
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters.values(), strict=True))
    assert trainer.step()["updates_skipped"] == 0
    assert not all(torch.equal(a, b) for a, b in zip(before, policy.parameters.values(), strict=True))


# --- what a run costs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"sampling": {"shared_noise": True, "trained_steps": [2, 3, 5]}}])
def test_the_plan_is_what_a_small_model_takes(folder, tmp_path, changes):
    plain = {"model": {"frozen_dtype": "float32", "max_sequence_length": 32}}
    config = scaled(folder, tmp_path, "geneval-sd35m", **plain, optimization={"mixed_precision": "no"})
    config = configuration.update(config, changes)
    plan = planning.plan(config)
    trainer = Trainer(config)
    conditions = trainer.encode(["a dog", "a cow"], config.sampling.guidance_scale)
    trainer.encode = lambda *_: conditions
    with planning.flop_counter() as rollout_flops:
        rollout = trainer.rollout(["a dog", "a cow"], torch.Generator().manual_seed(0))
    weights = trainer.objective.weights(rollout, None, torch.Generator().manual_seed(0))
    saved = planning.SavedBytes(trainer.pipeline.transformer)
    with saved:
        velocity = rollout.velocity(trainer.policy.transformer, 0, torch.arange(config.optimization.micro_batch))
    del velocity
    with planning.flop_counter() as update_flops:
        trainer.update(rollout, Credit(torch.ones(4), weights, None))
    assert rollout_flops.get_total_flops() + update_flops.get_total_flops() == pytest.approx(
        plan.flops_per_gpu, rel=0.02
    )
    assert saved.bytes == pytest.approx(plan.memory["activations"], rel=0.05)
    transformer = trainer.pipeline.transformer
    assert plan.memory["transformer"] == planning.count_bytes(transformer.parameters())
    moments = [x for s in trainer.policy.optimizer.state.values() for x in s.values() if x.ndim]
    assert plan.memory["optimizer"] == planning.count_bytes(moments)
    assert plan.memory["moving average"] == planning.count_bytes(trainer.policy.ema.shadow_params)
    stored = planning.count_bytes((rollout.samples, rollout.prev_samples, rollout.old_means))
    assert plan.memory["rollout"] == stored
    assert plan.memory["text"] == planning.count_bytes((conditions.text.embeds, conditions.negative.embeds))
    pipeline = trainer.pipeline
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
    assert plan.memory["text encoders"] == sum(planning.count_bytes(encoder.parameters()) for encoder in encoders)


def test_a_plan_of_a_known_model_needs_no_network():
    config = dataclasses.replace(preset("geneval-sd35m-fast"))
    plan = planning.plan(config, gpus=32)
    assert (plan.images, plan.images_per_gpu, plan.trained_steps) == (1152, 36, 3)
    assert plan.rollout_rows == 36 * 10 and plan.update_rows == 36 * 3 and plan.reference_rows == 0
    assert plan.parameters - plan.trained_parameters == pytest.approx(2.243e9, rel=1e-3)
    # 2 FLOPs for each weight of the blocks and each token, and attention: between these bounds.
    assert 1e12 < plan.forward_flops < 4e12 and plan.backward_flops > plan.forward_flops
    sharded = planning.plan(config, gpus=32, fsdp=True)
    assert sharded.memory["transformer"] == plan.memory["transformer"] // 32 and sharded.peak < plan.peak
    with pytest.raises(ConfigError, match=r"model.path: got 'nobody/nothing', expected a pipeline's folder or one of"):
        planning.plan(configuration.update(config, {"model": {"path": "nobody/nothing"}}))


def test_help_and_plan_from_the_command_line(folder):
    def star(*arguments):
        result = subprocess.run(
            [sys.executable, "-m", "star.cli", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent
        )
        return result.returncode, result.stdout, result.stderr

    code, output, _ = star("train", "--preset", "ocr-sd35m", "--help")
    assert code == 0 and "--sampling.window INT" in output and max(map(len, output.splitlines())) <= 100
    small = ("--model.path", str(folder / "pipeline"), "--model.height", "64", "--model.width", "64")
    code, output, _ = star("plan", "--preset", "ocr-sd35m", "--gpus", "2", *small)
    assert code == 0 and "1,152 (576 per GPU)" in output and "peak per GPU" in output
    code, _, error = star("plan", "--preset", "ocr-sd35m", "--gpus", "5", *small)
    assert (
        code == 1 and error.strip() == "star: accelerate: got 5 processes, expected a divisor of an update's 576 images"
    )


def test_a_pipeline_that_lacks_weights_is_refused(folder, tmp_path):
    shutil.copytree(folder / "pipeline", tmp_path / "pipeline")
    for name in ("text_encoder", "text_encoder_3"):
        file = tmp_path / "pipeline" / name / "model.safetensors"
        whole = file.read_bytes()
        state = load_file(file)
        del state[max(key for key in state if "layer" in key or "block" in key)]
        save_file(state, file, {"format": "pt"})
        with pytest.raises(ConfigError, match=f"lacks 1 weights of its {name} "):
            load_pipeline(str(tmp_path / "pipeline"))
        file.write_bytes(whole)
    load_pipeline(str(tmp_path / "pipeline"))
