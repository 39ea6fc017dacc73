"""``trackbench h5 run``: all stages by one config; called again, it goes on where something was missing.

A stage does what it can: an episode that fails, or that waits for a person, does not hold up the others.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from rich.console import Console

from trackbench.composition import configs_dir
from trackbench.jobs import Outcome
from trackbench.robotics import annotate, attach, export, extract, review, track
from trackbench.robotics.episodes import EpisodeSettings, find_episodes
from trackbench.robotics.workspace import Workspace

STAGES = ("extract", "annotate", "track", "review", "attach", "export", "verify")


@dataclass
class ExtractConfig:
    """``fps`` and the fields of :class:`trackbench.robotics.episodes.EpisodeSettings`."""

    fps: float | None = None
    image_key: str | None = None
    step_pattern: str | None = None
    axes: str | None = None
    value_range: int | None = None
    allow_gaps: bool = False


@dataclass
class AnnotateConfig:
    """Where keypoints come from.

    Attributes:
        labelme: folder of labelme's files.
        template: episode whose keypoints are transferred to the others.
        model: see :func:`trackbench.robotics.annotate.propose`.
        checkpoint: its weights.
        device: where it runs.
        confirm_above: transferred keypoints are taken without a look where all have this confidence; None: none.
    """

    labelme: str | None = None
    template: str | None = None
    model: str | None = None
    checkpoint: str | None = None
    device: str = "cpu"
    confirm_above: float | None = None


@dataclass
class TrackConfig:
    """See :func:`trackbench.robotics.track.track`."""

    model: str | None = None
    checkpoint: str | None = None
    device: str = "cpu"
    overwrite: bool = False


@dataclass
class ReviewConfig:
    """``accept_above``: episodes of this score or more are accepted without a look; None: none."""

    accept_above: float | None = None


@dataclass
class AttachConfig:
    """``to``: folder of the new files; None: ``attached`` in the work folder."""

    to: str | None = None


@dataclass
class ExportConfig:
    """Formats, format -> folder, and what :class:`trackbench.robotics.export.ExportSettings` says."""

    formats: list[str] = field(default_factory=list)
    to: dict[str, str] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    task: str | None = None
    robot_type: str | None = None
    container: str = "npz"


@dataclass
class RunConfig:
    """The config of all stages; ``configs/robotics/example.yaml`` explains every key."""

    source: str = MISSING
    work: str = MISSING
    workers: int | None = None
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    annotate: AnnotateConfig = field(default_factory=AnnotateConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    review: ReviewConfig = field(default_factory=ReviewConfig)
    attach: AttachConfig = field(default_factory=AttachConfig)
    export: ExportConfig = field(default_factory=ExportConfig)


@dataclass
class StageResult:
    """What a stage did.

    Attributes:
        stage: its name.
        done: how many episodes it did now.
        there: how many were done already.
        waiting: how many wait for a person.
        failed: item -> why, one line; the item "" is the stage as a whole.
        advice: what a person is to do.
    """

    stage: str
    done: int = 0
    there: int = 0
    waiting: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    advice: str = ""


def read_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config file, in Hydra's syntax (``defaults`` of files beside it, interpolations).

    Args:
        path: a ``.yaml`` file.
        overrides: ``key=value``, in Hydra's syntax.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown key, a value of another type, a missing one, or no YAML; one line that names it.
    """
    path = Path(path).absolute()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config; `trackbench h5 run --example` prints one")
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path}: expected a name that ends in .yaml")
    given = _composed(path, [text if text[:1] in "+~" else f"++{text}" for text in overrides])
    here = ""
    try:
        config: Any = OmegaConf.structured(RunConfig)
        for key in given:
            here = str(key)
            config = OmegaConf.merge(config, {key: given._get_node(key)})
        missing = sorted(map(str, OmegaConf.missing_keys(config)))
        if missing:
            raise ValueError(f"{path}: {missing[0]} is missing")
        read: RunConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {_told(error, here)}") from None
    for key, texts in (("export.to", read.export.to), ("export.keys", read.export.keys)):
        for name, text in texts.items():
            if not isinstance(text, str):  # OmegaConf looks at the values of mappings only where they are assigned
                raise ValueError(f"{path}: {key}.{name}: expected a text, got {text!r}")
    for key, names, allowed in (
        ("stages", read.stages, STAGES),
        ("export.formats", read.export.formats, get_args(export.Format)),
        ("export.to", list(read.export.to), get_args(export.Format)),
    ):
        unknown = [name for name in names if name not in allowed]
        if unknown:
            raise ValueError(f"{path}: {key}: {unknown[0]!r} is none of {', '.join(allowed)}")
    for key, value in (
        ("annotate.confirm_above", read.annotate.confirm_above),
        ("review.accept_above", read.review.accept_above),
    ):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{path}: {key}: expected a number in [0, 1], got {value}")
    return read


