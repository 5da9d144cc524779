"""Capture on diffusers' SD3 transformer: right maps, and a model that computes what it computed before."""

import os
from collections import Counter
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload, dispatch_model
from diffusers import AutoencoderKL, FluxPipeline
from diffusers.models.attention_processor import (
    AttnProcessor,
    JointAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import star.tap
from builders import (
    GRID,
    HEADS,
    TEXT,
    clip_tokenizer,
    flux_inputs,
    small_flux,
    small_inputs,
    small_sd35,
    small_transformer,
    t5_tokenizer,
)
from star.capture import Maps, allocated, capture, record
from star.concepts import ConceptTokens, concept_tokens
from star.objective import Allocation, allocation_weights
from star.tap import Tapped
from star_kernels import allocate
from versions import numbers, skip_without

N = GRID[0] * GRID[1]


def concepts(*groups: list[int], batch=2) -> ConceptTokens:
    """The same concepts in every row, each a list of text tokens with equal weights."""
    slots = max(map(len, groups))
    index = torch.tensor([group + [-1] * (slots - len(group)) for group in groups])
    weight = (index >= 0) / torch.tensor([[len(group)] for group in groups])
    return ConceptTokens(index.expand(batch, -1, -1), weight.float().expand(batch, -1, -1))


TOKENS = concepts([1], [2, 4])


class DecoratedProcessor(JointAttnProcessor2_0):
    """What its decorator does is not in its source."""

    @torch.no_grad()
    def __call__(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value)


class RecordingProcessor(JointAttnProcessor2_0):
    """The plain processor; it materializes its probabilities in float64 beside."""

    probabilities: Tensor

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        def heads(linear, norm, states):
            out = linear(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return (out if norm is None else norm(out)).double()

        image, text = hidden_states, encoder_hidden_states
        query = heads(attn.to_q, attn.norm_q, image)
        keys = [heads(attn.to_k, attn.norm_k, image), heads(attn.add_k_proj, attn.norm_added_k, text)]
        scores = query @ torch.cat(keys, 2).transpose(-1, -2) / query.shape[-1] ** 0.5
        self.probabilities = torch.softmax(scores, -1).mean(1)  # (B, N, N + T)
        return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


def materialized(model, inputs) -> list[Tensor]:
    """Each block's head-mean probabilities, image queries to all keys."""
    before = [block.attn.processor for block in model.transformer_blocks]
    for block in model.transformer_blocks:
        block.attn.processor = RecordingProcessor()
    with torch.no_grad():
        model(**inputs)
    found = [block.attn.processor.probabilities for block in model.transformer_blocks]
    for block, processor in zip(model.transformer_blocks, before, strict=True):
        block.attn.processor = processor
    return found


@pytest.mark.parametrize("lse", [True, False])
@pytest.mark.parametrize("qk_norm", ["rms_norm", None])
def test_maps_are_the_materialized_attention(lse, qk_norm):
    model, inputs = small_transformer(qk_norm=qk_norm), small_inputs()
    with torch.no_grad(), capture(model, TOKENS, grid=GRID, lse=lse) as maps:
        model(**inputs)
    for layer, probabilities in enumerate(materialized(model, inputs)):
        text = probabilities[..., N:]
        expected = torch.stack([text[..., 1], (text[..., 2] + text[..., 4]) / 2], 1)
        torch.testing.assert_close(maps.layers()[layer].double(), expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(maps.read(), maps.layers().mean(0))


def test_mass_over_all_keys_is_one():
    model, inputs = small_transformer(), small_inputs()
    # Negative text positions would be padding, so all keys are asked for of the operator through a text-only check:
    # image keys and text keys together make 1.
    image = [p[..., :N].sum(-1) for p in materialized(model, inputs)]
    with torch.no_grad(), capture(model, concepts(list(range(TEXT))), grid=GRID) as maps:
        model(**inputs)
    for layer in range(3):
        total = maps.layers()[layer, :, 0].double() * TEXT + image[layer]
        torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("rows", [None, slice(1, 2)])
def test_a_captured_block_makes_no_views_and_no_copies(rows):
    """The part of the queries that is read is cut in C++: in Python views and copies take longer than the maps."""
    model, inputs = small_transformer(), small_inputs()
    tokens = TOKENS if rows is None else concepts([1], [2, 4], batch=1)

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen[str(function)] += 1
            return function(*args, **(kwargs or {}))

    counts = []
    for layers in ([0], [0, 1, 2]):
        with torch.no_grad(), capture(model, tokens, rows=rows, layers=layers) as maps, Operators() as operators:
            operators.seen = Counter()
            model(**inputs)
        assert maps.read().isfinite().all()
        counts.append(operators.seen)
    # F.scaled_dot_product_attention chooses its kernel without an operator.
    more = {"star.write_attention_maps_native.default": 2, "aten._fused_sdp_choice.default": 2}
    assert counts[1] - counts[0] == more and not counts[0] - counts[1]


def every_block(model):
    return [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())]


@pytest.mark.parametrize("mode", ["eager", "autocast", "gradient", "math"])
@pytest.mark.parametrize(("build", "make"), [(small_transformer, small_inputs), (small_flux, flux_inputs)])
def test_the_output_keeps_its_bits(build, make, mode):
    model, inputs = build(), make()
    every = list(range(len(every_block(model))))

    def forward():
        backends = [SDPBackend.MATH] if mode == "math" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"), sdpa_kernel(backends):
            return model(**inputs, return_dict=False)[0]

    with torch.set_grad_enabled(mode == "gradient"):
        plain = forward()
        with capture(model, TOKENS, grid=GRID, layers=every) as maps:
            captured = forward()
    assert torch.equal(plain, captured)
    assert maps.read().isfinite().all() and maps.read().amin() > 0 and not maps.read().requires_grad
    if mode == "gradient":
        parameters = list(model.parameters())
        for a, b in zip(
            torch.autograd.grad(plain.sum(), parameters, allow_unused=True),
            torch.autograd.grad(captured.sum(), parameters, allow_unused=True),
            strict=True,
        ):
            assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize(("build", "make"), [(small_transformer, small_inputs), (small_flux, flux_inputs)])
def test_no_more_projections_are_held_over_the_attention(build, make, monkeypatch):
    """They would raise the peak of memory above that of diffusers' own processors."""
    model, inputs = build(), make()
    projections = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    made, seen = [], []

    def watch(module, name):
        attend = getattr(module, name)

        def watched(*args, **options):
            if len(made) == len(projections):
                seen.append([storage.expired() for storage in made])
                made.clear()
            return attend(*args, **options)

        monkeypatch.setattr(module, name, watched)

    def keep(module, args, output):
        made.append(StorageWeakRef(output.untyped_storage()))

    watch(torch.nn.functional, "scaled_dot_product_attention")
    watch(star.tap, "attention_with_lse")
    for block in model.transformer_blocks:
        for name in projections:
            getattr(block.attn, name).register_forward_hook(keep)
    with torch.no_grad():
        model(**inputs)
        plain = list(seen)
        seen.clear()
        with capture(model, TOKENS, grid=GRID):
            model(**inputs)
    assert seen == plain and len(plain) == len(model.transformer_blocks)


def offloaded(model, how, folder):
    """A model as diffusers' offloading and a device map leave it: weights elsewhere until a pass needs them."""
    if how == "sequential":
        return cpu_offload(model, execution_device="cpu")
    if how == "disk":
        return disk_offload(model, folder, execution_device="cpu")
    if how == "model":
        return cpu_offload_with_hook(model, execution_device="cpu")[0]
    places = {name: "disk" if "context" in name or "blocks" in name else "cpu" for name, _ in model.named_children()}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder)


@pytest.mark.parametrize("how", ["sequential", "disk", "model", "device map"])
@pytest.mark.parametrize(("build", "make"), [(small_transformer, small_inputs), (small_flux, flux_inputs)])
def test_an_offloaded_model_has_the_same_maps_weights_and_gradients(build, make, how, tmp_path):
    inputs, found = make(4), []
    inputs["hidden_states"].requires_grad_()
    for model in (build(), offloaded(build(), how, tmp_path)):
        for normalize in ("raw", "content"):
            weights = {"layer_weights": [1.0] * len(model.transformer_blocks), "head_weight": torch.tensor([0.3, 0.7])}
            with torch.no_grad(), capture(model, TOKENS, rows=[3, 2], normalize=normalize, **weights) as maps:
                found.append((model(**inputs)[0], maps.read()))
        with torch.no_grad(), record(model, TOKENS, rows=slice(2, 4)) as recorded:
            model(**inputs)
        with allocated(model, TOKENS, rows=slice(2, 4)):
            output = model(**inputs)[0]
        found.append((recorded.weights(), *torch.autograd.grad(output.square().sum(), inputs["hidden_states"])))
    for expected, got in zip(found[:3], found[3:], strict=True):
        for a, b in zip(expected, got, strict=True):
            assert torch.equal(a, b)


def test_maps_follow_a_model_that_is_moved_for_its_pass():
    """As diffusers' model offload does; the meta device stands for the accelerator."""
    model, _ = cpu_offload_with_hook(small_transformer(), execution_device="meta")
    weights = {"layer_weights": [1.0] * 3, "head_weight": torch.ones(HEADS)}
    with torch.no_grad(), capture(model, TOKENS, rows=[1, 0], **weights) as maps:
        output = model(**small_inputs())[0]
    assert output.is_meta and maps.read().is_meta and maps.layers().shape == (3, 2, 2, N)
    inputs = small_inputs()
    inputs["hidden_states"].requires_grad_()
    with allocated(model, TOKENS):
        assert model(**inputs)[0].requires_grad


def test_rows_and_columns_of_a_grid_that_is_not_square():
    """An image that differs in one token only changes the map most at that token."""
    model, inputs = small_transformer(layers=1, dual=()), small_inputs(1)
    tokens = concepts([1], batch=1)
    changed = {**inputs, "hidden_states": inputs["hidden_states"].clone()}
    row, column = 2, 3
    changed["hidden_states"][0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 2.0
    fields = []
    for arguments in (inputs, changed):
        with torch.no_grad(), capture(model, tokens, grid=GRID) as maps:
            model(**arguments)
        fields.append(maps.read()[0, 0].view(GRID))
    token = int((fields[1] - fields[0]).abs().argmax())
    assert divmod(token, GRID[1]) == (row, column)


def test_the_unconditional_half_is_never_read():
    model, inputs = small_transformer(), small_inputs(2)
    tokens = concepts([1], [2, 4], batch=1)
    with torch.no_grad(), capture(model, tokens, grid=GRID, rows=slice(1, 2)) as maps:
        model(**inputs)
        expected = maps.read()
        poisoned = {name: value.clone() for name, value in inputs.items()}
        poisoned["hidden_states"][0] = torch.nan
        poisoned["encoder_hidden_states"][0] = torch.nan
        model(**poisoned)
        assert torch.equal(maps.read(), expected)


def test_record_keeps_the_maps_of_every_pass():
    model = small_transformer()
    inputs = [small_inputs() | dict(timestep=torch.full((2,), t)) for t in (900.0, 500.0, 100.0)]
    with torch.no_grad(), record(model, concepts([1], [2, 4], batch=1), rows=[1], layers=[0, 2]) as recorded:
        for arguments in inputs:
            model(**arguments)
    passes = recorded.maps
    assert [tuple(maps.shape) for maps in passes] == [(1, 2, N)] * 3 and recorded.grid == GRID
    expected = torch.stack([allocate(maps, GRID) for maps in passes], 1)
    assert torch.equal(recorded.weights(), expected) and expected.shape == (1, 3, 2 * GRID[0], 2 * GRID[1])
    flat = recorded.weights(Allocation(mix=0.0))
    torch.testing.assert_close(flat, torch.ones_like(flat))
    top = recorded.weights(Allocation(strategy="topk"))
    assert torch.equal(top[:, 1], allocation_weights(Allocation(strategy="topk"), passes[1], GRID))
    with pytest.raises(ValueError, match="allocation: got strategy 'shuffled'"):
        recorded.weights(Allocation(strategy="shuffled"))
    for unknown in ({"warmup": 3}, {"noise_window": (0.0, 0.5)}):
        with pytest.raises(ValueError, match="allocation: got a noise_window or a warmup, but a pass shows neither"):
            recorded.weights(Allocation(**unknown))
    for arguments, maps in zip(inputs, passes, strict=True):
        with torch.no_grad(), capture(model, concepts([1], [2, 4], batch=1), grid=GRID, rows=[1], layers=[0, 2]) as one:
            model(**arguments)
        assert torch.equal(one.read(), maps)
    assert not torch.equal(passes[0], passes[2])
    assert not model._forward_hooks


@pytest.mark.parametrize("name", ["qwen_image", "wan"])
def test_record_of_a_sampler_that_guides_in_two_passes(name):
    """Of each step the pass of the prompts alone: a shorter negative prompt lacks their tokens."""
    from pipelines import ENCODINGS  # skips the test where an older diffusers lacks one of them

    pipeline = ENCODINGS[name].build()
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a red bench left of two green cats"]
    call = dict(num_inference_steps=2, height=32, width=48, output_type="latent", negative_prompt="dog")
    call |= dict(num_frames=5) if name == "wan" else dict(true_cfg_scale=4.0)
    made = []
    handle = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, options: made.append(options), with_kwargs=True
    )
    sample = lambda: pipeline(prompt=prompts, generator=torch.Generator().manual_seed(0), **call)[0]
    plain = sample()
    handle.remove()
    with record(pipeline.transformer, prompts, pipeline, passes_per_step=2) as recorded:
        images = sample()
    assert torch.equal(torch.as_tensor(images), torch.as_tensor(plain)) and len(made) == 4
    assert len(recorded.maps) == 2 and recorded.weights().shape[:2] == (1, 2)
    for options, maps in zip(made[::2], recorded.maps, strict=True):
        with torch.no_grad(), capture(pipeline.transformer, concept_tokens(pipeline, prompts)) as one:
            pipeline.transformer(**options)
        assert torch.equal(one.read(), maps)
    if name == "qwen_image":
        words = "tokens: got text token .*; find them .* leave unconditional passes out"
        with pytest.raises(ValueError, match=words), record(pipeline.transformer, prompts, pipeline):
            sample()
    with pytest.raises(ValueError, match="passes_per_step: got 0, expected at least 1"):
        record(pipeline.transformer, prompts, pipeline, passes_per_step=0).__enter__()
    assert not pipeline.transformer._forward_hooks and not pipeline.transformer._forward_pre_hooks


def test_a_deep_copy_of_a_captured_model_is_not_captured():
    """As trainers copy a model for its average, whenever they do."""
    model, inputs = small_transformer(), small_inputs()
    with torch.no_grad(), capture(model, TOKENS) as maps:
        expected = model(**inputs)[0]
        before = maps.read()
        twin = deepcopy(model)
        twin(**inputs | dict(hidden_states=torch.zeros(2, 4, 6, 10)))
        assert torch.equal(maps.read(), before)
    with torch.no_grad(), capture(twin, TOKENS) as maps:
        assert torch.equal(twin(**inputs)[0], expected)
    assert torch.equal(maps.read(), before)
    assert not any(isinstance(block.attn.processor, Tapped) for block in every_block(twin))


def test_under_the_transforms_of_torch_func():
    """Derivatives have the bits of no capture, and the pass its maps; vmap, which hides the batch, is refused."""
    model, inputs = small_transformer(), small_inputs()
    latents = inputs.pop("hidden_states")
    run = lambda latents: model(hidden_states=latents, **inputs)[0]
    derivatives = (
        lambda: torch.func.grad(lambda latents: run(latents).square().sum())(latents),
        lambda: torch.func.jvp(run, (latents,), (torch.ones_like(latents),))[1],
    )
    with torch.no_grad(), capture(model, TOKENS, lse=False) as maps:
        run(latents)
    plain = maps.read()
    with sdpa_kernel(SDPBackend.MATH):  # others have no derivative in forward mode
        for derivative in derivatives:
            expected = derivative()
            with capture(model, TOKENS) as maps:
                assert torch.equal(derivative(), expected)
            torch.testing.assert_close(maps.read(), plain, rtol=1e-4, atol=1e-7)
    with (
        capture(model, TOKENS),
        pytest.raises(TypeError, match=r"transformer: got a pass under torch\.func\.vmap, which"),
    ):
        torch.func.vmap(run)(torch.stack([latents, latents]))


def test_record_of_a_module_that_is_not_called_says_so():
    model = small_transformer()
    with pytest.raises(RuntimeError, match="transformer: made no pass inside `record`"), record(model, TOKENS):
        pass
    with pytest.raises(RuntimeError, match="transformer: got a call of its forward"), record(model, TOKENS) as recorded:
        model.forward(**small_inputs())
    with pytest.raises(RuntimeError, match="weights: no pass was made"):
        recorded.weights()
    with pytest.raises(KeyError), record(model, TOKENS):
        raise KeyError
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_allocated_around_another_module_says_so():
    """Else the run is trained without weights."""
    model = small_transformer()
    other = deepcopy(model)
    with pytest.raises(RuntimeError, match="transformer: made no pass inside `allocated`"), allocated(model, TOKENS):
        other(**small_inputs())
    with pytest.raises(KeyError), allocated(model, TOKENS):
        raise KeyError
    assert not model._forward_hooks and not model._forward_pre_hooks


def whole_checkpoint(model, inputs, reentrant):
    names = list(inputs)
    call = lambda *values: model(**dict(zip(names, values, strict=True)), return_dict=False)[0]
    return torch.utils.checkpoint.checkpoint(call, *inputs.values(), use_reentrant=reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_passes_of_a_checkpointed_transformer(reentrant):
    """One after the other they have their own weights; two that wait would both have those of the last."""
    model, passes = small_transformer(), []
    for sigma in (900.0, 500.0):
        inputs = small_inputs() | {"timestep": torch.full((2,), sigma)}
        inputs["hidden_states"] = torch.randn(inputs["hidden_states"].shape, requires_grad=True)
        passes.append(inputs)

    def gradients(checkpointed):
        model.zero_grad()
        with allocated(model, TOKENS):
            for inputs in passes:
                if checkpointed:
                    velocity = whole_checkpoint(model, inputs, reentrant)
                else:
                    velocity = model(**inputs, return_dict=False)[0]
                velocity.square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    assert all(map(torch.equal, gradients(False), gradients(True)))
    waiting = pytest.raises(RuntimeError, match="2 passes of a checkpointed transformer wait inside one `allocated`")
    with waiting, allocated(model, TOKENS):
        sum(whole_checkpoint(model, inputs, reentrant).square().mean() for inputs in passes).backward()
    with record(model, TOKENS) as recorded:
        whole_checkpoint(model, passes[0], reentrant).sum().backward()
    assert len(recorded.maps) == 1


def test_the_output_may_be_changed_in_place():
    model, inputs = small_transformer(), small_inputs()
    scale = torch.linspace(0.5, 2.0, inputs["hidden_states"].numel()).view_as(inputs["hidden_states"])

    def gradients(in_place):
        model.zero_grad()
        with allocated(model, TOKENS):
            velocity = model(**inputs, return_dict=False)[0]
        velocity = velocity.mul_(scale) if in_place else velocity * scale
        velocity.sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    assert all(map(torch.equal, gradients(False), gradients(True)))


class CallsTwice:
    """Joint attention, and attention to other tokens after it, as image prompts have."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        image, text = hidden_states, encoder_hidden_states

        def heads(linear, norm, states):
            out = linear(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return out if norm is None else norm(out)

        query, key, value = (
            torch.cat([heads(of_image, norm, image), heads(of_text, of_text_norm, text)], 2)
            for of_image, norm, of_text, of_text_norm in (
                (attn.to_q, attn.norm_q, attn.add_q_proj, attn.norm_added_q),
                (attn.to_k, attn.norm_k, attn.add_k_proj, attn.norm_added_k),
                (attn.to_v, None, attn.add_v_proj, None),
            )
        )
        out = F.scaled_dot_product_attention(query, key, value)
        out = out + 0.0 * F.scaled_dot_product_attention(query, key[:, :, :9], value[:, :, :9])
        out = out.transpose(1, 2).flatten(2)
        return attn.to_out[0](out[:, : image.shape[1]]), attn.to_add_out(out[:, image.shape[1] :])


def test_a_processor_that_attends_twice_is_refused():
    """The second call would overwrite the first one's map."""
    model = small_transformer()
    model.transformer_blocks[1].attn.set_processor(CallsTwice())
    message = "transformer: block 1 calls its attention twice in a pass"
    with pytest.raises(RuntimeError, match=message), capture(model, TOKENS):
        model(**small_inputs())
    with capture(model, TOKENS, layers=[0, 2]) as maps:
        model(**small_inputs())
    assert maps.read().isfinite().all()


def test_a_processor_that_is_set_inside_a_capture_stays():
    model = small_transformer()
    before = dict(model.attn_processors)
    mine = JointAttnProcessor2_0()
    with capture(model, TOKENS):
        model.transformer_blocks[1].attn.processor = mine
    after = {**before, "transformer_blocks.1.attn.processor": mine}
    assert all(model.attn_processors[name] is processor for name, processor in after.items())


def test_a_buffer_of_ids_that_is_written_again_shows_its_new_grid():
    model, grids = small_flux(), [(3, 5), (5, 3)]
    ids = flux_inputs(grid=grids[0])["img_ids"].clone()
    with capture(model, TOKENS) as maps, torch.no_grad():
        for grid in grids:
            inputs = flux_inputs(grid=grid)
            model(**inputs | {"img_ids": ids.copy_(inputs["img_ids"])})
            assert maps.grid == grid


@pytest.mark.parametrize("steps", [[True, False], torch.tensor([True, False]), [0.5], 1])
def test_steps_of_a_record_are_numbers_of_passes(steps):
    model = small_transformer()
    with record(model, TOKENS) as recorded:
        for _ in range(2):
            model(**small_inputs())
    with pytest.raises(TypeError, match=r"steps: got .*, expected numbers of passes"):
        recorded.weights(steps=steps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(allocation="random"), "allocation: got 'random', expected an Allocation"),
        (dict(allocation=Allocation(noise_window=0.5)), "noise_window: got 0.5, expected two numbers"),
    ],
)
def test_wrong_allocations_are_one_line(options, message):
    with pytest.raises(TypeError, match=message), allocated(small_transformer(), TOKENS, **options):
        pass


