"""Capture under torch.compile: what stays compiled, what is compiled again, and buffers that keep their addresses."""

from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import star.capture.maps
from builders import GRID, TEXT, flux_inputs, small_flux, small_inputs, small_transformer
from models import CASES
from star.capture import Maps, allocated, capture
from star.concepts import ConceptTokens
from star.layouts import Pass
from versions import built_or_skip, skip_without

N = GRID[0] * GRID[1]


def prompt(number: int, text: int = TEXT, batch: int = 2) -> ConceptTokens:
    """Concepts of a prompt: how many, and of how many tokens, follows its number; most of both at 116."""
    generator = torch.Generator().manual_seed(number)
    groups, slots = 1 + number % 9, 1 + number // 3 % 13
    index = torch.randint(-1, text, (batch, groups, slots), generator=generator)
    return ConceptTokens(index, (index >= 0).float())


class Runs:
    """A backend that counts how often its graphs run."""

    def __init__(self):
        self.count = self.graphs = 0

    def __call__(self, module, inputs):
        self.graphs += 1
        run = aot_eager(module, inputs)

        def counted(*arguments):
            self.count += 1
            return run(*arguments)

        return counted


def test_24_of_24_compiled_blocks_run_compiled_in_the_rollout_and_in_the_update():
    """For several prompts, each with a capture of its own; the graphs are those without capture, once more."""
    torch._dynamo.reset()
    model, inputs, runs = small_transformer(layers=24, dual=()), small_inputs(), Runs()
    for block in model.transformer_blocks:
        block.compile(backend=runs, fullgraph=True)
    found = []
    for number, captured in ((0, False), (1, True), (2, True), (5, True)):
        for context in (torch.no_grad, nullcontext):
            runs.count = 0
            with context(), capture(model, prompt(number)) if captured else nullcontext() as maps:
                try:
                    output = model(**inputs)[0]
                except RuntimeError:  # RecompileLimitExceeded, in torch 2.6
                    if captured:
                        raise
                    skip_without("torch", "one graph for blocks that are alike")
            assert runs.count == 24
            if captured:
                assert maps.layers().isfinite().all()
        output.square().sum().backward()
        found.append((output.detach(), runs.graphs))
    assert all(torch.equal(found[0][0], output) for output, _ in found)
    assert found[1][1] <= 2 * found[0][1] and len({graphs for _, graphs in found[1:]}) == 1


def flat_transformer():
    return small_transformer(layers=2, dual=())


# Of the whole model one capture serves every prompt: another one hangs a hook of its own on the model, into its graph.
@pytest.mark.parametrize(
    ("build", "make", "one_capture", "whole"),
    [
        (flat_transformer, small_inputs, True, False),
        (small_flux, flux_inputs, False, False),
        (flat_transformer, small_inputs, True, True),
    ],
)
def test_50_prompts_of_different_shape_compile_nothing_again(build, make, one_capture, whole):
    """Other numbers of concepts and of their tokens, and texts of other lengths, in the rollout and in the update."""
    lengths = [TEXT + 3 + number % 17 for number in range(50)]
    graphs = []
    for captured in (True,) if whole else (False, True):
        torch._dynamo.reset()
        counter, model = CompileCounter(), build()
        blocks = [model] if whole else model.transformer_blocks  # those that are captured
        for block in blocks:
            block.compile(backend=counter, fullgraph=True, dynamic=True)
        grid = GRID if whole else None
        with capture(model, prompt(0), grid=grid) if captured and one_capture else nullcontext() as one:
            for number, length in enumerate(lengths):
                inputs = make()
                inputs["encoder_hidden_states"] = torch.randn(2, length, 24)
                if "txt_ids" in inputs:
                    inputs["txt_ids"] = torch.zeros(length, 3)
                tokens = prompt(number, length)
                if captured and one_capture:
                    one.set_tokens(tokens)
                own = capture(model, tokens, grid=grid) if captured and not one_capture else nullcontext(one)
                with own as maps:
                    try:
                        with torch.no_grad():
                            model(**inputs)
                        if number % 10 == 0:
                            model(**inputs)
                    except RuntimeError as error:
                        if one_capture or "cache_size_limit" not in str(error):
                            raise
                        skip_without("torch", "graphs that outlive a block's processor")
                    if number == 0:
                        first = counter.frame_count
                    if captured:
                        assert maps.read().shape == (2, tokens.index.shape[1], N)
        assert counter.frame_count == first > 0
        graphs.append(first)
    assert graphs[0] == graphs[-1]


