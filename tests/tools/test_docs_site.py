"""The site has every page, its links lead somewhere, and the docstrings behind the API are whole. Needs no MkDocs."""

import ast
import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import check_links
import docs_site

ROOT = Path(__file__).resolve().parents[2]
ITEMS = ("Args", "Attributes", "Raises", "Warns")
EMPHASIS = re.compile(r"[\w)]\*\w|(?<![\w*])\*\w[^`]*\w\*")


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags of MkDocs and Python no safe loader knows, as if these values were absent."""


Loader.add_multi_constructor("", lambda loader, suffix, node: None)


def pages_of(navigation: list | dict | str) -> Iterator[str]:
    if isinstance(navigation, str):
        yield navigation
    for part in navigation.values() if isinstance(navigation, dict) else navigation:
        if not isinstance(navigation, str):
            yield from pages_of(part)


def test_every_page_is_in_the_navigation_once():
    navigation = list(pages_of(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]))
    made = {page for page in docs_site.generated() if not page.startswith("repository/")}
    written = {page.relative_to(docs_site.DOCS).as_posix() for page in docs_site.DOCS.rglob("*.md")}
    assert sorted(navigation) == sorted(made | written) and not made & written


@pytest.mark.parametrize("name", sorted(docs_site.sources()))
def test_what_is_written_by_hand_is_no_longer_than_250_lines(name):
    """What a tool writes between marks may be longer."""
    text = docs_site.sources()[name].read_text()
    by_hand = re.sub(r"<!-- (.+?) -->.*?<!-- end of \1 -->", "", text, flags=re.S)
    assert len(by_hand.splitlines()) <= 250


def test_links_lead_to_pages_and_files_of_the_site(tmp_path):
    pages = {name: docs_site.site_text(page) for name, page in docs_site.sources().items()} | docs_site.generated()
    others = {path.relative_to(docs_site.DOCS).as_posix(): "" for path in docs_site.DOCS.rglob("*.[ps][nv]g")}
    for name, text in (others | pages).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert [line for name in pages for line in check_links.broken_links(tmp_path / name)] == []


def test_links_out_of_docs_and_into_it(tmp_path, monkeypatch):
    docs = tmp_path / "docs"
    docs.mkdir()
    monkeypatch.setattr(docs_site, "ROOT", tmp_path)
    monkeypatch.setattr(docs_site, "DOCS", docs)
    monkeypatch.setattr(docs_site, "PAGES", {"README.md": "readme.md"})
    (tmp_path / "README.md").write_text(
        '[one](docs/one.md#two) <img src="docs/x.png"> [out](https://a.org/docs/one.md)\n'
    )
    (tmp_path / "run.py").write_text("print('```')\n")
    (docs / "one.md").write_text("[up](../README.md#top) [code](../run.py) `[no](../run.py)` [here](#a)\n\n<details>\n")
    assert docs_site.site_text(tmp_path / "README.md") == (
        '[one](one.md#two) <img src="x.png"> [out](https://a.org/docs/one.md)\n'
    )
    text = docs_site.site_text(docs / "one.md")
    assert text.startswith("[up](readme.md#top) [code](repository/run.py.md) ")
    assert text.endswith('[here](#a)\n\n<details markdown="1">\n')
    assert docs_site.shown_files() == {tmp_path / "run.py"}
    assert docs_site.file_page(tmp_path / "run.py") == "# run.py\n\n~~~~~~ python\nprint('```')\n~~~~~~\n"


def definition(module: str, name: str) -> tuple[ast.AST, str | None]:
    """The node that defines a module's name, and its docstring, or the text after an assignment."""
    tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return definition(node.module, alias.name)
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node, ast.get_docstring(node)
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
            text = after.value if isinstance(after, ast.Expr) else None
            return node, text.value if isinstance(text, ast.Constant) else None
    raise AssertionError(f"{module} has no {name}")


def documented() -> Iterator[tuple[str, ast.AST, str | None]]:
    """(name, node, docstring) of what the API shows: public names, and their public methods."""
    for module in docs_site.MODULES:
        for name in importlib.import_module(module).__all__:
            node, text = definition(module, name)
            yield f"{module}.{name}", node, text
            for method in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    yield f"{module}.{name}.{method.name}", method, ast.get_docstring(method)


def sections(text: str) -> Iterator[tuple[str, list[str]]]:
    """(title, lines without the section's indent) of a docstring's sections."""
    for title, body in re.findall(rf"^({'|'.join(ITEMS)}):\n((?:    .*\n?|\n)+)", text, re.M):
        yield title, [line[4:] for line in body.rstrip().splitlines()]


def faults(text: str, parameters: set[str] | None = None) -> list[str]:
    """What would be shown wrong of a docstring. parameters: of the function."""
    found = []
    if not text.splitlines()[0].endswith((".", ":")):
        found.append("the first line is no sentence")
    if EMPHASIS.search(re.sub(r"`[^`]*`", "", text)):
        found.append("an asterisk that makes text italic")
    for title, lines in sections(text):
        for line in lines:
            if line.startswith("    ") or not line:
                continue
            names, colon, said = line.partition(": ")
            if not colon or not said or re.search(r"[^\w, ]", names):
                found.append(f"{title}: no 'name: text', or a continued line without an indent: {line!r}")
            elif title == "Args" and parameters is not None and (unknown := {*names.split(", ")} - parameters):
                found.append(f"Args: no parameters {sorted(unknown)}")
    return found


def test_public_names_exist_and_their_docstrings_can_be_shown():
    shown = 0
    for name, node, text in documented():
        module, _, last = name.rpartition(".")
        assert text, f"{name} has no docstring"
        if module in docs_site.MODULES:
            assert hasattr(importlib.import_module(module), last)
        parameters = None
        if isinstance(node, ast.FunctionDef):
            parameters = {argument.arg for argument in [*node.args.args, *node.args.kwonlyargs]}
        if not isinstance(node, ast.Assign):
            assert faults(text, parameters) == [], name
        shown += 1
    assert shown > 80


@pytest.mark.parametrize(
    "text, fault",
    [
        ("Half of\na sentence.", "the first line"),
        ("(rows*patch, columns*patch).", "an asterisk"),
        ("Of (B, *grid) and *this*.", "an asterisk"),
        ("Call.\n\nArgs:\n    b: is not there.\n", "no parameters ['b']"),
        ("Call.\n\nRaises:\n    ValueError: a line\n    and its end.\n", "a continued line"),
        ("Call.\n\nRaises:\n    What others raise.\n", "no 'name: text'"),
    ],
)
def test_faults_of_docstrings_are_found(text, fault):
    (found,) = faults(text, {"a"})
    assert fault in found


def test_a_docstring_without_faults():
    assert (
        faults("Call (B, *grid), 2 * 3.\n\nArgs:\n    a: some text\n        and its end.\n\nSource: here", {"a"}) == []
    )


def test_pins_and_extra_name_the_same_packages():
    pinned = set(re.findall(r"^(mkdocs[\w-]*)==", (ROOT / "requirements-ci.txt").read_text(), re.M))
    extra = re.search(r"^docs = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert pinned == set(re.findall(r'"([\w-]+)', extra)) and len(pinned) > 2


def test_warnings_fail_the_build():
    """MkDocs counts warnings only where it would print them."""
    (command,) = re.findall(r"mkdocs build.*", (ROOT / "Makefile").read_text())
    assert "--strict" in command and not re.search(r"--quiet|-q\b", command)
