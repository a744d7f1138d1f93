"""What of a folder is data: its splits, classes and pictures; and what is passed over, and why.

The rules, of which none looks at what is in a file:

- Hidden names, and those that systems and programs leave behind (`LEFT_BEHIND`), are no data.
- A picture is a file with an ending of a format that Pillow unpacks. Other files are passed over.
- A split is a folder called train or training, val, valid, validation or dev, test or testing, in
  any case, with a year or without. Folders such as trainA and testset are nearly that, and refused.
- Without splits the folder itself is training.
- Inside a split: CLASS/NAME, else CLASS/images/NAME; where no folder has pictures: NAME, without
  classes. What lies deeper is passed over, unless a class would vanish with it: that is refused, as
  are two classes that are one folder, a split among the classes, and masks/ beside images/.
- Names of pictures say nothing but this: 7_mask beside 7 is its mask, and without splits train_1
  beside test_1 is of another one. Both are refused.
- A link to what is not there is refused if it may have been a picture, a class or a split.
- Parquet is data before pictures are: of the folder or of data/, else of its one folder that has
  some. A file's split is the word that its name begins with, or its folder, and never one of each;
  of a split's files all must be of one set, and there. What is nearly a split that is not there is
  refused.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache

from PIL import Image

from mambaflow.data.found import NAMED, PassedOver
from mambaflow.data.remote import AnyPath, SourceError
from mambaflow.data.split_names import SPLITS, is_of_anything, nearly_split, split_in, split_of

LEFT_BEHIND = {
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "lost+found", "@eadir",
    "system volume information", "__pycache__", "icon\r", "#recycle", "@recycle", "recycler",
    "#snapshot", "~snapshot", "@recently-snapshot", "found.000", "temporary items",
    "network trash folder", "picasa.ini", "ehthumbs_vista.db",
}  # fmt: skip
# What a folder is called that has for each picture of another one what is where.
MASKS = {
    "mask", "masks", "label", "labels", "annotation", "annotations", "gt", "groundtruth", "trimaps",
    "segmentation", "segmentations", "segmentationclass", "segmentationobject", "target", "targets",
    "depth",
}  # fmt: skip
MASK_OF = re.compile(rf"(.+?)[-_. ]+({'|'.join(MASKS)})([-_. ]*[0-9]+)?", re.IGNORECASE)
"""Such as 7_mask, which lies beside 7."""
MASKED = {"image", "images", "img", "imgs", "jpegimages", "input", "inputs", "photos", "pictures"}
# Drawings, films and tables: Pillow knows their endings, and has no pixels of them by itself.
NO_PIXELS = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
PARQUET = {".parquet", ".pq"}
ENDING = re.compile(r"\.[A-Za-z]\w{0,8}")
"""Of a file, and of no folder such as v1.0 or St. Bernard."""
DEEPER = "images"
"""Where some releases keep a class's pictures: CLASS/images/NAME."""


@cache
def picture_endings() -> frozenset[str]:
    """Of file names, in small letters."""
    known = Image.registered_extensions()  # loads every format; before that OPEN lacks most
    return frozenset(e for e, kind in known.items() if kind in Image.OPEN and kind not in NO_PIXELS)


@dataclass
class Tree:
    """The files of each split, in the order that gives images their ids."""

    files: dict[str, list[AnyPath]]
    passed: PassedOver
    split_folders: dict[str, AnyPath] = field(default_factory=dict)

    def class_of(self, split: str, file: AnyPath) -> str | None:
        """The folder, directly in its split, that a picture is in; None: in none."""
        inner = file.parts[len(self.split_folders[split].parts) :]
        return inner[0] if len(inner) > 1 else None


# Listing


@dataclass
class _Listing:
    folders: list[AnyPath]
    files: list[AnyPath]

    @property
    def pictures(self) -> list[AnyPath]:
        return [f for f in self.files if f.suffix.lower() in picture_endings()]

    @property
    def others(self) -> list[AnyPath]:
        return [f for f in self.files if f.suffix.lower() not in picture_endings()]


def _no_data(name: str) -> bool:
    return name.startswith(".") or name.lower() in LEFT_BEHIND


