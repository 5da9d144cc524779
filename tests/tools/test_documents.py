"""Tools fill marked parts of hand-written pages, and the pages hold what the tools say now."""

from pathlib import Path

import pytest

import evidence
import gpu_page
from star import document
from star.config import ConfigError


def test_only_what_is_between_the_marks_changes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- one -->\nold\n<!-- end of one -->\nafter\n")
    for _ in range(2):  # to fill it again changes nothing
        document.fill(page, {"one": "new"})
        assert page.read_text() == "before\n<!-- one -->\n\nnew\n\n<!-- end of one -->\nafter\n"


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
        assert marked(gpu_page.PAGES[name], name) == text, f"run tools/gpu/gpu_static.py: {name}"


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
        page = marked(gpu_page.PAGES[name], name).splitlines()
        assert [launched, titles, rule] == [page[0], *page[2:4]]
        assert row.count("|") == titles.count("|")


def test_the_evidence_page_has_the_differences_of_the_studies_pages():
    assert marked(evidence.DOCUMENT, evidence.MARKS) == evidence.main_table(), "run tools/evidence.py"


def test_a_studys_page_is_read_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "PAGES", tmp_path)
    monkeypatch.setattr(evidence, "STUDIES", {"one": "first"})
    row = "| {} | {} | 0.1 | {} | +9.000 [+8.000, +9.900] | {} |"
    strict = "+0.200 [+0.100, +0.300] *"
    rows = [row.format("uniform", "-", "-", "-"), row.format("few", "+0.300 [+0.100, +0.500]", "1/2", strict)]
    rows += [row.format("a", "-0.020 [-0.030, -0.010] *", "0/3", strict)]
    rows += [row.format("b", "+0.001 [-0.010, +0.013]", "2/4", "+0.002 [-0.001, +0.005]")]
    titles = "| arm | reward, final | p | seeds ahead | reward, area | strict, final |\n|---|---|---|---|---|---|\n"
    heading = "**difference to uniform, paired by seed and prompt**\n\n"
    tables = [heading + titles + "\n".join(some) for some in (rows[:3], rows[2:])]  # one arm is in both
    (tmp_path / "one.md").write_text("\n\n".join(tables) + "\n")
    assert evidence.main_table().splitlines()[2:] == [
        "| [b, first (n=4)](evidence/one.md) | +0.001 (-0.010 to +0.013) | +0.002 (-0.001 to +0.005) |",
        "| [a, first (n=3)](evidence/one.md) | -0.020 \\* (-0.030 to -0.010) | +0.200 \\* (+0.100 to +0.300) |",
    ]
    (tmp_path / "one.md").write_text("not run yet\n")
    assert evidence.all_differences() == []


def test_every_figure_of_the_evidence_page_can_be_drawn():
    for panel in evidence.forest().axes:
        assert len(panel.lines) == 2 * len(evidence.all_differences()) + 1
    gains = [bar.get_height() for bar in evidence.optimizer().axes[0].patches]
    assert gains[0] > 0.0005 > abs(gains[1])  # what the page says of them
    shares = [bar.get_height() for bar in evidence.extra_objects().axes[0].patches]
    assert max(shares) == shares[2] == 0.440
    assert {f"evidence/{name}.png" for name in evidence.FIGURES} <= set(
        evidence.re.findall(r"\((evidence/\w+\.png)\)", evidence.DOCUMENT.read_text())
    )
