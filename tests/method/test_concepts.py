"""Prompts to concepts to text tokens, with tokenizers that split words as CLIP's and T5's do."""

import warnings

import pytest
import torch
from diffusers import FluxPipeline

from builders import clip_tokenizer, small_sd35, t5_tokenizer
from star.concepts import Concept, concept_tokens, locate, parse

CORPUS = ["a photo of a red bench left of two green cats", 'a sign that says "Hello World"', "a dog", "the blue bear"]


def texts(prompt):
    return [concept.text for concept in parse(prompt)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a photo of a bench", ["bench"]),
        ("a photo of a red bench left of two green cats", ["red bench", "green cats"]),
        ("a photo of a brown giraffe and a white stop sign", ["brown giraffe", "white stop sign"]),
        ("a photo of three toothbrushes", ["toothbrushes"]),
        ("a red circle on a white background", ["red circle", "white background"]),
        ("a dog above a cow", ["dog", "cow"]),
        ("a dog to the right of the cow", ["dog", "cow"]),
        ("a dog in the centre, a cow in the center", ["dog", "cow"]),
        ("a watercolour of a dog, watercolor", ["dog"]),
        ("a running dog chasing a ball in the park, highly detailed, 4k", ["running dog", "ball", "park"]),
        ("a person's hat", ["person's hat"]),
        ("two dogs' bowls next to the cats' toys", ["dogs' bowls", "cats' toys"]),
        ("portrait of an old man with a long white beard, oil painting", ["old man", "long white beard"]),
        (
            "a cute corgi wearing sunglasses, sitting on the beach, studio lighting",
            ["cute corgi", "sunglasses", "beach"],
        ),
        (
            "a well-lit room, a woman with her left hand on a swimming pool",
            ["well-lit room", "woman", "left hand", "swimming pool"],
        ),
        ("", []),
        ("the, of and", []),
    ],
)
def test_noun_spans(prompt, expected):
    assert texts(prompt) == expected


# Objects of COCO's and GenEval's lists whose names are more than one plain noun.
NAMES = (
    "bench,traffic light,fire hydrant,stop sign,parking meter,bear,sports ball,baseball bat,tennis racket,wine glass,"
    "hot dog,potted plant,dining table,tv,computer mouse,tv remote,cell phone,teddy bear,hair drier,scissors,orange"
).split(",")


@pytest.mark.parametrize("name", NAMES)
def test_templates_of_geneval(name):
    other = NAMES[NAMES.index(name) - 1]
    assert texts(f"a photo of a {name}") == [name]
    assert texts(f"a photo of four {name}s") == [f"{name}s"]
    assert texts(f"a photo of a blue {name} and an orange {other}") == [f"blue {name}", f"orange {other}"]
    for relation in ("and", "left of", "right of", "above", "below"):
        assert texts(f"a photo of a {name} {relation} a {other}") == [name, other]


@pytest.mark.parametrize("quotes", ['""', "“”", "''", "‘’"])
def test_quoted_text_is_one_concept(quotes):
    prompt = f"a sign that says {quotes[0]}Hello World{quotes[1]} on a wall"
    assert [(c.text, c.kind) for c in parse(prompt)] == [
        ("sign", "object"),
        ("Hello World", "text"),
        ("wall", "object"),
    ]


def test_apostrophes_are_no_quotes():
    assert texts("a cat's toy and a dog's bone") == ["cat's toy", "dog's bone"]


def test_spans_are_parts_of_the_prompt():
    prompt = 'a photo of a red bench, "and so on", left of two green cats'
    for concept in parse(prompt):
        assert prompt[concept.start : concept.end] == concept.text


@pytest.fixture(scope="module")
def clip():
    return clip_tokenizer(CORPUS, length=40)


@pytest.fixture(scope="module")
def t5():
    return t5_tokenizer(CORPUS)


def spelled(tokenizer, prompt, indices, length):
    ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True).input_ids
    tokens = tokenizer.convert_ids_to_tokens([ids[i] for i in indices])
    return "".join(tokens).replace("</w>", " ").replace("▁", " ").strip()


def test_tokens_spell_their_concept_in_both_parts(clip, t5):
    prompts = ["a photo of a red bench left of two green cats", 'a sign that says "Hello World"']
    concepts = [parse(p) for p in prompts]
    found = locate(prompts, clip, t5, max_sequence_length=64)
    assert found.index.shape[:2] == (2, 2) and found.index.shape == found.weight.shape
    for b, prompt in enumerate(prompts):
        for g, concept in enumerate(concepts[b]):
            index, weight = found.index[b, g], found.weight[b, g]
            in_clip, in_t5 = index[(index >= 0) & (index < 40)], index[index >= 40] - 40
            assert spelled(clip, prompt, in_clip.tolist(), 40) == concept.text.lower()
            assert spelled(t5, prompt, in_t5.tolist(), 64).replace(" ", "") == concept.text.replace(" ", "")
            assert weight[(index >= 0) & (index < 40)].sum().item() == pytest.approx(0.5)
            assert weight.sum().item() == pytest.approx(1)
            assert (weight[index < 0] == 0).all()


@pytest.mark.parametrize(("tokens", "low", "high"), [("clip", 1, 40), ("t5", 40, 104)])
def test_one_part_alone(clip, t5, tokens, low, high):
    prompt = CORPUS[0]
    found = locate([prompt], clip, t5, max_sequence_length=64, tokens=tokens)
    used = found.index[found.index >= 0]
    assert used.min() >= low and used.max() < high
    torch.testing.assert_close(found.weight.sum(-1), torch.ones(1, 2))


