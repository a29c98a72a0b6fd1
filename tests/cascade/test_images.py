import numpy as np
import pytest
import torch
from PIL import Image

from cascade import images
from cascade.errors import InputError


def test_uint8_round_trip_is_exact():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(images.to_uint8(images.from_uint8(values)), values)
    assert images.from_uint8(values).aminmax() == (-1.0, 1.0)


def test_out_of_range_is_clamped_and_rounded():
    x = torch.tensor([-3.0, 3.0, 0.0, 1 / 127.5 * 0.6 - 1])
    assert images.to_uint8(x).tolist() == [0, 255, 128, 1]


def test_pil_round_trip_keeps_axes():
    x = images.from_uint8(torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8))
    pictures = images.to_pil(x)
    assert [p.size for p in pictures] == [(7, 5)] * 2  # PIL says width, height
    assert torch.equal(torch.stack([images.from_pil(p) for p in pictures]), x)
    red = images.to_pil(torch.tensor([1.0, -1.0, -1.0])[None, :, None, None])[0]
    assert red.getpixel((0, 0)) == (255, 0, 0)


def test_transparency_lies_on_white():
    half = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    assert images.from_pil(half).flatten().tolist() == [1.0, 1.0, 1.0]
    assert images.from_pil(Image.new("L", (1, 1), 0)).flatten().tolist() == [-1.0] * 3
    palette = Image.new("P", (1, 1), 0)
    palette.info["transparency"] = 0
    assert images.from_pil(palette).flatten().tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 4, 4, 3), (1, 1, 4, 4)])
def test_to_pil_refuses_other_shapes(shape):
    with pytest.raises(InputError, match="expected a tensor of shape B 3 H W"):
        images.to_pil(torch.zeros(shape))


def test_png_metadata(tmp_path):
    picture = images.to_pil(torch.rand(1, 3, 4, 6) * 2 - 1)[0]
    path = images.save_png(picture, tmp_path / "new" / "a.png", {"prompt": "café 猫", "seed": 7})
    assert images.read_png_metadata(path) == {"prompt": "café 猫", "seed": "7"}
    assert np.array_equal(np.array(Image.open(path)), np.array(picture))
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # as readable as any new file


def test_failed_save_leaves_nothing(tmp_path, monkeypatch):
    picture = Image.new("RGB", (4, 4))
    images.save_png(picture, tmp_path / "a.png", {"seed": 1})

    def disk_full(self, file, *args, **kwargs):
        file.write(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", disk_full)
    with pytest.raises(InputError, match=r"cannot write .*a\.png: No space left on device"):
        images.save_png(picture, tmp_path / "a.png", {"seed": 2})
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]  # the old one, whole
    assert images.read_png_metadata(tmp_path / "a.png") == {"seed": "1"}


def test_unwritable_place_and_unreadable_files(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(InputError, match="cannot write"):
        images.save_png(Image.new("RGB", (1, 1)), tmp_path / "file" / "a.png")
    whole = images.save_png(Image.new("RGB", (64, 64)), tmp_path / "a.png", {"seed": 1}).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    for name in ("file", "missing.png", "half.png"):
        with pytest.raises(InputError, match="cannot read") as error:
            images.read_png_metadata(tmp_path / name)
        assert "\n" not in str(error.value)
    Image.new("RGB", (1, 1)).save(tmp_path / "b.jpg")
    with pytest.raises(InputError, match="expected a PNG file, got JPEG"):
        images.read_png_metadata(tmp_path / "b.jpg")


def test_jpeg_loses_a_little_and_more_at_low_quality():
    ramp = torch.linspace(-1, 1, 32).expand(3, 32, 32)
    x = ramp + 0.2 * torch.sign(torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0)))
    x = x.clamp(-1, 1)
    errors = [(images.jpeg(x, q) - x).abs().mean() for q in (95, 20)]
    assert 0 < errors[0] < errors[1] < 0.5


def test_downsample_matches_pillow():
    """Box halving then bicubic, as guided-diffusion does on 8-bit pictures with Pillow."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8))
    halved = picture.resize((48, 48), Image.Resampling.BOX)
    expected = images.from_pil(halved.resize((40, 40), Image.Resampling.BICUBIC))
    ours = images.downsample(images.from_pil(picture), 40)
    assert (ours - expected).abs().max() < 0.03  # Pillow rounds to 8 bits twice


def test_downsample_by_a_power_of_two_is_the_box_mean():
    x = torch.rand(2, 3, 32, 64) * 2 - 1
    expected = x.unflatten(3, (16, 4)).unflatten(2, (8, 4)).mean((3, 5))
    torch.testing.assert_close(images.downsample(x, (8, 16)), expected, atol=1e-6, rtol=0)
    crop = images.downsample(x[..., 8:24, 16:48], (4, 8))
    torch.testing.assert_close(crop, expected[..., 2:6, 4:12], atol=1e-6, rtol=0)


def test_downsample_does_not_alias():
    stripes = torch.ones(1, 3, 60, 60)
    stripes[..., ::2] = -1  # the highest frequency, of mean 0
    assert images.downsample(stripes, 23).abs().mean() < 0.05


def test_downsample_keeps_range_dtype_and_identity():
    x = torch.sign(torch.randn(1, 3, 50, 50))
    small = images.downsample(x, (31, 47))
    assert small.shape == (1, 3, 31, 47) and small.abs().max() <= 1
    assert images.downsample(x.bfloat16(), 25).dtype == torch.bfloat16
    assert torch.equal(images.downsample(x, 50), x)
    with pytest.raises(InputError, match="64x64 is larger than 50x50"):
        images.downsample(x, 64)