def test_the_passes_of_a_record_have_one_grid():
    model = small_transformer()
    with (
        torch.no_grad(),
        record(model, TOKENS) as recorded,
        pytest.raises(ValueError, match=r"grid: got a pass with \(2, 4\) after one with \(3, 5\)"),
    ):
        model(**small_inputs())
        model(**small_inputs(grid=(2, 4)))
    assert len(recorded.maps) == 1


@pytest.mark.parametrize("build", ["sd3", "flux"])
@pytest.mark.parametrize("return_dict", [False, True])
def test_allocated_keeps_the_output_and_weights_its_gradient(build, return_dict):
    model, inputs = (small_transformer(), small_inputs(4)) if build == "sd3" else (small_flux(), flux_inputs(4))
    rows = slice(2, 4)  # as if the first half were unconditional
    run = lambda: model(**inputs, return_dict=return_dict)[0]
    outside = torch.randn_like(run().detach())
    with capture(model, TOKENS, grid=GRID, rows=rows) as maps:
        expected = run()
    weights = allocate(maps.read(), GRID, patch=2 if build == "sd3" else 1).repeat(2, 1, 1)
    factor = weights[:, None] if build == "sd3" else weights.flatten(1)[..., None]
    with allocated(model, TOKENS, grid=GRID, rows=rows):
        output = run()
    assert torch.equal(output, expected)
    parameters = [p for n, p in model.named_parameters() if n.endswith(("to_q.weight", "proj_out.weight"))]
    gradient = lambda out, outside: torch.autograd.grad((out * outside).sum(), parameters, retain_graph=True)
    got, plain = gradient(output, outside), gradient(expected, outside)
    for a, b in zip(got, gradient(expected, outside * factor), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())
    assert not any(torch.allclose(a, b, rtol=1e-2) for a, b in zip(got, plain, strict=True))
    assert not model._forward_hooks


