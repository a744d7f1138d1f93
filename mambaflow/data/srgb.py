"""A picture's colours in sRGB: by its profile, or by what its format says of them."""

import hashlib
import io
import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from mambaflow.checks import require
from mambaflow.data.exif import exif_of

SAME_COLOUR = 2
"""Of 255: the colours of two profiles that are one in all but rounding and makers' tables."""
SRGB_PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # white, red, green, blue
SRGB_GAMMA, SAME_GAMMA, SAME_PRIMARY = 1 / 2.2, 0.01, 0.01
SRGB_CICP = (1, 13, 0, 1)  # ITU-T H.273: BT.709 primaries, sRGB's curve, RGB, full range
# Of the same standard, 2 for "not stated", and the other curves of BT.709.
NCLX_PRIMARIES, NCLX_CURVES = {1, 2}, {1, 2, 6, 13, 14, 15}
# Of JPEG 2000: inks, sRGB, its grey, its YCC.
COLOUR_SPACES = {12, 16, 17, 18}
# Names of tags of EXIF; values of one of them.
INTEROPERABILITY, OF_CAMERA, COLOUR_SPACE, WHITE, PRIMARIES = 0xA005, 0x8769, 0xA001, 318, 319
SRGB, ADOBE_RGB = 1, 2


def in_srgb(image: Image.Image, channels: Image.Image, data: bytes) -> Image.Image:
    profile = _profile(image, data)
    if profile:
        return _by_profile(channels, profile)
    _require_srgb_by_exif(image)
    if image.format in ("AVIF", "JPEG2000"):
        _require_srgb_boxes(image, data)
    return _by_png(image, channels, data) if image.format == "PNG" else channels


def _profile(image: Image.Image, data: bytes) -> bytes | None:
    """The colour profile, of which Pillow finds nothing in some formats."""
    found = image.info.get("icc_profile")
    require(
        found is not None or "icc_profile" not in image.info,
        "its colour profile is there in part alone, or broken; save it as sRGB",
    )
    if image.format == "GIF":
        return _of_gif(data)
    if image.format == "BMP":
        return _of_bmp(data)
    if image.format == "JPEG2000":
        return next((box[3:] for box in _colour_boxes(data) if box[:1] in (b"\2", b"\3")), None)
    return found


def _of_gif(data: bytes) -> bytes | None:
    """Of the ICC's own extension: blocks, each behind its length, up to an empty one."""
    head = b"!\xff\x0bICCRGBG1012"
    place, parts = data.find(head) + len(head), []
    if place < len(head):
        return None
    while size := data[place]:
        parts.append(data[place + 1 : place + 1 + size])
        place += 1 + size
    return b"".join(parts)


def _of_bmp(data: bytes) -> bytes | None:
    """Of a header of the fifth version, whose places count from its own beginning."""
    if int.from_bytes(data[14:18], "little") < 124 or data[70:74] != b"DEBM":
        return None
    place, size = struct.unpack("<II", data[126:134])
    return data[14 + place : 14 + place + size]


def _colour_boxes(data: bytes) -> Iterator[bytes]:
    """What JPEG 2000 and AVIF say of colours."""
    place = data.find(b"colr")
    while place >= 4:
        (length,) = struct.unpack(">I", data[place - 4 : place])
        yield data[place + 4 : place - 4 + length]
        place = data.find(b"colr", place + 4)


def _require_srgb_boxes(image: Image.Image, data: bytes) -> None:
    for box in _colour_boxes(data):
        if image.format == "AVIF" and box.startswith(b"nclx"):
            primaries, curve = struct.unpack(">HH", box[4:8])
            good = primaries in NCLX_PRIMARIES and curve in NCLX_CURVES
            told = f"primaries {primaries} and curve {curve}"
        elif image.format == "JPEG2000" and box[:1] == b"\1":
            (space,) = struct.unpack(">I", box[3:7])
            good, told = space in COLOUR_SPACES, f"colour space {space}"
        else:
            continue
        require(good, f"not sRGB's: {told}, and there is no profile; save it as sRGB")


