"""Every command of README and the documentation is run here, or says why not; every `star` command is understood."""

import hashlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from builders import TINY_RUN
from star import cli
from star.shapes.model import load_pipeline

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = ("bash", "sh", "console", "")  # languages of a fence that may hold commands
PROGRAMS = "star accelerate make python pip git cp mkdir sha256sum tar STAR_".split()

# Run word by word, with what is behind it to make it short.
EXECUTED = {
    "star plan --preset geneval-sd35m --gpus 8": "",
    "star report runs/shapes": "",
    "star report runs/star runs/uniform --out compare.html": "",
    "star report runs/uniform runs/attention runs/shuffled --out compare.html": "",
    "star check runs/my-pipeline --prompts prompts.txt --brackets": "--height 36 --width 36",
    "star probe --preset shapes-nft --batches 64": "--batches 3 --prompts 2 --images 2",
    "star probe --config mine.yaml --json probe.json": "--batches 3 --prompts 2 --images 2",
}
GPU, NETWORK, HOURS, HOST = "needs a GPU", "needs the network", "takes minutes or hours", "in a trainer's clone"
NOT_RUN = {
    r"accelerate launch": GPU,
    r"star (train|probe|check) .*(sd35m|FLUX\.1-dev)": GPU,
    r"star (train|eval) .*(--run\.reward|--reward) ": "needs a reward's weights",
    r"star app": "serves until it is stopped",  # tests/app
    r"star compare ": HOURS,  # tests/study runs small ones, and reports an archive
    r"python -m star\.rewards\.serve": "needs a reward's weights",
    r"STAR_ATTACK_REQUESTS": HOURS,
    r"mkdir -p runs$|git show 268a74a:|sha256sum|tar ": "test_the_archives_are_in_the_history",
    r"pip install|python -m spacy download": NETWORK,  # make install-check
    r"git apply|cp (verl_star|star_adapter)\.py": HOST,
    r"make (test|docs|links|lint)$": "a job of the continuous integration",
    r"make wheel": "a job of the continuous integration",
    r"make (demo|bench|sanitize|fuzz|compat|install-check|test-slow)": HOURS,
    r"make gpu-check": GPU,
    r"python examples/diffusers_loop\.py": "run by tests/hosts/test_dropin_diffusers_loop.py",
    r"python tools/evidence\.py": "tests/tools/test_documents.py calls it",
}


class Understood(BaseException):
    """The command's options were read; nothing else happens."""


def commands(page: Path) -> list[str]:
    """The shell commands in a page's blocks of code, without comments, in one line each."""
    found, language, after_blank = [], None, True
    text = re.sub(r"\\\n\s*", "", page.read_text())
    for line in text.splitlines():
        if fence := re.match(r"\s*```(\w*)", line):
            language = fence[1] if language is None else None
            continue
        indented = language is None and line.startswith("    ") and after_blank
        if language in SHELL or indented:
            found.append(re.sub(r"(^|\s)#.*", "", line).strip())
        if language is None:
            after_blank = not line.strip() or indented
    return [line.strip() for line in found if line.startswith(tuple(PROGRAMS))]


DOCUMENTED = list(dict.fromkeys((command, page) for page in PAGES for command in commands(page)))
OF_STAR = r"star |accelerate .*(star\.cli|\$\(which star\))"
STAR = list(dict.fromkeys(command for command, _ in DOCUMENTED if re.match(OF_STAR, command)))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with the files that the documented commands name: runs, prompts, a configuration, a pipeline."""
    folder = tmp_path_factory.mktemp("workspace")
    assert cli.main(["train", *TINY_RUN, "--out", str(folder / "runs/shapes")]) == 0
    for name in ("star", "uniform", "attention", "shuffled"):
        shutil.copytree(folder / "runs/shapes", folder / "runs" / name)
    shutil.copy(folder / "runs/shapes/config.yaml", folder / "mine.yaml")
    (folder / "prompts.txt").write_text("a [red circle] left of a [blue square]\n")
    load_pipeline().save_pretrained(folder / "runs/my-pipeline")
    return folder


@pytest.mark.parametrize("command", EXECUTED)
def test_a_documented_command_does_what_it_says(command, workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    assert command in STAR
    code = cli.main(shlex.split(f"{command} {EXECUTED[command]}")[1:])
    assert code == 0, capsys.readouterr()


@pytest.mark.parametrize("command", STAR)
def test_the_options_of_a_documented_command_are_known(command, workspace, monkeypatch):
    """Also of those that no test can run."""
    monkeypatch.chdir(workspace)
    for reader in ("read_config", "read_options"):
        read = getattr(cli, reader)

        def read_and_stop(*arguments, read=read):
            read(*arguments)
            raise Understood

        monkeypatch.setattr(cli, reader, read_and_stop)
    words = shlex.split(
        command.replace(" ...", " --preset shapes", 1).replace(" ...", "").replace("$strategy", "uniform")
    )
    program = next((words.index(name) for name in ("star.cli", "star)") if name in words), 0)
    words = words[program + 1 :]
    if words[0] != "report":  # which has its own, and is executed
        with pytest.raises(Understood):
            cli.main(words)


def test_every_documented_command_is_run_or_says_why_not():
    unknown = [
        f"{page.relative_to(ROOT)}: {command!r} is neither in EXECUTED nor in NOT_RUN"
        for command, page in DOCUMENTED
        if command not in EXECUTED and not any(re.match(pattern, command) for pattern in NOT_RUN)
    ]
    assert unknown == []


def test_nothing_is_said_of_commands_that_no_page_has():
    found = [command for command, _ in DOCUMENTED]
    assert [command for command in EXECUTED if command not in found] == []
    assert [pattern for pattern in NOT_RUN if not any(re.match(pattern, command) for command in found)] == []


def test_programs_of_documented_commands_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for command, page in DOCUMENTED:
        words = command.split()
        if words[0] == "make":
            assert words[1] in targets, f"{page.name}: {command}"
        if words[0] == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), f"{page.name}: {command}"
        for name in re.findall(r"--document (\S+)", command):
            assert (ROOT / name).is_file(), f"{page.name}: {command}"


def test_commands_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Text:\n\n    star info   # now\n\n    x = 1\n\n"
        "```bash\nstar train \\\n    --out a\n```\n```python\nstar = 1\n```\n"
        "- an item\n    star of its second line\n"
    )
    assert commands(page) == ["star info", "star train --out a"]


def test_the_archives_are_in_the_history():
    """Where the page of the method says that a clone has them, with the bytes and the checksums that it names."""
    page = (ROOT / "docs/evidence/method.md").read_text()
    rows = re.findall(r"^\| `(\w+-runs\.tar\.xz)` \| (\d+) \| `(\w{64})` \|$", page, re.MULTILINE)
    assert len(rows) == 5
    commit = re.search(r"git show (\w+):docs/evidence/", page)[1]
    if subprocess.run(["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("a clone without its history")
    for name, size, checksum in rows:
        archive = ["git", "show", f"{commit}:docs/evidence/{name}"]
        content = subprocess.run(archive, cwd=ROOT, capture_output=True, check=True).stdout
        assert (len(content), hashlib.sha256(content).hexdigest()) == (int(size), checksum), name