def test_without_a_clip_part_t5s_tokens_begin_at_zero(clip, t5):
    prompt = CORPUS[0]
    beside = locate([prompt], clip, t5, max_sequence_length=64, tokens="t5")
    alone = locate([prompt], None, t5, max_sequence_length=64)
    assert torch.equal(alone.index, torch.where(beside.index < 0, -1, beside.index - 40))
    assert torch.equal(alone.weight, beside.weight)


def test_no_begin_end_or_padding(clip):
    prompt = "a dog"
    whole = Concept(prompt, 0, len(prompt), "object")
    found = locate([prompt], clip, concepts=[[whole]])
    ids = clip(prompt, padding="max_length", max_length=40).input_ids
    picked = {ids[i] for i in found.index[found.index >= 0].tolist()}
    assert picked.isdisjoint(clip.all_special_ids)


def test_what_is_cut_off_is_empty_and_told(clip, t5):
    long = "a dog " * 30 + "the blue bear"
    concepts = parse(long)
    with pytest.warns(UserWarning, match="concepts: some have no text token of the tokenizers"):
        found = locate([long, "of and"], clip, concepts=[concepts[-1:], []])
    assert (found.index == -1).all() and (found.weight == 0).all()
    with pytest.warns(UserWarning, match="prompts: some are longer than the tokenizers read"):
        locate(["a dog", long], clip, concepts=[["dog"], [(0, 5)]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        locate([long], clip, t5, concepts=[[(0, 5)]])  # T5 reads all of it
        assert (locate(["of and"], clip).index == -1).all()  # there is no concept


def test_errors_name_the_argument(clip):
    with pytest.raises(TypeError, match="prompt: got int"):
        parse(3)
    with pytest.raises(ValueError, match="concepts: got 0 lists, expected one for each of 1 prompts"):
        locate(["a dog"], clip, concepts=[])
    with pytest.raises(TypeError, match="prompts: got a str"):
        locate("a dog", clip)
    for bad in ("cat", (2, 2), (0, 6), (-1, 3), ""):
        with pytest.raises(ValueError, match=r"concepts: got .* expected a part of the prompt 'a dog'"):
            locate(["a dog"], clip, concepts=[[bad]])
    for wrong in (5, (1, 2, 3), b"cat", (0.5, 2), ["a", "b"]):
        with pytest.raises(ValueError, match=r"concepts: got .* expected a text of the prompt or its characters"):
            locate(["a dog"], clip, concepts=[[wrong]])
    with pytest.raises(ValueError, match="tokens: got 'all'"):
        locate(["a dog"], clip, tokens="all")
    with pytest.raises(ValueError, match="'t5' needs t5_tokenizer"):
        locate(["a dog"], clip, tokens="t5")
    with pytest.raises(ValueError, match="got None for both"):
        locate(["a dog"], None)


def equal(a, b):
    return torch.equal(a.index, b.index) and torch.equal(a.weight, b.weight)


def test_tokens_of_a_pipeline():
    prompts, pipeline = CORPUS[:2], small_sd35(CORPUS)
    clip, t5 = pipeline.tokenizer, pipeline.tokenizer_3
    assert equal(concept_tokens(pipeline, prompts), locate(prompts, clip, t5, max_sequence_length=256))
    long = ["a dog " * 40 + "the blue bear"]
    short, default = concept_tokens(pipeline, long, max_sequence_length=64), concept_tokens(pipeline, long)
    assert equal(short, locate(long, clip, t5, max_sequence_length=64)) and short.index.max() < 77 + 64
    assert not equal(short, default)
    pipeline.tokenizer_3 = None
    assert equal(concept_tokens(pipeline, prompts), locate(prompts, clip))


def test_tokens_of_a_flux_pipeline(clip, t5):
    parts = dict(scheduler=None, vae=None, text_encoder=None, text_encoder_2=None, transformer=None)
    pipeline = FluxPipeline(tokenizer=clip, tokenizer_2=t5, **parts)
    # 512 by default: what is beyond T5's first 256 tokens is found.
    prompt = "a dog " * 100 + "the blue bear"
    found = concept_tokens(pipeline, [prompt])
    assert equal(found, locate([prompt], None, t5, max_sequence_length=512)) and found.index.max() > 256
    with pytest.raises(TypeError, match="pipeline: got object, expected one of diffusers' with encode_prompt"):
        concept_tokens(object(), [prompt])


def test_concepts_that_the_user_marks(clip, t5):
    prompt = CORPUS[0]
    start = prompt.index("green")
    marked = [["red bench", (start, start + len("green cats"))]]
    as_parsed = locate([prompt], clip, t5, concepts=marked)
    assert equal(as_parsed, locate([prompt], clip, t5))
    one = locate([prompt], clip, t5, concepts=[["bench"]])
    assert one.index.shape[1] == 1 and not equal(one, as_parsed)
    pipeline = small_sd35(CORPUS)
    assert equal(
        concept_tokens(pipeline, [prompt], concepts=[["bench"]]),
        locate([prompt], pipeline.tokenizer, pipeline.tokenizer_3, concepts=[["bench"]]),
    )


def test_one_text_where_a_list_of_them_belongs_is_no_row_of_letters():
    with pytest.raises(TypeError, match=r"concepts: got 'red bench' for a prompt, expected a list of texts"):
        concept_tokens(small_sd35(CORPUS), ["a red bench"], concepts=["red bench"])
