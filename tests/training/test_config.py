"""Settings of training that contradict each other are refused, all at once, each with what to set."""

from dataclasses import dataclass, field

import pytest

from common.errors import SettingsError
from common.settings import SETTINGS_FILE, resolve
from training.config import TrainSettings


@dataclass(frozen=True)
class Tables:
    train: TrainSettings = field(default_factory=TrainSettings)


def problems(**variables: object) -> list[str]:
    """What is wrong with the settings file and these environment variables."""
    try:
        resolve(SETTINGS_FILE, {name: str(value) for name, value in variables.items()}, [], Tables)
    except SettingsError as error:
        return [line.removeprefix("  - ") for line in str(error).splitlines()[1:]]
    return []


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        (
            {"LOSS_WEIGHTING": "debiased", "MIN_SNR_GAMMA": 3},
            "min_snr_gamma: 3 has no effect with LOSS_WEIGHTING=debiased; set MIN_SNR_GAMMA=auto, or LOSS_WEIGHTING=min_snr",
        ),
        (
            {"TIMESTEP_MIN": 600, "TIMESTEP_MAX": 600},
            "timestep_max: 600 must be above timestep_min, which is 600; 0 is no limit",
        ),
        (
            {"LR_CYCLES": 4},
            "lr_cycles: 4 has no effect with LR_SCHEDULER=constant; set LR_SCHEDULER=cosine_with_restarts, or LR_CYCLES=3",
        ),
        (
            {"LR_POWER": 1.5, "LR_SCHEDULER": "linear"},
            "lr_power: 1.5 has no effect with LR_SCHEDULER=linear; set LR_SCHEDULER=polynomial, or LR_POWER=2",
        ),
        (
            {"LR_DECAY": 0.8, "LR_WARMUP": 0.25, "LR_SCHEDULER": "warmup_stable_decay"},
            "lr_decay: 0.8 and lr_warmup, 0.25, are more than the whole run; lower one of them",
        ),
        (
            {"LORAPLUS_RATIO": 16, "OPTIMIZER": "prodigy", "LEARNING_RATE": 1},
            "loraplus_ratio: OPTIMIZER=prodigy has one rate for all weights; set LORAPLUS_RATIO=1, or OPTIMIZER=adamw",
        ),
        (
            {"TEXT_ENCODER_LR": 2e-5},
            "text_encoder_lr: 2e-05 has no effect without TRAIN_TEXT_ENCODERS; "
            "set TRAIN_TEXT_ENCODERS=true, or TEXT_ENCODER_LR=1e-5",
        ),
        (
            {"TRAIN_TEXT_ENCODERS": "true", "OPTIMIZER": "prodigy", "LEARNING_RATE": 1},
            "text_encoder_lr is a factor of the rate that prodigy finds: set TEXT_ENCODER_LR=1 (is 1e-05)",
        ),
        (
            {"TRAIN_TEXT_ENCODERS": "true", "ENGINE": "fast"},
            "ENGINE=fast: the fast engine does not support TRAIN_TEXT_ENCODERS=true; set ENGINE=auto",
        ),
        ({"LORA_L2": 1e-4, "LORA_TYPE": "dora"}, "lora_l2: is not supported with LORA_TYPE=dora; set LORA_L2=0, or LORA_TYPE=lora"),
        (
            {"OPTIMIZER": "schedulefree", "LR_SCHEDULER": "cosine"},
            "lr_scheduler: OPTIMIZER=schedulefree averages the weights instead; set LR_SCHEDULER=constant",
        ),
        ({"OPTIMIZER": "adafactor", "ADAM_BETA1": 0.8}, "adam_beta1: has no effect with OPTIMIZER=adafactor; set ADAM_BETA1=0.9"),
        (
            {"OPTIMIZER": "adafactor", "ADAM_BETA2": 0.99},
            "adam_beta2: has no effect with OPTIMIZER=adafactor; set ADAM_BETA2=0.999",
        ),
        (
            {"OPTIMIZER": "adafactor", "ADAM_EPSILON": 1e-6},
            "adam_epsilon: has no effect with OPTIMIZER=adafactor; set ADAM_EPSILON=1e-08",
        ),
        (
            {"LORA_TYPE": "dora", "BASE_QUANTIZATION": "int8"},
            "LORA_TYPE=dora reads the weights of the base model as they are: set BASE_QUANTIZATION=none",
        ),
        (
            {"OPTIMIZER": "schedulefree", "EMA_DECAY": 0.9},
            "ema_decay: OPTIMIZER=schedulefree averages the weights instead; set EMA_DECAY=0",
        ),
        (
            {"OPTIMIZER": "schedulefree", "ADAM_BETA1": 0},
            "adam_beta1: OPTIMIZER=schedulefree needs more than 0; set ADAM_BETA1=0.9",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_contradictions_are_one_line_each(variables, problem):
    assert problems(**variables) == [problem]


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"LOSS_WEIGHTING": "debiased"},
        {"LOSS_WEIGHTING": "none", "MIN_SNR_GAMMA": 0},
        {"TIMESTEP_MIN": 600},
        {"LR_CYCLES": 4, "LR_SCHEDULER": "cosine_with_restarts"},
        {"LR_DECAY": 0.5, "LR_WARMUP": 0.5, "LR_SCHEDULER": "warmup_stable_decay"},
        {"LORAPLUS_RATIO": 16, "OPTIMIZER": "adamw8bit", "LORA_TYPE": "dora"},
        {"OPTIMIZER": "schedulefree"},
        {"OPTIMIZER": "prodigy", "LEARNING_RATE": 1, "EMA_DECAY": 0.99, "LR_SCHEDULER": "cosine"},
        {"TIMESTEP_MIN": 599, "TIMESTEP_MAX": 600},
        {"TRAIN_TEXT_ENCODERS": "true", "TEXT_ENCODER_LR": 2e-5, "LORA_TYPE": "loha", "BASE_QUANTIZATION": "int8"},
        {"TRAIN_TEXT_ENCODERS": "true", "TEXT_ENCODER_LR": 1, "OPTIMIZER": "prodigy", "LEARNING_RATE": 1, "LORA_L2": 1e-4},
    ],
    ids=" ".join,
)
def test_what_does_not_contradict_is_accepted(variables):
    assert problems(**variables) == []


def test_all_contradictions_are_reported_at_once():
    found = problems(TIMESTEP_MIN=5, TIMESTEP_MAX=5, LR_CYCLES=2, OPTIMIZER="prodigy", LORAPLUS_RATIO=2)
    assert [each.partition(" ")[0] for each in found] == ["timestep_max:", "learning_rate", "lr_cycles:", "loraplus_ratio:"]