def _listed(folder: AnyPath, passed: PassedOver) -> _Listing:
    """What is in a folder, in the order of names: a file system lists in any."""
    folders, files = [], []
    inside: list[AnyPath] = sorted(folder.iterdir())
    for path in inside:
        if _no_data(path.name):
            passed.add("hidden or left behind", "a system or a program made it", path)
        elif path.is_dir():
            folders.append(path)
        else:
            files.append(path)
    return _Listing(folders, files)


def _pass_kinds(files: Iterable[AnyPath], passed: PassedOver) -> None:
    for file in files:
        ending = file.suffix.lower()
        why = "no pictures that can be read" if ending else "a picture's name ends in .png or such"
        why = "not of the set that is read" if ending in PARQUET else why
        passed.add(f"{ending} file(s)" if ending else "file(s) without an ending", why, file)


def _require_there(files: Iterable[AnyPath]) -> None:
    gone = [f for f in files if not f.exists()]
    if gone:
        raise SourceError(
            f"{gone[0]} is a link to what is not there ({len(gone)} such); fetch it, or remove it"
        )


def _require_folders(here: _Listing) -> None:
    """Refuse links to nothing that may have been to folders: a class or a split would vanish."""
    _require_there(f for f in here.files if not ENDING.fullmatch(f.suffix))


def _deep(
    folder: AnyPath, passed: PassedOver, above: frozenset[str] = frozenset()
) -> list[AnyPath]:
    """The pictures anywhere in a folder; other files are passed over."""
    real = str(folder.resolve())
    if real in above:  # a link to a folder that it is in
        return []
    listing = _listed(folder, passed)
    _pass_kinds(listing.others, passed)
    inner = [p for f in listing.folders for p in _deep(f, passed, above | {real})]
    return listing.pictures + inner


# Pictures


def pictures(root: AnyPath) -> Tree:
    """The pictures of a folder by split and class.

    Raises:
        SourceError: there are none, or it is not clear what they are.
    """
    passed = PassedOver()
    top = _listed(root, passed)
    _require_folders(top)
    splits = _splits(root, top.folders)
    if splits:
        _pass_kinds(top.others, passed)
        passed.add("picture(s)", "beside the splits", *top.pictures)
        for folder in (f for f in top.folders if f not in splits.values()):
            passed.add("picture(s)", "in folders that are no split", *_deep(folder, passed))
    by_folder, splits = bool(splits), splits or {"train": root}
    _require_distinct(splits.values())
    files = {split: _of_split(split, folder, passed) for split, folder in splits.items()}
    for split, found in files.items():
        _require_there(found)
        _refuse_by_name(found, by_folder)
        # Without a training split there is another answer, which knows more.
        if not found and files.get("train"):
            raise SourceError(_nothing_in(splits[split], split, "picture that can be read"))
    return Tree(files, passed, splits)


def _splits(root: AnyPath, folders: list[AnyPath]) -> dict[str, AnyPath]:
    """The folders that are splits, if any is; refused where that is not clear."""
    exact: dict[str, list[AnyPath]] = defaultdict(list)
    for folder in folders:
        if split := split_of(folder.name):
            exact[split].append(folder)
    others = [f for f in folders if not split_of(f.name) and _deep(f, PassedOver())]
    _refuse_nearly(root, exact, others)
    for split, found in exact.items():
        if len(found) > 1:
            raise SourceError(f"{_names(found)} in {root} are all {split}; leave one of them there")
    if len(exact) == 1 and others:
        ((split, (only,)),) = exact.items()
        raise SourceError(
            f"{only} may be a split or a class, beside {_names(others)}; move the classes into "
            f"{root / 'train'}, or move it away"
        )
    return {split: exact[split][0] for split in SPLITS if split in exact}


def _nothing_in(folder: AnyPath, split: str, what: str) -> str:
    return (
        f"{folder} holds no {what}, and {split} would be cut out of train instead; fetch what "
        "belongs there, or remove the folder"
    )


def _refuse_nearly(root: AnyPath, exact: dict[str, list[AnyPath]], others: list[AnyPath]) -> None:
    near = {f: split for f in others if (split := split_in(f.name))}
    sure = any(is_of_anything(f.name) for f in near)
    # One folder such as test_tube among other classes is a class.
    if near and (exact or sure or len({*near.values()}) > 1 or len(near) == len(others)):
        raise SourceError(
            f"{_names(near)} in {root} may be splits or classes; call them train, val and test "
            f"with one folder for each class inside, call a class otherwise, or give one of them, "
            f"as --source {next(iter(near))}"
        )


