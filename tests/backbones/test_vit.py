from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackbench.backbones.vit import VIT_SIZES, Attention, DinoV2, SwiGLU, VisionTransformer, normalize_images


def tiny(**options: object) -> DinoV2:
    arguments: dict[str, object] = {"embed_dim": 32, "depth": 3, "num_heads": 4, **options}
    return DinoV2(**arguments).eval()  # type: ignore[arg-type]


def randomize(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)


def plain_attention(x: Tensor, attention: Attention) -> Tensor:
    d = x.shape[-1] // attention.num_heads
    heads = []
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    for head in range(attention.num_heads):
        part = slice(head * d, (head + 1) * d)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / d**0.5).softmax(-1)
        heads.append(weights @ v[..., part])
    return attention.proj(torch.cat(heads, dim=-1))


def test_forward_is_the_formulas_written_out() -> None:
    model = tiny(registers=True)
    randomize(model)
    model.double()
    vit = model.vit
    video = torch.rand(2, 2, 3, 28, 42, dtype=torch.float64)

    image = normalize_images(video[1, 1:])
    tokens = []
    position = vit.pos_embed[:, 1:].reshape(1, 37, 37, 32).permute(0, 3, 1, 2)
    position = F.interpolate(position, scale_factor=(2.1 / 37, 3.1 / 37), mode="bicubic")
    assert position.shape[-2:] == (2, 3)
    for row in range(2):
        for column in range(3):
            patch = image[0, :, 14 * row : 14 * row + 14, 14 * column : 14 * column + 14]
            token = (vit.patch_embed.proj.weight * patch).sum((1, 2, 3)) + vit.patch_embed.proj.bias
            tokens.append(token + position[0, :, row, column])
    prefix = [vit.cls_token[0] + vit.pos_embed[0, :1], vit.register_tokens[0]]
    x = torch.cat([*prefix, torch.stack(tokens)])[None]
    for block in vit.blocks:
        x = x + block.ls1.gamma * plain_attention(
            F.layer_norm(x, (32,), block.norm1.weight, block.norm1.bias, 1e-6), block.attn
        )
        hidden = block.mlp.fc1(F.layer_norm(x, (32,), block.norm2.weight, block.norm2.bias, 1e-6))
        x = x + block.ls2.gamma * block.mlp.fc2(0.5 * hidden * (1 + torch.erf(hidden / 2**0.5)))
    x = F.layer_norm(x, (32,), vit.norm.weight, vit.norm.bias, 1e-6)
    expected = x[0, 5:].T.reshape(32, 2, 3)

    torch.testing.assert_close(model(video)[1, 1], expected)


