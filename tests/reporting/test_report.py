"""The report page, by the program itself: what it shows, what it never shows, and that nothing can break it."""

import base64
import io
import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from skimage import data

from captioning.image_audit import index_images
from common.dataset_layout import DatasetFolder, select_images
from common.thumbnails import Thumbnails
from reporting.charts import round_ticks


def test_an_empty_project_has_a_page_that_says_what_to_do(project):
    html = project.html()
    assert "Nothing is trained yet." in html
    assert "There are no images in the data set." in html


def test_images_come_with_their_captions_flaws_and_tags(project):
    project.add_image("a.png", "sks_woman, smile, hat")
    project.add_image("b.png", "sks_woman, smile")
    project.add_image("c.png")
    records = project.dataset / ".loracat"
    records.mkdir()
    (records / "audit.json").write_text('{"flagged": {"b.png": {"sha256": "", "flaws": {"blurred": "sharpness 3"}}}}')
    (records / "traits.json").write_text('{"pruned": {}, "kept": {"long hair": 0.5}}')
    html = project.html()
    assert "3 images, 2 with a caption" in html
    assert "blurred: sharpness 3" in html
    assert "long hair 50 %" in html
    assert re.findall(r"(\d)&nbsp;(\w+)</li>", html) == [("2", "smile"), ("1", "hat")]
    assert html.count("data:image/webp;base64,") == 3
    assert html.count("no caption") == 1


def test_a_finished_run_shows_files_curves_and_recipe(project):
    project.add_run()
    html = project.html()
    assert "sks_woman.safetensors" in html
    assert "after epoch 5" in html
    assert "ab12" * 16 in html
    assert html.count("<svg") == 2
    assert "validation loss" in html
    assert "text encoders" not in html
    assert "LEARNING_RATE=5e-05 docker compose run --rm loracat --train" in html


def test_curves_of_each_kind_are_shown(project):
    project.add_run()
    metrics = project.output / "lora" / "metrics.jsonl"
    lines = [{"step": step, "loss": 0.1, "lr": 1e-4, "text_encoder_lr": 1e-5} for step in range(9)]
    lines += [{"step": step, "validation_loss": 0.1, "validation_loss_smoothed": 0.125} for step in (4, 8)]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    html = project.html()
    for label in ("training loss", "validation loss", "smoothed validation loss", "UNet", "text encoders"):
        assert f"{label}</span>" in html
    assert html.count("<title>text encoders</title>") == 1


def test_losses_of_images_are_shown_and_outliers_named(project):
    for name in ("a.png", "b.png", "c.png", "d.png"):
        project.add_image(name, "sks_woman")
    project.add_run()
    assert "of the usual loss" not in project.html()
    state = project.output / "state" / "sks_woman"
    state.mkdir(parents=True)
    losses = {"a.png": 1.0, "b.png": 2.5, "c.png": 0.4}
    record = {"relative_loss": losses, "never_fit": ["b.png"], "learned_at_once": ["c.png"]}
    (state / "image_losses.json").write_text(json.dumps(record))
    html = project.html()
    assert "Never fit by the last run: b.png." in html
    assert "Learned at once: c.png." in html
    shown = re.findall(r"<strong>(\w\.png)</strong>.*?([\d.]+) of the usual loss(: [a-z ]+)?<", html, re.DOTALL)
    assert sorted(shown) == [("a.png", "1.00", ""), ("b.png", "2.50", ": never fits"), ("c.png", "0.40", ": learned at once")]
    (state / "image_losses.json").write_text('{"relative_loss": [1], "never_fit": 3}')
    assert "of the usual loss" not in project.html()


def test_a_list_in_the_settings_is_part_of_the_command_that_repeats_the_run(project):
    resolution = "[train.data]\nresolution = [  # set by environment\n    1024,\n    768,\n]\n\n"
    project.add_run(config=resolution + '[train.saving]\noutput_name = "sks_woman"\n')
    assert "RESOLUTION=1024,768 docker compose run --rm loracat --train" in project.html()