def _refuse_splits_in(split: str, folder: AnyPath, classes: list[AnyPath]) -> None:
    """Refuse splits in a split; a folder that was packed twice, or a class of trains, is none."""
    for inner in classes:
        if (other := split_of(inner.name)) not in (None, split):
            raise SourceError(
                f"{inner} may be {other}, or a class of {split}; move it out of {folder}, call a "
                f"class otherwise, or give the folder of all splits, as --source {folder}"
            )
    _refuse_nearly(folder, {}, [f for f in classes if not split_of(f.name)])


def _refuse_by_name(files: list[AnyPath], by_folder: bool) -> None:
    """Refuse pictures beside each other whose names say that they are unlike each other."""
    folders: dict[AnyPath, list[AnyPath]] = defaultdict(list)
    for file in files:
        folders[file.parent].append(file)
    for folder, beside in folders.items():
        _refuse_masks_by_name(folder, beside)
        # Where folders say of which split a picture is, its name may be of another time.
        if not by_folder:
            _refuse_splits_by_name(folder, beside)


def _refuse_splits_by_name(folder: AnyPath, files: list[AnyPath]) -> None:
    names = {re.sub(r"[0-9]+", "0", f.stem): f for f in files}  # which are few
    told = {_beginning(name): f for name, f in names.items()}
    told.pop("", None)
    # By any word of theirs, as in COCO_val2014_1, where each has one.
    if len(told) < 2 and all(nearly_split(name) for name in names):
        told = {nearly_split(name): f for name, f in names.items()}
    if len(told) > 1:
        raise SourceError(
            f"{folder} holds pictures of several splits by their names, such as "
            f"{', '.join(sorted(f.name for f in told.values()))}; move them into folders called "
            "train, val and test, or call them otherwise"
        )


def _beginning(name: str) -> str:
    """The split that is the first word of a file's name; "" for none."""
    return split_of(re.split(r"[^a-z]", name.lower())[0]) or ""


def _refuse_masks_by_name(folder: AnyPath, files: list[AnyPath]) -> None:
    found = {f: m[1] for f in files if (m := MASK_OF.fullmatch(f.stem))}
    plain = {f.stem: f for f in files if f not in found}
    masks = {of: mask for mask, of in found.items() if of in plain}
    # Most pictures have one: face_mask beside face among many others is a picture like them.
    if masks and 2 * len(masks) >= len(plain):
        of, mask = next(iter(masks.items()))
        raise SourceError(
            f"{folder} holds what look like masks of its pictures, such as {mask.name} of "
            f"{plain[of].name}; move them away"
        )


def _names(folders: Iterable[AnyPath]) -> str:
    names = [f"{f.name}/" for f in folders]
    return ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")


def _require_distinct(folders: Iterable[AnyPath]) -> None:
    """Refuse two names of one folder, whose pictures would count twice."""
    real: dict[str, AnyPath] = {}
    for folder in folders:
        first = real.setdefault(str(folder.resolve()), folder)
        if first != folder:
            raise SourceError(f"{first} and {folder} are one folder; remove one of the links")


def _refuse_masks(split: AnyPath, classes: Iterable[AnyPath]) -> None:
    plain = {re.sub(r"[^a-z]", "", f.name.lower()): f for f in classes}
    masks, pictures = (next((plain[n] for n in plain if n in names), None)
                       for names in (MASKS, MASKED))  # fmt: skip
    if masks and pictures:
        raise SourceError(
            f"{_names([masks, pictures])} in {split} look like masks of pictures, and no two "
            f"classes; move {masks} away, or give the pictures alone, as --source {pictures}"
        )


def _of_split(split: str, folder: AnyPath, passed: PassedOver) -> list[AnyPath]:
    here = _listed(folder, passed)
    _require_folders(here)
    inside = {inner: _of_class(inner, passed) for inner in here.folders}
    classes = [inner for inner, taken in inside.items() if taken]
    _require_distinct(classes)
    _refuse_splits_in(split, folder, classes)
    _refuse_masks(folder, classes)
    found = [picture for taken in inside.values() for picture in taken]
    _pass_kinds(here.others, passed)
    if not found:
        return here.pictures
    passed.add("picture(s)", "beside class folders", *here.pictures)
    # Over all at once, as Paths are compared: the order that ids have always come from.
    return sorted(found)


