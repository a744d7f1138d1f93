"""What a source was found to hold, and what was passed over, for a person to read."""

import unicodedata
from collections import defaultdict
from dataclasses import dataclass, field

from mambaflow.data.remote import AnyPath, fetched
from mambaflow.data.split_names import SPLITS

NAMED = 12
"""Classes that are told by name."""


@dataclass
class PassedOver:
    """What is no data, by kind and reason."""

    # Paths as keys: a folder that is listed twice is counted once.
    kinds: dict[tuple[str, str], dict[str, None]] = field(default_factory=dict)

    def add(self, kind: str, why: str, *paths: AnyPath) -> None:
        """Some more."""
        if paths:
            self.kinds.setdefault((kind, why), {}).update(dict.fromkeys(map(str, paths)))

    def lines(self) -> list[str]:
        """A line for each kind: how many, why, and one of them."""
        return [
            f"passed over {len(paths)} {kind}: {why}, such as {next(iter(paths))}"
            for (kind, why), paths in sorted(self.kinds.items())
        ]


@dataclass(frozen=True)
class Found:
    """What a source was found to hold."""

    images: dict[str, int]
    """In each split that it has."""
    classes: tuple[str, ...] = ()
    passed: PassedOver = field(default_factory=PassedOver)
    files: tuple[AnyPath, ...] = ()
    """That it is read from."""
    lost: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """In each split, classes that training has not."""

    def lines(self) -> list[str]:
        """For a person, before anything is done with it."""
        held = [
            f"{split} {self.images[split]} images" if self.images.get(split) else f"no {split}"
            for split in SPLITS
        ]
        named = ", ".join(self.classes[:NAMED]) + ", …" * (len(self.classes) > NAMED)
        of = f"{len(self.classes)} classes: {named}" if self.classes else "no classes by name"
        cut = [s for s in ("validation", "test") if not self.images.get(s)]
        after = f"; {' and '.join(cut)} will be cut out of train" if cut else ""
        lines = [
            f"found {', '.join(held)}{after}; {of}",
            *self._odd_classes(),
            *self.passed.lines(),
        ]
        count, size = fetched(self.files)
        far = (
            f"{count} file(s) of {size:,} bytes in all lie in S3, and are fetched to be known by "
            "what they hold, and once more for shards that are not made yet"
        )
        return [*lines, far] if count else lines

    def _odd_classes(self) -> list[str]:
        """What of the classes is seldom meant."""
        alike: dict[str, list[str]] = defaultdict(list)
        for name in self.classes:
            alike[unicodedata.normalize("NFC", name).casefold()].append(name)
        twice = [f"{', '.join(names)}" for names in alike.values() if len(names) > 1]
        lines = [f"classes that differ in case or accents' code alone: {twice[0]}"] if twice else []
        numbers = [int(name) for name in self.classes if name.isdecimal()]
        if len(numbers) == len(self.classes) and numbers != sorted(numbers):
            place = next(i for i, n in enumerate(numbers) if n != i)
            lines.append(
                f"labels are places in the order of text: {place} is class {numbers[place]}"
            )
        for split, names in self.lost.items():
            told = ", ".join(names[:NAMED]) + ", …" * (len(names) > NAMED)
            lines.append(f"no label in {split}, of classes that train lacks: {told}")
        return lines
