"""`star report`: the page that shows and compares runs, whatever these have and lack."""

import base64
import io
import json
import os
import shutil
import struct
import tarfile
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from builders import small_run
from star import config as configuration
from star import train as training
from star.cli import main, read_config
from star.files import Unreadable
from star.objective import Allocation
from star.presets import preset
from star.reports import chart, commands, gallery, page, shown, tracking
from star.reports import runs as reading
from star.reports.evaluations import Evaluation, read_evaluations, write_evaluation
from star.reports.metrics import meaning
from star.reports.shown import Field, Maps
from star.shapes.task import TASK
from star.training import scoring
from star.training.conditions import encode
from star.training.pipeline import latent_size
from star.training.rollout import SamplerOptions, decode, trace
from star.training.task import ImageOptions

VOID = {"meta", "input", "img", "br"}


class Page(HTMLParser):
    """A page as a browser reads it: elements with their attributes and texts. Fails for tags that do not pair."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "text": "", **dict(attributes)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.elements.append({"tag": tag, "text": "", **dict(attributes)})

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        self.text += data
        for element in self.open:
            element["text"] += data

    def all(self, tag, **attributes):
        found = [one for one in self.elements if one["tag"] == tag]
        return [one for one in found if all(one.get(name) == value for name, value in attributes.items())]


def read_page(path):
    return Page(path.read_text())


def write_page(*folders, out):
    page.write(list(folders), out)
    return read_page(out)


def png(color, size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def scored(iteration, values, categories=None, failed=0, column="reward"):
    values = np.array(values, dtype=float)
    return Evaluation(iteration, tuple(categories or [None] * len(values)), {column: values}, len(values), failed)


def make_run(folder, evaluations=(), prompts=(), iterations=2, **changes):
    """A run's folder by hand, with images of the prompts before and, if there is a scoring, after."""
    folder.mkdir(parents=True)
    configuration.save(configuration.update(preset("shapes"), changes), folder / "config.yaml")
    lines = [{"iteration": i, "reward": 0.5 + 0.1 * i} for i in range(iterations)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for one in evaluations:
        write_evaluation(folder, one)
        stage = folder / "held_out" / ("after" if one.iteration else "before")
        stage.mkdir(parents=True, exist_ok=True)
        for number in range(len(prompts)):
            (stage / f"{number:05d}.png").write_bytes(png((number, one.iteration or 0, 9)))
    if prompts:
        shown.write_prompts(folder, prompts)
    return folder


# --- what is on it ----------------------------------------------------------------------------------------------------


def test_the_page_holds_everything_and_needs_nothing(runs, tmp_path, capsys):
    out = tmp_path / "compare.html"
    assert main(["report", str(runs / "star"), str(runs / "uniform"), "--out", str(out)]) == 0
    found = read_page(out)
    links = [one[name] for one in found.elements for name in ("src", "href", "srcset", "data", "poster") if name in one]
    assert links and all(link.startswith("data:image/") for link in links)
    assert not any(found.all(tag) for tag in ("script", "link", "iframe", "object", "base", "form"))
    style = found.all("style")[0]["text"]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    policy = found.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy.startswith("default-src 'none'")
    assert found.all("meta", name="viewport")[0]["content"].startswith("width=device-width")

    cells = [[cell["text"] for cell in row] for row in rows(found)]
    summary = json.loads((runs / "star/summary.json").read_text())["held_out"]["reward"]
    row = next(row for row in cells if row[:2] == ["reward", "all prompts"])
    assert row[2].startswith(f"{summary['before']:.4f} → {summary['after']:.4f} ({summary['difference']:+.4f} ± ")
    first, second = (read_evaluations(runs / name)[-1].values["reward"] for name in ("star", "uniform"))
    assert row[4].startswith(f"{(second - first).mean():+.4f} ± ")
    assert any(row[:2] == ["reward", "counting"] for row in cells)
    assert ["allocation.strategy", "attention", "uniform"] in cells
    assert not any(row[0].startswith("run.out") for row in cells)  # where a run is, is no difference
    captions = [one["text"] for one in found.all("figcaption")]
    for name in ("reward", "weights_on_object", "seconds/update"):
        assert f"{name} {meaning(name)}" in captions
    assert "held-out reward" in captions


def rows(found):
    """Rows of all tables, as lists of cells."""
    grouped = []
    for one in found.elements:
        if one["tag"] == "tr":
            grouped.append([])
        elif one["tag"] in ("td", "th") and grouped:
            grouped[-1].append(one)
    return grouped


def test_every_chart_has_a_title_words_and_numbers(runs, tmp_path):
    found = write_page(runs / "star", out=tmp_path / "page.html")
    charts = found.all("svg", role="img")
    assert len(charts) > 20
    ids = [one["id"] for one in found.elements if "id" in one]
    assert len(ids) == len(set(ids))
    titles = {one["id"]: one["text"] for one in found.elements if one["tag"] in ("title", "desc") and "id" in one}
    for one in charts:
        title, words = (titles[name] for name in one["aria-labelledby"].split())
        assert title and "star: " in words
    tables = [one["text"] for one in found.all("caption")]
    assert sorted(tables) == sorted(titles[one["aria-labelledby"].split()[0]] for one in charts)
    assert all(one.get("alt") for one in found.all("img"))


def test_the_page_draws_its_charts_where_they_are_measured(tmp_path, monkeypatch):
    sizes = {"WIDTH": 400, "HEIGHT": 200, "LEFT": 60, "RIGHT": 300, "BOTTOM": 150}
    for name, size in sizes.items():
        monkeypatch.setattr(chart, name, size)
    found = write_page(make_run(tmp_path / "run"), out=tmp_path / "page.html")
    (one,) = found.all("svg", role="img")
    assert one["viewbox"] == "0 0 400 200" and found.all("path", **{"class": "axis"})[0]["d"] == "M60,150H300"
    assert all(path["d"].startswith("M60,") for path in found.all("path", **{"class": "grid"}))
    assert all(path["d"].endswith(",150v4") for path in found.all("path", **{"class": "tick"}))


def test_images_stand_side_by_side_with_their_maps(runs, tmp_path):
    found = write_page(runs / "star", out=tmp_path / "page.html")
    prompts = shown.read_prompts(runs / "star")
    assert [one["text"] for one in found.all("p", **{"class": "prompt"})] == prompts and len(prompts) == 8
    photos = [one for one in found.all("img") if one.get("alt", "").startswith("Image ")]
    files = [
        (runs / f"star/held_out/{stage}/{i:05d}.png").read_bytes() for i in range(8) for stage in ("before", "after")
    ]
    assert [base64.b64decode(one["src"].partition(",")[2]) for one in photos] == files
    maps = shown.read_maps(runs / "star", "after")
    names = [field.name for field in maps.fields[0]]
    assert [f"Map of {name} over the image after 2 iterations" for name in names] == [
        one["alt"] for one in found.all("img") if "over the image after" in one["alt"]
    ][: len(names)]
    # Of each example the first map is chosen, by hover, tap or focus without any script.
    radios = found.all("input", type="radio", name="example1")
    assert len(radios) == len(names) and ["checked" in one for one in radios] == [True, *[False] * (len(names) - 1)]
    style = found.all("style")[0]["text"]
    assert ".views:hover .map0" in style and ":focus-within" in style
    assert all(one["tabindex"] == "0" for one in found.all("div", **{"class": "views"}))
    rewards = read_evaluations(runs / "star")[0].values["reward"]
    assert (
        f"before\nreward {rewards[0]:.2f}".replace("\n", "")
        in found.all("figcaption")[[one["text"].startswith("before") for one in found.all("figcaption")].index(True)][
            "text"
        ]
    )


def test_runs_that_begin_alike_share_their_examples(runs, tmp_path):
    together = gallery.galleries([reading.read(runs / name, name, i) for i, name in enumerate(("star", "uniform"))])
    assert len(together) == 1 and [len(one.views) for one in together[0].examples] == [3] * 8
    assert [view.run for view in together[0].examples[0].views] == [None, 0, 1]
    other = make_run(tmp_path / "other", [scored(0, [1, 0]), scored(2, [1, 1])], ["a", "b"])
    apart = gallery.galleries([reading.read(runs / "star", "star", 0), reading.read(other, "other", 1)])
    assert [[run.name for run in one.runs] for one in apart] == [["star"], ["other"]]


def test_one_scale_of_colors_serves_all_images_of_a_prompt(tmp_path):
    run = make_run(tmp_path / "run", [scored(0, [1]), scored(2, [1])], ["a red circle"])
    low, high = np.array([[0.0, 2.0]]), np.array([[0.0, 4.0]])
    shown.write_maps(run, "before", Maps(0, {0: [Field("map", "red circle", low)]}))
    shown.write_maps(run, "after", Maps(2, {0: [Field("map", "red circle", high)]}))
    (found,) = gallery.galleries([reading.read(run, "run", 0)])
    (one,) = found.examples
    assert [choice.largest for choice in one.choices] == ["4.0"]
    before, after = (Image.open(io.BytesIO(base64.b64decode(view.overlays[0].partition(",")[2]))) for view in one.views)
    assert before.getpixel((0, 0)) == after.getpixel((0, 0)) == (0, 0, 3)  # black
    assert sum(before.getpixel((1, 0))) < sum(after.getpixel((1, 0)))


# --- texts of others --------------------------------------------------------------------------------------------------

TEXTS = {
    "html": "<b>bold</b><script>alert(1)</script> & &amp; \"double\" 'single' </pre></style>",
    "dollars": "$x$ costs $5, \\(y\\) and {{ braces }} {% raw %}",
    "emoji": "a 🦊 and 👩‍👩‍👧 with 🇫🇷",
    "rtl": "חתול אדום ליד كلب أزرق",
    "long": "very " * 3000 + "long" + "x" * 3000,
    "lines": "one\n  two\tthree",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_are_shown_as_they_are(tmp_path, kind):
    text = TEXTS[kind]
    run = make_run(tmp_path / "run", [scored(0, [1], [text]), scored(2, [0.5], [text], column="reward")], [text])
    shown.write_maps(run, "before", Maps(0, {0: [Field("map", text, np.ones((2, 2)))]}))
    commands.note(run, ["star", "train", "--out", text], 0, 1)
    run = run.rename(tmp_path / text.replace("/", "")[:40])
    found = write_page(run, out=tmp_path / "page.html")
    (prompt,) = found.all("p", **{"class": "prompt"})
    assert prompt["text"] == text and prompt["dir"] == "auto"
    assert text in [one["text"] for one in found.all("bdi")]  # the concept
    assert any(row[1]["text"] == text for row in rows(found) if len(row) > 2)  # the category
    assert text in found.all("pre")[0]["text"].replace("'\"'\"'", "'")
    assert found.all("h1")[0]["text"] == run.name
    assert not found.all("script") and not found.all("b")


def test_half_a_surrogate_pair_is_no_text_but_a_page(tmp_path):
    run = make_run(tmp_path / "run", [scored(0, [1], ["\ud83d"])], ["a \ud83d"])
    assert "a \\ud83d" in write_page(run, out=tmp_path / "page.html").text


# --- what runs do not have --------------------------------------------------------------------------------------------


def missing(found):
    return [one["text"] for one in found.all("li")]


def test_a_run_that_has_just_begun(tmp_path):
    run = make_run(tmp_path / "run", iterations=0)
    found = write_page(run, out=run / "report.html")
    assert "No iteration has been finished yet." in missing(found) and not found.all("svg", role="img")
    assert "It has no held-out images." in missing(found) and "It has no held-out scores." in missing(found)
    (run / "metrics.jsonl").write_text(json.dumps({"iteration": 0, "reward": 0.5}) + "\n" + '{"iterat')
    found = write_page(run, out=run / "report.html")
    assert len(found.all("svg", role="img")) == 1
    assert "It is going, or was stopped: 1 of 240 iterations are here." in missing(found)
    assert [cell["text"] for cell in rows(found)[1]] == ["state", "not finished"]


def test_a_run_without_scoring_says_so(tmp_path):
    run = make_run(tmp_path / "run", scoring={"count": 0})
    found = write_page(run, out=tmp_path / "page.html")
    assert "It was not scored on held-out prompts: scoring.count is 0." in missing(found)
    assert "Held-out scores" not in found.text


def test_one_scoring_has_no_change(tmp_path):
    run = make_run(tmp_path / "run", [scored(0, [0.25, 0.75], ["a", "b"])], ["x", "y"])
    found = write_page(run, out=tmp_path / "page.html")
    cells = [[cell["text"] for cell in row] for row in rows(found)]
    assert ["reward", "all prompts", "0.5000 ± 0.2500, before alone"] in cells and "→" not in str(cells)
    assert ["reward", "a", "0.2500, before alone"] in cells  # of one prompt there is no error
    assert [one["text"] for one in found.all("span", **{"class": "frame missing soft"})] == ["no image"] * 2
    words = " ".join(missing(found))
    assert "no held-out images after training" in words and "It was not scored after an iteration yet" in words


def test_failed_rewards_are_told_and_left_out(tmp_path):
    nan = np.nan
    first = scored(0, [0.5, nan, nan], ["a", "a", "b"], failed=2)
    last = scored(2, [0.7, 0.9, nan], ["a", "a", "b"], failed=1)
    run = make_run(tmp_path / "run", [first, last], ["x", "y", "z"])
    lines = [{"iteration": i, "reward": math_nan, "reward_failed": 6.0} for i, math_nan in enumerate([nan, nan])]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = write_page(run, out=tmp_path / "page.html")
    cells = [[cell["text"] for cell in row] for row in rows(found)]
    assert ["reward", "all prompts", "0.5000 → 0.7000 (+0.2000; 2 prompts left out)"] in cells
    assert ["reward", "a", "0.5000 → 0.7000 (+0.2000; 1 prompt left out)"] in cells
    assert ["reward", "b", "every reward failed"] in cells
    assert ["reward, last tenth", "every reward failed"] in cells
    assert ["images without a reward", "12 in 2 iterations"] in cells
    captions = [one["text"] for one in found.all("figcaption")]
    assert "beforereward: failed" in captions and "after 2 iterationsreward 0.90" in captions
    assert "2 of 3 held-out images have no reward after 0 iterations." in missing(found)
    assert "nan" not in found.text.lower().replace("finance", "")


def test_runs_of_other_tasks_and_categories_share_a_page_without_a_difference(tmp_path):
    one = make_run(tmp_path / "one", [scored(0, [0, 1], ["a", "b"]), scored(2, [1, 1], ["a", "b"])], ["x", "y"])
    other = make_run(
        tmp_path / "other",
        [scored(0, [0, 1, 1], column="reward"), scored(4, [1, 1, 1])],
        ["u", "v", "w"],
        scoring={"seed": 7},
    )
    configured = yaml.safe_load((other / "config.yaml").read_text()) | {"task": "nowhere.to.be.found:TASK"}
    (other / "config.yaml").write_text(yaml.safe_dump(configured))
    found = write_page(one, other, out=tmp_path / "page.html")
    cells = [[cell["text"] for cell in row] for row in rows(found)]
    assert ["reward", "a", "0.0000 → 1.0000 (+1.0000)", "—"] in cells
    assert ["task", "shapes", "nowhere.to.be.found:TASK"] in cells  # no code of a run is looked for
    assert "No difference is given between runs" in found.text and "Its prompts have no categories." in missing(found)


@pytest.mark.parametrize(
    ("one", "other", "paired"),
    [
        ({"run": {"reward": "ocr"}}, {"run": {"reward": "clipscore"}}, False),
        ({"run": {"reward": "ocr"}}, {}, False),
        ({"scoring": {"reward": "ocr"}, "run": {"reward": "clipscore"}}, {"run": {"reward": "ocr"}}, True),
    ],
)
def test_scores_of_different_rewards_have_no_difference(tmp_path, one, other, paired):
    folders = [
        make_run(tmp_path / name, [scored(0, [0.0, 0.5]), scored(2, [1.0, 1.0])], ["x", "y"], **changes)
        for name, changes in (("one", one), ("other", other))
    ]
    found = write_page(*folders, out=tmp_path / "page.html")
    row = next(row for row in rows(found) if [cell["text"] for cell in row[:2]] == ["reward", "all prompts"])
    assert len(row) == 4 + paired
    assert ("scored by another reward or on other prompts" in found.text) == (not paired)


def test_scorings_of_other_prompts_are_not_paired(tmp_path):
    run = make_run(tmp_path / "run", [scored(0, [0.0, 1.0]), scored(2, [1.0, 1.0, 1.0])])
    found = write_page(run, out=tmp_path / "page.html")
    assert ["reward", "all prompts", "0.5000 → 1.0000"] in [[cell["text"] for cell in row] for row in rows(found)]
    assert any("differences are not paired" in sentence for sentence in missing(found))


def test_more_categories_than_charts(tmp_path):
    names = [f"kind {i}" for i in range(page.DRAWN + 3)]
    run = make_run(tmp_path / "run", [scored(0, np.arange(len(names)), names)])
    found = write_page(run, out=tmp_path / "page.html")
    assert len([one for one in found.all("figcaption") if one["text"].startswith("kind ")]) == page.DRAWN
    assert f"charts of the first {page.DRAWN} of {len(names)}" in found.text
    assert any(row[1]["text"] == names[-1] for row in rows(found) if len(row) > 2)


def test_a_run_of_version_0_1_has_what_it_kept(tmp_path):
    archive = Path(__file__).parents[1] / "data/global-runs.tar.xz"
    with tarfile.open(archive) as archived:
        archived.extractall(tmp_path, filter="data")
    old = tmp_path / "global/runs"
    new = make_run(tmp_path / "new", [scored(0, [1.0]), scored(1, [1.0])])
    found = write_page(old / "uniform-0", old / "attention-0", new, out=tmp_path / "page.html")
    cells = [[cell["text"] for cell in row] for row in rows(found)]
    row = next(row for row in cells if row[:2] == ["reward", "all prompts"])
    assert "→" in row[2] and row[5][0] in "+-" and len(row) == 6  # the two old ones compare
    assert next(row for row in cells if row[0] == "allocation.strategy")[1:3] == ["uniform", "attention"]
    assert "settings that some of them do not have" in found.text
    again = found.all("pre")[0]["text"].splitlines()
    assert again[0].startswith("# its first command was not kept") and str(old / "uniform-0/config.yaml") in again[1]


def test_images_of_other_kinds_and_links_are_left_out(tmp_path, runs):
    run = tmp_path / "run"
    shutil.copytree(runs / "star", run)
    secret = tmp_path / "secret.png"
    secret.write_bytes(png((1, 2, 3)))
    data = base64.b64encode(secret.read_bytes()).decode()
    for path in (run / "allocation.png", run / "held_out/before/00000.png", run / "grids/000002.png"):
        path.unlink()
        path.symlink_to(secret)
    (run / "held_out/before/00001.png").write_text("root:x:0:0")
    (run / "held_out/before/00002.png").write_bytes(secret.read_bytes()[:30])
    shutil.rmtree(run / "held_out/after")
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(secret, tmp_path / "elsewhere/00003.png")
    (run / "held_out/after").symlink_to(tmp_path / "elsewhere")
    found = write_page(run, out=tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert data not in text and base64.b64encode(b"root:x:0:0").decode()[:12] not in text
    (sentence,) = [one for one in missing(found) if one.startswith("Left out")]
    assert all(name in sentence for name in ("before/00000.png", "before/00001.png", "after/00003.png"))
    assert len(found.all("span", **{"class": "frame missing soft"})) == 6 + 1  # after, and the one that was cut


READ = ("config.yaml", "summary.json", "metrics.jsonl", "evaluations.jsonl", "commands.jsonl")
HELD_OUT = ("held_out/prompts.jsonl", "held_out/maps_before.jsonl", "held_out/maps_after.jsonl")


@pytest.mark.parametrize("name", [*READ, *HELD_OUT, "held_out"])
def test_texts_that_are_links_are_refused(tmp_path, runs, name):
    """Else whoever sends a run would choose which file of the reader's is shown as its configuration."""
    run, out = tmp_path / "run", tmp_path / "page.html"
    shutil.copytree(runs / "star", run)
    (run / name).rename(tmp_path / "secret")
    (run / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=f"runs: {run / name}.* is a link, expected a file of the run's own"):
        page.write([run], out)
    assert not out.exists()
    (run / name).unlink()
    (tmp_path / "secret").rename(run / name)
    (tmp_path / "link").symlink_to(run)  # which the reader named
    page.write([tmp_path / "link"], out)


def test_a_link_where_the_page_is_being_written_changes_no_other_file(tmp_path):
    run, other = make_run(tmp_path / "run"), tmp_path / "mine.txt"
    other.write_text("mine")
    (run / ".report.html.writing").symlink_to(other)
    page.write([run], run / "report.html")
    assert other.read_text() == "mine" and not (run / "report.html").is_symlink()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize("kind", [b"gAMA", b"tRNS", b"iCCP"])
@pytest.mark.parametrize("size", [8, 600])
def test_an_image_that_is_damaged_fails_no_page(size, kind):
    data, wrong = png((1, 2, 3), (size, size)), chunk(kind, b"")
    end = len(data) - 12  # before IEND
    for place in (33, end):  # after IHDR, after the pixels
        url, _ = gallery.as_url(data[:place] + wrong + data[place:])
        assert url is None or url.startswith("data:image/")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("metrics.jsonl", '{"iteration": NaN, "reward": 1.0}'),
        ("metrics.jsonl", '{"iteration": Infinity, "reward": 1.0}'),
        ("metrics.jsonl", '{"iteration": 0, "reward": 1%s}' % (400 * "0")),
        ("evaluations.jsonl", '{"iteration": 0, "categories": [null], "soft": [1%s], "strict": [1]}' % (400 * "0")),
        ("summary.json", '{"iterations": 2, "seconds": 1%s}' % (400 * "0")),
        ("held_out/maps_before.jsonl", '{"iteration": 0, "image": 0, "fields": [{"largest": 1%s}]}' % (400 * "0")),
    ],
)
def test_numbers_that_cannot_be_computed_with_are_one_line(tmp_path, name, line):
    run = make_run(tmp_path / "run", [scored(0, [1.0])], ["x"])
    (run / name).write_text(line + "\n")
    with pytest.raises(Unreadable, match=name):
        reading.read(run, "run", 0)


SCORING = {"iteration": 0, "images": 2, "failed": 0, "categories": ["a", None], "values": {"reward": [0.5, None]}}
ODD = {
    "evaluations.jsonl": [
        *(SCORING | {"iteration": value} for value in (-1, True, 1.5, "0", [0], 2**64)),
        *(SCORING | {"images": value} for value in (-1, True, "2")),
        SCORING | {"failed": 3},
        *(SCORING | {"categories": value} for value in (["a", 3], ["a", ["b"]], [{}, None], "ab", {"a": 1, "b": 2}, 3)),
        *(SCORING | {"values": value} for value in (3, [], {}, {"soft": [1, 1]})),
        *(SCORING | {"values": {"reward": value}} for value in ([0.5], ["0.5", 1], [[1, 2], [3, 4]], [True, 1], "ab")),
        *(SCORING | {"values": {"reward": value}} for value in ([1e300, 1], [{}, 1], None, {"a": 1, "b": 2})),
    ],
    "metrics.jsonl": [
        *({"iteration": value, "reward": 1.0} for value in (-1, True, None, "0", 1.0, [0])),
        *({"iteration": 0, "reward": value} for value in ("0.5", True, [1], {})),
        {"reward": 1.0},
    ],
    "commands.jsonl": [
        {"command": "star", "iteration": 0, "processes": 1, "version": "1"} | {name: value}
        for name, value in (
            *(("command", 3), ("iteration", True), ("iteration", -1), ("processes", 1.5), ("version", 3)),
            *(("processes", None), ("iteration", "0")),
        )
    ],
    "held_out/prompts.jsonl": [{"prompt": 3}, {"prompt": None}, {}],
}


@pytest.mark.parametrize("name", ODD)
def test_a_line_with_something_else_than_its_numbers_is_named_with_its_number(tmp_path, name):
    run = make_run(tmp_path / "run", [scored(0, [1.0])], ["x"])
    reading.read(run, "run", 0)
    for line in ODD[name]:
        (run / name).write_text("\n" + json.dumps(line) + "\n")  # blank lines count
        with pytest.raises(Unreadable, match=rf"{name}:2 (is|has) no ") as caught:
            reading.read(run, "run", 0)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optimisation: 5\noptimization: {iterations: 3}\n", "optimization: got 5, expected keys and values"),
        ("run: &run\n  self: *run\n", "has more than 100,000 values"),
        ("? [1, 2]\n: 5\n", "is not YAML"),
    ],
)
def test_a_configuration_that_no_report_can_show_is_one_line(tmp_path, text, words):
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        reading.read(run, "run", 0)
    assert "\n" not in str(caught.value) and str(run / "config.yaml") in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "run: {3: 4, null: [5]}\n2001-01-01: 2\n",
        "optimization: {iterations: .nan}\nscoring: 5\n",
        "optimization: {iterations: %s}\nrun: !!binary aGVsbG8=\n" % ("9" * 40),
        "x: !!set {a, b}\nrun: {reward: {a: b}, held_out: 3}\n",
    ],
)
def test_whatever_else_a_configuration_holds_is_shown(tmp_path, text):
    run, other = make_run(tmp_path / "run", [scored(0, [1.0])]), make_run(tmp_path / "other", [scored(0, [1.0])])
    (run / "config.yaml").write_text(text)
    assert write_page(run, other, out=tmp_path / "page.html").all("h1")


