"""Images that are scored: completed ones, what they are scored against, and what is refused.

Images are b h w 3 in [0, 1], known pixels copied into the prediction.
"""

from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Bool, Float, UInt8
from torch import Tensor

Images = Float[Tensor, "b h w 3"]
Mask = Bool[Tensor, "b h w"]
Sextile = UInt8[Tensor, "b h w"]  # 0 the calmest sixth of the pixels, 5 the busiest


@dataclass(frozen=True)
class Completion:
    """Completed images, and what they are scored against."""

    prediction: Images
    """In [0, 1]."""
    truth: Images
    known: Mask
    mean: Images | None = None
    """The posterior mean, not clipped, where the prediction is one sample around it."""
    calls: int | None = None
    """Calls of the velocity; None where there is no velocity, as in a classical fill."""
    seconds: float = 0.0
    sextile: Sextile | None = None
    """The sixth of all pixels, by activity, that each pixel is in; None: nothing by sextile."""
    unclipped: Images | None = None
    """The prediction before it was clipped to [0, 1], where it was."""

    def image(self, i: int) -> "Completion":
        """One of the images, by itself, with its share of the seconds."""
        one = slice(i, i + 1)
        parts: dict[str, Any] = {
            name: None if (value := getattr(self, name)) is None else value[one]
            for name in ("prediction", "truth", "known", "mean", "sextile", "unclipped")
        }
        return replace(self, **parts, seconds=self.seconds / len(self.truth))

    @property
    def answer(self) -> Images:
        """What was answered, not clipped: what spreads are measured on."""
        return self.prediction if self.unclipped is None else self.unclipped


def require_same_shape(**images: Tensor) -> None:
    """Refuse images that would be broadcast against one another."""
    # Without channels, which a mask does not have.
    shapes = {name: tuple(image.shape[:3]) for name, image in images.items()}
    if len(set(shapes.values())) > 1:
        told = ", ".join(f"{name} (={shape})" for name, shape in shapes.items())
        raise ValueError(f"{told} must agree in images, height and width; score like with like")


def require_in_range(**images: Tensor) -> None:
    for name, image in images.items():
        # No images are in range: min() would raise.
        low, high = (image.min().item(), image.max().item()) if image.numel() else (0.0, 1.0)
        if not (low >= 0 and high <= 1):  # nor is nan
            raise ValueError(
                f"{name} (={low:.3g} to {high:.3g}): image values must be in [0, 1]; "
                "use ((rgb + 1) / 2).clamp(0, 1)"
            )
