"""LPIPS: the published distances, what lpips itself answers, and no weights but the right ones."""

import pickle
from pathlib import Path
from urllib.error import URLError

import lpips
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor

from mambaflow.evaluation.perceptual import SMALLEST, Perceptual

# Of AlexNet as torchvision has it (Krizhevsky 2014): place in `features`, filters, inputs, side.
LAYERS = ((0, 64, 3, 11), (3, 192, 64, 5), (6, 384, 192, 3), (8, 256, 384, 3), (10, 256, 256, 3))
CACHED = "hub/checkpoints/alexnet-owt-7be5be79.pth"


def random_features() -> dict[str, Tensor]:
    """Weights under which no layer dies out (He et al. 2015)."""
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for place, filters, inputs, side in LAYERS:
        spread = (2 / (inputs * side**2)) ** 0.5
        shape = (filters, inputs, side, side)
        tensors[f"features.{place}.weight"] = spread * torch.randn(shape, generator=draw)
        tensors[f"features.{place}.bias"] = 0.1 * torch.randn(filters, generator=draw)
    return tensors


def saved(file: Path, held: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(held, file)
    return file


def images(count: int, size: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(count, size, size, 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("weights") / "features.pth", random_features())


@pytest.fixture(scope="module")
def perceptual(weights) -> Perceptual:
    return Perceptual(weights)


@pytest.mark.parametrize("size", [SMALLEST, 32, 64])
def test_distances_are_those_of_lpips_on_the_same_weights(perceptual, size, monkeypatch):
    alexnet = torchvision.models.alexnet(weights=None)
    alexnet.load_state_dict(random_features(), strict=False)
    # lpips itself cuts the AlexNet that it is given into its slices.
    monkeypatch.setattr(torchvision.models, "alexnet", lambda pretrained: alexnet)
    theirs = lpips.LPIPS(net="alex", version="0.1", verbose=False)
    a, b = images(5, size), images(5, size, seed=1)
    with torch.no_grad():
        found = theirs(2 * a.permute(0, 3, 1, 2) - 1, 2 * b.permute(0, 3, 1, 2) - 1).flatten()
    assert found.min() > 0.01
    torch.testing.assert_close(perceptual.distances(a, b), found, rtol=1e-4, atol=0)


def test_a_distance_is_nought_from_itself_the_same_both_ways_and_of_no_gradient(perceptual):
    a, b = images(3), images(3, seed=1).requires_grad_()
    assert perceptual.distances(a, a).tolist() == [0, 0, 0]
    there, back = perceptual.distances(a, b), perceptual.distances(b, a)
    assert torch.equal(there, back) and (there > 0).all()
    assert not there.requires_grad


def test_a_distance_does_not_depend_on_the_images_beside(perceptual):
    a, b = images(4), images(4, seed=1)
    alone = [perceptual.distances(a[i : i + 1], b[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(perceptual.distances(a, b), torch.cat(alone), rtol=1e-6, atol=0)
    assert perceptual.distances(a[:0], b[:0]).shape == (0,)


def test_it_is_built_without_a_word_a_warning_or_a_draw(weights, capfd, recwarn):
    before = torch.random.get_rng_state()
    Perceptual(weights)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert capfd.readouterr() == ("", "") and not recwarn.list


# Which weights


def test_the_digest_is_of_every_tensor_and_of_nothing_else(perceptual, weights, tmp_path):
    same = dict(reversed(random_features().items()))
    classifier = {"classifier.1.weight": torch.ones(4, 4)}
    whole = saved(tmp_path / "another name.pth", same | classifier)
    assert Perceptual(whole).sha256 == perceptual.sha256
    digests = {perceptual.sha256}
    for name in same:
        changed = {k: v.clone() for k, v in same.items()}
        changed[name].view(-1)[-1] += 1e-3
        digests.add(Perceptual(saved(tmp_path / "changed.pth", changed)).sha256)
    assert len(digests) == 1 + 2 * len(LAYERS)
    other = Perceptual(weights)
    with torch.no_grad():
        other._net.lin4.model[1].weight[0, 0] += 1e-3
    assert other.sha256 not in digests


def test_without_a_file_the_weights_are_those_that_torchvision_has_fetched(
    perceptual, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    saved(tmp_path / CACHED, random_features() | {"classifier.6.bias": torch.zeros(1000)})
    assert Perceptual().sha256 == perceptual.sha256


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    """An empty cache of torch, and no way to the network."""

    def no_way(request: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", no_way)
    return tmp_path


CURE = r"fetch that file elsewhere and use --lpips FILE, or use --lpips none"


def test_a_download_that_fails_is_told_with_the_cure(offline):
    with pytest.raises(OSError, match=rf"alexnet-owt-7be5be79.pth \(.*no route.*\); {CURE}"):
        Perceptual()


def test_a_damaged_file_in_the_cache_is_told_with_the_cure(offline):
    whole = saved(offline / CACHED, random_features()).read_bytes()
    (offline / CACHED).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=CURE):
        Perceptual()


def without(name: str) -> dict[str, Tensor]:
    return {k: v for k, v in random_features().items() if k != name}


BIAS = "features.10.bias"
ODD = {
    "a missing tensor": (without(BIAS), rf"missing: \['{BIAS}'\], without a place: \[\]"),
    "an odd tensor": (
        random_features() | {"features.12.bias": torch.zeros(1)},
        r"missing: \[\], without a place: \['features.12.bias'\]; use torchvision's names",
    ),
    "names of the layers alone": (
        {k.removeprefix("features."): v for k, v in random_features().items()},
        r"missing: \['features.0.weight', .* without a place: \['0.weight'",
    ),
    "another shape": (
        random_features() | {BIAS: torch.zeros(255)},
        rf"{BIAS} of weights .* of shape \(255,\) and must be floating point of shape \(256,\)",
    ),
    "whole numbers": (
        random_features() | {BIAS: torch.zeros(256, dtype=torch.int64)},
        rf"{BIAS} of weights .* is torch.int64 of shape \(256,\)",
    ),
    "a number that is none": (
        random_features() | {BIAS: torch.full((256,), torch.nan)},
        rf"{BIAS} of weights .* must be finite",
    ),
    "no names": ([torch.zeros(3)], r"weights \(=.*, a list\) must hold nothing but tensors by"),
    "no tensors": ({"epoch": 3}, r"weights \(=.*, a dict\) must hold nothing but tensors by name"),
}


@pytest.mark.parametrize("what", ODD)
def test_other_weights_are_refused_by_name(tmp_path, what):
    held, message = ODD[what]
    with pytest.raises(ValueError, match=message):
        Perceptual(saved(tmp_path / "odd.pth", held))


@pytest.mark.parametrize("data", [None, b"", b"no weights", pickle.dumps(Path("/"), 2)])
def test_a_file_that_cannot_be_read_is_told_with_the_cure(tmp_path, data):
    """It is not there, empty, no file of torch, or would run code of its own."""
    if data is not None:
        (tmp_path / "bad.pth").write_bytes(data)
    message = r"weights \(=.*bad.pth\) could not be read .* use --lpips FILE .* or --lpips none"
    with pytest.raises(OSError, match=message) as told:
        Perceptual(tmp_path / "bad.pth")
    assert "weights_only" not in str(told.value), "torch's advice to run what the file holds"


# Which images


REFUSED = {
    "another number of images": (images(2), images(3), r"a \(=\(2, 32, 32\)\), b \(=\(3, 32, 32"),
    "another size": (images(2), images(2, 64), "must agree in images, height and width"),
    "too small": (images(1, 30), images(1, 30), r"size \(=\(30, 30\)\) must be at least 31 a side"),
    "below 0": (images(2) - 0.1, images(2), r"a \(=-0.*image values must be in \[0, 1\]"),
    "above 1": (images(2), images(2) + 0.5, r"b \(=0.5.*image values must be in \[0, 1\]"),
    "no number": (images(2), images(2) * torch.nan, r"b \(=nan to nan\)"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_images_that_have_no_distance_are_refused(perceptual, what, without_shape_checks):
    a, b, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        perceptual.distances(a, b)


@pytest.mark.realdata
def test_real_weights_give_the_published_distances(real_lpips):
    """Of the pictures in the paper's repository, as its README states them."""
    perceptual = Perceptual(real_lpips / "alexnet_features.pth")
    ref, p0, p1 = (
        torch.from_numpy(np.array(Image.open(real_lpips / f"ex_{name}.png").convert("RGB"))) / 255
        for name in ("ref", "p0", "p1")
    )
    found = perceptual.distances(torch.stack((ref, ref)), torch.stack((p0, p1)))
    assert found.tolist() == pytest.approx([0.7219, 0.1376], abs=2e-4)


@pytest.mark.realdata
def test_of_images_of_32_pixels_the_noisier_one_is_farther(real_lpips):
    perceptual = Perceptual(real_lpips / "alexnet_features.pth")
    ref = torch.from_numpy(np.array(Image.open(real_lpips / "ex_ref.png").convert("RGB"))) / 255
    crops = torch.stack([ref[16:48, left : left + 32] for left in (0, 16, 32)])
    noise = torch.randn(crops.shape, generator=torch.Generator().manual_seed(0))
    steps = [
        perceptual.distances((crops + by * noise).clamp(0, 1), crops) for by in (0.01, 0.05, 0.2)
    ]
    assert (torch.stack(steps).diff(dim=0) > 0).all() and (steps[0] > 0).all()
