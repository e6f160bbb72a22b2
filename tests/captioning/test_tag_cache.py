"""Probabilities are cached: other settings cost no inference, and nothing stale or damaged is used."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from color_profiles import ADOBE_RGB, gamma_curve, rgb_profile

from captioning.captions import GENERAL
from captioning.config import CaptionSettings
from captioning.tag_cache import bf16_effect, find_cache, open_cache
from captioning.tag_selection import TagSelector
from captioning.wd14 import Tagger, predict, preprocess
from common.files import sha256_of
from common.images import BrokenImageError
from demo import tiny_tagger


@pytest.fixture
def images(stage, photographs):
    """The stage with a data set of twelve images, all different."""
    small = [image.resize((300, 200)) for image in photographs.values()]
    for number in range(12):
        small[number % 4].rotate(number).save(stage.images / f"{number:02}.png", compress_level=0)
    return stage


@pytest.fixture
def captioned(images, tiny, tmp_path):
    """The same data set with captions, after which the model was deleted."""
    images.variables["CAPTION_MODEL"] = str(shutil.copytree(tiny, tmp_path / "wd-vit-tagger-v3"))
    assert images.run().returncode == 0
    shutil.rmtree(tmp_path / "wd-vit-tagger-v3")
    return images


def tags_of(stage) -> dict[str, list[str]]:
    return {name: text.strip().split(", ")[1:] for name, text in stage.captions().items()}


def test_images_with_other_pixels_than_in_version_1_0_are_tagged_again_and_no_others(stage, photographs):
    """Version 1.0 ignored color profiles, and named the probabilities after the file's hash alone."""
    photographs["coffee"].save(stage.images / "plain.png")
    photographs["chelsea"].save(stage.images / "wide.png", icc_profile=rgb_profile(ADOBE_RGB, gamma_curve(2.2)))
    plain, wide = (sha256_of(stage.images / f"{name}.png") for name in ("plain", "wide"))
    assert "tagging 2 images" in stage.run().stdout
    assert {path.stem for path in stage.stored()} == {plain, f"{wide}-2"}
    captions = stage.captions()
    for path in stage.stored():
        path.rename(path.with_name(path.name.replace("-2", "")))
    assert "tagging 1 images on the CPU, 2 at a time, 1 more are in the cache" in stage.run().stdout
    assert {path.stem for path in stage.stored()} == {plain, wide, f"{wide}-2"}
    assert stage.captions() == captions


def test_other_thresholds_and_selections_cost_no_inference(captioned):
    usual = tags_of(captioned)
    assert captioned.run(CAPTION_THRESHOLD=0.6).returncode == 0
    fewer = tags_of(captioned)
    assert all(set(fewer[name]) <= set(usual[name]) for name in usual)
    assert fewer != usual
    ended = captioned.run(CAPTION_THRESHOLD="auto")
    assert "caption_threshold: 0.2614 (auto: published for " in ended.stdout
    assert sum(map(len, tags_of(captioned).values())) > sum(map(len, usual.values()))
    assert captioned.run(CAPTION_THRESHOLD="mcut", CAPTION_MAX_TAGS=3, CAPTION_APPEND="photo").returncode == 0
    assert all(len(tags) <= 4 and tags[-1] == "photo" for tags in tags_of(captioned).values())
    assert "12 captioned" in captioned.run().stdout
    assert tags_of(captioned) == usual


def test_every_setting_of_the_selection_reaches_the_captions(captioned):
    variables = {"CAPTION_REPLACE_TAGS": "still_life=a still life, smile=a smile", "CAPTION_ALWAYS_FIRST": "a smile"}
    variables |= {"CAPTION_EXCLUDE_TAGS": "*background, nonsense", "CAPTION_RATING_TAGS": "1"}
    ended = captioned.run(**variables)
    assert "tags in the settings that this model does not have: nonsense" in ended.stdout
    for tags in tags_of(captioned).values():
        assert not [tag for tag in tags if tag.endswith("background") or tag in ("smile", "still life")]
        assert tags[-1] in tiny_tagger.RATINGS
        assert "a smile" not in tags[1:]