@pytest.mark.parametrize(
    ("origin", "accumulation", "begins"),
    [
        ("  # set by environment", 2, "TRAIN_BATCH_SIZE=4 GRADIENT_ACCUMULATION_STEPS=2 "),
        ("", 2, "TRAIN_BATCH_SIZE=4 GRADIENT_ACCUMULATION_STEPS=2 "),
        ("", 1, ""),
    ],
)
def test_the_command_that_repeats_a_run_has_as_many_images_in_a_step(project, origin, accumulation, begins):
    split = f"[train.run]\ntrain_batch_size = 4{origin}\ngradient_accumulation_steps = {accumulation}\n\n"
    project.add_run(config=split + '[train.saving]\noutput_name = "sks_woman"\n')
    assert f">{begins}docker compose run --rm loracat --train" in project.html()


def test_an_unfinished_run_says_how_to_continue(project):
    project.add_run(finished=False)
    html = project.html()
    assert "The run is not finished." in html
    assert "step 30" in html


def test_sample_images_and_the_recommended_file_are_shown(project):
    project.add_run()
    project.add_samples()
    html = project.html()
    assert "sks_woman-000005.safetensors</code> at strength 0.8" in html
    assert html.count('<img src="data:image/webp') == 4
    assert 'href="samples/sks_woman/after%20epoch%205-0.png"' in html
    assert html.count("likeness 0.41") == 2


def test_several_concepts_are_listed_with_their_classes_and_traits(project):
    project.add_image("a.png", "sks_woman, hat")
    project.add_image("2_bob/b.png", "bob, hat")
    project.add_image("../regularization/1_woman/r.png")
    (project.dataset / "images/2_bob/folder.toml").write_text('trigger = "bob"\nclass = "man"')
    records = project.dataset / ".loracat"
    records.mkdir()
    traits = {"sks_woman": {"kept": {"long hair": 1}}, "bob": {"pruned": {"beard": 0.9}}}
    (records / "traits.json").write_text(json.dumps({"concepts": traits}))
    html = project.html()
    assert "<td><code>bob</code></td><td>man</td><td>1</td><td>2</td>" in html
    assert "<td><code>sks_woman</code></td><td></td><td>1</td><td>1</td>" in html
    assert re.search(r"Traits of <code>bob</code>:.*beard 90 % .*not in the captions", html)
    assert re.search(r"Traits of <code>sks_woman</code>:.*long hair 100 %", html)
    assert "1 regularization images, which show the class of the subject" in html
    assert re.findall(r"(\d)&nbsp;(\w+)</li>", html) == [("2", "hat")]


def test_texts_of_the_user_stay_text(project):
    evil = "<script>alert(1)</script>"
    project.add_image("a.png", f"sks_woman, {evil}")
    project.add_run()
    project.add_samples()
    html = project.html()
    assert html.count("<script") == 1  # the page's own
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<b>on a beach" not in html


def test_the_page_holds_no_login_and_no_path_outside_the_project(project, tmp_path):
    project.add_image("a.png", "sks_woman")
    project.add_run()
    html = project.html()
    for secret in ("hunter2", "anna", "/srv", str(tmp_path)):
        assert secret not in html
    assert "base.safetensors" in html


@pytest.mark.parametrize("name", ["training_config_resolved.toml", "metrics.jsonl", "sks_woman.safetensors"])
def test_half_written_files_of_a_run_are_left_out(project, name):
    project.add_run()
    path = project.output / "lora" / name
    path.write_bytes(path.read_bytes()[:7])
    project.html()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"prompts": 1, "rows": 2}', '{"prompts": [], "rows": [{"label": 1}]}', "[" * 99999]
)
def test_a_broken_record_of_samples_is_left_out(project, content):
    project.add_run()
    project.add_samples()
    (project.output / "samples/sks_woman/samples.json").write_text(content)
    assert "There are no sample images of this run." in project.html()


