"""Which rows of a pipeline's text embeddings say a concept: found, and seen in what the pipeline itself makes."""

import warnings

import diffusers
import pytest
import torch
import transformers

from pipelines import ENCODINGS, flux, flux2, ltx2_connectors, picture, qwen_image, sd3, wan
from star.capture import allocated, record
from star.concepts import concept_tokens, said, unbracket
from versions import built_or_skip

PROMPTS = [
    "a photo of a red bench",
    "a red bench left of two green cats on the grass of a park",
    'a sign that says "OPEN" on a blue door, a red bench',
]
WORDS = {"red bench": "tan park", "green cats": "blue bear", "OPEN": "SHUT", "blue door": "old sign"}  # for others


class Encoded(Exception):
    pass


def embeddings(encoding, pipeline, prompts, call):
    """The rows of text that the pipeline's own call, with its true encoders, gives its transformer."""
    encode = type(pipeline).encode_prompt

    def stopping(*args, **options):
        raise Encoded(encode(pipeline, *args, **options))

    pipeline.encode_prompt, pipeline.check_inputs = stopping, lambda *_, **__: None
    try:
        with torch.no_grad(), pytest.raises(Encoded) as result:
            pipeline(prompt=list(prompts), **call)
        return encoding.rows(pipeline, result.value.args[0])
    finally:
        del pipeline.encode_prompt, pipeline.check_inputs


def squeezed(text):
    return "".join(text.split()).lower()


@pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
def test_the_rows_are_those_that_change_with_the_word(encoding):
    """In what the pipeline itself gives its transformer, with encoders that mix no tokens."""
    pipeline = built_or_skip(encoding.build)
    prompts = PROMPTS[:1] if encoding.alone else PROMPTS
    for b, prompt in enumerate(prompts):
        for word in (word for word in WORDS if word in prompt):
            others = [*prompts[:b], prompt.replace(word, WORDS[word]), *prompts[b + 1 :]]
            marks = [[word] if i == b else [] for i in range(len(prompts))]
            (one,) = said(pipeline, prompts, concepts=marks, call=encoding.call)[b]
            before, after = (embeddings(encoding, pipeline, texts, encoding.call)[b] for texts in (prompts, others))
            changed = (before != after).any(-1).nonzero().flatten().tolist()
            assert changed == [row for part in one.tokens for row, _ in part]
            for part in one.tokens:
                assert squeezed(word) in squeezed("".join(text for _, text in part))
            assert len(one.tokens) == (2 if encoding.build is sd3 else 1)


def rows(pipeline, prompt, word, **options):
    """(row, text) of the tokens that say a word, of the only encoder."""
    (one,) = said(pipeline, [prompt], concepts=[[word]], **options)[0]
    return list(one.tokens[0]) if one.tokens else []


def test_a_prompt_of_words_that_the_template_has():
    """The rows are the prompt's, not those of the template before it."""
    pipeline = qwen_image()
    for prompt in ("the objects", "user", "system", "a"):
        found = rows(pipeline, prompt, prompt)
        assert "".join(text for _, text in found) == prompt and found[0][0] == rows(pipeline, "red bench", "red")[0][0]


def test_prompts_of_the_same_tokens_keep_their_own_letters():
    pipeline = flux()
    prompts = ["a red bench", "a  red   bench", " a red bench"]
    found = said(pipeline, prompts, concepts=[["red"], ["red"], ["red"]])
    assert [[text.strip() for _, text in row[0].tokens[0]] for row in found] == [["red"]] * 3


@pytest.mark.parametrize(
    ("prompt", "word", "said_so"),
    [
        ("  a   red\tbench  ", "red\tbench", "red bench"),  # cleaned of spaces
        ("a &quot;blue door&quot; and a red bench", "red bench", "red bench"),  # and of entities
        ("a red bench &amp; a red bench", (20, 29), "red bench"),
    ],
)
def test_prompts_that_the_pipeline_cleans(prompt, word, said_so):
    found = rows(wan(), prompt, word)
    assert "".join(text for _, text in found).strip() == said_so
    if isinstance(word, tuple):
        assert found[0][0] > rows(wan(), prompt, "red bench")[-1][0]


def test_what_cleaning_makes_ambiguous_is_not_said():
    """The entity becomes the word's own letters: there is then one more of them than in the prompt."""
    pipeline = wan()
    assert rows(pipeline, "a red b&#101;nch, a red bench", "red bench") == []
    with pytest.warns(UserWarning, match=r"concepts: some have no text token of WanPipeline"):
        concept_tokens(pipeline, ["a red b&#101;nch, a red bench"], concepts=[["red bench"]])


