"""Captions, their variants, chunks of tokens, and embeddings."""

import time

import pytest
import torch

from training.data.captions import (
    caption_variants,
    chunks_needed,
    encode_captions,
    split_into_chunks,
    text_beyond,
    token_ids,
)
from training.models.base_model import find_base
from training.models.weights import load_text_encoders, load_tokenizers

CAPTION = "nyafyi_woman, 1girl, smile, long hair, outdoors"


@pytest.fixture(scope="module")
def base(tiny_sdxl):
    return find_base(str(tiny_sdxl), tiny_sdxl)


@pytest.fixture(scope="module")
def tokenizers(base, tiny_sdxl):
    return load_tokenizers(base, tiny_sdxl)


@pytest.fixture(scope="module")
def encoders(base):
    return load_text_encoders(base, torch.device("cpu"), torch.float32)


def test_first_variant_is_the_caption_and_the_others_shuffle_what_follows_the_trigger():
    variants = caption_variants(CAPTION, "nyafyi_woman", 8, True, 0)
    assert variants[0] == CAPTION
    assert len(set(variants)) == len(variants) == 8
    for variant in variants:
        tags = variant.split(", ")
        assert tags[0] == "nyafyi_woman"
        assert sorted(tags) == sorted(CAPTION.split(", "))


def test_trigger_that_is_not_first_is_shuffled_like_any_tag():
    variants = caption_variants("smile, nyafyi_woman, 1girl", "nyafyi_woman", 6, True, 0)
    assert len(variants) == 6
    assert {variant.split(", ")[0] for variant in variants} == {"smile", "nyafyi_woman", "1girl"}


def test_variants_depend_on_the_seed_and_the_caption_only():
    assert caption_variants(CAPTION, "nyafyi_woman", 4, True, 3) == [
        "nyafyi_woman, 1girl, smile, long hair, outdoors",
        "nyafyi_woman, outdoors, 1girl, smile, long hair",
        "nyafyi_woman, 1girl, long hair, smile, outdoors",
        "nyafyi_woman, outdoors, smile, 1girl, long hair",
    ]
    assert caption_variants(CAPTION, "nyafyi_woman", 8, True, 3) != caption_variants(CAPTION, "nyafyi_woman", 8, True, 4)
    assert caption_variants(CAPTION, "nyafyi_woman", 8, True, 3)[:4] == caption_variants(CAPTION, "nyafyi_woman", 4, True, 3)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("nyafyi_woman", 1),
        ("nyafyi_woman, smile", 1),
        ("nyafyi_woman, smile, 1girl", 2),
        ("nyafyi_woman, smile, smile, 1girl", 3),
        ("", 1),
        (", ,", 1),
    ],
)
def test_there_are_no_more_variants_than_orders(caption, expected):
    variants = caption_variants(caption, "nyafyi_woman", 8, True, 0)
    assert variants[0] == caption
    assert len(set(variants)) == len(variants) == expected


@pytest.mark.parametrize(
    "caption",
    [
        "nyafyi_woman, a woman in a red dress walks along the beach, the sun sets",
        "A photo of nyafyi_woman. She smiles, her hair is long, it rains.",
        "nyafyi_woman, smile, looks at you!",
    ],
)
def test_sentences_keep_their_order(caption):
    assert caption_variants(caption, "nyafyi_woman", 8, True, 0) == [caption]


def test_without_shuffle_there_is_one_variant():
    assert caption_variants(CAPTION, "nyafyi_woman", 8, False, 0) == [CAPTION]


def test_tags_that_look_like_punctuation_are_tags():
    assert len(caption_variants("nyafyi_woman, :d, ^_^, !?, ...", "nyafyi_woman", 8, True, 0)) == 8


def test_chunks_are_filled_to_75_tokens_and_padded_as_each_encoder_requires(tokenizers):
    first, second = tokenizers
    start, end = first.bos_token_id, first.eos_token_id
    tokens = token_ids("a" * 80, first)
    assert len(tokens) == 80
    chunks = split_into_chunks(tokens, first, 3)
    assert chunks.shape == (3, 77)
    assert chunks[0].tolist() == [start, *tokens[:75], end]
    assert chunks[1].tolist() == [start, *tokens[75:], end] + [end] * 70
    assert chunks[2].tolist() == [start, end] + [end] * 75
    assert split_into_chunks(tokens, second, 3)[2].tolist() == [start, end] + [0] * 75


@pytest.mark.parametrize(("tokens", "chunks"), [(0, 1), (1, 1), (75, 1), (76, 2), (150, 2), (151, 3), (999, 3)])
def test_as_many_chunks_as_the_longest_caption_needs(tokens, chunks, tokenizers):
    assert chunks_needed(["a", "a" * tokens], tokenizers, at_most=3) == chunks


