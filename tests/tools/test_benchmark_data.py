"""tools/benchmark_data.py feeds all loaders the same files; its figures are nobody's business here."""

import json

from PIL import Image
from saccade.train.data import turbojpeg


def test_times_every_loader(command, tmp_path):
    small = ["--images", 20, "--size", 32, "--batch", 4, "--workers", 1, "--batches", 2, "--runs", 1, "--out", tmp_path]
    small += ["--clock", "cpu"]
    code, _, err = command("benchmark_data", *small, "--augment", "auto_augment=rand-m5-inc1", "hflip=0.1")
    assert code == 0, err
    result = json.loads((tmp_path / "benchmark_data.json").read_text())
    assert result["augment"] == dict(color_jitter=0.0, auto_augment="rand-m5-inc1", hflip=0.1)
    rows = {row["loader"]: row for row in result["rows"]}
    kinds = {"saccade", "timm", "saccade, normalised", "timm, normalised"}
    if turbojpeg.is_installed():
        kinds |= {"saccade, cropped", "saccade, cropped, normalised"}
    assert rows.keys() == kinds | {"decoding (torchvision)", "decoding (PIL)"}
    assert all(row["images_per_s"] > 0 for row in rows.values())
    assert rows["timm"]["against_timm"] == 1
    assert 1.0 in (rows["decoding (torchvision)"]["of_decoding"], rows["decoding (PIL)"]["of_decoding"])


def test_own_images(command, tmp_path):
    for i in range(3):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "a" / f"{i}.jpg")
    code, _, err = command("benchmark_data", "--data", tmp_path, "--batch", 4)
    assert code == 2 and "has 3 JPEGs in its class folders, fewer than --batch 4" in err
    code, _, err = command("benchmark_data", "--augment", "hflip")
    assert code == 2 and "--augment takes key=value, got hflip" in err
