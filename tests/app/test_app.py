"""`star app` as a visitor meets it: in a headless browser, on a wide screen and on a phone."""

import dataclasses
import re
import runpy
import shutil
import sys
from pathlib import Path

import diffusers
import pytest

from star.cli import main
from star.shapes.model import WEIGHTS

gradio = pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[app]'")

from star import app  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a red circle left of a blue square"
FIELDS = dict(prompt=PROMPT, model="shapes", steps=2, seed=1, guidance="", size="")


def ignore(share, doing):
    pass


def make(**changes):
    limits = app.Limits(**{name: changes.pop(name) for name in ("models", "side") if name in changes})
    return app.make_image(app.Pipelines("float32"), **{**FIELDS, **changes}, tell=ignore, limits=limits)


@pytest.fixture(scope="module")
def blind(tmp_path_factory):
    """A pipeline whose transformer reads no text."""
    folder = tmp_path_factory.mktemp("dit")
    transformer = diffusers.DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=1)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2)
    diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler()).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(prompt="a red dog"), "prompt: 'dog' is no word of the embedded model; it knows a, and, on, "),
        (dict(prompt=""), "prompt: empty, expected what the image shows"),
        (dict(prompt="[a red circle"), "prompt"),
        (dict(model="/nowhere"), "model: '/nowhere' is no pipeline (there is no such folder)"),
        (dict(model="no such name"), "model: 'no such name' cannot be loaded ("),
        (dict(model=str(ROOT / "docs")), f"model: '{ROOT / 'docs'}' cannot be loaded ("),
        (dict(model=None), "model: empty, expected 'shapes'"),
        (dict(seed=None), "seed: got None, expected a whole number"),
        (dict(seed=-1), "seed: got -1, expected a whole number from 0 on"),
        (dict(guidance="much"), "guidance: got 'much', expected a number"),
        (dict(size="inf"), "size: got 'inf', expected a number"),
        (dict(size="0"), "size: got '0', expected a whole number of pixels"),
        (dict(size="64.5"), "size: got '64.5', expected a whole number of pixels"),
        (dict(size="1028"), "size: got '1028', expected at most 1024 pixels, which star app --largest sets"),
        (dict(size="36", side=35), "size: got '36', expected at most 35 pixels"),
        (dict(size="1e300"), "size: got '1e300', expected at most 1024 pixels"),
        (dict(steps=51), "steps: got 51, expected 2 to 50"),
        (dict(steps=-1), "steps: got -1, expected 2 to 50"),
        (dict(steps=float("nan")), "steps: got nan, expected 2 to 50"),
        (dict(prompt="a red circle " * 400), "prompt: 5200 characters, expected at most 4000"),
        (dict(model="/etc", models=("shapes", "a/b")), "model: got '/etc', expected one of shapes, a/b"),
        (dict(size="37"), "`height` and `width` have to be divisible by"),
    ],
)
def test_what_is_wrong_is_one_line(changes, words):
    with pytest.raises((ValueError, OSError)) as error:
        make(**changes)
    line = app.told(error.value)
    assert line.startswith(words) and "\n" not in line and "Traceback" not in line


def test_what_a_visitor_keeps_is_bounded(monkeypatch):
    monkeypatch.setattr(app, "LARGEST", 20)
    assert {image.shape for image in make().images} == {(20, 20, 3)}
    monkeypatch.setattr(app, "MOST_BYTES", make(steps=2).maps.nbytes)
    assert make(steps=2).maps.nbytes == app.MOST_BYTES
    with pytest.raises(ValueError, match=r"maps: more than 0 MiB in 3 steps of 2 concepts; ask for fewer steps"):
        make(steps=4)


def test_a_public_page_takes_no_file_and_lets_no_crowd_wait():
    blocks = app.serve([], only=True, wait=False)
    try:
        assert blocks.max_file_size == 1 and blocks._queue.max_size == app.WAITING
        assert blocks.app.state_holder.capacity == app.SESSIONS
    finally:
        blocks.close()


def test_a_class_that_cannot_be_captured_is_one_line(blind):
    with pytest.raises(TypeError) as error:
        make(model=blind)
    assert app.told(error.value).startswith("transformer: DiTTransformer2DModel is not supported: it reads class")
    line = app.told(KeyError("x\ny"))  # what a pipeline may raise
    assert line == "model: the pipeline failed (KeyError: 'x\\ny')"


def test_what_a_pipeline_does_not_take_is_named(blind):
    with pytest.raises(ValueError, match="height: DiTPipeline takes none; leave the field empty"):
        app.chosen_call(object.__new__(diffusers.DiTPipeline), "folder", 2, None, 64)


def test_another_pipeline_by_path_gives_the_same_image_and_capitals_are_read():
    shown = make(prompt="A red Circle left of a BLUE square")
    other = make(model=str(WEIGHTS), size="36", guidance="1")
    assert other.concepts == shown.concepts == ("red circle", "blue square")
    assert other.images[0].shape == shown.images[0].shape == (36, 36, 3)
    assert shown.prompt == PROMPT


def test_words_are_shown_as_they_are():
    shown = dataclasses.replace(make(), prompt="<script>alert(1)</script>", concepts=('"><b>', "$x$"), note="<i>")
    text = app.draw(shown, 1, app.MEAN, "attention") + app.summary(shown) + app.failure(ValueError("<u>"))
    assert not re.search("<(script|b|i|u)>", text) and "$x$" in text and "&lt;script&gt;" in text