@pytest.mark.parametrize("mode", ["rollout", "checkpointed"])
def test_compiled_attention_keeps_its_bits_and_its_log_sum_exp(mode, monkeypatch):
    seen, write = [], Maps.write
    monkeypatch.setattr(Maps, "write", lambda *arguments: seen.append(arguments[-1]) or write(*arguments))
    results = []
    for captured in (False, True):
        torch._dynamo.reset()
        model, inputs = flat_transformer(), small_inputs()
        if mode == "checkpointed":
            model.enable_gradient_checkpointing()
        for block in model.transformer_blocks:
            block.compile(backend="aot_eager", fullgraph=True)
        with torch.set_grad_enabled(mode != "rollout"), capture(model, prompt(4)) if captured else nullcontext():
            output = model(**inputs)[0]
        if mode != "rollout":
            output.square().sum().backward()
        results.append((output, *(p.grad for p in model.parameters() if p.grad is not None)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert len(seen) == 2 and all(lse is not None for lse in seen)


def addresses(maps: Maps) -> tuple[int, ...]:
    return maps.slots.data_ptr(), maps.columns.data_ptr(), maps.weights.data_ptr()


@pytest.mark.parametrize("normalize", ["raw", "content", "concepts"])
def test_one_long_capture_gives_the_maps_of_a_new_one_in_the_same_buffers(normalize):
    model, largest = small_transformer(), prompt(116)
    prompts = [prompt(number) for number in range(20)]
    with torch.no_grad(), capture(model, largest, normalize=normalize) as one:
        model(**small_inputs())
        before = addresses(one)
        for tokens in prompts:
            one.set_tokens(tokens)
            placed = one.columns.clone(), one.weights.clone()  # what a CUDA graph would find, without a pass
            model(**small_inputs())
            assert torch.equal(placed[0], one.columns) and torch.equal(placed[1], one.weights)
            found = one.read(), one.layers()
            assert addresses(one) == before
            new_model = small_transformer()
            with capture(new_model, tokens, normalize=normalize) as new:
                new_model(**small_inputs())
            torch.testing.assert_close(found, (new.read(), new.layers()), equal_nan=True)


def test_larger_tokens_other_rows_and_another_grid_take_new_buffers():
    model = small_transformer()
    with torch.no_grad(), capture(model, prompt(0)) as maps:
        for tokens, inputs in (
            (prompt(116), small_inputs()),
            (prompt(3, batch=3), small_inputs(3)),
            (prompt(3, batch=3), small_inputs(3, (2, 4))),
            (prompt(0), small_inputs()),
        ):
            maps.set_tokens(tokens)
            model(**inputs)
            with capture(other := small_transformer(), tokens) as new:
                other(**inputs)
            torch.testing.assert_close(maps.read(), new.read())


def test_new_tokens_have_no_maps_before_their_pass():
    """Fewer concepts, as many and more: those of the old ones would look like theirs."""
    model, inputs = small_transformer(), small_inputs()
    with torch.no_grad(), capture(model, prompt(1)) as maps:
        for number, count in ((0, 1), (1, 2), (5, 6)):
            model(**inputs)
            assert maps.read().isfinite().all()
            maps.set_tokens(prompt(number))
            assert maps.read().shape == (2, count, N) and maps.read().isnan().all()
        model(**inputs)
        assert maps.read().isfinite().all()


def test_set_tokens_checks_what_capture_checks():
    model = small_transformer()
    with torch.no_grad(), capture(model, prompt(1)) as maps:
        model(**small_inputs())
        maps.set_tokens(ConceptTokens(torch.tensor([[[TEXT]]] * 2), torch.ones(2, 1, 1)))
        with pytest.raises(ValueError, match=f"tokens: got text token {TEXT}, expected at most {TEXT - 1}"):
            model(**small_inputs())
        maps.set_tokens(prompt(1, batch=3))
        with pytest.raises(ValueError, match="tokens: got 3 rows, expected 2, one for each row of the pass"):
            model(**small_inputs())


def test_buffers_serve_inference_mode_and_the_update():
    model, results = small_transformer(), []
    with capture(model, prompt(2)) as maps:
        for context in (torch.inference_mode, torch.no_grad, nullcontext, torch.inference_mode):
            with context():
                maps.set_tokens(prompt(2))
                model(**small_inputs())
            results.append(maps.read())
    assert all(torch.equal(results[0], other) for other in results)
    with torch.inference_mode():
        entered = capture(model, prompt(2))
        maps = entered.__enter__()
    model(**small_inputs())
    assert torch.equal(maps.read(), results[0])
    entered.__exit__(None, None, None)


class Looks(TorchDispatchMode):
    """Raises where a value is looked at, and where a copy would wait for the queue of an accelerator."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = str(function.overloadpacket)
        assert name not in ("aten._local_scalar_dense", "aten.equal", "aten.is_nonzero", "aten.nonzero"), name
        if name == "aten._to_copy" and options.get("device") is not None:
            crosses = {arguments[0].device.type, torch.device(options["device"]).type} == {"cpu", "meta"}
            assert not crosses or options.get("non_blocking"), "a copy that waits"
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("options", [{}, {"rows": [3, 1]}, {"rows": slice(2, 4), "normalize": "content"}])
@pytest.mark.parametrize("tokens_on", ["cpu", "meta"])
def test_nothing_is_waited_for_when_a_capture_begins(tokens_on, options):
    """The meta device stands for an accelerator: it has no values to look at."""
    model, inputs = small_transformer().to("meta"), {name: x.to("meta") for name, x in small_inputs(4).items()}
    tokens = ConceptTokens(*(x.to(tokens_on) for x in prompt(5)))
    looks = nullcontext() if tokens_on == "cpu" else Looks()  # the largest of tokens on the CPU is looked at there
    weights = dict(layer_weights=[0.2, 0.3, 0.5], head_weight=torch.ones(2))
    with torch.no_grad(), looks, capture(model, tokens, **options, **weights) as maps:
        model(**inputs)
        maps.set_tokens(tokens)
        model(**inputs)
    assert maps.written == [True] * 3 and maps.slots.is_meta


def test_tokens_on_an_accelerator_beyond_the_text_give_nan(monkeypatch):
    """Whose values nobody looks at; another concept's map stays."""
    tokens = prompt(2)
    model = small_flux()
    index = tokens.index.clone()
    index[0, 1, 0] = TEXT  # for FLUX the first token of the image
    with torch.no_grad(), capture(model, ConceptTokens(index.clamp(max=TEXT - 1), tokens.weight)) as maps:
        maps.impl = "reference"
        maps._index.copy_(index)
        monkeypatch.setattr("star_kernels.api._check_columns", lambda *_: None)  # as on a GPU
        model(**flux_inputs())
    read = maps.read()
    assert read[0, 1].isnan().all() and read[:, 0].isfinite().all() and read[1].isfinite().all()


def test_guidance_that_is_none_is_told_when_the_maps_are_read(monkeypatch):
    """Of an accelerator; on the CPU in the pass."""
    model, words = small_transformer(), "tokens: got 1 rows, the pass has 2 and no guidance"
    tokens = prompt(3, batch=1)
    with torch.no_grad(), capture(model, tokens) as maps, pytest.raises(ValueError, match=words):
        model(**small_inputs())
    monkeypatch.setattr(Maps, "require", lambda maps, *doubt: maps._doubts.append(doubt))
    with torch.no_grad(), capture(model, tokens) as maps:
        model(**small_inputs())
        with pytest.raises(ValueError, match=words):
            maps.read()
    with pytest.raises(ValueError, match=words), allocated(model, tokens):
        model(**small_inputs())


@pytest.mark.parametrize("name", ["qwen_image_masked", "z_image_masked"])
def test_a_mask_is_made_a_bias_once_a_pass(name, monkeypatch):
    case, made = CASES[name], []
    make = star.capture.maps._key_bias
    monkeypatch.setattr(star.capture.maps, "_key_bias", lambda *arguments: made.append(1) or make(*arguments))
    model, inputs = built_or_skip(case.build), case.inputs(2, case.grid)
    tokens = ConceptTokens(torch.tensor([[[1, 2]]] * 2), torch.ones(2, 1, 2))
    with torch.no_grad(), capture(model, tokens) as maps:
        model(**inputs)
        first = maps.read()
        assert len(made) == 1 < len(maps.blocks)
        model(**inputs)
    assert len(made) == 2 and torch.equal(first, maps.read())


def test_blocks_with_masks_of_their_own_have_their_own_bias():
    """Nothing is taken for the same that is not."""
    maps = Maps(tokens=ConceptTokens(torch.tensor([[[0, 1]]]), torch.ones(1, 1, 2)), grid=(1, 4), blocks=(0, 1, 2))
    maps.begin(Pass(torch.empty(1, 4), torch.empty(1, 3, 2), 4, (1, 4), image=0, text=0))
    query, key = torch.randn(2, 1, 2, 4, 8).unbind(0)
    masks = [torch.tensor([kept]).bool().view(1, 1, 1, 4) for kept in ([1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 1, 1])]
    for number, mask in enumerate(masks):
        maps.write(number, query, key, mask, None, None)
        p = (query.double() @ key.double().mT * 8**-0.5).masked_fill(~mask, -torch.inf).softmax(-1).mean(1)
        expected = p[..., :2].sum(-1)
        torch.testing.assert_close(maps.slots[number, :, 0].double(), expected, rtol=1e-5, atol=1e-7)


def test_a_mask_expanded_to_the_queries_is_one_of_the_keys():
    """PRX of diffusers 0.40 gives one."""
    mask, key = torch.rand(2, 1, 1, 6) > 0.3, torch.randn(2, 4, 6, 8)
    expected = star.capture.maps._key_bias(mask, 2, key, slice(None))
    assert torch.equal(star.capture.maps._key_bias(mask.expand(2, 4, 5, 6), 2, key, slice(None)), expected)
    with pytest.raises(ValueError, match="the same for every query"):
        star.capture.maps._key_bias(mask.expand(2, 4, 5, 6).contiguous(), 2, key, slice(None))
