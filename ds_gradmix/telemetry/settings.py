from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TelemetrySettings(BaseModel):
    """The block's `telemetry`: what is measured of the workers at every step, and told now and then."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    every: int = Field(1, ge=1, le=2**31, description="steps between readings, which numbers are means over")
    path: str | None = Field(None, min_length=1, description="a file of JSON lines, that is appended to")
    per_parameter: bool = Field(
        False, description="also length, agreement and noise scale of every parameter, at readings"
    )
    tokens_per_sample: int | None = Field(
        None, ge=1, le=2**40, description="for the noise scale in tokens; without it the length of input_ids"
    )
    alarm_steps: int = Field(20, ge=2, le=2**31, description="so long a worker is far from the others")
    alarm_deviations: float = Field(
        4.0, gt=0, allow_inf_nan=False, description="how far: deviations from the workers' median"
    )
    on_alarm: Literal["warn", "stop"] = Field(
        "warn", description="a warning, or also a checkpoint and the end of all ranks with exit status 17"
    )
    checkpoint_dir: str = Field("gradmix_alarm", min_length=1, description="where that checkpoint is saved")
