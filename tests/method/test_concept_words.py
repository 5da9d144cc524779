"""What the rules read of a prompt: things, marks for programs, quotes, scripts; and how much work it is."""

import re
import sys
import unicodedata
import warnings

import pytest

from star.cli import show_warnings_once
from star.concepts import (
    parse,
    parse_all,
    quotes,
    reading,
    rules,
    unknown_languages,
    words,
)


def texts(prompt):
    return [concept.text for concept in parse(prompt)]


def kinds(prompt):
    return [(concept.text, concept.kind) for concept in parse(prompt)]


# --- nouns and verbs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        # In -ing: after a determiner or a preposition a noun, unless an object follows.
        ("a starling on a branch", ["starling", "branch"]),
        ("a photo of a fledgling", ["fledgling"]),
        ("a tiny gosling in a puddle", ["tiny gosling", "puddle"]),
        ("a street in Beijing", ["street", "Beijing"]),
        ("a cake with icing", ["cake", "icing"]),
        ("a building", ["building"]),
        ("a tall building next to a railing", ["tall building", "railing"]),
        ("painting of a wedding ring", ["wedding ring"]),
        ("a sapling growing out of a crack", ["sapling", "crack"]),
        ("a man building a house", ["man", "house"]),
        ("a man building sandcastles", ["man", "sandcastles"]),
        ("a boy drawing on a wall", ["boy", "wall"]),
        ("a woman painting in a studio", ["woman", "studio"]),
        ("a fishing boat and a man fishing in a river", ["fishing boat", "man", "river"]),
        (
            "an oak dining table, a hotel swimming pool, a man rolling dice",
            ["oak dining table", "hotel swimming pool", "man", "dice"],
        ),
        ("flying cars, glowing purple eyes", ["flying cars", "glowing purple eyes"]),
        ("a girl, holding flowers, wearing a hat", ["girl", "flowers", "hat"]),
        # Nouns that look like auxiliaries and verbs.
        ("a watering can beside a can of soda", ["watering can", "can", "soda"]),
        ("a trash can", ["trash can"]),
        ("a robot can fly", ["robot"]),
        ("a music stand on a stage", ["music stand", "stage"]),
        # A verb agrees with its subject.
        ("a cook stirs a pot while a gull watches from a post", ["cook", "pot", "gull", "post"]),
        ("the dog runs through the field", ["dog", "field"]),
        ("A DOG JUMPS OVER A FENCE", ["DOG", "FENCE"]),
        ("hikers at Gravity Falls", ["hikers", "Gravity Falls"]),
        ("two cats play with yarn", ["cats", "yarn"]),
        ("a cat and a dog sit on a bench", ["cat", "dog", "bench"]),
        ("autumn leaves on a camera lens", ["autumn leaves", "camera lens"]),
        ("three red crosses and a red cross", ["red crosses", "red cross"]),
        # Past forms.
        ("a house surrounded by trees", ["house", "trees"]),
        ("a hooded cloak, snow covered hills", ["hooded cloak", "snow covered hills"]),
        ("a table made of glass in a dimly lit room", ["table", "glass", "dimly lit room"]),
        # Adjectives of one noun.
        ("a black and white cow", ["black and white cow"]),
        ("an old, rusty truck", ["old, rusty truck"]),
        ("a red apple and a green pear", ["red apple", "green pear"]),
        # What the image is, who made it, what is not there, amounts, sides and times.
        ("a girl holding a photo of a dog, oil painting by Greg Rutkowski", ["girl", "photo", "dog"]),
        ("a fox in the style of Van Gogh, trending on artstation", ["fox"]),
        ("a house by the sea", ["house", "sea"]),
        ("a cat, drawn in the sand, a photo by Ansel Adams, movie still", ["cat", "sand"]),
        ("a D&D character sheet", ["D&D character sheet"]),
        ("a room without furniture and with no windows", ["room"]),
        ("a pair of shoes at night, trees in the background", ["shoes", "trees"]),
        ("beautiful, elegant, highly detailed, sharp focus, depth of field", []),
    ],
)
def test_nouns_and_verbs(prompt, expected):
    assert texts(prompt) == expected


