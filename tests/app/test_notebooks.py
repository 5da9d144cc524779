"""The notebooks run from the first cell to the last in a process of their own, and are kept without outputs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import check_links

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Cells share their names, as in a kernel; a cell that fails is named.
RUN = """
import json, sys
names = {"__name__": "__main__"}
for number, source in enumerate(json.load(sys.stdin)):
    exec(compile(source, f"cell {number}", "exec"), names)
    print(f"cell {number} is done")
"""


def cells(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def run(sources, folder):
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    command = [sys.executable, "-W", "ignore", "-c", RUN]
    return subprocess.run(
        command, cwd=folder, env=environment, input=json.dumps(sources), capture_output=True, text=True, timeout=900
    )


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ["first_steps", "your_trainer"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    sources = ["".join(cell["source"]) for cell in cells(path)]
    result = run(sources, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"cell {len(sources) - 1} is done" in result.stdout
    if path.stem == "first_steps":
        report = (tmp_path / "runs" / "first_steps" / "report.html").read_text()
        assert "<html" in report and (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")


def test_a_cell_that_fails_fails_the_notebook(tmp_path):
    result = run(["x = 1", "assert x == 2"], tmp_path)
    assert result.returncode == 1 and 'File "cell 1"' in result.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path):
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4 and len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_links_of_a_notebook_name_files(path):
    texts = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] != "code"]
    targets = [target for text in texts for target in check_links.INLINE.findall(text)]
    assert targets and all((path.parent / target).is_file() for target in targets)
