"""What the hosts' diffs rely on, without the hosts: they are short and well formed, and do what their pages say."""

import re

import pytest
import torch
from torch.nn.functional import pad

from builders import GRID, TEXT, small_flux, small_inputs, small_transformer
from dropin import EXAMPLES, MOST_LINES, added_lines
from models import draw, kontext_inputs, qwen_image_inputs, seeded, small_qwen_image
from star.capture import allocated, capture, record
from star.concepts import ConceptTokens
from star.objective import weighted_gradient

DIFFS = sorted(path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.diff"))
PAGE = {"flow_grpo": "flow_grpo.md", "dance_grpo": "dance_and_mix_grpo.md", "mix_grpo": "dance_and_mix_grpo.md",
        "unirl": "unirl.md"}  # fmt: skip
TOKENS = ConceptTokens(torch.tensor([[[1, 2]], [[3, -1]]]), torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]]))


@pytest.mark.parametrize("diff", DIFFS)
def test_a_diff_is_short_and_its_page_names_it(diff):
    added = added_lines(diff)
    assert any(re.search(r"from star\b", line) for line in added)
    page = (EXAMPLES.parent / "docs" / PAGE[diff.split("/")[0]]).read_text()
    assert f"examples/{diff}" in page or diff.split("/")[1] in page
    changed = len(re.findall(r"^(?:\+(?!\+\+)|-(?!--))", (EXAMPLES / diff).read_text(), re.M))
    assert f"{changed} changed lines" in page or re.search(rf"`{diff.split('/')[1]}` \| {changed} \|", page)


@pytest.mark.parametrize("diff", [diff for diff in DIFFS if diff.startswith("flow_grpo/")])
def test_every_script_of_flow_grpo_records_and_weights(diff):
    added = "\n".join(added_lines(diff))
    assert 'weights=sample["weights"][:, j],' in added and '"weights": maps.weights(' in added
    windowed = any(name in diff for name in ("fast", "qwenimage"))
    assert ("steps=map(pipeline.scheduler.index_for_timestep, timesteps[0])" in added) == windowed
    # The pipelines of Qwen-Image's scripts put the prompts' rows first.
    assert ("rows=slice(len(prompts))" in added) == ("qwenimage" in diff)


@pytest.mark.parametrize("path", ["verl_omni/verl_star.py", "verl_omni/verl_star_qwen_image.py"])
def test_an_adapter_of_verl_omni_is_short_and_for_a_pipeline_of_its_own(path):
    text = (EXAMPLES / path).read_text()
    assert sum(bool(line.strip()) for line in text.splitlines()) <= MOST_LINES
    kind = "QwenImagePipeline" if "qwen" in path else "StableDiffusion3Pipeline"
    assert f'@DiffusionModelBase.register("{kind}", algorithm="flow_grpo")' in text
    page = (EXAMPLES.parent / "docs" / "verl_omni.md").read_text()
    assert path in page and f"{sum(bool(line.strip()) for line in text.splitlines())} " in page


@pytest.fixture(scope="module")
def recorded():
    """A Record of four passes at different latents, and the passes' inputs."""
    model = small_transformer()
    passes = [small_inputs() | {"hidden_states": draw(2, 4, 2 * GRID[0], 2 * GRID[1]) + step} for step in range(4)]
    with torch.no_grad(), record(model, TOKENS) as result:
        for inputs in passes:
            model(**inputs)
    return result


def test_weights_of_a_window_are_those_of_its_steps(recorded):
    every = recorded.weights()
    assert torch.equal(recorded.weights(steps=[1, 2]), every[:, 1:3])
    assert torch.equal(recorded.weights(steps=map(int, torch.tensor([3, 0]))), every[:, [3, 0]])
    assert not torch.equal(every[:, 1], every[:, 2])


@pytest.mark.parametrize("steps", [[4], [-1], []])
def test_a_step_that_no_pass_has_is_refused(recorded, steps):
    with pytest.raises(ValueError, match=r"steps: got .*, expected numbers of passes in 0\.\.3"):
        recorded.weights(steps=steps)


