"""``trackbench h5 serve`` and ``decide``: episodes judged on a page in the browser, or from the command line."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from trackbench.files import sha256
from trackbench.robotics.store import Decision, Decisions, Verdict
from trackbench.robotics.workspace import Workspace


def tracks_sha256(workspace: Workspace, episode: str) -> dict[int, str]:
    """Camera -> SHA-256 of its tracks file, for the cameras that are tracked: what a decision is made on.

    Raises:
        ValueError: a name that cannot be an episode's, or a damaged ``episode.json``.
        FileNotFoundError: there is no such episode.
    """
    cameras = range(workspace.info(episode).cameras)
    paths = {camera: workspace.file(episode, camera, "tracks") for camera in cameras}
    return {camera: sha256(path) for camera, path in paths.items() if path.is_file()}


def decide(
    workspace: Workspace, episodes: Sequence[str], verdict: Verdict, reason: str = ""
) -> dict[str, Decision | str]:
    """Accept or reject episodes as they are tracked now.

    Returns:
        Episode -> its decision, or why there is none, one line.
    """
    decisions = Decisions(workspace.review)
    results: dict[str, Decision | str] = {}
    for episode in episodes:
        try:
            results[episode] = decisions.decide(episode, verdict, tracks_sha256(workspace, episode), reason)
        except (ValueError, OSError) as error:
            results[episode] = " ".join(str(error).split())
    return results


def undecided_above(workspace: Workspace, score: float) -> list[str]:
    """Tracked episodes with at least this score and without a decision that counts, in natural order.

    An episode whose files are damaged is none of them.
    """
    decisions = Decisions(workspace.review).all_current()
    found = []
    for episode in workspace.episodes():
        try:
            hashes = tracks_sha256(workspace, episode)
            reached = float(json.loads(workspace.quality(episode).read_bytes())["score"])
        except (ValueError, KeyError, TypeError, OSError):
            continue
        decision = decisions.get(episode)
        if hashes and reached >= score and not (decision is not None and decision.holds(hashes)):
            found.append(episode)
    return found


def add_command(stages: Any) -> None:
    """Add ``serve`` and ``decide``."""
    serving = stages.add_parser("serve", help="review tracks in the browser: accept, reject, correct, annotate")
    serving.add_argument("root", type=Path, metavar="OUT", help="work folder")
    serving.add_argument("--in", dest="source", type=Path, metavar="IN", help="original episodes, for corrections")
    serving.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    serving.add_argument("--port", type=int, default=8008, help="0: any free one (default: 8008)")
    serving.add_argument("--token", help="what browsers must know (default: a new one where --host is not local)")
    serving.add_argument("--model", help="tracker of corrections (default: the one of the tracks)")
    serving.add_argument("--checkpoint", type=Path, help="its weights")
    serving.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: cpu)")
    serving.set_defaults(run=_serve)

    deciding = stages.add_parser("decide", help="accept or reject episodes without the page")
    deciding.add_argument("root", type=Path, metavar="OUT", help="work folder")
    deciding.add_argument("episodes", nargs="*", metavar="EPISODE")
    deciding.add_argument(
        "--all-above", type=float, metavar="SCORE", help="every undecided episode with at least this score"
    )
    verdict = deciding.add_mutually_exclusive_group(required=True)
    verdict.add_argument("--accept", dest="verdict", action="store_const", const="accept")
    verdict.add_argument("--reject", dest="verdict", action="store_const", const="reject")
    deciding.add_argument("--reason", default="", metavar="TEXT", help="why")
    deciding.set_defaults(run=_decide)


def _serve(options: argparse.Namespace) -> int:
    try:
        from trackbench.robotics.desk import Desk
        from trackbench.robotics.server import serve
    except ModuleNotFoundError as error:
        raise ImportError(f'{error}; the review page needs: pip install "trackbench[robotics]"') from error
    for folder in filter(None, (options.root, options.source)):
        if not folder.exists():
            raise FileNotFoundError(f"{folder}: no such folder")
    desk = Desk(
        Workspace(options.root),
        source=options.source,
        model=options.model,
        checkpoint=options.checkpoint,
        device=options.device,
    )
    serve(desk, options.host, options.port, options.token)
    return 0


def _decide(options: argparse.Namespace) -> int:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    workspace = Workspace(options.root)
    if options.all_above is not None and (options.episodes or not math.isfinite(options.all_above)):
        raise ValueError("--all-above takes a number, and no episodes beside it")
    if options.all_above is None and not options.episodes:
        raise ValueError("name episodes, or --all-above SCORE")
    episodes = options.episodes if options.all_above is None else undecided_above(workspace, options.all_above)
    results = decide(workspace, episodes, options.verdict, options.reason)
    failed = {episode: why for episode, why in results.items() if isinstance(why, str)}
    for episode, why in failed.items():
        console.print(f"{episode}: {why}", markup=False)
    console.print(f"{options.verdict}ed: {len(results) - len(failed)}, failed: {len(failed)}", markup=False)
    return 1 if failed else 0
