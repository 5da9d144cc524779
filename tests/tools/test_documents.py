"""Tools fill marked parts of hand-written pages, and the pages hold what the tools say now."""

import json
from pathlib import Path

import pytest

import gpu_page
import table
from star import document
from star.config import ConfigError

RESULTS = [
    {"name": "fast", "value": 1.23456, "limit": ">= 1", "met": True, "note": "1 ms", "machine": "two cores"},
    {"name": "slow", "value": 0.5, "limit": ">= 1", "met": False, "note": "", "machine": "two cores"},
]
ROWS = "| `fast` | 1.235 | >= 1 | yes | 1 ms |\n| `slow` | 0.5 | >= 1 | **no** |  |"


def test_only_what_is_between_the_marks_changes(tmp_path, monkeypatch):
    name = "results of the benchmarks"
    before, after = document.surroundings(table.DOCUMENT, name)
    page, results = tmp_path / "benchmarks.md", tmp_path / "results.json"
    page.write_text(table.DOCUMENT.read_text())
    results.write_text(json.dumps(RESULTS))
    monkeypatch.setattr(table, "DOCUMENT", page)
    monkeypatch.setattr(table, "RESULTS", results)
    for _ in range(2):  # to fill it again changes nothing
        table.main()
        text = page.read_text()
        assert text.startswith(before) and text.endswith(after)
        header = "Measured on: two cores.\n\n| row | value | limit | met | |\n|---|---|---|---|---|"
        assert text[len(before) : -len(after)] == f"\n\n{header}\n{ROWS}\n\n"


def test_nothing_is_written_where_a_mark_is_missing(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- one -->\n<!-- end of one -->\n<!-- two -->\n")
    with pytest.raises(ConfigError, match="has no marks '<!-- two -->'"):
        document.fill(page, {"one": "text", "two": "text"})
    assert page.read_text() == "<!-- one -->\n<!-- end of one -->\n<!-- two -->\n"


def marked(page: Path, name: str) -> str:
    before, after = document.surroundings(page, name)
    return page.read_text()[len(before) : -len(after)].strip()


def test_the_gpu_page_has_the_predictions_of_the_cost_model():
    for name, text in gpu_page.predictions().items():
        assert marked(gpu_page.DOCUMENT, name) == text, f"run tools/gpu/gpu_static.py: {name}"


def test_the_gpu_page_names_what_was_compiled():
    build = dict(kernel="maps_kernel", about="bf16", target="sm_90", warps=4, registers=48, stack=0, local=0,
                 shared=30720, matrix=12, vectors=25, occupancy=0.44)  # fmt: skip
    kernel = dict(kernel="allocate_kernel<float>", architecture="sm_90", registers=48, stack=0, spills=0, shared=1120,
                  vector_loads=0, vector_stores=0, occupancy=0.62)  # fmt: skip
    texts = {
        "Triton kernels": gpu_page.triton_table([build], "3.7.1"),
        "CUDA kernels": gpu_page.cuda_table([kernel], lambda kernel: False),
    }
    for name, text in texts.items():
        launched, _, titles, rule, row = text.splitlines()
        page = marked(gpu_page.DOCUMENT, name).splitlines()
        assert [launched, titles, rule] == [page[0], *page[2:4]]
        assert row.count("|") == titles.count("|")
