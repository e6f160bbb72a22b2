"""The pre-training on drawn people: captions as tokens, the reader's accuracy, and the model that its stages leave."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.world.beginnings import average_words, initialise, pass_colours, pass_noise, shallow
from benchmarks.world.dataset import CaptionTokens
from benchmarks.world.learning import Rates
from benchmarks.world.people import ALL_TAGS, GROUPS, TRAITS, random_identity, random_shot, tags
from benchmarks.world.pretrain import NETWORKS, TINY_WORLD, Length, continue_from, join, merges_of, pretrain, write_parts
from benchmarks.world.reader import Reader, attribute_accuracy, built, identity_error, spoiled, tag_targets, train_reader
from demo import tiny_sdxl
from training.data.captions import encode_captions
from training.models.base_model import find_base
from training.models.sdxl import WEIGHT_STEMS
from training.models.weights import load_text_encoders, load_tokenizers, load_unet, load_vae

CPU = torch.device("cpu")
SHORT = Length(images=32, reader_s=0.1, vae_s=0.1, unet_s=0.1, samples=4, steps=1)
SMALL_BATCHES = Rates(reader_batch=4, vae_batch=2, batch=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The networks of the tiny world, with random weights."""
    folder = tiny_sdxl.build(tmp_path_factory.mktemp("world"), size=TINY_WORLD.size, merges=merges_of(ALL_TAGS))
    return find_base(str(folder), folder.parent)


