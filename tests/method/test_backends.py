"""Capture beside the attention backends of diffusers: they keep running, and what log-sum-exp they give is used."""

import pytest
import torch
import torch.nn.functional as F

import versions
from builders import GRID, TEXT, flux_inputs, small_flux, small_transformer
from star.capture import Maps, capture
from star.concepts import ConceptTokens
from star.tap import probed_lse_argument

dispatch = versions.module_or_skip("diffusers.models.attention_dispatch")
AttentionBackendName, _AttentionBackendRegistry = dispatch.AttentionBackendName, dispatch._AttentionBackendRegistry
TOKENS = ConceptTokens(torch.tensor([[[1, -1], [2, 4]]] * 2), torch.tensor([[[1.0, 0.0], [0.5, 0.5]]] * 2))
STAND_IN = AttentionBackendName.FLASH  # whose function the tests exchange: this machine has no flash-attn
BLOCKS = range(4)


def attention(query, key, value):
    """(output (B, S, H, D), log-sum-exp (B, H, S)); its bits are those of no other backend."""
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), value), torch.logsumexp(scores, -1)


def pad(lse):
    return F.pad(lse, (0, 32 - lse.shape[-1] % 32), value=torch.nan)


# What backends give beside their output, from the log-sum-exp (B, H, S).
RIGHT = {
    "flash-attn": lambda lse: lse,
    "padded": pad,
    "trailing axis": lambda lse: lse[..., None],
    "third version": lambda lse: lse.transpose(1, 2),
    "packed": lambda lse: lse.transpose(0, 1).flatten(1),
    "a little off": lambda lse: lse * 1.003,  # of quantized scores
}
WRONG = {
    "base 2": lambda lse: lse / 0.6931,
    "without the scale": lambda lse: lse * 4,
    "other shape": lambda lse: lse[:, :1],
    "nothing": lambda lse: None,
}


def stand_in(monkeypatch, give, argument="return_lse"):
    """Registers a backend for diffusers' dispatcher, which gives its log-sum-exp when it is asked."""

    def run(query, key, value, attn_mask=None, return_lse=False, _parallel_config=None):
        out, lse = attention(query, key, value)
        return (out, give(lse)) if return_lse else out

    def run_probs(query, key, value, attn_mask=None, return_attn_probs=False, _parallel_config=None):
        return run(query, key, value, attn_mask, return_attn_probs)

    register(monkeypatch, run if argument == "return_lse" else run_probs)


def register(monkeypatch, function):
    names = set(function.__code__.co_varnames[: function.__code__.co_argcount])
    monkeypatch.setitem(_AttentionBackendRegistry._backends, STAND_IN, function)
    monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, STAND_IN, names)
    monkeypatch.setitem(_AttentionBackendRegistry._constraints, STAND_IN, [])


def captured(monkeypatch, compiled=False, backend=STAND_IN.value):
    """(the output without capture and with it, the maps, the log-sum-exps that the maps were made with)."""
    model, inputs, seen = small_flux(), flux_inputs(), []
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.attn.processor._attention_backend = backend
    if compiled:
        model.transformer_blocks[0].compile(backend="aot_eager", fullgraph=True)
    write = Maps.write
    monkeypatch.setattr(Maps, "write", lambda *arguments: seen.append(arguments[-1]) or write(*arguments))
    with torch.no_grad():
        plain = model(**inputs)[0]
        with capture(model, TOKENS, layers=BLOCKS) as maps:
            output = model(**inputs)[0]
    return plain, output, maps.layers(), seen


def materialized():
    """(L, B, G, N) from the softmax in float64 of what the stand-in is called with."""
    model, found = small_flux(), []

    def processed(query, key, value, attn_mask=None, _parallel_config=None):
        scores = torch.einsum("bihd,bjhd->bhij", query.double(), key.double()) * query.shape[-1] ** -0.5
        text = scores.softmax(-1).mean(1)[:, TEXT:, :TEXT]
        found.append(torch.stack([text[..., 1], (text[..., 2] + text[..., 4]) / 2], 1))
        return attention(query, key, value)[0]

    with pytest.MonkeyPatch.context() as patched, torch.no_grad():
        register(patched, processed)
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            block.attn.processor._attention_backend = STAND_IN.value
        model(**flux_inputs())
    return torch.stack(found)


