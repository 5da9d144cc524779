"""`star check`: every verdict holds for a sound pipeline, and fails for what it is there to find."""

import json
import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

import star.check
from pipelines import ENCODINGS
from star.check import Question, check, words
from star.check.noise import AUTOCAST, BATCH, _autocast, _log_ratios, floors
from star.check.passes import record
from star.cli import main
from star.shapes.model import load_pipeline
from star.transition import schedule

PROMPTS = ("a photo of a red bench", "a red bench left of two green cats")
CALL = dict(num_inference_steps=3, height=64, width=64)
CALLS = {
    "flux": CALL,
    "kontext": {**CALL, "max_area": 64 * 64},
    "flux2": CALL,
    "qwen_image": CALL,
    "z_image": CALL,
    "sana": {**CALL, "use_resolution_binning": False},
    "wan": {**CALL, "num_frames": 9},
    "ltx": {**CALL, "num_frames": 9},
}


def verdicts(pipeline, **changes):
    """By name."""
    question = Question(**{"prompts": PROMPTS, "call": CALL, **changes})
    pipeline.set_progress_bar_config(disable=True)
    return {verdict.name: verdict for verdict in check(pipeline, question)}


def flux():
    return ENCODINGS["flux"].build()


@pytest.mark.parametrize("name", CALLS)
def test_a_sound_pipeline_of_every_kind(name):
    found = verdicts(ENCODINGS[name].build(), call=CALLS[name], clip_range=1e-3)
    assert list(found) == ["bits", "maps", "words", "noise", "native"]
    assert all(found[name].level == "ok" for name in ("bits", "maps", "words", "noise")), found
    assert any("log-sum-exp" in line for line in found["native"].lines)


def test_the_verdicts_leave_the_pipeline_as_it_was():
    pipeline = flux()
    before = [block.attn.processor for block in pipeline.transformer.transformer_blocks]
    verdicts(pipeline)
    assert [block.attn.processor for block in pipeline.transformer.transformer_blocks] == before
    assert not pipeline.transformer.training and not pipeline.transformer.is_gradient_checkpointing
    assert not pipeline.transformer._forward_hooks and not pipeline.transformer._forward_pre_hooks


# --- bits and maps ----------------------------------------------------------------------------------------------------


def test_a_capture_that_changes_bits_is_wrong(monkeypatch):
    capture = star.check.capture

    @contextmanager
    def changing(transformer, *args, **options):
        handle = transformer.register_forward_hook(lambda module, inputs, output: (output[0] * (1 + 1e-6),))
        with capture(transformer, *args, **options) as maps:
            yield maps
        handle.remove()

    monkeypatch.setattr(star.check, "capture", changing)
    found = verdicts(flux())["bits"]
    assert found.level == "wrong" and found.words.startswith("the output with capture on differs by")


def test_a_model_that_does_not_repeat_itself_is_wrong():
    pipeline = flux()
    pipeline.transformer.register_forward_hook(lambda module, inputs, out: (out[0] + 0.1 * torch.randn_like(out[0]),))
    found = verdicts(pipeline)
    assert found["bits"].level == "wrong" and "two passes without capture differ by" in found["bits"].words
    assert found["noise"].level == "wrong" and "'the same pass again'" in found["noise"].words


def test_maps_that_are_not_the_softmax_are_wrong(monkeypatch):
    layers = star.capture.Maps.layers
    monkeypatch.setattr(star.capture.Maps, "layers", lambda maps: 1.001 * layers(maps))
    found = verdicts(flux())["maps"]
    assert found.level == "wrong" and "off the float64 softmax by 1.0e-03 at most, allowed 1e-04" in found.words


def test_a_class_without_a_row_is_wrong(monkeypatch):
    monkeypatch.delitem(star.check.passes.layout_of.__globals__["LAYOUTS"], "FluxTransformer2DModel")
    found = verdicts(flux())
    assert {found[name].level for name in ("bits", "maps", "native")} == {"wrong"}
    assert "expected one of SD3Transformer2DModel" in found["bits"].words


# --- words ------------------------------------------------------------------------------------------------------------


def test_words_are_a_table_of_rows_and_texts():
    found = verdicts(ENCODINGS["sd3"].build(), call=dict(num_inference_steps=2, height=32, width=32))["words"]
    assert found.level == "ok" and found.lines[0] == PROMPTS[0]
    assert found.lines[1] == "  red bench  5-6: red|bench   81-82:  red| bench"


def test_a_prompt_that_is_cut_is_wrong():
    long = "a red bench, " * 12 + "a blue door"
    found = verdicts(flux(), prompts=(long,), call={**CALL, "max_sequence_length": 32})["words"]
    assert found.level == "wrong" and found.words.startswith("no token says 'red bench'")
    assert found.words.endswith("the prompt is cut before it") and found.lines[-1] == "  blue door  no token, cut"
    found = words(flux(), Question(("a red bench, " + "very " * 40,), {**CALL, "max_sequence_length": 32}))[1]
    assert found.level == "warning" and found.words.startswith("prompts: some are longer than FluxPipeline reads")