def test_numbers_that_are_not_finite_are_null_in_every_file(tmp_path):
    """JSON has no NaN, and other programs stop at Python's."""
    run = make_run(tmp_path / "run", [scored(0, [np.nan, 1.0], failed=1)])
    tracker = tracking.Tracker(configuration.update(preset("shapes"), {"run": {"out": str(run), "trackers": []}}), 1)
    tracker.log(1, {"reward": np.nan, "ratio_max": np.inf})
    strict = lambda word: pytest.fail(f"{word} is no JSON")
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        lines = [json.loads(line, parse_constant=strict) for line in (run / name).read_text().splitlines()]
    assert lines[0]["values"]["reward"] == [None, 1.0]
    assert np.isnan([tracking.read(run)[1][key] for key in ("reward", "ratio_max")]).all()


def test_large_images_become_small_and_are_not_enlarged_pixel_by_pixel():
    url, is_small = gallery.as_url(png((200, 10, 10), (1024, 768)))
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert image.size == (512, 384) and image.format == "JPEG" and not is_small
    assert gallery.as_url(png((0, 0, 0), (36, 36)))[1] and gallery.as_url(b"\x89PNG\r\n\x1a\n")[0] is None


# --- maps that a run keeps --------------------------------------------------------------------------------------------


def test_maps_come_back_as_they_were(tmp_path):
    rng = np.random.default_rng(0)
    maps = rng.gamma(1.0, size=(2, 3, 5))
    shown.write_maps(
        tmp_path, "after", Maps(7, {4: [Field("map", "<a>", maps[0]), Field("weights", "weights", maps[1])]})
    )
    found = shown.read_maps(tmp_path, "after")
    assert found.iteration == 7 and [field[:2] for field in found.fields[4]] == [("map", "<a>"), ("weights", "weights")]
    for field, values in zip(found.fields[4], maps, strict=True):
        np.testing.assert_allclose(field.values, values, atol=values.max() / 255 / 2 + 1e-4)
    assert shown.read_maps(tmp_path, "before") is None and shown.read_prompts(tmp_path) == []


