"""The claim: what is staged in a folder.

    <root>/claim.json    of each split, all that the bytes of its shards depend on

Written first, by the first; another staging finds it, and is refused.
"""

import json
import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from mambaflow.checks import require
from mambaflow.data.folder_source import OF_BYTES
from mambaflow.data.shards import ShardError, read_manifest
from mambaflow.data.split_plan import SplitPlan, json_of
from mambaflow.run_paths import FIRST_OF, require_free
from mambaflow.storage import at

CLAIM = FIRST_OF["staged data"]
log = logging.getLogger(__name__)


def stake_claim(out: str, parts: list[SplitPlan]) -> None:
    """Make the place this staging's own, or find it so.

    Raises:
        ValueError: something else is staged there; nothing was written.
    """
    for part in parts:
        try:
            # A published split without its claim, which somebody deleted, is in the way too.
            theirs = read_manifest(part.storage).spec.fields
        except ShardError as error:
            log.debug("no manifest that could be in the way: %s", error)
        else:
            _refuse(out, part.spec.split, theirs, part.claim)
    require_free(at(out), CLAIM, f"out (={out})", "give another --out")
    # Of many processes one creates the file. The others find it whole, go on where it is their own
    # staging too, and are refused where it is another.
    ours = {part.spec.split: part.claim for part in parts}
    if not at(out).create(CLAIM, json_of(ours)):
        for split, claim in _claimed(out, ours).items():
            _refuse(out, split, claim, ours[split])


def _claimed(out: str, splits: Iterable[str]) -> dict[str, dict[str, Any]]:
    try:
        theirs = json.loads(at(out).read(CLAIM))
        return {split: dict(theirs[split]) for split in splits}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"out (={out}) holds a {CLAIM} that is damaged ({error!r}); give another --out, or "
            "remove that folder"
        ) from error


def _refuse(out: str, split: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    # Who says nothing of a reduction has reduced nothing.
    theirs, ours = {"reduce": 1} | theirs, {"reduce": 1} | ours
    # Over their fields: a manifest has fewer than a claim.
    changes = [f"{k}: {v} -> {ours.get(k)}" for k, v in theirs.items() if v != ours.get(k)]
    require(
        not changes,
        f"out (={out}) holds another staging of {split} ({'; '.join(changes)})"
        f"{_about_images(theirs, ours)}; give another --out, or remove that folder",
    )


def _about_images(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """What other fingerprints mean, where nothing else tells that the images are others."""
    was, now = str(theirs.get("images", "")), str(ours["images"])
    if was in ("", now) or theirs.get("count") != ours["count"]:
        return ""
    if was.partition(",")[0] == now.partition(",")[0]:  # behind it stands what was chosen of them
        return ": the same files, of which other columns or labels were chosen"
    if now.startswith(OF_BYTES) and not was.startswith(OF_BYTES):
        return ": an earlier version knew files by names and sizes; whether they changed is unknown"
    return ": the files have changed since"


def as_claimed(out: str, parts: list[SplitPlan]) -> list[SplitPlan]:
    """The same parts, with the name of the source that the place knows where all else is the same:
    a folder that was renamed or moved holds the same images."""
    try:
        theirs = json.loads(at(out).read(CLAIM))
        names = [theirs[part.spec.split]["source"] for part in parts]
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return parts  # nothing is staged there; or what is, is met by `stake_claim`
    renamed = [
        replace(part, spec=replace(part.spec, source=name))
        for part, name in zip(parts, names, strict=True)
    ]
    same = all(theirs[part.spec.split] == part.claim for part in renamed)
    return renamed if same else parts