def test_a_language_that_the_rules_do_not_know_and_a_prompt_without_concepts_are_told():
    found = verdicts(flux(), prompts=("ein roter Hund und eine Katze",))["words"]
    assert found.level == "warning" and "the rules know English, not German" in found.words
    found = verdicts(flux(), prompts=("of and",))["words"]
    assert found.level == "warning" and "  no concept: weights are 1" in found.lines


def test_brackets():
    found = verdicts(flux(), prompts=("a [red] bench",), brackets=True)["words"]
    assert found.lines[1].split() == ["red", "1:", "red"]


# --- noise ------------------------------------------------------------------------------------------------------------


def noisy(pipeline, when):
    """Multiplies the output by 1.01 in passes of that kind."""
    pipeline.transformer.register_forward_hook(
        lambda module, inputs, out: (out[0] * 1.01,) if when(module, out[0]) else None
    )
    return pipeline


def test_dropout_is_wrong():
    pipeline = flux()
    for block in pipeline.transformer.transformer_blocks:
        block.register_forward_hook(
            lambda module, inputs, out: (out[0], F.dropout(out[1], 0.1, training=module.training))
        )
    found = verdicts(pipeline)["noise"]
    assert found.level == "wrong" and "noise of 'train mode, with gradients'" in found.words
    assert found.words.endswith("the first ratio is not 1")


def test_another_batch_size_is_a_warning():
    found = verdicts(noisy(flux(), lambda module, out: len(out) == 1))["noise"]
    assert found.level == "warning" and "noise of another batch size" in found.words


def test_the_clip_range_decides():
    pipeline = noisy(flux(), lambda module, out: module.training)
    (floor,) = (one for one in floors(recorded(pipeline), 0.7, 0) if one.way == "train mode, with gradients")
    assert verdicts(pipeline, clip_range=2 * floor.largest)["noise"].level == "ok"
    assert verdicts(pipeline, clip_range=0.5 * floor.largest)["noise"].level == "wrong"


def recorded(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return record(pipeline, PROMPTS, {**CALL, "generator": torch.Generator().manual_seed(0)})


def test_a_clip_range_of_0_is_not_below_a_noise_of_0():
    pipeline = flux()
    exact = {floor.way for floor in floors(record(pipeline, list(PROMPTS), CALL), 0.7, 0) if floor.largest == 0}
    found = verdicts(pipeline, clip_range=0.0)["noise"]
    assert "the same pass again" in exact and not any(way in found.words for way in exact)


def test_autocast_alone_above_the_clip_range_is_said():
    pipeline = flux()
    largest = {floor.way: floor.largest for floor in floors(record(pipeline, list(PROMPTS), CALL), 0.7, 0)}
    found = verdicts(pipeline, clip_range=0.1 * largest[AUTOCAST])["noise"]
    assert found.level == "ok" and found.words.endswith("but below that of autocast in one pass alone")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"call": {"height": 64, "width": 64}}, "call: got num_inference_steps None, expected at least 2"),
        ({"call": {**CALL, "num_inference_steps": 1}}, "call: got num_inference_steps 1, expected at least 2"),
        ({"prompts": ()}, "prompts: got none, expected at least one"),
    ],
)
def test_a_question_that_cannot_be_asked_is_one_clear_line(changes, words):
    with pytest.raises(ValueError, match=f"^{words}$"):
        verdicts(flux(), **changes)


def test_what_cannot_run_is_a_warning():
    def refuse(module, inputs, output):
        if module.training:
            raise RuntimeError("out of memory")

    pipeline = flux()
    pipeline.transformer.register_forward_hook(refuse)
    found = verdicts(pipeline)["noise"]
    assert found.level == "warning" and found.words == "'train mode, with gradients' cannot run"
    assert any("out of memory" in line for line in found.lines)