LINE = {"image": 0, "iteration": 1, "fields": [
    {"kind": "map", "name": "x", "grid": [1, 2], "largest": 2.0, "values": base64.b64encode(b"\0\xff").decode()}
]}  # fmt: skip
DAMAGE = {
    "no object": "[1]",
    "other keys": "{}",
    "image": json.dumps(LINE | {"image": -1}),
    "iteration": json.dumps(LINE | {"iteration": True}),
    "fields": json.dumps(LINE | {"fields": 3}),
    **{
        f"field's {name}": json.dumps(LINE | {"fields": [LINE["fields"][0] | {name: value}]})
        for name, value in {
            "kind": "other", "name": 3, "grid": [2, 2], "largest": float("nan"), "values": "no base64", "": None,
        }.items() if name
    },
    "no locations": json.dumps(LINE | {"fields": [LINE["fields"][0] | {"grid": [0, 2], "values": ""}]}),
    "two iterations": json.dumps(LINE) + "\n" + json.dumps(LINE | {"image": 1, "iteration": 2}),
}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_maps_are_one_line_that_names_the_file(tmp_path, how):
    (tmp_path / "held_out").mkdir()
    path = tmp_path / "held_out/maps_after.jsonl"
    path.write_text(json.dumps(LINE) + "\n")
    assert shown.read_maps(tmp_path, "after").fields[0][0].values.tolist() == [[0, 2]]
    path.write_text(DAMAGE[how] + "\n")
    with pytest.raises(Unreadable, match=r"maps_after\.jsonl"):
        shown.read_maps(tmp_path, "after")