def test_a_prompt_that_is_cut_is_told():
    pipeline = flux()
    long = "a red bench, " * 12 + "a blue door"
    with pytest.warns(UserWarning, match=r"some have no text token of FluxPipeline .*is cut\. `star check` and star"):
        tokens = concept_tokens(pipeline, [long, "a red bench"], max_sequence_length=32)
    assert tokens.weight[0].sum(-1).tolist()[-1] == 0 and tokens.weight[1, 0].sum() == 1
    first, *_, last = said(pipeline, [long], max_sequence_length=32)[0]
    assert first.tokens and first.cut and last.cut and last.tokens == () and last.concept.text == "blue door"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        concept_tokens(pipeline, [long])
    rest = "a red bench, " + "very " * 40
    with pytest.warns(UserWarning, match="prompts: some are longer than FluxPipeline reads, and their ends are cut"):
        concept_tokens(pipeline, [rest, "a red bench"], concepts=[["red bench"], None], max_sequence_length=32)


def test_edits_of_images_of_different_sizes():
    """Each prompt is encoded alone with its own image."""
    encoding = ENCODINGS["qwen_image_edit"]
    pipeline, prompts = built_or_skip(encoding.build), PROMPTS[:2]
    call = [dict(image=picture((64, 64))), dict(image=picture((64, 128)))]
    tokens = concept_tokens(pipeline, prompts, concepts=[["red bench"]] * 2, call=call)
    alone = [
        concept_tokens(pipeline, [p], concepts=[["red bench"]], call=one) for p, one in zip(prompts, call, strict=True)
    ]
    assert torch.equal(tokens.index, torch.cat([one.index for one in alone]))
    with pytest.raises(ValueError, match=r"call: got 2 mappings, expected one for each of 1 prompts"):
        concept_tokens(pipeline, prompts[:1], call=call)
    with pytest.raises(ValueError, match=r"pipeline: QwenImageEditPipeline cannot encode .* such as image, in call="):
        concept_tokens(pipeline, prompts)


@pytest.mark.parametrize("name", ["hunyuan_video15", "sd3", "ltx2"])
def test_encoders_in_half_precision_or_none_at_all(name):
    """The numbers of tokens are not rounded: beyond 256 bfloat16 would."""
    encoding = ENCODINGS[name]
    pipeline, half, none = (built_or_skip(encoding.build) for _ in range(3))
    for part in half.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(torch.bfloat16)
    for attribute in [name for name in vars(none) if name.startswith("text_encoder")]:
        setattr(none, attribute, None)
    expected = concept_tokens(pipeline, PROMPTS)
    for other in (half, none):
        assert torch.equal(concept_tokens(other, PROMPTS).index, expected.index)


def test_the_pipeline_is_left_as_it_was():
    encoding = ENCODINGS["sana"]
    pipeline = built_or_skip(encoding.build)
    before, side = dict(vars(pipeline)), pipeline.tokenizer.padding_side
    concept_tokens(pipeline, PROMPTS)
    assert vars(pipeline) == before and pipeline.tokenizer.padding_side == side == "left"


class Mixing(diffusers.FluxPipeline):
    """Its embeddings are the mean of an encoder's and of what it was before."""

    def encode_prompt(self, *args, **options):
        embeds, *others = super().encode_prompt(*args, **options)
        return (0.5 * (embeds + embeds.roll(1, 1)), *others)


class Rounding(diffusers.FluxPipeline):
    def encode_prompt(self, *args, **options):
        embeds, *others = super().encode_prompt(*args, **options)
        return (embeds.bfloat16(), *others)


class Translating(diffusers.FluxPipeline):
    """It reads something else than the prompt."""

    def encode_prompt(self, prompt, *args, **options):
        return super().encode_prompt([text.replace("red", "rouge") for text in prompt], *args, **options)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Mixing, "pipeline: Mixing encodes a text that its tokenizers did not make"),
        (Rounding, "pipeline: Rounding rounds its embeddings to torch.bfloat16"),
    ],
)
def test_embeddings_that_cannot_be_followed_are_refused(kind, words):
    with pytest.raises(ValueError, match=words):
        concept_tokens(flux(kind), PROMPTS)


def test_a_word_that_the_pipeline_replaces_is_not_said():
    assert rows(flux(Translating), "a red bench", "red") == []
    assert rows(flux(Translating), "a red bench", "bench") != []


def test_slow_tokenizers_and_other_pipelines_are_refused():
    pipeline = flux()
    pipeline.tokenizer_2 = transformers.ByT5Tokenizer()
    with pytest.raises(TypeError, match="pipeline: a tokenizer of FluxPipeline gives no offsets, expected a fast"):
        concept_tokens(pipeline, PROMPTS)
    with pytest.raises(TypeError, match="prompts: got a str"):
        concept_tokens(pipeline, PROMPTS[0])
    assert concept_tokens(flux(), []).index.shape == (0, 1, 1)


