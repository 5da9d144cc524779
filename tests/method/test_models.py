"""Every class of models that maps are captured from, tiny: what it computes, its maps, and what is done with them."""

import diffusers
import numpy
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend

from builders import TEXT
from models import CASES, Case, class_name, seeded, small_hunyuan_image, small_hunyuan_image_2, small_wan
from star.capture import allocated, capture, record
from star.concepts import ConceptTokens
from star.layouts import LAYOUTS, REFUSED, Layout, Pass, _grid_of_ids, layout_of
from star_kernels import allocate
from versions import module_or_skip

WHOLLY = ("sd3", "qwen_image", "wan")  # compiled with the backward pass, and for the rollout too: one of each kind
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def qwen_image_21():
    return module_or_skip("diffusers.models.transformers.transformer_qwenimage21")


def tokens_of(batch: int) -> ConceptTokens:
    """The first image has two concepts of one and two text tokens, the others one of three."""
    index = torch.full((batch, 2, 3), -1)
    index[:, 0] = torch.tensor([1, 2, 3])
    index[0, 0], index[0, 1] = torch.tensor([1, -1, -1]), torch.tensor([2, 0, -1])
    weight = (index >= 0).float()
    return ConceptTokens(index, weight / weight.sum(-1, keepdim=True).clamp_min(1))


def output(model, inputs) -> torch.Tensor:
    """A pass's output; Z-Image's is a list."""
    out = model(**inputs, return_dict=False)[0]
    return torch.stack(out) if isinstance(out, list) else out


def attention_calls(model, inputs, monkeypatch) -> list[tuple]:
    """(query, key, mask) of every call of F.scaled_dot_product_attention in a pass, in float64."""
    calls, attend = [], F.scaled_dot_product_attention

    def recorded(query, key, value, attn_mask=None, **options):
        calls.append((query.double(), key.double(), attn_mask))
        return attend(query, key, value, attn_mask=attn_mask, **options)

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(F, "scaled_dot_product_attention", recorded)
        output(model, inputs)
    return calls


def materialized(case: Case, calls, tokens) -> torch.Tensor:
    """(L, B, G, N): the softmax over all keys of every captured attention, its columns picked one at a time."""
    maps, count = [], torch.Size(case.grid).numel()
    for query, key, mask in calls[slice(*case.calls)]:
        scores = query @ key.mT / query.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        p = scores.softmax(-1).mean(1)[:, case.image : case.image + count]
        if isinstance(case.text, int):
            keys = tokens.index.clamp_min(0).flatten(1) + case.text
        else:
            keys = torch.tensor(case.text).gather(1, tokens.index.clamp_min(0).flatten(1))
        columns = p.gather(2, keys[:, None].expand(-1, count, -1))
        weighted = columns.unflatten(2, tokens.index.shape[1:]) * tokens.weight[:, None]
        maps.append(weighted.masked_fill(tokens.index[:, None] < 0, 0).sum(-1).mT)
    return torch.stack(maps)


def every_attention(model) -> range:
    return range(len(layout_of(model).attentions(model)))


@each_case
@pytest.mark.parametrize("lse", [True, False])
def test_the_output_keeps_its_bits_and_the_maps_are_the_softmax(case, lse, monkeypatch):
    model, inputs, tokens = seeded(case.build), case.inputs(2, case.grid), tokens_of(2)
    calls = attention_calls(model, inputs, monkeypatch)
    with torch.no_grad():
        expected = output(model, inputs)
        with capture(model, tokens, layers=every_attention(model), lse=lse) as maps:
            assert torch.equal(output(model, inputs), expected)
        assert torch.equal(output(model, inputs), expected)
    assert maps.grid == case.grid
    torch.testing.assert_close(
        maps.layers().double(), materialized(case, calls, tokens), rtol=1e-4, atol=1e-7, check_dtype=False
    )


