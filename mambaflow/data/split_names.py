"""Which split a name is, or is nearly: `data.tree` has the rule."""

import re

SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
# What else a split is called, never a split's whole name for certain; the short ones only beside
# another word, as in imagesTr: alone they are languages, too.
NEARLY = {
    "train": ("trn", "tr"),
    "validation": ("vld", "validate", "development"),
    "test": ("tst", "ts", "te", "eval", "evaluation", "holdout"),
}
# Words that tell nothing of what is on pictures: test_images is no class, and test_tube is one.
OF_ANYTHING = {
    "set", "sets", "data", "dataset", "image", "images", "img", "imgs", "pic", "pics", "picture",
    "pictures", "photo", "photos", "sample", "samples", "split", "part", "dir", "folder", "the",
    "my", "full", "small", "new", "old", "raw",
}  # fmt: skip


def split_of(name: str) -> str | None:
    """The split that a folder of exactly this name is."""
    word = re.sub(r"\d{4}$", "", name.lower())  # as in train2017
    return next((split for split, words in SPLITS.items() if word in words), None)


def nearly_split(name: str) -> str:
    """The split that a word is, or that is a part of it; "" for none."""
    return split_of(name) or split_in(name) or ""


def _words(name: str) -> list[str]:
    """Those of a name such as trainA, seg_test or testset, in small letters."""
    words = [w.lower() for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)]
    ends = "|".join(OF_ANYTHING)
    kinds = [word for words in (*SPLITS.values(), *NEARLY.values()) for word in words]
    known = "|".join(word for word in kinds if len(word) > 2)
    cut = [re.fullmatch(rf"({known})({ends})", w) for w in words]
    return [
        part for w, two in zip(words, cut, strict=True) for part in (two.groups() if two else [w])
    ]


def split_in(name: str) -> str | None:
    """The split that is a word of a name such as trainA or seg_test, and not the whole of it."""
    words, nearly = _words(name), {w: split for split, ws in NEARLY.items() for w in ws}
    found = (split_of(w) or nearly.get(w if len(w) > 2 or len(words) > 1 else "") for w in words)
    return next((split for split in found if split), None) if not split_of(name) else None


def is_of_anything(name: str) -> bool:
    """Whether a name that is nearly a split's says nothing besides."""
    nearly = {word for words in (*SPLITS.values(), *NEARLY.values()) for word in words}
    return all(w in nearly or w in OF_ANYTHING or len(w) == 1 for w in _words(name))
