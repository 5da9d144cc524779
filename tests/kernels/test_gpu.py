"""What only a GPU can show: launches in CUDA graphs, capture with its attention kernels, a training step."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

import torch.nn.functional as F
from diffusers.models.attention import JointTransformerBlock

import star_kernels as sk
from star import config as configuration
from star.capture import Maps, Observer
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
