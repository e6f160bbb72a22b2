"""Every preset is checked and trained with."""

import tomllib

import pytest

from common.settings import PRESETS

NAMES = sorted(path.stem for path in PRESETS.glob("*.toml"))
NOT_SET = dict.fromkeys(("LORA_RANK", "LORA_ALPHA", "TRAIN_BATCH_SIZE", "NUM_TRAIN_EPOCHS"), "")


@pytest.mark.parametrize("name", ["8gb", *(pytest.param(name, marks=pytest.mark.long) for name in NAMES if name != "8gb")])
def test_a_run_uses_the_values_of_its_preset(stage, name):
    for photograph in ("astronaut", "coffee"):
        stage.add(photograph)
    values = tomllib.loads((PRESETS / f"{name}.toml").read_text(encoding="utf-8"))["train"]
    checked = stage.run("--check", **NOT_SET, RESOLUTION="", PRESET=name)
    assert (checked.returncode, checked.stderr) == (0, "")
    for key, value in values.items():
        assert f"  {key} = {value!r}  (preset {name})" in checked.stdout
    length = "1000 epochs" if "num_train_epochs" in values else "20 epochs"
    assert length in checked.stdout  # 2 x 1000 = 2000

    small = {"NUM_TRAIN_STEPS": 1, "LORA_TARGETS": "attention", "RESOLUTION": 64}
    stage.trained(**NOT_SET | small, PRESET=name)
    text = (stage.output / "lora" / "training_config_resolved.toml").read_text(encoding="utf-8")
    resolved = {key: value for table in tomllib.loads(text)["train"].values() for key, value in table.items()}
    for key, value in values.items():
        if key not in ("resolution", "num_train_epochs"):
            assert resolved[key] == value
            assert f"# set by preset {name}" in next(line for line in text.splitlines() if line.startswith(f"{key} = "))