def _of_class(folder: AnyPath, passed: PassedOver) -> list[AnyPath]:
    here = _listed(folder, passed)
    _pass_kinds(here.others, passed)
    taken, left = here.pictures, here.folders
    if not taken and folder / DEEPER in left:
        inner = _listed(folder / DEEPER, passed)
        _pass_kinds(inner.others, passed)
        taken, left = inner.pictures, [f for f in left if f.name != DEEPER] + inner.folders
    deeper = [picture for f in left for picture in _deep(f, passed)]
    if deeper and not taken:
        raise SourceError(
            f"{folder} holds pictures in folders of its own alone, such as {deeper[0]}; give the "
            "folder whose folders are the classes, or move them up"
        )
    passed.add("picture(s)", "deeper than CLASS/NAME", *deeper)
    if not taken:
        passed.add("folder(s)", "without a picture that can be read", folder)
    return taken


# Parquet


def parquet(root: AnyPath) -> Tree | None:
    """The Parquet files of a folder by split; None where it has none.

    Raises:
        SourceError: it is not clear which are meant, or some are not there.
    """
    passed = PassedOver()
    top = _listed(root, passed)
    _require_folders(top)
    named = [f for f in (root, *top.folders) if _parquet_splits(f, PassedOver())]
    near = [f for f in named if f in (root, root / "data")] or named
    if len(near) > 1:
        raise SourceError(
            f"{root} holds several sets of Parquet files, {_names(near)}; give one of them, as "
            f"--source {near[-1]}, or move the others away"
        )
    if not near:
        return None
    files = _parquet_splits(near[0], passed)
    _refuse_nearly_parquet(near[0], files)
    for inner in _listed(near[0], PassedOver()).folders:
        if (split := split_of(inner.name)) and split not in files:
            raise SourceError(_nothing_in(inner, split, "Parquet file"))
    for split, found in files.items():
        _require_there(found)
        _require_all_shards(split, found)
    _pass_rest(top, near[0], files, passed)
    return Tree(files, passed)


def stray_parquet(root: AnyPath) -> list[str]:
    """Names of Parquet files directly in a folder, whatever their splits."""
    return [f.name for f in _listed(root, PassedOver()).files if f.suffix.lower() in PARQUET]


def with_pictures(root: AnyPath, but: str) -> list[AnyPath]:
    """The folders in a folder, but for one of a name, that have pictures anywhere."""
    folders = _listed(root, PassedOver()).folders
    return [f for f in folders if f.name != but and _deep(f, PassedOver())]


def _pass_rest(
    top: _Listing, taken: AnyPath, files: dict[str, list[AnyPath]], passed: PassedOver
) -> None:
    parents = {f.parent for found in files.values() for f in found}
    for folder in (f for f in top.folders if f != taken and f not in parents):
        passed.add("picture(s)", "beside Parquet files", *_deep(folder, passed))
    passed.add("picture(s)", "beside Parquet files", *top.pictures)
    _pass_kinds([f for f in top.others if f.suffix.lower() not in PARQUET], passed)


def _parquet_splits(folder: AnyPath, passed: PassedOver) -> dict[str, list[AnyPath]]:
    """The files of each split: by their names, or in folders that are called so."""
    here, found = _listed(folder, passed), defaultdict(list)
    for file in _those_of_parquet(here):
        if begun := _beginning(file.name):
            found[begun].append(file)
        else:
            passed.add("Parquet file(s)", "their names begin with no split", file)
    for begun, files in found.items():
        _require_one_name(begun, files)
    for split, files in _parquet_of_folders(folder, here.folders).items():
        found[split] += files
    return {s: _one_set(s, found[s], passed) for s in SPLITS if found[s]}


def _parquet_of_folders(folder: AnyPath, inside: list[AnyPath]) -> dict[str, list[AnyPath]]:
    found: dict[str, tuple[AnyPath, list[AnyPath]]] = {}
    for inner in inside:
        if (split := split_of(inner.name)) and (files := _parquet_in(split, inner)):
            first, _ = found.setdefault(split, (inner, files))
            if first != inner:
                raise SourceError(
                    f"{_names([first, inner])} in {folder} are all {split}; leave one of them there"
                )
    return {split: files for split, (_, files) in found.items()}


