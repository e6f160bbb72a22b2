"""The tagger's files are found on the disk, or downloaded once and completely, or the error names the command that does it."""

import json
import shutil
import socket
import time
from pathlib import Path

import pytest
from hub_server import NAME, hub
from other_taggers import STAGES, move_weights, take_rgb

from captioning.model_files import FILES, find_model
from demo import tiny_tagger

COMMAND = "hf download someone/some-tagger model.onnx selected_tags.csv --local-dir"


def put(tiny: Path, folder: Path) -> Path:
    return Path(shutil.copytree(tiny, folder))


@pytest.mark.parametrize("place", ["some-tagger", "someone/some-tagger"])
def test_model_in_models_dir_is_found_without_any_network(tmp_path, tiny, monkeypatch, place):
    monkeypatch.setattr(socket, "socket", None)
    assert find_model(NAME, tmp_path) is None
    assert find_model(NAME, tmp_path) or put(tiny, tmp_path / place) == find_model(NAME, tmp_path)


def test_path_to_a_folder_is_taken_as_it_is(tmp_path, tiny, monkeypatch):
    put(tiny, tmp_path / "elsewhere" / "mine")
    assert find_model(str(tmp_path / "elsewhere" / "mine"), tmp_path / "models") == tmp_path / "elsewhere" / "mine"
    assert find_model("mine", tmp_path / "elsewhere") == tmp_path / "elsewhere" / "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model("~/elsewhere/mine", tmp_path / "models") == tmp_path / "elsewhere" / "mine"
    monkeypatch.setattr("common.settings.REPOSITORY", tmp_path)
    assert find_model("./elsewhere/mine", tmp_path / "models") == tmp_path / "elsewhere" / "mine"
    put(tiny, tmp_path / "models" / "other")
    assert find_model(str(tmp_path / "absent" / "other"), tmp_path / "models") is None


@pytest.mark.parametrize("missing", FILES)
def test_model_with_a_missing_file_is_not_found(tmp_path, tiny, missing):
    (put(tiny, tmp_path / "some-tagger") / missing).unlink()
    assert find_model(NAME, tmp_path) is None