@pytest.mark.parametrize("options", [{}, {"noise_in_order": True}, {"images_per_prompt": 3, "batch": 4}])
def test_maps_are_of_the_images_that_are_kept(options):
    """The same start and the same policy give the same images."""
    prompts = TASK.prompts("held_out", 9, "0")
    sampled = ImageOptions(**{"steps": 2, "guidance_scale": 1.0, "height": 36, "width": 36, "batch": 5, **options})
    pipeline = TASK.pipeline("cpu", torch.float32)
    first = scoring.FirstImages()
    for jobs, images in scoring.sample_images(pipeline, prompts, sampled):
        first([scoring.Row(index, number, {}) for index, number in jobs], images)
    size = latent_size(pipeline, 36, 36)
    noise = scoring.first_noise(len(prompts), (pipeline.transformer.config.in_channels, *size), sampled)
    conditions = encode(pipeline, [prompt.text for prompt in prompts[: scoring.SHOWN]], 0, 1.0)
    rollout = trace(pipeline, conditions, 2, SamplerOptions(size, 1.0, chunk=5), 0, noise)
    kept = torch.stack([first.images[i] for i in range(scoring.SHOWN)])
    torch.testing.assert_close(decode(pipeline, rollout.latents), kept, rtol=0, atol=1e-4)


