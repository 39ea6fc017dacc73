"""``trackbench prepare movi_f``, ``panning_movi_e``, ``movi_e``: Kubric's TFDS directories for training."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal

from trackbench.data.prepare.frames import FrameConversion
from trackbench.data.prepare.resumable import SUMS, PreparedFolder, check_room, fill, size_of, verify
from trackbench.data.prepare.shards import ShardConversion
from trackbench.data.tfds.dataset import find_version
from trackbench.data.tfds.sequences import NUM_TRACKS
from trackbench.data.tfds.storage import Place, place

NAMES = ("movi_f", "panning_movi_e", "movi_e")
_DESCRIPTIONS = ("dataset_info.json", "features.json")
_SHOWN = 20  # lines of what failed

Conversion = ShardConversion | FrameConversion


def add_command(names: Any) -> None:
    """Add the command under the name of each data set."""
    for name in NAMES:
        parser = names.add_parser(
            name,
            help=f"{name} from its TFDS directory, local or in a storage: compact, as ArrayRecord or as frames",
            description="Converts a TFDS directory. The same command continues a run that was ended.",
        )
        parser.add_argument(
            "--source",
            metavar="DIR_OR_URL",
            help="the directory of a version (such as movi_f/512x512/1.0.0) or one above it, "
            "or its URL, such as gs://kubric-public/tfds",
        )
        parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder, or one to resume")
        parser.add_argument("--config", metavar="HxW", help="such as 512x512, where the source holds several")
        parser.add_argument(
            "--format",
            choices=("compact", "array_record", "frames"),
            default="compact",
            help="compact: TFRecord files with only what tracks are made from, a third of the bytes (default); "
            "array_record: the same as ArrayRecord files; frames: PNG files and tracks, as CoTracker and "
            "Track-On read them",
        )
        parser.add_argument(
            "--splits",
            nargs="+",
            metavar="SPLIT",
            help="default: all; for frames: train. Of several splits "
            "frames are in DIR/SPLIT, of one in DIR itself",
        )
        parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8), help="processes")
        parser.add_argument("--all-features", action="store_true", help="compact, array_record: drop nothing")
        parser.add_argument(
            "--size", type=_size, metavar="HxW", help="frames: of the frames (default: as the scenes)"
        )
        parser.add_argument(
            "--num-tracks", type=int, metavar="N", help=f"frames: per sequence, at most (default: {NUM_TRACKS})"
        )
        parser.add_argument(
            "--sequences",
            type=int,
            metavar="N",
            help="frames: of each split; more than there are scenes: these again with other crops "
            "(default: one of each scene)",
        )
        parser.add_argument(
            "--official-quirks", action="store_true", help="frames: tracks as the published code makes them"
        )
        parser.add_argument("--skip-bad", action="store_true", help="leave out what cannot be read, and count it")
        parser.add_argument("--dry-run", action="store_true", help="only say what would be written, and its size")
        parser.add_argument(
            "--verify", action="store_true", help=f"only compare all files of --out with its {SUMS}"
        )
        parser.set_defaults(run=_run)


def find_source(source: str, name: str, config: str | None = None) -> Place:
    """The directory of a version of a data set.

    Args:
        source: it, or one above it; or its URL.
        name: of the data set, where ``source`` holds several.
        config: such as ``512x512``, where it holds several.

    Raises:
        FileNotFoundError: there is none.
        ImportError: the package for the URL's protocol is not installed.
        ValueError: there are several, or the only one is of another configuration.
    """
    root = place(source)
    candidates = [root / name, root]
    if config is not None:
        if Path(config).name != config:
            raise ValueError(f"--config must be a name such as 512x512, got {config!r}")
        candidates = [root / name / config, root / config, root]
    for candidate in candidates:
        try:
            version = find_version(candidate)
        except ValueError as error:
            wanted = "--config picks one" if config is None else f"none of them is {name}/{config}"
            raise ValueError(f"{error}; {wanted}") from error
        if version is not None:
            if config is not None and config not in (version.name, version.parent.name):
                raise ValueError(f"{version} is not of the configuration {config}")
            return version
    raise FileNotFoundError(f"{source}: expected {' and '.join(_DESCRIPTIONS)} there or below {name}/HxW/VERSION")


def _run(options: argparse.Namespace) -> int:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if options.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {options.workers}")
    if options.verify:
        return _verify(options.out, options.workers, console)
    if options.source is None:
        raise ValueError("--source is missing: a TFDS directory or its URL")
    source = find_source(options.source, options.name, options.config)
    if isinstance(source, Path):
        _check_apart(source, options.out)
    conversion = _conversion(options, source)
    folder = PreparedFolder(options.out, _settings(conversion, source, options.format))
    room = check_room(options.out, max(conversion.bytes_needed() - size_of(folder), 0))
    console.print(f"{source}: {conversion.describe()}; {room}", markup=False)
    if options.dry_run:
        return 0

    folder.start(conversion.folders())
    kept, failed = fill(
        folder,
        conversion.items(),
        conversion.make,
        options.workers,
        options.name,
        console,
        options.skip_bad,
    )
    if failed:
        _list("failed", failed, console)
        console.print(
            f"{options.out}: not finished: {len(failed)} failed, {len(folder.pieces)} of "
            f"{len(conversion.items())} are done. The same command tries them again; --skip-bad leaves out "
            "what cannot be read.",
            markup=False,
        )
        return 1
    folder.finish(conversion.finish(options.out, folder.pieces))
    bad = [line for piece in folder.pieces.values() for line in piece.bad]
    if bad:
        _list("skipped", bad, console)
    console.print(
        f"{options.out}: {len(folder.pieces)} {'sequences' if options.format == 'frames' else 'shards'}, "
        f"{decimal(size_of(folder))}; {kept} were there, {len(bad)} bad ones skipped; checksums in {SUMS}",
        markup=False,
    )
    return 0


def _conversion(options: argparse.Namespace, source: Place) -> Conversion:
    of_frames = {
        "size": options.size,
        "num_tracks": options.num_tracks,
        "sequences": options.sequences,
        "official_quirks": options.official_quirks or None,
    }
    given = {key: value for key, value in of_frames.items() if value is not None}
    if options.format == "frames":
        if options.all_features:
            raise ValueError("--all-features is not for --format frames")
        splits = _splits(options.splits, source, ("train",))
        return FrameConversion(source, splits, skip_bad=options.skip_bad, **given)
    if given:
        names = ", ".join(f"--{key.replace('_', '-')}" for key in given)
        raise ValueError(f"{names}: only for --format frames")
    file_format = "tfrecord" if options.format == "compact" else "array_record"
    splits = _splits(options.splits, source, None)
    return ShardConversion(source, splits, file_format, options.all_features, options.skip_bad)


def _splits(wanted: list[str] | None, source: Place, default: tuple[str, ...] | None) -> tuple[str, ...]:
    if wanted is not None:
        if len(set(wanted)) < len(wanted):
            raise ValueError(f"--splits names one twice: {' '.join(wanted)}")
        return tuple(wanted)
    if default is not None:
        return default
    file = source / "dataset_info.json"
    try:
        return tuple(str(entry["name"]) for entry in json.loads(file.read_text(encoding="utf-8"))["splits"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a description of a data set: {error!r}") from error


def _settings(conversion: Conversion, source: Place, file_format: str) -> dict[str, Any]:
    """All that the bytes of the result depend on; where the source lies is not of it."""
    settings = asdict(conversion)
    for key in ("source", "skip_bad", "run"):
        del settings[key]
    settings["format"] = file_format
    for name in _DESCRIPTIONS:
        settings[name] = hashlib.sha256((source / name).read_text(encoding="utf-8").encode()).hexdigest()
    return settings


def _check_apart(source: Path, out: Path) -> None:
    inner, outer = out.resolve(), source.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise ValueError(f"--out {out} must not lie in the source {source}, nor the source in it")


def _verify(out: Path, workers: int, console: Console) -> int:
    wrong = verify(out, workers, console)
    if wrong:
        _list("wrong", wrong, console)
        console.print(f"{out}: {len(wrong)} files differ from {SUMS}", markup=False)
        return 1
    console.print(f"{out}: all files are as {SUMS} says", markup=False)
    return 0


def _list(what: str, lines: list[str], console: Console) -> None:
    for line in lines[:_SHOWN]:
        console.print(f"{what}: {line}", markup=False)
    if len(lines) > _SHOWN:
        console.print(f"{what}: and {len(lines) - _SHOWN} more", markup=False)


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected HxW, such as 512x512, got {text!r}")
    return int(found[1]), int(found[2] or found[1])