@pytest.mark.parametrize("first_pass", [False, True])
def test_allocated_over_two_passes_of_guidance(first_pass):
    model, conditional = small_transformer(), small_inputs()
    unconditional = conditional | dict(encoder_hidden_states=torch.zeros_like(conditional["encoder_hidden_states"]))
    found = []
    for inputs in (conditional, unconditional):
        with capture(model, TOKENS, grid=GRID) as maps:
            model(**inputs)
        found.append(allocate(maps.read(), GRID)[:, None])
    with allocated(model, TOKENS, grid=GRID, first_pass=first_pass):
        outputs = [model(**inputs)[0] for inputs in (conditional, unconditional)]
    factor = [found[0], found[0 if first_pass else 1]]
    for output, inputs, w in zip(outputs, (conditional, unconditional), factor, strict=True):
        weight = model.proj_out.weight
        (got,), (expected,) = (torch.autograd.grad(x, weight) for x in (output.sum(), (model(**inputs)[0] * w).sum()))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("first_pass", [False, True])
def test_random_weights_are_those_of_the_first_pass_or_new(first_pass):
    model, inputs = small_transformer(), small_inputs()
    with allocated(model, TOKENS, grid=GRID, allocation=Allocation(strategy="random"), first_pass=first_pass):
        outputs = [model(**inputs)[0] for _ in range(2)]
    one, other = (torch.autograd.grad(output.sum(), model.proj_out.weight)[0] for output in outputs)
    assert torch.equal(one, other) == first_pass