def run(config: RunConfig, console: Console | None = None) -> list[StageResult]:
    """Do all stages of a config, as far as they can be done now.

    Args:
        config: see there; paths are relative to the current folder.
        console: for progress and for a line per failure; None: standard error.

    Returns:
        The results of the stages that were begun, in order; a stage that failed as a whole is the last one.
    """
    chain = _Chain(config, console or Console(stderr=True, highlight=False, soft_wrap=True))
    results = []
    for stage in STAGES:
        if stage not in config.stages:
            continue
        result = StageResult(stage)
        results.append(result)
        try:
            getattr(chain, stage)(result)
        except (ValueError, OSError, ImportError) as error:
            chain.fail(result, "", " ".join(str(error).split()))
            break
        if result.advice:
            chain.console.print(f"{stage}: {result.advice}", markup=False)
    return results


class _Chain:
    """The stages of one run; each fills in its result."""

    def __init__(self, config: RunConfig, console: Console) -> None:
        self.config = config
        self.console = console
        self.source = Path(config.source)
        self.workspace = Workspace(Path(config.work))

    def fail(self, result: StageResult, item: str, why: str) -> None:
        result.failed[item] = why
        self.console.print(": ".join(filter(None, (result.stage, item, why))), markup=False)

    def extract(self, result: StageResult) -> None:
        options = self.config.extract
        settings = EpisodeSettings(
            options.image_key, options.step_pattern, options.axes, options.value_range, options.allow_gaps
        )
        outcomes = extract.extract(
            self.source,
            self.workspace,
            fps=options.fps,
            settings=settings,
            workers=self.config.workers,
            console=self.console,
        )
        self._count(result, outcomes, lambda extracted: extracted.fresh)

    def annotate(self, result: StageResult) -> None:
        options, workspace = self.config.annotate, self.workspace
        before = len(self._waiting())
        if options.labelme is not None:
            self._failures(result, annotate.import_annotations(Path(options.labelme), workspace, keep=True))
        if options.template is not None:
            proposed = annotate.propose(
                workspace,
                options.template,
                model=options.model,
                checkpoint=_path(options.checkpoint),
                device=options.device,
                workers=self.config.workers or extract.default_workers(),
                console=self.console,
            )
            self._failures(result, proposed)
        if options.confirm_above is not None:
            lowest: dict[str, float] = {}
            for state in annotate.states(workspace):
                if state.state == "proposed":
                    sure = 1.0 if state.confidence is None else state.confidence
                    lowest[state.episode] = min(sure, lowest.get(state.episode, 1.0))
            sure_ones = [episode for episode, sure in lowest.items() if sure >= options.confirm_above]
            self._failures(result, annotate.confirm(workspace, sure_ones))
        waiting = self._waiting()
        result.waiting = len(waiting)
        result.done = max(0, before - result.waiting)
        result.there = len(workspace.episodes()) - result.waiting - result.done
        if waiting:
            states = Counter(waiting.values())
            told = f"keypoints missing in {states['missing']} episodes, to be confirmed in {states['proposed']}"
            work = workspace.root
            result.advice = f"{told}: `trackbench h5 serve {work}`, or `trackbench h5 annotate {work} --list`"

    def track(self, result: StageResult) -> None:
        options = self.config.track
        waiting = self._waiting()
        result.waiting = len(waiting)
        ready = [episode for episode in self.workspace.episodes() if episode not in waiting]
        if not ready:
            return
        outcomes = track.track(
            self.source,
            self.workspace,
            model=options.model,
            checkpoint=_path(options.checkpoint),
            device=options.device,
            workers=self.config.workers,
            overwrite=options.overwrite,
            episodes=ready,
            console=self.console,
        )
        self._count(result, outcomes, lambda tracked: bool(tracked.tracked))

    def review(self, result: StageResult) -> None:
        least, workspace = self.config.review.accept_above, self.workspace
        if least is not None:
            reason = f"score of at least {least:g} (review.accept_above)"
            accepted = review.decide(workspace, review.undecided_above(workspace, least), "accept", reason)
            for episode, decision in accepted.items():
                if isinstance(decision, str):
                    self.fail(result, episode, decision)
            result.done = len(accepted) - len(result.failed)
        tracked = [episode for episode in workspace.episodes() if workspace.quality(episode).is_file()]
        undecided = review.undecided_above(workspace, float("-inf"))
        result.waiting = len(undecided)
        result.there = len(tracked) - len(undecided) - result.done
        if undecided:
            result.advice = (
                f"{len(undecided)} episodes to look at: `trackbench h5 serve {workspace.root} --in {self.source}`"
            )

    def attach(self, result: StageResult) -> None:
        outcomes = attach.attach(
            self.source,
            self.workspace,
            to=_path(self.config.attach.to),
            workers=self.config.workers,
            console=self.console,
        )
        for outcome in outcomes:
            if outcome.result is None:
                self.fail(result, outcome.item, str(outcome.error))
            else:
                state = outcome.result.state
                result.done += state == "written"
                result.there += state == "there"
                result.waiting += state == "stale"

    def export(self, result: StageResult) -> None:
        options = self.config.export
        settings = export.ExportSettings(options.keys, options.task, options.robot_type, options.container)  # type: ignore[arg-type]
        if not export.accepted_episodes(self.workspace)[0]:
            return
        for kind in options.formats:
            exported = export.export(
                self.source,
                self.workspace,
                kind,  # type: ignore[arg-type]
                to=_path(options.to.get(kind)),
                settings=settings,
                workers=self.config.workers or extract.default_workers(),
                console=self.console,
            )
            for episode, why in exported.failed.items():
                self.fail(result, f"{kind}: {episode}", why)
            for name, why in exported.left_out.items():
                self.console.print(f"export: {kind}: left out: {name}: {why}", markup=False)
            result.done += len(exported.episodes) * exported.fresh
            result.there += len(exported.episodes) * (not exported.fresh)

    def verify(self, result: StageResult) -> None:
        folder = _path(self.config.attach.to) or self.workspace.attached
        try:
            find_episodes(folder)
        except (FileNotFoundError, ValueError):  # nothing is attached yet
            return
        outcomes = attach.verify(folder, self.source, workers=self.config.workers, console=self.console)
        self._count(result, outcomes, lambda _: True)

    def _count(
        self,
        result: StageResult,
        outcomes: Iterable[Outcome[str, Any]],
        is_fresh: Callable[[Any], bool],
    ) -> None:
        for outcome in self._failures(result, outcomes):
            if is_fresh(outcome.result):
                result.done += 1
            else:
                result.there += 1

    def _failures(self, result: StageResult, outcomes: Iterable[Outcome[str, Any]]) -> list[Outcome[str, Any]]:
        """Tell what failed; the rest."""
        good = []
        for outcome in outcomes:
            if outcome.error is not None:
                self.fail(result, outcome.item, outcome.error)
            else:
                good.append(outcome)
        return good

    def _waiting(self) -> dict[str, str]:
        """Episodes with a camera that a person has to annotate: "missing" or "proposed".

        A camera that no episode has keypoints in is one that nobody wants, as for ``track``.
        """
        states = list(annotate.states(self.workspace))
        wanted = {state.camera for state in states if state.state in ("annotated", "proposed")}
        found: dict[str, str] = {}
        for state in states:
            if state.state == "proposed" or (state.state == "missing" and (state.camera in wanted or not wanted)):
                found.setdefault(state.episode, state.state)
        return found


