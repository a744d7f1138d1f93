"""LPIPS: how far two images are apart for the eye (Zhang et al. 2018, AlexNet, version 0.1)."""

import hashlib
import warnings
from collections.abc import Mapping
from functools import cached_property
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mambaflow.checks import require
from mambaflow.evaluation.scored_images import require_in_range, require_same_shape

# Below it nothing is left of an image after AlexNet's second pooling.
SMALLEST = 31  # pixels on a side
# What torch raises for a file that is none of tensors, or half a one, or did not come at all.
UNREADABLE = (
    OSError, HTTPException, RuntimeError, ValueError, EOFError, KeyError, UnpicklingError,
)  # fmt: skip
Images = Float[Tensor, "b h w 3"]


class Perceptual:
    """LPIPS with the weights of a file, or with those that torchvision downloads once.

    The distance of an image from itself is 0. It was fitted to what people said of patches of 64
    pixels a side; of an image of 32, three of its five layers see a single place.

    Args:
        weights: a file of AlexNet's `features.*` tensors under torchvision's names, or of all its
            tensors; None: torchvision's own, downloaded to torch's cache where it is not there.

    Raises:
        OSError: the file cannot be read, or the download failed.
        ValueError: the file holds other tensors.
    """

    def __init__(self, weights: Path | None = None) -> None:
        features = _downloaded() if weights is None else _read(weights)
        self._net = _untrained()
        where = "torchvision" if weights is None else str(weights)
        _place(self._net.get_submodule("net"), features, where)

    def distances(self, a: Images, b: Images) -> Float[Tensor, " b"]:
        """The distance of each pair of images, on CPU.

        Args:
            a, b: in [0, 1], at least 31 x 31 pixels; which is which does not matter.

        Raises:
            ValueError: shapes that differ, images that are too small, values outside [0, 1].
        """
        require_same_shape(a=a, b=b)
        require(
            min(a.shape[1:3]) >= SMALLEST,
            f"image size (={tuple(a.shape[1:3])}) must be at least {SMALLEST} a side for LPIPS; "
            "score larger images, or leave LPIPS out",
        )
        require_in_range(a=a, b=b)
        with torch.no_grad():
            # Pair by pair, since a convolution may round by how many images it is given. On CPU,
            # where every machine has float32 and none has TF32.
            found = [
                self._net(x.permute(2, 0, 1)[None], y.permute(2, 0, 1)[None], normalize=True)
                for x, y in zip(a.cpu().float(), b.cpu().float(), strict=True)
            ]
        return torch.stack(found).flatten() if found else torch.zeros(0)

    @cached_property
    def sha256(self) -> str:
        """Of all that the distance depends on: results with equal digests may be compared."""
        digest = hashlib.sha256()
        # By name, so that the order in which lpips builds its layers does not matter.
        for name, values in sorted(self._net.state_dict().items()):
            digest.update(f"{name} {tuple(values.shape)}\n".encode())
            digest.update(values.numpy().astype("<f4").tobytes())
        return digest.hexdigest()


def _untrained() -> torch.nn.Module:
    """LPIPS with the linear layers of its package, on an AlexNet that knows nothing."""
    # Here and not above: who scores without LPIPS does not wait for torchvision.
    import lpips

    # lpips speaks to torchvision in an old way, of which its users are warned. The AlexNet that it
    # begins with is drawn from the global generator, which is left as it was.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", module="torchvision.models._utils")
        return lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)


def _downloaded() -> Mapping[str, Tensor]:
    """AlexNet's tensors from torchvision, whose checksum is in the file's name."""
    from torchvision.models import AlexNet_Weights

    try:
        return AlexNet_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
    except UNREADABLE as error:
        raise OSError(
            "AlexNet's weights, which LPIPS needs, could not be had from "
            f"{AlexNet_Weights.IMAGENET1K_V1.url} ({_sentence(error)}); fetch that file elsewhere "
            "and use --lpips FILE, or use --lpips none"
        ) from error


def _sentence(error: Exception) -> str:
    # What torch says after its first sentence is to run whatever code the file holds.
    return str(error).split(". ")[0] or type(error).__name__


def _read(file: Path) -> Mapping[str, Tensor]:
    try:
        held: Any = torch.load(file, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise OSError(
            f"weights (={file}) could not be read as tensors by name ({_sentence(error)}); use "
            "--lpips FILE with a file that torch.save wrote, or --lpips none"
        ) from error
    by_name = isinstance(held, Mapping) and all(
        isinstance(name, str) and isinstance(values, Tensor) for name, values in held.items()
    )
    require(
        by_name,
        f"weights (={file}, a {type(held).__name__}) must hold nothing but tensors by name; use "
        "the state_dict of torchvision's AlexNet",
    )
    return held


def _place(net: torch.nn.Module, features: Mapping[str, Tensor], where: str) -> None:
    """Put every tensor where lpips has it: torchvision's features.3.bias is its slice2.3.bias.

    Raises:
        ValueError: a tensor is missing, of another shape, not finite, or has no place.
    """
    own = net.state_dict()
    places = {f"features.{name.split('.', 1)[1]}": name for name in own}
    missing = [name for name in places if name not in features]
    # Torchvision's own file has the classifier too, which LPIPS does not use.
    odd = [n for n in features if n not in places and not n.startswith("classifier.")]
    require(
        not missing and not odd,
        f"weights (={where}) must be AlexNet's features; missing: {missing}, without a place: "
        f"{odd}; use torchvision's names",
    )
    for name, place in places.items():
        given, wanted = features[name], own[place]
        require(
            given.shape == wanted.shape and given.is_floating_point(),
            f"{name} of weights (={where}) is {given.dtype} of shape {tuple(given.shape)} and must "
            f"be floating point of shape {tuple(wanted.shape)}; use the weights of AlexNet",
        )
        require(
            bool(given.isfinite().all()),
            f"{name} of weights (={where}) must be finite; the file is damaged, fetch it again",
        )
    net.load_state_dict({place: features[name] for name, place in places.items()})
