"""Concepts by spaCy: only where it is asked for, never instead of it, and what is missing is named.

What spaCy reads is made by hand, so no model is needed; these tests need spaCy itself.
"""

import importlib.util
import sys

import pytest

from builders import clip_tokenizer, small_sd35
from star.concepts import check_source, chunks, concept_tokens, locate, parse
from star.config import Config, ConfigError

needs_spacy = pytest.mark.skipif(importlib.util.find_spec("spacy") is None, reason="spaCy is an extra")
CORPUS = ["a photo of a red bench left of two green cats"]


@pytest.fixture
def without_spacy(monkeypatch):
    chunks.load.cache_clear()
    monkeypatch.setitem(sys.modules, "spacy", None)
    yield
    chunks.load.cache_clear()


@pytest.mark.parametrize("source", ["spacy", "spacy:en_core_web_sm"])
def test_without_spacy_the_extra_is_named_and_nothing_falls_back(without_spacy, source):
    for call in (
        lambda: parse("a dog", source),
        lambda: locate(["a dog"], clip_tokenizer(CORPUS, length=40), source=source),
        lambda: concept_tokens(small_sd35(CORPUS), ["a dog"], source=source),
        lambda: check_source(source),
    ):
        with pytest.raises(ImportError, match=r"^source: 'spacy' needs spaCy; pip install 'spacy>="):
            call()
    config = Config(task="shapes")
    config.sampling.concepts = source
    with pytest.raises(ConfigError, match=r"sampling.concepts: 'spacy' needs spaCy; pip install"):
        config.check()


@pytest.mark.parametrize("source", ["", "Spacy", "spacy:", "nltk", None, 3])
def test_another_source_is_refused(source):
    with pytest.raises(ValueError, match=r"source: got .*, expected 'rules', 'spacy' or 'spacy:MODEL'"):
        parse("a dog", source)
    with pytest.raises(ValueError, match="source: got"):
        check_source(source)


def test_a_source_beside_concepts_is_refused():
    tokenizer = clip_tokenizer(CORPUS, length=40)
    with pytest.raises(ValueError, match="source: got 'spacy' together with concepts"):
        locate(["a dog"], tokenizer, concepts=[["dog"]], source="spacy")


def test_the_rules_need_no_spacy_and_do_not_import_it(without_spacy):
    check_source("rules")
    assert [concept.text for concept in parse("a dog", "rules")] == ["dog"]


@needs_spacy
def test_a_model_that_is_missing_is_named(tmp_path):
    with pytest.raises(
        ImportError, match="model 'en_no_such_model' is not installed; run python -m spacy download en_no_"
    ):
        parse("a dog", "spacy:en_no_such_model")
    with pytest.raises(ImportError, match="'en_no_such_model' is not installed"):
        check_source("spacy:en_no_such_model")
    with pytest.raises(ValueError, match="source: spaCy cannot load") as caught:
        parse("a dog", f"spacy:{tmp_path}")
    assert "\n" not in str(caught.value)


def models_asked_for(monkeypatch, prompts):
    asked = []

    def load(model):
        asked.append(model)
        raise ImportError(model)

    monkeypatch.setattr(chunks, "load", load)
    for prompt in prompts:
        with pytest.raises(ImportError):
            parse(prompt, "spacy")
    return asked


def test_the_model_is_that_of_the_prompts_language(monkeypatch):
    prompts = {
        "a red cat": "en_core_web_sm",
        "a vase in the style of 李白, on a table": "en_core_web_sm",
        "一只红色的猫, 8k": "zh_core_web_sm",
        "桜の木の下に座る侍": "ja_core_news_sm",
        "красная кошка на столе": "ru_core_news_sm",
        "ein roter Hund auf einer Wiese": "de_core_news_sm",
        'a sign that says "красная кошка"': "en_core_web_sm",
    }
    assert models_asked_for(monkeypatch, prompts) == list(prompts.values())
    with pytest.raises(ValueError, match="'spacy' knows no model for Thai, expected one by name: 'spacy:MODEL'"):
        parse("แมวสีแดงบนโต๊ะ", "spacy")


class Read:
    """A pipeline that has read one text: its words with their parts of speech, heads and relations."""

    def __init__(self, language, *words):
        import spacy
        from spacy.tokens import Doc

        self.nlp = spacy.blank(language)
        self.words, self.tags = [word for word, *_ in words], [tag for _, tag, *_ in words]
        parsed = [rest for _, _, *rest in words if rest]
        parse = {"heads": [head for head, _ in parsed], "deps": [dep for _, dep in parsed]} if parsed else {}
        self.doc = lambda text: Doc(self.nlp.vocab, self.words, self.spaces(text), pos=self.tags, **parse)

    def spaces(self, text):
        spaces, at = [], 0
        for word in self.words:
            at = text.index(word, at) + len(word)
            spaces.append(text[at : at + 1] == " ")
        return spaces

    def __call__(self, text):
        doc = self.doc(text)
        assert doc.text == text
        return doc


@needs_spacy
def test_noun_chunks_are_the_concepts(monkeypatch):
    read = Read(
        "en",
        ("a", "DET", 1, "det"), ("photo", "NOUN", 1, "ROOT"), ("of", "ADP", 1, "prep"),
        ("two", "NUM", 5, "nummod"), ("red", "ADJ", 5, "amod"), ("cats", "NOUN", 2, "pobj"),
        ("that", "PRON", 7, "nsubj"), ("hold", "VERB", 5, "relcl"), ("a", "DET", 12, "det"),
        ('"', "PUNCT", 12, "punct"), ("\ufffc", "NOUN", 12, "compound"), ('"', "PUNCT", 12, "punct"),
        ("sign", "NOUN", 7, "dobj"),
    )  # fmt: skip
    monkeypatch.setattr(chunks, "load", lambda model: read)
    prompt = 'a photo of two red cats that hold a "GO" sign'
    assert [(c.text, c.kind) for c in parse(prompt, "spacy:x")] == [
        ("red cats", "object"),
        ("GO", "text"),
        ("sign", "object"),
    ]
    tokenizer = clip_tokenizer([*CORPUS, prompt], length=40)
    found = locate([prompt], tokenizer, source="spacy:x")
    same = locate([prompt], tokenizer, concepts=[["red cats", "GO", "sign"]])
    assert (found.index == same.index).all()


@needs_spacy
def test_languages_without_chunks_have_rows_of_adjectives_and_nouns(monkeypatch):
    words = [
        ("一只", "NUM"),
        ("红色", "ADJ"),
        ("的", "PART"),
        ("猫", "NOUN"),
        ("坐在", "VERB"),
        ("木桌", "NOUN"),
        ("上", "PART"),
    ]
    monkeypatch.setattr(chunks, "load", lambda model: Read("zh", *words))
    assert [c.text for c in parse("一只红色的猫坐在木桌上", "spacy")] == ["红色的猫", "木桌"]


@needs_spacy
def test_a_model_that_finds_no_nouns_is_refused(monkeypatch):
    import spacy

    blank = spacy.blank("en")
    monkeypatch.setattr(chunks, "load", lambda model: blank)
    with pytest.raises(ValueError, match="spaCy's model 'x' finds no nouns, expected one with a parser or a tagger"):
        parse("a dog", "spacy:x")
