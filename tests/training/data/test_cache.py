"""Real photographs through buckets into the cache: exact pixels, and values that depend on nothing but their own key."""

import itertools
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from color_profiles import ADOBE_RGB, gamma_curve, rgb_profile
from diffusers import AutoencoderKL
from PIL import Image

from common import images
from common.errors import ResourceError
from common.images import DECODER_REVISION
from common.settings import REPOSITORY
from training.config import TrainSettings
from training.data import cache as cache_module
from training.data import cache_files
from training.data.buckets import assign_bucket
from training.data.cache import CacheBuilder, NotFiniteError, image_pixels, write_embeddings, write_latents
from training.data.cache_files import entry, is_valid_entry, read_latents, read_text
from training.data.examples import read_examples
from training.models.base_model import find_base

CPU = torch.device("cpu")


def placement_of(example):
    return assign_bucket(example.width, example.height, resolution=128, step=8, max_side=256)


@pytest.fixture
def examples(stage):
    """Four photographs of four shapes and formats: a square, a wide one, a tall one, one with transparency."""
    stage.add("astronaut", "astronaut.png", "sks, woman")
    stage.add("coffee", "coffee.webp", "sks, cup", lossless=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise: the cat is on its side in the file
    stage.add("chelsea", "chelsea.jpg", "sks, cat", exif=exif, quality=95)
    rocket = stage.photographs["rocket"].copy()
    fade = np.tile(np.linspace(0, 255, rocket.width).astype(np.uint8), (rocket.height, 1))
    rocket.putalpha(Image.fromarray(fade))
    rocket.save(stage.images / "rocket.png")
    (stage.images / "rocket.txt").write_text("sks, rocket")
    return {example.path.stem: example for example in read_examples(stage.images, workers=0, trigger="sks")[0]}


def as_image(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(((pixels.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy())


def test_pixels_are_the_image_scaled_and_cropped_to_its_bucket(stage, examples):
    expected = {
        "astronaut": stage.photographs["astronaut"].resize((128, 128), Image.Resampling.LANCZOS),
        "coffee": stage.photographs["coffee"].resize((156, 104), Image.Resampling.LANCZOS).crop((2, 0, 154, 104)),
    }
    for name, image in expected.items():
        placement = placement_of(examples[name])
        pixels = image_pixels(examples[name], placement)
        assert pixels.dtype == torch.float32
        assert pixels.shape == (3, placement.bucket.height, placement.bucket.width)
        assert (np.asarray(as_image(pixels)) == np.asarray(image)).all()
        assert pixels.min() >= -1
        assert pixels.max() <= 1


def test_orientation_is_applied_before_the_bucket_is_chosen(stage, examples):
    cat = examples["chelsea"]
    placement = placement_of(cat)
    assert (cat.width, cat.height) == (300, 451)
    assert placement.bucket.height > placement.bucket.width
    upright = Image.open(cat.path).convert("RGB").transpose(Image.Transpose.ROTATE_270)
    resized = upright.resize((placement.resized_width, placement.resized_height), Image.Resampling.LANCZOS)
    right, bottom = placement.left + placement.bucket.width, placement.top + placement.bucket.height
    image = resized.crop((placement.left, placement.top, right, bottom))
    assert (np.asarray(as_image(image_pixels(cat, placement))) == np.asarray(image)).all()


def test_images_with_other_pixels_than_in_version_1_0_have_another_key_and_no_others(stage, examples):
    """Version 1.0 ignored color profiles; the key of an image was the hash of its file."""
    stage.add("coffee", "wide.png", icc_profile=rgb_profile(ADOBE_RGB, gamma_curve(2.2)))
    wide = next(example for example in read_examples(stage.images, workers=0)[0] if example.name == "wide.png")
    assert {example.revision for example in examples.values()} == {""}
    assert wide.revision == DECODER_REVISION
    both = [(each, placement_of(each)) for each in (wide, replace(wide, revision=""))]
    paths = {path for path, *_ in builder(stage, "cache").latents_entries(both)}
    assert len(paths) == 2


def test_large_phone_photos_have_the_size_that_is_decoded(stage, monkeypatch):
    """In buckets, crops and time ids alike; with a smaller limit, which makes the example cheap."""
    monkeypatch.setattr(images, "MAX_PIXELS", 1200 * 800 // 3)
    photo = stage.photographs["coffee"].resize((1200, 800), Image.Resampling.LANCZOS)
    photo.save(stage.images / "large.jpg", quality=95)
    (stage.images / "large.txt").write_text("sks, cup")
    (example,), _ = read_examples(stage.images, workers=0)
    placement = assign_bucket(example.width, example.height, resolution=128, step=8, max_side=256)
    assert placement.add_time_ids[:2] == (400, 600)
    assert image_pixels(example, placement).shape == (3, placement.bucket.height, placement.bucket.width)
    expected = photo.resize((placement.resized_width, placement.resized_height), Image.Resampling.LANCZOS)
    box = (placement.left, placement.top, placement.left + placement.bucket.width, placement.top + placement.bucket.height)
    difference = np.asarray(as_image(image_pixels(example, placement)), float) - np.asarray(expected.crop(box), float)
    assert np.abs(difference).mean() < 4


def test_transparent_images_are_put_on_white(examples):
    pixels = image_pixels(examples["rocket"], placement_of(examples["rocket"]))
    assert pixels[..., 0].min() > 0.94  # nearly transparent at the left edge
    assert pixels[..., -1].mean() < 0.5


def builder(stage, folder) -> CacheBuilder:
    base = find_base(str(stage.base), stage.models)
    return CacheBuilder(base, stage.base.parent, stage.output / folder, CPU, torch.float32)


def build_cache(stage, folder, examples):
    """Encode all of `examples` into the cache `folder`; return them, and file name -> bytes."""
    settings = replace(TrainSettings().data, resolution=128, bucket_step=8, bucket_max_side=256, dataloader_num_workers=1)
    images = [(example, placement_of(example)) for example in examples]
    cached, _ = builder(stage, folder).build(images, settings, seed=0)
    files = {path.name: path.read_bytes() for path in (stage.output / folder).glob("*/*.safetensors")}
    return cached, files


def test_latents_are_the_posterior_of_the_vae(stage, examples):
    cached, _ = build_cache(stage, "cache", [examples["coffee"]])
    vae = AutoencoderKL.from_pretrained(stage.base / "vae", dtype=torch.float32)
    with torch.no_grad():
        expected = vae.encode(image_pixels(examples["coffee"], placement_of(examples["coffee"]))[None]).latent_dist
    mean, log_variance = read_latents(cached[0].latents)
    assert mean.dtype == log_variance.dtype == torch.float32
    torch.testing.assert_close(mean, expected.mean[0])
    torch.testing.assert_close(log_variance, expected.logvar[0])


def test_what_is_in_the_cache_does_not_depend_on_what_else_was_build_cache(stage, examples):
    """Each image alone, all in order, all in another order: the same files with the same bytes."""
    everything = list(examples.values())
    _, together = build_cache(stage, "together", everything)
    assert len(together) == 4 + 5  # latents; captions and the empty one
    _, backwards = build_cache(stage, "backwards", everything[::-1])
    assert backwards == together
    for example in everything[:2]:
        _, alone = build_cache(stage, f"alone-{example.name}", [example])
        assert len(alone) == 1 + 2
        assert alone.items() <= together.items()


@pytest.mark.parametrize(("caption", "is_lost"), [("{tags}, nya_fyi-2", True), ("nya fyi-2, {tags}, nya_fyi-2", False)])
def test_a_trigger_word_that_is_cut_off_is_named(stage, examples, capsys, caption, is_lost):
    long = caption.format(tags=", ".join(["smile"] * 200))
    build_cache(stage, "cache", [replace(examples["coffee"], caption=long, trigger="nya_fyi-2")])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "training does not see" in line)
    assert line.startswith("coffee.webp: its caption is longer than ")
    assert ("(the trigger word 'nya_fyi-2' is not in what it sees; put it first)" in line) is is_lost


def test_corrupt_files_are_encoded_again_and_valid_ones_are_kept(stage, examples, capsys):
    everything = list(examples.values())
    _, before = build_cache(stage, "cache", everything)
    latents, text = (sorted((stage.output / "cache" / kind).glob("*")) for kind in ("latents", "text"))
    latents[0].write_bytes(before[latents[0].name][:-100])
    latents[1].write_bytes(b"")
    latents[2].unlink()
    text[0].write_bytes(bytes(1000))
    valid = {path: path.stat().st_mtime_ns for path in (latents[3], *text[1:])}
    capsys.readouterr()
    _, after = build_cache(stage, "cache", everything)
    output = capsys.readouterr().out
    assert "images: 3 encoded, 1 in the cache" in output
    assert "captions: 1 encoded, 4 in the cache" in output
    assert after == before
    assert {path: path.stat().st_mtime_ns for path in valid} == valid


def test_a_flipped_bit_is_found_and_the_file_encoded_again(stage, examples, capsys):
    everything = list(examples.values())[:2]
    _, before = build_cache(stage, "cache", everything)
    damaged = [sorted((stage.output / "cache" / kind).glob("*"))[0] for kind in ("latents", "text")]
    for path in damaged:
        content = bytearray(path.read_bytes())
        content[-100] ^= 0x40
        path.write_bytes(content)
    capsys.readouterr()
    _, after = build_cache(stage, "cache", everything)
    output = capsys.readouterr().out
    assert all(f"{path} is damaged; it is encoded again\n" in output for path in damaged)
    assert "images: 1 encoded, 1 in the cache; captions: 1 encoded, 2 in the cache" in output
    assert after == before


def test_files_of_the_first_version_without_a_checksum_are_valid(tmp_path):
    files = sorted((REPOSITORY / "tests" / "data" / "first_version" / "half" / "cache").glob("*/*.safetensors"))
    assert len(files) == 5
    for file in files:
        copied = tmp_path / file.parent.name / file.name
        copied.parent.mkdir(exist_ok=True)
        shutil.copy(file, copied)
        assert is_valid_entry(copied)


def test_a_file_that_is_gone_or_overwritten_is_a_resource_error(stage, examples):
    data, _ = build_cache(stage, "cache", [examples["coffee"]])
    cached = data[0]
    cached.latents.unlink()
    cached.text.write_bytes(b"{}")
    for path, read in ((cached.latents, read_latents), (cached.text, lambda path: read_text(path, 0))):
        with pytest.raises(ResourceError, match="cannot be read any more") as error:
            read(path)
        assert str(path) in str(error.value)


def test_two_names_for_the_same_image_share_a_file(stage, examples):
    copy = replace(examples["coffee"], name="copy.webp", path=examples["coffee"].path)
    cached, files = build_cache(stage, "cache", [examples["coffee"], copy])
    assert cached[0].latents == cached[1].latents
    assert len(files) == 1 + 2


def test_everything_that_latents_depend_on_is_in_their_key(stage, examples, monkeypatch):
    example, cache = examples["coffee"], builder(stage, "cache")
    placement = placement_of(example)

    def latents(example, placement, builder=cache):
        ((path, *_),) = builder.latents_entries([(example, placement)])
        return path

    keys = [
        latents(example, placement),
        latents(replace(example, sha256="another"), placement),
        latents(example, replace(placement, left=placement.left + 1)),
        latents(example, assign_bucket(600, 400, 192, 8, 256)),
        latents(example, placement, replace(cache, dtype=torch.bfloat16)),  # computed by tensor cores
    ]
    renamed = replace(example, path=example.path.with_name("x.png"), name="x.png", caption="", repeats=9)
    assert latents(renamed, placement) == keys[0]
    monkeypatch.setattr(cache_module, "base_digest", lambda base, folder, name: f"another {name}")
    keys.append(latents(example, placement))
    assert len(set(keys)) == len(keys)


def test_everything_that_embeddings_depend_on_is_in_their_key(stage, monkeypatch):
    captions = [["sks, a", "a, sks"], ["sks, a"], ["a, sks", "sks, a"], ["sks, b", "b, sks"]]
    cache = builder(stage, "cache")
    keys = []
    for digest in ("encoders", "other encoders"):
        monkeypatch.setattr(cache_module, "base_digest", lambda base, folder, name, digest=digest: digest)
        for chunks, dtype in itertools.product((1, 2), (torch.float32, torch.bfloat16)):
            keys += [path for path, *_ in replace(cache, dtype=dtype).text_entries(captions, chunks)]
    assert len(set(keys)) == len(keys) == 32


def test_another_format_of_the_cache_is_another_key(tmp_path, monkeypatch):
    first = entry(tmp_path, "text", "sks")
    monkeypatch.setattr(cache_files, "FORMAT", cache_files.FORMAT + 1)
    assert entry(tmp_path, "text", "sks") != first


def test_latents_that_are_not_finite_name_their_image(stage, examples):
    def broken(pixels):
        return torch.full((1, 4, 2, 2), float("nan")), torch.zeros(1, 4, 2, 2)

    path = stage.output / "latents" / "a.safetensors"
    with pytest.raises(NotFiniteError, match=r"coffee\.webp: the VAE returns NaN") as error:
        list(write_latents([(path, examples["coffee"], placement_of(examples["coffee"]))], broken, workers=1))
    assert error.value.exit_code == 5
    assert not is_valid_entry(path)
    assert not path.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_read_back_one_variant_at_a_time(tmp_path, dtype):
    hidden, pooled = torch.randn(3, 77, 8), torch.randn(3, 5)
    path = tmp_path / "text" / "caption.safetensors"
    assert not is_valid_entry(path)
    assert list(write_embeddings([(path, ["a", "b", "c"])], lambda texts: (hidden, pooled), dtype, workers=1)) == [path]
    assert is_valid_entry(path)
    for variant in range(3):
        ours = read_text(path, variant)
        assert list(ours) == ["hidden", "pooled"]
        assert torch.equal(ours["hidden"], hidden[variant].to(dtype))
        assert torch.equal(ours["pooled"], pooled[variant].to(dtype))


def test_a_file_of_the_other_kind_or_a_folder_is_not_valid(tmp_path):
    text, latents = tmp_path / "text" / "a.safetensors", tmp_path / "latents" / "a.safetensors"
    list(write_embeddings([(text, ["a"])], lambda texts: (torch.zeros(1, 77, 8), torch.zeros(1, 5)), torch.float32, workers=0))
    latents.parent.mkdir()
    shutil.copy(text, latents)
    assert is_valid_entry(text)
    assert not is_valid_entry(latents)
    latents.unlink()
    latents.mkdir()
    assert not is_valid_entry(latents)
