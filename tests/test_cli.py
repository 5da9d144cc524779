"""The command line as a user meets it."""

import dataclasses
import io
import itertools
import json
import logging
import shlex
import subprocess
import sys

import pytest

import star_kernels
from builders import TINY_RUN
from star import cli, files
from star.check import Verdict
from star.cli import main
from star.reports import figures
from star.study.probe import Found
from star_kernels.ops import OPERATORS


def run(capsys, *arguments):
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_train_refuses_a_used_folder_resumes_and_overwrites(tmp_path, capsys):
    out = tmp_path / "run"
    train = ["train", *TINY_RUN, "--out", str(out)]
    code, output, _ = run(capsys, *train)
    assert code == 0
    named, command = output.splitlines()[-1].split(": ")
    assert (
        named == "one page of it" and run(capsys, *shlex.split(command)[1:])[0] == 0 and (out / "report.html").is_file()
    )
    files = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    code, _, error = run(capsys, *train)
    assert code == 1 and error.strip().splitlines()[-1] == (
        f"star: run.out: {out} is not empty; --run.resume continues it, --run.overwrite deletes it"
    )
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == files
    assert run(capsys, *train, "--resume", "--optimization.iterations", "2")[0] == 0
    assert (out / "metrics.jsonl").read_text().count("\n") == 2
    assert run(capsys, *train, "--overwrite")[0] == 0
    assert (out / "metrics.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--preset", "geneval"],
            "star: preset: unknown 'geneval', expected one of ['geneval-sd35m', 'geneval-sd35m-awm',",
        ),
        ([*TINY_RUN, "--run.reward", "beauty"], "star: reward: unknown 'beauty', expected one of ['ocr', 'geneval',"),
        ([*TINY_RUN, "--model.path", "/nowhere"], "star: model.path: '/nowhere' is no pipeline"),
        (["--config", "/nowhere.yaml"], "star: config: /nowhere.yaml cannot be read"),
        ([*TINY_RUN, "--sampling.prompts", "/nowhere.txt"], "star: prompts: /nowhere.txt cannot be read"),
        (
            ["--preset", "ocr-sd35m"],
            "star: prompts: dataset/ocr/train.txt cannot be read (No such file or directory); copy flow_grpo's folder",
        ),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_nothing_behind(tmp_path, capsys, arguments, words):
    out = tmp_path / "run"
    code, _, error = run(capsys, "train", *arguments, "--out", str(out))
    assert code == 1
    assert error.strip().startswith(words) and len(error.strip().splitlines()) == 1
    assert not out.exists()


def test_a_corrupt_checkpoint_is_one_line_and_stays(tmp_path, capsys):
    out = tmp_path / "run"
    train = ["train", *TINY_RUN, "--out", str(out)]
    assert run(capsys, *train)[0] == 0
    (state,) = out.rglob("state.pt")
    state.write_bytes(state.read_bytes()[:1000])
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    code, _, error = run(capsys, *train, "--resume", "--optimization.iterations", "2")
    assert code == 1 and "is damaged" in error and len(error.strip().splitlines()) == 1
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_eval_and_maps(tmp_path, capsys):
    code, output, _ = run(capsys, "eval", "--n", "16")
    assert code == 0 and "16 prompts of the held-out split" in output and "±" in output
    image = tmp_path / "maps.png"
    arguments = ("--prompt", "a red circle and a ring", "--out", str(image), "--steps", "3", "--layers", "2", "3")
    code, output, _ = run(capsys, "maps", *arguments)
    assert code == 0 and "red circle, ring; 2 blocks, 3 steps" in output and image.stat().st_size > 5000
    assert (
        run(capsys, "maps", "--prompt", "of and")[2].strip()
        == "star: prompt: got 'of and', which has no concept; mark one with [ ] and --brackets"
    )
    expected = "star: adapter: '/nowhere' is no adapter (there is no such folder)"
    assert run(capsys, "eval", "--lora", "/nowhere")[2].strip() == expected


def test_two_evaluations_into_one_folder_are_refused(tmp_path, capsys):
    """Their lines and images would be mixed."""
    out = tmp_path / "out"
    with files.new_folder(out, "out"):
        code, _, error = run(capsys, "eval", "--out", str(out))
    assert code == 1 and error == f"star: out: another process writes into {out}; choose a new folder\n"
    assert not out.exists()  # nothing was written
    with files.new_folder(out, "out"):
        (out / "results.jsonl").write_text("")
    code, _, error = run(capsys, "eval", "--out", str(out))
    assert code == 1 and error == f"star: out: {out} is not empty; choose a new folder\n"


