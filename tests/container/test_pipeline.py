"""`docker compose run loracat` on the demo environment: flags, overrides, who owns the files, and what a doctor says."""

import os

import pytest
from container_clone import IMAGE, MOUNTED, OWNER, docker
from safetensors import safe_open

pytestmark = [pytest.mark.container, pytest.mark.timeout(1200)]

only_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give files to other users")
A_SCREEN = 24


def rank_of(lora) -> str:
    with safe_open(lora, framework="numpy") as file:
        return file.metadata()["ss_network_dim"]


def test_whole_pipeline_by_its_flags(clone):
    brought = clone.files()
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
    assert "moved to /app/output/lora/archive" in whole.stdout

    again = clone.run()
    assert again.returncode == 0, again.stdout
    assert "nothing was sent" in again.stdout
    assert again.stdout.count("nothing to do") == 2

    made = set(clone.files()) - set(brought)
    assert {name.split("/")[0] for name in made} == {"dataset", "output"}
    assert {name.split("/")[1] for name in made if name.startswith("output")} <= {"lora", "cache", "state"}
    assert clone.owners() == {OWNER}
    assert set(brought) <= set(clone.files())


def test_missing_files_are_no_folders(clone):
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


def test_face_that_is_missing_leaves_the_workflows_own_image(clone, comfyui):
    (clone.folder / "face_reference.png").rename(comfyui.folder / "input" / "example.png")
    collected = clone.run("--collect")
    assert collected.returncode == 0, collected.stdout
    assert "the workflow's own image stays" in collected.stdout
    assert not (clone.folder / "face_reference.png").exists()


def test_settings_of_the_file_hold_without_a_rebuild(clone):
    file = clone.folder / "config" / "training_config.toml"
    file.write_text(file.read_text(encoding="utf-8").replace("caption_batch_size = 8", "caption_batch_size = 0"), encoding="utf-8")
    refused = clone.run("--caption", CAPTION_BATCH_SIZE="")
    assert refused.returncode == 2
    assert "caption_batch_size (training_config.toml): 0 must be at least 1" in refused.stdout
    assert clone.run("--captions").returncode == 2


@only_root
def test_user_option_decides_who_owns_the_files(clone):
    clone.folder.chmod(0o700)
    refused = clone.run("--collect", options=("--user", "4321:4321"))
    assert refused.returncode == 2
    assert "user 4321 may not read" in refused.stdout
    clone.folder.chmod(0o755)
    clone.give_to(4321, *MOUNTED)
    ran = clone.run("--collect", "--caption", options=("--user", "4321:4321"))
    assert ran.returncode == 0, ran.stdout
    assert clone.owners() == {4321}


@only_root
def test_folders_of_root_are_written_by_root(clone):
    clone.give_to(0, *MOUNTED)
    assert clone.run("--collect", "--caption").returncode == 0
    assert clone.owners() == {0}


@only_root
def test_folder_of_somebody_else_is_said_with_its_remedy(clone):
    clone.give_to(0, "output")
    refused = clone.run("--collect")
    assert refused.returncode == 6
    assert f"sudo chown -R {OWNER}:{OWNER} output" in refused.stdout


def test_doctor_finds_nothing_wrong_with_a_clone_that_is_ready(clone):
    checked = clone.run("--check", "--collect")
    assert checked.returncode == 0, checked.stdout
    assert clone.run("--collect", "--caption").returncode == 0
    checked = clone.run("--check")
    assert checked.returncode == 0, checked.stdout
    lines = checked.stdout.splitlines()
    assert len(lines) <= A_SCREEN, checked.stdout
    for word in ("torch", "CPU", "GiB", "tiny-sdxl", "tiny-tagger", "image-steps", "ComfyUI"):
        assert word in checked.stdout


def test_doctor_names_everything_that_is_wrong_with_its_remedy(clone, comfyui):
    comfyui.stop()
    comfyui.stop = lambda: None
    checked = clone.run("--check", BASE_MODEL="absent", CAPTION_MODEL="absent")
    assert checked.returncode == 4, checked.stdout
    for words in ("--listen 0.0.0.0", "base model 'absent'", "0 images so far"):
        assert words in checked.stdout
    assert len(checked.stdout.splitlines()) <= A_SCREEN, checked.stdout


def test_caches_and_compiler_are_where_they_last(clone, tmp_path):
    """What the stages see of the environment: caches in the mounted folder, and the base's ptxas if it has one."""
    (clone.folder / "scripts" / "run.sh").write_text("env\n", encoding="utf-8")
    ptxas = tmp_path / "ptxas"
    ptxas.touch(mode=0o755)
    seen = clone.run(options=("-v", f"{ptxas}:/usr/local/cuda/bin/ptxas:ro"), WANDB_API_KEY="").stdout.splitlines()
    for name, place in {
        "HOME": "home",
        "HF_HOME": "huggingface",
        "MPLCONFIGDIR": "matplotlib",
        "TRITON_CACHE_DIR": "triton",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
    }.items():
        assert f"{name}=/app/output/cache/{place}" in seen
        assert (clone.folder / "output" / "cache" / place).stat().st_uid == OWNER
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
