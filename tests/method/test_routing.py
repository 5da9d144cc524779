"""Credit per concept: to the locations at which the concept's own map looks."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from star.objective import other_concepts, route_advantages

GRID, PATCH = (2, 3), 2


def by_formula(advantages, concepts, maps, strength):
    """A_p = A + k sum_g (s_gp - 1/G) A_g, written for one location after the other in Python's floats."""
    rows = []
    for b in range(len(advantages)):
        known = [
            g for g in range(maps.shape[1]) if math.isfinite(concepts[b, g]) and sum(maps[b, g].double().tolist()) > 0
        ]
        row = []
        for p in range(maps.shape[2]):
            u = {g: float(maps[b, g, p]) / (sum(maps[b, g].double().tolist()) / maps.shape[2]) for g in known}
            total, value = sum(u.values()), float(advantages[b])
            for g in known if total > 0 else []:
                value += strength * (u[g] / total - 1 / len(known)) * float(concepts[b, g])
            row.append(value)
        rows.append(row)
    field = torch.tensor(rows, dtype=torch.float64).view(-1, *GRID)
    return field.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)


def case(seed, batch=4, concepts=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    advantages = torch.randn(batch, generator=generator, dtype=dtype)
    own = torch.randn(batch, concepts, generator=generator, dtype=dtype)
    maps = torch.rand(batch, concepts, math.prod(GRID), generator=generator, dtype=dtype) ** 4
    return advantages, own, maps


@given(seed=st.integers(0, 10**6), concepts=st.integers(1, 4), strength=st.floats(0, 3), holes=st.integers(0, 2**12))
def test_it_is_the_formula(seed, concepts, strength, holes):
    advantages, own, maps = case(seed, concepts=concepts)
    for b in range(4):  # concepts without a credit, without tokens, and locations at which nothing looks
        for g in range(concepts):
            if holes >> (b * concepts + g) & 1:
                (own if g % 2 else maps)[b, g] = math.nan if g % 2 else 0.0
    maps[0, :, 2] = 0.0
    expected = by_formula(advantages, own, maps, strength)
    got = route_advantages(advantages, own, maps, GRID, strength=strength, patch=PATCH)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    single = route_advantages(advantages.float(), own.float(), maps.float(), GRID, strength=strength, patch=PATCH)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-5)


def test_concepts_that_did_equally_well_change_nothing():
    """The factors of the concepts' advantages sum to zero at every location."""
    advantages, own, maps = case(0, dtype=torch.float32)
    equal = own[:, :1].expand_as(own)
    got = route_advantages(advantages, equal, maps, GRID, strength=2.0, patch=1)
    assert torch.equal(got, advantages.view(-1, 1, 1).expand(-1, *GRID))
    # So an offset of all concepts of an image is of no account.
    torch.testing.assert_close(
        route_advantages(advantages, own + 3.0, maps, GRID), route_advantages(advantages, own, maps, GRID)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_to_be_told_apart_keeps_the_very_bits_of_the_image(dtype):
    advantages, own, maps = case(1, batch=6, dtype=dtype)
    own[0, 1:] = math.nan  # one concept alone
    maps[1, :2] = 0.0  # another one alone: the others have no tokens
    own[2] = math.nan  # nothing known
    maps[3, 0, 1] = math.nan  # maps that cannot be used
    maps[4, 2, 0] = -1.0
    plain = advantages.view(-1, 1, 1).expand(-1, *GRID)
    got = route_advantages(advantages, own, maps, GRID, patch=1)
    assert torch.equal(got[:5], plain[:5]) and not torch.equal(got[5], plain[5])
    assert torch.equal(route_advantages(advantages, own, maps, GRID, strength=0.0, patch=1), plain)
    single = route_advantages(advantages, own[:, :1], maps[:, :1], GRID, strength=5.0, patch=1)
    assert torch.equal(single, plain)


def test_a_concept_that_is_not_known_is_as_if_it_were_not_there():
    advantages, own, maps = case(2)
    expected = route_advantages(advantages, own[:, [0, 2]], maps[:, [0, 2]], GRID)
    unknown, unsaid, broken = own.clone(), maps.clone(), maps.clone()
    unknown[:, 1], unsaid[:, 1] = math.nan, 0.0
    broken[:, 1] = math.inf  # of no account without a credit
    for credits, fields in ((unknown, maps), (own, unsaid), (unknown, broken)):
        torch.testing.assert_close(route_advantages(advantages, credits, fields, GRID), expected)


def test_blame_goes_where_the_missing_concept_was_meant_to_be():
    maps = torch.zeros(1, 2, 6)
    maps[0, 0, :2], maps[0, 1, 4:] = 1.0, 1.0  # left top, right bottom
    got = route_advantages(torch.tensor([-0.5]), torch.tensor([[0.0, -2.0]]), maps, GRID, patch=1).flatten()
    assert got.tolist() == [0.5, 0.5, -0.5, -0.5, -1.5, -1.5]


def test_each_sample_may_have_a_strength_of_its_own():
    advantages, own, maps = case(3)
    strengths = torch.tensor([0.0, 0.5, 1.0, 2.0])
    got = route_advantages(advantages, own, maps, GRID, strength=strengths)
    for b, strength in enumerate(strengths.tolist()):
        alone = route_advantages(advantages[b : b + 1], own[b : b + 1], maps[b : b + 1], GRID, strength=strength)
        torch.testing.assert_close(got[b : b + 1], alone)


def test_routing_errors():
    advantages, own, maps = case(4)
    with pytest.raises(
        ValueError, match=r"concept_advantages: got \(4, 2\) for advantages \(4,\) and maps \(4, 3, 6\)"
    ):
        route_advantages(advantages, own[:, :2], maps, GRID)
    with pytest.raises(ValueError, match=r"maps: got \(4, 3, 6\), expected \(4, G, 8\) for the grid \(2, 4\)"):
        route_advantages(advantages, own, maps, (2, 4))
    for wrong in (-1.0, math.nan, torch.ones(3)):
        with pytest.raises(ValueError, match=r"strength: got .*, expected a number of at least 0, or one for each"):
            route_advantages(advantages, own, maps, GRID, strength=wrong)


def test_the_control_gives_every_concept_another_ones_map():
    maps = torch.rand(3, 4, 6) + 0.1
    maps[0, 2] = maps[1, 1:] = maps[2] = 0  # three concepts with a map, one, none
    got = other_concepts(maps)
    assert torch.equal(got[0], maps[0, [1, 3, 2, 0]])
    assert torch.equal(got[1], maps[1]) and torch.equal(got[2], maps[2])