@pytest.mark.parametrize("network", [{"HF_HUB_OFFLINE": 1}, {"HF_HUB_OFFLINE": 0, "HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_missing_model_without_a_network_is_exit_5_with_the_download_command(stage, photographs, network):
    photographs["coffee"].save(stage.images / "a.png")
    before = time.monotonic()
    for flags in [(), ("--check",)]:
        ended = stage.run_process(*flags, CAPTION_MODEL=NAME, **network)
        assert ended.returncode == 5
        assert f"{COMMAND} {stage.models / 'some-tagger'}" in ended.stderr
    assert time.monotonic() - before < 40  # one request; huggingface_hub itself would retry for minutes
    assert not stage.models.exists()


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("/nowhere/tagger", 2, "/nowhere/tagger is not a folder"),
        ("tagger", 5, "does not hold model.onnx and selected_tags.csv"),
        ("a/b/c", 5, "owner/name"),
        ("ä ö/ü?", 5, "owner/name"),
    ],
)
def test_wrong_model_names_are_refused(stage, photographs, name, code, message):
    photographs["coffee"].save(stage.images / "a.png")
    ended = stage.run(CAPTION_MODEL=name)
    assert ended.returncode == code
    assert message in ended.stderr


def test_folder_without_one_of_the_files_is_refused(stage, photographs, tiny, tmp_path):
    photographs["coffee"].save(stage.images / "a.png")
    (put(tiny, tmp_path / "mine") / "selected_tags.csv").unlink()
    ended = stage.run(CAPTION_MODEL=tmp_path / "mine")
    assert ended.returncode == 5
    assert "has no selected_tags.csv; put it there" in ended.stderr


def test_missing_model_is_downloaded_once(stage, photographs, tiny):
    photographs["coffee"].save(stage.images / "a.png")
    with hub(tiny) as served:
        checked = stage.run_process("--check", CAPTION_MODEL=NAME, HF_HUB_OFFLINE=0, HF_ENDPOINT=served.endpoint)
        assert (checked.returncode, checked.stderr) == (0, "")
        assert not stage.models.exists()
        fetched = stage.run_process(CAPTION_MODEL=NAME, HF_HUB_OFFLINE=0, HF_ENDPOINT=served.endpoint)
    assert fetched.returncode == 0, fetched.stderr
    assert sorted(path.name for path in (stage.models / "some-tagger").iterdir()) == sorted(FILES)
    caption = stage.captions()["a.txt"]
    (stage.images / "a.txt").unlink()
    assert stage.run(CAPTION_MODEL=NAME).returncode == 0  # without a network
    assert stage.captions() == {"a.txt": caption}


def test_only_the_missing_file_is_downloaded(stage, photographs, tiny):
    photographs["coffee"].save(stage.images / "a.png")
    (put(tiny, stage.models / "some-tagger") / "selected_tags.csv").unlink()
    with hub(tiny) as served:
        assert stage.run_process(CAPTION_MODEL=NAME, HF_HUB_OFFLINE=0, HF_ENDPOINT=served.endpoint).returncode == 0
        assert not [line for line in served.requests if line.startswith("GET") and "model.onnx" in line]


def test_weights_beside_the_model_and_its_description_are_downloaded_too(stage, photographs, tmp_path):
    """As PixAI's and cl_tagger's exports have them: values of another kind, and weights in files of their own."""
    photographs["coffee"].save(stage.images / "a.png")
    folder = tiny_tagger.build(tmp_path / "repository")
    take_rgb(folder)
    move_weights(folder, "model.onnx.data", "more.bin")
    (folder / "preprocess.json").write_text(json.dumps(STAGES))
    with hub(folder) as served:
        online = {"CAPTION_MODEL": NAME, "HF_HUB_OFFLINE": 0, "HF_ENDPOINT": served.endpoint}
        assert stage.run_process(**online).returncode == 0
        kept = stage.models / "some-tagger"
        assert {path.name for path in kept.iterdir()} == {*FILES, "model.onnx.data", "more.bin", "preprocess.json"}
        (kept / "more.bin").unlink()
        offline = stage.run("--check", CAPTION_MODEL=NAME, HF_ENDPOINT="http://127.0.0.1:9")
        assert offline.returncode == 5
        assert "some-tagger lacks more.bin, which cannot be downloaded" in offline.stderr
        assert "hf download someone/some-tagger model.onnx selected_tags.csv more.bin --local-dir" in offline.stderr
        served.requests.clear()
        assert stage.run_process("--check", **online).returncode == 0
        photographs["chelsea"].save(stage.images / "b.png")
        assert stage.run_process(**online).returncode == 0
        assert not [line for line in served.requests if line.startswith("GET") and "model.onnx" in line]


def test_truncated_download_leaves_no_file_under_the_final_name(stage, photographs, tiny):
    photographs["coffee"].save(stage.images / "a.png")
    with hub(tiny, cut_short=True) as served:
        ended = stage.run_process(CAPTION_MODEL=NAME, HF_HUB_OFFLINE=0, HF_ENDPOINT=served.endpoint)
    assert ended.returncode == 5
    assert COMMAND in ended.stderr
    assert not (stage.models / "some-tagger" / "model.onnx").exists()


def test_killed_download_starts_again(stage, photographs, tiny):
    photographs["coffee"].save(stage.images / "a.png")
    with hub(tiny, stall=True) as served:
        process = stage.start(CAPTION_MODEL=NAME, HF_HUB_OFFLINE=0, HF_ENDPOINT=served.endpoint)
        assert served.stalled.wait(timeout=30)
        process.kill()
        process.communicate()
    assert not (stage.models / "some-tagger" / "model.onnx").exists()
    with hub(tiny) as served:
        ended = stage.run_process(CAPTION_MODEL=NAME, HF_HUB_OFFLINE=0, HF_ENDPOINT=served.endpoint)
    assert ended.returncode == 0, ended.stderr
    assert sorted(path.name for path in (stage.models / "some-tagger").iterdir()) == sorted(FILES)


def test_tags_as_json_are_refused_with_a_tagger_that_works(stage, photographs, tmp_path):
    """cl_tagger has a tag_mapping.json, camie-tagger metadata under the name of its model; how to prepare images is in no file."""
    photographs["coffee"].save(stage.images / "a.png")
    folder = tiny_tagger.build(tmp_path / "repository")
    (folder / "selected_tags.csv").unlink()
    (folder / "tag_mapping.json").write_text(json.dumps({"0": {"tag": "general", "category": "Rating"}}))
    usable = "set CAPTION_MODEL to a tagger with model.onnx and selected_tags.csv, such as SmilingWolf/wd-swinv2-tagger-v3"
    ended = stage.run(CAPTION_MODEL=folder)
    assert ended.returncode == 5
    assert f"has no selected_tags.csv, and tags in another format (tag_mapping.json) are not read; {usable}" in ended.stderr
    for names in (["model.onnx"], ["model.onnx", "selected_tags.csv"]):
        with hub(folder) as served:
            ended = stage.run_process(CAPTION_MODEL=NAME, HF_HUB_OFFLINE=0, HF_ENDPOINT=served.endpoint)
        assert ended.returncode == 5
        assert f"{NAME}: does not have model.onnx and selected_tags.csv, so it cannot be used; {usable}" in ended.stderr
        (folder / names[0]).unlink(missing_ok=True)


def test_the_description_is_there_before_the_model(stage, photographs, tmp_path):
    """Without it, the next run would take a model of WD14's layout for one of WD14's, and give other tags."""
    photographs["coffee"].save(stage.images / "a.png")
    folder = tiny_tagger.build(tmp_path / "repository")
    (folder / "preprocess.json").write_text(json.dumps(STAGES))
    with hub(folder, stall=True) as served:
        process = stage.start(CAPTION_MODEL=NAME, HF_HUB_OFFLINE=0, HF_ENDPOINT=served.endpoint)
        assert served.stalled.wait(timeout=30)
        process.kill()
        process.communicate()
    assert (stage.models / "some-tagger" / "preprocess.json").is_file()


def test_repository_that_the_hub_does_not_have_is_named(stage, photographs, tiny):
    photographs["coffee"].save(stage.images / "a.png")
    with hub(tiny) as served:
        ended = stage.run_process(CAPTION_MODEL="someone/else", HF_HUB_OFFLINE=0, HF_ENDPOINT=served.endpoint)
    assert ended.returncode == 5
    assert "someone/else is not in" in ended.stderr
    assert "no such repository" in ended.stderr