def test_traits_are_pruned_for_the_whole_data_set_and_recorded(captioned):
    usual = tags_of(captioned)
    shares = {tag: sum(tag in tags for tags in usual.values()) / 12 for tags in usual.values() for tag in tags}
    traits = {
        tag: share for tag, share in shares.items() if tag in ("1girl", "long hair", "freckles") or tag.endswith((" eyes", " hair"))
    }
    min_share = sorted(traits.values())[len(traits) // 2]
    ended = captioned.run(CAPTION_PRUNE_TRAITS=min_share)
    pruned = {tag for tag, share in traits.items() if share >= min_share}
    assert pruned
    for name, tags in tags_of(captioned).items():
        assert tags == [tag for tag in usual[name] if tag not in pruned]
    record = json.loads((captioned.record.parent / "traits.json").read_text())
    assert set(record["pruned"]) == pruned
    assert set(record["kept"]) == set(traits) - pruned
    assert record["pictures"] == 12
    assert all(f"{tag} {traits[tag]:.0%}" in ended.stdout for tag in pruned)
    captioned.run()
    assert tags_of(captioned) == usual


def test_a_data_set_that_an_earlier_version_captioned_keeps_its_traits(captioned):
    usual, record = tags_of(captioned), captioned.record.parent / "traits.json"
    record.write_text(json.dumps({"pictures": 12, "caption_prune_traits": 0.0, "pruned": {}, "kept": {}}))
    for _ in range(2):
        captioned.run(CAPTION_PRUNE_TRAITS="auto", CAPTION_THRESHOLD=0.01)
        assert json.loads(record.read_text())["pruned"] == {}
    assert any("1girl" in tags for tags in usual.values())
    record.unlink()
    captioned.run(CAPTION_PRUNE_TRAITS="auto", CAPTION_THRESHOLD=0.01)
    found = json.loads(record.read_text())
    assert found["setting"] == "auto"
    assert found["pruned"]
    assert not found["pruned"].keys() & {"1girl", "1boy"}
    pruned = set(found["pruned"])
    assert all(pruned.isdisjoint(tags) for tags in tags_of(captioned).values())


def test_traits_worth_pruning_are_suggested(captioned):
    assert "CAPTION_PRUNE_TRAITS=0.8" not in captioned.run(CAPTION_THRESHOLD=0.9).stdout
    suggested = captioned.run(CAPTION_THRESHOLD=0.01).stdout
    assert "traits in at least 80% of the images: " in suggested
    assert "CAPTION_PRUNE_TRAITS=0.8 to leave them out" in suggested


def test_captions_that_the_user_wrote_are_not_counted_and_not_changed(captioned):
    (captioned.images / "00.txt").write_text("my words")
    captioned.run(CAPTION_THRESHOLD=0.6)
    assert captioned.captions()["00.txt"] == "nyafyi_woman, my words"
    assert json.loads((captioned.record.parent / "traits.json").read_text())["pictures"] == 11


def test_unknown_threshold_is_refused_before_anything_is_written(images):
    ended = images.run(CAPTION_THRESHOLD="auto", CAPTION_MODEL="someone/some-tagger")
    assert ended.returncode == 2
    assert "none is known for someone/some-tagger" in ended.stderr
    assert not images.record.parent.exists()
    assert images.run("--settings", CAPTION_THRESHOLD="auto", CAPTION_MODEL="someone/some-tagger").returncode == 2


def test_malformed_replacement_is_refused(images):
    ended = images.run(CAPTION_REPLACE_TAGS="a=b, c, =d")
    assert ended.returncode == 2
    assert "caption_replace_tags: 'c' must be old=new" in ended.stderr
    assert "'=d'" in ended.stderr


def test_cuda_that_is_not_installed_is_refused(images):
    ended = images.run(CAPTION_PROVIDER="cuda")
    assert ended.returncode == 2
    assert "caption_provider: cuda needs the package onnxruntime-gpu" in ended.stderr
    assert "on the CPU" in images.run(CAPTION_PROVIDER="auto").stdout


def test_another_image_of_the_same_name_and_a_damaged_cache_are_tagged_again(images, photographs):
    images.run()
    before = images.captions()
    old = sha256_of(images.images / "00.png")
    photographs["rocket"].save(images.images / "00.png")
    damaged = images.stored()[:3]
    damaged[0].write_bytes(damaged[0].read_bytes()[:100])
    damaged[1].write_bytes(b"")
    np.save(damaged[2], np.zeros(3, np.float32))
    ended = images.run()
    tagged = len({damaged_one.stem for damaged_one in damaged} - {old}) + 1
    assert f"tagging {tagged} images" in ended.stdout
    after = images.captions()
    assert after["00.txt"] != before["00.txt"]
    assert {name: text for name, text in after.items() if name != "00.txt"} == {
        name: text for name, text in before.items() if name != "00.txt"
    }


def test_another_model_has_its_own_cache_and_the_first_one_is_kept(images, tmp_path):
    images.run()
    first = images.captions()
    other = tiny_tagger.build(tmp_path / "other", seed=7)
    assert "tagging 12 images" in images.run(CAPTION_MODEL=other).stdout
    assert images.captions() != first
    assert "tagging" not in images.run().stdout
    assert images.captions() == first


def test_a_model_is_identified_by_its_content_not_its_path(tmp_path, tiny):
    root = tmp_path / "tags"
    first = Path(shutil.copytree(tiny, tmp_path / "a"))
    cache = open_cache(root, "a", first, bf16=False)
    cache.write("ab", np.arange(len(cache.tags), dtype=np.float32))
    moved = first.rename(tmp_path / "b")
    again = open_cache(root, "b", moved, bf16=False)
    assert (again.read("ab") == cache.read("ab")).all()
    assert open_cache(root, "b", moved, bf16=True).read("ab") is None
    assert open_cache(root, "c", tiny_tagger.build(tmp_path / "c", seed=3), bf16=False).read("ab") is None
    assert find_cache(root, "b", bf16=False).read("ab") is not None
    assert find_cache(root, "unknown", bf16=False) is None
    assert cache.read("cd") is None


def test_no_damage_to_cached_probabilities_ends_in_an_error(tmp_path, tiny):
    cache = open_cache(tmp_path, "a", tiny, bf16=False)
    cache.write("ab", np.zeros(len(cache.tags), np.float32))
    (stored,) = tmp_path.glob("*/ab.npy")
    whole = stored.read_bytes()
    in_archive = io.BytesIO()
    np.savez(in_archive, np.zeros(3))
    flipped = [whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :] for at in range(128) for bit in range(8)]
    read = []
    for damaged in (b"PK\3\4" + whole[4:], in_archive.getvalue(), b"\x93NUMPY\1\0", *flipped):
        stored.write_bytes(damaged)
        read.append(cache.read("ab"))
    assert read[:3] == [None] * 3
    assert sum(probabilities is None for probabilities in read) > 1000