def _by_profile(channels: Image.Image, profile: bytes) -> Image.Image:
    space = _space(profile)
    if space == "RGB" and channels.mode == "L":
        channels = channels.convert("RGB")
    modes = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
    require(
        modes.get(space) == channels.mode,
        f"a picture in {channels.mode} with a colour profile for {space}; save it with its own "
        "profile, or with none",
    )
    transform = _to_srgb(profile, channels.mode)
    return channels if transform is None else _applied(transform, channels)


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    moved = ImageCms.applyTransform(image, transform)
    assert moved is not None  # which it is in place alone
    return moved


def _space(profile: bytes) -> str:
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip()
    except (OSError, ImageCms.PyCMSError) as error:
        raise ValueError(_broken(profile)) from error


def _broken(profile: bytes) -> str:
    name = hashlib.sha256(profile).hexdigest()[:8]
    return f"its colour profile ({len(profile)} bytes, {name}) is broken; save it as sRGB"


# Data sets have a few profiles, and a transform takes longer to make than to apply.
@lru_cache(maxsize=16)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile's colours to sRGB; None where they are that."""
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), mode,
            "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )  # fmt: skip
    except (OSError, ImageCms.PyCMSError) as error:
        raise ValueError(_broken(profile)) from error
    if mode not in ("L", "RGB"):
        return transform
    probe = _probe(mode)
    moved = np.asarray(_applied(transform, probe)).astype(int)
    off = np.abs(moved - np.asarray(probe.convert("RGB")).astype(int)).max()
    return None if off <= SAME_COLOUR else transform


def _probe(mode: str) -> Image.Image:
    """All greys, or colours on a grid."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    steps = np.append(np.arange(0, 255, 15), 255).astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 18, 3))


def _require_srgb_by_exif(image: Image.Image) -> None:
    exif = exif_of(image)
    camera = exif.get_ifd(OF_CAMERA)
    # What a camera writes that was set to Adobe RGB and embeds no profile (DCF 2.0, "R03"); some
    # have a number of their own for it.
    r03 = exif.get_ifd(INTEROPERABILITY).get(1) == "R03"
    require(
        not r03 and camera.get(COLOUR_SPACE) != ADOBE_RGB,
        "EXIF says Adobe RGB, and there is no profile to convert it by; save it as sRGB",
    )
    stated = tuple(map(float, (*exif.get(WHITE, ()), *exif.get(PRIMARIES, ()))))
    # Of a TIFF, too. All must be there, and be something.
    told = len(stated) == 8 and min(stated) > 0
    require(
        not told or camera.get(COLOUR_SPACE) == SRGB or _has_srgbs_primaries(stated),
        f"primaries {stated} are not sRGB's, and there is no profile; save it as sRGB",
    )


def _has_srgbs_primaries(stated: Sequence[float]) -> bool:
    """Whether white, red, green and blue are where sRGB has them."""
    off = np.abs(np.array(stated, float) - SRGB_PRIMARIES)
    return bool(off.max() <= SAME_PRIMARY)


def _by_png(image: Image.Image, channels: Image.Image, data: bytes) -> Image.Image:
    """PNG's own words on colour; of several the first in the order of the standard counts."""
    cicp = dict(chunks(data)).get(b"cICP")
    require(
        cicp is None or tuple(cicp) == SRGB_CICP,
        f"cICP {tuple(cicp or b'')} is not sRGB's {SRGB_CICP}; save it as sRGB",
    )
    if cicp is not None or "srgb" in image.info:
        return channels
    primaries = image.info.get("chromaticity", SRGB_PRIMARIES)
    require(
        _has_srgbs_primaries(primaries),
        f"cHRM {primaries} is not sRGB's, and there is no profile; save it as sRGB",
    )
    return _by_gamma(channels, image.info.get("gamma", SRGB_GAMMA))


def _by_gamma(channels: Image.Image, gamma: float) -> Image.Image:
    require(gamma > 0, f"gAMA (={gamma}) must be positive; save it as sRGB")
    if abs(gamma - SRGB_GAMMA) <= SAME_GAMMA:
        return channels
    light = np.linspace(0, 1, 256) ** (1 / gamma)
    # IEC 61966-2-1.
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return channels.point(np.round(255 * srgb).astype(int).tolist() * len(channels.getbands()))


def chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Names and contents of a PNG's chunks."""
    place = 8
    while place + 8 <= len(data):
        length, name = struct.unpack(">I4s", data[place : place + 8])
        yield name, data[place + 8 : place + 8 + length]
        place += 12 + length