def test_sample_images_that_are_turned_off_are_not_missing(project):
    project.add_run("[train.samples]\nsamples = false  # set by SAMPLES\n[train.saving]\noutput_name = 'sks_woman'\n")
    html = project.html()
    assert "This run renders no sample images (<code>SAMPLES=false</code>)." in html
    assert "There are no sample images of this run." not in html


@pytest.mark.parametrize(
    ("low", "high", "least", "labels"),
    [
        (0.0406, 0.195, 0, ["0.06", "0.08", "0.10", "0.12", "0.14", "0.16", "0.18"]),
        (0.29, 0.78, 0, ["0.3", "0.4", "0.5", "0.6", "0.7"]),
        (1e-6, 5e-5, 0, ["1e-05", "2e-05", "3e-05", "4e-05", "5e-05"]),
        (0, 2e-4, 0, ["0", "5.0e-05", "1.0e-04", "1.5e-04", "2.0e-04"]),
        (-1, 1, 0, ["-1.0", "-0.5", "0.0", "0.5", "1.0"]),
        (0, 999, 1, ["0", "200", "400", "600", "800"]),
        (0, 3, 1, ["0", "1", "2", "3"]),
        (0, 12345, 1, ["0", "2000", "4000", "6000", "8000", "10000", "12000"]),
        (0, 1e308, 0, []),
        (0, 5e-324, 0, []),
    ],
)
def test_the_numbers_at_an_axis_are_round(low, high, least, labels):
    assert list(round_ticks(low, high, least).values()) == labels


def test_an_image_that_cannot_be_read_is_named(project):
    project.add_image("a.png", "sks_woman").write_bytes(b"not an image")
    assert "cannot be read" in project.html()


def test_thumbnails_are_made_once_and_removed_with_their_image(project):
    image = project.add_image("a.png", "sks_woman")
    project.html()
    (thumbnail,) = (project.dataset / ".loracat/thumbnails").iterdir()
    made = thumbnail.stat().st_mtime_ns
    project.html()
    assert thumbnail.stat().st_mtime_ns == made
    image.unlink()
    project.html()
    assert not thumbnail.exists()


def test_a_stage_that_has_decoded_an_image_leaves_its_thumbnail(project):
    """The report does not decode it again, and shows what it would have made."""
    image = project.add_image("a.png", "sks_woman")
    photograph = project.dataset / "images" / "b.jpg"
    Image.fromarray(data.astronaut()).resize((1500, 1500)).save(photograph, quality=95)
    folder = DatasetFolder(project.dataset)
    own = Thumbnails(folder.thumbnails).of(image)
    shutil.rmtree(folder.thumbnails)
    index_images(folder, select_images(folder).images, workers=0)
    assert len(list(folder.thumbnails.iterdir())) == 2
    thumbnails, of_page = Thumbnails(folder.thumbnails), Thumbnails(project.output)
    assert thumbnails.of(image) == own
    difference = np.abs(pixels_of(thumbnails.of(photograph)) - pixels_of(of_page.of(photograph)))
    assert difference.shape == (192, 192, 3)
    assert difference.mean() < 6  # the page decodes a JPEG file to a fraction of its size
    for path in (image, photograph):
        status = path.stat()
        path.write_bytes(b" " * status.st_size)  # cannot be decoded any more
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    html = project.html()
    assert own in html
    assert html.count("data:image/webp;base64,") == 2


def pixels_of(uri: str) -> np.ndarray:
    content = base64.b64decode(uri.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), dtype=int)


def test_two_hundred_images_and_ten_saves_stay_under_ten_megabytes(project):
    first = project.add_image("0.png", "sks_woman, smile")
    for number in range(1, 200):
        os.link(first, first.with_name(f"{number}.png"))
    project.add_run()
    project.html()
    assert project.page.stat().st_size < 10e6


def test_a_page_that_cannot_be_written_is_one_line_and_exit_code_2(project):
    project.output.write_text("a file")
    done = project.report()
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
