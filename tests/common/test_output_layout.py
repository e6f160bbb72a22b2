"""The files of a run stay together: under other names, in the archive, after kills; a LoRA with a wrong bit is not finished."""

import json
import os
from pathlib import Path

import pytest
import tomli_w

from common.output_layout import OutputLayout
from common.settings import REPOSITORY
from common.weights import read_header

FINISHED = REPOSITORY / "tests" / "data" / "first_version" / "finished" / "lora" / "demo_person.safetensors"


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def train(output: Path, name: str, label: str, *, resumes: bool = False, is_finished: bool = True) -> OutputLayout:
    """Leave the files of a run as training does; `label` stands for their content. One that is not finished has only a state."""
    outputs = OutputLayout(output, name)
    outputs.begin(resumes=resumes)
    write(outputs.resolved_config, tomli_w.dumps({"train": {"saving": {"output_name": name}}, "label": label}))
    with outputs.metrics.open("a") as metrics:
        metrics.write(f"{label}\n")
    write(outputs.logs / name / "events", label)
    write(outputs.samples / "000001.webp", label)
    write(outputs.state / "step-000000004.json", label)
    if is_finished:
        write(outputs.lora_after(1), label)
        write(outputs.best, label)
        write(outputs.recommended, label)
        write(outputs.workflow, label)
        write(outputs.lora, label)
    return outputs


