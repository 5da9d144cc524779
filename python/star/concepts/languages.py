"""Which languages a prompt has that the rules do not know: by its scripts, and by its commonest words."""

from __future__ import annotations

import unicodedata
from collections import Counter

from star.concepts import lexicon
from star.concepts.words import Word

# Scripts by the first word of a character's Unicode name, and the spaCy models that read them.
_SCRIPTS = {
    "CJK": "Han (Chinese)",
    "IDEOGRAPHIC": "Han (Chinese)",
    "BOPOMOFO": "Han (Chinese)",
    "HIRAGANA": "Kana (Japanese)",
    "KATAKANA": "Kana (Japanese)",
    "KATAKANA-HIRAGANA": "Kana (Japanese)",
    "HANGUL": "Hangul (Korean)",
}
_KNOWN = ("LATIN", "MODIFIER")
# Words that English does not have; "in", "an" and others that it has tell nothing.
_COMMON_WORDS = {
    "German": "ein eine einen einem einer der das dem den und mit auf unter vor von ist im zwei drei neben",
    "French": "un une le les du des et avec sur dans sous est au aux deux trois qui",
    "Spanish": "un una el los las del y con en sobre junto al dos tres es de la",
    "Italian": "un una il gli della del con su di e sopra due tre la",
    "Portuguese": "um uma os do da com em na e dois duas tres ao",
    "Dutch": "een het de en met op van naast onder twee drie",
}
_COMMON = {language: frozenset(words.split()) for language, words in _COMMON_WORDS.items()}
MODELS = {
    "English": "en_core_web_sm",
    "Han (Chinese)": "zh_core_web_sm",
    "Kana (Japanese)": "ja_core_news_sm",
    "Hangul (Korean)": "ko_core_news_sm",
    "Cyrillic": "ru_core_news_sm",
    "Greek": "el_core_news_sm",
    "German": "de_core_news_sm",
    "French": "fr_core_news_sm",
    "Spanish": "es_core_news_sm",
    "Italian": "it_core_news_sm",
    "Portuguese": "pt_core_news_sm",
    "Dutch": "nl_core_news_sm",
}


def foreign(words: list[Word]) -> tuple[str, ...]:
    """The scripts of the words beside Latin, by name; or the language of Latin words that are not English."""
    scripts: dict[str, None] = {}
    for word in words:
        if word.is_word and not word.key.isascii():
            scripts |= dict.fromkeys(_scripts(word.key))
    if _SCRIPTS["HIRAGANA"] in scripts:
        scripts.pop(_SCRIPTS["CJK"], None)
    return tuple(scripts) or _latin_language([word.key for word in words if word.is_word])


def main_language(words: list[Word]) -> str:
    """The language of most letters: English, one of Latin letters, or a script."""
    letters: Counter[str] = Counter()
    for word in words:
        if word.is_word:
            letters.update(dict.fromkeys(_scripts(word.key) or ["Latin"], word.end - word.start))
    if letters[_SCRIPTS["HIRAGANA"]]:  # Japanese is written in Han as well
        letters[_SCRIPTS["HIRAGANA"]] += letters.pop(_SCRIPTS["CJK"], 0)
    script = max(letters, key=lambda name: letters[name], default="Latin")
    if script != "Latin":
        return script
    return next(iter(_latin_language([word.key for word in words if word.is_word])), "English")


def _scripts(key: str) -> list[str]:
    """Scripts of a word. A single letter of an alphabet is a symbol, as in "µm"."""
    names = Counter(unicodedata.name(letter, "").split(" ")[0] for letter in key if letter.isalpha())
    unknown = {name: count for name, count in names.items() if name and name not in _KNOWN}
    return [_SCRIPTS.get(name, name.title()) for name, count in unknown.items() if count > 1 or name in _SCRIPTS]


def _latin_language(keys: list[str]) -> tuple[str, ...]:
    english = sum(key in lexicon.BREAKS or key in lexicon.DETERMINERS for key in keys)
    said = {language: [key for key in keys if key in common] for language, common in _COMMON.items()}
    language = max(said, key=lambda name: len(said[name]))
    enough = len(set(said[language])) > 1 and len(said[language]) > 2 * english
    return (language,) if enough else ()
