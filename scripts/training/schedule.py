"""The noise schedule that a base model was trained with. Pure."""

from dataclasses import dataclass, replace
from typing import Literal

PredictionType = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class Schedule:
    """What the model predicts, and the betas; the defaults are SDXL's."""

    prediction_type: PredictionType = "epsilon"
    zero_terminal_snr: bool = False
    beta_start: float = 0.00085
    beta_end: float = 0.012
    timesteps: int = 1000

    def with_settings(self, prediction_type: str, zero_terminal_snr: bool | str) -> "Schedule":
        """The schedule with what the settings say in place of what the base says; "auto" keeps the base's."""
        kept = self
        if prediction_type != "auto":
            kept = replace(kept, prediction_type=prediction_type)
        if zero_terminal_snr != "auto":
            kept = replace(kept, zero_terminal_snr=zero_terminal_snr)
        return kept
