"""Two real processes, through run.sh: the same losses as with one, signals, exit codes, and killed processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from process_table import children_of, pair_of

from common.errors import ResourceError, SettingsError
from common.settings import REPOSITORY
from training.callbacks.checkpoint import Checkpoint, Identity, match_global_batch
from training.config import ProcessSettings, RunSettings
from training.loop import Progress
from training.plan import GLOBAL_BATCH, WORLD_SIZE
from training.system import processes as training_processes

RUN_SH = REPOSITORY / "scripts" / "run.sh"
PAIR = {"NUM_PROCESSES": 2, "TRAIN_BATCH_SIZE": 1, "LORA_TARGETS": "attention", "PYTHON": sys.executable}


@pytest.fixture
def images(stage):
    """Five images of one shape: the last step of two has only one."""
    for number, name in enumerate(("astronaut", "coffee", "chelsea", "rocket", "astronaut")):
        stage.add(name, f"{number}.png", caption=f"sks, photo {number}")
    return stage


def through_run_sh(stage, **variables) -> subprocess.Popen:
    environment = stage._environment(PAIR | variables)
    return subprocess.Popen([RUN_SH, "--train"], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def losses(stage) -> list[float]:
    lines = (stage.output / "lora" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def test_a_stopped_pair_is_resumed_by_one_process_with_the_same_losses(images, forked_python):
    """SIGTERM stops the pair; one process with twice the accumulation finishes, with the losses of an uninterrupted one."""
    long = {"NUM_TRAIN_EPOCHS": 4, "LEARNING_RATE": 0.001, "SAVE_EVERY_EPOCHS": 0}
    pair = through_run_sh(images, PYTHON=forked_python, **long)
    images.wait_for_steps(pair, 3)
    pair.terminate()
    _, stderr = pair.communicate()
    assert pair.returncode == 143
    assert stderr == "train_lora: stopped by SIGTERM; run the same command again to resume\n"
    took = len(losses(images))
    assert 3 <= took < 10
    alone = PAIR | long | {"NUM_PROCESSES": 1}
    output = images.trained(**alone)
    assert f"continuing at step {took}" in output
    assert "setting changed since the checkpoint: gradient_accumulation_steps: 1 -> 2" in output
    together = losses(images)
    images.trained(**alone | {"GRADIENT_ACCUMULATION_STEPS": 2, "OUTPUT_DIR": images.output.with_name("alone")})
    images.output = images.output.with_name("alone")
    assert together == pytest.approx(losses(images), rel=1e-4)
    assert len(together) == 10


@pytest.mark.long
def test_a_pair_shares_the_sample_images(images, forked_python):
    """Five prompts: one process has none in the third round. The images of the base model are those of a single process; one
    reads the recommended LoRA, and both render it at lower strengths."""
    prompts = {"SAMPLES": "true", "SAMPLE_EVERY_EPOCHS": 1, "SAMPLE_STEPS": 1, "SAMPLE_PROMPTS": "sks\nsks, cup\nsks\nsks\ncup"}
    faces = {"FACE_MODEL": "dlib", "PYTHONPATH": Path(__file__).parents[1] / "standin_dlib"}
    run = {"NUM_TRAIN_EPOCHS": 2, "SAVE_EVERY_EPOCHS": 1, "LEARNING_RATE": 0.01, **prompts, **faces}
    pair = through_run_sh(images, PYTHON=forked_python, **run)
    assert (pair.communicate()[1], pair.returncode) == ("", 0)
    together, chosen = samples_of(images)
    assert len(together) == 5 * 5
    images.output = images.output.with_name("alone")
    images.trained(**run | {"OUTPUT_DIR": images.output, "LORA_TARGETS": "attention"})
    alone, chosen_alone = samples_of(images)
    assert alone.keys() == together.keys()
    assert chosen == chosen_alone == "sks-000001.safetensors"  # not the one that is in memory
    base = [f"000000-{number:02d}.png" for number in range(1, 6)]
    assert [alone[name] for name in base] == [together[name] for name in base]


def samples_of(stage) -> tuple[dict[str, bytes], str]:
    """The sample images of a run, and the file that it recommends; every image must have a likeness."""
    folder = stage.output / "samples" / "sks"
    record = json.loads((folder / "samples.json").read_bytes())
    assert all(None not in row["likeness"] for row in record["rows"] + record["strengths"])
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}, record["recommended"]["file"]


@pytest.mark.long
def test_a_killed_process_ends_the_other_and_leaves_a_valid_checkpoint(images):
    pair = through_run_sh(images, NUM_TRAIN_EPOCHS=2000, SAVE_EVERY_EPOCHS=0, SAVE_STATE_EVERY_MINUTES=1e-6)
    images.wait_for_steps(pair, 2)
    (launcher_pid,) = children_of(pair.pid)
    processes = children_of(launcher_pid)
    os.kill(processes[1], signal.SIGKILL)
    begin = time.monotonic()
    _, stderr = pair.communicate(timeout=60)
    assert time.monotonic() - begin < 60
    assert pair.returncode == 6
    assert "process 2 of 2 on this machine was ended by SIGKILL" in stderr
    assert "Traceback" not in stderr
    assert not [process for process in processes if Path(f"/proc/{process}").exists()]
    again = images.run(**PAIR | {"NUM_PROCESSES": 1, "TRAIN_BATCH_SIZE": 2, "LORA_RANK": 3})
    assert "with other settings or data" in again.stderr  # the checkpoint is valid: it was read


def test_processes_end_if_their_launcher_is_killed_while_they_import(images):
    """Their output would stay open if they continued."""
    process = images.start(**PAIR)
    pair_of(process)
    process.kill()
    process.communicate(timeout=5)
    assert not images.output.exists()


def test_exit_codes_and_messages_are_passed_on(stage, forked_python):
    none = through_run_sh(stage, PYTHON=forked_python)
    _, stderr = none.communicate()
    assert none.returncode == 3, stderr
    assert (
        stderr == f"train_lora: {stage.images}: no images (PNG, JPEG, WebP, BMP, TIFF, HEIC or AVIF); put them there or "
        "run the collect stage, then the caption stage\n"
    )


def saved(folder, global_batch: int, world_size: int) -> Checkpoint:
    return Checkpoint(Progress(), {}, Identity({GLOBAL_BATCH: global_batch}, {WORLD_SIZE: world_size}, 9), "", "", folder)


def test_another_number_of_processes_takes_the_same_steps_or_is_refused(tmp_path):
    run = RunSettings(train_batch_size=4, gradient_accumulation_steps=3)
    assert match_global_batch(run, 2, None) == run
    assert match_global_batch(run, 2, saved(tmp_path, 16, 2)) == run
    assert match_global_batch(run, 2, saved(tmp_path, 16, 1)).gradient_accumulation_steps == 2
    assert match_global_batch(run, 1, saved(tmp_path, 16, 4)).gradient_accumulation_steps == 4
    with pytest.raises(SettingsError, match="set TRAIN_BATCH_SIZE to 1 or 2"):
        match_global_batch(run, 8, saved(tmp_path, 16, 1))
    with pytest.raises(SettingsError, match="set NUM_PROCESSES to a divisor"):
        match_global_batch(run, 3, saved(tmp_path, 16, 1))


def test_rank_info_reads_the_variables_of_any_launcher(monkeypatch):
    monkeypatch.setenv("RANK", "32")  # of another program
    assert training_processes.rank_info() == training_processes.RankInfo()
    assert training_processes.needs_launcher(ProcessSettings(num_processes=2))
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": 1234}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert training_processes.rank_info() == training_processes.RankInfo(3, 4, 1, 2, "10.0.0.1", 1234, gpu=1)
    assert not training_processes.needs_launcher(ProcessSettings(num_processes=2))


@pytest.fixture
def signal_handlers():
    """Restores the handlers that the launcher replaces."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.mark.usefixtures("signal_handlers")