@pytest.mark.parametrize("damage", [slice(20), None])
def test_damaged_description_of_a_model_is_written_again(tmp_path, tiny, damage):
    root = tmp_path / "tags"
    cache = open_cache(root, "a", tiny, bf16=False)
    cache.write("ab", np.zeros(len(cache.tags), np.float32))
    (note,) = root.glob("*/model.json")
    note.write_bytes(note.read_bytes()[damage] if damage else b"[" * 5000)
    assert find_cache(root, "a", bf16=False) is None
    assert open_cache(root, "a", tiny, bf16=False).read("ab") is not None


@pytest.mark.parametrize("damage", ["cut off", "edited", "empty", "gone"])
def test_a_cache_whose_list_of_tags_was_changed_is_written_again(images, tiny, damage):
    images.run()
    before = images.captions()
    (tags,) = images.record.parent.glob("tags/*/selected_tags.csv")
    whole = tags.read_text()
    changed = {"cut off": "".join(whole.splitlines(keepends=True)[:9]), "edited": whole.replace("hair", "hare"), "empty": ""}
    tags.unlink() if damage == "gone" else tags.write_text(changed[damage])
    assert find_cache(images.record.parent / "tags", str(tiny), bf16=False) is None
    ended = images.run()
    assert (ended.returncode, "tagging" in ended.stdout) == (0, False)
    assert (images.captions(), tags.read_text()) == (before, whole)