@pytest.mark.parametrize("build", ["sd3", "flux"])
def test_prompts_and_a_pipeline_are_their_tokens(build):
    prompts = ["a red bench left of two green cats", "a dog"]
    if build == "sd3":
        pipeline = small_sd35(prompts)
        with torch.no_grad():
            embeds, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        inputs = dict(hidden_states=torch.randn(2, 16, 6, 10), encoder_hidden_states=embeds, pooled_projections=pooled)
        inputs["timestep"] = torch.full((2,), 500.0)
        shape = (2, 1, 6, 10)
    else:
        pipeline = FluxPipeline(
            transformer=small_flux(), tokenizer=clip_tokenizer(prompts), tokenizer_2=t5_tokenizer(prompts),
            scheduler=None, vae=None, text_encoder=None, text_encoder_2=None,
        )  # fmt: skip
        inputs = flux_inputs() | dict(encoder_hidden_states=torch.randn(2, 512, 24), txt_ids=torch.zeros(512, 3))
        shape = (2, 1, N)
    model, tokens = pipeline.transformer, concept_tokens(pipeline, prompts)
    with torch.no_grad(), record(model, prompts, pipeline) as by_prompts:
        model(**inputs)
    with torch.no_grad(), record(model, tokens) as by_tokens:
        model(**inputs)
    assert torch.equal(by_prompts.maps[0], by_tokens.maps[0]) and by_prompts.weights().shape == shape
    gradients = []
    for arguments in ((prompts, pipeline), (tokens,)):
        with allocated(model, *arguments):
            output = model(**inputs)[0]
        gradients.append(torch.autograd.grad(output.square().sum(), model.proj_out.weight)[0])
    (plain,) = torch.autograd.grad(model(**inputs)[0].square().sum(), model.proj_out.weight)
    assert torch.equal(*gradients) and not torch.allclose(gradients[0], plain, rtol=1e-3)
    for context in (record, allocated):
        with pytest.raises(ValueError, match="pipeline: got None"), context(model, prompts):
            pass
        with (
            pytest.raises(ValueError, match="pipeline: got one together with Concept"),
            context(model, tokens, pipeline),
        ):
            pass


