"""The snippets of README and docs/trainers.md run as they stand, on a small pipeline of SD3.5's structure."""

from pathlib import Path

import pytest
import torch

from builders import scheduler, small_sd35
from star.capture import capture
from star.concepts import concept_tokens
from star_kernels import allocate, policy_loss

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PROMPTS = ["a red bench left of two green cats", "a dog"]


def snippet(section: str, page: str = README) -> str:
    """The Python block of a section."""
    (block,) = page.split(f"## {section}\n")[1].split("\n## ")[0].split("```python\n")[1:]
    return block.split("```")[0]


@pytest.fixture
def given():
    """What the snippets presume: names that a trainer has."""
    pipeline = small_sd35(PROMPTS)
    with torch.no_grad():
        for block in pipeline.transformer.transformer_blocks:
            block.attn.to_q.weight *= 3  # sharper attention than fresh weights have
        embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(PROMPTS, None, None)
    plan = pipeline.scheduler = scheduler()
    names = dict(pipeline=pipeline, transformer=pipeline.transformer, prompts=PROMPTS, embeds=embeds, pooled=pooled)
    names |= dict(latents=torch.randn(2, 16, 8, 12), timesteps=plan.timesteps[3].expand(2))
    names |= dict(advantages=torch.tensor([1.0, -1.0]))
    return names, negative, negative_pooled


def with_guidance(names, negative, negative_pooled):
    double = {name: torch.cat([names[name]] * 2) for name in ("latents", "timesteps")}
    embeds, pooled = torch.cat([negative, names["embeds"]]), torch.cat([negative_pooled, names["pooled"]])
    return names | double | dict(embeds=embeds, pooled=pooled)


@pytest.mark.parametrize("guidance", [False, True])
def test_in_your_trainer(given, guidance):
    names = with_guidance(*given) if guidance else given[0]
    model = names["transformer"]
    run = lambda: model(names["latents"], names["embeds"], names["pooled"], names["timesteps"])[0]
    with capture(model, concept_tokens(names["pipeline"], PROMPTS), grid=(4, 6), rows=slice(-2, None)) as maps:
        plain = run()
    weights = allocate(maps.read(), (4, 6)).repeat(1 + guidance, 1, 1)[:, None]
    code = snippet("In your trainer")
    assert sum(line.startswith(("from ", "import ")) for line in code.splitlines()) == code.count("with ") == 1
    exec(code, names)
    assert torch.equal(names["noise_pred"], plain)
    outside = torch.randn_like(plain)
    parameter = model.proj_out.weight
    gradient = lambda out, by: torch.autograd.grad((out * by).sum(), parameter, retain_graph=True)[0]
    got, expected = gradient(names["noise_pred"], outside), gradient(plain, outside * weights)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert not torch.allclose(got, gradient(plain, outside), rtol=1e-2)


def test_the_parts(given):
    names = given[0]
    exec(snippet("The parts", (ROOT / "docs/trainers.md").read_text()), names)
    assert names["weights"].shape == (2, 8, 12) and (names["weights"] != 1).any()
    torch.testing.assert_close(names["weights"].mean((1, 2)), torch.ones(2))
    torch.testing.assert_close(names["loss"], torch.tensor(0.0), rtol=0, atol=1e-6)  # on policy, mean advantage 0
    assert names["statistics"].ratio_mean == pytest.approx(1, abs=1e-5)
    without = {name: names[name] for name in ("velocity", "prev_sample", "transition", "advantages", "old_mean")}
    scalar, _ = policy_loss(sample=names["latents"], **without)
    got, plain = (
        torch.autograd.grad(loss, names["velocity"], retain_graph=True)[0] for loss in (names["loss"], scalar)
    )
    torch.testing.assert_close(got, plain * names["weights"][:, None], rtol=1e-4, atol=1e-6 * plain.abs().max().item())
