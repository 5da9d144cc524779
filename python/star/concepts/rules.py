"""Noun spans of English by rules: closed classes of words, agreement of subject and verb, forms in -ing, -ed and -ly.

No model and no download. One pass over the words, each looking at its neighbors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from star.concepts import lexicon
from star.concepts.words import Word

_SIZE = re.compile(r"\d++(?:[.,:/x']\d++)*+(?:k|mm|px|p|s|d|fps)?")  # 85mm, 8k, 1920s: no thing of its own
_DECADE = re.compile(r"\d{1,3}0s")
_CLAUSE_ENDS = frozenset(",.;:!?|\n")
_RELATIVES = frozenset("that which who and but he she it they".split())
_BEFORE_NAMES = (("of", "style"), ("of", "manner"), ("on", "trending"), ("on", "featured"))
_END = Word("", 0, 0)


@dataclass(frozen=True)
class Phrase:
    """The words of a noun phrase in lower case, without its determiner, and what stands around it.

    before, after: the words beside it, "" for none. begins: nothing stands before it in its clause.
    """

    keys: tuple[str, ...]
    determiner: str = ""
    before: str = ""
    after: str = ""
    begins: bool = False

    def names_a_thing(self) -> bool:
        """Whether a thing of the image is named, and not what the image is, an amount, a side, a time, or praise."""
        keys, head, craft = self.keys, self.keys[-1], lexicon.CRAFT | lexicon.PRAISE
        if not self.determiner:
            craft |= lexicon.TECHNIQUES
        if head in lexicon.CRAFT:
            return head in ("letters", "words") and not set(keys) <= craft  # "red letters"
        if head in lexicon.MEDIA:
            return self._is_depicted()
        if all(key in craft or (is_size(key) and not self.determiner) for key in keys):
            return False
        if set(keys) <= lexicon.LOCATIONS or (head in lexicon.AMOUNTS and self.after == "of"):
            return False
        if self.determiner in ("a", "an"):
            return True
        if set(keys) <= lexicon.TIMES:
            return False
        if self.determiner or head in lexicon.ALSO_THINGS:
            return True
        return not all(_is_adjective(key) or key in craft for key in keys)

    def _is_depicted(self) -> bool:
        """Whether a medium is a thing of the image ("a girl holding a photo") and not what the image is."""
        if self.begins:
            return False
        attributes = set(self.keys) - lexicon.MEDIA - lexicon.CRAFT - lexicon.PRAISE - lexicon.TECHNIQUES
        return bool(self.determiner) or (bool(attributes) and self.before not in ("in", "as"))


def noun_spans(words: list[Word]) -> list[tuple[int, int]]:
    """Characters [start, end) of the reading that name a thing with its attributes, in order. words: of the reading."""
    return _Phrases(words).spans()


class _Phrases:
    """The words of a prompt, and the noun phrase that is being read."""

    def __init__(self, words: list[Word]) -> None:
        self.words = words
        self.found: list[tuple[int, int]] = []
        self.phrase: list[int] = []
        self.only_adjectives = True  # in the phrase
        self.determiner = ""  # of the phrase
        self.clause_begins = True  # nothing but this phrase has been read of the clause
        self.absent = False  # the next phrase says what is not there
        self.maker = False  # the next phrases name who made the image, or whose style it has

    def spans(self) -> list[tuple[int, int]]:
        i = 0
        while i < len(self.words):
            i += self.read(i)
        self.close(len(self.words))
        return self.found

    # --- neighbors ---

    def word(self, i: int) -> Word:
        return self.words[i] if 0 <= i < len(self.words) else _END

    def key(self, i: int) -> str:
        return self.word(i).key

    def is_nominal(self, i: int) -> bool:
        """Whether a word may go on with a noun phrase."""
        key = self.key(i)
        if not self.word(i).is_word or key in lexicon.BREAKS or key in lexicon.DETERMINERS:
            return False
        return not _is_adverb(key) or (self.word(i + 1).is_word and self.key(i + 1) not in lexicon.BREAKS)

    # --- one word after the other ---

    def read(self, i: int) -> int:
        """Read what begins at word i; returns how many words that is."""
        word, key = self.word(i), self.key(i)
        if length := self.fixed_phrase(i):
            self.close(i)
            self.clause_begins = False
            return length
        if not word.is_word:
            self.read_mark(i)
        elif is_size(key) and not (_DECADE.fullmatch(key) and self.determiner):
            self.close(i)
            self.determiner = "1" if key == "1" else "2"
        elif key in lexicon.DETERMINERS and not (key in ("other", "own") and self.phrase):
            self.close(i)
            self.determiner = key
            self.absent = self.absent or key in lexicon.NEGATIONS
        elif self.is_break(i):
            if not (key in ("and", "or") and self.joins(i)):
                self.read_break(i)
        elif self.is_side(i) or self.is_adverb(i) or self.is_verb(i):
            imperative = self.clause_begins and not self.phrase
            self.close(i)
            self.determiner = ""
            self.clause_begins = imperative and self.key(i + 1) in lexicon.DETERMINERS
        else:
            self.phrase.append(i)
            self.only_adjectives = self.only_adjectives and _is_adjective(key)
        return 1

    def fixed_phrase(self, i: int) -> int:
        for phrase in lexicon.PHRASES:
            if self.key(i) == phrase[0] and all(self.key(i + k) == key for k, key in enumerate(phrase)):
                return len(phrase)
        return 0

    def read_mark(self, i: int) -> None:
        key = self.key(i)
        if key == "," and self.determiner in lexicon.SINGULAR_DETERMINERS and self.joins(i):
            return
        self.close(i)
        if key != "'":  # of a decade
            self.determiner = ""
        if key in _CLAUSE_ENDS:
            self.clause_begins, self.absent, self.maker = True, False, False

    def read_break(self, i: int) -> None:
        key, before = self.key(i), self.key(i - 1)
        began, dropped = self.clause_begins, self.close(i)
        self.determiner = ""
        self.clause_begins = False
        if key == "by":
            makes = before in lexicon.MAKING | lexicon.MEDIA or dropped or (began and not self.word(i - 1).is_word)
            self.maker = makes and self.is_nominal(i + 1)
        elif (key, before) in _BEFORE_NAMES:
            self.maker = True
        elif key != "and":
            self.maker = False
        self.absent = key in ("without", "instead") or (self.absent and key == "of")

    def joins(self, i: int) -> bool:
        """Whether "and" or a comma stands between adjectives of one noun: "a black and white cow"."""
        if not self.phrase or not self.only_adjectives or not self.is_nominal(i + 1):
            return False
        if self.key(i) == ",":
            return self.is_nominal(i + 2) or self.key(i + 2) in ("and", "or")
        return _is_adjective(self.key(i + 1)) and self.is_nominal(i + 2)

    # --- what ends a phrase ---

    def is_break(self, i: int) -> bool:
        key = self.key(i)
        if key in lexicon.AMBIGUOUS_AUXILIARIES:
            after_determiner = not self.phrase and self.determiner
            return not (after_determiner or (self.phrase and not self.is_nominal(i + 1)))
        if key == "full":
            return self.key(i + 1) == "of"
        return key in lexicon.BREAKS

    def is_side(self, i: int) -> bool:
        return self.key(i) in lexicon.SIDES and (self.key(i + 1) == "side" or not self.is_nominal(i + 1))

    def is_adverb(self, i: int) -> bool:
        return _is_adverb(self.key(i)) and not (self.is_nominal(i + 1) and self.only_adjectives)

    def is_verb(self, i: int) -> bool:
        return self.is_imperative(i) or self.is_gerund(i) or self.is_participle(i) or self.is_finite(i)

    def is_imperative(self, i: int) -> bool:
        """A first word that an article follows: "create an image"."""
        begins = self.clause_begins and not self.phrase and not self.determiner
        return begins and self.key(i + 1) in ("a", "an", "the")

    def is_gerund(self, i: int) -> bool:
        """Whether a word in -ing is a verb: "a dog chasing a ball", but "a running dog" and "a dining table"."""
        key = self.key(i)
        if not key.endswith("ing") or len(key) < 5:
            return False
        if key in lexicon.NOUNS_IN_ING:
            return self.is_verb_though_noun(i)
        base, before = _base_of_gerund(key), self.key(i - 1)
        if self.is_nominal(i + 1):
            if not self.phrase:
                return not self.determiner and (base in lexicon.TRANSITIVE or before in lexicon.AUXILIARIES)
            use = key in lexicon.USES_IN_ING and base not in lexicon.TRANSITIVE  # "an oak dining table"
            return not self.only_adjectives and not use
        if self.phrase:
            return not self.only_adjectives or base in lexicon.VERBS or self.key(i + 1) in lexicon.DETERMINERS
        if self.determiner:
            return False  # "a starling on a branch"
        noun = before in lexicon.PREPOSITIONS and self.key(i + 1) not in lexicon.DETERMINERS
        return not (noun or (self.word(i).capital and i > 0))

    def is_verb_though_noun(self, i: int) -> bool:
        """Whether a noun in -ing is a verb here: "a man building a house", "a boy drawing on a wall"."""
        if not self.phrase or self.key(i + 1) in lexicon.DETERMINERS:
            return bool(self.phrase)
        acts = _base_of_gerund(self.key(i)) in lexicon.VERBS and not self.only_adjectives
        if self.key(i) in lexicon.MEDIA:
            made = lexicon.CRAFT | lexicon.PRAISE | lexicon.TECHNIQUES | lexicon.MEDIA | lexicon.ADJECTIVES
            return acts and self.key(i + 1) not in ("of", "by") and not {self.key(k) for k in self.phrase} <= made
        return acts and self.is_nominal(i + 1)

    def is_participle(self, i: int) -> bool:
        """Whether a past form is a verb or follows its noun: "a house surrounded by trees", but "a hooded cloak"."""
        key = self.key(i)
        if not _is_past_form(key):
            return False
        if self.is_nominal(i + 1):
            if key in lexicon.NAMING:
                return self.word(i + 1).capital
            return key in lexicon.PAST_TENSES and bool(self.phrase)
        return bool(self.phrase) or not self.determiner

    def is_finite(self, i: int) -> bool:
        """Whether a word is a verb in the present: it agrees with its subject, and never follows a determiner."""
        key = self.key(i)
        third, base = _base_of_third_person(key)
        if not self.phrase and not self.determiner and self.key(i - 1) in lexicon.MODALS:
            return True
        if not self.phrase:
            if self.determiner or base not in lexicon.VERBS:
                return False
            after = self.key(i + 1) in lexicon.DETERMINERS or self.key(i - 1) in _RELATIVES
            return after or base not in lexicon.ALSO_NOUNS | lexicon.ADJECTIVES
        if self.word(i).capital and self.word(i - 1).capital:
            return False  # a name
        subject = self.key(i - 1)
        singular = self.determiner in lexicon.SINGULAR_DETERMINERS and not _is_plural(subject)
        if third and self.only_adjectives and not singular:
            return False
        if third:
            if self.is_nominal(i + 1):
                return base in lexicon.VERBS and self.determiner not in lexicon.PLURAL_DETERMINERS
            if singular:
                return base in lexicon.VERBS or not self.only_adjectives
            return base in lexicon.VERBS - lexicon.ALSO_NOUNS
        if key not in lexicon.VERBS or self.only_adjectives:
            return False
        if _is_plural(subject):
            return True
        both = "and" in (self.key(self.phrase[0] - 1), self.key(self.phrase[0] - 2))  # "a cat and a dog sit"
        return both and key not in lexicon.ALSO_NOUNS and not self.is_nominal(i + 1) and self.word(i + 1).is_word

    def close(self, end: int) -> bool:
        """End the phrase before word `end`, and keep it if it names a thing. Returns whether one was dropped."""
        if not self.phrase:
            return False
        first, last = self.phrase[0], self.phrase[-1]
        keys = tuple(self.key(i) for i in self.phrase)
        phrase = Phrase(keys, self.determiner, self.key(first - 1), self.key(end), self.clause_begins)
        kept = not self.absent and not self.maker and phrase.names_a_thing()
        if kept:
            self.found.append((self.word(first).start, self.word(last).end))
        if not self.maker:
            self.absent = False
        self.phrase.clear()
        self.only_adjectives = True
        self.clause_begins = False
        return not kept


def is_size(key: str) -> bool:
    """A number, also with a unit."""
    return bool(_SIZE.fullmatch(key))


def _is_adjective(key: str) -> bool:
    return key in lexicon.ADJECTIVES or (len(key) > 4 and key.endswith(lexicon.ADJECTIVE_ENDINGS)) or _is_adverb(key)


def _is_adverb(key: str) -> bool:
    return key.endswith("ly") and len(key) > 4 and key not in lexicon.NOT_ADVERBS


def _is_past_form(key: str) -> bool:
    if key in lexicon.PARTICIPLES or key in lexicon.PAST_TENSES:
        return True
    return key.endswith("ed") and len(key) > 4 and key not in lexicon.NOUNS_IN_ED


def _is_plural(key: str) -> bool:
    return key in lexicon.PLURALS or (_ends_in_plural_s(key) and key not in lexicon.NOUNS_IN_S)


def _ends_in_plural_s(key: str) -> bool:
    return key.endswith("s") and not key.endswith(("ss", "us", "is", "os", "'s")) and len(key) > 3


def _base_of_third_person(key: str) -> tuple[bool, str]:
    """Whether a word may be a verb's third person, and the verb: "carries" is of "carry"."""
    if not _ends_in_plural_s(key) or key in lexicon.NOUNS_IN_S:
        return False, key
    candidates = (key[:-1], key[:-2], key[:-3] + "y")
    return True, next((base for base in candidates if base in lexicon.VERBS), key[:-1])


def _base_of_gerund(key: str) -> str:
    stem = key[:-3]
    candidates = (stem, stem + "e", stem[:-1], stem[:-1] + "ie")
    return next((base for base in candidates if base in lexicon.VERBS), stem)