def _those_of_parquet(listing: _Listing) -> list[AnyPath]:
    return [f for f in listing.files if f.suffix.lower() in PARQUET]


def _parquet_in(split: str, inner: AnyPath) -> list[AnyPath]:
    here = _listed(inner, PassedOver())
    files = _those_of_parquet(here)
    for file in files:
        if (begun := _beginning(file.name)) not in ("", split):
            raise SourceError(
                f"{file} is of {begun} by its name, and of {split} by its folder; move it out of "
                "there, or call it otherwise"
            )
    for folder in here.folders if files else ():
        if deeper := _those_of_parquet(_listed(folder, PassedOver())):
            raise SourceError(
                f"{inner} holds Parquet files, and some in folders of its own, such as "
                f"{deeper[0]}; move them up, or away"
            )
    return files


def _refuse_nearly_parquet(folder: AnyPath, splits: Iterable[str]) -> None:
    """Refuse what may be a split that is not there, and is cut out of training then."""
    here = _listed(folder, PassedOver())
    named = {f: f.stem for f in _those_of_parquet(here) if not _beginning(f.name)}
    inner = [f for f in here.folders if not split_of(f.name)]
    named |= {f: f.name for f in inner if _those_of_parquet(_listed(f, PassedOver()))}
    for path, name in named.items():
        if (split := nearly_split(name)) and split not in splits:
            raise SourceError(
                f"{path} may be {split}, and nothing else is; call it {split}{path.suffix}, or "
                "move it away"
            )


YEAR = 1900
SHARD = re.compile(
    r"(?P<set>.*?)[-_.]?(?P<number>\d+)(-of-(?P<total>\d+)(?P<hash>-[0-9a-f]{16})?)?"
)
"""Such as train-00000-of-00002, with a hash behind it or without; or a number alone."""


def _set_of(file: AnyPath) -> str:
    """The name that the shards of one set have in common."""
    match = SHARD.fullmatch(file.stem.lower())
    return match["set"] if match else file.stem.lower()


def _require_one_name(split: str, files: list[AnyPath]) -> None:
    """Refuse several sets for a split by their names, of which not one is the split's own."""
    names = sorted({_set_of(file) for file in files})
    if len(names) > 1 and len(set(names) & set(SPLITS[split])) != 1:
        raise SourceError(
            f"{files[0].parent} holds {split} in several sets: {', '.join(names[:NAMED])}; give "
            "one file, or leave one set there"
        )


def _one_set(split: str, files: list[AnyPath], passed: PassedOver) -> list[AnyPath]:
    # One data set has one name for a split; other encodings of the same images stay out.
    whole = [f for f in files if f.stem.lower() in SPLITS[split]]
    chosen = whole or [f for f in files if _set_of(f) in SPLITS[split]] or files
    rest = [f for f in files if f not in chosen]
    passed.add("Parquet file(s)", f"beside {split} in one {'file' if whole else 'set'}", *rest)
    return chosen


def _require_all_shards(split: str, files: list[AnyPath]) -> None:
    """Of shards called NAME-00000-of-00002 all must be there, and of one set alone."""
    sets: dict[str, dict[int, AnyPath]] = defaultdict(dict)
    for file in files:
        match = SHARD.fullmatch(file.stem.lower())
        if match and (match["total"] or match["set"] in ("", *SPLITS[split])):
            number = int(match["number"])
            other = sets[match["total"] or ""].setdefault(number, file)
            if other != file:
                raise SourceError(
                    f"{other.name} and {file.name} in {file.parent} are the same shard of {split} "
                    "twice; remove one of them"
                )
    if len(sets) > 1:
        raise SourceError(
            f"{files[0].parent} holds {split} in shards of {', '.join(sorted(sets))}: the same "
            "images twice; remove all shards but those of one set"
        )
    for total, there in sets.items():
        # Some count from 1. Of numbers alone the last is not known; and years have no order.
        start = int(bool(total) and 0 not in there and int(total) in there)
        whole = range(start, start + int(total)) if total else range(min(there), max(there))
        wanted = whole if total or min(there) < YEAR else ()
        missing = sorted({*wanted} - {*there})
        if missing:
            told = f"{missing[0]:05d}-of-{total}" if total else f"{missing[0]:04d}"
            raise SourceError(
                f"{files[0].parent} lacks shard {told} of {split} ({len(missing)} missing); "
                "fetch it"
            )
