"""`make install-check` misses no documented install line, and every line works today: no index has the package."""

import re
import warnings
from pathlib import Path

import pytest

import install_check
from star import cli
from star_kernels import requirements

ROOT = Path(__file__).resolve().parents[2]
LINES = install_check.install_lines()


@pytest.mark.parametrize("page", install_check.PAGES, ids=lambda page: page.name)
def test_every_line_of_a_page_is_found(page):
    lines = install_check.documented(page.read_text())
    text = " ".join(page.read_text().split())
    assert sum(line.count("pip install") for line in lines) == len(re.findall(r"\bpip install\b", text))
    assert all(page.name in LINES[line] for line in lines)


def test_readme_says_how_to_install():
    section = (ROOT / "README.md").read_text().split("## Installing\n")[1].split("\n## ")[0]
    first, *others = install_check.documented(section)
    assert first == "pip install torch && pip install '.[train]'"
    assert sum("--no-build-isolation" in line for line in others) == sum("triton" in line for line in others) == 1


def test_lines_of_code_blocks_lose_their_comments():
    page = "Run `pip install\none` or\n\n    pip install two   # 2\n\n```\npip install 'three[a]' # 3\ncp a b\n```\n"
    assert install_check.documented(page) == ["pip install two", "pip install 'three[a]'", "pip install one"]


def test_pages_that_list_lines_are_all_there():
    pages = [path for path in ROOT.glob("**/*.md") if not {".venv", ".git", "build"} & {*path.parts}]
    said = {path.resolve() for path in pages if "pip install" in path.read_text()}
    history = {ROOT / "CHANGELOG.md"}
    assert said - history <= {*install_check.PAGES}


def test_lines_of_messages_are_run_too():
    assert any(install_check.MESSAGES in places for places in LINES.values())
    # Everything else that says a line takes it from `requirements`, or names a package of another project.
    others = {"ocr.py": "--force-reinstall rapidocr", "tracking.py": "{error.name}", "requirements.py": ""}
    for path in [*ROOT.glob("python/star/**/*.py"), *ROOT.glob("star_kernels/**/*.py")]:
        for said in re.findall(r"pip install (.*)", path.read_text()):
            assert path.name in others and others[path.name] in said, f"{path}: {said}"


def test_the_line_that_a_message_names_is_found(monkeypatch, capsys):
    """Words of torch about what it misses itself stay out of the message."""

    def without_gradio(arguments):
        warnings.warn("Failed to initialize NumPy: No module named 'numpy'", UserWarning, stacklevel=1)
        raise ModuleNotFoundError("No module named 'gradio'", name="gradio")

    monkeypatch.setattr(cli, "info", without_gradio)
    monkeypatch.setattr(requirements, "install_line", lambda extra, module: f"pip install what {extra} lacks")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["info"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert install_check.named_line(line) == "pip install what app lacks"
    with pytest.raises(AssertionError):
        install_check.named_line("star: gradio is missing, of star-kernels[app]")


def test_an_extra_that_does_not_train_gets_the_messages_line_too():
    lines = "pip install '.[app]'", "pip install '.[train,rewards]'", "pip install '.[spacy]'", "pip install ."
    assert [install_check.trains(line) for line in lines] == [True, True, False, False]


def test_no_line_presumes_that_an_index_has_the_package():
    for path in [*install_check.PAGES, *ROOT.glob("python/star/**/*.py"), *ROOT.glob("star_kernels/**/*.py")]:
        assert not re.search(r"pip install '?star[-_]kernels", path.read_text()), path
