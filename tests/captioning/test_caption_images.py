"""The caption stage as a user runs it: what it writes, what it leaves alone, and how it ends."""

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import tempfile
import termios
import time
from pathlib import Path

import pytest

from captioning import journal
from captioning.captions import caption_text
from captioning.journal import CaptionFiles
from common import files
from common.dataset_layout import DatasetFolder
from common.files import locked
from demo import tiny_tagger
from demo.tiny_tagger import Shape


def save(photographs, folder, **places):
    """Save photographs under relative paths: `save(..., coffee="a.png", chelsea="3_cats/b.png")`."""
    for name, place in places.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        photographs[name].save(folder / place, compress_level=0)  # a PNG takes longer to write than its caption


def state_of(folder):
    """Relative path -> bytes and time of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_every_image_gets_a_caption_with_the_trigger_first_and_a_second_run_changes_nothing(stage, photographs, tiny, tmp_path):
    tagger = Path(shutil.copytree(tiny, tmp_path / "tagger"))
    save(photographs, stage.images, astronaut="a.png", coffee="b.webp", rocket="c.JPG", chelsea="3_cats/d.bmp")
    ended = stage.run_process(CAPTION_MODEL=tagger)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "4 captioned, trigger word nyafyi_woman added to 0, 0 unchanged" in ended.stdout
    captions = stage.captions()
    assert list(captions) == ["3_cats/d.txt", "a.txt", "b.txt", "c.txt"]
    for text in captions.values():
        first, *tags = text.strip().split(", ")
        assert first == "nyafyi_woman"
        assert len(tags) >= 5
        assert "nyafyi_woman" not in tags
        assert not {"general", "sensitive", "hatsune miku"} & set(tags)
    before = state_of(stage.images.parent)
    assert sum("/thumbnails/" in name for name in before) == 4
    assert {name for name in before if not re.search("/(tags|thumbnails)/", name)} == {
        *(f"images/{name}" for name in ("a.png", "b.webp", "c.JPG", "3_cats/d.bmp", *captions)),
        *(f".loracat/{name}" for name in ("captions.jsonl", "pictures.json", "audit.json", "traits.json")),
    }
    assert len(stage.stored()) == 4
    tagger.rename(tmp_path / "gone")  # the model is not needed when every image is cached
    again = stage.run_process(CAPTION_MODEL=tagger)
    assert (again.returncode, again.stderr) == (0, "")
    assert "nothing to do: all 4 captions are up to date" in again.stdout
    assert state_of(stage.images.parent) == before


def test_settings_reach_the_captions(stage, photographs):
    save(photographs, stage.images, astronaut="a.png")
    stage.run()
    tags = stage.captions()["a.txt"].strip().split(", ")[1:]
    variables = {"CAPTION_OVERWRITE": 1, "CAPTION_BATCH_SIZE": 1, "TRIGGER_WORD": "sks"}
    stage.run(CAPTION_THRESHOLD=0.2, CAPTION_EXCLUDE_TAGS=f"{tags[0].replace(' ', '_')}, >_<", **variables)
    more = stage.captions()["a.txt"].strip().split(", ")
    assert more[0] == "sks"
    assert set(tags) - {tags[0], ">_<"} < set(more)
    assert not {tags[0], ">_<"} & set(more)
    stage.run(CAPTION_CHARACTER_TAGS=1, CAPTION_CHARACTER_THRESHOLD=0.01, **variables)
    assert "hatsune miku" in stage.captions()["a.txt"]
    stage.run(CAPTION_THRESHOLD=1, **variables)
    assert stage.captions() == {"a.txt": "sks\n"}


def test_captions_that_the_user_wrote_keep_their_text_and_gain_the_trigger(stage, photographs):
    save(photographs, stage.images, astronaut="a.png", coffee="b.png", chelsea="c.png", rocket="d.png")
    (stage.images / "a.txt").write_bytes("an astronaut, höher\r\n".encode())
    (stage.images / "b.txt").write_text("a photo of nyafyi_woman with coffee")
    (stage.images / "c.txt").write_bytes(b"\xef\xbb\xbfa cat")
    (stage.images / "d.txt").write_text("")
    ended = stage.run(CAPTION_MODEL="someone/absent")
    assert "0 captioned, trigger word nyafyi_woman added to 3, 1 unchanged" in ended.stdout
    assert (stage.images / "a.txt").read_bytes() == "nyafyi_woman, an astronaut, höher\r\n".encode()
    assert stage.captions() | {"a.txt": ""} == {
        "a.txt": "",
        "b.txt": "a photo of nyafyi_woman with coffee",
        "c.txt": "nyafyi_woman, a cat",
        "d.txt": "nyafyi_woman\n",
    }


def test_new_trigger_replaces_the_one_of_earlier_runs_and_nothing_that_the_user_wrote(stage, photographs):
    save(photographs, stage.images, astronaut="a.png", coffee="b.png", chelsea="c.png", rocket="d.png")
    (stage.images / "b.txt").write_text("a cup of coffee")
    (stage.images / "c.txt").write_text("nyafyi_woman, a cat")
    stage.run()
    tags = stage.captions()["a.txt"].strip().removeprefix("nyafyi_woman, ")
    edited = stage.captions()["d.txt"].strip() + ", a thing I added"
    (stage.images / "d.txt").write_text(edited)
    ended = stage.run(TRIGGER_WORD="sks person")
    assert "1 captioned, trigger word sks person added to 3, 0 unchanged" in ended.stdout
    assert stage.captions() == {
        "a.txt": f"sks person, {tags}\n",
        "b.txt": "sks person, a cup of coffee",
        "c.txt": "sks person, nyafyi_woman, a cat",
        "d.txt": edited.replace("nyafyi_woman", "sks person"),
    }
    stage.run()
    assert stage.captions() == {
        "a.txt": f"nyafyi_woman, {tags}\n",
        "b.txt": "nyafyi_woman, a cup of coffee",
        "c.txt": "nyafyi_woman, a cat",
        "d.txt": edited,
    }


def test_trigger_that_is_also_a_tag_comes_and_goes_without_a_trace(stage, photographs):
    save(photographs, stage.images, astronaut="a.png")
    stage.run()
    before = stage.captions()["a.txt"]
    assert ", 1girl," in before
    stage.run(TRIGGER_WORD="1girl")
    assert stage.captions()["a.txt"] == before.replace(", 1girl,", ",").replace("nyafyi_woman", "1girl")
    stage.run()
    assert stage.captions()["a.txt"] == before


def test_overwrite_tags_again(stage, photographs):
    save(photographs, stage.images, astronaut="a.png", coffee="b.png")
    stage.run()
    before = stage.captions()
    (stage.images / "a.txt").write_text("my own words")
    (stage.images / "b.txt").write_bytes(b"\xff\xfe")
    assert "2 captioned" in stage.run(CAPTION_OVERWRITE=1).stdout
    assert stage.captions() == before


def test_broken_images_are_named_and_the_others_done(stage, photographs):
    save(photographs, stage.images, astronaut="a.png", coffee="e.png")
    whole = (stage.images / "e.png").read_bytes()
    (stage.images / "b.png").write_bytes(whole[:20000])
    (stage.images / "c.jpg").write_bytes(b"")
    (stage.images / "d.webp").write_text("not an image")
    for run in (stage.run_process, stage.run):
        ended = run()
        assert ended.returncode == 1
        for name in ("b.png", "c.jpg", "d.webp"):
            assert ended.stderr.count(f"{name}: ") == 1
        assert "3 failed" in ended.stderr
        assert list(stage.captions()) == ["a.txt", "e.txt"]
    assert "2 unchanged" in ended.stderr


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_caption_that_is_not_a_file_is_named_and_not_opened(stage, photographs, make):
    save(photographs, stage.images, astronaut="a.png", coffee="b.png")
    make(stage.images / "a.txt")
    ended = stage.run()
    assert ended.returncode == 1
    assert "a.txt: is not a file; rename it" in ended.stderr
    assert "1 captioned" in ended.stderr


def test_a_caption_that_is_a_broken_link_is_named_and_kept(stage, photographs, tmp_path):
    save(photographs, stage.images, astronaut="a.png", coffee="b.png")
    absent = tmp_path / "not mounted" / "b.txt"
    (stage.images / "b.txt").symlink_to(absent)
    for variables in ({}, {"CAPTION_OVERWRITE": 1}):
        ended = stage.run(**variables)
        assert ended.returncode == 1
        assert "b.txt: is a link to a file that does not exist; restore that file or remove the link" in ended.stderr
        assert (stage.images / "b.txt").readlink() == absent
        assert not absent.exists()
    assert (stage.images / "a.txt").is_file()


def test_caption_that_is_not_utf8_is_named_and_left_untouched(stage, photographs):
    save(photographs, stage.images, astronaut="a.png", coffee="b.png", chelsea="c.png")
    (stage.images / "a.txt").write_bytes("höher".encode("latin-1"))
    (stage.images / "c.txt").mkdir()
    ended = stage.run()
    assert ended.returncode == 1
    assert "a.txt: is not UTF-8; save it as UTF-8" in ended.stderr
    assert "c.txt: is not a file" in ended.stderr
    assert "1 captioned" in ended.stderr
    assert (stage.images / "a.txt").read_bytes() == "höher".encode("latin-1")


def test_images_that_would_share_a_caption_are_named_and_the_first_gets_it(stage, photographs):
    save(photographs, stage.images, astronaut="a.jpg", coffee="a.png", chelsea="b.png")
    for expected in ("2 captioned", "0 captioned"):
        ended = stage.run()
        assert ended.returncode == 1
        assert "a.png: would share a.txt with a.jpg; rename one of the two images" in ended.stderr
        assert expected in ended.stderr


def test_names_in_any_script_are_fine(stage, photographs):
    save(photographs, stage.images, astronaut="猫 и кот.png", coffee="a.b (1).png")
    assert stage.run().returncode == 0
    assert set(stage.captions()) == {"猫 и кот.txt", "a.b (1).txt"}
    assert stage.run(TRIGGER_WORD="sks").returncode == 0
    assert all(text.startswith("sks, ") for text in stage.captions().values())


def test_damaged_record_loses_only_its_damaged_lines(stage, photographs):
    save(photographs, stage.images, astronaut="a.png")
    stage.run()
    stage.record.write_bytes(stage.record.read_bytes()[:-40] + b'\n[1]\n{"other": 1}\nnull\n')
    assert stage.run().returncode == 0
    assert stage.run(TRIGGER_WORD="sks").returncode == 0
    assert stage.captions()["a.txt"].startswith("sks, nyafyi_woman, ")


@pytest.mark.parametrize(
    ("variables", "code", "message"),
    [
        ({}, 3, "no images"),
        ({"DATASET_DIR": "/nowhere"}, 3, "/nowhere/images: no images"),
        ({"CAPTION_BATCH_SIZE": "many"}, 2, "must be a whole number"),
        ({"CAPTION_THRESHOLD": "1.5"}, 2, "caption_threshold"),
        ({"TRIGGER_WORD": "two, words"}, 2, "must be one tag"),
    ],
)
def test_unusable_input_ends_with_its_exit_code_and_no_traceback(stage, variables, code, message):
    ended = stage.run_process(**variables)
    assert ended.returncode == code
    assert message in ended.stderr


def test_unknown_flag_is_refused(stage):
    assert stage.run("--bogus").returncode == 2


@pytest.mark.parametrize("shape", [Shape(extra_outputs=1), Shape(logits=True)])
def test_unusable_model_is_exit_5_and_no_caption_is_written(stage, photographs, tmp_path, shape):
    save(photographs, stage.images, astronaut="a.png")
    ended = stage.run(CAPTION_MODEL=tiny_tagger.build(tmp_path / "wrong", shape=shape))
    assert ended.returncode == 5
    assert stage.captions() == {}


def test_check_lists_everything_that_is_wrong_and_changes_nothing(stage, photographs, tmp_path):
    broken = tiny_tagger.build(tmp_path / "broken")
    (broken / "model.onnx").write_bytes(b"nothing")
    ended = stage.run("--check", CAPTION_MODEL=broken)
    assert ended.returncode == 3
    assert ended.stderr.count("\n  - ") == 2
    assert "no images" in ended.stderr
    assert "not an ONNX model" in ended.stderr
    save(photographs, stage.images, astronaut="a.png")
    before = state_of(tmp_path)
    ended = stage.run("--check")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert state_of(tmp_path) == before


@contextlib.contextmanager
def without_roots_rights():
    """Within it, permissions count even if the tests run as root."""
    is_root = os.geteuid() == 0
    if is_root:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        if is_root:
            os.setresuid(0, 0, 0)


def test_read_only_folder_is_exit_6_and_check_names_it(photographs, tiny, stage_in):
    with tempfile.TemporaryDirectory() as workspace:
        tagger = Path(shutil.copytree(tiny, Path(workspace) / "tagger"))
        Path(workspace).chmod(0o755)
        tagger.chmod(0o755)
        stage = stage_in(Path(workspace), tagger)
        save(photographs, stage.images, astronaut="a.png")
        assert stage.run().returncode == 0
        (stage.images / "a.txt").unlink()
        stage.images.chmod(0o555)
        with without_roots_rights():
            checked, ended = stage.run("--check"), stage.run()
        stage.images.chmod(0o755)
        assert (checked.returncode, ended.returncode) == (6, 6)
        assert "captions cannot be written: " in checked.stderr
        assert f"{stage.images} cannot be written to; make it writable" in checked.stderr
        assert "make the folder writable" in ended.stderr
        assert stage.captions() == {}
        tagger.chmod(0)
        with without_roots_rights():
            checked = stage.run("--check")
        assert checked.returncode == 6
        assert f"  - {tagger}/selected_tags.csv: Permission denied" in checked.stderr


def test_captions_that_may_not_be_read_are_named_and_left_alone(photographs, tiny, stage_in):
    with tempfile.TemporaryDirectory() as workspace:
        Path(workspace).chmod(0o777)
        tagger = Path(shutil.copytree(tiny, Path(workspace) / "tagger"))
        tagger.chmod(0o755)
        with without_roots_rights():
            stage = stage_in(Path(workspace), tagger)
            save(photographs, stage.images, astronaut="a.png", coffee="b.png")
            (stage.images / "b.txt").write_text("mine")
            assert stage.run().returncode == 0
            before = stage.captions()
            for path in stage.images.glob("*.txt"):
                path.chmod(0)
            for variables in ({}, {"CAPTION_OVERWRITE": 1, "TRIGGER_WORD": "sks"}):
                ended = stage.run(**variables)
                assert ended.returncode == 1
                for name in ("a.txt", "b.txt"):
                    assert f"{name}: may not be read by this user; change its permissions" in ended.stderr
            undone = stage.run("--undo")
            assert undone.returncode == 3
            assert "a caption may not be read by this user; change its permissions, then undo again" in undone.stderr
            for path in stage.images.glob("*.txt"):
                path.chmod(0o644)
            assert stage.captions() == before
            stage.run("--undo")
            assert stage.captions() == {"b.txt": "mine"}


def test_progress_is_shown_in_a_terminal_only(stage, photographs):
    save(photographs, stage.images, astronaut="a.png")
    assert stage.run().stderr == ""
    shutil.rmtree(stage.record.parent)
    (stage.images / "a.txt").unlink()
    terminal, end = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    process = stage.start(stderr=end)
    process.communicate()
    os.close(end)
    assert process.returncode == 0
    assert "tagging: 100%" in os.read(terminal, 10000).decode()
    os.close(terminal)


def many(photographs, stage):
    small = [image.resize((300, 200)) for image in photographs.values()]
    for number in range(24):
        small[number % len(small)].rotate(number, expand=True).save(stage.images / f"{number:02}.png", compress_level=0)


def run_until(stage, stored: int, **variables):
    """Start the stage and return it when it has stored the tags of so many images."""
    process = stage.start(CAPTION_BATCH_SIZE=1, **variables)
    while len(stage.stored()) < stored and process.poll() is None:
        time.sleep(0.002)
    return process


def test_a_second_run_on_the_same_data_set_is_refused(stage):
    with locked(stage.images, ""):
        for flags in ((), ("--undo",)):
            ended = stage.run(*flags)
            assert (ended.returncode, stage.captions()) == (2, {})
            assert f"another run is captioning {stage.images}: wait for it to end" in ended.stderr
    assert not any(path.name.startswith(".lock") for path in stage.images.iterdir())


def test_killed_run_continues_and_ends_with_the_same_captions(stage, photographs):
    many(photographs, stage)
    process = run_until(stage, stored=5)
    process.kill()
    process.communicate()
    done = len(stage.stored())
    assert 5 <= done < 24
    ended = stage.run(CAPTION_BATCH_SIZE=1)
    assert f"tagging {24 - done} images" in ended.stdout
    assert "24 captioned" in ended.stdout
    interrupted = stage.captions()
    shutil.rmtree(stage.record.parent)
    for path in stage.images.glob("*.txt"):
        path.unlink()
    stage.run(CAPTION_BATCH_SIZE=1)
    assert stage.captions() == interrupted


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_stops_the_stage_with_its_code(stage, photographs, signum, code):
    many(photographs, stage)
    process = run_until(stage, stored=2)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert len(errors.splitlines()) == 1
    assert not list(stage.images.parent.rglob(".*.part"))


def test_damaged_lines_of_the_record_are_skipped(stage, photographs):
    save(photographs, stage.images, astronaut="a.png")
    stage.run()
    before = stage.captions()
    line = json.loads(stage.record.read_text())
    damages = [{"run": "1"}, {"run": None}, {"caption": ["a.txt"]}, {"trigger": {}}, {"made": "yes"}, {"before": []}, {"after": 5}]
    damages += [{"after_base64": content} for content in ("a", "====", "h\u00f6her", 5, None)]
    with stage.record.open("a") as record:
        record.writelines(json.dumps(line | {"run": 2} | damage) + "\n" for damage in damages)
    (stage.record.parent / "pictures.json").write_text("[" * 5000)
    assert "nothing to do: all 1 captions are up to date" in stage.run().stdout
    assert stage.captions() == before
    assert "run 1 is undone: 1 captions restored" in stage.run("--undo").stdout
    assert stage.captions() == {}


class KilledError(BaseException):
    """Stands for a process that ends here."""


@contextlib.contextmanager
def dying_at(moment: int):
    """Within it, the stage dies before the step `moment` of all that it writes: lines of the record, and captions."""
    steps = iter(range(1000))

    def or_dies(function):
        def act(*arguments):
            if next(steps) == moment:
                raise KilledError
            function(*arguments)

        return act

    with pytest.MonkeyPatch.context() as patched:
        for name in ("append_json_line", "write_bytes"):
            patched.setattr(journal, name, or_dies(getattr(journal, name)))
        yield


@pytest.mark.parametrize("moment", range(8))
def test_a_change_of_trigger_that_is_interrupted_anywhere_is_completed_by_the_next_run(tmp_path, moment):
    folder = DatasetFolder(tmp_path)
    made, kept = [folder.images / f"{name}.txt" for name in "ab"], [folder.images / f"{name}.txt" for name in "cd"]
    words = [["1girl"], ["new", "smile"]]
    folder.images.mkdir()

    def run(trigger) -> list[bool]:
        captions = CaptionFiles(folder, trigger)
        assert all(captions.is_generated(path) for path in made if path.exists())
        return [captions.write(path, caption_text(trigger, of_path)) for path, of_path in zip(made, words, strict=True)] + [
            captions.ensure_trigger(path) for path in kept
        ]

    for path in kept:
        path.write_text("mine")
    run("old")
    kept[1].write_text("old, mine and more")
    with dying_at(moment), pytest.raises(KilledError):
        run("new")
    assert run("new") == [number >= moment // 2 for number in range(4)]
    assert [path.read_text() for path in (*made, *kept)] == ["new, 1girl\n", "new, smile\n", "new, mine", "new, mine and more"]


@pytest.mark.parametrize("moment", range(9))
def test_undo_that_is_interrupted_anywhere_is_completed_by_the_next_one(tmp_path, moment):
    folder = DatasetFolder(tmp_path)
    paths = [folder.images / f"{name}.txt" for name in "abcd"]
    folder.images.mkdir()
    texts = [b"mine", b"h\xf6her", None, "\ufeffh\u00f6her\r\n".encode()]
    for path, text in zip(paths, texts, strict=True):
        if text is not None:
            path.write_bytes(text)
    first = CaptionFiles(folder, "sks")
    for path in paths:
        first.write(path, "sks, 1girl")
    with dying_at(moment):
        try:
            CaptionFiles(folder, "sks").undo()
        except KilledError:
            CaptionFiles(folder, "sks").undo()
    assert [path.read_bytes() if path.exists() else None for path in paths] == texts
    assert CaptionFiles(folder, "sks").undo().run == 0


def test_undo_goes_back_run_by_run_and_leaves_what_was_edited_since(stage, photographs):
    save(photographs, stage.images, astronaut="a.png", coffee="b.png", chelsea="c.png")
    (stage.images / "b.txt").write_text("my coffee")
    (stage.images / "c.txt").write_bytes("höher".encode("latin-1"))
    stage.run()
    first = stage.captions_as_bytes()
    stage.run(CAPTION_OVERWRITE=1, TRIGGER_WORD="sks")
    (stage.images / "a.txt").write_text("edited")
    assert stage.captions()["c.txt"].startswith("sks, ")
    ended = stage.run("--undo")
    assert ended.returncode == 0
    assert "run 2 is undone: 2 captions restored; 1 earlier runs can be undone" in ended.stdout
    assert "not restored, because edited after that run: a.txt" in ended.stdout
    assert stage.captions_as_bytes() == first | {"a.txt": b"edited"}
    assert "not restored, because edited after that run: a.txt" in stage.run("--undo").stdout
    assert stage.captions_as_bytes() == {"a.txt": b"edited", "b.txt": b"my coffee", "c.txt": "höher".encode("latin-1")}
    assert "nothing to undo" in stage.run("--undo").stdout


def test_undo_of_the_first_run_leaves_nothing_of_it_and_the_next_run_makes_it_again(stage, photographs):
    save(photographs, stage.images, astronaut="a.png", coffee="3_b/b.png")
    stage.run()
    before = stage.captions()
    assert "2 captions restored" in stage.run("--undo").stdout
    assert stage.captions() == {}
    assert "2 captioned" in stage.run().stdout
    assert stage.captions() == before


def test_undo_brings_back_the_record_of_traits_too(stage, photographs):
    """It says which traits the captions lack; "auto" follows the one that an earlier version left."""
    save(photographs, stage.images, astronaut="a.png", coffee="b.png")
    record = stage.images.parent / ".loracat" / "traits.json"
    stage.run()
    first = record.read_bytes()
    stage.run(CAPTION_OVERWRITE=1, CAPTION_PRUNE_TRAITS=0.5, TRIGGER_WORD="sks")
    second = record.read_bytes()
    stage.run(CAPTION_OVERWRITE=1, CAPTION_PRUNE_TRAITS=0, TRIGGER_WORD="sks", CAPTION_THRESHOLD=0.99)
    stage.run("--undo")
    assert record.read_bytes() == second != first
    stage.run("--undo")
    assert record.read_bytes() == first
    stage.run("--undo")
    assert not record.exists()
    assert "nothing to undo" in stage.run("--undo").stdout

    stage.run()
    (stage.images.parent / ".loracat" / "traits.jsonl").unlink()  # version 1.0 wrote none
    stage.run("--undo")
    assert not record.exists()


def test_undo_twice_passes_over_the_traits_of_a_run_that_was_undone(stage):
    """Run 2, a run that changes traits only and has the number 3, undo, another run 3, undo: the record of run 1 is back."""
    folder = DatasetFolder(stage.images.parent)
    folder.images.mkdir(parents=True, exist_ok=True)
    (stage.images.parent / ".loracat").mkdir(exist_ok=True)

    def run(text: str | None, before: dict | None, after: dict) -> None:
        files = CaptionFiles(folder, "sks")
        if text:
            files.write(folder.images / "a.txt", text)
        files.write_traits(before, after)

    run("one", None, {"traits": "ONE"})
    run("two", {"traits": "ONE"}, {"traits": "TWO"})
    run(None, {"traits": "TWO"}, {"traits": "only"})
    CaptionFiles(folder, "sks").undo()
    assert json.loads(folder.traits.read_text()) == {"traits": "ONE"}
    run("three", {"traits": "ONE"}, {"traits": "THREE"})
    CaptionFiles(folder, "sks").undo()
    assert json.loads(folder.traits.read_text()) == {"traits": "ONE"}


def test_a_damaged_record_of_traits_is_named_and_written_again(stage, photographs):
    save(photographs, stage.images, astronaut="a.png")
    stage.run()
    record = stage.images.parent / ".loracat" / "traits.json"
    content = record.read_bytes()
    record.write_bytes(content[: len(content) // 2])
    ended = stage.run()
    assert ended.returncode == 0
    assert ended.stdout.count(f"{record} is damaged (") == 1
    assert record.read_bytes() == content
    assert "is damaged" not in stage.run().stdout


@pytest.fixture
def uninterrupted(stage, photographs):
    """A data set of every kind of caption, and the captions after an uninterrupted run."""
    save(photographs, stage.images, astronaut="a.png", coffee="b.png", chelsea="c.png", rocket="2_d/d.png")
    (stage.images / "b.txt").write_text("my coffee")
    (stage.images / "c.txt").write_text("my nyafyi_woman")
    workspace = shutil.copytree(stage.images.parent, stage.images.parent.with_name("before"))
    stage.run()
    ended = stage.captions_as_bytes()
    shutil.rmtree(stage.images.parent)
    shutil.copytree(workspace, stage.images.parent)
    return stage, ended


@pytest.mark.parametrize("moment", range(13))
def test_death_before_any_file_that_is_written_and_a_second_run_give_the_same_captions(uninterrupted, moment):
    """`moment` counts the files that take their name and the lines of the record, whatever they are."""
    stage, expected = uninterrupted
    steps, died = iter(range(1000)), []

    def or_dies(function):
        def act(*arguments, **options):
            if next(steps) == moment:
                died.append(moment)
                raise KilledError
            function(*arguments, **options)

        return act

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(files.os, "replace", or_dies(os.replace))
        patched.setattr(journal, "append_json_line", or_dies(journal.append_json_line))
        with contextlib.suppress(KilledError):
            stage.run()
    assert died == [moment]
    assert stage.captions().get("c.txt") == "my nyafyi_woman"
    assert stage.captions().get("b.txt") in ("my coffee", "nyafyi_woman, my coffee")
    assert stage.run().returncode == 0
    assert stage.captions_as_bytes() == expected
    while "nothing to undo" not in stage.run("--undo").stdout:
        pass
    assert stage.captions() == {"b.txt": "my coffee", "c.txt": "my nyafyi_woman"}


def test_captions_with_the_suffix_in_capitals_are_captions(stage, photographs):
    save(photographs, stage.images, astronaut="A.JPG", coffee="b.png")
    (stage.images / "A.TXT").write_text("my own words")
    (stage.images / "b.Txt").write_text("Nyafyi_Woman, my coffee")
    ended = stage.run(CAPTION_MODEL="someone/absent")
    assert "0 captioned, trigger word nyafyi_woman added to 1, 1 unchanged" in ended.stdout
    assert "caption without an image" not in ended.stdout
    assert (stage.images / "A.TXT").read_text() == "nyafyi_woman, my own words"
    assert (stage.images / "b.Txt").read_text() == "Nyafyi_Woman, my coffee"
    assert stage.captions() == {}


def test_the_text_of_a_caption_file_of_kohyas_kind_is_copied_and_followed(stage, photographs):
    save(photographs, stage.images, astronaut="a.png", coffee="3_b/b.png")
    sources = [stage.images / "a.caption", stage.images / "3_b" / "b.CAPTION"]
    for source in sources:
        source.write_text("my own words")
    ended = stage.run(CAPTION_MODEL="someone/absent")
    assert ended.returncode == 0
    assert "2 captions copied to .txt files, which training reads: b.CAPTION, a.caption" in ended.stdout
    assert stage.captions() == {"3_b/b.txt": "nyafyi_woman, my own words", "a.txt": "nyafyi_woman, my own words"}
    assert all(source.read_text() == "my own words" for source in sources)
    assert "nothing to do: all 2 captions are up to date" in stage.run().stdout
    sources[0].write_text("other words")
    assert "1 captions copied" in stage.run(TRIGGER_WORD="nyafyi_woman").stdout
    assert stage.captions()["a.txt"] == "nyafyi_woman, other words"
    stage.run(TRIGGER_WORD="sks")
    assert stage.captions() == {"3_b/b.txt": "sks, my own words", "a.txt": "sks, other words"}
    sources[0].unlink()  # then the copy is all that there is of the user's words
    assert "nothing to do" in stage.run(TRIGGER_WORD="sks").stdout
    stage.run()
    assert stage.captions()["a.txt"] == "nyafyi_woman, other words"
    while "nothing to undo" not in stage.run("--undo").stdout:
        pass
    assert stage.captions() == {}


def test_of_two_captions_that_the_user_wrote_the_txt_file_is_used_and_the_other_named(stage, photographs):
    save(photographs, stage.images, astronaut="a.png")
    (stage.images / "a.txt").write_text("my own words")
    (stage.images / "a.caption").write_text("other words")
    for _ in range(2):
        assert "not used, because there is a .txt file for the same image: a.caption" in stage.run().stdout
        assert stage.captions() == {"a.txt": "nyafyi_woman, my own words"}


def test_tags_that_an_earlier_version_wrote_beside_the_users_caption_are_replaced_by_it(stage, photographs):
    save(photographs, stage.images, astronaut="a.png")
    stage.run()
    (stage.images / "a.caption").write_text("my own words")
    stage.run()
    assert stage.captions() == {"a.txt": "nyafyi_woman, my own words"}


def test_captions_that_cannot_be_used_are_named_and_unchanged(stage, photographs, tmp_path):
    names = ("long", "pipe", "link", "wide", "latin", "kohya")
    for name in names:
        save(photographs, stage.images, coffee=f"{name}.png")
    (tmp_path / "secret").write_text("secret")
    (stage.images / "long.txt").write_bytes(b"a, " * 30000)
    os.mkfifo(stage.images / "pipe.txt")
    (stage.images / "link.txt").symlink_to(tmp_path / "secret")
    (stage.images / "wide.txt").write_bytes("sks, smile".encode("utf-16-le"))
    (stage.images / "latin.TXT").write_bytes("niña".encode("latin-1"))
    (stage.images / "kohya.caption").write_bytes("niña".encode("latin-1"))
    files = {path: path.lstat().st_mtime_ns for path in stage.images.iterdir()}
    ended = stage.run(CAPTION_MODEL="someone/absent")
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == len(names) + 1
    for line in (
        "long.txt: is larger than the 64 KiB of a caption",
        "pipe.txt: is not a file",
        "link.txt: is a link to a file outside the data set",
        "wide.txt: is not UTF-8; save it as UTF-8 (it is UTF-16)",
        "latin.TXT: is not UTF-8",
        "kohya.caption: is not UTF-8",
    ):
        assert line in ended.stderr
    assert {path: path.lstat().st_mtime_ns for path in stage.images.iterdir()} == files
    assert not stage.record.exists()


def test_files_beside_an_image_that_may_be_captions_are_named(stage, photographs):
    save(photographs, stage.images, astronaut="a.png")
    for name in ("a.tags", "a.json", "a.png.txt"):
        (stage.images / name).write_text("my own words")
    output = stage.run().stdout
    assert "a.json (not a caption, which has the suffix .txt or .caption), a.tags (not a caption" in output
    assert "a.png.txt" in output


def test_a_trigger_that_is_a_tag_of_the_tagger_is_warned_about(stage, photographs):
    save(photographs, stage.images, astronaut="a.png")
    warning = "trigger_word: '1girl' is an ordinary tag"
    for flags in (("--check",), ()):
        assert warning in stage.run(*flags, TRIGGER_WORD="1girl").stdout
        assert "is an ordinary tag" not in stage.run(*flags).stdout