def test_qwen_image_with_the_prompts_rows_first():
    """Its scripts' order of guidance: rows=slice(B) reads the prompts' rows, where diffusers' order is the other."""
    model = seeded(small_qwen_image)
    both = qwen_image_inputs(4, GRID, masked=True)
    both["hidden_states"][2:] = both["hidden_states"][:2]
    alone = {k: v[:2] for k, v in both.items()}
    del alone["encoder_hidden_states_mask"]  # no row of these is masked
    with torch.no_grad():
        with record(model, TOKENS, rows=slice(2)) as prompts:
            model(**both)
        with record(model, TOKENS) as expected:
            model(**alone)
        with record(model, TOKENS) as others:
            model(**both)
    torch.testing.assert_close(prompts.weights(), expected.weights(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(prompts.weights(), others.weights(), rtol=1e-2)
    assert prompts.weights().shape == (2, 1, GRID[0] * GRID[1])


def test_kontext_has_weights_of_the_image_that_is_denoised_alone():
    model, inputs = small_flux(), kontext_inputs(2, GRID)
    with torch.no_grad(), record(model, TOKENS) as result:
        model(**inputs)
    locations = GRID[0] * GRID[1]
    assert inputs["hidden_states"].shape[1] > locations
    assert result.weights().shape == (2, 1, locations)  # as many as the script's model_pred[:, : latents.size(1)]


def test_allocated_around_a_replay_of_several_steps_weights_each_by_its_own_maps():
    """UniRL's replay makes all of its passes in one call: `allocated(model, tokens)(replay)(...)`."""
    model = small_transformer()
    passes = [small_inputs() | {"hidden_states": draw(2, 4, 2 * GRID[0], 2 * GRID[1]) + step} for step in range(2)]

    def replay():
        return torch.stack([model(**inputs, return_dict=False)[0] for inputs in passes], 1)

    plain, replayed = replay(), allocated(model, TOKENS)(replay)()
    assert torch.equal(plain, replayed)
    weights = []
    for inputs in passes:
        with torch.no_grad(), record(model, TOKENS) as one:
            model(**inputs)
        weights.append(one.weights()[:, 0])
    outside = torch.randn_like(plain)
    expected = torch.stack([weighted_gradient(plain[:, i], w) for i, w in enumerate(weights)], 1)
    parameter = model.proj_out.weight
    gradients = [torch.autograd.grad((out * outside).sum(), parameter, retain_graph=True)[0] for out in
                 (replayed, expected, plain)]  # fmt: skip
    peak = gradients[2].abs().max().item()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5 * peak)
    assert not torch.allclose(gradients[0], gradients[2], rtol=0, atol=1e-2 * peak)


@pytest.mark.parametrize("grad", [True, False])
def test_the_unconditional_pass_may_have_a_shorter_text(grad):
    """verl-omni's Qwen-Image: the negative prompt is a pass of its own, of fewer tokens than the prompts' concepts
    have, in the update and in the pass without gradients that makes old_log_probs."""
    model, inputs = seeded(small_qwen_image), qwen_image_inputs(2, GRID)
    tokens = ConceptTokens(torch.full_like(TOKENS.index, TEXT - 1), torch.full_like(TOKENS.weight, 0.5))
    negative = inputs | {"encoder_hidden_states": draw(2, 2, 24)}
    with torch.set_grad_enabled(grad):
        plain = [model(**given, return_dict=False)[0] for given in (inputs, negative)]
        with allocated(model, tokens, first_pass=True) as maps:
            outputs = [model(**given, return_dict=False)[0] for given in (inputs, negative)]
    assert all(torch.equal(*pair) for pair in zip(plain, outputs, strict=True))
    assert maps.read().shape == (2, 1, GRID[0] * GRID[1])
    assert not any(hasattr(block.attn.processor, "star_observer") for block in model.transformer_blocks)
    if grad:
        with torch.no_grad(), record(model, tokens) as expected:
            model(**inputs)
        weights, parameter = expected.weights()[:, 0], model.proj_out.weight
        for one, other in zip(plain, outputs, strict=True):
            of = [torch.autograd.grad(x.square().sum(), parameter)[0] for x in (weighted_gradient(one, weights), other)]
            torch.testing.assert_close(*of, rtol=1e-4, atol=1e-5 * of[0].abs().max().item())


def test_texts_that_are_padded_further_in_the_update_keep_their_tokens():
    """Hosts encode a batch to its own length and pad it to others': text columns stay where they were."""
    model, inputs = seeded(small_qwen_image), qwen_image_inputs(2, GRID)
    longer = inputs | {"encoder_hidden_states": pad(inputs["encoder_hidden_states"], (0, 0, 0, 3))}
    longer["encoder_hidden_states_mask"] = torch.arange(TEXT + 3).expand(2, -1) < TEXT
    maps = []
    for given in (inputs, longer):
        with torch.no_grad(), capture(model, TOKENS) as captured:
            model(**given)
        maps.append(captured.read())
    torch.testing.assert_close(*maps, rtol=1e-4, atol=1e-6)
