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
        {"TIMESTEP_MIN": 599, "TIMESTEP_MAX": 600},
    ],
    ids=" ".join,
)
def test_what_does_not_contradict_is_accepted(variables):
    assert problems(**variables) == []