def test_the_text_that_is_cut_is_reported(tokenizers):
    assert text_beyond(1, "a" * 75, tokenizers) == ""
    assert text_beyond(2, "smile, " * 75, tokenizers) == ""
    assert text_beyond(1, "smile, " * 38, tokenizers) == ","


def test_several_captions_share_the_variants_and_are_equally_likely():
    caption = f"{CAPTION}\nnyafyi_woman smiles at the camera, which is far away.\nnyafyi_woman, hat"
    variants = caption_variants(caption, "nyafyi_woman", 8, True, 0)
    first, prose, last = caption.split("\n")
    assert variants[:3] == [first, prose, last]
    assert len(variants) == 6  # two orders of the tags of the first; the others have one
    assert variants[4:] == [prose, last]
    assert variants[3] == caption_variants(first, "nyafyi_woman", 2, True, 0)[1]
    assert caption_variants(caption, "nyafyi_woman", 1, True, 0) == [first, prose, last]


def test_a_caption_without_a_trigger_word_is_shuffled_as_a_whole():
    firsts = {variant.split(", ")[0] for variant in caption_variants("woman, park, sun", "", 6, True, 0)}
    assert firsts == {"woman", "park", "sun"}


def test_brackets_are_plain_text_and_may_be_escaped(tokenizers):
    tokenizer = tokenizers[0]
    plain = token_ids("saber (fate)", tokenizer)
    assert token_ids(r"saber \(fate\)", tokenizer) == plain
    assert tokenizer.decode(token_ids("(smile:1.2)", tokenizer)).replace(" ", "") == "(smile:1.2)"


@pytest.mark.parametrize("caption", [CAPTION, "", "A photo (detailed:1.3), année 日本語"])
def test_one_chunk_is_what_diffusers_encodes(caption, tokenizers, encoders):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline  # takes seconds, which no other test here needs

    pipeline = StableDiffusionXLPipeline(
        vae=None,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=None,
        scheduler=EulerDiscreteScheduler(),
    )
    theirs, _, their_pooled, _ = pipeline.encode_prompt(caption, device="cpu", do_classifier_free_guidance=False)
    hidden, pooled = encode_captions([caption], tokenizers, encoders, 1)
    assert hidden.dtype == pooled.dtype == torch.float32
    assert torch.equal(hidden, theirs)
    assert torch.equal(pooled, their_pooled)


def test_long_caption_is_its_chunks_one_after_another(tokenizers, encoders):
    hidden, pooled = encode_captions(["smile " * 80], tokenizers, encoders, 3)
    assert hidden.shape == (1, 3 * 77, 96)
    texts = ("smile " * 75, "smile " * 5, "")
    pieces, pieces_pooled = zip(*(encode_captions([text], tokenizers, encoders, 1) for text in texts), strict=True)
    torch.testing.assert_close(hidden, torch.cat(pieces, dim=1), rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled, pieces_pooled[0], rtol=0, atol=1e-5)


def test_embedding_does_not_depend_on_what_is_encoded_with_it(tokenizers, encoders):
    texts = [CAPTION, "", "smile, " * 60]
    together, together_pooled = encode_captions(texts, tokenizers, encoders, 2)
    for position, text in enumerate(texts):
        alone, alone_pooled = encode_captions([text], tokenizers, encoders, 2)
        torch.testing.assert_close(alone[0], together[position], rtol=1e-4, atol=1e-5)  # the size of a batch moves roundings
        torch.testing.assert_close(alone_pooled[0], together_pooled[position], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", ["Nyafyi_Woman", "NYAFYI_WOMAN", "nyafyi woman", "(nyafyi_woman:1.1)", "Nyafyi_woman smiling"])
def test_a_trigger_that_leads_in_any_spelling_stays_in_front(first):
    variants = caption_variants(f"{first}, 1girl, smile, long hair, outdoors", "nyafyi_woman", 8, True, 0)
    assert len(variants) == 8
    assert {variant.split(", ")[0] for variant in variants} == {first}


@pytest.mark.parametrize(
    ("caption", "variants"),
    [
        (", ".join(f"t{number}" for number in range(9000)), 8),
        ("a," * 16000 + "b," * 16000, 8),
        ("a," * 32000, 1),
    ],
)
def test_shuffling_the_longest_caption_takes_no_time(caption, variants):
    started = time.process_time()
    assert len(caption_variants(caption, "sks", 8, True, 0)) == variants
    assert time.process_time() - started < 5
