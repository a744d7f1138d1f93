"""What an encoded picture means: 8-bit sRGB, upright and opaque; or why it means nothing certain.

The same content gives the same pixels, whatever it was saved as without loss. In the file:

    orientation 1 to 8            turned upright (of EXIF, XMP, TIFF, or text in a PNG); another
                                  number: is upright; what is no number: refused
    1 to 8 bits of grey, palettes what they show; TIFF may say that 0 is white, and must say which
    16 bits, grey or colours      the high byte, which is what Pillow gives of colours; refused if
                                  that is below 16 everywhere: 8 or 12 bits in the place of 16
    12 bits (TIFF)                the highest 8
    JPEG 2000                     of 8 bits or more; with fewer, or with a sign: refused
    integers of 32 bits (TIFF)    16 bits if the largest is in (255, 65535]; else refused, since
                                  nothing says what is white
    floats, numbers with a sign   refused for the same reason; FITS of more than 8 bits, too
    a fourth channel of a TIFF,   refused where nothing says what it is
      of a TGA
    transparency of any kind      laid on white, as on a page; opaque: dropped
    transparent everywhere        refused: an alpha channel that was never filled
    CMYK, YCCK                    by its profile, else R = (1 - C)(1 - K) and its like
    JPEG of four inks, no marker  refused: Adobe's marker says which way up the inks are
    YCbCr, HSV, Lab               sRGB, as Pillow converts them
    a colour profile              converted to sRGB; if no colour moves by more than 2 of 255, it
                                  is sRGB, and nothing is done
    a broken profile, or one of   refused
      other channels; broken EXIF
    PNG without a profile         gAMA is applied; cHRM or cICP other than sRGB's: refused
    AVIF, JPEG 2000 without one   colours by numbers (nclx, enumerated) other than sRGB's: refused
    EXIF or a TIFF of Adobe RGB   refused
      or other primaries, alone
    several frames or pages       refused: which is meant is not said; of MPO the first, to which
                                  cameras append copies and depths; of icons the largest
    cut off, zeros in place of    refused
      the end, wrong checksums,
      PNG with too few rows,
      over 89 million pixels
"""

import io
import struct
import zlib

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image, UnidentifiedImageError

from mambaflow.checks import require
from mambaflow.data.exif import TURNS, orientation
from mambaflow.data.srgb import chunks, in_srgb

VERSION = 2
"""Another one where a picture comes to mean something else: it is then read anew."""
Pixels = UInt8[np.ndarray, "h w 3"]
Grey = UInt8[np.ndarray, "h w"]
# Pillow's own bound, above which it only warns.
MOST_PIXELS = 89_478_485
ALPHA = ("RGBA", "RGBa", "LA", "La", "PA", "P")
# Where each pass of an interlaced PNG begins, and its steps.
ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
         (0, 1, 1, 2)]  # fmt: skip
# Names of TIFF tags.
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339
SAMPLES, PLANES, PALETTE, EXTRA, SLICES = 277, 284, 320, 338, 32997
SIGNED, APART = 2, 2  # of SAMPLE_FORMAT, of PLANES
LEAST_WHITE = 16
"""Of 255: a picture of 16 bits that nowhere comes so far is of 12 bits or fewer, more often than it
is that dark."""


def decode(data: bytes) -> Pixels:
    """The picture in some bytes.

    Raises:
        Exception: whatever a decoder trips over; ValueError with a cure for what it means nothing.
    """
    _verify(data)
    with Image.open(io.BytesIO(data)) as image:
        _require_one_picture(image)
        if image.format == "PNG":
            _require_all_rows(data)
        # Asked of the file's own image, which alone has EXIF, and before Pillow turns a TIFF.
        turn = TURNS.get(orientation(image))
        image.load()  # raises where data are cut off
        _require_stated_inks(image)
        if image.format == "TIFF":
            _require_stated_layout(image)
        if image.format == "JPEG2000":
            _require_plain_samples(data)
        if image.format == "TGA":
            _require_stated_alpha(image, data)
        alpha = _alpha(image, data)
        channels = _channels(image)
        if alpha is None and _is_deep_colour(image, data):
            _require_light(int(np.asarray(channels).max()))
        pixels = np.asarray(in_srgb(image, channels, data).convert("RGB"))
    laid = pixels if alpha is None else _on_white(pixels, alpha)
    return laid if turn is None else np.asarray(Image.fromarray(laid).transpose(turn))