# --- marks for programs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a (red car:1.3) on a street", ["red car", "street"]),
        ("a ((red car)) and a [dog] and {a cat}", ["red car", "dog", "cat"]),
        ("a ((red)) car", ["red)) car"]),  # one concept, with the marks between
        ("a (very (old:1.2) tree:0.9)", ["old:1.2) tree"]),
        ("(cat:1.2) (dog:1.3)", ["cat", "dog"]),
        ("a castle::9, a moon::-2", ["castle", "moon"]),
        ("a castle :: a moon", ["castle", "moon"]),
        ("a cat++ on a (wooden table)1.2 beside a dog--", ["cat", "wooden table", "dog"]),
        ("[cat:dog:0.5] in a hat", ["cat", "dog", "hat"]),
        ("<lora:style:0.8> a cat <hypernet:x:1>", ["cat"]),
        ("a cat BREAK a dog --ar 16:9 --v 5", ["cat", "dog"]),
        (r"a cat \(animal\) on a mat", ["cat", "animal", "mat"]),
        ("a dog (a golden retriever) on a lawn", ["dog", "golden retriever", "lawn"]),
        ("a (red) car", ["red) car"]),
        ("a clock showing 10:30, 16:9", ["clock"]),
        ("a cat) and (a dog", ["cat", "dog"]),
        (":1.2 () (( ]] <lora: ::", []),
    ],
)
def test_weights_and_other_marks_for_programs(prompt, expected):
    assert texts(prompt) == expected


def test_marks_in_a_quoted_text_are_text():
    assert kinds('a sign that says "(x:1.2) [y]"') == [("sign", "object"), ("(x:1.2) [y]", "text")]
    assert kinds('(a sign that says "GO":1.3) on a wall') == [("sign", "object"), ("GO", "text"), ("wall", "object")]


# --- what is invisible ------------------------------------------------------------------------------------------------

INVISIBLE = "\ufeff\u200b\u200c\u200d\u2060\u00ad\u200e\u200f"


@pytest.mark.parametrize("mark", INVISIBLE, ids=lambda mark: f"{ord(mark):x}")
def test_invisible_characters_change_no_concept(mark):
    plain = "a red bench in Rome"
    for prompt in (mark + plain, plain + mark, plain.replace(" ", f" {mark}"), plain.replace(" ", f"{mark} ")):
        found = parse(prompt)
        assert ["".join(c for c in concept.text if c not in INVISIBLE) for concept in found] == ["red bench", "Rome"]
        assert all(prompt[c.start : c.end] == c.text and c.text[0] != mark and c.text[-1] != mark for c in found)
    if mark not in "\ufeff\u200b":  # these two part words
        assert texts(f"the{mark} buil{mark}ding") == [f"buil{mark}ding"]


def test_accents_of_their_own_and_wide_letters():
    for prompt in ("a café terrace in Łódź", "a naïve façade"):
        expected = [unicodedata.normalize("NFD", text) for text in texts(prompt)]
        assert texts(unicodedata.normalize("NFD", prompt)) == expected and len(expected) == prompt.count(" in ") + 1
    assert texts("ａ ＲＥＤ ｃａｒ ｏｎ ａ ｒｏａｄ") == ["ＲＥＤ ｃａｒ", "ｒｏａｄ"]


