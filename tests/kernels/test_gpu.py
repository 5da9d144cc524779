"""What only a GPU can show: launches in CUDA graphs, capture with its attention kernels, a training step."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

import torch.nn.functional as F
from diffusers.models.attention import JointTransformerBlock

import star_kernels as sk
from builders import GRID, flux_inputs, small_flux, small_inputs, small_transformer
from star import config as configuration
from star.capture import Maps, capture
from star.capture.blocks import Observer
from star.concepts import ConceptTokens
from star.layouts import Pass
from star.presets import preset
from star.tap import tapped
from star.train import Trainer
from star_kernels.ops import OPERATORS

pytestmark = pytest.mark.gpu


def transition(batch: int) -> sk.Transition:
    return sk.Transition.gaussian(*(torch.rand(3, batch) + 0.5).unbind(0))


def attention_maps():
    query, key = torch.randn(2, 3, 24, 300, 64).bfloat16().unbind(0)
    index = torch.randint(0, 300, (3, 2, 8))
    lse = torch.logsumexp(query.float() @ key.float().mT / 8, -1)
    return lambda: [sk.attention_maps(query, key, index, lse=lse)], [query]


def allocate():
    maps = torch.rand(3, 2, 256)
    return lambda: [sk.allocate(maps, (16, 16), smooth=1.0)], [maps]


def gaussian_step():
    sample, velocity, noise = torch.randn(3, 3, 16, 32, 32).unbind(0)
    step = transition(3)
    return lambda: list(sk.gaussian_step(sample, velocity, noise, step)), [velocity]


def policy_loss():
    sample, velocity, old_mean, prev_sample = torch.randn(4, 3, 16, 32, 32).unbind(0)
    step, weights, advantages = transition(3), sk.allocate(torch.rand(3, 2, 256), (16, 16)), torch.randn(3)
    velocity = velocity.clone().requires_grad_()

    def loss():
        out = sk.policy_loss(velocity, sample, prev_sample, step, advantages, weights, old_mean=old_mean)
        return [out.loss.detach(), out.statistics.values, torch.autograd.grad(out.loss, velocity)[0]]

    return loss, [velocity]


def nft_loss():
    velocity, old_velocity, sample, clean = torch.randn(4, 3, 16, 32, 32).unbind(0)
    sigma, reward_prob, weights = torch.rand(3), torch.rand(3, 32, 32), sk.allocate(torch.rand(3, 2, 256), (16, 16))
    velocity = velocity.clone().requires_grad_()

    def loss():
        out = sk.nft_loss(velocity, old_velocity, sample, clean, sigma, reward_prob, weights)
        return [out.loss.detach(), out.statistics.values, torch.autograd.grad(out.loss, velocity)[0]]

    return loss, [velocity]


# operator: gives a call without arguments, and tensors that its results follow when they change in place
CALLS = {f.__name__: f for f in (attention_maps, allocate, gaussian_step, policy_loss, nft_loss)}


@pytest.mark.parametrize("operator", list(OPERATORS))
def test_a_cuda_graph_replays_the_same_bits(operator):
    function, tensors = CALLS[operator]()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles and loads what it needs, outside of the graph
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function()
    for _ in range(2):
        with torch.no_grad():
            for tensor in tensors:
                tensor.copy_(torch.rand_like(tensor))
        graph.replay()
        for got, expected in zip(captured, function(), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("operator", list(OPERATORS))
def test_launches_do_not_wait_for_the_gpu(operator):
    function, _ = CALLS[operator]()
    function()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_capture_keeps_the_bits_of_the_layer(dtype):
    block = JointTransformerBlock(256, 4, 64, qk_norm="rms_norm").to(dtype)
    image, text, condition = (torch.randn(2, *size).to(dtype) for size in ((64, 256), (20, 256), (256,)))
    tokens = ConceptTokens(torch.tensor([[[1, 2, 3], [7, -1, -1]]]).expand(2, -1, -1), torch.ones(2, 2, 3))
    maps = Maps(tokens=tokens, grid=(8, 8))
    with torch.no_grad():
        plain = block(image, text, condition)
        seen = []
        attention = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = lambda q, k, v, **_: seen.append((q, k)) or attention(q, k, v)
        try:
            block(image, text, condition)
        finally:
            F.scaled_dot_product_attention = attention
        maps.begin(Pass(image, text, 64, (8, 8), image=0, text=64))
        observer = Observer(maps, 0)
        block.attn.processor = tapped(block.attn.processor, observer)
        captured = block(image, text, condition)
    assert all(torch.equal(a, b) for a, b in zip(plain, captured, strict=True))
    query, key = seen[0]
    probability = torch.softmax(query.double() @ key.double().mT / 8, -1)[:, :, :64].mean(1)  # (B, N, S)
    expected = torch.stack([probability[:, :, 64 + 1 : 64 + 4].sum(-1), probability[:, :, 64 + 7]], 1)
    # The attention kernel's own log-sum-exp has the roundings of its products.
    torch.testing.assert_close(maps.slots[0].double(), expected, rtol=2e-3, atol=0)


def tokens_of(*concepts: list[int]) -> ConceptTokens:
    """The same concepts for two images, in room for two of two tokens."""
    index = torch.full((2, 2, 2), -1)
    for number, concept in enumerate(concepts):
        index[:, number, : len(concept)] = torch.tensor(concept)
    return ConceptTokens(index, (index >= 0).float())


def on_the_gpu(build, make, dtype=torch.bfloat16, batch=2) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A small model and its inputs, as they are made on the CPU."""
    with torch.device("cpu"):
        model, inputs = build(), make(batch)
    states = lambda name, x: x.ndim > 1 and not name.endswith("ids")
    inputs = {name: x.cuda().to(dtype) if states(name, x) else x.cuda() for name, x in inputs.items()}
    return model.to(dtype).cuda(), inputs


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("build", "make"), [(small_transformer, small_inputs), (small_flux, flux_inputs)])
def test_a_cuda_graph_of_a_whole_captured_pass_serves_every_prompt(build, make, compiled):
    """The buffers keep their addresses: a replay has the maps of the latents, and of the concepts, that are there."""
    model, inputs = on_the_gpu(build, make)
    if compiled:
        torch._dynamo.reset()
        for block in model.transformer_blocks:
            block.compile(fullgraph=True)
    with torch.no_grad(), capture(model, tokens_of([1, 2], [3]), grid=GRID) as maps:
        for _ in range(3):
            model(**inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(**inputs)[0]
        for tokens in (tokens_of([1, 2], [3]), tokens_of([4], [0, 2]), tokens_of([3])):
            inputs["hidden_states"].normal_()
            maps.set_tokens(tokens)
            graph.replay()
            replayed, out = maps.layers(), output.clone()
            expected = model(**inputs)[0]
            assert torch.equal(out, expected) and torch.equal(replayed, maps.layers())
            assert (replayed[:, :, 1] == 0).all() == bool((tokens.index[:, 1] < 0).all())


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_compiled_attention_keeps_its_bits_and_its_log_sum_exp(compiler, dtype, requires_grad, monkeypatch):
    """The kernel is chosen outside of the graph; without that the log-sum-exp would be made again over all keys."""
    seen, write = [], Maps.write
    monkeypatch.setattr(Maps, "write", lambda *arguments: seen.append(arguments[-1]) or write(*arguments))
    results = []
    for captured in (False, True):
        torch._dynamo.reset()
        model, inputs = on_the_gpu(lambda: small_transformer(layers=2, dual=()), small_inputs, dtype)
        for block in model.transformer_blocks:
            block.compile(backend=compiler, fullgraph=True)
        context = capture(model, tokens_of([1, 2], [3])) if captured else torch.enable_grad()
        with context as maps, torch.set_grad_enabled(requires_grad):
            output = model(**inputs)[0]
        results.append(output.detach())
    if compiler == "aot_eager":  # inductor fuses what is around the attention as it likes
        assert torch.equal(*results)
    assert len(seen) == 2 and all(lse is not None for lse in seen)
    eager, _ = on_the_gpu(lambda: small_transformer(layers=2, dual=()), small_inputs, dtype)
    with torch.no_grad(), capture(eager, tokens_of([1, 2], [3])) as expected:
        eager(**inputs)
    tolerance = dict(rtol=5e-2, atol=1e-4) if dtype == torch.bfloat16 else dict(rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(maps.layers(), expected.layers(), **tolerance)


@pytest.mark.parametrize("guided", [False, True])
def test_a_capture_begins_without_waiting_for_the_gpu(guided):
    model, inputs = on_the_gpu(small_transformer, small_inputs, batch=4 if guided else 2)
    rows = slice(2, 4) if guided else None
    with torch.device("cpu"):
        tokens = tokens_of([1, 2], [3])
    with torch.no_grad(), capture(model, tokens, rows=rows):
        model(**inputs)  # what is compiled and loaded once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for some in (tokens, ConceptTokens(*(x.to("cuda", non_blocking=True) for x in tokens))):
            with torch.no_grad(), capture(model, some, rows=rows, normalize="content") as maps:
                model(**inputs)
                maps.set_tokens(some)
                model(**inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert maps.read().isfinite().all()


@pytest.mark.parametrize("backend", ["_native_flash", "_native_cudnn", "_native_efficient", "_native_math"])
def test_backends_of_torch_keep_their_bits_and_their_log_sum_exp(backend, monkeypatch):
    seen, write = [], Maps.write
    monkeypatch.setattr(Maps, "write", lambda *arguments: seen.append(arguments[-1]) or write(*arguments))
    model, inputs = on_the_gpu(small_flux, flux_inputs)
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.attn.processor._attention_backend = backend
    with torch.no_grad():
        try:
            plain = model(**inputs)[0]
        except RuntimeError as error:
            pytest.skip(f"this GPU has no {backend}: {error}")
        with capture(model, tokens_of([1, 2], [3]), layers=range(4)) as maps:
            assert torch.equal(model(**inputs)[0], plain)
        with capture(model, tokens_of([1, 2], [3]), layers=range(4), lse=False) as own:
            model(**inputs)
    assert all((lse is None) == (backend == "_native_math") for lse in seen[:4])
    torch.testing.assert_close(maps.layers(), own.layers(), rtol=2e-2, atol=1e-5)


def test_a_training_step(tmp_path):
    with torch.device("cpu"):  # the trainer places its own tensors
        config = configuration.update(
            preset("shapes"),
            {
                "scoring": {"count": 0},
                "run": {"out": str(tmp_path), "figures": False},
                "sampling": {"prompts_per_iteration": 2, "images_per_prompt": 4},
            },
        )
        metrics = Trainer(config).step()
    assert metrics["ratio_first"] == 1.0
    assert metrics["weights_max"] > 1
