"""An image of any pipeline as it forms: the pipeline's own passes and its own decoder, and nothing left behind."""

import warnings

import diffusers
import numpy as np
import pytest
import torch

from models import small_pixart
from pipelines import ENCODINGS, WordWise, scheduler, unigram
from star import concept_tokens, record
from star.objective import Allocation, allocation_weights
from star.trace import ONE_IMAGE, check_kind, decode, trace
from star.training.task import find_task
from star_kernels import allocate

PROMPT = "a photo of a red bench left of two green cats"
CALL = dict(num_inference_steps=3, height=64, width=64)


def autoencoder(channels):
    torch.manual_seed(2)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=channels, norm_num_groups=2,
        mid_block_add_attention=False, shift_factor=0.1,
    ).eval()  # fmt: skip


def with_vae(name, vae):
    pipeline = ENCODINGS[name].build()
    pipeline.vae = vae
    return pipeline


def qwen_image():
    torch.manual_seed(2)
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[2.0] * 4
    )
    return with_vae("qwen_image", vae.eval())


def pixart():
    return diffusers.PixArtSigmaPipeline(
        tokenizer=unigram(), text_encoder=WordWise(24), vae=autoencoder(4), transformer=small_pixart(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )  # fmt: skip


def embedded():
    return find_task("shapes").pipeline("cpu", torch.float32)


SHAPES = dict(height=36, width=36, max_sequence_length=0, guidance_scale=1.0)
PIPELINES = {
    "shapes": (embedded, dict(num_inference_steps=4, **SHAPES)),
    "flux": (lambda: with_vae("flux", autoencoder(2)), CALL),
    "guided": (lambda: with_vae("z_image", autoencoder(4)), {**CALL, "guidance_scale": 3.0}),
    "guided apart": (qwen_image, {**CALL, "negative_prompt": PROMPT + " on an old sign", "true_cfg_scale": 3.0}),
    "another scheduler": (pixart, {**CALL, "use_resolution_binning": False, "clean_caption": False}),
}


@pytest.fixture(params=PIPELINES)
def case(request):
    build, call = PIPELINES[request.param]
    pipeline = build()
    pipeline.set_progress_bar_config(disable=True)
    prompt = "a red circle left of a blue square" if request.param == "shapes" else PROMPT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pipeline, prompt, call


def test_the_image_and_the_maps_are_those_of_the_pipeline_alone(case):
    pipeline, prompt, call = case
    shown = trace(pipeline, prompt, call, seed=3)
    latents = []
    step = pipeline.scheduler.step
    pipeline.scheduler.step = lambda *args, **options: latents.append(step(*args, **options)) or latents[-1]
    generator = torch.Generator().manual_seed(3)
    tokens = concept_tokens(pipeline, [prompt], call=call)
    with record(pipeline.transformer, tokens) as kept, torch.no_grad():
        image = pipeline(prompt=prompt, generator=generator, **call).images[0]
    del pipeline.scheduler.step
    steps = len(shown.images)
    assert steps == call["num_inference_steps"] == len(latents)
    assert np.array_equal(shown.images[-1], np.asarray(image))
    # The pipeline's decoder, cut out of its call, gives that image of the last latents; each step has its own.
    assert np.array_equal(decode(pipeline, prompt, call, latents[-1][0]), shown.images[-1])
    assert len({image.tobytes() for image in shown.images}) == steps
    passes = kept.maps[:: len(kept.maps) // steps]
    assert torch.equal(shown.means, torch.stack([maps[0] for maps in passes]))
    assert shown.grid == kept.grid and len(shown.concepts) == 2 and shown.note == ""
    torch.testing.assert_close(shown.maps.mean(1), shown.means)
    assert torch.equal(shown.maps_at(1, shown.blocks[-1]), shown.maps[1, -1])


def test_of_two_passes_the_one_with_the_prompt_is_read():
    """The other's text may be shorter, so that it has no token of a concept."""
    pipeline = qwen_image()
    call = {**CALL, "true_cfg_scale": 3.0}
    short, long = (trace(pipeline, PROMPT, {**call, "negative_prompt": text}) for text in ("a", 3 * PROMPT))
    assert torch.equal(short.means[0], long.means[0])  # before guidance has changed the latents
    assert not torch.equal(short.means[-1], long.means[-1]) and len(short.maps) == 3


def state(pipeline):
    """What a trace could leave behind."""
    model = pipeline.transformer
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    processors = [id(module.processor) for module in model.modules() if hasattr(module, "processor")]
    return hooks, processors, "step" in vars(pipeline.scheduler), "set_timesteps" in vars(pipeline.scheduler)


def test_a_pipeline_is_left_as_it_was_whatever_happens(case):
    pipeline, prompt, call = case
    before = state(pipeline)
    trace(pipeline, prompt, call)
    assert state(pipeline) == before

    for when in (0.3, 0.6):  # while it denoises, while it decodes

        def fail(share, doing, when=when):
            if share >= when:
                raise KeyError("the visitor has left")

        with pytest.raises(KeyError):
            trace(pipeline, prompt, call, tell=fail)
        assert state(pipeline) == before


def test_a_method_that_somebody_replaced_stays_replaced():
    pipeline = embedded()
    advance, called = pipeline.scheduler.step, []

    def step(*args, **options):
        called.append(args)
        return advance(*args, **options)

    pipeline.scheduler.step = step
    trace(pipeline, "a red circle", dict(num_inference_steps=2, **SHAPES))
    assert vars(pipeline.scheduler)["step"] is step and called


@pytest.fixture(scope="module")
def shown():
    prompt, call = "[a red circle] left of a [blue square]", dict(num_inference_steps=4, **SHAPES)
    return trace(embedded(), prompt, call)


def test_brackets_mark_concepts(shown):
    assert shown.prompt == "a red circle left of a blue square"
    assert shown.concepts == ("a red circle", "blue square")


@pytest.mark.parametrize("block", [None, 2])
def test_the_weights_are_those_of_the_strategies(shown, block):
    step = 1
    weights = {strategy: shown.weights_at(step, block, strategy) for strategy in ONE_IMAGE}
    maps = [shown.maps_at(at, block)[None] for at in range(4)]
    assert torch.equal(weights["attention"], allocate(maps[step], shown.grid, patch=1)[0])
    assert torch.equal(weights["final_step"], allocate(maps[-1], shown.grid, patch=1)[0])
    assert torch.equal(weights["uniform"], torch.ones(9, 9))
    topk = allocation_weights(Allocation("topk"), maps[step], shown.grid, patch=1)[0]
    assert torch.equal(weights["topk"], topk) and topk.unique().numel() == 2
    for control in ("random", "inverted"):
        assert torch.equal(weights[control].flatten().sort()[0], weights["attention"].flatten().sort()[0])
        assert not torch.equal(weights[control], weights["attention"])
    assert not torch.equal(weights["attention"], weights["final_step"])
    with pytest.raises(ValueError, match="strategy: got 'best'"):
        shown.weights_at(step, block, "best")


def test_a_prompt_without_a_concept_and_one_that_is_cut_are_told():
    call = dict(num_inference_steps=2, **SHAPES)
    none = trace(embedded(), "on", call)
    assert none.concepts == () and none.note == "a prompt has no concept"
    assert torch.equal(none.weights_at(0, None, "attention"), torch.ones(9, 9))
    cut = trace(embedded(), "a red circle left of a blue square on a gray background", call)
    assert cut.note == "no token says 'gray background': the prompt is cut before it"


def test_what_is_no_pipeline_of_images_is_refused():
    wan = ENCODINGS["wan"].build()
    with pytest.raises(ValueError, match="model: the pipeline makes videos, expected one of images"):
        trace(wan, PROMPT, {**CALL, "num_frames": 9})
    with pytest.raises(ValueError, match="prompt: empty"):
        trace(wan, " ", CALL)
    with pytest.raises(ValueError, match="model: StableDiffusionPipeline has no transformer"):
        check_kind(object.__new__(diffusers.StableDiffusionPipeline))
    refused = diffusers.DiTPipeline(
        diffusers.DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=1, sample_size=8),
        vae=None,
        scheduler=scheduler(),
    )
    with pytest.raises(TypeError, match="DiTTransformer2DModel is not supported: it reads class labels"):
        check_kind(refused)