def test_a_cache_of_an_earlier_version_serves_without_its_model_and_is_written_again_with_it(tmp_path, tiny):
    root = tmp_path / "tags"
    cache = open_cache(root, "a", tiny, bf16=False)
    cache.write("ab", np.zeros(len(cache.tags), np.float32))
    (note,) = root.glob("*/model.json")
    about = json.loads(note.read_bytes())
    note.write_text(json.dumps({key: value for key, value in about.items() if key != "tags_sha256"}))
    assert find_cache(root, "a", bf16=False).read("ab") is not None
    (note.parent / "selected_tags.csv").write_text("name,category\nsmile,0\n")
    assert open_cache(root, "a", tiny, bf16=False).read("ab") is not None
    assert json.loads(note.read_bytes()) == about


def test_batches_are_full_whatever_is_broken_and_every_image_has_its_own_tags(tmp_path, photographs, tiny, monkeypatch):
    tagger = Tagger(tiny / "model.onnx", tiny / "selected_tags.csv", batch_size=3)
    paths = []
    for number, name in enumerate(["coffee", "", "chelsea", "", "", "rocket", "astronaut", "coffee", "", "rocket", "chelsea"]):
        paths.append(tmp_path / f"{number}.png")
        if name:
            photographs[name].rotate(number).save(paths[-1])
        else:
            paths[-1].write_bytes(b"broken")
    batches = []
    run = tagger.probabilities
    monkeypatch.setattr(tagger, "probabilities", lambda prepared: batches.append(len(prepared)) or run(prepared))
    results = dict(predict(paths, tagger, workers=2))
    assert batches == [3, 3, 1]
    assert set(results) == set(paths)
    for path in paths:
        if path.read_bytes() == b"broken":
            assert isinstance(results[path], BrokenImageError)
    expected = run([preprocess(photographs["rocket"].rotate(5), tagger.side_px)])[0]
    assert (results[paths[5]] == expected).all()


def test_effect_of_bfloat16_is_reported_in_tags(tiny):
    tagger = Tagger(tiny / "model.onnx", tiny / "selected_tags.csv", batch_size=1)
    general = [index for index, tag in enumerate(tagger.tags) if tag.category == GENERAL]
    exact = np.zeros((2, len(tagger.tags)), np.float32)
    exact[0, general[:4]] = 0.4, 0.36, 0.34, 0.9
    rounded = exact.copy()
    rounded[0, general[1:3]] = 0.345, 0.352
    selector = TagSelector(tagger.tags, CaptionSettings())
    assert bf16_effect(exact, rounded, selector) == (
        "bfloat16 changes 2 of 3 tags in the first 2 images (probabilities change by at most 0.0150)"
    )


def test_bf16_is_a_model_of_its_own_on_arm_and_nothing_elsewhere(images, monkeypatch):
    images.run()
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert "tagging" not in images.run(CAPTION_BF16=1).stdout
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    output = images.run(CAPTION_BF16=1).stdout
    assert "bfloat16 changes 0 of " in output
    assert "tagging 12 images" in output


def test_cache_holds_exactly_what_the_model_computed(images, tiny, photographs):
    images.run()
    cache = find_cache(images.record.parent / "tags", str(tiny), bf16=False)
    tagger = Tagger(tiny / "model.onnx", tiny / "selected_tags.csv", batch_size=8)
    expected = tagger.probabilities([preprocess(photographs["astronaut"].resize((300, 200)), 448)])[0]
    assert (cache.read(sha256_of(images.images / "00.png")) == expected).all()
    assert [tag.name for tag in cache.tags] == [tag.name for tag in tagger.tags]


def test_a_flipped_bit_is_found_and_the_image_tagged_again(captioned, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "wd-vit-tagger-v3")
    before = {path: path.read_bytes() for path in captioned.stored()}
    damaged = captioned.stored()[:2]
    for path, position in zip(damaged, (-10, -2), strict=True):  # in the array, in its checksum
        content = bytearray(before[path])
        content[position] ^= 0x40
        path.write_bytes(content)
    assert "tagging 2 images " in captioned.run().stdout
    assert {path: path.read_bytes() for path in captioned.stored()} == before


def test_probabilities_of_the_first_version_have_no_checksum_and_are_used(captioned):
    for path in captioned.stored():
        np.save(path, np.load(path))
    assert "nothing to do: all 12 captions are up to date" in captioned.run().stdout
