"""The report page shows who is in the images, which of them to leave out, and which LoRA looks most like the person."""

import html as html_text
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from common.dataset_layout import DatasetFolder, name_in, select_images

OTHER = "the face is unlike the other images: likeness 0.31, less than 0.46"
PROMPTS = [
    {"text": "sks_woman", "seed": 0, "width": 1024, "height": 1024, "kind": "trigger"},
    {"text": "woman", "seed": 1, "width": 1024, "height": 1024, "kind": "class"},
]


def text_of(page: str) -> str:
    """What a reader sees, in one line."""
    body = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(html_text.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def exclusions(page: str) -> str:
    """The text for exclude.txt."""
    return html_text.unescape(re.search(r"<textarea[^>]*>\n?(.*?)</textarea>", page, re.DOTALL)[1])


def likeness(**images: dict) -> dict:
    framing = {"close": 0.5, "half": 0.25, "full": 0.25}
    return {"model": "dlib", "references": 1, "ceiling": 0.77, "framing": framing, "images": images}


def flagged(**images: str) -> dict:
    return {"flagged": {name: {"sha256": "", "flaws": {"another person": why}} for name, why in images.items()}}


@pytest.fixture
def reviewed(project):
    """A data set after the caption stage: one image of another person, one without a face."""
    for name in ("a.png", "b.png", "c.png"):
        project.add_image(name, "sks_woman, smile")
    scores = {
        "a.png": {"likeness": 0.81, "to_reference": 0.79, "framing": "close", "face_px": 200, "why": ""},
        "b.png": {"likeness": 0.31, "to_reference": None, "framing": "half", "face_px": 90, "why": ""},
        "c.png": {"likeness": None, "to_reference": None, "framing": "", "face_px": 0, "why": "no face was found"},
    }
    project.add_record("dataset/.loracat/likeness.json", likeness(**scores))
    project.add_record("dataset/.loracat/audit.json", flagged(**{"b.png": OTHER}))
    return project


def test_every_image_has_its_likeness_framing_and_flaws(reviewed):
    text = text_of(reviewed.html())
    assert "likeness 0.81, to the reference 0.79 close" in text
    assert f"likeness 0.31 half another person: {OTHER}" in text
    assert "likeness: cannot tell, no face was found" in text
    assert "close 50 % half 25 % full 25 %" in text
    assert "3 images, 3 with a caption, 1 with a flaw ; mean likeness 0.77." in text


def test_the_text_for_the_exclusions_names_the_flagged_images(reviewed):
    page = reviewed.html()
    assert exclusions(page) == f"b.png  # another person: {OTHER}\n"
    assert page.index("b.png</strong>") < page.index("a.png</strong>")  # flagged images come first


def test_an_excluded_image_is_shown_as_such_and_not_named_again(reviewed):
    (reviewed.dataset / "exclude.txt").write_text("b.png\n", encoding="utf-8")
    page = reviewed.html()
    assert exclusions(page) == ""
    assert "excluded by exclude.txt" in page
    assert "3 images, 3 with a caption, 1 excluded, no flaws found" in text_of(page)


@pytest.mark.parametrize(
    "name", ["x.png", "a  b.png", "no. #1.png", "#2.png", "ünï.png", "5_face/x.png", "a'b&<i>.png", "x # y.png"]
)
def test_the_text_excludes_exactly_the_flagged_image(project, name):
    """Other names are a part of it, so that a line that is cut off in the wrong place would exclude another image."""
    for other in ("no..png", "a.png", "1.png", "y.png"):
        project.add_image(other, "sks_woman")
    project.add_image(name, "sks_woman")
    project.add_record("dataset/.loracat/audit.json", flagged(**{name: "is # not\nher"}))
    (project.dataset / "exclude.txt").write_text(exclusions(project.html()), encoding="utf-8")
    folder = DatasetFolder(project.dataset)
    assert select_images(folder).excluded == [name]
    assert name not in {name_in(folder.images, image.path) for image in select_images(folder).images}
    assert select_images(folder).unknown == []


def test_a_data_set_without_scores_says_so(project):
    project.add_image("a.png", "sks_woman")
    project.add_record("dataset/.loracat/audit.json", {"flagged": {}})
    assert "The faces were not compared" in project.html()


def add_scored_samples(project, **more) -> None:
    project.add_run()
    project.add_samples()
    names = [f"{label}-{number}.png" for label in ("base model", "after epoch 5") for number in range(2)]
    rows = [
        {
            "label": "base model",
            "file": None,
            "step": 0,
            "epochs": 0,
            "images": names[:2],
            "likeness": [0.2, 0.3],
            "unscored": ["", ""],
        },
        {
            "label": "after epoch 5",
            "file": "sks_woman-000005.safetensors",
            "step": 10,
            "epochs": 5,
            "images": names[2:],
            "likeness": [0.7, None],
            "unscored": ["", "the face is 40 px wide"],
        },
    ]
    strengths = [{"strength": each, "images": names[2:], "likeness": [each, None]} for each in (0.6, 0.8, 1.0)]
    advice = {"file": "sks_woman-000005.safetensors", "strength": 0.8, "reason": "Most like her."}
    record = {"prompts": PROMPTS, "rows": rows, "floor": 0.2, "ceiling": 0.8, "strengths": strengths, "recommended": advice}
    project.add_record("output/samples/sks_woman/samples.json", record | more)


def test_the_verdict_says_which_file_at_which_strength_why_and_how_to_load_it(project):
    add_scored_samples(project)
    lora = project.output / "lora"
    (lora / "sks_woman-recommended.safetensors").write_bytes((lora / "sks_woman-000005.safetensors").read_bytes())
    (lora / "sks_woman.workflow.json").write_text("{}")
    page = project.html()
    text = text_of(page)
    assert "Use sks_woman-recommended.safetensors at strength 0.8." in text
    assert "It is sks_woman-000005.safetensors (after epoch 5). Most like her." in text
    assert 'href="lora/sks_woman.workflow.json"' in page
    assert "0.20 base model data set 0.80" in text


def test_without_samples_the_header_of_the_recommended_file_says_why(project):
    project.add_run()
    advice = {"file": "sks_woman-000005.safetensors", "strength": "1", "reason": "It is the last one."}
    metadata = {f"loracat_recommended_{name}": value for name, value in advice.items()}
    save_file({"a": np.zeros(4, np.float16)}, project.output / "lora" / "sks_woman-recommended.safetensors", metadata)
    text = text_of(project.html())
    assert "Use sks_woman-recommended.safetensors at strength 1." in text
    assert "It is sks_woman-000005.safetensors . It is the last one." in text


def test_samples_show_likeness_between_floor_and_ceiling_and_the_recommended_row(project):
    add_scored_samples(project)
    page = project.html()
    text = text_of(page)
    assert "after epoch 5 recommended mean 0.70" in text
    assert "cannot tell: the face is 40 px wide" in text
    assert page.count('<tr class="recommended">') == 2  # the file and the strength
    assert "strength 0.6 mean 0.60" in text
    assert 'style="width: 83%"' in page  # 0.7, from 0.2 to 0.8


def test_the_curve_of_likeness_leaves_out_the_class_word(project):
    add_scored_samples(project)
    chart = re.search(r'aria-label="Likeness by step">(.*?)</svg>', project.html(), re.DOTALL)[1]
    assert "floor 0.20" in chart
    assert "ceiling 0.80" in chart
    assert len(re.search(r'points="([^"]*)"', chart)[1].split()) == 2
    assert chart.count('class="mark"') == 1


def test_prompts_of_the_same_text_are_told_apart_by_their_seeds(project):
    add_scored_samples(project, prompts=[PROMPTS[0], PROMPTS[0] | {"seed": 7}])
    text = text_of(project.html())
    assert "sks_woman (seed 0) sks_woman (seed 7)" in text


@pytest.mark.parametrize("missing", ["floor", "ceiling", "strengths", "recommended"])
def test_keys_that_are_not_there_yet_are_done_without(project, missing):
    add_scored_samples(project, **{missing: None})
    assert "after epoch 5" in text_of(project.html())


@pytest.mark.parametrize("scores", [[], [0.5], [0.5, "much"], [True, 0.5], [float("nan"), 0.5], "ab"])
def test_scores_that_are_not_there_yet_are_done_without(project, scores):
    add_scored_samples(project)
    rows = [{"label": "final", "images": ["base model-0.png", "base model-1.png"], "likeness": scores}]
    project.add_record("output/samples/sks_woman/samples.json", {"prompts": PROMPTS, "rows": rows})
    assert "final" in text_of(project.html())


def test_a_sample_that_would_lead_out_of_the_folder_is_missing(project):
    add_scored_samples(project)
    (project.output / "secret.png").write_bytes(Path(project.add_image("a.png")).read_bytes())
    rows = [{"label": "final", "images": ["../../secret.png", "/etc/passwd"]}]
    project.add_record("output/samples/sks_woman/samples.json", {"prompts": PROMPTS, "rows": rows})
    page = project.html()
    assert "secret" not in page
    assert text_of(page).count("missing") == 2


HISTORY = """{"event": "start", "time": "2026-11-26T09:00:00+00:00", "step": 0, "steps": 60, "device": "NVIDIA GB10 in bfloat16",
 "versions": {"torch": "2.11.0"}, "base": "sdxl", "base_hash": "ba5e", "dataset_hash": "da7a", "fingerprint": "f1f1"}
{"event": "end", "time": "2026-11-26T09:10:00+00:00", "seconds": 600, "peak_bytes": 1073741824}
{"event": "start", "time": "2026-11-26T10:00:00+00:00", "step": 30, "steps": 60, "device": "NVIDIA GB10 in bfloat16"}
""".replace("\n ", " ")


def test_the_recipe_says_on_what_the_run_ran_and_for_how_long(project):
    project.add_run(finished=False)
    state = project.output / "state" / "sks_woman"
    state.mkdir(parents=True)
    (state / "history.jsonl").write_text(HISTORY + '{"event": "e')
    text = text_of(project.html())
    for words in ("30 of 60 steps", "NVIDIA GB10 in bfloat16", "2026-11-26 09:00:00 UTC", "0:10:00 in 2 processes", "1.0 GiB"):
        assert words in text
    (state / "history.jsonl").write_text(HISTORY + '{"event": "end", "time": "2026-11-26T10:10:00+00:00", "seconds": 600.4}\n')
    text = text_of(project.html())
    assert "Ended 2026-11-26 10:10:00 UTC Time 0:20:00 in 2 processes" in text


def test_versions_and_hashes_of_the_last_process_are_shown(project):
    project.add_run()
    state = project.output / "state" / "sks_woman"
    state.mkdir(parents=True)
    (state / "history.jsonl").write_text(HISTORY.splitlines()[0])
    text = text_of(project.html())
    for words in ("torch 2.11.0", "Hash of the base model ba5e", "Hash of images and captions da7a", "Hash of the run f1f1"):
        assert words in text


SECRETS = r"""
[project]
trigger_word = "sks_woman"  # set by environment
dataset_dir = "/srv/anna/dataset"  # set by environment
models_dir = "..\\..\\anna\\models"
face_reference = ["/srv/anna/face.png", "C:\\anna\\face.png"]  # set by training_config.toml

[train.samples]
sample_prompts = "~/anna/prompts.txt"  # set by --set
other = "see https://anna:hunter2@host/?token=hunter2 # it"  # set by environment

[train.saving]
output_name = "sks_woman"
"""


def test_no_login_and_no_folder_is_shown_of_any_kind_of_value(project):
    project.add_run(SECRETS)
    project.add_samples()
    state = project.output / "state" / "sks_woman"
    state.mkdir(parents=True)
    (state / "history.jsonl").write_text('{"event": "start", "device": "/srv/anna/gpu", "base": "/srv/anna/base.safetensors"}\n')
    header = {"ss_sd_model_name": "/srv/anna/base", "sshs_model_hash": "ab12", "modelspec.trigger_phrase": "sks_woman"}
    save_file({"a": np.zeros(4, np.float16)}, project.output / "lora" / "sks_woman.safetensors", header)
    page = project.html()
    for secret in ("hunter2", "anna", "srv", "C:"):
        assert secret not in page
    command = html_text.unescape(re.search(r"<pre>(.*?)</pre>", page, re.DOTALL)[1])
    assert command.startswith(
        "TRIGGER_WORD=sks_woman DATASET_DIR=dataset FACE_REFERENCE=face.png,face.png SAMPLE_PROMPTS=prompts.txt"
    )
    assert command.endswith(" docker compose run --rm loracat --train")


def test_what_cannot_be_read_is_named(project):
    project.add_image("a.png", "sks_woman")
    project.add_run()
    project.add_samples()
    broken = {
        project.dataset: (".loracat/likeness.json", ".loracat/audit.json", ".loracat/traits.json"),
        project.output: ("lora/sks_woman-000005.safetensors", "lora/metrics.jsonl", "samples/sks_woman/samples.json"),
    }
    for folder, names in broken.items():
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text('{"a": 1, "b')
    text = text_of(project.html())
    for name in (*broken[project.dataset], *broken[project.output]):
        assert name in text
    assert "Use sks_woman.safetensors at strength 1." in text


def test_a_run_whose_settings_cannot_be_read_is_still_shown(project):
    project.add_run()
    (project.output / "lora" / "training_config_resolved.toml").write_text("[train")
    text = text_of(project.html())
    assert "Use sks_woman.safetensors at strength 1." in text
    assert "lora/training_config_resolved.toml" in text
    assert "There are no settings of this run." in text
