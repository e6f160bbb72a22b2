"""`docker compose run loracat` on the demo environment: flags, overrides, owners of files, and the preflight check."""

import os
import re

import pytest
from container_clone import IMAGE, MOUNTED, OWNER, docker
from safetensors import safe_open

pytestmark = [pytest.mark.container, pytest.mark.timeout(1200)]

only_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can change the owner of files")
LINES_OF_A_SCREEN = 24


def rank_of(lora) -> str:
    with safe_open(lora, framework="numpy") as file:
        return file.metadata()["ss_network_dim"]


def test_whole_pipeline_by_its_flags(clone):
    before = clone.files()
    collected = clone.run("--collect")
    assert collected.returncode == 0, collected.stdout
    assert len(clone.files("dataset/images")) == 10
    assert not clone.files("output/lora")

    trained = clone.run("--train", "--caption", LORA_RANK="2")
    assert trained.returncode == 0, trained.stdout
    assert "LORA_RANK" in trained.stdout.upper()
    assert rank_of(clone.lora) == "2"
    assert len(clone.files("dataset/images")) == 20

    whole = clone.run()
    assert whole.returncode == 0, whole.stdout
    assert rank_of(clone.lora) == "4"
    assert "moved the earlier LoRA demo_person to /app/output/lora/archive" in whole.stdout

    again = clone.run()
    assert again.returncode == 0, again.stdout
    assert "nothing was sent" in again.stdout
    assert again.stdout.count("nothing to do") == 2

    created = set(clone.files()) - set(before)
    assert {name.split("/")[0] for name in created} == {"dataset", "output"}
    assert {name.split("/")[1] for name in created if name.startswith("output")} <= {"lora", "cache", "state", "report.html"}
    assert clone.owners() == {OWNER}
    assert set(before) <= set(clone.files())


def test_missing_files_do_not_become_folders(clone):
    for name in ("face_reference.png", "prompts.json"):
        (clone.folder / name).unlink()
    refused = clone.run("--collect")
    assert refused.returncode == 2
    assert "/app/prompts.json" in refused.stdout
    (clone.folder / "workflow_api.json").unlink()
    refused = clone.run("--collect")
    assert refused.returncode == 2
    assert "/app/workflow_api.json" in refused.stdout
    assert not [name for name in ("face_reference.png", "prompts.json", "workflow_api.json") if (clone.folder / name).exists()]


def test_without_a_face_the_workflow_keeps_its_own_image(clone, comfyui):
    (clone.folder / "face_reference.png").rename(comfyui.folder / "input" / "example.png")
    collected = clone.run("--collect")
    assert collected.returncode == 0, collected.stdout
    assert "the workflow's own image is used" in collected.stdout
    assert not (clone.folder / "face_reference.png").exists()


def test_settings_file_is_read_without_a_rebuild(clone):
    file = clone.folder / "config" / "training_config.toml"
    file.write_text(
        file.read_text(encoding="utf-8").replace("# caption_batch_size = 8", "caption_batch_size = 0"), encoding="utf-8"
    )
    refused = clone.run("--caption", CAPTION_BATCH_SIZE="")
    assert refused.returncode == 2
    assert "caption_batch_size (training_config.toml): 0 must be at least 1" in refused.stdout
    assert clone.run("--captions").returncode == 2


@only_root
def test_user_option_sets_the_owner_of_the_files(clone):
    clone.folder.chmod(0o700)
    refused = clone.run("--collect", options=("--user", "4321:4321"))
    assert refused.returncode == 2
    assert "user 4321 cannot read" in refused.stdout
    clone.folder.chmod(0o755)
    clone.give_to(4321, *MOUNTED)
    ran = clone.run("--collect", "--caption", options=("--user", "4321:4321"))
    assert ran.returncode == 0, ran.stdout
    assert clone.owners() == {4321}


@only_root
def test_root_writes_to_folders_that_root_owns(clone):
    clone.give_to(0, *MOUNTED)
    assert clone.run("--collect", "--caption").returncode == 0
    assert clone.owners() == {0}


@only_root
def test_folder_of_another_user_is_reported_with_its_remedy(clone):
    clone.give_to(0, "output")
    refused = clone.run("--collect")
    assert refused.returncode == 6
    assert f"sudo chown -R {OWNER}:{OWNER} output" in refused.stdout


def test_check_passes_on_a_clone_that_is_ready(clone):
    checked = clone.run("--check", "--collect")
    assert checked.returncode == 0, checked.stdout
    assert clone.run("--collect", "--caption").returncode == 0
    checked = clone.run("--check")
    assert checked.returncode == 0, checked.stdout
    assert len(findings(checked.stdout)) <= LINES_OF_A_SCREEN, checked.stdout
    for word in ("torch", "CPU", "GiB", "tiny-sdxl", "tiny-tagger", "training samples", "ComfyUI"):
        assert word in checked.stdout


def test_check_lists_everything_that_is_wrong_with_its_remedy(clone, comfyui):
    comfyui.stop()
    comfyui.stop = lambda: None
    checked = clone.run("--check", BASE_MODEL="absent", CAPTION_MODEL="absent")
    assert checked.returncode == 4, checked.stdout
    for words in ("--listen 0.0.0.0", "base model 'absent'", "images: 0 so far"):
        assert words in checked.stdout
    assert len(findings(checked.stdout)) <= LINES_OF_A_SCREEN, checked.stdout


def findings(check: str) -> list[str]:
    """The lines of `--check` without headings and the lists of what the user has set."""
    others = re.compile(r"  \w+ = .*  \(.+\)|Checking .*:|overridden settings:.*")
    return [line for line in check.splitlines() if not others.fullmatch(line)]


def test_caches_and_compiler_are_in_lasting_places(clone, tmp_path):
    """The environment of the stages: caches in the mounted folder, and the base image's ptxas if it has one."""
    (clone.folder / "scripts" / "run.sh").write_text("env\n", encoding="utf-8")
    ptxas = tmp_path / "ptxas"
    ptxas.touch(mode=0o755)
    seen = clone.run(options=("-v", f"{ptxas}:/usr/local/cuda/bin/ptxas:ro"), WANDB_API_KEY="").stdout.splitlines()
    for name, folder in {
        "HOME": "home",
        "HF_HOME": "huggingface",
        "MPLCONFIGDIR": "matplotlib",
        "TRITON_CACHE_DIR": "triton",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
    }.items():
        assert f"{name}=/app/output/cache/{folder}" in seen
        assert (clone.folder / "output" / "cache" / folder).stat().st_uid == OWNER
    assert "TRITON_PTXAS_PATH=/usr/local/cuda/bin/ptxas" in seen
    assert "TRITON_PTXAS_BLACKWELL_PATH=/usr/local/cuda/bin/ptxas" in seen
    assert "WANDB_API_KEY=" in seen


def test_hub_command_runs_as_the_same_user(clone):
    refused = clone.run("hf", "download", "nobody/nothing", "--local-dir", "models/nothing", options=("-e", "HF_HUB_OFFLINE=1"))
    assert refused.returncode != 0
    assert "nothing" in refused.stdout
    assert clone.run("hf", "version").returncode == 0
    assert clone.owners() == {OWNER}


def test_image_runs_without_a_clone(image):
    assert "Usage: run.sh" in docker("run", "--rm", IMAGE, "--help")
    assert "no images" in docker("run", "--rm", IMAGE, "--caption", check=False)
