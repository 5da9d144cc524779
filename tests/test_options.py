"""Options of every command: 0 is 0, paths begin with no ~, numbers in the help are those of the code."""

import ast
import dataclasses
import re
import typing
from pathlib import Path

import pytest

import star
from star import cli
from star import config as configuration
from star.config import OLD_VALUES, Config, ConfigError, check_ranges
from star.options import HELD_OUT, Check, Eval, Maps, Probe
from star.presets import preset
from star.shapes import pretrain
from star.study.command import Compare
from star.training.task import NO_TASK

COMMANDS = (Check, Eval, Maps, Probe, Compare, pretrain.Config)
SECTIONS = tuple(type(getattr(Config(), f.name)) for f in dataclasses.fields(Config) if f.name != "task")


def numbers(kind):
    """Names of the fields that take a number."""
    hints = typing.get_type_hints(kind)
    for name, hint in hints.items():
        kinds = {hint, *typing.get_args(hint)}
        if kinds & {int, float} and bool not in kinds and str not in kinds:
            yield name


ZEROS = [(kind, name) for kind in (*COMMANDS, *SECTIONS) for name in numbers(kind)]


def is_taken(kind, name, value):
    options = kind()
    setattr(options, name, value)
    try:
        check_ranges(options, "")
    except ConfigError as error:
        assert re.match(rf"{name}: got {value}, expected a number (at least|above|finite)", str(error))
        return False
    return True


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, n in ZEROS if k in COMMANDS])
def test_numbers_of_commands_have_a_range(kind, name):
    assert not is_taken(kind, name, float("nan"))
    assert name in ("guidance_scale", "timestep_mean") or not is_taken(kind, name, -1)


def test_a_zero_is_never_taken_for_not_given():
    """`options.name or default` gives the default for 0: only where the help says what 0 means may it stand."""
    said = {"micro_batch", "window", "noise_levels"}  # 0: all
    taken = {name for kind, name in ZEROS if is_taken(kind, name, 0)} - said
    assert {"seed", "update_norm", "max_sequence_length"} <= taken
    for path in sorted(Path(star.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
                first = node.values[0]
                assert not (isinstance(first, ast.Attribute) and first.attr in taken), f"{path}:{node.lineno}"


def test_paths_of_every_command_begin_with_no_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = cli.read_options(Eval, ["--out=~/a", "--lora=~/b", "--models", "clipscore", "~/c"], "star eval")
    assert options.out == tmp_path / "a" and options.lora == f"{tmp_path}/b"
    assert options.models == {"clipscore": f"{tmp_path}/c"}
    assert cli.read_options(Maps, ["--out=~/a.png"], "star maps").out == tmp_path / "a.png"
    assert cli.read_options(Compare, ["--spec=~/s"], "star compare").spec == tmp_path / "s"
    given = cli.read_config(["--preset", "shapes", "--model.path=~/m", "--out=~/r"], "star train")
    read = configuration.update(preset("shapes"), {"model": {"path": "~/m"}, "run": {"out": "~/r"}})
    assert given == read and given.model.path == f"{tmp_path}/m" and given.run.out == tmp_path / "r"


def test_the_help_tells_the_numbers_of_the_code(capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name in ("images_per_prompt", "steps", "guidance_scale", "height", "width", "max_sequence_length", "batch"):
        assert f"{getattr(NO_TASK.images, name)} without a task" in text.split(f"--{name.replace('_', '-')} ")[1][:160]
    assert f"{HELD_OUT} of a task" in text


@pytest.mark.parametrize(("old", "new"), OLD_VALUES["optimization.mixed_precision"].items())
def test_a_precision_has_one_spelling_and_the_old_one_is_read(old, new, tmp_path, caplog):
    for arguments in (["--optimization.mixed-precision", old], [f"--optimisation.mixed-precision={old}"]):
        caplog.clear()
        config = cli.read_config(["--preset", "shapes", *arguments], "star train")
        assert config.optimization.mixed_precision == new and f"{old} is now {new}" in caplog.text
    path = tmp_path / "c.yaml"
    path.write_text(f"optimization: {{mixed_precision: {old}}}\n")
    caplog.clear()
    assert configuration.load(path).optimization.mixed_precision == new and f"{old} is now {new}" in caplog.text


@pytest.mark.parametrize(
    "wrong", [{"mix": 2.0}, {"cap": 0.0}, {"smooth": -1.0}, {"sharpen": 0.0}, {"mix": float("nan")}]
)
def test_an_allocation_is_checked_before_anything_is_loaded(wrong):
    config = preset("shapes")
    config.allocation = dataclasses.replace(config.allocation, strategy="uniform", **wrong)
    with pytest.raises(ConfigError, match=rf"allocation\.{next(iter(wrong))}: got"):
        config.check()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "--steps", "1", "--n", "1"], "steps: got 1, which the model's scheduler cannot make"),
        (["maps", "--steps", "1"], "steps: got 1, which the model's scheduler cannot make"),
        (["maps", "--height", "37"], "height: got 37, expected a multiple of 4"),
        (["eval", "--width", "4000", "--n", "1"], "width: got 4000, expected a multiple of 4, at most"),
        (["maps", "--layers"], "layers: got none, expected at least one block"),
        (["compare", "--jobs", "0"], "jobs: got 0, expected a number at least 1"),
        (["compare", "--iterations", "0"], "iterations: got 0, expected a number at least 1"),
    ],
)
def test_numbers_that_a_command_cannot_take_are_one_line(arguments, words, capsys):
    assert cli.main(arguments) == 1
    (line,) = [line for line in capsys.readouterr().err.strip().splitlines() if "%|" not in line]
    assert line.startswith(f"star: {words}")
