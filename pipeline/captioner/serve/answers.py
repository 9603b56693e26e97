"""What the server answers, as JSON."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from pipeline.captioner.predictions import Caption


class OneCaption(BaseModel):
    """One of the captions of a photo."""

    caption: str = Field(description="A sentence as people write it.")
    words: list[str] = Field(description="The caption as the model knows it.")
    score: float = Field(description="Length-normalized log-probability; 0 means certainty.")

    @classmethod
    def of(cls, caption: Caption) -> OneCaption:
        return cls.model_validate(caption.as_dict())


class Timing(BaseModel):
    """Where the time went, in milliseconds. The parts add up to the whole."""

    upload: float = Field(description="From the request's headers to the photo's last byte.")
    decode: float = Field(description="From bytes to pixels, with the wait for a free thread.")
    wait: float = Field(description="Until the networks were free.")
    encode: float = Field(description="The encoder, for the whole batch.")
    search: float = Field(description="The search for captions, for the whole batch.")
    total: float

    @classmethod
    def of(cls, seconds: dict[str, float]) -> Timing:
        parts = {part: round(1000 * each, 2) for part, each in seconds.items()}
        return cls(**parts, total=round(1000 * sum(seconds.values()), 2))


class CaptionAnswer(BaseModel):
    """The captions of one photo."""

    name: str = Field(description="The file's name, as the client gave it.")
    caption: str = Field(description="The best caption.")
    score: float = Field(description="Its score.")
    captions: list[OneCaption] = Field(description="The best captions, best first.")
    timing_ms: Timing
    batch: int = Field(description="Photos that were captioned together with it, and itself.")
    doubt: str | None = Field(
        description="Why this model's captions mean little; null if nothing speaks for it."
    )


class ErrorAnswer(BaseModel):
    """Why there is no caption."""

    error: str = Field(description="One line.")


class Health(BaseModel):
    """Whether the server works."""

    status: str = Field(description="ok, or failing: the last batch could not be computed.")


class About(BaseModel):
    """Which model is served, and what photos it takes."""

    model: str = Field(description="The name of the model's folder or file.")
    backbone: str
    words: int = Field(description="Of the model's vocabulary.")
    search: str = Field(description="How captions are searched for.")
    device: str
    max_bytes: int = Field(description="Of a photo's file.")
    max_pixels: int = Field(description="Of a photo.")
    doubt: str | None = Field(
        description="Why this model's captions mean little; null if nothing speaks for it."
    )


def error_responses(statuses: dict[int, str]) -> dict[int | str, dict[str, Any]]:
    """For FastAPI: what these statuses mean."""
    return {
        status: {"model": ErrorAnswer, "description": meaning}
        for status, meaning in statuses.items()
    }