@pytest.mark.parametrize("argument", ["return_lse", "return_attn_probs"])
@pytest.mark.parametrize("kind", RIGHT)
def test_the_log_sum_exp_of_a_backend_is_used_in_every_layout(monkeypatch, kind, argument):
    stand_in(monkeypatch, RIGHT[kind], argument)
    plain, output, maps, seen = captured(monkeypatch)
    assert torch.equal(plain, output) and len(seen) == len(BLOCKS) and all(lse is not None for lse in seen)
    rtol = 5e-2 if kind == "a little off" else 1e-4
    torch.testing.assert_close(maps.double(), materialized(), rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_log_sum_exp_is_not_used(monkeypatch, kind):
    stand_in(monkeypatch, WRONG[kind])
    plain, output, maps, seen = captured(monkeypatch)
    assert torch.equal(plain, output) and seen == [None] * len(BLOCKS)
    torch.testing.assert_close(maps.double(), materialized(), rtol=1e-4, atol=1e-7)


def raises(query, key, value, attn_mask=None, return_lse=False, _parallel_config=None):
    if return_lse:
        raise AttributeError("'NoneType' object has no attribute 'context_parallel_config'")
    return attention(query, key, value)[0]


def ignores(query, key, value, attn_mask=None, return_lse=False, _parallel_config=None):
    return attention(query, key, value)[0]


def other_bits(query, key, value, attn_mask=None, return_lse=False, _parallel_config=None):
    out, lse = attention(query, key, value)
    return (out * 1.0001, lse) if return_lse else out


def none(query, key, value, attn_mask=None, _parallel_config=None):
    return attention(query, key, value)[0]


@pytest.mark.parametrize("function", [raises, ignores, other_bits, none])
def test_a_backend_that_gives_none_keeps_its_bits(monkeypatch, function):
    register(monkeypatch, function)
    plain, output, maps, seen = captured(monkeypatch)
    assert torch.equal(plain, output) and seen == [None] * len(BLOCKS)
    torch.testing.assert_close(maps.double(), materialized(), rtol=1e-4, atol=1e-7)


def test_a_backend_is_probed_once_and_leaves_the_random_numbers_alone(monkeypatch):
    calls = []

    def run(query, key, value, attn_mask=None, return_lse=False, _parallel_config=None):
        calls.append(query.shape[1])
        out, lse = attention(query, key, value)
        return (out, lse) if return_lse else out

    register(monkeypatch, run)
    probed_lse_argument.cache_clear()
    state = torch.get_rng_state()
    captured(monkeypatch)  # building the model seeds
    after = torch.get_rng_state()
    calls.clear()
    captured(monkeypatch)
    assert len(calls) == 2 * len(BLOCKS) and set(calls) == {TEXT + GRID[0] * GRID[1]}
    assert torch.equal(after, torch.get_rng_state()) and state.shape == after.shape


@pytest.mark.parametrize("kind", ["third version", "base 2"])
def test_compiled_blocks_ask_outside_of_the_graph(monkeypatch, kind):
    stand_in(monkeypatch, (RIGHT | WRONG)[kind])
    torch._dynamo.reset()
    plain, output, maps, seen = captured(monkeypatch, compiled=True)
    assert torch.equal(plain, output) and all((lse is None) == (kind in WRONG) for lse in seen) and len(seen) == 4
    torch.testing.assert_close(maps.double(), materialized(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", ["_native_math", "flex", "native"])
def test_backends_of_torch(monkeypatch, backend):
    """flex raises where it is asked for its log-sum-exp (diffusers 0.42)."""
    plain, output, maps, seen = captured(monkeypatch, backend=backend)
    assert torch.equal(plain, output) and all((lse is not None) == (backend == "native") for lse in seen)
    torch.testing.assert_close(maps.double(), materialized(), rtol=1e-4, atol=1e-7)


def test_a_key_mask_as_the_dispatcher_has_it(monkeypatch):
    """(B, S), as backends for packed sequences take it; then the operator makes the log-sum-exp."""
    stand_in(monkeypatch, RIGHT["flash-attn"])
    model, seen = small_flux(), []
    processor = model.transformer_blocks[0].attn.processor
    with capture(model, TOKENS, layers=[0]) as maps:
        tapped = model.transformer_blocks[0].attn.processor
        monkeypatch.setattr(Maps, "write", lambda *arguments: seen.append(arguments[-3:]))
        query, key, value = torch.randn(3, 2, 7, 2, 16).unbind(0)
        mask = torch.arange(7)[None] < torch.tensor([[7], [5]])
        tapped.star_dispatch_attention_fn(query, key, value, mask, backend=STAND_IN.value)
    assert maps.layers().isnan().all() and processor is model.transformer_blocks[0].attn.processor
    ((seen_mask, _, lse),) = seen
    assert torch.equal(seen_mask, mask[:, None, None]) and lse is None


def test_parallelism_over_devices_is_refused():
    config = object()
    words = (
        "splits its sequence or its heads over devices; each would make maps of a part: run the captured pass on one"
    )
    for build in (small_flux, small_transformer):
        model = build()
        model._parallel_config = config
        with pytest.raises(TypeError, match=f"^transformer: {words}$"):
            capture(model, TOKENS).__enter__()
    model = small_flux()
    model.transformer_blocks[1].attn.processor._parallel_config = config
    with pytest.raises(TypeError, match=f"^transformer: block 1 {words}$"):
        capture(model, TOKENS).__enter__()
    model = small_flux()
    with torch.no_grad(), capture(model, TOKENS), pytest.raises(TypeError, match=words):
        for block in model.transformer_blocks:  # when the capture has begun
            block.attn.processor._parallel_config = config
        model(**flux_inputs())
    assert not any(hasattr(block.attn.processor, "star_observer") for block in model.transformer_blocks)