def test_allocated_as_a_decorator_in_no_grad_and_with_other_strategies():
    model, inputs = small_transformer(), small_inputs()
    plain = model(**inputs)[0]
    decorated = allocated(model, TOKENS, grid=GRID)(lambda: model(**inputs)[0])
    assert torch.equal(decorated(), plain)
    with torch.no_grad(), allocated(model, TOKENS, grid=GRID) as maps:
        assert not model(**inputs)[0].requires_grad
    assert maps.read().shape == (2, 2, N)
    for strategy in ("shuffled", "oracle", "uniform"):
        refused = allocated(model, TOKENS, grid=GRID, allocation=Allocation(strategy=strategy))
        with pytest.raises(ValueError, match=f"allocation: got strategy '{strategy}'"), refused:
            pass


def test_only_joint_attention_of_the_chosen_blocks_is_touched_and_all_is_restored():
    model, inputs = small_transformer(), small_inputs()
    before = [p for b in model.transformer_blocks for p in (b.attn.processor, b.attn2 and b.attn2.processor)]
    with pytest.raises(KeyError), capture(model, TOKENS, grid=GRID, layers=[0, 2]):
        assert [isinstance(b.attn.processor, Tapped) for b in model.transformer_blocks] == [True, False, True]
        assert type(model.transformer_blocks[0].attn2.processor) is JointAttnProcessor2_0
        model(**inputs)
        raise KeyError
    after = [p for b in model.transformer_blocks for p in (b.attn.processor, b.attn2 and b.attn2.processor)]
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_gradient_checkpointing_gives_the_same_maps_and_gradients_and_takes_maps_once(monkeypatch):
    taken = []
    original = Maps.write
    monkeypatch.setattr(Maps, "write", lambda *a, **k: taken.append(1) or original(*a, **k))
    results = []
    for checkpointing in (False, True):
        model, inputs = small_transformer(), small_inputs()
        if checkpointing:
            model.enable_gradient_checkpointing()
        taken.clear()
        with capture(model, TOKENS, grid=GRID) as maps:
            out = model(**inputs, return_dict=False)[0]
            first = maps.read()
            # A newer forward pass must not be overwritten by the recomputation of the older one.
            with torch.no_grad():
                model(**{**inputs, "timestep": inputs["timestep"] / 2})
            newer = maps.read()
            out.square().sum().backward()
            assert torch.equal(maps.read(), newer) and not torch.equal(first, newer)
        assert len(taken) == 6
        results.append((first, *(p.grad for p in model.parameters() if p.grad is not None)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_a_backward_pass_outside_the_context_gives_the_gradients_of_no_capture(kind, checkpointing):
    """A checkpointed block is then computed again by diffusers' own processor, which must save the same tensors."""
    results = []
    for captured in (False, True):
        model, inputs = (small_transformer(), small_inputs()) if kind == "sd3" else (small_flux(), flux_inputs())
        if checkpointing:
            model.enable_gradient_checkpointing()
        layers = range(len(model.transformer_blocks) + len(getattr(model, "single_transformer_blocks", ())))
        with capture(model, TOKENS, grid=GRID, layers=layers) if captured else nullcontext() as maps:
            out = model(**inputs, return_dict=False)[0]
        out.square().sum().backward()
        assert not captured or bool((maps.slots > 0).any((1, 2, 3)).all())
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_adapters_are_part_of_the_policy_that_is_read():
    model, inputs = small_transformer(), small_inputs()
    model.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["attn.to_q", "attn.add_k_proj"]))

    def read():
        with torch.no_grad(), capture(model, TOKENS, grid=GRID) as maps:
            model(**inputs)
        return maps.read()

    on = read()
    model.disable_adapters()
    off = read()
    model.enable_adapters()
    # PEFT's own wrapper around the same kind of model.
    wrapped = get_peft_model(small_transformer(), LoraConfig(r=4, target_modules=["attn.to_q"]))
    with torch.no_grad(), capture(wrapped, TOKENS) as maps:
        wrapped(**inputs)
    torch.testing.assert_close(maps.read(), off)  # a new adapter changes nothing
    assert not torch.equal(on, off) and torch.equal(read(), on)


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models(whole):
    model, inputs = small_transformer(layers=2), small_inputs()
    with torch.no_grad(), capture(model, TOKENS, grid=GRID) as maps:
        expected = model(**inputs, return_dict=False)[0]
        read = maps.read()
        maps.slots.zero_()
        torch._dynamo.reset()
        if whole:
            got = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs, return_dict=False)[0]
        else:
            for block in model.transformer_blocks:
                block.compile(backend="aot_eager", fullgraph=True)
            got = model(**inputs, return_dict=False)[0]
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(maps.read(), read)