def test_keeping_maps_changes_no_bit_of_a_run(runs, tmp_path):
    changes = {
        "scoring": {"count": 8, "every": 1},
        "loss": {"advantage": "concept"},
        "sampling": {"explore": "maps"},
        "optimization": {"update_norm": 0.0},
    }
    allocation = {"strategy": "attention"}
    training.train(small_run(tmp_path / "run", allocation=allocation, run={"grid_every": 2}, **changes))
    adapters = [load_file(run / "lora/pytorch_lora_weights.safetensors") for run in (tmp_path / "run", runs / "star")]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())
    assert (tmp_path / "run/evaluations.jsonl").read_text() == (runs / "star/evaluations.jsonl").read_text()
    measured = ("seconds/", "memory")
    lines = [
        [{k: v for k, v in line.items() if not k.startswith(measured)} for line in tracking.read(run)]
        for run in (tmp_path / "run", runs / "star")
    ]
    assert lines[0] == lines[1]
    assert (
        not list((tmp_path / "run/held_out").glob("maps_*")) and len(list((runs / "star/held_out").glob("maps_*"))) == 2
    )
    found = write_page(tmp_path / "run", out=tmp_path / "page.html")
    assert any("no maps of its images before and after" in sentence for sentence in missing(found))


def test_maps_of_an_earlier_iteration_are_not_shown_over_newer_images(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "star", run)
    write_evaluation(run, scored(5, np.ones(8), read_evaluations(run)[0].categories))
    found = write_page(run, out=tmp_path / "page.html")
    assert any("no maps of its images after training" in sentence for sentence in missing(found))
    assert not [one for one in found.all("img") if "over the image after" in one["alt"]]
    # And a scoring takes those away whose images it replaces.
    config = small_run(tmp_path / "next", scoring={"count": 2})
    held_out = scoring.HeldOut.of_run(TASK, config)
    shown.write_maps(config.run.out, "after", Maps(1, {0: [Field("map", "x", np.ones((2, 2)))]}))

    class Alone:
        is_main_process, process_index, num_processes = True, 0, 1

    class Judge:
        def submit(self, images, *_):
            self.count = len(images)
            return self

        def result(self):
            return training.Scores(torch.ones(self.count))

        def count_failures(self, scored_elsewhere):
            return 0

    held_out.score(TASK.pipeline("cpu", torch.float32), Judge(), 3, Alone())
    assert shown.read_maps(config.run.out, "after") is None