def _verify(data: bytes) -> None:
    # PNG has checksums, which decoding alone does not look at. `verify` leaves an image that cannot
    # be read any more.
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "PNG":
                image.verify()
            kind = image.format
    except UnidentifiedImageError as error:
        raise ValueError(_unknown(data)) from error
    # Nor do these decoders mind zeros, as in a file whose end was never written.
    whole = _has_end(data) if kind in ("JPEG", "MPO") else _is_filled(kind, data)
    require(whole, "its end is missing: fetch it again")


def _has_end(data: bytes) -> bool:
    """Whether a JPEG has its last marker, behind the segments that may hold a smaller picture."""
    place = 2
    while data[place : place + 2] != b"\xff\xda":
        if place + 4 > len(data) or data[place] != 0xFF:
            return True  # padded, or broken: left to the decoder
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return data.find(b"\xff\xd9", place) >= 0


def _require_all_rows(data: bytes) -> None:
    """Refuse a PNG that unpacks to fewer bytes than it has pixels, for which Pillow puts zeros."""
    width, height, depth, kind, interlaced = struct.unpack(">IIBBxxB", data[16:29])
    bits = depth * {2: 3, 4: 2, 6: 4}.get(kind, 1)
    lacking = 0
    for x, y, across, down in ADAM7 if interlaced else [(0, 0, 1, 1)]:
        columns, rows = -(-(width - x) // across), -(-(height - y) // down)
        lacking += rows * (1 + -(-columns * bits // 8)) if columns > 0 else 0
    packed = b"".join(body for name, body in chunks(data) if name == b"IDAT")
    # Some at a time: it may be much more than there should be.
    unpacker = zlib.decompressobj()
    while lacking > 0 and (some := unpacker.decompress(packed, min(lacking, 2**20))):
        lacking, packed = lacking - len(some), unpacker.unconsumed_tail
    require(lacking <= 0, "its last rows are missing: fetch it again")


def _is_filled(kind: str | None, data: bytes) -> bool:
    """Whether a file of a compressing format has more at its end than zeros."""
    if kind == "WEBP":  # which says its length, and may be padded
        data = data[: 8 + int.from_bytes(data[4:8], "little")]
    zeros = len(data) - len(data.rstrip(b"\0"))
    return kind not in ("WEBP", "AVIF") or zeros <= max(64, len(data) // 8)


def _unknown(data: bytes) -> str:
    if not data:
        return "holds no bytes: there is a name alone, or nothing; fetch the picture itself"
    if data.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS stands in the picture's place; fetch it by git lfs pull"
    if data.startswith((b"II*\0", b"MM\0*")):
        return (
            f"a TIFF ({len(data)} bytes) that is cut off, or of a kind that cannot be read, as of "
            "floats, of 16 bits with a sign or with grey and alpha; save it with 8 bits a channel"
        )
    return f"no picture that can be read: {len(data)} bytes that begin with {data[:12]!r}"


def _require_one_picture(image: Image.Image) -> None:
    width, height = image.size
    require(
        width * height <= MOST_PIXELS,
        f"{width} x {height} pixels must be at most {MOST_PIXELS} in all; crop or reduce it",
    )
    frames = getattr(image, "n_frames", 1)
    # Cameras append a small copy or a map of depths to the photograph, which is the first.
    require(
        frames == 1 or image.format == "MPO",
        f"holds {frames} frames, and nothing says which is meant; save that one as PNG",
    )
    # Pillow would fill the rest with whatever colour comes first.
    tiles = getattr(image, "tile", None) if image.format == "GIF" else None
    filled = not tiles or tiles[0][1] == (0, 0, width, height)
    require(filled, "a GIF that its frame does not fill; save it as PNG")


def _require_stated_inks(image: Image.Image) -> None:
    require(
        image.mode != "CMYK" or image.format not in ("JPEG", "MPO") or "adobe" in image.info,
        "a JPEG of four inks without Adobe's marker does not say which way up they are; save it as "
        "RGB",
    )


def _require_stated_layout(image: Image.Image) -> None:
    """Refuse a TIFF that leaves open what its numbers are, or of which Pillow mixes them up."""
    bits, samples = _tag(image, BITS) or 1, _tag(image, SAMPLES) or 1
    require(
        _tag(image, PHOTOMETRIC) is not None,
        "a TIFF that does not say whether 0 is black; save it as PNG",
    )
    require(
        image.mode not in ("RGBA", "RGBX") or _tag(image, EXTRA) is not None,
        "a TIFF of four channels that does not say what the fourth is; save it with three, or as "
        "PNG with alpha",
    )
    require(
        not (_tag(image, PLANES) == APART and bits > 8 and samples > 1),
        f"a TIFF of {bits} bits with each channel by itself, which cannot be read; save it as PNG",
    )

    slices, palette = _tag(image, SLICES) or 1, getattr(image, "tag_v2", {}).get(PALETTE)
    require(slices == 1, f"holds {slices} slices, and nothing says which is meant; save one as PNG")
    if image.mode == "P" and palette:
        _require_light(max(palette) >> 8)


def _require_stated_alpha(image: Image.Image, data: bytes) -> None:
    """Refuse a TGA whose head counts no bit of alpha, and yet there are other than opaque ones."""
    bits = data[17] & 15
    require(
        image.mode not in ("LA", "RGBA") or bits > 0 or image.getextrema()[-1] == (255, 255),
        f"a TGA of {len(image.getbands())} channels, of whose last the head counts {bits} bits as "
        "alpha; save it without, or as PNG",
    )


def _samples(data: bytes) -> list[int]:
    """Of a JPEG 2000: the bits of each channel, below 0 where they have a sign."""
    place = data.find(b"\xff\x51") + 38
    count = int.from_bytes(data[place : place + 2], "big")
    stated = data[place + 2 : place + 2 + 3 * count : 3]
    return [((s & 127) + 1) * (-1 if s & 128 else 1) for s in stated]


def _require_plain_samples(data: bytes) -> None:
    bits = _samples(data)
    require(
        min(bits, default=0) >= 8,
        f"a JPEG 2000 of channels of {bits} bits, of which those below 0 have a sign; save it with "
        "8 or more without",
    )


# Channels of 8 bits


def _is_deep_colour(image: Image.Image, data: bytes) -> bool:
    """Whether Pillow has left out the low bytes of 16 bits."""
    if image.mode.startswith("I"):
        return False
    if image.format == "JPEG2000":
        return max(_samples(data)) == 16
    return data[24] == 16 if image.format == "PNG" else _tag(image, BITS) == 16


def _require_light(high: int) -> None:
    """Refuse 16 bits whose largest high byte this is."""
    require(
        high >= LEAST_WHITE,
        f"16 bits of which none is above {(high << 8) + 255}: nearly black, as where 8 or 12 bits "
        "stand in the place of 16; scale them, or save it with 8 bits",
    )


def _channels(image: Image.Image) -> Image.Image:
    """L, RGB, CMYK or LAB, without alpha."""
    require(
        # Pillow looks at it where there are more than 8 bits.
        image.mode == "I" or _tag(image, SAMPLE_FORMAT) != SIGNED,
        "numbers with a sign, of which nothing says what is white; save it without",
    )
    if image.mode.startswith("I"):
        return Image.fromarray(_high_byte(_deep_grey(image), _depth(image)))
    if image.mode in ("La", "RGBa"):  # premultiplied: Pillow goes back by one mode alone
        image = image.convert(image.mode[:-1] + "A")
    kinds = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK", "LAB": "LAB"}
    kinds |= dict.fromkeys(("RGB", "RGBX", "RGBA", "P", "PA", "YCbCr", "HSV"), "RGB")
    require(
        image.mode in kinds,
        f"pixels of mode {image.mode}, of which nothing says what is white; save it with 8 bits a "
        "channel",
    )
    wanted = kinds[image.mode]
    # Palettes by way of RGBA, which takes each colour as it is, whatever is transparent.
    return image.convert("RGBA").convert("RGB") if image.mode in ("P", "PA") else (
        image if image.mode == wanted else image.convert(wanted)
    )  # fmt: skip


def _deep_grey(image: Image.Image) -> Integer[np.ndarray, "h w"]:
    """Grey of more than 8 bits, 0 for black."""
    values = np.asarray(image).astype(np.int64)
    require(
        image.format != "FITS",
        "FITS of more than 8 bits, of which nothing says what is white; save it with 8 bits",
    )
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # which state that 65535 is white
        _require_16_bits(image, values)
    if _depth(image) == 16 and not _is_spread(values):
        _require_light(int(values.max()) >> 8)
    # Pillow turns 8 bits round where TIFF says that 0 is white, and leaves 16 as they are.
    negative = image.format == "TIFF" and _tag(image, PHOTOMETRIC) == 0
    return 2 ** _depth(image) - 1 - values if negative else values


def _is_spread(values: Integer[np.ndarray, "h w"]) -> bool:
    """Whether these are 8 bits that fill 16."""
    return not (values % 257).any() or not (values % 256).any()


def _require_16_bits(image: Image.Image, values: Integer[np.ndarray, "h w"]) -> None:
    low, high = int(values.min()), int(values.max())
    # Nothing but black is black by any reading.
    known = low == high == 0 or (low >= 0 and 255 < high < 2**16 and _tag(image, BITS) != 16)
    require(
        known,
        f"integers in [{low}, {high}] of which nothing says what is white; save it with 8 bits, "
        "or with 16 without a sign",
    )


def _depth(image: Image.Image) -> int:
    # Pillow leaves 12 bits of TIFF as they are, and brings all others to 16.
    return 12 if _tag(image, BITS) == 12 else 16


def _tag(image: Image.Image, number: int) -> int | None:
    """The number under a tag of TIFF; None in other formats."""
    value = getattr(image, "tag_v2", {}).get(number)
    return value[0] if isinstance(value, tuple) else value


def _high_byte(values: Integer[np.ndarray, "h w"], depth: int) -> Grey:
    # Of 8 bits that were spread over 16, by times 257 or by times 256, it is what they were.
    return (values >> (depth - 8)).astype(np.uint8)


# Transparency


def _alpha(image: Image.Image, data: bytes) -> Grey | None:
    """How opaque each pixel is; None where all are."""
    if image.mode in ALPHA:
        whole = image.convert("LA") if image.mode == "La" else image
        alpha = np.asarray(whole.convert("RGBA").getchannel("A"))
    elif image.format == "PNG" and "transparency" in image.info:
        alpha = _but_one_colour(image, data)
    else:
        return None
    require(
        bool(alpha.max() > 0),
        "is transparent everywhere, as where an alpha channel was never filled; save it without",
    )
    return None if alpha.min() == 255 else alpha


def _but_one_colour(image: Image.Image, data: bytes) -> Grey:
    """PNG's tRNS: of one colour, written in the file's own depth, which Pillow leaves as it is."""
    depth, key = data[24], image.info["transparency"]
    require(
        depth < 16 or image.mode != "RGB",
        "a transparent colour of 16 bits cannot be told from its neighbours, of which 8 bits are "
        "read; save it with 8 bits, or with an alpha channel",
    )
    # 2 and 4 bits come spread over 8; of 1 bit Pillow spreads the colour too.
    spread = 255 // (2**depth - 1) if image.mode == "L" else 1
    values = np.asarray(image.convert("L") if image.mode == "1" else image)
    same = values == np.array(key) * spread
    return np.where(same.all(-1) if same.ndim == 3 else same, 0, 255).astype(np.uint8)


def _on_white(pixels: Pixels, alpha: Grey) -> Pixels:
    cover = alpha[..., None].astype(np.int64)
    # In whole numbers, rounded to the nearest: the same bytes on every machine.
    return ((pixels * cover + 255 * (255 - cover) + 127) // 255).astype(np.uint8)