def test_a_compiled_model_with_checkpointing_keeps_newer_maps():
    model, inputs = small_transformer(layers=2), small_inputs()
    model.enable_gradient_checkpointing()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with capture(compiled, TOKENS, grid=GRID) as maps:
        out = compiled(**inputs, return_dict=False)[0]
        first = maps.read()
        maps.slots.zero_()
        out.sum().backward()
        assert (maps.slots == 0).all()
    with torch.no_grad(), capture(model, TOKENS, grid=GRID) as plain:
        model(**inputs)
    torch.testing.assert_close(first, plain.read())


class FluxRecorder:
    """Keeps the queries and keys of FLUX's attention, after norms and rotary embedding."""

    def __init__(self, monkeypatch):
        self.calls, original = [], F.scaled_dot_product_attention

        def attend(query, key, value, *args, **options):
            self.calls.append((query.double(), key.double()))
            return original(query, key, value, *args, **options)

        monkeypatch.setattr(F, "scaled_dot_product_attention", attend)


@pytest.mark.parametrize("lse", [True, False])
def test_flux_maps_are_the_materialized_attention(monkeypatch, lse):
    model, inputs = small_flux(), flux_inputs()
    recorder = FluxRecorder(monkeypatch)
    with torch.no_grad():
        model(**inputs)
        calls = list(recorder.calls)
        with capture(model, TOKENS, grid=GRID, layers=range(4), lse=lse) as maps:
            model(**inputs)
    assert len(calls) == 4 and len(recorder.calls) == 4
    for layer, (query, key) in enumerate(calls):
        scores = query[:, :, TEXT:] @ key.mT / query.shape[-1] ** 0.5
        text = torch.softmax(scores, -1).mean(1)[..., :TEXT]
        expected = torch.stack([text[..., 1], (text[..., 2] + text[..., 4]) / 2], 1)
        torch.testing.assert_close(maps.layers()[layer].double(), expected, rtol=1e-4, atol=1e-7)


def test_flux_takes_double_stream_blocks_by_default():
    model, inputs = small_flux(), flux_inputs()
    with torch.no_grad(), capture(model, TOKENS, grid=GRID) as maps:
        model(**inputs)
    assert len(maps.layers()) == 2
    with (
        torch.no_grad(),
        capture(model, concepts([TEXT]), grid=GRID),
        pytest.raises(ValueError, match=f"tokens: got text token {TEXT}, expected at most {TEXT - 1}"),
    ):
        model(**inputs)


def test_open_slices_of_rows():
    model, inputs = small_transformer(), small_inputs(2)
    tokens = concepts([1], batch=1)
    found = []
    for rows in (slice(1, 2), slice(1, None), slice(-1, None), [1]):
        with torch.no_grad(), capture(model, tokens, grid=GRID, rows=rows) as maps:
            model(**inputs)
        found.append(maps.read())
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_gathered_rows_and_rows_that_are_not_there():
    model, inputs = small_transformer(), small_inputs(3)
    found = []
    for rows in ([0, 1, 2], [2, 0]):
        tokens = concepts([1], batch=len(rows))
        with torch.no_grad(), capture(model, tokens, grid=GRID, rows=rows) as maps:
            model(**inputs)
        found.append(maps.read())
    assert torch.equal(found[0][[2, 0]], found[1])
    with (
        torch.no_grad(),
        capture(model, TOKENS, grid=GRID, rows=slice(2, 4)) as maps,
        pytest.raises(ValueError, match=r"rows: got \[2\] of the 3 rows of the pass, expected one for each of the 2"),
    ):
        model(**inputs)


# --- what a pass shows: its grid and its rows -------------------------------------------------------------------------


def guided(inputs: dict[str, Tensor], images: int) -> dict[str, Tensor]:
    """The batch of guidance: the same latents twice, an empty text in the first half."""
    inputs = {name: x[:images] if len(x) == 2 * images else x for name, x in inputs.items()}
    double = {name: torch.cat([x, x]) for name, x in inputs.items() if len(x) == images}
    double["encoder_hidden_states"] = double["encoder_hidden_states"].clone()
    double["encoder_hidden_states"][:images] = 0.5
    return inputs | double


@pytest.mark.parametrize(("build", "make"), [(small_transformer, small_inputs), (small_flux, flux_inputs)])
@pytest.mark.parametrize("compiled", [False, True])
def test_grid_and_rows_are_what_the_pass_shows(build, make, compiled):
    model, inputs = build(), guided(make(4), 2)
    flux = build is small_flux
    grid = GRID if compiled and flux else None  # the values of img_ids are unknown to a compiler
    torch._dynamo.reset()
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    with torch.no_grad():
        with capture(run, TOKENS, grid=GRID, rows=slice(2, 4)) as given:
            run(**inputs)
        with capture(run, TOKENS, grid=grid) as inferred:
            assert inferred.grid is None
            run(**inputs)
            first = inferred.read()
            assert inferred.grid == GRID and inferred.rows == slice(2, 4)
            run(**(make() | dict(hidden_states=inputs["hidden_states"][:2])))
            assert inferred.rows == slice(0, 2)
    torch.testing.assert_close(first, given.read())
    assert not torch.equal(inferred.read(), first)


@pytest.mark.parametrize("grid", [(5, 3), (1, 15), (4, 4)])
@pytest.mark.parametrize(("build", "make"), [(small_transformer, small_inputs), (small_flux, flux_inputs)])
def test_a_grid_that_the_pass_does_not_have_is_refused(build, make, grid):
    words = rf"grid: got \({grid[0]}, {grid[1]}\), expected \(rows, columns\) = \(3, 5\)"
    for context in (capture, record, allocated):
        model = build()
        with torch.no_grad(), pytest.raises(ValueError, match=words), context(model, TOKENS, grid=grid):
            model(**make())
        assert not model._forward_pre_hooks