@each_case
def test_the_model_itself_says_where_image_and_text_lie(case, monkeypatch):
    """What changes with a text token is its key, what changes with a patch of the latents its query."""
    model, inputs = seeded(case.build), case.inputs(2, case.grid)
    shown = layout_of(model).reader(model)(inputs.get)
    first = lambda: attention_calls(model, inputs, monkeypatch)[slice(*case.calls)][0]
    query, key, _ = first()
    most = lambda new, old: (new - old)[0].square().sum((0, 2)).argmax().item()
    for token in (0, 1, len(shown.embeds[0]) - 1):
        text = shown.embeds[0][token]
        before = text.clone()
        text.copy_(-before)
        assert most(first()[1], key) == shown.columns(torch.full((2, 1, 1), token), slice(None))[0].item()
        text.copy_(before)
    for token in (0, shown.grid[-1], shown.tokens - 1):
        patch = patch_of(shown.latents[0], shown.grid, token)
        before = patch.clone()
        patch.copy_(torch.randn_like(patch) * 3)
        assert most(first()[0], query) == shown.image + token
        patch.copy_(before)


def patch_of(latents, grid, token: int) -> torch.Tensor:
    """A view of an image's latents, packed or (C, [frames,] height, width), that has the token."""
    if latents.ndim == 2:
        return latents[token]
    latents = latents.view(len(latents), *latents.shape[-len(grid) :])
    found = [slice(None)]
    for location, size, count in zip(numpy.unravel_index(token, grid), latents.shape[1:], grid, strict=True):
        found.append(slice(location * (size // count), (location + 1) * (size // count)))
    return latents[tuple(found)]


@pytest.mark.parametrize(
    "name",
    ["flux", "flux2", "qwen_image_masked", "z_image_masked", "wan", "ltx", "chroma_masked", "hunyuan_video_15", "ltx2"],
)
def test_another_backend_keeps_its_bits(name, monkeypatch):
    """It runs through diffusers' dispatcher as it would, and gives no log-sum-exp."""
    attention_dispatch = module_or_skip("diffusers.models.attention_dispatch")
    case = CASES[name]
    model, inputs, tokens = seeded(case.build), case.inputs(2, case.grid), tokens_of(2)
    calls = attention_calls(model, inputs, monkeypatch)
    with torch.no_grad():
        native = output(model, inputs)
        for attention in layout_of(model).attentions(model):  # set_attention_backend would change it for every model
            attention.processor._attention_backend = "_native_math"
        asked, dispatch = [], attention_dispatch.dispatch_attention_fn
        monkeypatch.setattr(
            attention_dispatch,
            "dispatch_attention_fn",
            lambda *args, **options: asked.append(options["backend"]) or dispatch(*args, **options),
        )
        expected = output(model, inputs)
        with capture(model, tokens, layers=every_attention(model)) as maps:
            assert torch.equal(output(model, inputs), expected)
    assert {str(getattr(one, "value", one)) for one in asked} == {"_native_math"} and not torch.equal(native, expected)
    torch.testing.assert_close(
        maps.layers().double(), materialized(case, calls, tokens), rtol=1e-3, atol=1e-6, check_dtype=False
    )


@each_case
def test_in_bfloat16(case, monkeypatch):
    model, tokens = seeded(case.build).to(torch.bfloat16), tokens_of(2)
    inputs = {name: cast(value) for name, value in case.inputs(2, case.grid).items()}
    calls = attention_calls(model, inputs, monkeypatch)
    with torch.no_grad():
        expected = output(model, inputs)
        with capture(model, tokens, layers=every_attention(model)) as maps:
            assert torch.equal(output(model, inputs), expected)
    # The log-sum-exp of the kernel is of scores in float32, and so are these.
    torch.testing.assert_close(
        maps.layers().double(), materialized(case, calls, tokens), rtol=2e-2, atol=1e-4, check_dtype=False
    )


def cast(value):
    if isinstance(value, list):
        return [cast(one) for one in value]
    return value.to(torch.bfloat16) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@each_case
def test_guidance_reads_the_conditional_half(case):
    """In the order of the class's pipeline; the halves have the same latents and different texts."""
    model, inputs = seeded(case.build), case.inputs(4, case.grid)
    half = layout_of(model).conditional
    latents = "x" if "x" in inputs else "hidden_states"
    for name, value in inputs.items():
        if name == latents:
            inputs[name] = value[:2] * 2 if isinstance(value, list) else torch.cat([value[:2]] * 2)
    tokens = tokens_of(2)
    with torch.no_grad():
        with capture(model, tokens) as maps:
            model(**inputs)
        found = maps.read()
        with capture(model, tokens, rows=slice(2 * half, 2 * half + 2)) as maps:
            model(**inputs)
    assert torch.equal(found, maps.read())


@each_case
def test_gradients_through_checkpointed_blocks_and_an_adapter(case):
    """Of a LoRA adapter, with capture and without, checkpointed and not."""
    if case.build in (small_hunyuan_image, small_hunyuan_image_2):
        pytest.skip("diffusers 0.42's HunyuanImage gives its checkpoints an argument that they do not take")
    if case is CASES["chroma_masked"]:
        pytest.skip("diffusers 0.42's Chroma gives its checkpointed single-stream blocks no mask")
    gradients, found = [], []
    for checkpointing in (False, True):
        for captured in (False, True):
            model = seeded(case.build)
            linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
            modules = sorted(name for name in linear if "attn" in name or "attention" in name)
            torch.manual_seed(3)
            wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=modules, init_lora_weights=False))
            if checkpointing:
                model.enable_gradient_checkpointing()
            model.train()
            context = capture(wrapped, tokens_of(2)) if captured else None
            inputs = case.inputs(2, case.grid)
            if context is None:
                out = output(wrapped, inputs)
            else:
                with context as maps:
                    out = output(wrapped, inputs)
                found.append(maps.read())
            parameters = [p for p in wrapped.parameters() if p.requires_grad]
            gradients.append(torch.autograd.grad(out.square().sum(), parameters, allow_unused=True))
    assert torch.equal(*found)
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            assert a is b is None or torch.equal(a, b)


@each_case
def test_allocated_weights_the_gradient_of_the_image_and_the_video(case):
    """As multiplying what the loss gives the output by the weights; reference images have none."""
    model, inputs, tokens = seeded(case.build), case.inputs(2, case.grid), tokens_of(2)
    parameters = [p for p in model.parameters() if p.requires_grad]
    plain = output(model, inputs)
    packed = plain.ndim == 3
    with allocated(model, tokens) as maps:
        got = output(model, inputs)
    assert torch.equal(got, plain)
    weights = allocate(maps.read(), case.grid, patch=1 if packed else plain.shape[-1] // case.grid[-1])
    torch.testing.assert_close(weights.flatten(1).mean(1), torch.ones(2))
    assert (weights.flatten(1).std(1) > 0.002).all()
    outside = torch.randn_like(plain)
    if packed:
        own = slice(case.output, case.output + weights[0].numel())
        factor = torch.zeros(2, plain.shape[1], 1)
        factor[:, own] = weights.flatten(1)[..., None]
        outside = outside * (factor > 0)
    else:
        factor = weights.view(2, *(1,) * (plain.ndim - weights.ndim), *weights.shape[1:])
    gradient = lambda out, outside: torch.autograd.grad(
        (out * outside).sum(), parameters, allow_unused=True, retain_graph=True
    )
    found, expected, unweighted = gradient(got, outside), gradient(plain, outside * factor), gradient(plain, outside)
    used = [i for i, one in enumerate(expected) if one is not None]
    for i in used:
        torch.testing.assert_close(found[i], expected[i], rtol=1e-3, atol=1e-4 * expected[i].abs().max().item())
    assert not all(torch.allclose(found[i], unweighted[i], rtol=1e-2) for i in used)


@pytest.mark.parametrize("name", ["wan", "ltx", "qwen_image_21_edit"])
def test_a_record_has_weights_of_every_pass(name):
    """Of a video over its frames, of packed latents in a row, whatever else a packed output has."""
    case = CASES[name]
    model, inputs = seeded(case.build), case.inputs(2, case.grid)
    with torch.no_grad(), record(model, tokens_of(2)) as passes:
        output(model, inputs)
        output(model, inputs | dict(timestep=inputs["timestep"] / 2))
    patch = 2 if name == "wan" else 1
    expected = torch.stack([allocate(maps, case.grid, patch=patch) for maps in passes.maps], 1)
    assert passes.grid == case.grid and not torch.equal(*passes.maps)
    assert torch.equal(passes.weights(), expected if name == "wan" else expected.flatten(2))


def test_a_token_of_several_frames_weights_all_of_them():
    model, inputs = seeded(lambda: small_wan(patch_size=(2, 2, 2))), CASES["wan"].inputs(2, (4, 3, 5))
    weights = []
    model.register_forward_hook(lambda module, inputs, output: output[0].register_hook(weights.append) and None)
    with allocated(model, tokens_of(2)) as maps:
        output(model, inputs).sum().backward()  # a gradient of 1, before it is weighted
    expected = allocate(maps.read(), (2, 3, 5)).repeat_interleave(2, 1)
    assert maps.grid == (2, 3, 5) and expected.shape == (2, 4, 6, 10)
    assert torch.equal(weights[0], expected[:, None].expand(-1, 4, -1, -1, -1))


@pytest.mark.parametrize("name", ["hunyuan_image_2", "hunyuan_video_15_image"])
def test_rows_of_a_text_whose_keys_differ(name):
    case = CASES[name]
    model, inputs = seeded(case.build), case.inputs(2, case.grid)
    tokens = tokens_of(2)
    found = []
    for rows in ([0, 1], [1, 0]):
        with torch.no_grad(), capture(model, ConceptTokens(*(x[rows] for x in tokens)), rows=rows) as maps:
            model(**inputs)
        found.append(maps.read()[rows])
    assert torch.equal(*found)


COMPILED = {class_name(case): name for name, case in reversed(CASES.items())}
"""One case of each class: compiling takes most of the time of this file."""


@pytest.mark.parametrize("name", COMPILED.values())
def test_compiled_blocks_share_graphs_and_give_the_same_maps(name):
    """Block by block without a graph break, no more graphs than without capture, in the update and the rollout."""
    case = CASES[name]
    counts, results = {}, []
    inputs, tokens = case.inputs(2, case.grid), tokens_of(2)
    for captured in (False, True):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager" if name in WHOLLY else "eager")
        model = seeded(case.build)
        for block in blocks(model):
            block.compile(backend=counter, fullgraph=True)
        context = capture(model, tokens) if captured else torch.enable_grad()
        with context as maps:
            results.append(output(model, inputs))
            results[-1].square().sum().backward()
            if name in WHOLLY:
                with torch.no_grad():
                    assert torch.equal(output(model, inputs), results[-1])
        counts[captured] = counter.frame_count
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    eager = seeded(case.build)
    with torch.no_grad(), capture(eager, tokens) as expected:
        output(eager, inputs)
    torch.testing.assert_close(maps.read(), expected.read(), rtol=1e-4, atol=1e-6)
    assert counts[True] <= counts[False]


def blocks(model):
    """The modules whose attention is captured by default."""
    layout = layout_of(model)
    attentions = set(map(id, layout.attentions(model)))
    return [m for m in model.modules() if any(id(child) in attentions for child in m.children())]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_row_of_the_table_is_tried(name):
    assert name in {class_name(case) for case in CASES.values()}


def test_what_is_refused_is_told_why():
    """Not a class that has a row, and one of diffusers, where this version has it."""
    known = [name for name in REFUSED if hasattr(diffusers, name)]
    assert len(known) > 3 and not set(REFUSED) & set(LAYOUTS)
    for name in known:
        model = object.__new__(getattr(diffusers, name))
        with pytest.raises(TypeError, match=f"transformer: {name} is not supported: .*; an entry of your own in star"):
            layout_of(model)


def test_position_ids_are_read_whatever_the_default_device_is():
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(3.0))
    with torch.device("meta"):
        assert _grid_of_ids(ids) == (2, 3)


def test_what_a_pass_may_not_have_is_refused():
    """A cache of reference images in FLUX.2, a block mask in Qwen-Image-2.1, images beside the text in Cosmos."""
    model, inputs = seeded(CASES["flux2"].build), CASES["flux2"].inputs(2, (3, 5))
    with capture(model, tokens_of(2)), pytest.raises(ValueError, match="kv_cache_mode: got a mode"):
        model(**inputs, kv_cache_mode="extract", num_ref_tokens=4)
    model, inputs = seeded(CASES["qwen_image_21"].build), CASES["qwen_image_21"].inputs(2, (4, 6))
    for block in model.transformer_blocks:
        block.attn.processor = qwen_image_21().QwenImage21FlexAttnProcessor()
    with torch.no_grad(), capture(model, tokens_of(2)), pytest.raises(TypeError, match="attention_mask: got a BlockMa"):
        model(**inputs)
    model, inputs = seeded(CASES["cosmos"].build), CASES["cosmos"].inputs(2, (2, 3, 5))
    inputs["encoder_hidden_states"] = (inputs["encoder_hidden_states"], None)
    with capture(model, tokens_of(2)), pytest.raises(ValueError, match="encoder_hidden_states: got several"):
        model(**inputs)


def test_a_pass_from_the_cache_of_a_text(monkeypatch):
    """Qwen-Image-2.1 keeps the keys of text and references: later passes run the image's tokens alone."""
    case = CASES["qwen_image_21_edit"]
    model, inputs, tokens = seeded(case.build), case.inputs(2, case.grid), tokens_of(2)
    cache = qwen_image_21().QwenImage21KVCache(2)
    passes = []
    with torch.no_grad(), capture(model, tokens) as maps:
        for mode in ("extract", "cached"):
            out = model(**inputs, kv_cache=cache, kv_cache_mode=mode, return_dict=False)[0]
            passes.append((out[:, -24:], maps.read()))
    torch.testing.assert_close(*passes, rtol=1e-4, atol=1e-5)
    with allocated(model, tokens):
        out = model(**inputs, kv_cache=cache, kv_cache_mode="cached", return_dict=False)[0]
    assert out.shape[1] == 24 and out.requires_grad


def test_tokens_beyond_the_text_are_refused():
    case = CASES["wan"]
    model, tokens = seeded(case.build), ConceptTokens(torch.tensor([[[TEXT]]] * 2), torch.ones(2, 1, 1))
    words = f"tokens: got text token {TEXT}, expected at most {TEXT - 1}"
    with torch.no_grad(), capture(model, tokens), pytest.raises(ValueError, match=words):
        output(model, case.inputs(2, case.grid))


class Mine(torch.nn.Module):
    """A model of a user's own: one attention of image and text by diffusers' modules."""

    def __init__(self):
        super().__init__()
        options = dict(added_kv_proj_dim=16, context_pre_only=False, processor=JointAttnProcessor2_0())
        self.attn = Attention(16, heads=2, dim_head=8, **options)

    def forward(self, latents, text, return_dict=True):
        return (self.attn(latents.flatten(2).mT, encoder_hidden_states=text)[0].mT.unflatten(2, latents.shape[2:]),)


def test_a_row_of_ones_own(monkeypatch):
    def reader(model):
        def read(argument):
            latents, text = argument("latents"), argument("text")
            rows, columns = latents.shape[-2:]
            return Pass(latents, text, rows * columns, (rows, columns), image=0, text=rows * columns)

        return read

    model, inputs = Mine(), dict(latents=torch.randn(2, 16, 3, 5), text=torch.randn(2, TEXT, 16))
    with pytest.raises(TypeError, match=r"transformer: got Mine, expected .* an entry in star\.layouts\.LAYOUTS"):
        capture(model, tokens_of(2)).__enter__()
    monkeypatch.setitem(LAYOUTS, "Mine", Layout(lambda model: [model.attn], reader))
    calls = attention_calls(model, inputs, monkeypatch)
    with torch.no_grad():
        expected = output(model, inputs)
        with capture(model, tokens_of(2)) as maps:
            assert torch.equal(output(model, inputs), expected)
    found = materialized(Case(Mine, lambda *_: inputs, text=15), calls, tokens_of(2))
    torch.testing.assert_close(maps.layers().double(), found, rtol=1e-4, atol=1e-7)
