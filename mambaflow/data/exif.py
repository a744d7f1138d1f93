"""EXIF of a picture, and which way up it is stored: by EXIF, XMP, TIFF, or text in a PNG."""

import re

from PIL import Image

from mambaflow.checks import require

ORIENTATION = 274  # the name of a tag
IN_XMP = re.compile(rb"""tiff:Orientation(?:\s*=\s*["']|\s*>)\s*([0-9])""")
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def exif_of(image: Image.Image) -> Image.Exif:
    try:
        return image.getexif()
    except Exception as error:  # Pillow has no one error for it
        raise ValueError(f"its EXIF is broken ({error}); save it without") from error


def orientation(image: Image.Image) -> int:
    """How a picture that is not unpacked yet is stored, as EXIF counts."""
    stated = exif_of(image).get(ORIENTATION)
    if stated is not None:
        require(
            isinstance(stated, int),
            f"its orientation (={stated!r}) must be a number of EXIF's kind; turn it upright, and "
            "save it without",
        )
        # As it unpacks a TIFF Pillow turns it, by what it has found itself.
        return 1 if image.format == "TIFF" else stated
    xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
    hidden = _hidden(image)
    for text in (xmp.encode() if isinstance(xmp, str) else xmp, *hidden):
        if found := IN_XMP.search(text):
            return int(found[1])
    for text in hidden:
        if text.startswith(b"Exif\0\0"):
            exif = Image.Exif()
            exif.load(text)
            return int(exif.get(ORIENTATION, 1))
    return 1


def _hidden(image: Image.Image) -> list[bytes]:
    """What ImageMagick writes into texts of a PNG: digits below three lines of a head."""
    texts = (t for n, t in image.info.items() if str(n).startswith("Raw profile type "))
    return [bytes.fromhex("".join(str(text).split("\n")[3:])) for text in texts]