def test_the_grid_of_packed_latents_is_that_of_diffusers_ids():
    model, inputs = small_flux(), flux_inputs()
    ids = inputs["img_ids"]
    for shown in (ids.bfloat16(), ids[None]):
        with torch.no_grad(), capture(model, TOKENS) as maps:
            model(**(inputs | dict(img_ids=shown)))
        assert maps.grid == GRID
    for other in (ids / 15, ids.flip(0), ids + 0.25, ids * torch.tensor([0.0, 2.0, 2.0]), ids * torch.nan):
        with (
            torch.no_grad(),
            capture(model, TOKENS) as maps,
            pytest.raises(
                ValueError, match=r"grid: got None, which the pass does not show; give \(rows, columns\) of its 15"
            ),
        ):
            model(**(inputs | dict(img_ids=other)))
    with torch.no_grad(), capture(model, TOKENS, grid=GRID) as maps:
        model(**(inputs | dict(img_ids=ids / 15)))
    assert maps.read().isfinite().all()


def test_a_batch_of_several_images_for_each_row_of_tokens_is_refused():
    model, tokens = small_transformer(), concepts([1], batch=1)
    four = guided(small_inputs(4), 2)
    # Two images of one prompt, from one noise: the same latents, but not guidance.
    two_of_a_prompt = {name: x[:1].expand(2, *x.shape[1:]) for name, x in small_inputs(2).items()}
    for rows, inputs, words in (
        (None, four, r"tokens: got 1 rows, expected 4, one for each row of the pass, or 2 with guidance"),
        (slice(1, 2), four, r"rows: got \[1\], but the pass guides 2 images and its first 2 rows are unconditional"),
        (None, small_inputs(2), "tokens: got 1 rows, the pass has 2 and no guidance"),
        (None, two_of_a_prompt, "tokens: got 1 rows, the pass has 2 and no guidance"),
        (None, small_inputs(3), "tokens: got 1 rows, expected 3, one for each row of the pass"),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match=words), capture(model, tokens, rows=rows):
            model(**inputs)
    words = "tokens: got 2 rows, the pass has 4 and no guidance"
    with torch.no_grad(), capture(model, TOKENS), pytest.raises(ValueError, match=words):
        model(**four)
        model(**small_inputs(4))  # each pass is looked at
    for rows in ([3], [2]):  # one of the conditional rows
        with torch.no_grad(), capture(model, tokens, rows=rows) as maps:
            model(**four)
        assert maps.read().isfinite().all()


@pytest.mark.parametrize("rows", [[1, 0], [1, 3], slice(1, 3), [0, 3]])
def test_weights_need_all_conditional_rows_one_after_the_other(rows):
    model, inputs = small_transformer(), small_inputs(4)
    words = r"rows: got .* of 4, expected all conditional rows"
    with pytest.raises(ValueError, match=words), allocated(model, TOKENS, rows=rows):
        model(**inputs)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_skipped_block_has_no_map(compiled):
    model, inputs = small_transformer(), small_inputs()
    torch._dynamo.reset()
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    with torch.no_grad(), capture(run, TOKENS, layers=[1, 0]) as maps:
        with pytest.raises(RuntimeError, match=r"maps: no pass has run the captured blocks \[1, 0\]"):
            maps.read()
        run(**inputs)
        kept, before = maps.read(), maps.layers()
        run(**inputs, skip_layers=[1])
        after = maps.layers()
        assert after[0].isnan().all() and torch.equal(after[1], before[1]) and kept.isfinite().all()
        with pytest.raises(RuntimeError, match=r"layers: the last pass skipped blocks \[1\], which have no maps"):
            maps.read()
        model(**inputs, skip_layers=[0, 1])  # torch.compile takes this list for the shorter one, captured or not
        with pytest.raises(
            RuntimeError, match=r"layers: the last pass skipped blocks \[1, 0\], .* or disable the cache"
        ):
            maps.read()
        run(**inputs)
        assert torch.equal(maps.read(), kept)
    with torch.no_grad(), record(model, TOKENS, layers=[0, 2]) as recorded:
        model(**inputs, skip_layers=[1])
    assert recorded.maps[0].isfinite().all()


def test_normalizations():
    model, inputs = small_transformer(), small_inputs()

    def layers(normalize):
        with torch.no_grad(), capture(model, TOKENS, grid=GRID, normalize=normalize) as maps:
            model(**inputs)
        return maps.layers()

    raw, content, shares = (layers(name) for name in ("raw", "content", "concepts"))
    mass = raw * torch.tensor([1.0, 2.0])[:, None]  # weights are 1 / (number of tokens): back to mass
    torch.testing.assert_close(content * mass.sum(2, keepdim=True), raw)
    torch.testing.assert_close(shares, raw / raw.sum(2, keepdim=True))


def test_layers_and_their_weights():
    model, inputs = small_transformer(), small_inputs()
    with torch.no_grad(), capture(model, TOKENS, grid=GRID) as every:
        model(**inputs)
    with torch.no_grad(), capture(model, TOKENS, grid=GRID, layers=[2, 0], layer_weights=[0.25, 0.75]) as some:
        model(**inputs)
    torch.testing.assert_close(some.read(), 0.25 * every.layers()[2] + 0.75 * every.layers()[0])