def contents(folder: Path) -> dict[str, str]:
    """Relative path -> what is in the file; of settings only the label."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    texts = {path.relative_to(folder).as_posix(): path.read_text() for path in files}
    return {name: text.rpartition('label = "')[2].partition('"')[0] if "label" in text else text for name, text in texts.items()}


def archived(outputs: OutputLayout) -> list[dict[str, str]]:
    return [contents(folder) for folder in sorted(outputs.archive.iterdir())] if outputs.archive.exists() else []


def whole_run(name: str, label: str, prefix: str = "") -> dict[str, str]:
    """What the archive holds of a finished run."""
    loras = {f"{name}{suffix}.safetensors": label for suffix in ("", "-best", "-recommended", "-000001")}
    loras[f"{name}.workflow.json"] = label
    described = {f"{prefix}metrics.jsonl": f"{label}\n", f"{prefix}training_config_resolved.toml": label}
    return loras | described | {"state/step-000000004.json": label, "logs/events": label, "samples/000001.webp": label}


def test_a_new_run_archives_everything_of_the_one_before(tmp_path, capsys):
    train(tmp_path, "one", "first")
    outputs = train(tmp_path, "one", "second")
    assert archived(outputs) == [whole_run("one", "first")]
    assert f"moved the earlier LoRA one to {next(outputs.archive.iterdir())}\n" == capsys.readouterr().out
    assert outputs.metrics.read_text() == "second\n"
    assert contents(tmp_path / "state") == {"one/step-000000004.json": "second"}
    assert contents(tmp_path / "logs") == {"one/events": "second"}


def test_two_names_in_turn_keep_their_own_metrics_and_settings(tmp_path):
    train(tmp_path, "one", "first")
    train(tmp_path, "two", "other")
    lora = tmp_path / "lora"
    assert contents(lora).items() >= {"one.metrics.jsonl": "first\n", "one.training_config_resolved.toml": "first"}.items()
    outputs = train(tmp_path, "one", "second")
    assert archived(outputs) == [whole_run("one", "first", "one.")]
    left = contents(lora)
    assert (left["metrics.jsonl"], left["two.metrics.jsonl"]) == ("second\n", "other\n")
    assert "one.metrics.jsonl" not in left
    assert (left["two.safetensors"], left["one.safetensors"]) == ("other", "second")


def test_a_run_that_resumes_after_another_gets_its_files_back(tmp_path):
    train(tmp_path, "one", "first", is_finished=False)
    train(tmp_path, "two", "other")
    outputs = train(tmp_path, "one", "goes on", resumes=True)
    assert outputs.metrics.read_text() == "first\ngoes on\n"
    left = contents(tmp_path / "lora")
    assert left["two.metrics.jsonl"] == "other\n"
    assert left["two.training_config_resolved.toml"] == "other"
    assert not {"one.metrics.jsonl", "one.training_config_resolved.toml"} & left.keys()
    assert archived(outputs) == []


def test_an_interrupted_run_is_archived_with_its_checkpoints(tmp_path, capsys):
    train(tmp_path, "one", "first", is_finished=False)
    outputs = train(tmp_path, "one", "second")
    kept = whole_run("one", "first")
    assert archived(outputs) == [{name: text for name, text in kept.items() if not name.startswith("one")}]
    assert "moved the earlier run one to " in capsys.readouterr().out


def test_a_run_that_ended_before_its_first_checkpoint_is_not_archived(tmp_path):
    outputs = OutputLayout(tmp_path, "one")
    write(outputs.metrics, "first\n")
    outputs.begin(resumes=False)
    assert archived(outputs) == []


def test_a_finished_run_that_is_extended_archives_its_loras_with_copies_of_what_describes_them(tmp_path):
    train(tmp_path, "one", "first")
    outputs = train(tmp_path, "one", "longer", resumes=True)
    kept = whole_run("one", "first")
    loras = ("one.safetensors", "one-best.safetensors", "one-recommended.safetensors", "one.workflow.json")
    expected = (*loras, "metrics.jsonl", "training_config_resolved.toml")
    assert archived(outputs) == [{name: kept[name] for name in expected}]
    assert outputs.metrics.read_text() == "first\nlonger\n"


def test_a_run_that_was_killed_before_its_lora_was_written_overwrites_the_recommended_one(tmp_path):
    outputs = train(tmp_path, "one", "first")
    outputs.lora.unlink()
    train(tmp_path, "one", "goes on", resumes=True)
    assert archived(outputs) == []
    assert outputs.recommended.read_text() == "goes on"


@pytest.mark.parametrize("resumes", [False, True])
def test_metrics_that_the_first_version_left_of_an_archived_run_go_to_the_archive(tmp_path, resumes):
    outputs = train(tmp_path, "one", "second")
    write(tmp_path / "lora" / "one.metrics.jsonl", "first\n")
    write(tmp_path / "lora" / "one.metrics.jsonl-2", "before it\n")
    outputs.begin(resumes=resumes)
    (kept,) = archived(outputs)
    assert kept["one.metrics.jsonl"] == "first\n"
    assert not (tmp_path / "lora" / "one.metrics.jsonl").exists()
    assert kept["metrics.jsonl"] == "second\n"
    assert resumes == outputs.metrics.exists()


def test_metrics_of_another_name_do_not_replace_what_the_first_version_left(tmp_path):
    one = train(tmp_path, "one", "second")
    write(tmp_path / "lora" / "one.metrics.jsonl", "first\n")
    train(tmp_path, "two", "other")
    assert archived(one) == [{"one.metrics.jsonl": "first\n"}]
    assert (tmp_path / "lora" / "one.metrics.jsonl").read_text() == "second\n"


def test_names_that_begin_alike_are_different_runs(tmp_path):
    train(tmp_path, "one.two", "longer name")
    train(tmp_path, "one", "first")
    outputs = train(tmp_path, "one", "second")
    assert archived(outputs) == [whole_run("one", "first")]
    assert contents(tmp_path / "lora")["one.two.metrics.jsonl"] == "longer name\n"


def test_a_run_that_is_called_like_a_file_of_another_keeps_its_lora(tmp_path):
    def lora_of(name: str) -> str:
        header = json.dumps({"__metadata__": {"loracat_fingerprint": "x", "ss_output_name": name}})
        return len(header).to_bytes(8, "little").decode() + header

    outputs = OutputLayout(tmp_path, "one")
    write(outputs.lora, lora_of("one"))
    write(outputs.lora_after(240115), lora_of("one-240115"))
    write(outputs.best, lora_of("one-best"))
    write(outputs.recommended, lora_of("one-recommended"))
    outputs.begin(resumes=False)
    assert [path.name for path in outputs.lora_dir.iterdir() if path.is_file()] == ["one-240115.safetensors"]
    best, recommended, own = sorted(outputs.archive.iterdir(), key=lambda folder: ("-2" in folder.name[:5], folder.name))
    for folder, name in ((own, "one"), (best, "one-best"), (recommended, "one-recommended")):
        assert [path.name for path in folder.iterdir()] == [f"{name}.safetensors"]
        assert folder.name.startswith(f"{name}-2")


def test_a_lora_is_finished_only_with_the_hash_in_its_header(tmp_path, capsys):
    outputs = OutputLayout(tmp_path, "demo_person")
    outputs.lora_dir.mkdir()
    content = FINISHED.read_bytes()
    outputs.lora.write_bytes(content)
    fingerprint = read_header(outputs.lora).metadata["loracat_fingerprint"]
    assert outputs.is_finished(fingerprint)
    outputs.lora.write_bytes(content[:-1] + bytes([content[-1] ^ 0x40]))
    assert not outputs.is_finished("another run")
    assert capsys.readouterr().out == ""
    assert not outputs.is_finished(fingerprint)
    assert f"{outputs.lora} is damaged" in capsys.readouterr().out


def test_leftovers_are_removed_in_every_folder_of_the_output(tmp_path):
    outputs = train(tmp_path, "one", "first")
    kept = contents(tmp_path)
    folders = (".", "lora", "state", "state/one", "state/two", "cache", "cache/latents", "cache/text", "samples/one/.latents")
    for folder in folders:
        for name in (".abcd1234.part", ".tmpAbC123"):
            write(tmp_path / folder / name, "half")
    write(tmp_path / "lora" / ".hidden", json.dumps("the user's"))
    outputs.remove_leftovers()
    assert contents(tmp_path) == kept | {"lora/.hidden": '"the user\'s"'}
    assert os.path.isdir(tmp_path / "state" / "two")


def test_saved_loras_are_found_under_a_name_with_wildcards(tmp_path):
    outputs = OutputLayout(tmp_path, "one[12]*")
    outputs.lora_dir.mkdir()
    for epoch in (10, 5):
        outputs.lora_after(epoch).touch()
    OutputLayout(tmp_path, "one1").lora_after(5).touch()
    outputs.best.touch()
    assert outputs.saved_loras() == [outputs.lora_after(5), outputs.lora_after(10)]