@pytest.fixture(scope="module")
def tokenizers(base, tmp_path_factory):
    return load_tokenizers(base, tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture
def unet(base):
    unet = load_unet(base, CPU, torch.float32)
    initialise(unet)
    return unet.requires_grad_(False)


def predicted(unet, noisy: torch.Tensor, timestep: int, seed: int = 0) -> torch.Tensor:
    """With random embeddings of a caption."""
    count, generator = len(noisy), torch.Generator().manual_seed(seed)
    added = {"text_embeds": torch.randn(count, 32, generator=generator), "time_ids": torch.full((count, 6), 64.0)}
    hidden = torch.randn(count, 77, 64, generator=generator)
    return unet(noisy, torch.full((count,), timestep), hidden, added_cond_kwargs=added, return_dict=False)[0]


@pytest.fixture(scope="module")
def captions() -> list[list[str]]:
    generator = np.random.default_rng(0)
    return [tags(random_identity(generator), random_shot(generator)) for _ in range(60)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A model whose stages were all run for a moment."""
    folder = tmp_path_factory.mktemp("trained")
    pretrain(folder, SHORT, TINY_WORLD, rates=SMALL_BATCHES)
    return folder


def test_assembled_tokens_are_those_of_the_tokenizers(tokenizers, captions):
    parts = CaptionTokens(tokenizers, captions, CPU)
    rows = torch.full((len(captions), max(map(len, captions))), -1)
    for row, caption in enumerate(captions):
        rows[row, : len(caption)] = torch.tensor([ALL_TAGS.index(tag) for tag in caption])
    texts = [", ".join(caption) for caption in captions]
    for found, tokenizer in zip(parts.assembled(rows, rows >= 0), tokenizers, strict=True):
        wanted = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        assert torch.equal(found, wanted)


def test_captions_are_shuffled_shortened_named_or_empty(tokenizers, captions):
    torch.manual_seed(0)
    parts = CaptionTokens(tokenizers, captions[:1], CPU)
    tokenizer = tokenizers[0]
    of_tags = {tuple(tokenizer(tag).input_ids[1:-1]) for tag in captions[0]}
    comma = tokenizer(",").input_ids[1]
    orders, empty, named, shortened = set(), 0, 0, 0
    for row in parts.draw(torch.zeros(400, dtype=torch.long))[0].tolist():
        words = row[1 : row.index(tokenizer.eos_token_id)]
        tags_found = [tuple(part) for part in _split(words, comma)] if words else []
        unknown = [tag for tag in tags_found if tag not in of_tags]
        assert len(unknown) <= 1
        assert not unknown or tags_found[0] == unknown[0]
        assert len(set(tags_found)) == len(tags_found)
        empty, named = empty + (not words), named + bool(unknown)
        shortened += bool(words) and len(tags_found) - len(unknown) < 0.7 * len(captions[0])
        orders.add(tuple(tags_found))
    assert 20 < empty < 80
    assert 70 < named < 150
    assert 50 < shortened < 200
    assert len(orders) > 300


def _split(words: list[int], separator: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for word in words:
        if word == separator:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def test_the_accuracy_counts_what_was_asked_for(captions):
    right = tag_targets(captions)
    assert attribute_accuracy(captions, right, complete=True)["overall"] == 1
    other = tag_targets([["1girl", "freckles", "night", "smile"]])
    found = attribute_accuracy([["1girl", "freckles", "frown", "sunset"]], other)
    assert found == {"freckles": 1, "expression": 0, "light": 0, "overall": pytest.approx(1 / 3)}
    assert math.isnan(attribute_accuracy([["solo"]], other)["overall"])


def test_the_accuracy_of_complete_tags_counts_what_they_leave_out():
    shown = tag_targets([["smile", "portrait", "night", "mole"]])
    found = attribute_accuracy([["smile", "portrait"]], shown, complete=True)
    assert {"light": 0, "mole": 0, "freckles": 1, "glasses": 1, "expression": 1}.items() <= found.items()
    assert "gaze" not in found  # hidden
    assert "mole" not in attribute_accuracy([["smile", "full body"]], shown, complete=True)  # too small there


def test_every_tag_is_in_one_group():
    members = [tag for group in GROUPS.values() for tag in group]
    assert len(members) == len(set(members)) == len(ALL_TAGS) - 2


@torch.no_grad()
def test_a_vae_that_passes_colours_keeps_them_untrained(base):
    vae = load_vae(base, CPU)
    initialise(vae)
    pass_colours(vae)
    colours = torch.rand(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = torch.nn.functional.interpolate(colours, size=64, mode="bilinear")
    latents = vae.encode(images).latent_dist.mean
    for found, wanted in (
        (latents[:, :3], torch.nn.functional.avg_pool2d(images, 8)),
        (vae.decode(latents, return_dict=False)[0], images),
    ):
        assert torch.corrcoef(torch.stack([found.flatten(), wanted.flatten()]))[0, 1] > 0.7


def test_a_unet_that_passes_noise_predicts_it_untrained(unet):
    pass_noise(unet)
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = torch.stack([predicted(unet, noise, 999).flatten(), noise.flatten()])
    assert torch.corrcoef(seen)[0, 1] > 0.9


def test_the_tiny_unet_knows_the_timestep_and_the_pooled_text(unet):
    """A norm of single channels would remove both."""
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    early = predicted(unet, noise, 50)
    for module in unet.modules():
        if hasattr(module, "transformer_blocks"):  # without cross-attention, the text is in the pooled embeddings alone
            module.forward = lambda hidden, *_, **__: (hidden,)
    assert (predicted(unet, noise, 950) - predicted(unet, noise, 50)).abs().max() > 1e-2 * early.abs().max()
    assert (predicted(unet, noise, 50, seed=1) - predicted(unet, noise, 50)).abs().max() > 1e-2 * early.abs().max()


def test_a_shallow_unet_is_the_whole_one(unet):
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    names = unet.state_dict().keys()
    with shallow(unet):
        assert len(unet.state_dict()) < len(names) / 2
        inside = predicted(unet, noise, 500)
    assert unet.state_dict().keys() == names
    assert torch.allclose(predicted(unet, noise, 500), inside, atol=1e-5)


def test_encoders_that_average_know_which_words_there_are_in_any_order(base, tokenizers):
    encoders = load_text_encoders(base, CPU, torch.float32)
    for encoder in encoders:
        initialise(encoder)
    average_words(encoders)
    texts = ["red hair, smile, field", "field, smile, red hair", "red hair, frown, field"]
    pooled = encode_captions(texts, tokenizers, encoders, chunks=1)[1]
    assert (pooled[0] - pooled[1]).norm() < 0.5 * (pooled[0] - pooled[2]).norm()


def test_a_reader_learns_the_images_it_is_shown():
    generator = np.random.default_rng(1)
    people = [random_identity(generator) for _ in range(2)]
    shots = [random_shot(generator, framing="portrait", expression=expression) for expression in ("smile", "frown")]
    images = torch.stack([torch.full((3, 32, 32), 40), torch.full((3, 32, 32), 200)]).byte()
    found = [tags(person, shot) for person, shot in zip(people, shots, strict=True)]
    reader = train_reader(images, found, people, 0, CPU, steps=150, rate=3e-3, widths=(8, 8, 16, 16))
    assert attribute_accuracy(found, reader.tags(images), complete=True)["overall"] > 0.9


def test_a_saved_reader_gives_the_same_answers(tmp_path):
    torch.manual_seed(0)
    reader = Reader(built(64, (8, 8, 16, 32)), 64, CPU, ["skin", "jaw"])
    images = torch.rand(3, 3, 64, 64)
    reader.save(tmp_path)
    loaded = Reader.load(tmp_path, CPU)
    assert loaded.readable == ("skin", "jaw")
    assert torch.allclose(reader.tags(images), loaded.tags(images), atol=1e-3)
    assert torch.allclose(reader.identity(images), loaded.identity(images), atol=1e-2)
    assert torch.allclose(loaded.tags((images * 255).round().byte()), loaded.tags(images), atol=2e-2)


def test_distances_count_the_traits_that_are_visible_and_readable():
    people = torch.zeros(2, len(TRAITS))
    read = people.clone()
    read[:, TRAITS.index("skin")], read[:, TRAITS.index("jaw")], read[:, TRAITS.index("mole")] = 3.0, 4.0, 100.0
    captions = [["portrait"], ["full body"]]  # of a full body, the jaw is too small to be seen
    assert identity_error(people, read, captions, ["skin", "jaw"]).tolist() == pytest.approx([12.5**0.5, 3.0])
    assert identity_error(people, read, captions)[0] > 20


def test_features_end_in_the_answers():
    torch.manual_seed(0)
    reader = Reader(built(64, (8, 8, 16, 32)), 64, CPU)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    *scales, answers = reader.features(images)
    assert [feature.shape[1] for feature in scales] == [8, 8, 16, 32]
    assert torch.equal(answers, reader.network(images))
    assert torch.allclose(answers[:, : len(ALL_TAGS)].sigmoid(), reader.tags(images / 2 + 0.5), atol=1e-5)


def test_spoiled_images_stay_near_the_originals():
    torch.manual_seed(0)
    images = torch.rand(16, 3, 32, 32) * 2 - 1
    spoiled_images = spoiled(images)
    assert spoiled_images.abs().max() <= 1
    assert 0.01 < (spoiled_images - images).abs().mean() < 0.4


def test_each_stage_leaves_its_figures_and_the_model_can_be_a_base_model(trained):
    figures = json.loads((trained / "world.json").read_text())
    assert figures["px"] == 64
    assert 0 <= figures["reader"]["drawings"]["accuracy"]["overall"] <= 1
    assert 0 <= figures["vae"]["reconstructions"]["accuracy"]["overall"] <= 1
    assert figures["unet"]["steps"] > 0
    assert figures["samples"]["samples"]["identity_rms"] > 0
    assert json.loads((trained / "vae" / "config.json").read_text())["scaling_factor"] == figures["vae"]["scaling"]
    assert find_base(str(trained), trained.parent).components
    assert (trained / "samples.png").is_file()


def test_parts_are_joined_to_the_same_model(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.world.pretrain.PART_BYTES", 2**20)
    write_parts(trained, tmp_path / "parts")
    parts = list((tmp_path / "parts").glob("part*.safetensors"))
    assert len(parts) > 2
    assert max(part.stat().st_size for part in parts) < 2**20 + 2**18
    join(tmp_path / "parts", tmp_path / "joined")
    for name in NETWORKS:
        file = Path(name) / f"{WEIGHT_STEMS[name]}.safetensors"
        before, after = load_file(trained / file), load_file(tmp_path / "joined" / file)
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert torch.allclose(value.float(), after[key].float(), rtol=2**-7, atol=1e-6), key
    for file in ("world.json", "vae/config.json", "reader/reader.safetensors", "tokenizer/merges.txt"):
        assert (trained / file).read_bytes() == (tmp_path / "joined" / file).read_bytes()


def test_a_stage_goes_on_from_what_is_in_the_folder(trained, tmp_path):
    continue_from(trained, tmp_path)
    file = Path("unet") / f"{WEIGHT_STEMS['unet']}.safetensors"
    figures = pretrain(tmp_path, replace(SHORT, unet_steps=3), TINY_WORLD, rates=Rates(batch=2, unet_rate=1e-9), stages=("unet",))
    assert figures["unet"]["steps"] == 3
    before, after = load_file(trained / file), load_file(tmp_path / file)
    assert all(torch.allclose(value.float(), after[key].float(), atol=1e-4) for key, value in before.items())
    assert (tmp_path / "samples.png").is_file()
