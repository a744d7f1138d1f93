"""Decoding: the same content gives the same pixels however it was saved, and no silent guess."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from mambaflow.data.decode import ADAM7, MOST_PIXELS, decode
from mambaflow.data.sample import photograph
from mambaflow.data.source import decoded

ORIENTATION = 274
COLOUR = photograph("coffee.png")[100:116, 100:124]  # 16 x 24, so that a turn shows
GREY = COLOUR[..., 0]
THREE = np.stack([GREY] * 3, -1)
RNG = np.random.default_rng(0)


def saved(image, kind="PNG", **settings):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    sink = io.BytesIO()
    image.save(sink, kind, **settings)
    return sink.getvalue()


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(rows, depth, kind, *extra):
    """A PNG by hand, of what Pillow does not write."""
    height, width = len(rows), len(rows[0]) * 8 // depth // {0: 1, 2: 3, 4: 2, 6: 4}[kind]
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    chunks = [(b"IHDR", head), *extra, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks)


def deep(values):
    """Rows of a PNG of 16 bits."""
    return [row.astype(">u2").tobytes() for row in values.reshape(len(values), -1)]


def turned(image, orientation):
    """What a camera that was held so would have stored of an upright scene."""
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
            6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}  # fmt: skip
    image = Image.fromarray(image)
    way = undo.get(orientation)
    return image.transpose(getattr(Image.Transpose, way)) if way else image


def refusal(data):
    item = decoded(0, 0, data, "t/cat/d.png")
    assert item.pixels is None and item.fault.startswith("t/cat/d.png: "), "taken without a word"
    return item.fault


# Lossless ways of saving one picture


WAYS = {
    "png": {}, "interlaced png": {"kind": "PNG"}, "bmp": {"kind": "BMP"}, "tiff": {"kind": "TIFF"},
    "tiff lzw": {"kind": "TIFF", "compression": "tiff_lzw"},
    "webp": {"kind": "WEBP", "lossless": True, "exact": True}, "ppm": {"kind": "PPM"},
    "tga": {"kind": "TGA"}, "jpeg2000": {"kind": "JPEG2000"}, "sgi": {"kind": "SGI"},
    "pcx": {"kind": "PCX"}, "dds": {"kind": "DDS"}, "qoi": {"kind": "QOI"},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_picture_is_the_same_in_every_lossless_format(way):
    assert np.array_equal(decode(saved(COLOUR, **WAYS[way])), COLOUR)


GREY_WAYS = {
    "L": (GREY, {}),
    "RGB": (THREE, {}),
    "16 bits png": (GREY.astype(np.uint16) * 257, {}),
    "16 bits png by 256": (GREY.astype(np.uint16) * 256, {}),
    "16 bits tiff": (GREY.astype(np.uint16) * 257, {"kind": "TIFF"}),
    "16 bits pgm": (GREY.astype(np.uint16) * 257, {"kind": "PPM"}),
    "16 bits jpeg2000": (GREY.astype(np.uint16) * 257, {"kind": "JPEG2000"}),
    "16 bits in 32": (GREY.astype(np.int32) * 257, {"kind": "TIFF"}),
    "big endian tiff": (Image.fromarray((GREY.astype(np.uint16) * 257).astype(">u2")),
                        {"kind": "TIFF"}),
    "8 bits pgm": (GREY, {"kind": "PPM"}),
    "8 bits gif": (GREY, {"kind": "GIF"}),
    "palette": (Image.fromarray(GREY).convert("P"), {}),
    "opaque LA": (Image.fromarray(GREY).convert("LA"), {}),
    "opaque RGBA": (Image.fromarray(THREE).convert("RGBA"), {"kind": "WEBP", "lossless": True}),
}  # fmt: skip


@pytest.mark.parametrize("way", GREY_WAYS)
def test_grey_is_the_same_in_every_depth_and_mode(way):
    image, settings = GREY_WAYS[way]
    assert np.array_equal(decode(saved(image, **settings)), THREE)


def test_sixteen_bits_of_grey_and_of_colour_are_read_alike():
    values = RNG.integers(0, 2**16, (16, 24), np.uint16)
    colour = np.stack([values] * 3, -1)
    for depth_first in (png(deep(values), 16, 0), png(deep(colour), 16, 2)):
        assert np.array_equal(decode(depth_first), colour >> 8)


def tiff(values, bits, photometric, packed=None, *, apart=False, without=(), **more):
    """A TIFF by hand; `more` are tags such as t338."""
    height, width, *channels = values.shape
    count = channels[0] if channels else 1
    planes = [values[..., c] for c in range(count)] if apart else [values]
    strips = [p.tobytes() for p in planes] if packed is None else [packed]
    places = [8 + sum(map(len, strips[:i])) for i in range(len(strips))]
    tags = {256: (4, [width]), 257: (4, [height]), 258: (3, [bits] * count), 259: (3, [1]),
            262: (3, [photometric]), 273: (4, places), 277: (3, [count]), 278: (4, [height]),
            279: (4, [len(s) for s in strips]), 284: (3, [1 + apart])}  # fmt: skip
    for name, value in more.items():
        each = [value] * (count if name == "t339" else 1)
        tags[int(name[1:])] = 3, value if isinstance(value, list) else each
    kept = sorted((tag, *about) for tag, about in tags.items() if tag not in without)
    start, entries, beyond = places[-1] + len(strips[-1]), b"", b""
    for tag, kind, numbers in kept:
        packed_numbers = struct.pack(f"<{len(numbers)}{' HI'[kind - 2]}", *numbers)
        if len(packed_numbers) > 4:
            place = start + 6 + 12 * len(kept) + len(beyond)
            beyond, packed_numbers = beyond + packed_numbers, struct.pack("<I", place)
        entries += struct.pack("<HHI", tag, kind, len(numbers)) + packed_numbers.ljust(4, b"\0")
    head = struct.pack("<2sHI", b"II", 42, start) + b"".join(strips)
    return head + struct.pack("<H", len(kept)) + entries + bytes(4) + beyond


def test_a_tiff_whose_zero_is_white_is_turned_round_in_16_bits_as_in_8():
    assert np.array_equal(decode(tiff(255 - GREY, 8, 0)), THREE)
    assert np.array_equal(decode(tiff(65535 - GREY.astype("<u2") * 257, 16, 0)), THREE)
    assert np.array_equal(decode(tiff(GREY.astype("<u2") * 257, 16, 1)), THREE)


def test_twelve_bits_are_scaled_by_their_own_depth():
    values = GREY.ravel().astype(int) << 4 | GREY.ravel() >> 4  # 8 bits spread over 12
    pairs = zip(values[::2], values[1::2], strict=True)
    packed = b"".join(bytes((a >> 4, (a & 15) << 4 | b >> 8, b & 255)) for a, b in pairs)
    assert np.array_equal(decode(tiff(GREY, 12, 1, packed)), THREE)


@pytest.mark.parametrize("high", [200, 65536, 2**31 - 1])
def test_32_bit_integers_without_a_known_white_are_refused(high):
    values = np.full((4, 4), high, np.int32)
    assert f"integers in [{high}, {high}]" in refusal(saved(values, "TIFF"))


@pytest.mark.parametrize("scale", [1, 255])
def test_floats_are_refused_since_nothing_says_what_is_white(scale):
    values = (GREY / 255 * scale).astype(np.float32)
    assert "mode F, of which nothing says what is white; save it with 8 bits" in refusal(
        saved(values, "TIFF")
    )


@pytest.mark.parametrize("values", [GREY.astype(np.int8), GREY.astype("<i2")], ids=["8", "16"])
def test_numbers_with_a_sign_are_refused_at_any_depth(values):
    data = tiff(values, 8 * values.itemsize, 1, t339=2)
    assert "nothing says what is white" in refusal(data)


DEEP = GREY.astype(np.uint16)
IN_16 = {
    "8 bits of grey": saved(DEEP), "12 bits of grey": saved(DEEP * 16),
    "12 bits of a TIFF": saved(DEEP * 16, "TIFF"),
    "12 bits in 32": saved(DEEP * np.int32(16), "TIFF"),
    "10 bits of a JPEG 2000": saved(DEEP * 4, "JPEG2000"),
    "8 bits of colour": png(deep(COLOUR.astype(np.uint16)), 16, 2),
    "12 bits of grey and alpha":
        png(deep(np.dstack([DEEP * 16, np.full_like(DEEP, 65535)])), 16, 4),
    "8 bits of a TIFF's palette": tiff(GREY, 8, 3, t320=[*range(256)] * 3),
    "12 bits of a TIFF's colours": tiff(COLOUR.astype("<u2") * 16, 16, 2),
}  # fmt: skip


@pytest.mark.parametrize("what", IN_16)
def test_fewer_bits_in_the_place_of_16_are_not_taken_for_the_dark(what):
    assert "nearly black, as where 8 or 12 bits stand in the place of 16" in refusal(IN_16[what])


def test_what_is_dark_in_8_bits_is_dark_in_16():
    dark = GREY // 20
    for spread in (257, 256):
        got = decode(saved(dark.astype(np.uint16) * spread))
        assert np.array_equal(got[..., 0], dark)
    ink = np.dstack([np.zeros((16, 24, 3), np.uint16), DEEP * 257])  # black, more or less of it
    assert decode(png(deep(ink), 16, 6))[..., 0].max() > 100


def test_channels_of_a_tiff_may_be_apart_unless_pillow_mixes_them_up():
    assert np.array_equal(decode(tiff(COLOUR, 8, 2, apart=True)), COLOUR)
    assert np.array_equal(decode(tiff(COLOUR.astype("<u2") * 257, 16, 2)), COLOUR)
    apart = tiff(COLOUR.astype("<u2") * 257, 16, 2, apart=True)
    assert "16 bits with each channel by itself" in refusal(apart)


def test_what_a_tiff_leaves_open_is_refused():
    four = np.dstack([COLOUR, HALF])
    assert np.array_equal(decode(tiff(four, 8, 2, t338=2)), ON_WHITE)
    assert np.array_equal(decode(tiff(four, 8, 2, t338=0)), COLOUR)  # no alpha, whatever it is
    assert "does not say what the fourth is" in refusal(tiff(four, 8, 2))
    assert "whether 0 is black" in refusal(tiff(GREY, 8, 1, without=(262,)))
    for values in (COLOUR / np.float32(255), GREY.astype(np.float16), GREY.astype(np.float64)):
        data = tiff(values, 8 * values.itemsize, 2 if values.ndim == 3 else 1, t339=3)
        assert "a TIFF" in refusal(data) and "of floats" in refusal(data)


def test_a_palette_of_a_tiff_is_of_16_bits_and_a_picture_of_one_slice():
    levels = [257 * level for level in range(256)] * 3
    assert np.array_equal(decode(tiff(GREY, 8, 3, t320=levels)), THREE)
    assert "holds 2 slices" in refusal(tiff(GREY, 8, 1, t32997=2))


def jpeg2000(values, bits, signed=False):
    """A JPEG 2000 that states other bits than Pillow would write."""
    data = bytearray(saved(values, "JPEG2000"))
    place = data.index(b"\xff\x51") + 40
    count = 1 if values.ndim == 2 else 3
    data[place : place + 3 * count : 3] = bytes([bits - 1 | 128 * signed] * count)
    return bytes(data)


def test_samples_of_a_jpeg_2000_that_pillow_reads_otherwise_are_refused():
    assert np.array_equal(decode(jpeg2000(COLOUR, 8)), COLOUR)
    assert "channels of [4] bits" in refusal(jpeg2000(GREY, 4))
    for values in (GREY, COLOUR, DEEP * 257):
        bits = 8 * values.itemsize
        assert f"channels of {[-bits] * (3 if values.ndim == 3 else 1)} bits" in refusal(
            jpeg2000(values, bits, signed=True)
        )


def test_fits_of_more_than_8_bits_is_refused():
    def fits(values, bits):
        lines = ("SIMPLE  =                    T", f"BITPIX  = {bits:20d}",
                 "NAXIS   =                    2", f"NAXIS1  = {24:20d}", f"NAXIS2  = {16:20d}",
                 "END")  # fmt: skip
        return "".join(line.ljust(80) for line in lines).ljust(2880).encode() + values.tobytes()

    assert np.array_equal(decode(fits(GREY[::-1], 8)), THREE)  # from the bottom up
    assert "FITS of more than 8 bits" in refusal(fits(GREY.astype(">i2") * 100, 16))


def test_what_is_no_picture_is_named_by_how_it_begins():
    assert "holds no bytes: there is a name alone" in refusal(b"")
    assert "begin with b'<html>404'" in refusal(b"<html>404")
    assert "fetch it by git lfs pull" in refusal(b"version https://git-lfs.github.com/spec/v1\n")


def test_one_bit_is_black_and_white():
    bits = GREY > 100
    for kind in ("PNG", "TIFF", "PPM", "BMP"):
        assert np.array_equal(decode(saved(bits, kind)), np.stack([bits * np.uint8(255)] * 3, -1))


# Which way up


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_orientation_says(kind, orientation):
    stored = turned(COLOUR, orientation)
    exif = stored.getexif()
    exif[ORIENTATION] = orientation
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
    off = decode(saved(stored, kind, exif=exif, **lossless.get(kind, {}))).astype(int) - COLOUR
    assert np.abs(off).mean() < (8 if kind in ("JPEG", "MPO") else 1e-9)


XMP = [
    '<a tiff:Orientation="6"/>', "<a tiff:Orientation='6'/>", '<a tiff:Orientation = " 6"/>',
    "<tiff:Orientation>6</tiff:Orientation>", "<tiff:Orientation>\n 6\n</tiff:Orientation>",
]  # fmt: skip


@pytest.mark.parametrize("xmp", XMP)
def test_an_orientation_in_xmp_alone_counts_too(xmp):
    stored, text = turned(COLOUR, 6), PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", xmp)
    raw = xmp.encode()
    for data in (saved(stored, pnginfo=text), saved(stored, "TIFF", tiffinfo={700: raw}),
                 saved(stored, "TIFF", tiffinfo={700: raw, ORIENTATION: 6}),
                 saved(stored, "WEBP", lossless=True, xmp=raw)):  # fmt: skip
        assert np.array_equal(decode(data), COLOUR)


@pytest.mark.parametrize("name", ["exif", "APP1", "xmp"])
def test_an_orientation_that_imagemagick_wrote_into_a_text_counts_too(name):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = XMP[1].encode() if name == "xmp" else b"Exif\0\0" + exif.tobytes()[-26:]
    assert name == "xmp" or data[6:8] in (b"II", b"MM")
    text = PngImagePlugin.PngInfo()
    text.add_text(f"Raw profile type {name}", f"\n{name}\n{len(data):8d}\n{data.hex()}\n", zip=True)
    assert np.array_equal(decode(saved(turned(COLOUR, 6), pnginfo=text)), COLOUR)


@pytest.mark.parametrize("orientation", [0, 9])
def test_an_orientation_that_is_none_leaves_a_picture_as_it_is(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    assert np.array_equal(decode(saved(COLOUR, exif=exif)), COLOUR)


@pytest.mark.parametrize(
    ("kind", "value"), [(2, b"6\0\0\0"), (1, b"\6\0\0\0")], ids=["text", "bytes"]
)
def test_an_orientation_that_is_no_number_is_refused(kind, value):
    entry = struct.pack("<HHI", ORIENTATION, kind, len(value.rstrip(b"\0"))) + value
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + bytes(4)
    assert "its orientation (=" in refusal(saved(COLOUR, "JPEG", exif=exif))


def test_broken_exif_is_refused():
    assert "its EXIF is broken" in refusal(saved(COLOUR, exif=b"garbage-garbage"))


# Transparency


HALF = np.where(np.arange(24) < 12, 0, 255).astype(np.uint8)[None].repeat(16, 0)
ON_WHITE = np.where(HALF[..., None] == 0, 255, COLOUR).astype(np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "TGA"])
def test_what_is_transparent_shows_white_and_not_what_lies_under_it(kind):
    image = Image.fromarray(np.dstack([COLOUR, HALF]))
    settings = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert np.array_equal(decode(saved(image, kind, **settings)), ON_WHITE)


def test_a_tgas_fourth_channel_that_its_head_does_not_call_alpha_is_refused():
    for alpha, taken in ((255, True), (128, False)):
        data = bytearray(saved(np.dstack([COLOUR, np.full_like(GREY, alpha)]), "TGA"))
        data[17] &= 0xF0
        if taken:
            assert np.array_equal(decode(bytes(data)), COLOUR)
        else:
            assert "a TGA of 4 channels, of whose last the head counts 0" in refusal(bytes(data))


def test_half_transparent_is_half_way_to_white():
    image = np.dstack([COLOUR, np.full_like(GREY, 51)])
    want = np.round(COLOUR * 0.2 + 255 * 0.8)
    assert np.array_equal(decode(saved(image)), want)


def test_a_transparent_entry_of_a_palette_shows_white():
    image = Image.fromarray(np.array([[0, 1], [1, 2]], np.uint8)).convert("P")
    image.putpalette([9, 9, 9, 200, 10, 20, 30, 30, 250])
    want = np.array([[[255] * 3, [200, 10, 20]], [[200, 10, 20], [30, 30, 250]]])
    for settings in ({"transparency": 0}, {"transparency": b"\x00\xff"}):
        assert np.array_equal(decode(saved(image, **settings)), want)
    assert np.array_equal(decode(saved(image, "GIF", transparency=0)), want)
    # No pixel has the colour that would be transparent.
    opaque = decode(saved(image, transparency=7 if len(image.getpalette()) > 21 else 0))
    assert opaque.shape == (2, 2, 3)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_a_transparent_grey_is_of_the_files_own_depth(depth):
    top = 2**depth - 1  # white and black beside one another, white transparent
    row = {1: [0b01010101], 2: [0b00110011], 4: [0x0F, 0x0F], 8: [0, 255, 0, 255]}[depth]
    black = png([row], depth, 0, (b"tRNS", struct.pack(">H", 0)))
    assert (decode(black) == 255).all()
    white = decode(png([row], depth, 0, (b"tRNS", struct.pack(">H", top))))
    assert (white[:, ::2] == 0).all() and (white[:, 1::2] == 255).all()


def test_a_transparent_colour_of_a_png_shows_white():
    row = [10, 20, 30, 40, 50, 60]
    key = (b"tRNS", struct.pack(">HHH", 10, 20, 30))
    assert decode(png([row], 8, 2, key)).tolist() == [[[255] * 3, [40, 50, 60]]]
    deep_key = (b"tRNS", struct.pack(">HHH", 2570, 5140, 7710))
    wide = [b for v in row for b in (v, v)]
    assert "a transparent colour of 16 bits" in refusal(png([wide], 16, 2, deep_key))


def test_a_transparent_grey_of_16_bits_is_told_from_its_neighbour():
    values = np.array([[10000, 10001]], np.uint16)
    got = decode(png(deep(values), 16, 0, (b"tRNS", struct.pack(">H", 10000))))
    assert got[0, :, 0].tolist() == [255, 10001 >> 8]


def test_a_picture_transparent_everywhere_is_refused():
    image = np.dstack([COLOUR, np.zeros_like(GREY)])
    for kind in ("PNG", "TGA", "TIFF"):
        assert "transparent everywhere" in refusal(saved(image, kind))


# Inks and colours


def test_cmyk_shows_the_same_in_tiff_and_in_adobes_inverted_jpeg():
    inks = Image.fromarray(COLOUR).convert("CMYK")
    assert np.array_equal(decode(saved(inks, "TIFF")), np.asarray(inks.convert("RGB")))
    jpeg = decode(saved(inks, "JPEG", quality=100, subsampling=0))
    assert np.abs(jpeg.astype(int) - COLOUR).mean() < 5


def test_a_jpeg_of_four_inks_that_does_not_say_which_way_up_is_refused():
    data = saved(Image.fromarray(COLOUR).convert("CMYK"), "JPEG")
    place = data.index(b"Adobe")
    (length,) = struct.unpack(">H", data[place - 2 : place])
    assert "without Adobe's marker" in refusal(data[: place - 4] + data[place - 2 + length :])


def test_lab_and_ycbcr_are_colours():
    lab = Image.fromarray(COLOUR)
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    back = decode(saved(ImageCms.applyTransform(lab, to_lab), "TIFF"))
    assert np.abs(back.astype(int) - COLOUR).mean() < 3
    wash = Image.fromarray(COLOUR).convert("YCbCr")
    assert np.abs(decode(saved(wash, "TIFF")).astype(int) - COLOUR).mean() < 3


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def matrix_profile(red, green, blue, gamma):
    """A version 2 profile of three primaries in the D50 connection space and one exponent."""

    def xyz(values):
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"k\0"
    about = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + b"\0" * 79
    about += b"\0" * (-len(about) % 4)
    parts = {b"desc": about, b"cprt": b"text\0\0\0\0k\0\0\0", b"wtpt": xyz((0.9642, 1, 0.8249)),
             b"rXYZ": xyz(red), b"gXYZ": xyz(green), b"bXYZ": xyz(blue), b"rTRC": curve,
             b"gTRC": curve, b"bTRC": curve}  # fmt: skip
    place, table, body = 128 + 4 + 12 * len(parts), b"", b""
    for name, part in parts.items():
        table += name + struct.pack(">II", place + len(body), len(part))
        body += part
    head = struct.pack(">I4sI4s4s4s", place + len(body), b"lcms", 0x02100000, b"mntr", b"RGB ",
                       b"XYZ ") + b"\0" * 12 + b"acsp" + b"\0" * 28  # fmt: skip
    head += struct.pack(">iii", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I", len(parts)) + table + body


# Its primaries by Bruce Lindbloom, adapted to D50.
ADOBE_RGB = matrix_profile(
    (0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457), 2.2
)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "BMP"])
def test_an_srgb_profile_changes_nothing(kind):
    settings = {"lossless": True} if kind == "WEBP" else {}
    for image in (COLOUR, GREY):
        tagged = decode(saved(image, kind, icc_profile=SRGB, **settings))
        assert np.array_equal(tagged, COLOUR if image is COLOUR else THREE)


def test_another_profile_is_converted_to_srgb():
    def linear(values):
        return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)

    # Pale colours, which both profiles have: Adobe's numbers of them by its published matrix.
    pale = np.linspace(90, 190, 16 * 24 * 3).astype(np.uint8).reshape(16, 24, 3)
    pale = pale[:, :, ::-1] // 2 + pale // 2
    to_adobe = np.array([[0.71519, 0.28481, 0], [0, 1, 0], [0, 0.04117, 0.95883]])
    numbers = np.round(255 * (linear(pale / 255) @ to_adobe.T) ** (1 / 2.19921875))
    stored = numbers.astype(np.uint8)
    for kind in ("PNG", "TIFF"):
        got = decode(saved(stored, kind, icc_profile=ADOBE_RGB)).astype(int)
        assert np.abs(got - pale).max() <= 2
    vivid = np.full((4, 4, 3), (60, 200, 60), np.uint8)
    shown = decode(saved(vivid, icc_profile=ADOBE_RGB))
    assert shown[0, 0, 0] < 20 and abs(int(shown[0, 0, 1]) - 200) < 10  # red leaves sRGB


def test_a_profile_that_is_there_in_part_alone_is_refused():
    data = saved(COLOUR, "JPEG", icc_profile=ADOBE_RGB)
    place = data.index(b"ICC_PROFILE\0") + 12
    for one_of in (b"\1\2", b"\2\2"):
        assert "in part alone" in refusal(data[:place] + one_of + data[place + 2 :])
    broken = (b"iCCP", b"k\0\0" + b"no zlib")
    assert "in part alone, or broken" in refusal(png([COLOUR[0].tobytes()], 8, 2, broken))


def test_a_profile_counts_where_pillow_passes_it_over():
    paletted = Image.fromarray(COLOUR).quantize(256)
    want, of_palette = (decode(saved(i, icc_profile=ADOBE_RGB)) for i in (COLOUR, paletted))
    gif, length = saved(paletted, "GIF"), len(ADOBE_RGB)
    parts = [ADOBE_RGB[i : i + 255] for i in range(0, length, 255)]
    blocks = b"".join(bytes([len(part)]) + part for part in parts)
    behind = 13 + 3 * 256  # the palette
    extension = b"!\xff\x0bICCRGBG1012" + blocks + b"\0"
    assert np.array_equal(decode(gif[:behind] + extension + gif[behind:]), of_palette)

    bmp = saved(COLOUR, "BMP")
    pixels, head = bmp[54:], bytearray(bmp[14:54].ljust(124, b"\0"))
    head[:4], head[56:60] = struct.pack("<I", 124), b"DEBM"
    head[112:120] = struct.pack("<II", 124 + len(pixels), length)
    start = struct.pack("<2sIHHI", b"BM", 138 + len(pixels) + length, 0, 0, 138)
    assert np.array_equal(decode(start + head + pixels + ADOBE_RGB), want)

    jp2 = saved(COLOUR, "JPEG2000")
    head, box = jp2.index(b"jp2h") - 4, jp2.index(b"colr") - 4
    size = int.from_bytes(jp2[box : box + 4], "big")
    other = struct.pack(">I4s3B", 11 + length, b"colr", 2, 0, 0) + ADOBE_RGB
    longer = int.from_bytes(jp2[head : head + 4], "big") - size + len(other)
    whole = jp2[:head] + struct.pack(">I", longer) + jp2[head + 4 : box] + other + jp2[box + size :]
    assert np.array_equal(decode(whole), want)


def test_colours_by_number_are_srgbs_or_refused():
    avif, jp2 = saved(COLOUR, "AVIF", quality=100), saved(COLOUR, "JPEG2000")
    place = avif.index(b"colrnclx") + 8
    for numbers, told in (((12, 13), "primaries 12"), ((9, 16), "curve 16")):
        data = avif[:place] + struct.pack(">HH", *numbers) + avif[place + 4 :]
        assert "not sRGB's: primaries" in refusal(data) and told in refusal(data)
    assert np.abs(decode(avif).astype(int) - COLOUR).mean() < 4
    place = jp2.index(b"colr") + 7
    romm = jp2[:place] + struct.pack(">I", 21) + jp2[place + 4 :]
    assert "not sRGB's: colour space 21" in refusal(romm)


def test_a_profile_counts_for_palettes_and_under_transparency():
    vivid = np.full((4, 4, 3), (60, 200, 60), np.uint8)
    want = decode(saved(vivid, icc_profile=ADOBE_RGB))
    palette = Image.fromarray(vivid).quantize(4)
    assert np.array_equal(decode(saved(palette, icc_profile=ADOBE_RGB)), want)
    half = np.dstack([vivid, np.full((4, 4), [0, 255, 255, 255], np.uint8)])
    got = decode(saved(half, icc_profile=ADOBE_RGB))
    assert (got[:, 0] == 255).all() and np.array_equal(got[:, 1:], want[:, 1:])


@pytest.mark.parametrize(
    ("image", "profile", "message"),
    [
        (COLOUR, b"no profile at all", "its colour profile (17 bytes, "),
        (COLOUR, SRGB[:200], "is broken; save it as sRGB"),
        (Image.fromarray(COLOUR).convert("CMYK"), SRGB, "in CMYK with a colour profile for RGB"),
    ],
)
def test_a_profile_that_cannot_be_used_is_refused(image, profile, message):
    assert message in refusal(saved(image, "TIFF", icc_profile=profile))


def gamma_png(value, *extra):
    row = list(range(0, 255, 5))
    return png([row], 8, 0, (b"gAMA", struct.pack(">I", value)), *extra), np.array(row)


def test_a_pngs_gamma_is_applied_unless_it_is_that_of_srgb():
    data, row = gamma_png(45455)
    assert np.array_equal(decode(data)[0, :, 0], row)
    data, _ = gamma_png(100000)  # linear light
    light = row / 255
    want = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    assert np.array_equal(decode(data)[0, :, 0], np.round(255 * want))
    data, _ = gamma_png(100000, (b"sRGB", b"\0"))  # which the standard lets win
    assert np.array_equal(decode(data)[0, :, 0], row)
    assert "gAMA (=0.0) must be positive" in refusal(gamma_png(0)[0])


def test_primaries_and_code_points_that_are_not_srgbs_are_refused():
    srgb = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
    adobe = (0.3127, 0.329, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)

    def stating(primaries):
        body = struct.pack(">8I", *(round(p * 100000) for p in primaries))
        return png([[1, 2, 3]], 8, 2, (b"cHRM", body))

    assert decode(stating(srgb)).tolist() == [[[1, 2, 3]]]
    assert "cHRM" in refusal(stating(adobe))
    assert decode(png([[1, 2, 3]], 8, 2, (b"cICP", bytes((1, 13, 0, 1))))).tolist() == [[[1, 2, 3]]]
    assert "cICP (9, 16, 0, 1)" in refusal(png([[1, 2, 3]], 8, 2, (b"cICP", bytes((9, 16, 0, 1)))))


def test_exif_that_says_adobe_rgb_without_a_profile_is_refused():
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    data = saved(COLOUR, "JPEG", exif=exif)
    assert "EXIF says Adobe RGB" in refusal(data)
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA001] = 2
    assert "EXIF says Adobe RGB" in refusal(saved(COLOUR, "JPEG", exif=exif))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_primaries_in_exif_and_tiff_are_srgbs_or_refused(kind):
    plain = decode(saved(COLOUR, kind))
    # The last says sRGB besides, which Pillow writes into a JPEG alone.
    cases = [((0.3, 0.6), None, True), ((0.21, 0.71), None, False), ((0, 0), None, True),
             ((0.21, 0.71), 1, kind == "JPEG")]  # fmt: skip
    for green, space, taken in cases:
        exif = Image.Exif()
        exif[318], exif[319] = (0.3127, 0.329), (0.64, 0.33, *green, 0.15, 0.06)
        if space:
            exif.get_ifd(0x8769)[0xA001] = space
        data = saved(COLOUR, kind, exif=exif)
        if taken:
            assert np.array_equal(decode(data), plain)
        else:
            assert "0.21, 0.71, 0.15, 0.06) are not sRGB's" in refusal(data)


# Several pictures, and damage


FRAMES = [Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_an_animation_or_a_file_of_pages_is_refused(kind):
    data = saved(FRAMES[0], kind, save_all=True, append_images=FRAMES[1:])
    assert "holds 2 frames, and nothing says which is meant; save that one" in refusal(data)


def test_a_file_of_one_frame_is_a_picture_whatever_its_format():
    for kind in ("GIF", "TIFF", "PNG"):
        assert decode(saved(FRAMES[0], kind, save_all=True)).shape == COLOUR.shape


def test_the_first_picture_of_an_mpo_is_the_photograph():
    data = saved(FRAMES[0], "MPO", save_all=True, append_images=FRAMES[1:], quality=95)
    assert np.abs(decode(data).astype(int) - COLOUR).mean() < 8


def test_a_gif_that_its_frame_does_not_fill_is_refused():
    data = bytearray(saved(FRAMES[0], "GIF"))
    data[6:10] = struct.pack("<HH", 99, 99)  # of the whole
    assert "a GIF that its frame does not fill" in refusal(bytes(data))


def interlaced(values):
    """What is packed of an interlaced PNG."""
    passes = (values[y::down, x::across] for x, y, across, down in ADAM7)
    return b"".join(b"\0" + row.tobytes() for part in passes if part.size for row in part)


@pytest.mark.parametrize("values", [COLOUR, COLOUR[:3, :2], GREY, GREY[:1, :1]], ids=np.shape)
@pytest.mark.parametrize("way", [0, 1], ids=["plain", "interlaced"])
def test_a_png_whose_rows_end_too_soon_is_refused(values, way):
    """All checksums are right; Pillow puts zeros for what lacks."""
    packed = interlaced(values) if way else b"".join(b"\0" + row.tobytes() for row in values)
    height, width, kind = *values.shape[:2], 2 * (values.ndim == 3)
    head = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, way)

    def cut(end):
        whole = [(b"IHDR", head), (b"IDAT", zlib.compress(packed[:end])), (b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in whole)

    assert np.array_equal(decode(cut(None)), values if kind else np.stack([values] * 3, -1))
    for end in (0, len(packed) // 2, -1):
        assert "its last rows are missing" in refusal(cut(end))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF"])
def test_zeros_in_the_place_of_an_end_are_no_end(kind):
    """As where a download was to write the rest, and its file was made as long as that at once."""
    small = b"Exif\0\0II*\0\x08" + bytes(9) + saved(COLOUR[:8, :8], "JPEG")  # which has an end
    data = saved(COLOUR, kind, quality=90, **({"exif": small} if kind == "JPEG" else {}))
    kept = data.rindex(b"\xff\xda") + 60 if kind == "JPEG" else int(0.6 * len(data))
    assert "its end is missing" in refusal(data[:kept] + bytes(3 * len(data)))
    if kind != "AVIF":
        assert decode(data + bytes(5000)).shape == COLOUR.shape  # padded
    if kind == "JPEG":
        assert decode(data + b"\0\0\0\x18ftypmp42\xff\xda").shape == COLOUR.shape  # with a film


@pytest.mark.parametrize("way", ["bmp", "tiff", "tiff lzw", "webp", "ppm", "tga", "jpeg2000", "sgi",
                                 "pcx", "dds", "qoi"])  # fmt: skip
def test_a_picture_that_is_cut_off_is_refused_in_every_format(way):
    data = saved(COLOUR, **WAYS[way])
    for share in (0.3, 0.6, 0.9):
        refusal(data[: int(share * len(data))])


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_unpacked():
    side = int(MOST_PIXELS**0.5) + 2
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    tiny = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in tiny)
    with pytest.warns(Image.DecompressionBombWarning):
        assert f"must be at most {MOST_PIXELS} in all" in refusal(data)