def test_the_command_without_gradio_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "star.app")
    assert main(["app"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("star: gradio is missing, of star-kernels[app]; ") and error.count("\n") == 1


def test_the_command_and_the_space_serve_the_same_page(monkeypatch):
    served = []
    monkeypatch.setattr(app, "serve", lambda *args, **options: served.append((args, options)))
    assert main(["app", "/a", "b/c", "--only", "--port", "7000"]) == 0
    runpy.run_path(str(ROOT / "examples" / "space" / "app.py"))
    assert served == [((("/a", "b/c"), True, "float32", None, 7000), {"largest": 1024}), ((), {"only": True})]
    assert main(["app", "--port", "0"]) == 1 and len(served) == 2


# --- in a browser -----------------------------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 120


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(blind):
    blocks = app.serve([blind], wait=False)
    yield blocks.local_url
    blocks.close()


class Visitor:
    """One visitor's page."""

    def __init__(self, browser, address, **options):
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(1000 * SECONDS)
        self.page = self.context.new_page()
        self.hosts, self.errors = set(), []
        self.page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)

    def draw(self, prompt):
        self.page.get_by_label("Prompt").fill(prompt)
        self.page.get_by_role("button", name="Draw").click()

    def sees_step(self, step):
        self.page.wait_for_selector(f'.star-film [aria-current] img[alt="after step {step}"]')

    def watch(self):
        """From now on the page keeps the steps that it shows: each is there for a moment."""
        self.page.evaluate("""() => { window.steps = []; new MutationObserver(() => {
            const image = document.querySelector('.star-film [aria-current] img');
            if (image && window.steps.at(-1) != image.alt) window.steps.push(image.alt);
        }).observe(document.body, {attributes: true, childList: true, subtree: true}); }""")

    def watched(self):
        return [int(words.split()[-1]) for words in self.page.evaluate("window.steps")]

    def choose(self, label, option):
        self.page.get_by_label(label).click()
        self.page.get_by_role("option", name=option, exact=True).click()

    def captions(self):
        return self.page.locator(".star-tiles figcaption").all_text_contents()

    def alert(self):
        return self.page.get_by_role("alert").text_content()


def test_two_visitors_see_their_images_form_and_nothing_of_each_other(browser, address):
    one = Visitor(browser, address)
    one.watch()
    one.draw(PROMPT)
    one.sees_step(8)
    assert len(one.watched()) > 2 and one.watched() == sorted(one.watched())  # it forms
    assert one.page.get_by_role("status").first.text_content().startswith("Concepts: red circle, blue square.")
    assert [caption.partition(",")[0].partition(":")[0] for caption in one.captions()] == [
        "image after step 8 of 8", "weights", "red circle", "blue square",
    ]  # fmt: skip
    other = Visitor(browser, address)
    one.draw("a green cross")
    other.draw("two green rings")  # while the first one's image is made
    for visitor, concept in ((one, "green cross"), (other, "green rings")):
        visitor.page.get_by_text(f"{concept}: up to ").wait_for()
        visitor.sees_step(8)
        assert len(visitor.captions()) == 3 and visitor.captions()[2].startswith(concept)
    weights = one.page.locator('.star-tiles img[alt^="weights"]')
    last = weights.get_attribute("src")
    one.page.get_by_label("number input for Step").fill("3")
    one.page.get_by_label("number input for Step").press("Enter")
    one.sees_step(3)
    assert one.page.locator(".star-tiles img").first.get_attribute("alt") == "a green cross, after step 3 of 8"
    third = weights.get_attribute("src")
    one.choose("Layer", "2")
    changed = "old => document.querySelector('.star-tiles img[alt^=weights]').src != old"
    one.page.wait_for_function(changed, arg=third)
    one.choose("Strategy of the weights", "uniform")
    one.page.get_by_text("weights, 1.00 to 1.00").wait_for()
    assert third != last
    for visitor in (one, other):
        assert visitor.hosts == {address.split("/")[2]} and not visitor.errors
        visitor.context.close()


def test_on_a_phone_in_the_dark_nothing_is_cut_and_mistakes_are_told(browser, address, blind):
    phone = Visitor(browser, address, viewport=dict(width=390, height=844), color_scheme="dark")
    phone.draw("a red dog")
    assert phone.alert().startswith("prompt: 'dog' is no word of the embedded model")
    phone.draw(PROMPT)
    phone.sees_step(8)
    assert phone.page.evaluate("document.documentElement.scrollWidth") <= 390
    shown = phone.page.locator("button:visible, input:visible, textarea:visible, figure:visible")
    for box in (element.bounding_box() for element in shown.all()):
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    luminance = """selector => { const [r, g, b] = getComputedStyle(document.querySelector(selector))
        [selector == 'body' ? 'backgroundColor' : 'color'].match(/[\\d.]+/g).map(Number); return r + g + b; }"""
    assert phone.page.evaluate(luminance, "body") < 200 < 500 < phone.page.evaluate(luminance, ".star-page figcaption")
    phone.page.get_by_role("button", name="Model and sampling").click()
    for path, words in (("/nowhere", "model: '/nowhere' is no pipeline"), (blind, "transformer: DiT")):
        field = phone.page.get_by_label("Model", exact=True)
        field.fill(path)
        field.press("Enter")
        phone.page.get_by_role("button", name="Draw").click()
        phone.page.get_by_role("alert").get_by_text(words).wait_for()
        phone.page.wait_for_selector(".star-tiles", state="detached")  # no older image beside the line
    assert "Traceback" not in phone.page.content() and not phone.errors
    phone.context.close()