def test_connectors_of_ltx_2_and_2_3_leave_tokens_in_the_same_rows():
    newer, older = built_or_skip(ENCODINGS["ltx2"].build), built_or_skip(ENCODINGS["ltx2"].build)
    older.connectors = ltx2_connectors(per_modality_projections=False)
    plain = built_or_skip(ENCODINGS["ltx2"].build)
    plain.connectors = ltx2_connectors(video_connector_num_learnable_registers=None)
    expected = concept_tokens(newer, PROMPTS)
    assert torch.equal(concept_tokens(older, PROMPTS).index, expected.index)
    behind = concept_tokens(plain, PROMPTS)  # without registers the padding stays in front
    assert (behind.index >= expected.index).all() and behind.index.max() > expected.index.max()


def test_a_prompt_in_chinese():
    """A letter of several bytes may be several tokens, which all say it."""
    pipeline, prompt = qwen_image(), "一张红色的长椅的照片"
    found = rows(pipeline, prompt, "红色的长椅")
    assert {text for _, text in found} == set("红色的长椅") and len(found) > 5
    ids = pipeline.tokenizer("红色的长椅").input_ids
    assert len(ids) == len(found)


# --- brackets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "text", "words"),
    [
        ("a [red bench] left of [two cats]", "a red bench left of two cats", ["red bench", "two cats"]),
        (r"a [sign] of \[x\] and \\", r"a sign of [x] and \\", ["sign"]),
        (r"[a \[b\] c]", "a [b] c", ["a [b] c"]),
        ("[ red  bench ]s", " red  bench s", ["red  bench"]),
        ("一张[红色的长椅]的照片", "一张红色的长椅的照片", ["红色的长椅"]),
        ("a red bench", "a red bench", None),
        ("", "", None),
    ],
)
def test_brackets(prompt, text, words):
    (plain,), (concepts,) = unbracket([prompt])
    assert plain == text and (concepts and [concept.text for concept in concepts]) == words
    assert all(plain[c.start : c.end] == c.text for c in concepts or [])


@pytest.mark.parametrize(
    ("prompt", "what"),
    [
        ("a [red [bench]]", "a '\\[' within brackets at character 7"),
        ("a red] bench", "a ']' that closes nothing at character 5"),
        ("a [red bench", "a '\\[' that nothing closes at character 2"),
        ("a [ ] bench", "brackets around nothing at character 4"),
    ],
)
def test_brackets_that_do_not_pair_are_refused(prompt, what):
    with pytest.raises(ValueError, match=rf"prompts: .* has {what}; write \\\[ and \\\] for brackets of the text"):
        unbracket([prompt])


def test_tokens_of_bracketed_prompts():
    """Those of the text without brackets; a prompt without any has what is found in it."""
    pipeline = flux2()
    bracketed = ["a red [bench left] of two green cats", "a blue door"]
    plain, _ = unbracket(bracketed)
    expected = concept_tokens(pipeline, plain, concepts=[["bench left"], ["blue door"]])
    found = concept_tokens(pipeline, bracketed, brackets=True)
    assert torch.equal(found.index, expected.index) and torch.equal(found.weight, expected.weight)
    with pytest.raises(ValueError, match="brackets: got True together with concepts; leave one of them out"):
        concept_tokens(pipeline, bracketed, concepts=[["red"], ["blue"]], brackets=True)


def test_concepts_and_brackets_of_allocated_and_record():
    pipeline, marked = flux(), ["a red [bench]", "[two green] cats"]
    pipeline.set_progress_bar_config(disable=True)
    texts, concepts = unbracket(marked)
    tokens = concept_tokens(pipeline, texts, concepts=concepts)
    ways = [(tokens, {}), (marked, {"brackets": True}), (texts, {"concepts": [["bench"], ["two green"]]})]
    found = []
    for prompts, options in ways:
        of = None if prompts is tokens else pipeline
        noise = torch.Generator().manual_seed(0)
        with record(pipeline.transformer, prompts, of, **options) as kept:
            pipeline(texts, num_inference_steps=2, height=32, width=48, output_type="latent", generator=noise)
        with allocated(pipeline.transformer, prompts, of, **options) as maps:
            noise = torch.Generator().manual_seed(0)
            pipeline(texts, num_inference_steps=2, height=32, width=48, output_type="latent", generator=noise)
        found.append((kept.maps[-1], maps.read()))
    for kept, read in found:
        assert torch.equal(kept, found[0][0]) and torch.equal(read, found[0][0])
    with (
        pytest.raises(ValueError, match="concepts, brackets: got them together with ConceptTokens"),
        allocated(pipeline.transformer, tokens, brackets=True),
    ):
        pass