# --- quotes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ('a 12" ruler and a 6" pipe', []),
        ('a 24" monitor showing "HELLO"', ["HELLO"]),
        ('a sign that says "Route 66" and a 12" ruler', ["Route 66"]),
        ('"Route 66" and "EXIT 7"', ["Route 66", "EXIT 7"]),
        ('a sign that says "5\'6" tall"', ["5'6\" tall"]),
        ("the '80s and the kids' room, rock 'n' roll", []),
        ("a board with 'no dogs' and the dogs' bowls", ["no dogs"]),
        ("a poster saying ‘Don’t panic’", ["Don’t panic"]),
        ("ein „Hallo“, un «Salut», en ”Hej”, a „Cześć”, ein »Servus«", ["Hallo", "Salut", "Hej", "Cześć", "Servus"]),
        ("「こんにちは」『本』＂x＂ ‹y› ‚z‘", ["こんにちは", "本", "x", "y", "z"]),
        ('an empty "" and "  " and an open "end', []),
    ],
)
def test_texts_in_quotes(prompt, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert [text for text, kind in kinds(prompt) if kind == "text"] == expected


def test_a_decade_and_what_is_owned_are_things():
    assert texts("the '80s and the kids' room") == ["80s", "kids' room"]


# --- scripts and languages that the rules do not know -----------------------------------------------------------------

FOREIGN = {
    "一只红色的猫坐在木桌上": "Han (Chinese)",
    "桜の木の下に座る侍": "Kana (Japanese)",
    "빨간 자전거 옆의 고양이": "Hangul (Korean)",
    unicodedata.normalize("NFD", "빨간 자전거"): "Hangul (Korean)",
    "قطة حمراء على طاولة": "Arabic",
    "красная кошка на столе": "Cyrillic",
    "एक लाल बिल्ली मेज पर": "Devanagari",
    "แมวสีแดงบนโต๊ะ": "Thai",
    "חתול אדום על שולחן": "Hebrew",
    "κόκκινη γάτα σε τραπέζι": "Greek",
    "ein roter Hund auf einer Wiese": "German",
    "un chat noir avec une écharpe dans la neige": "French",
    "una casa blanca con un tejado rojo": "Spanish",
    "un gatto nero con una sciarpa nella neve, sopra il tetto": "Italian",
    "um gato preto com uma bola": "Portuguese",
    "een rode kat op een tafel": "Dutch",
    "masterpiece, best quality, 猫": "Han (Chinese)",
}


@pytest.mark.parametrize("prompt", FOREIGN, ids=FOREIGN.values())
def test_what_the_rules_do_not_know_is_said_by_name_with_what_to_do(prompt):
    assert unknown_languages(prompt) == (FOREIGN[prompt],)
    with pytest.warns(UserWarning) as said:
        found = parse(prompt)
    assert len(said) == 1 and "\n" not in str(said[0].message)
    for part in (FOREIGN[prompt], "pip install 'star-kernels[spacy]'", "give concepts"):
        assert part in str(said[0].message)
    assert all(len(concept.text) > 2 or concept.text == "猫" for concept in found)  # whole words, no single letters


def test_it_is_said_once():
    prompts = [prompt for prompt in FOREIGN if FOREIGN[prompt] == "Han (Chinese)"]
    with pytest.warns(UserWarning) as said:
        parse_all([*prompts, "a dog", *prompts])
    assert len(said) == 1
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for prompt in prompts * 3:
            parse(prompt)
    assert len(said) == 1


def test_a_command_says_it_once_whatever_libraries_do_with_warnings():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")  # as after a library has changed the filters
        show_warnings_once()
        for _ in range(3):
            parse("წითელი კატა")
    assert len([one for one in said if "Georgian" in str(one.message)]) == 1


@pytest.mark.parametrize(
    "prompt",
    [
        "a red café in Zürich",
        'a sign that says "你好"',
        "a π symbol, 21 °C, ½ µm, naïve",
        "die cut sticker of Los Angeles",
        "",
    ],
)
def test_what_they_know_is_not_said(prompt):
    assert unknown_languages(prompt) == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse(prompt)


def test_the_english_part_of_a_prompt_is_read_all_the_same():
    with pytest.warns(UserWarning, match="Han"):
        assert texts("a red car on a bridge, 一只红色的猫，木桌") == ["red car", "bridge", "一只红色的猫", "木桌"]


# --- work that grows with the prompt ----------------------------------------------------------------------------------

HOSTILE = {
    "words": "a red car on the old bridge ",
    "one word": "x",
    "open quotes": "'a ",
    "open curly quotes": "“a ",
    "quotes of many kinds": "„ « 「 ‘ ' \" ",
    "inches": '"5" ',
    "apostrophes": "'x'y ",
    "round brackets": "((",
    "closing brackets": "a)",
    "brackets": "(a [b] ",
    "angles": "<a:",
    "weights": ":1.2",
    "numbers": "1",
    "pluses": "a++",
    "options": " --a",
    "adjectives": "red, ",
    "adjectives and": "red and ",
    "adjectives in pairs": "red and blue ",
    "adjectives in a row": "red ",
    "adverbs": "softly ",
    "verbs": "red runs ",
    "marks": "\u0301",
    "dots": "1.",
    "hyphens": "a-",
    "invisible": "\u200b",
    "nouns in -ing": "running ",
    "chinese": "红色的猫",
}


def lines_of(call):
    """Lines of Python that a call runs in star.concepts."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if "star/concepts" not in frame.f_code.co_filename.replace("\\", "/"):
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.filterwarnings("ignore:concepts")
def test_work_grows_with_the_prompt_and_no_faster(kind):
    """Counted in lines of Python; what those call on text is bounded by the test of the patterns below."""
    short, long = (HOSTILE[kind] * count for count in (200, 800))
    parse(short)
    assert lines_of(lambda: parse(long)) < 4.2 * lines_of(lambda: parse(short))


def patterns():
    for module in (quotes, reading, rules, words):
        for name, value in vars(module).items():
            if isinstance(value, re.Pattern):
                yield pytest.param(value.pattern, id=f"{module.__name__}.{name}")


def backtracks(parsed):
    """Whether a parsed pattern has an unbounded repeat that can give back what it took."""
    for operation, argument in parsed:
        name = str(operation)
        if name in ("MAX_REPEAT", "MIN_REPEAT") and argument[1] > 64:
            return True
        children = argument if isinstance(argument, (tuple, list)) else [argument]
        for child in children:
            inner = child if isinstance(child, list) else [child]
            if any(isinstance(part, re._parser.SubPattern) and backtracks(part) for part in inner):
                return True
    return False


@pytest.mark.parametrize("pattern", list(patterns()))
def test_no_pattern_backtracks(pattern):
    """An attempt to match reads each character once."""
    assert not backtracks(re._parser.parse(pattern))


@pytest.mark.parametrize("pattern", [r'"([^"]+)"', r"'([^']+(?:\w'\w[^']*)*)'"])
def test_a_pattern_that_backtracks_is_found(pattern):
    assert backtracks(re._parser.parse(pattern))
