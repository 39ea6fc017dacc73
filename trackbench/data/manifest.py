"""Which part of a benchmark is there: ``manifest.json`` beside the shards of TAP-Vid Kinetics."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trackbench.files import written_whole


@dataclass(frozen=True)
class Manifest:
    """What ``trackbench prepare kinetics`` found of the annotated videos, and where it put them.

    Videos vanish from YouTube, so every copy of this benchmark is another part of it.

    Attributes:
        num_annotated: videos that the annotations have.
        half_pixel_shift: whether points lie half a source pixel up and left, as the published generator has it.
        files: shard -> the names of its videos, in order.
    """

    num_annotated: int
    half_pixel_shift: bool
    files: dict[str, list[str]]

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """That of a folder; None where it has none, as beside shards of other origin.

        Raises:
            ValueError: a file of that name with other content.
        """
        path = folder / "manifest.json"
        if not path.is_file():
            return None
        try:
            manifest = cls(**json.loads(path.read_text(encoding="utf-8")))
            if type(manifest.num_annotated) is not int or type(manifest.half_pixel_shift) is not bool:
                raise TypeError("num_annotated must be a number, half_pixel_shift true or false")
            if not all(isinstance(names, list) for names in manifest.files.values()) or not all(
                isinstance(name, str) for names in manifest.files.values() for name in names
            ):
                raise TypeError("files must hold lists of names")
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a manifest of `trackbench prepare kinetics`: {error}") from error
        return manifest

    def write(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        with written_whole(folder / "manifest.json") as unfinished:
            unfinished.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @property
    def about(self) -> dict[str, int | str]:
        """What every result must state, see :data:`trackbench.evaluation.results.ABOUT`."""
        return {
            "benchmark_videos": self.num_annotated,
            "half_pixel_shift": "yes" if self.half_pixel_shift else "no",
        }

    def names_of(self, files: Sequence[Path], files_of_videos: Sequence[Path], *, complete: bool) -> list[str]:
        """The names of the videos that lie in some of the shards.

        Args:
            files: the shards.
            files_of_videos: the shard of each video, in order.
            complete: whether these should be all of the shards.

        Raises:
            ValueError: shards are missing, unknown, or hold another number of videos: a preparation that was
                stopped, or mixed files.
        """
        counts = Counter(file.name for file in files_of_videos)
        missing = sorted(set(self.files) - {file.name for file in files}) if complete else []
        others = [file.name for file in files if counts[file.name] != len(self.files.get(file.name, []))]
        if missing or others:
            raise ValueError(
                f"{files[0].parent}: expected the shards of its manifest.json; missing: "
                f"{', '.join(missing) or 'none'}; with other videos: {', '.join(others) or 'none'}; run "
                "`trackbench prepare kinetics` again"
            )
        return [name for file in files for name in self.files[file.name]]