def test_a_prompt_without_concepts_has_no_maps(tmp_path):
    from star.training import preview

    config = small_run(tmp_path / "run", scoring={"count": 2, "steps": 2})
    prompts = [scoring.Prompt("in the"), scoring.Prompt("a red circle left of a red circle")]
    held_out = scoring.HeldOut(config.run.out, prompts, scoring.HeldOut.of_run(TASK, config).options, 0)
    fields = preview.held_out_maps(TASK.pipeline("cpu", torch.float32), config, held_out)
    assert list(fields) == [1] and [field.name for field in fields[1]] == ["red circle", "red circle", "weights"]
    assert all(field.values.mean() == pytest.approx(1, abs=1e-5) for field in fields[1])
    assert config.allocation == Allocation(**vars(config.allocation))
    shown.write_maps(tmp_path, "before", Maps(0, fields))
    named = gallery.named(shown.read_maps(tmp_path, "before").fields[1])
    assert list(named) == [("map", "red circle", 0), ("map", "red circle", 1), ("weights", "weights", 0)]


# --- commands, folders and files --------------------------------------------------------------------------------------


def test_a_run_keeps_the_commands_that_made_it(runs, tmp_path, capsys):
    (command,) = commands.read(runs / "star")
    assert command.command == "star train --out 'with space'" and (command.iteration, command.processes) == (0, 1)
    config = small_run(tmp_path / "run", optimization={"iterations": 1})
    configuration.save(config, tmp_path / "c.yaml")
    first = ["--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]
    more = [*first, "--resume", "--optimization.iterations", "2"]
    assert main(["train", *first]) == 0 and main(["train", *more]) == 0
    found = commands.read(tmp_path / "run")
    assert [one.command.split() for one in found] == [["star", "train", *first], ["star", "train", *more]]
    assert [one.iteration for one in found] == [0, 1]
    text = write_page(tmp_path / "run", out=tmp_path / "page.html").all("pre")[0]["text"]
    assert "# from the beginning" in text and "# after 1 iterations" in text and found[1].command in text


def test_the_command_that_trains_a_run_again_gives_its_configuration(tmp_path):
    run = make_run(tmp_path / "my run", run={"resume": True, "seed": 5}, loss={"kl_coef": 0.1})
    import shlex

    _, command = reading.provenance(reading.read(run, "run", 0))
    words = shlex.split(command)
    assert words[:2] == ["star", "train"]
    again = read_config(words[2:], "star train")
    saved = configuration.load(run / "config.yaml")
    assert not again.run.resume and again.run.seed == 5 and again.loss == saved.loss and str(again.run.out) == "FOLDER"


@pytest.mark.parametrize("line", ["{}", '{"command": 3, "iteration": 0, "processes": 1, "version": null}', "[]"])
def test_damaged_commands_are_one_line(tmp_path, line):
    run = make_run(tmp_path / "run")
    (run / "commands.jsonl").write_text(line + "\n")
    with pytest.raises(Unreadable, match=r"commands\.jsonl"):
        reading.read(run, "run", 0)


def test_what_is_no_run_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "study/runs/one")
    (tmp_path / "file").write_text("x")
    for folder, words in {
        "nowhere": "there is no such folder",
        "file": "a file",
        "study": "no config.yaml); did you mean study/runs/one?",
        "study/runs": "did you mean study/runs/one?",
    }.items():
        assert main(["report", str(run), folder, "--out", "page.html"]) == 1
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and said[0].startswith(f"star: runs: {folder} is no run (") and words in said[0]
    assert not Path("page.html").exists()


