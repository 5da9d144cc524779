"""The predictions of tools/gpu/cost_model.py rest on counts; here they are counted: in Triton's interpreter, from
tensors, and by torch's counter of operations."""

from collections import Counter
from math import ceil, prod

import pytest
import torch

triton_bfloat16 = pytest.importorskip("triton_bfloat16", reason="needs Triton")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder  # noqa: E402

import cost_model as model  # noqa: E402
import star_kernels as sk  # noqa: E402
from star.training.plan import flop_counter  # noqa: E402
from star_kernels.triton import attention_maps as kernels  # noqa: E402


@pytest.fixture
def counted(monkeypatch):
    """counted(tensors): bytes that kernels ask for of each tensor, "other" for their own; operations as "flops"."""
    count, places = Counter(), {}
    load, store, dot = (
        getattr(InterpreterBuilder, f"create_{name}") for name in ("masked_load", "masked_store", "dot")
    )

    def see(pointers, mask):
        addresses = pointers.data[mask.data]
        for address in addresses[:1].tolist():
            name = next((n for n, t in places.items() if 0 <= address - t.data_ptr() < t.nbytes), "other")
            count[name] += len(addresses) * pointers.get_element_ty().primitive_bitwidth // 8

    def seen_load(self, pointers, mask, *rest):
        see(pointers, mask)
        return load(self, pointers, mask, *rest)

    def seen_store(self, pointers, value, mask, *rest):
        see(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def seen_dot(self, a, b, *rest):
        count["flops"] += 2 * prod(a.data.shape) * b.data.shape[1]
        return dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", seen_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", seen_store)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", seen_dot)

    def start(tensors):
        places.update(tensors)
        return count

    return start


@pytest.mark.parametrize(
    ("heads", "queries", "width", "concepts", "slots", "processors", "dtype"),
    [
        (4, 70, 64, 2, 20, 1, torch.bfloat16),  # one group: no sum
        (4, 70, 40, 2, 20, 7, torch.float32),  # every head a group, channels in two products
        (2, 130, 16, 3, 30, 4, torch.float32),  # two blocks of columns
    ],
)
def test_traffic_and_operations_of_the_maps(
    heads, queries, width, concepts, slots, processors, dtype, counted, monkeypatch
):
    monkeypatch.setattr(kernels, "processors", lambda device: processors)
    query, key = (torch.randn(2, heads, n, width).to(dtype) for n in (queries, queries + 50))
    index = torch.randint(0, queries + 50, (2, concepts, slots))
    weight, lse = torch.rand(index.shape), torch.rand(2, heads, queries)
    count = counted({"query": query, "key": key, "index": index, "weight": weight, "lse": lse})
    sk.attention_maps(query, key, index, weight, lse=lse, impl="triton")
    launches = model.attention_maps(2, heads, queries, width, concepts, slots, processors, query.element_size())
    expected = Counter(flops=sum(launch.flops for launch in launches))
    for launch in launches:
        for name, size in launch.bytes.items():
            expected["other" if name in ("partial", "maps") else name] += size
    assert count == expected


@pytest.mark.parametrize("device", model.DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize("shape", model.MODELS, ids=lambda shape: shape.name)
def test_a_batch_that_fills_the_device_is_cut_no_further(shape, device):
    block = kernels.blocks_of(device.architecture, 2).queries
    one, nine = (kernels.tiling(b, shape.heads, shape.image, 2, 8, device.processors, block) for b in (1, 9))
    assert one.groups == one.chunks or prod(one.grid) >= device.processors
    assert nine.groups <= min(kernels.PROGRAMS, one.groups) or nine.tiles * 9 < device.processors
    assert nine.groups == 1 or nine.tiles * 9 < kernels.PROGRAMS * device.processors
    # What a partial map is does not depend on the batch, and so neither do the bits.
    assert (one.chunk, one.chunks) == (nine.chunk, nine.chunks)


def test_traffic_of_what_runs_over_the_latents():
    sample, velocity, noise = torch.randn(3, 2, 16, 8, 8).unbind(0)
    transition = sk.Transition.gaussian(*(torch.rand(3, 2) + 0.5).unbind(0))
    results = sk.gaussian_step(sample, velocity.bfloat16(), noise, transition)
    (launch,) = model.gaussian_step(2, 16 * 64, (4, 2, 4))
    assert sum(launch.bytes.values()) == sum(t.nbytes for t in (sample, velocity.bfloat16(), noise, *results))
    (launch,) = model.gaussian_step(2, 16 * 64, (4, 2, 0), guided=True)
    halves = torch.randn(2, *sample.shape).bfloat16()
    assert sum(launch.bytes.values()) == sum(t.nbytes for t in (sample, halves, *results))
    sums, finish, gradient = model.policy_loss(2, 16, 64, weighted=True)
    for name, tensor in {"velocity": velocity, "sample": sample, "prev_sample": results[0]}.items():
        assert sums.bytes[name] == gradient.bytes[name] == tensor.nbytes
    assert sums.bytes["sums"] == finish.bytes["sums"] == 2 * ceil(64 / model.loss_tile(2, 16, 64, packed=False)) * 72
    assert sums.bytes["old_mean"] == results[1].nbytes and gradient.bytes["gradient"] == velocity.nbytes
    weights = sk.allocate(torch.rand(2, 3, 16), (4, 4))
    assert model.allocate(2, 3, 16, 2)[0].bytes["weights"] == weights.nbytes
    assert sums.bytes["weights"] == gradient.bytes["weights"] == weights.nbytes


@pytest.mark.parametrize("kind", ["joint", "dual", "last", "single"])
@pytest.mark.parametrize("shape", model.MODELS, ids=lambda shape: shape.name)
def test_operations_of_a_layer(shape, kind):
    if (
        (kind == "dual" and not shape.dual)
        or (kind == "last" and shape.single)
        or (kind == "single" and not shape.single)
    ):
        pytest.skip("this model has none")
    expected = model.layer(shape, kind)
    with FakeTensorMode(), torch.no_grad():
        module = model.block(shape, kind)
        with flop_counter() as counter:
            module(*model.inputs(shape, 1))
        elements = sum(p.numel() for p in module.parameters())
    assert counter.get_total_flops() == expected.linear + expected.attention
    assert elements == pytest.approx(expected.weights, rel=0.002)  # and biases
    found, backward = model.kernels(shape, kind, 2)
    assert sum(flops for _, flops in found) == 2 * (expected.linear + expected.attention)
    products, attention = expected.linear, 5 * expected.attention / 2
    # Gradients of what depends on the states: not of the condition's modulation.
    assert sum(flops for _, flops in backward) == pytest.approx(2 * (products + attention), rel=0.01)


def test_kernels_are_what_eager_pytorch_starts():
    """Views and the allocation of results are no kernels; what changes its input in place is one."""
    x, y, z = torch.randn(4, 6), torch.randn(6, 3), torch.randn(3)
    with model.Kernels() as kernels:
        out = (x.view(2, 12).view(4, 6) @ y).add_(z)
        out.T[1:].relu()
    assert kernels.found == [(4 * (24 + 18 + 12), 2 * 4 * 6 * 3), (4 * (12 + 3 + 12), 0), (4 * (8 + 8), 0)]
