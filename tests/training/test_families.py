"""FLUX.1 and Qwen-Image in the loop beside SD3, as tiny random pipelines: they sample what diffusers' own call samples,
and train, resume, score, export and plan as SD3 does."""

import dataclasses
import json
import re

import pytest
import torch
from diffusers import DiffusionPipeline
from peft.utils import get_peft_model_state_dict

from star import config as configuration
from star.config import ConfigError
from star.presets import preset
from star.reports.evaluations import read_evaluations
from star.rewards import Scores
from star.shapes.model import load_pipeline as load_embedded
from star.train import Trainer, train
from star.training import plan as planning
from star.training.conditions import PromptEncoder, encode
from star.training.credit import Credit
from star.training.families import FAMILIES, family_of
from star.training.families.known import KNOWN
from star.training.pipeline import latent_size, load_pipeline, model_shape
from star.training.rollout import SamplerOptions, decode, predict_velocity, trace
from trained import BUILD, small_flux_pipeline

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

CORPUS = [
    "a photo of a red bench left of two green cats",
    'a sign that says "OPEN" on a blue door',
    "a dog above a cow",
]
PROMPTS = ["a red bench left of two green cats on a blue door", "a dog"]  # of different lengths
HEIGHT, WIDTH, LENGTH, STEPS = 32, 48, 48, 3  # a grid that is not square shows rows and columns that are mixed up
PRESETS = {"flux": "pickscore-flux1-dev", "qwen_image": "pickscore-qwen-image"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved pipelines by their kinds, made when they are asked for, and prompts.txt beside them."""
    root = tmp_path_factory.mktemp("pipelines")
    (root / "prompts.txt").write_text("\n".join(CORPUS))

    def folder(kind):
        if not (root / kind).exists():
            BUILD[kind](CORPUS).save_pretrained(root / kind)
        return root / kind

    return folder


@pytest.fixture(scope="module")
def pipelines(folders):
    made = {}
    return lambda kind: made.setdefault(kind, load_pipeline(str(folders(kind))))


def brightness(images, prompts, metadata):
    return Scores(images.mean((1, 2, 3)))


def small_run(folders, kind, out, **changes):
    """The kind's preset with a tiny model and few images."""
    base = {
        "model": {"path": str(folders(kind)), "height": HEIGHT, "width": WIDTH, "max_sequence_length": LENGTH,
                  "lora_rank": 4, "lora_alpha": 8, "frozen_dtype": "float32"},
        "sampling": {"prompts": str(folders(kind).parent / "prompts.txt"), "prompts_per_iteration": 2,
                     "images_per_prompt": 2, "steps": STEPS, "trained_steps": [0, 1], "window": 0},
        "optimization": {"iterations": 2, "micro_batch": 2, "mixed_precision": "no", "learning_rate": 1e-2},
        "scoring": {"count": 0, "prompts": None, "every": 0},
        "run": {"out": str(out), "reward": "test_families:brightness", "figures": False, "grid_every": 0,
                "save_every": 1},
    }  # fmt: skip
    for section, values in changes.items():
        base.setdefault(section, {}).update(values)
    return configuration.update(preset(PRESETS[kind]), base)


def start(pipeline):
    """Noise (2, C, H, W) of two images."""
    shape = (2, model_shape(pipeline).in_channels, *latent_size(pipeline, HEIGHT, WIDTH))
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def plain_call(pipeline, kind, scale, **options):
    """diffusers' own call from that noise, with its own names for guidance."""
    latents, call = start(pipeline), {"guidance_scale": scale}
    if kind != "sd3":
        batch, channels, height, width = latents.shape
        latents = pipeline._pack_latents(latents, batch, channels, height, width)
    if kind == "qwen_image":
        call = {"true_cfg_scale": scale, "negative_prompt": [" ", " "] if scale > 1 else None}
    return pipeline(
        PROMPTS, height=HEIGHT, width=WIDTH, num_inference_steps=STEPS, latents=latents, max_sequence_length=LENGTH,
        **call, **options,
    ).images  # fmt: skip


def own_trace(pipeline, scale):
    options = SamplerOptions(latent_size(pipeline, HEIGHT, WIDTH), scale)
    return trace(pipeline, encode(pipeline, PROMPTS, LENGTH, scale), STEPS, options, 0, start(pipeline))


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("kind", BUILD)
def test_without_noise_it_is_the_plain_pipeline(pipelines, kind, scale):
    pipeline = pipelines(kind)
    expected = plain_call(pipeline, kind, scale, output_type="pt")
    rollout = own_trace(pipeline, scale)
    torch.testing.assert_close(decode(pipeline, rollout.latents), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.01 and rollout.grid == (2, 3) and rollout.captured_maps().shape[-1] == 6


@pytest.mark.parametrize("kind", PRESETS)
def test_guidance_changes_the_image_but_not_whose_maps_are_read(pipelines, kind):
    plain, guided = (own_trace(pipelines(kind), scale) for scale in (1.0, 4.0))
    assert not torch.allclose(plain.latents, guided.latents, atol=1e-3)
    if FAMILIES[type(pipelines(kind)).__name__].is_guided(4.0):
        # The first pass is of the same latents.
        torch.testing.assert_close(plain.captured_maps()[0], guided.captured_maps()[0], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(plain.captured_maps()[0, 0, 0], plain.captured_maps()[0, 0, 1], rtol=1e-3)


@pytest.mark.parametrize("kind", PRESETS)
def test_a_packed_token_is_a_patch_of_the_latents(pipelines, kind):
    pipeline, family = pipelines(kind), family_of(pipelines(kind))
    latents = start(pipeline)
    packed = family.pack(latents)
    assert torch.equal(packed, pipeline._pack_latents(latents, *latents.shape))
    assert torch.equal(family.unpack(packed, latents.shape[-2:]), latents)
    row, column = 1, 2
    patch = latents[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
    assert torch.equal(packed[:, row * (latents.shape[-1] // 2) + column].sort().values, patch.flatten(1).sort().values)


def test_embeddings_of_the_cache_are_padded_and_masked(pipelines):
    """Encoded alone they have lengths of their own."""
    pipeline = pipelines("qwen_image")
    cached, plain = (PromptEncoder(pipeline, LENGTH, cached=count, offload=True)(PROMPTS, 4.0) for count in (4, 0))
    assert not cached.text.mask[1].all() and cached.text.mask[0].all() and cached.negative.mask is None
    assert torch.equal(cached.text.mask, plain.text.mask) and torch.equal(cached.tokens.index, plain.tokens.index)
    latents, timestep = start(pipeline), torch.tensor(500.0)
    with torch.no_grad():
        own, other = (predict_velocity(pipeline.transformer, latents, timestep, x, 4.0) for x in (cached, plain))
    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


NFT = {
    "model": {"lora_rank": 0, "gradient_checkpointing": True},
    "loss": {"objective": "nft", "kl_coef": 1e-3},
    "optimization": {"learning_rate": 1e-3},
}


@pytest.mark.parametrize("kind", PRESETS)
@pytest.mark.parametrize("objective", ["grpo", "nft"])
def test_a_run_trains_and_goes_on_with_the_same_bits(folders, tmp_path, kind, objective):
    """grpo with adapters, nft with all weights; FLUX.1 keeps the guidance that it takes as an input."""
    changes = dict(NFT) if objective == "nft" else {}
    if objective == "nft" and kind == "qwen_image":
        changes["sampling"] = {"guidance_scale": 1.0}
    whole = Trainer(small_run(folders, kind, tmp_path / "whole", **changes))
    metrics = [whole.step() for _ in range(2)]
    assert metrics[0].get("ratio_first", 1.0) == 1.0 and metrics[0]["weights_max"] > 1
    for line in metrics:
        assert line["grad_norm"] > 0 and line["nonfinite"] == line["updates_skipped"] == 0
    config = small_run(folders, kind, tmp_path / "halves", **changes)
    first = Trainer(config)
    first.step()
    first.save()
    resumed = Trainer(dataclasses.replace(config, run=dataclasses.replace(config.run, resume=True)))
    again = resumed.step()
    for name, value in again.items():
        if not name.startswith(("seconds/", "memory")):
            assert value == metrics[1][name], name


@pytest.mark.parametrize("kind", PRESETS)
def test_a_run_is_scored_exported_and_told_how_to_be_used(folders, tmp_path, kind):
    """In half precision, as the presets are."""
    prompts = str(folders(kind).parent / "prompts.txt")
    changes = {
        "model": {"frozen_dtype": "bfloat16"},
        "optimization": {"iterations": 1, "mixed_precision": "bfloat16"},
        "scoring": {"count": 2, "prompts": prompts, "steps": 2, "batch": 2},
    }
    config = small_run(folders, kind, tmp_path / "run", **changes)
    assert train(config)["iterations"] == 1
    assert [one.iteration for one in read_evaluations(tmp_path / "run")] == [0, 1]
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])["ratio_first"] == 1.0
    names = {}
    exec(re.search(r"```python\n(.*?)```", (tmp_path / "run/lora/README.md").read_text(), re.S)[1], names)
    assert names["image"].size == (WIDTH, HEIGHT)
    plain = names["pipeline"].transformer
    loaded = get_peft_model_state_dict(plain, adapter_name=next(iter(plain.peft_config)))
    resumed = Trainer(dataclasses.replace(config, run=dataclasses.replace(config.run, resume=True)))
    with resumed.policy.averaged():
        trained = get_peft_model_state_dict(resumed.pipeline.transformer)
        assert loaded.keys() == trained.keys() and all(torch.equal(loaded[k], trained[k]) for k in loaded)
    adapted = small_run(folders, kind, tmp_path / "next", **changes)
    adapted.model.adapter = str(tmp_path / "run/lora")
    assert Trainer(adapted).policy.bare.peft_config.keys() == {"default", "reference"}


def test_all_weights_are_exported_as_a_pipeline(folders, tmp_path):
    config = small_run(folders, "flux", tmp_path / "run", model={"lora_rank": 0}, optimization={"iterations": 1})
    train(config)
    again = DiffusionPipeline.from_pretrained(tmp_path / "run/model")
    assert type(again).__name__ == "FluxPipeline" and family_of(again).shape(again.transformer) == (4, 2)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("flux", {"model": {"height": 40}}, r"model.height: got 40, expected a multiple of 16$"),
        ("qwen_image", {"model": {"width": 24}}, r"model.width: got 24, expected a multiple of 16$"),
        ("flux", {"model": {"max_sequence_length": 0}}, r"got 0, expected 1\.\.512 of a FluxPipeline"),
        ("qwen_image", {"model": {"max_sequence_length": 2000}}, r"got 2000, expected 1\.\.1024 of a Qwen"),
        ("qwen_image", {"loss": {"objective": "nft"}}, r"sampling.guidance_scale: got 4, expected 1: loss"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_line(folders, tmp_path, kind, changes, words):
    config = small_run(folders, kind, tmp_path / "run", **changes)
    for attempt in (Trainer, planning.plan):
        with pytest.raises(ConfigError, match=words) as caught:
            attempt(config)
        assert "\n" not in str(caught.value)


def test_other_pipelines_are_refused(folders, tmp_path):
    index = json.loads((folders("flux") / "model_index.json").read_text())
    for kind in ("FluxKontextPipeline", "FluxImg2ImgPipeline", "QwenImageEditPipeline", "ZImagePipeline"):
        other = tmp_path / f"{kind}-index"
        other.mkdir()
        for part in folders("flux").iterdir():
            (other / part.name).symlink_to(part)
        (other / "model_index.json").unlink()
        (other / "model_index.json").write_text(json.dumps(index | {"_class_name": kind}))
        for attempt in (load_pipeline, planning.architecture):
            with pytest.raises(ConfigError, match=rf"^model.path: '.*' is a {kind}, which cannot be trained; expected"):
                attempt(str(other))
    with pytest.raises(ConfigError, match="pipeline is a dict, which cannot be trained"):
        family_of({})


def test_a_flux_without_guidance_takes_none(folders, tmp_path):
    small_flux_pipeline(CORPUS, guidance=False).save_pretrained(tmp_path / "schnell")
    config = small_run(folders, "flux", tmp_path / "run", model={"path": str(tmp_path / "schnell")})
    for attempt in (Trainer, planning.plan):
        with pytest.raises(ConfigError, match=r"sampling.guidance_scale: got 3.5, expected 1: this model takes no"):
            attempt(config)
    planning.plan(configuration.update(config, {"sampling": {"guidance_scale": 1.0}}))


@pytest.mark.parametrize("kind", PRESETS)
def test_the_plan_is_what_a_small_model_takes(folders, tmp_path, kind):
    config = small_run(folders, kind, tmp_path / "run")
    trainer = Trainer(config)
    conditions = trainer.encode(["a dog", "a cow"], config.sampling.guidance_scale)
    tokens = max(x.embeds.shape[1] for x in (conditions.text, conditions.negative) if x is not None)
    config.model.max_sequence_length = tokens  # Qwen-Image's prompts are seldom of the largest length
    plan = planning.plan(config)
    trainer.encode = lambda *_: conditions
    with planning.flop_counter() as flops:
        rollout = trainer.rollout(["a dog", "a cow"], torch.Generator().manual_seed(0))
        weights = trainer.objective.weights(rollout, None, torch.Generator().manual_seed(0))
        trainer.update(rollout, Credit(torch.ones(4), weights, None))
    assert flops.get_total_flops() == pytest.approx(plan.flops_per_gpu, rel=0.02)
    saved = planning.SavedBytes(trainer.pipeline.transformer)
    with saved:
        velocity = rollout.velocity(trainer.policy.transformer, 0, torch.arange(2))
    del velocity
    assert saved.bytes == pytest.approx(plan.memory["activations"], rel=0.1)
    assert plan.memory["rollout"] == planning.count_bytes((rollout.samples, rollout.prev_samples, rollout.old_means))
    assert plan.memory["transformer"] == planning.count_bytes(trainer.pipeline.transformer.parameters())


@pytest.mark.parametrize(
    ("path", "billions", "encoders"),
    [("black-forest-labs/FLUX.1-dev", 11.901, 4.885), ("Qwen/Qwen-Image", 20.430, 8.292)],
)
def test_known_models_have_their_size(path, billions, encoders):
    """By the parameters of their weight files: CLIP-L and T5-XXL's encoder, Qwen2.5-VL-7B."""
    kind, build = KNOWN[path]
    with torch.device("meta"):
        parts = build()
    assert type(parts.transformer).__name__ == FAMILIES[kind].transformer
    counts = [sum(p.numel() for module in group for p in module.parameters())
              for group in ([parts.transformer], parts.text_encoders)]  # fmt: skip
    assert counts == [pytest.approx(billions * 1e9, rel=1e-3), pytest.approx(encoders * 1e9, rel=1e-3)]
    assert FAMILIES[kind].scale_factor(parts.vae) == 8


def test_published_settings():
    """By hand from flow_grpo's config/grpo.py and its two scripts, not from our table."""
    flux, fast, qwen = (
        preset(name) for name in ("pickscore-flux1-dev", "pickscore-flux1-dev-fast", PRESETS["qwen_image"])
    )
    assert (flux.sampling.steps, flux.sampling.guidance_scale, flux.sampling.noise_level) == (6, 3.5, 0.9)
    assert flux.sampling.trained_steps == (0, 1, 2, 3, 4) and (flux.loss.kl_coef, flux.loss.clip_range) == (0, 1e-4)
    assert (flux.model.lora_rank, flux.model.lora_alpha, flux.model.max_sequence_length) == (64, 128, 128)
    assert (fast.sampling.sampler, fast.sampling.noise_level, fast.loss.clip_range) == ("cps", 0.8, 1e-5)
    assert fast.sampling.trained_steps == (0, 1, 2) and not fast.loss.global_std and flux.loss.global_std
    assert (qwen.sampling.steps, qwen.sampling.guidance_scale, qwen.sampling.noise_level) == (10, 4.0, 1.2)
    assert (qwen.sampling.window, qwen.sampling.trained_steps) == (2, (0, 1, 2, 3, 4))
    assert (qwen.sampling.prompts_per_iteration, qwen.sampling.images_per_prompt) == (32, 16)
    assert qwen.optimization.ema_decay == 0 and qwen.model.gradient_checkpointing
    for config in (flux, fast, qwen):
        assert config.optimization.mixed_precision == config.model.frozen_dtype == "bfloat16"
        for gpus in (1, 2, 4, 8, 16, 32):
            config.check(gpus)


def test_an_sd3_without_t5_trains_on_the_text_that_it_is_scored_with():
    """diffusers would append zeros in T5's place to one of the two."""
    pipeline = load_embedded()
    assert pipeline.text_encoder_3 is None
    call = family_of(pipeline).settings(pipeline, 1.0, 32, 1)
    length, (prompt,) = call["max_sequence_length"], PROMPTS[:1]
    embeds, *_ = pipeline.encode_prompt(
        prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=length
    )
    assert torch.equal(encode(pipeline, [prompt], 32, 1.0).text.embeds, embeds)