def test_rank_0_has_the_time_that_it_needs_to_save(tmp_path, monkeypatch):
    """The other rank, which has nothing to save, exits long before."""
    monkeypatch.setattr(training_processes, "GRACE_S", 0.2)
    monkeypatch.setattr(training_processes, "SIGTERM_S", 0.2)
    saves = f"time.sleep(1.5); open({str(tmp_path / 'saved')!r}, 'w').close(); sys.exit(143)"
    program = f"""
import os, signal, sys, time
def stop(signum, frame):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if os.environ["RANK"] == "0":
        {saves}
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
open({str(tmp_path)!r} + "/" + os.environ["RANK"], "w").close()
time.sleep(60)
"""

    def stop() -> None:
        while not all((tmp_path / rank).exists() for rank in "01"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        assert training_processes.launch([sys.executable, "-c", program], ProcessSettings(num_processes=2)) == 143
    finally:
        thread.join()
    assert (tmp_path / "saved").exists()


@pytest.mark.usefixtures("signal_handlers")
@pytest.mark.parametrize(
    ("programs", "code"),
    [
        (["sys.exit(0)", "sys.exit(0)"], 0),
        (["time.sleep(60)", "sys.exit(3)"], 3),
        (["sys.exit(6)", "time.sleep(0.3); sys.exit(5)"], 5),
        (["time.sleep(60)", "os.kill(os.getpid(), signal.SIGKILL)"], "ended by SIGKILL"),
        (["signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)", "sys.exit(75)"], 75),
    ],
)
def test_launcher_ends_with_the_code_of_the_cause(programs, code, monkeypatch):
    monkeypatch.setattr(training_processes, "SAVING_S", 0.5)
    monkeypatch.setattr(training_processes, "GRACE_S", 0.5)
    monkeypatch.setattr(training_processes, "SIGTERM_S", 0.5)
    program = f"import os, signal, sys, time\nexec({programs!r}[int(os.environ['RANK'])])"
    if isinstance(code, str):
        with pytest.raises(ResourceError, match=code):
            training_processes.launch([sys.executable, "-c", program], ProcessSettings(num_processes=2))
    else:
        assert training_processes.launch([sys.executable, "-c", program], ProcessSettings(num_processes=2)) == code
