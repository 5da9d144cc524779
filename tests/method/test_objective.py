"""Advantages and the allocation strategies."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import random_weights
from star.objective import (
    STRATEGIES,
    TEMPORAL,
    Allocation,
    allocation,
    allocation_weights,
    blend_weights,
    captured_steps,
    invert_ranks,
    neighbor_correlation,
    permute_across_groups,
    random_like,
    temporal_weights,
    uniform_rows,
)
from star.training.advantage import group_advantages
from star_kernels import Transition, allocate, implementations, policy_loss

GRID = (3, 5)
MAPS = torch.rand(6, 2, 15, generator=torch.Generator().manual_seed(3)) + 0.05
GROUPS = torch.arange(6) % 2


def weights(strategy, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    masks = (MAPS[:, 0] > 0.5).float()
    allocation = Allocation(strategy=strategy, **options)
    return allocation_weights(allocation, MAPS, GRID, groups=GROUPS, masks=masks, generator=generator)


def test_advantages_by_hand():
    rewards, groups = torch.tensor([1.0, 5.0, 3.0, 5.0, 0.3, 0.3]), torch.tensor([7, 2, 7, 2, 9, 9])
    got = group_advantages(rewards, groups)
    torch.testing.assert_close(got, torch.tensor([-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]) / 1.0001)
    assert got[1] == got[4] == 0
    whole = group_advantages(rewards, groups, global_std=True)
    torch.testing.assert_close(whole[0], -1 / (rewards.std(correction=0) + 1e-4))


def test_advantage_errors():
    with pytest.raises(ValueError, match=r"groups: got shape \(2,\) for rewards \(3,\)"):
        group_advantages(torch.ones(3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"groups: got torch.float32, expected int64"):
        group_advantages(torch.ones(2), torch.zeros(2))


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "uniform"])
def test_weights_have_mean_one_and_repeat_over_patches(strategy):
    w = weights(strategy)
    assert w.shape == (6, 6, 10)
    torch.testing.assert_close(w.mean((1, 2)), torch.ones(6), rtol=1e-5, atol=0)
    assert torch.equal(w[:, ::2, ::2], w[:, 1::2, 1::2])


def test_uniform_needs_no_weights():
    assert weights("uniform") is None


def test_controls_keep_the_values_and_move_them():
    attention = weights("attention")
    shuffled, random = weights("shuffled"), weights("random")
    source = [int((attention == row).flatten(1).all(1).nonzero()) for row in shuffled]
    assert sorted(source) == list(range(6))
    assert all(GROUPS[i] != GROUPS[j] for i, j in enumerate(source))
    assert torch.equal(random.flatten(1).sort(1).values, attention.flatten(1).sort(1).values)
    assert not torch.equal(random, attention)
    assert torch.equal(random, weights("random")) and not torch.equal(random, weights("random", seed=1))


def autocorrelation(x, shift):
    """Over all fields (B, rows, columns): correlation of locations `shift` apart along a row or a column."""
    x = x - x.mean((1, 2), keepdim=True)
    pairs = torch.cat([(x[:, :, shift:] * x[:, :, :-shift]).flatten(), (x[:, shift:] * x[:, :-shift]).flatten()])
    return (pairs.mean() / x.square().mean()).item()


def blobs(batch, rows, columns, width):
    """Weights as attention makes them: a bump or two on a low ground."""
    generator = torch.Generator().manual_seed(1)
    y, x = torch.arange(rows)[:, None], torch.arange(columns)
    fields = torch.full((batch, rows, columns), 0.3)
    for _ in range(2):
        center = torch.rand(batch, 2, generator=generator) * torch.tensor([rows, columns])
        distance = (y - center[:, :1, None]) ** 2 + (x - center[:, 1:, None]) ** 2
        fields += torch.exp(-distance / (2 * width**2))
    return fields / fields.mean((1, 2), keepdim=True)


@pytest.mark.parametrize("width", [0.8, 1.5, 2.5])
def test_random_fields_have_the_values_and_the_smoothness_of_the_weights(width):
    own = blobs(64, 9, 9, width)
    fields = random_like(own, torch.Generator().manual_seed(0))
    assert torch.equal(fields.flatten(1).sort(1).values, own.flatten(1).sort(1).values)
    # Sample by sample for neighbors, which is what was searched for ...
    error = (neighbor_correlation(fields) - neighbor_correlation(own)).abs()
    assert error.mean() < 0.01 and error.max() < 0.15
    # ... and on the whole further away, where scattered values have no correlation left.
    scattered = own.flatten(1)[:, torch.randperm(81)].view_as(own)
    assert autocorrelation(fields, 1) == pytest.approx(autocorrelation(own, 1), abs=0.02)
    for shift in (2, 3):
        assert autocorrelation(fields, shift) == pytest.approx(autocorrelation(own, shift), abs=0.2)
    assert abs(autocorrelation(scattered, 1)) < 0.1 < autocorrelation(own, 1) - 0.5
    # Nothing is left of where they were.
    centered, placed = own - 1, fields - 1
    similarity = (centered * placed).mean((1, 2)) / centered.square().mean((1, 2))
    assert similarity.mean().abs() < 4 * similarity.std() / 64**0.5


def test_neighbor_correlation_by_hand():
    # Rows of +1 and -1: neighbors in a row agree (12 pairs), in a column they differ (12 pairs).
    stripes = torch.tensor([[1.0], [-1.0]]).repeat(2, 4)
    checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(2, 2)
    got = neighbor_correlation(torch.stack([stripes, checks, torch.ones(4, 4)]))
    assert got[:2].tolist() == [0.0, -1.0] and got[2].isnan()


@given(rows=st.integers(1, 7), columns=st.integers(1, 7), seed=st.integers(0, 99))
def test_random_fields_of_any_size_keep_the_values(rows, columns, seed):
    own = torch.rand(3, rows, columns, generator=torch.Generator().manual_seed(seed))
    own[1] = 1.0  # a sample without a usable map stays uniform
    fields = random_like(own, torch.Generator().manual_seed(seed))
    assert torch.equal(fields.flatten(1).sort(1).values, own.flatten(1).sort(1).values)


@pytest.mark.parametrize("strategy", ["attention", "topk", "random", "inverted", "shuffled", "final_step"])
@pytest.mark.parametrize("grid", [(3, 5), (1, 3, 5)])
def test_weights_of_several_steps_are_made_at_once_and_are_those_of_each(strategy, grid, monkeypatch):
    """Who gets whose weights, and where a random field lies, does not change from step to step."""
    maps = torch.stack([MAPS, MAPS.flip(2), MAPS**2])
    calls = []
    monkeypatch.setattr(allocation, "allocate", lambda *args, **options: calls.append(1) or allocate(*args, **options))

    def made(maps):
        generator = torch.Generator().manual_seed(5)
        return allocation_weights(Allocation(strategy), maps, grid, groups=GROUPS, generator=generator)

    together = made(maps)
    assert len(calls) == 1 and together.shape == (3, 6, *grid[:-2], 6, 10)
    assert torch.equal(together, torch.stack([made(step) for step in maps]))
    strength = torch.tensor([0.0, 0.5, 1.0])
    blended = torch.stack([blend_weights(own, one) for own, one in zip(together, strength, strict=True)])
    assert torch.equal(blend_weights(together, strength), blended)


@pytest.mark.parametrize("strategy", ["attention", "topk", "random", "inverted", "shuffled", "final_step"])
def test_no_step_and_no_sample_have_no_weights(strategy):
    """Whatever the strategy: a process may have no image, a window no step."""
    maps, generator = torch.stack([MAPS, MAPS]), torch.Generator()
    made = lambda maps, groups: allocation_weights(Allocation(strategy), maps, GRID, groups=groups, generator=generator)
    size = made(MAPS, GROUPS).shape[1:]
    assert made(maps[:0], GROUPS).shape == (0, 6, *size)
    assert made(maps[:, :0], GROUPS[:0]).shape == (2, 0, *size)
    assert made(maps[:0, :0], GROUPS[:0]).shape == (0, 0, *size)
    assert made(MAPS[:0], GROUPS[:0]).shape == (0, *size)


def test_without_a_generator_the_steps_draw_one_after_the_other():
    maps = torch.stack([MAPS, MAPS])
    torch.manual_seed(0)
    first, second = allocation_weights(Allocation("random"), maps, GRID)
    torch.manual_seed(0)
    assert torch.equal(first, allocation_weights(Allocation("random"), MAPS, GRID)) and not torch.equal(first, second)


@pytest.mark.parametrize("strategy", ["attention", "topk", "random", "inverted", "shuffled"])
def test_a_video_has_weights_of_its_frames(strategy):
    maps = (torch.rand(4, 2, 3 * 5 * 6) + 0.05) * torch.tensor([3.0, 1.0, 1.0]).repeat_interleave(30)
    generator = torch.Generator().manual_seed(0)
    found = allocation_weights(Allocation(strategy), maps, (3, 5, 6), generator=generator)
    assert found.shape == (4, 3, 10, 12)
    assert torch.equal(found[..., ::2, ::2], found[..., 1::2, 1::2])
    torch.testing.assert_close(found.mean((1, 2, 3)), torch.ones(4))
    own = allocate(maps, (3, 5, 6))
    values = lambda weights: weights.flatten(1).sort(1).values
    assert torch.equal(found, own) == (strategy == "attention")
    if strategy in ("random", "inverted"):
        assert torch.equal(values(found), values(own))
    half = blend_weights(found, torch.tensor([0.0, 0.5, 1.0, 1.0]))
    assert torch.equal(half[0], torch.ones(3, 10, 12)) and torch.equal(half[2:], found[2:])
    assert temporal_weights("concentration", torch.ones(2, 4), torch.stack([found, own])).shape == (2, 4)


@pytest.mark.parametrize("strategy", ["attention", "topk", "shuffled", "random", "inverted"])
def test_a_video_of_one_frame_has_the_bits_of_an_image(strategy):
    maps = torch.rand(4, 2, 48, generator=torch.Generator().manual_seed(0))

    def weights(grid):
        generator, groups = torch.Generator().manual_seed(1), torch.arange(4) % 2
        options = Allocation(strategy=strategy, smooth=1.0)
        return allocation_weights(options, maps, grid, groups=groups, generator=generator)

    assert torch.equal(weights((1, 6, 8)), weights((6, 8))[:, None])


def test_random_fields_of_a_video_are_as_smooth_as_its_weights():
    noise = torch.randn(8, 1, 8, 12, 12, generator=torch.Generator().manual_seed(1))
    own = torch.nn.functional.avg_pool3d(noise, 3, stride=1)[:, 0].exp()
    fields = random_like(own, torch.Generator().manual_seed(0))
    assert torch.equal(fields.flatten(1).sort(1).values, own.flatten(1).sort(1).values)
    assert not torch.isclose(fields, own).flatten(1).all(1).any()
    torch.testing.assert_close(neighbor_correlation(fields), neighbor_correlation(own), rtol=0, atol=0.05)


def test_random_fields_are_shared_where_the_weights_are():
    """The images of a prompt that part after the trained step have one map between them."""
    own = blobs(4, 9, 9, 1.0)[[2, 0, 2, 1, 0, 2]]
    fields = random_like(own, torch.Generator().manual_seed(0))
    alike = (fields.flatten(1)[:, None] == fields.flatten(1)[None]).all(2)
    assert torch.equal(alike, (own.flatten(1)[:, None] == own.flatten(1)[None]).all(2))
    assert torch.equal(fields.flatten(1).sort(1).values, own.flatten(1).sort(1).values)


def test_inverted_has_the_same_values_low_where_attention_is_high():
    own, reverse = (weights(s)[:, ::2, ::2].flatten(1) for s in ("attention", "inverted"))
    assert torch.equal(own.sort(1).values, reverse.sort(1).values)
    assert torch.equal(own.argsort(1), reverse.argsort(1).flip(1))
    assert invert_ranks(torch.tensor([[[3.0, 0.5, 0.5], [0.0, 1.0, 1.0]]])).flatten()[[0, 3]].tolist() == [0.0, 3.0]
    assert torch.equal(invert_ranks(torch.ones(2, 3, 3)), torch.ones(2, 3, 3))


def test_final_step_wants_the_last_maps_for_all_steps():
    special = {"final_step": (7,), "uniform": (), "oracle": ()}
    assert [captured_steps(s, (1, 2), 8) for s in STRATEGIES] == [special.get(s, (1, 2)) for s in STRATEGIES]
    assert torch.equal(weights("final_step"), weights("attention"))


def test_oracle_follows_the_masks():
    w = weights("oracle", mix=1.0)[:, ::2, ::2].flatten(1)
    inside = MAPS[:, 0] > 0.5
    assert (w[~inside] == 0).all() and (w[inside] > 0).all()


def test_topk_raises_the_largest_share_by_the_factor_whatever_the_values():
    w = weights("topk", share=0.4, factor=1.5)[:, ::2, ::2].flatten(1).double()
    field = (MAPS.double() / MAPS.double().mean(-1, keepdim=True)).mean(1)
    raised = field >= field.sort(1, descending=True).values[:, 5:6]  # 6 of 15 tokens
    assert (raised.sum(1) == 6).all()
    expected = torch.where(raised, 1.5, 1.0).double() / (1 + 0.5 * 6 / 15)
    torch.testing.assert_close(w, expected, rtol=1e-6, atol=0)
    # Values, sharpening, mix and cap change nothing; the order does.
    again = allocation_weights(Allocation("topk", mix=0.1, cap=1.1, sharpen=3.0), MAPS[:, :1] ** 3, GRID)
    assert torch.equal(again, allocation_weights(Allocation("topk"), MAPS[:, :1], GRID))
    assert torch.equal(weights("topk", share=1.0), torch.ones(6, 6, 10))


def test_topk_lets_no_order_of_the_tokens_decide():
    maps = torch.ones(5, 1, 15)
    maps[1, 0, :3] = 2.0  # fewer than the share stand out
    maps[2, 0, :5], maps[2, 0, 5:8] = 3.0, 2.0  # three are level at the edge of six
    maps[3], maps[4, 0, 2] = 0.0, torch.nan
    w = allocation_weights(Allocation("topk", share=0.4), maps, GRID, patch=1).flatten(1)
    raised = (w > 1).sum(1)
    assert raised.tolist() == [0, 3, 5, 0, 0]
    assert torch.equal(w[[0, 3, 4]], torch.ones(3, 15))
    turned = allocation_weights(Allocation("topk", share=0.4), maps.flip(2), GRID, patch=1).flatten(1)
    assert torch.equal(turned, w.flip(1))


def test_maps_count_within_the_noise_window_and_grow_over_the_warm_up():
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0], dtype=torch.float64)
    assert Allocation().strength(sigmas, 0).tolist() == [1.0] * 5
    late = Allocation(noise_window=(0.2, 0.5), warmup=4)
    assert [late.strength(sigmas, i).tolist() for i in (0, 1, 4, 9)] == [
        [0.0] * 5,
        [0.0, 0.0, 0.25, 0.25, 0.0],
        [0.0, 0.0, 1.0, 1.0, 0.0],
        [0.0, 0.0, 1.0, 1.0, 0.0],
    ]
    w = weights("attention")
    assert torch.equal(blend_weights(w, torch.tensor(1.0)), w)
    assert torch.equal(blend_weights(w, torch.tensor(0.0)), torch.ones_like(w))
    mixed = blend_weights(w, torch.tensor([0.0, 1.0, 0.25, 0.25, 0.0, 1.0]))
    assert torch.equal(mixed[0], torch.ones(6, 10)) and torch.equal(mixed[5], w[5])
    torch.testing.assert_close(mixed[2], 0.75 + 0.25 * w[2])
    torch.testing.assert_close(mixed.mean((1, 2)), torch.ones(6), rtol=1e-5, atol=0)


@pytest.mark.parametrize("implementation", [name for name, no in implementations("policy_loss").items() if no is None])
def test_weights_of_exactly_one_leave_the_loss_its_bits(implementation):
    generator = torch.Generator().manual_seed(0)
    velocity, x, mean, after = torch.randn(4, 3, 4, 6, 10, generator=generator)
    step = Transition.gaussian(*torch.rand(3, 3, generator=generator) + 0.1)
    results = []
    for w in (None, blend_weights(random_weights((3, 6, 10)), torch.tensor(0.0))):
        v = velocity.clone().requires_grad_()
        loss, statistics = policy_loss(
            v, x, after, step, torch.tensor([1.0, -2.0, 0.5]), w, old_mean=mean, clip_range=0.1, impl=implementation
        )
        loss.backward()
        results.append((loss, v.grad, statistics.values))
    for plain, weighted in zip(*results, strict=True):
        assert torch.equal(plain, weighted)


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_another_is_a_permutation_that_avoids_its_group_where_it_can(sizes, seed):
    groups = torch.cat([torch.full((size,), i) for i, size in enumerate(sizes)])
    batch = len(groups)
    source = permute_across_groups(groups, batch, torch.Generator().manual_seed(seed))
    assert sorted(source.tolist()) == list(range(batch))
    if max(sizes) * 2 <= batch:
        assert (groups[source] != groups).all()
    elif batch > 1 and len(sizes) == 1:
        assert (source != torch.arange(batch)).all()


def test_rows_without_information_are_counted():
    maps = MAPS.clone()
    maps[1], maps[4, 0, 0] = 0, torch.nan
    w = allocation_weights(Allocation(), maps, GRID)
    assert uniform_rows(w) == 2
    assert torch.equal(w[[1, 4]], torch.ones(2, 6, 10))


def test_errors():
    with pytest.raises(ValueError, match="strategy: got 'best'"):
        allocation_weights(Allocation(strategy="best"), MAPS, GRID)
    with pytest.raises(ValueError, match="masks: got None, expected the reward's masks for strategy 'oracle'"):
        allocation_weights(Allocation(strategy="oracle"), MAPS, GRID)
    with pytest.raises(ValueError, match="maps: got None, expected maps for strategy 'attention'"):
        allocation_weights(Allocation(), None, GRID)
    for name, value in (
        ("share", 0.0),
        ("share", 1.1),
        ("share", float("nan")),
        ("factor", 0.0),
        ("factor", float("inf")),
        ("noise_window", (0.5, 0.2)),
        ("noise_window", (0.0, float("nan"))),
        ("warmup", -1),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: got .*, expected"):
            allocation_weights(Allocation(**{name: value}), MAPS, GRID)


def test_temporal_weights_by_hand():
    noise = torch.tensor([0.6, 0.3, 0.3])[:, None].expand(3, 2)
    flat_and_half = torch.tensor([[1.0, 1.0], [0.0, 2.0]])  # mean squares 1 and 2
    spatial = torch.stack([flat_and_half, flat_and_half[[1, 0]], flat_and_half[[0, 0]]])[:, :, None]
    assert temporal_weights("none", noise, spatial) is None
    got = temporal_weights("noise_level", noise, None)
    torch.testing.assert_close(got, torch.tensor([[1.5, 1.5], [0.75, 0.75], [0.75, 0.75]]))
    got = temporal_weights("concentration", noise, spatial)
    torch.testing.assert_close(got, torch.tensor([[0.75, 1.5], [1.5, 0.75], [0.75, 0.75]]))


@pytest.mark.parametrize("temporal", [t for t in TEMPORAL if t != "none"])
@given(steps=st.integers(1, 12), batch=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_temporal_weights_have_mean_one_over_the_steps(temporal, steps, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(steps, batch, generator=generator) + 1e-3
    spatial = torch.rand(steps, batch, 4, 6, generator=generator)
    spatial /= spatial.mean((2, 3), keepdim=True)
    got = temporal_weights(temporal, noise, spatial)
    assert got.dtype == torch.float32 and got.shape == (steps, batch) and (got > 0).all()
    # One rounding to float32 for each of the weights, of which none exceeds their sum, `steps`.
    torch.testing.assert_close(got.double().mean(0), torch.ones(batch).double(), rtol=0, atol=steps * 2**-24)


def test_temporal_errors():
    with pytest.raises(ValueError, match="temporal: got 'late', expected one of"):
        temporal_weights("late", torch.ones(2, 1), None)
    with pytest.raises(ValueError, match="weights: got None, expected weights for temporal 'concentration'"):
        temporal_weights("concentration", torch.ones(2, 1), None)


@pytest.mark.parametrize("strategy", ["attention", "topk", "random", "shuffled", "inverted"])
@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16])
def test_the_default_type_changes_no_weights(strategy, other):
    expected = weights(strategy)
    before = torch.get_default_dtype()
    torch.set_default_dtype(other)
    try:
        found = weights(strategy)
        strength = Allocation(warmup=4).strength(torch.full((2,), 0.5, dtype=torch.float32), 1)
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert strength.dtype == torch.float32 and strength.tolist() == [0.25, 0.25]


def test_a_number_as_timestep_is_found_under_another_default_type():
    from diffusers import FlowMatchEulerDiscreteScheduler

    from star.objective import scheduler_transition

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    timestep = float(scheduler.timesteps[1])
    expected = scheduler_transition(scheduler, timestep)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = scheduler_transition(scheduler, timestep)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected))
