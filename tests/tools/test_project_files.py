"""What describes the project to others, to GitHub and to package tools says the same everywhere."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from distribution import check_tag

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
# The first versions that run on Node 24: runners had Node 20 until September 2026.
ON_NODE_24 = {
    "checkout": 5, "setup-python": 6, "upload-artifact": 6, "download-artifact": 7,
    "upload-pages-artifact": 5, "deploy-pages": 5,
}  # fmt: skip
NO_DATA = {".py", ".pyc", ".so"}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def commands(workflow: dict) -> list[str]:
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


def pinned() -> dict[str, str]:
    """Versions of requirements-ci.txt by package."""
    return dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "requirements-ci.txt").read_text(), re.M))


def test_versions_agree():
    version = PYPROJECT["project"]["version"]
    released, date = re.search(r"^## (\S+) - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M).groups()
    citation = read(ROOT / "CITATION.cff")
    assert released == version == citation["version"]
    assert date == str(citation["date-released"])


def test_a_wheel_has_every_package_and_its_data():
    """An editable install finds what is left out here: nobody would notice before a release."""
    settings, packages, data, listed = PYPROJECT["tool"]["setuptools"], {}, set(), set()
    for top, folder in settings["package-dir"].items():
        for path in (ROOT / folder).rglob("__init__.py"):
            inner = path.parent.relative_to(ROOT / folder).parts
            packages[".".join((top, *inner))] = path.parent
        data |= {path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix not in NO_DATA}
    assert sorted(settings["packages"]) == sorted(packages)
    for package, patterns in settings["package-data"].items():
        listed |= {path for pattern in patterns for path in packages[package].glob(pattern) if path.is_file()}
    assert listed == data


def test_a_release_is_tagged_with_its_version():
    wheel = "star_kernels-1.2.0-cp311-cp311-manylinux_2_28_x86_64.whl"
    check_tag(wheel, None)
    check_tag(wheel, "v1.2.0")
    with pytest.raises(AssertionError, match=r"tag: got v1\.2, expected v1\.2\.0"):
        check_tag(wheel, "v1.2")


def test_the_citation_has_what_the_format_demands():
    citation = read(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["title"] == PYPROJECT["project"]["name"] and citation["license"] == PYPROJECT["project"]["license"]
    (paper,) = citation["references"]
    assert {"type", "title", "authors"} <= set(paper) and "arXiv:2606.17979" in str(paper["identifiers"])


def test_workflows_run_targets_of_the_makefile():
    text = (ROOT / "Makefile").read_text()
    targets, variables = set(re.findall(r"^([\w-]+):", text, re.M)), set(re.findall(r"\$\(?(\w+)", text))
    assert {path.stem for path in WORKFLOWS} >= {"tests", "wheel", "docs"}
    for path in WORKFLOWS:
        for command in commands(read(path)):
            words = command.split()
            assert words[0] == "make" and words[1] in targets, f"{path.name}: {command}"
            assert {word.split("=")[0] for word in words[2:] if "=" in word} <= variables, f"{path.name}: {command}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_run_on_a_node_that_runners_have(path):
    found = re.findall(r"uses: actions/([\w-]+)@v(\d+)$", path.read_text(), re.M)
    assert len(found) == path.read_text().count("uses: actions/") > 0
    assert [name for name, version in found if int(version) < ON_NODE_24[name]] == []


def test_the_site_is_published_from_the_branch_that_may():
    """GitHub lets the default branch alone deploy to `github-pages`: a tag would fail."""
    workflow = (ROOT / ".github" / "workflows" / "docs.yml").read_text()
    assert "name: github-pages" in workflow and "branches: [main]" in workflow
    assert "tags:" not in workflow


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_value_of_a_matrix_is_used(path):
    """A matrix that no step reads would run the same thing several times."""
    for job in read(path)["jobs"].values():
        steps = str(job["steps"])
        for name in job.get("strategy", {}).get("matrix", {}):
            assert f"matrix.{name}" in steps


def test_the_matrix_has_the_pinned_and_a_later_torch_and_two_pythons():
    matrix = read(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]["test"]["strategy"]["matrix"]
    torches = [tuple(map(int, version.split("."))) for version in matrix["torch"]]
    assert matrix["torch"][0] == pinned()["torch"] and torches[1] > torches[0] >= (2, 13)
    assert f">={matrix['python'][0]}" == PYPROJECT["project"]["requires-python"] and len(set(matrix["python"])) == 2


def test_another_torch_replaces_the_pin_and_frees_triton():
    """What the rule of the Makefile does to requirements-ci.txt."""
    script = re.search(r"\$\(if \$\(TORCH\),(.*)\)' requirements", (ROOT / "Makefile").read_text())[1]
    text = (ROOT / "requirements-ci.txt").read_text()
    for pattern, replacement in re.findall(r"s/([^/]*)/([^/]*)/", script):
        text = re.sub(pattern, replacement.replace("$(TORCH)", "2.99.0"), text, flags=re.M)
    changed = set(text.splitlines()) - set((ROOT / "requirements-ci.txt").read_text().splitlines())
    assert changed == {"torch==2.99.0", "triton"}


def test_pre_commit_runs_the_ruff_of_make_lint():
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["rev"] == f"v{pinned()['ruff']}"
    assert [hook["id"] for hook in repository["hooks"]] == ["ruff-check", "ruff-format"]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_are_forms(path):
    form = read(path)
    assert form["name"] and form["description"]
    names = [field["id"] for field in form["body"]]
    assert len(set(names)) == len(names)
    for field in form["body"]:
        assert field["type"] in ("input", "textarea") and field["attributes"]["label"]


def test_a_bug_comes_with_what_star_info_prints():
    assert "`star info`" in str(read(ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml"))