def test_head_weights():
    model, inputs = small_transformer(), small_inputs()
    single = []
    for head in range(HEADS):
        weight = torch.zeros(HEADS)
        weight[head] = 1.0
        with torch.no_grad(), capture(model, TOKENS, grid=GRID, head_weight=weight) as maps:
            model(**inputs)
        single.append(maps.read())
    with torch.no_grad(), capture(model, TOKENS, grid=GRID) as maps:
        model(**inputs)
    torch.testing.assert_close(sum(single) / HEADS, maps.read())
    assert not torch.allclose(single[0], single[1])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(layers=[3]), ValueError, r"layers: got \[3\], expected distinct blocks in 0..2"),
        (dict(layers=[0], layer_weights=[1.0, 2.0]), ValueError, "layer_weights: got 2, expected one for each of 1"),
        (dict(layers=1), TypeError, "layers: got 1, expected numbers of blocks"),
        (dict(layers=[0.5]), TypeError, "layers: got float, expected numbers of blocks"),
        (dict(layer_weights=[-1.0, 1.0, 1.0]), ValueError, r"layer_weights: got \[-1.0, 1.0, 1.0\], expected finite"),
        (dict(layer_weights=[0, 0, 0]), ValueError, r"layer_weights: .* expected finite numbers >= 0, not all 0"),
        (dict(layer_weights=[float("nan"), 1, 1]), ValueError, r"layer_weights: .* expected finite numbers"),
        (dict(layer_weights=1.0), ValueError, r"layer_weights: got 1.0, expected one for each of 3 layers"),
        (
            dict(layer_weights=["a", "b", "c"]),
            TypeError,
            r"layer_weights: got \['a', 'b', 'c'\], expected one for each",
        ),
        (dict(head_weight=[0.5, 0.5]), TypeError, r"head_weight: got list, expected a tensor \(H,\)"),
        (dict(rows=0), TypeError, "rows: got 0, expected numbers of rows, or a slice"),
        (dict(rows=[0.0, 1.0]), TypeError, "rows: got float, expected numbers of rows, or a slice"),
        (dict(rows=torch.ones(2).bool()), TypeError, "rows: got a tensor of booleans, expected numbers of rows"),
        (dict(grid=15), TypeError, r"grid: got 15, expected \(rows, columns\)"),
        (dict(normalize="minmax"), ValueError, "normalize: got 'minmax'"),
        (dict(tokens=None), TypeError, "tokens: got NoneType, expected ConceptTokens; star.concept_tokens makes"),
        (dict(tokens=(TOKENS.index.int(), TOKENS.weight)), TypeError, "tokens: got an index of torch.int32 and"),
        (
            dict(tokens=(TOKENS.index, TOKENS.weight[:, :1])),
            ValueError,
            r"tokens: got .* weights \(2, 1, 2\), expected",
        ),
    ],
)
def test_bad_arguments_are_one_clear_line(change, error, words):
    with pytest.raises(error, match=words), capture(small_transformer(), **{"tokens": TOKENS, "grid": GRID, **change}):
        pass


def test_refusals_name_the_reason():
    with pytest.raises(TypeError, match="transformer: got AutoencoderKL, expected one of SD3Transformer2DModel, Flux"):
        capture(AutoencoderKL(), TOKENS, grid=GRID).__enter__()
    model = small_transformer()
    adapter = SD3IPAdapterJointAttnProcessor2_0(
        hidden_size=32, ip_hidden_states_dim=8, head_dim=16, timesteps_emb_dim=8
    )
    for processor, reason in (
        (AttnProcessor(), "calls neither dispatch_attention_fn nor"),
        (JointAttnProcessor2_0.__call__, "has a __call__ that is no plain function"),
        (DecoratedProcessor(), "has a __call__ that is no plain function"),
        (adapter, "has weights and attention of its own, as IP-Adapters do; unload it, or set"),
    ):
        model.transformer_blocks[1].attn.processor = processor
        with pytest.raises(TypeError, match=f"block 1: a {type(processor).__name__} {reason}"):
            capture(model, TOKENS, grid=GRID).__enter__()
    model = small_transformer()
    with (
        capture(model, TOKENS, grid=GRID),
        pytest.raises(TypeError, match="block 0 is captured already"),
        capture(model, TOKENS, grid=GRID),
    ):
        pass
    with (
        torch.no_grad(),
        capture(model, TOKENS, grid=(4, 4)),
        pytest.raises(ValueError, match=r"grid: got \(4, 4\), expected \(rows, columns\) = \(3, 5\)"),
    ):
        model(**small_inputs())


def distributed_rank(rank: int, folder: str, kind: str) -> None:
    """One of two processes: half of the batch under DistributedDataParallel, then with sharded parameters."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    half = {name: value[rank : rank + 1] for name, value in small_inputs(2).items()}
    tokens = concepts([1], [2, 4], batch=1)
    # The text stream of the last block has no gradient, which DDP would wait for.
    model = small_transformer(layers=2)
    model.enable_gradient_checkpointing()
    if kind == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for block in model.transformer_blocks:
            fully_shard(block, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    with capture(wrapped, tokens) as maps:
        wrapped(**half, return_dict=False)[0].square().mean().backward()
    gradient = model.transformer_blocks[0].attn.to_q.weight.grad
    saved = (maps.read(), gradient.full_tensor() if kind == "fsdp" else gradient)
    torch.save(saved, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    # Nothing is destroyed: DDP may wait forever for gloo's thread, which waits for the interpreter that DDP holds.
    os._exit(0)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes(kind, tmp_path):
    if kind == "fsdp" and not hasattr(torch.cpu.Stream, "record_event"):
        skip_without("torch", "fully_shard on the CPU")
    torch.multiprocessing.spawn(distributed_rank, (str(tmp_path), kind), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    model, inputs = small_transformer(layers=2), small_inputs(2)
    with capture(model, TOKENS, grid=GRID) as maps:
        model(**inputs, return_dict=False)[0].square().mean().backward()
    gradient = model.transformer_blocks[0].attn.to_q.weight.grad
    torch.testing.assert_close(torch.cat([rank_maps for rank_maps, _ in ranks]), maps.read())
    for _, rank_gradient in ranks:
        if kind == "fsdp" and numbers(torch.__version__) < (2, 9):
            rank_gradient = rank_gradient / 2  # its fully_shard adds what newer ones average, over gloo
        torch.testing.assert_close(rank_gradient, gradient)


def test_a_deep_copy_is_neither_weighted_nor_recorded():
    """Of a model for an average or a reference: it takes the hooks along, and outlives the context."""
    model, inputs = small_transformer(), small_inputs()
    with allocated(model, TOKENS, grid=GRID):
        early = deepcopy(model)
        model(**inputs)
        late = deepcopy(model)
    plain = torch.autograd.grad(model(**inputs).sample.square().sum(), next(iter(model.parameters())))
    for twin in (early, late):
        own = torch.autograd.grad(twin(**inputs).sample.square().sum(), next(iter(twin.parameters())))
        assert torch.equal(own[0], plain[0])
    with torch.no_grad(), record(model, TOKENS, grid=GRID) as recorded:
        model(**inputs)
        twin = deepcopy(model)
    with torch.no_grad():
        twin(**inputs)
    assert len(recorded.maps) == 1


def test_autocast_leaves_float64_alone_with_capture_as_without():
    model = small_transformer().double()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in small_inputs().items()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = model(**inputs).sample
        with capture(model, TOKENS, grid=GRID):
            assert torch.equal(model(**inputs).sample, plain)
