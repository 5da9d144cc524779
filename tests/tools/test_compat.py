"""`make compat`: its hosts, what it installs, how it reads results, and the table that docs/versions.md shows."""

import json
import subprocess
import tomllib

import pytest

import compat
from star import document

RESULTS = json.loads(compat.RESULTS.read_text())
PRINTED = "....s\nSKIPPED [1] tests/x.py:1: torch 2.6.0 has no y\n4 passed, 1 skipped, 2 warnings in 3.21s\n"


def test_the_page_shows_the_results():
    before, after = document.surroundings(compat.DOCUMENT, compat.MARKS)
    shown = compat.DOCUMENT.read_text()[len(before) : -len(after)].strip()
    assert shown == compat.table(RESULTS), "run make compat"


@pytest.mark.parametrize("name", RESULTS)
def test_a_host_was_run_with_what_it_pins(name):
    result = RESULTS[name]
    assert compat.is_done(name, RESULTS), "its pins have changed: make compat"
    for pin in result["pins"]:
        library, _, version = pin.partition("==")
        if version and library in result["versions"]:
            assert result["versions"][library].split("+")[0] == version
    assert result["result"] != "ok" or (result["counts"]["passed"] > 100 and "failed" not in result["counts"])


def test_a_host_whose_pins_change_was_not_run(monkeypatch):
    result = {"pins": ["torch==1.0"], "versions": {"torch": "1.0"}, "result": "ok", "counts": {}, "date": "today"}
    (line,) = (line for line in compat.table({"UniRL": result}).splitlines() if line.startswith("| UniRL |"))
    assert "not run" in line and "today" not in line


def test_the_base_install_asks_for_the_oldest_torch_alone():
    project = tomllib.loads((compat.ROOT / "pyproject.toml").read_text())["project"]
    oldest = next(pin for pin in compat.HOSTS["oldest"].pins if pin.startswith("torch=="))
    assert project["dependencies"] == [oldest.replace("==", ">=").removesuffix(".0")]


def test_the_tests_are_there():
    assert all((compat.ROOT / path).exists() for path in compat.TESTS)


def test_counts_are_those_of_the_last_line():
    assert compat.counts(PRINTED) == {"passed": 4, "skipped": 1}
    assert compat.counts("ERROR: No matching distribution found for torch==99") == {}


class Recorded:
    """An environment that installs nothing. after: what star-kernels brings along."""

    def __init__(self, folder, constraint, name, printed=PRINTED, code=0, after=()):
        self.folder, self.constraint, self.name, self.variables = folder, constraint, name, {}
        folder.mkdir()
        self.printed, self.code, self.after, self.lines = printed, code, dict(after), []

    def run(self, line, folder=None):
        self.lines.append(line)
        installed = {library: "1.0" for library in compat.SHOWN}
        if any("--editable" in line for line in self.lines):
            installed |= {"star-kernels": "0.2.0", **self.after}
        if line == "python versions.py":
            return f"a warning\n{json.dumps(installed)}\n"
        if "pytest -n" in line and self.code:
            raise subprocess.CalledProcessError(self.code, line, self.printed)
        return self.printed if "pytest -n" in line else ""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "ok"),
        ({"code": 1, "printed": "1 failed, 4 passed in 3.21s"}, "failed"),
        ({"code": 124, "printed": "..."}, "not finished"),
        ({"after": {"torch": "2.0"}}, "not installed"),
    ],
    ids=["ok", "a test fails", "time is up", "a host's version changes"],
)
def test_a_result_says_how_far_it_came(options, expected, tmp_path, monkeypatch):
    environments = []
    monkeypatch.setattr(
        compat,
        "Environment",
        lambda *arguments: environments.append(Recorded(*arguments, **options)) or environments[0],
    )
    monkeypatch.setattr(compat, "LOGS", tmp_path / "logs")
    result = compat.run("UniRL", tmp_path)
    assert result["result"] == expected
    first, *_ = environments[0].lines
    assert "'torch==2.13.0'" in first and "'accelerate'" in first  # which UniRL does not pin
    assert " " not in environments[0].name
    assert environments[0].constraint.splitlines() == list(compat.HOSTS["UniRL"].pins)
    assert (tmp_path / "logs" / "UniRL.log").exists()


def test_what_has_a_result_is_not_run_again(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"<!-- {compat.MARKS} --><!-- end of {compat.MARKS} -->")
    monkeypatch.setattr(compat, "DOCUMENT", page)
    monkeypatch.setattr(compat, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(compat, "ENVIRONMENTS", tmp_path / "environments")
    ran = []

    def run(name, folder):
        (folder / name).mkdir(parents=True)
        ran.append(name)
        return {"pins": list(compat.HOSTS[name].pins), "versions": {}, "result": "ok", "counts": {}, "date": "today"}

    monkeypatch.setattr(compat, "run", run)
    assert compat.main(["UniRL"]) == 0 and ran == ["UniRL"]
    assert compat.main([]) == 0 and sorted(ran) == sorted(compat.HOSTS)
    assert compat.main([]) == 0 and len(ran) == len(compat.HOSTS)
    assert compat.main(["newest"]) == 0 and ran[-1] == "newest" and len(ran) == len(compat.HOSTS) + 1
    assert page.read_text().count("| today |") == len(compat.HOSTS)
    assert compat.main(["no host"]) == 2
    assert not list((tmp_path / "environments").iterdir())