@pytest.mark.parametrize(
    "command",
    [["maps", "--out"], ["check", "--json"], ["probe", "--preset", "shapes", "--json"]],
    ids=lambda one: one[0],
)
def test_a_file_of_somebody_elses_is_never_overwritten(tmp_path, capsys, command):
    strangers = {
        "notes.md": b"# mine",
        "empty": b"",
        "package.json": b'{"name": "mine", "recommended": 1}',
        "list.json": b'[{"name": "mine"}]',
        "photo.png": b"\x89PNG\r\n\x1a\nwhatever",
    }
    for name, data in strangers.items():
        path = tmp_path / name
        path.write_bytes(data)
        code, _, error = run(capsys, *command, str(path))
        assert code == 1 and path.read_bytes() == data
        assert error.startswith(f"star: {command[-1][2:]}: {path} is no ") and "so it stays as it is" in error
    code, _, error = run(capsys, *command, str(tmp_path))
    assert code == 1 and error == f"star: {command[-1][2:]}: {tmp_path} is a folder; name a file in it\n"


def test_their_own_files_are_overwritten(tmp_path):
    figure = tmp_path / "maps.png"
    figures.save(figures.make_grid(1, 1, (1.0, 1.0))[0], figure)
    files.claim(figure, "out", "figure of star maps", figures.is_figure)
    own = tmp_path / "verdicts.json"
    own.write_text(json.dumps([dataclasses.asdict(Verdict("bits", "ok", "equal"))]))
    files.claim(own, "json", "JSON of star check", files.is_json_of("level", "name", "words"))
    own.write_text(json.dumps({field.name: None for field in dataclasses.fields(Found)}))
    files.claim(own, "json", "JSON of star probe", files.is_json_of("gradients", "recommended"))


def test_info_tells_what_each_operator_uses(capsys):
    code, output, _ = run(capsys, "info")
    assert code == 0
    lines = output.splitlines()
    for operator in OPERATORS:
        (line,) = (line for line in lines if line.split()[0] == operator)
        for device in ("cpu", "cuda"):
            reasons = star_kernels.implementations(operator, device)
            chosen = next(name for name, reason in reasons.items() if reason is None)
            assert f"{chosen} on {device}" in line
            for name, reason in reasons.items():
                if reason is not None:
                    (told,) = (line for line in lines if line.startswith(f"no {name} on {device}: {reason} ("))
                    assert operator in told
    assert {"torch", "cuda", "folder"} <= {line.split()[0] for line in lines}


def test_usage():
    for arguments, code in (([], 0), (["--help"], 0), (["fly"], 2)):
        result = subprocess.run([sys.executable, "-m", "star.cli", *arguments], capture_output=True, text=True)
        assert result.returncode == code and "usage: star COMMAND" in result.stdout + result.stderr


def test_usage_fits_a_terminal_and_names_an_unknown_command(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["fly"]) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == "star: got 'fly', expected a command from above"
    assert max(map(len, said.splitlines())) <= 80 and all(f"\n  {name} " in said for name in cli.COMMANDS)


def broken_early(text, width):
    """Lines of help that end although the next word fits. Help begins at the same column in both lines."""
    lines = [line.replace("│", " ").rstrip() for line in text.splitlines()]
    found = []
    for line, following in itertools.pairwise(lines):
        column = len(following) - len(following.lstrip())
        helps = column > 2 and line[column - 2 : column] == "  " and line[column : column + 1].strip()
        if helps and len(line) + 1 + len(following.split()[0]) <= width - 2:
            found.append(line)
    return found


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name not in ("report", "info")])
def test_lines_of_help_end_where_the_terminal_does(monkeypatch, capsys, command):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) > 15 and broken_early(text, 80) == []


def test_a_line_of_help_that_ends_early_is_found():
    assert broken_early("│ --a  one two │\n│      three   │\n", 16) == []
    assert broken_early("│ --a  one     │\n│      two     │\n", 16) == ["  --a  one"]


def test_a_library_that_prints_its_own_lines_says_each_once(monkeypatch):
    lines = io.StringIO()
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(lines)])  # where star's own is
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    cli.quiet_third_parties()
    logging.getLogger("huggingface_hub.utils").warning("Retrying in 8s")
    assert logging.getLogger("huggingface_hub").handlers and lines.getvalue() == ""


def test_info_has_help(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["info", "--help"])
    assert ended.value.code == 0 and "usage: star info" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("train", ("--preset NAME ", "--config FILE.yaml ", "--out FOLDER ")),
        ("plan", ("--preset NAME ", "--gpus N ", "--fsdp ")),
        ("probe", ("--preset NAME ", "--batches N ", "--prompts N ", "--images N ", "--json FILE ")),
    ],
)
def test_help_has_a_line_for_each_option_that_the_configuration_does_not_have(capsys, command, options):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(f"{option} ") for line in lines) for option in options)