def test_log_ratios_are_those_of_the_gaussians():
    """In float64 by the densities; the subtraction of float32 log-probs is near."""
    old, new = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    new = old + 1e-2 * new
    sigmas = torch.tensor([1.0, 0.7, 0.3, 0.0], dtype=torch.float64)
    exact, subtracted = _log_ratios(sigmas, 1, 0.7, 3, old, new)
    one = schedule(sigmas, "flow_sde", 0.7, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    sample, noise = (torch.randn(old.shape, generator=generator).double() for _ in range(2))
    means = [one.a[1] * sample + one.b[1] * velocity.double() for velocity in (old, new)]
    density = torch.distributions.Normal
    after = means[0] + one.s[1] * noise
    logs = [density(mean, one.s[1]).log_prob(after).flatten(1).mean(1) for mean in means]
    torch.testing.assert_close(exact, logs[1] - logs[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(subtracted.double(), exact, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(("name", "guidance"), [("flux", None), ("wan", 5.0), ("ltx", 3.0), ("z_image", 5.0)])
def test_velocities_are_guided_as_the_pipeline_does(name, guidance):
    """In two passes, in one of twice the rows, or not at all; each image alone gives the same to rounding."""
    pipeline = ENCODINGS[name].build()
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        passes = record(pipeline, PROMPTS, {**CALLS[name], "generator": torch.Generator().manual_seed(0)})
        velocity, alone = passes.velocity(0), passes.velocity(0, alone=True)
    assert passes.guidance == guidance and len(velocity) == 2
    torch.testing.assert_close(alone, velocity, rtol=1e-3, atol=1e-4)
    if name == "wan":  # conditional first
        conditional, unconditional = (passes.output(one) for one in passes.steps[0])
        expected = unconditional + 5 * (conditional - unconditional)
        torch.testing.assert_close(velocity, expected.float())


def test_of_two_transformers_the_first_is_looked_at():
    """As Wan 2.2 has them, for the steps before and after a boundary."""
    pipeline = ENCODINGS["wan"].build()
    pipeline.register_modules(transformer_2=ENCODINGS["wan"].build().transformer)
    pipeline.register_to_config(boundary_ratio=0.6)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        passes = record(pipeline, PROMPTS, {**CALLS["wan"], "generator": torch.Generator().manual_seed(0)})
    assert passes.transformer is pipeline.transformer and len(passes.steps) < 3
    assert len(passes.sigmas) == len(passes.steps) + 1
    found = verdicts(pipeline, call=CALLS["wan"], clip_range=1e-3)
    assert all(found[name].level == "ok" for name in ("bits", "maps", "words", "noise"))


# --- what runs --------------------------------------------------------------------------------------------------------


def test_operators_that_fall_back_are_a_warning(monkeypatch):
    monkeypatch.setattr(star.check, "implementations", lambda *_: {"native": "not built", "reference": None})
    found = verdicts(flux())["native"]
    assert found.level == "warning" and "run as plain PyTorch on cpu; star info says why" in found.words


def test_blocks_that_are_compiled_are_counted():
    pipeline = flux()
    pipeline.transformer.transformer_blocks[0].compile(backend="eager")
    with torch.compiler.set_stance("force_eager"):
        assert verdicts(pipeline)["native"].lines[-1] == "compiled: 1 of 2 blocks"


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_on_the_embedded_model(capsys, tmp_path):
    """One screen; the exit code is that of the worst verdict."""
    assert main(["check"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "StableDiffusion3Pipeline on cpu, float32, 3 steps" and len(out) < 25
    assert max(map(len, out)) < 130
    ways = ("the same pass again", "train mode, with gradients", "and gradient checkpointing", BATCH, AUTOCAST)
    assert all(any(way in line for line in out) for way in ways)
    long = "a red circle left of a blue square left of a green ring"
    assert main(["check", "--prompt", long]) == 1
    assert "wrong    words   no token says 'green ring': the prompt is cut before it" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "nothing")]) == 1
    assert "model: " in capsys.readouterr().err


def test_the_command_on_a_folder(capsys, tmp_path):
    load_pipeline().save_pretrained(tmp_path / "saved")
    (tmp_path / "prompts.txt").write_text("a [red] circle left of a blue square\ntwo green rings\n")
    arguments = ["check", str(tmp_path / "saved"), "--prompts", str(tmp_path / "prompts.txt"), "--brackets"]
    code = main([*arguments, "--n", "1", "--dtype", "bfloat16", "--json", str(tmp_path / "new" / "found.json")])
    found = json.loads((tmp_path / "new" / "found.json").read_text())
    assert code == any(verdict["level"] == "wrong" for verdict in found)
    assert [verdict["name"] for verdict in found] == ["bits", "maps", "words", "noise", "native"]
    out = capsys.readouterr().out
    assert "cpu, bfloat16" in out and "red  2: red" in out and "ring" not in out
    for name in ("prompts", "image"):
        (tmp_path / name).write_text("")
        assert main([*arguments[:2], f"--{name}", str(tmp_path / name)]) == 1
        assert f"star: {name}: " in capsys.readouterr().err


def test_autocast_says_nothing_of_a_slower_kernel():
    """torch warns of it at the first norm whose weights are float32; any other warning stays."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with _autocast("cpu"):
            warnings.warn("Mismatch dtype between input and weight: input dtype = c10::BFloat16", UserWarning, 2)
            warnings.warn("another", UserWarning, 2)
    assert [str(one.message) for one in caught] == ["another"]
