"""Training on several machines from one data set: through Lightning, from a shared disk and from a bucket."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import tfds_fakes as fakes
import torch
import torch.multiprocessing as mp
from storage_fakes import Bucket
from tfds_fakes import SIDE, T

from trackbench.data.panning_movi_e import PanningMoviEDataModule
from trackbench.data.tfds import write_index
from trackbench.structures import VideoBatch

SHARDS = (5, 7)
SCENES = sum(SHARDS)
BATCHES = 2 * SCENES  # of one video, over all ranks: two epochs
MACHINES = 2
INTERRUPTED = 4  # steps of both before a run stops and is resumed, within an epoch

Visit = tuple[str, str]  # name of a scene, digest of all that the clip of it holds


def visit(batch: VideoBatch) -> Visit:
    tensors = (batch.video, batch.queries, batch.xy, batch.visible)
    content = b"".join(tensor.numpy().tobytes() for tensor in tensors)
    return batch.names[0], hashlib.sha256(content).hexdigest()


class Recorder(pl.LightningModule):
    """Writes down what it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Visit] = []

    def training_step(self, batch: VideoBatch, batch_idx: int) -> torch.Tensor:
        self.seen.append(visit(batch))
        return self.weight * batch.queries.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data_module(path: str) -> PanningMoviEDataModule:
    return PanningMoviEDataModule(
        path, num_frames=T, height=SIDE, width=SIDE, num_points=9, seed=3, val_split=None
    )


def trained_on(path: str, machines: int, steps: int, folder: Path, resumed: bool = False) -> list[Visit]:
    """What this process sees in a run up to ``steps``, which is saved."""
    module = Recorder()
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        num_nodes=machines,
        strategy="auto" if machines == 1 else "ddp",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    checkpoint = folder / "last.ckpt" if resumed else None
    trainer.fit(module, data_module(path), ckpt_path=checkpoint, weights_only=False)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module.seen


def as_machine(number: int, path: str, port: int, folder: Path) -> None:
    """Be one of two machines in a run that is interrupted and resumed; what it saw goes to a file."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": number, "LOCAL_RANK": 0}
    os.environ |= {key: str(value) for key, value in where.items()}
    begun = trained_on(path, MACHINES, INTERRUPTED, folder)
    rest = trained_on(path, MACHINES, BATCHES // MACHINES, folder, resumed=True)
    requests = [name for kind, name in Bucket.requests if kind != "list" and "tfrecord" in name]
    (folder / f"{number}.json").write_text(json.dumps([begun, rest, requests]))
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    folder = fakes.write_movi(root / "panning_movi_e" / "32x32" / "1.0.0", SHARDS, name="panning_movi_e")
    for shard in folder.glob("*.tfrecord-*"):
        write_index(shard)
    return root


@pytest.fixture(scope="module")
def alone(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Visit]:
    """What one machine sees that reads from its disk and is not interrupted."""
    return trained_on(str(scenes), 1, BATCHES, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def together(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two machines sees that read from a bucket, before and after an interruption; its requests."""
    folder = tmp_path_factory.mktemp("together")
    mp.spawn(as_machine, (f"bucket://{scenes}", free_port(), folder), nprocs=MACHINES)
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(MACHINES)]


def test_one_machine_sees_every_scene_once_per_epoch(alone: list[Visit]) -> None:
    names = [name for name, _ in alone]
    expected = Counter(f"scene {index}" for index in range(SCENES))
    assert Counter(names[:SCENES]) == Counter(names[SCENES:]) == expected
    assert len({digest for _, digest in alone}) == BATCHES  # no clip is made twice


def merged(parts: Iterable[list[Any]]) -> list[Visit]:
    """What machines saw side by side, step by step."""
    return [(name, digest) for step in zip(*parts, strict=True) for name, digest in step]


def test_two_machines_share_the_stream_from_a_bucket_and_resume_in_it(
    alone: list[Visit], together: list[Any]
) -> None:
    """To the byte what one machine sees: each its part, none twice, and nothing lost where it was interrupted."""
    begun, rest, _ = zip(*together, strict=True)
    assert [len(part) for part in begun] == [INTERRUPTED] * MACHINES
    assert merged(begun) + merged(rest) == alone


def test_machines_ask_for_their_own_samples_only(together: list[Any]) -> None:
    """A request for a sample, one for each index in each of two runs, and no others for shards."""
    for begun, rest, requests in together:
        records = [name for name in requests if not name.endswith(".index")]
        assert len(records) == len(begun) + len(rest) + 2  # each run is a batch ahead when it stops
        assert len(requests) - len(records) <= 2 * len(SHARDS)


def test_three_machines_share_the_stream_from_a_bucket(alone: list[Visit], scenes: Path) -> None:
    """Without processes: what Lightning tells the data module is all that differs."""
    parts = []
    for number in range(3):
        data = data_module(f"bucket://{scenes}")
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            global_rank=number, world_size=3, global_step=0, accumulate_grad_batches=1
        )
        parts.append([visit(batch) for batch in islice(data.train_dataloader(), BATCHES // 3)])
    assert merged(parts) == alone