def test_only_its_own_pages_are_overwritten(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other")
    head = "<!doctype html>\n<html>\n<head>\n"
    ours = '<meta name="generator" content="star report">'
    strangers = {
        "mine.html": f'{head}</head>\n<div class="curves">\n',
        "quotes.html": f"{head}<title>how star report marks its page</title>\n</head>\n<body>{ours}</body>",
        "script.html": f"{head}<script>page = '{ours}'</script></head>",
        "comment.html": f"{head}<!-- {ours} --></head>",
        "other.html": f"{head}{ours.replace('report', 'reporter')}</head>",
        "text": ours,
        "empty": "",
    }
    for name, text in strangers.items():
        (tmp_path / name).write_text(text)
    for path in (one / "config.yaml", *(tmp_path / name for name in strangers)):
        before = path.read_bytes()
        assert main(["report", str(one), "--out", str(path)]) == 1
        assert "stays as it is; choose another --out" in capsys.readouterr().err and path.read_bytes() == before
    assert main(["report", str(one), "--out", str(other)]) == 1
    assert "is a folder; name a file" in capsys.readouterr().err
    before = {path: path.read_bytes() for path in one.iterdir()}
    assert main(["report", str(one)]) == 0 and main(["report", str(one)]) == 0  # over its own
    assert {path: path.read_bytes() for path in one.iterdir() if path.name != "report.html"} == before
    os.mkfifo(tmp_path / "pipe")  # which nobody writes to
    (tmp_path / "link.html").symlink_to(tmp_path / "gone")
    for name in ("pipe", "link.html"):
        assert main(["report", str(one), "--out", name]) == 1
        assert f"star: out: {name} is no file, so it stays as it is" in capsys.readouterr().err
    assert main(["report", str(one), str(other), f"{one}/"]) == 0
    assert "2 runs" in capsys.readouterr().out.splitlines()[-1]
    assert read_page(Path("report.html")).all("h1")[0]["text"] == "one, other"


def test_a_folder_that_is_not_there_is_not_made(tmp_path, capsys):
    assert main(["report", str(tmp_path / "a" / "b")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"star: runs: {tmp_path / 'a' / 'b'} is no run (there is no such folder)"
    assert not (tmp_path / "a").exists()