def add_command(stages: Any) -> None:
    """Add ``run``."""
    parser = stages.add_parser("run", help="all stages by one config; goes on where something was missing")
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="instead of what the config says")
    parser.add_argument("--example", action="store_true", help="print a config that explains every key")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    plain = Console(highlight=False, soft_wrap=True)
    if options.example:
        plain.print((configs_dir() / "robotics/example.yaml").read_text(encoding="utf-8"), markup=False, end="")
        return 0
    if options.config is None:
        raise ValueError("expected CONFIG.yaml; --example prints one")
    results = run(read_config(options.config, options.overrides))
    plain.print(_table(results), markup=False)
    return 1 if any(result.failed for result in results) else 0


def _table(results: Sequence[StageResult]) -> str:
    lines = [f"{'stage':10}{'done':>8}{'there':>8}{'waiting':>9}{'failed':>8}  "]
    for result in results:
        reasons = [": ".join(filter(None, pair)) for pair in result.failed.items()]
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        told = "".join(reasons[:1]) + more or result.advice
        counts = f"{result.done:>8}{result.there:>8}{result.waiting:>9}{len(result.failed):>8}"
        lines.append(f"{result.stage:10}{counts}  {told}")
    return "\n".join(line.rstrip() for line in lines)


def _composed(path: Path, overrides: list[str]) -> DictConfig:
    """What Hydra makes of a file."""
    saved = dict(GlobalHydra.instance().__dict__)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(path.parent), version_base="1.3"):
            return compose(config_name=path.name, overrides=overrides)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    finally:
        GlobalHydra.instance().__dict__.update(saved)


def _told(error: OmegaConfBaseException, part: str) -> str:
    """One line for a key or value that the config cannot have."""
    key = getattr(error, "full_key", None) or part
    if isinstance(error, ConfigKeyError):
        above = OmegaConf.select(OmegaConf.structured(RunConfig), key.rpartition(".")[0] or "@")
        known = [str(name) for name in (above or RunConfig.__dataclass_fields__)]
        close = get_close_matches(key.rpartition(".")[2], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}"
        return f"unknown key {key!r}: {hint}"
    return f"{key}: {str(error).splitlines()[0]}"


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