def test_position_embedding_modes() -> None:
    by_size = VisionTransformer(32, 1, 4, pos_embed_mode="size")
    position = by_size.pos_embed[:, 1:].reshape(1, 37, 37, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(position, size=(27, 36), mode="bicubic", antialias=False)
    torch.testing.assert_close(by_size.pos_embedding(27, 36), expected.flatten(2).transpose(1, 2))

    by_scale = VisionTransformer(32, 1, 4, pos_embed_mode="scale")
    by_scale.load_state_dict(by_size.state_dict())
    assert (by_scale.pos_embedding(27, 36) - by_size.pos_embedding(27, 36)).abs().max() > 1e-4
    for model in (by_size, by_scale):
        assert torch.equal(model.pos_embedding(37, 37), model.pos_embed[:, 1:])
        assert all(model.pos_embedding(g, g).shape[1] == g * g for g in range(1, 80))


@pytest.mark.parametrize("size", list(VIT_SIZES))
def test_published_sizes(size: str) -> None:
    """Parameters of the official files without the mask token: 22.06, 86.58, 304.4 and 1136.5 million."""
    config = VIT_SIZES[size]
    with torch.device("meta"):
        block = VisionTransformer(config.embed_dim, 1, config.num_heads, config.ffn)
        two_blocks = VisionTransformer(config.embed_dim, 2, config.num_heads, config.ffn)
    one, two = (sum(p.numel() for p in model.parameters()) for model in (block, two_blocks))
    total = one + (config.depth - 1) * (two - one)
    expected = {"small": 22.06e6, "base": 86.58e6, "large": 304.37e6, "giant": 1136.48e6}
    assert total == pytest.approx(expected[size], rel=1e-3)


def test_swiglu() -> None:
    layer = SwiGLU(6, 24)
    assert layer.w3.in_features == 16
    x = torch.randn(5, 6)
    gate, value = layer.w12(x)[:, :16], layer.w12(x)[:, 16:]
    torch.testing.assert_close(layer(x), layer.w3(gate * gate.sigmoid() * value))


def test_chunks_do_not_change_features() -> None:
    model = tiny(frames_per_chunk=2)
    video = torch.rand(2, 5, 3, 28, 28)
    chunked = model(video)
    model.frames_per_chunk = None
    torch.testing.assert_close(chunked, model(video))


def test_token_grid_and_unit_length() -> None:
    model = tiny(token_grid=(4, 6), normalize_features=True)
    features = model(torch.rand(1, 2, 3, 50, 30))
    assert features.shape == (1, 2, 32, 4, 6)
    torch.testing.assert_close(features.norm(dim=2), torch.ones(1, 2, 4, 6))


def test_stream_equals_clip() -> None:
    model = tiny()
    video = torch.rand(2, 3, 3, 28, 28)
    stream = model.stream()
    frames = [feature for frame in video.unbind(1) for feature in stream.push(frame)]
    torch.testing.assert_close(torch.stack(frames, dim=1), model(video), atol=1e-5, rtol=0)


def test_frozen_model_passes_gradients_on() -> None:
    model = tiny(frozen=True)
    video = torch.rand(1, 1, 3, 28, 28, requires_grad=True)
    model(video).square().sum().backward()
    assert video.grad is not None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_official_file(tmp_path: Path) -> None:
    source = tiny()
    randomize(source)
    official = {**source.vit.state_dict(), "mask_token": torch.zeros(1, 32)}
    path = tmp_path / "dinov2.pth"
    torch.save(official, path)
    loaded = tiny(weights=path)
    assert all(
        torch.equal(loaded.vit.state_dict()[key], source.vit.state_dict()[key]) for key in loaded.vit.state_dict()
    )


def test_file_that_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "dinov2.pth"
    official = tiny().vit.state_dict()
    official["norm.scale"] = official.pop("norm.weight")
    official["cls_token"] = torch.zeros(1, 1, 7)
    torch.save(official, path)
    with pytest.raises(
        ValueError, match=r"missing: norm\.weight; unexpected: norm\.scale; .*cls_token: \(1, 1, 7\)"
    ):
        tiny(weights=path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tiny(weights=tmp_path / "nowhere.pth")
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="not a DINOv2 state dict"):
        tiny(weights=path)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="patch size 14"):
        tiny()(torch.rand(1, 1, 3, 30, 28))
    with pytest.raises(ValueError, match="size must be one of"):
        DinoV2("medium")
    with pytest.raises(ValueError, match="frames_per_chunk"):
        tiny(frames_per_chunk=0)


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_tokens_in_chunks_change_nothing(ffn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vit = VisionTransformer(embed_dim=32, depth=2, num_heads=4, ffn=ffn).eval()
    randomize(vit)
    images = torch.rand(3, 3, 42, 56)
    expected = vit(images)
    with torch.no_grad():
        for size in (1, 5, 13, 1000):  # tokens: 13 in each of 3 images
            monkeypatch.setattr("trackbench.backbones.vit.TOKENS_PER_CHUNK", size)
            torch.testing.assert_close(vit(images), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert vit.blocks[0](vit.embed(images).float()).dtype == torch.float32  # the residual stream
