"""tools/scaling.py counts what a model has, and computes with it what its page says."""

import re


def test_counts_and_efficiency(command, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- Written by tools/scaling.py: begin -->\nold\n<!-- end -->\nafter\n")
    arguments = ["--models", "resnet50", "--jitter", 0, "--latency", 0, "--network", 1, "--nvlink", 1e9]
    assert command("scaling", *arguments, "--write", page)[0] == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n") and "old" not in text
    assert "| `resnet50` | 25.6 M | 4.1 | 204 MB | 5 + 1 | 307 MB |" in text
    shares = re.search(r"`resnet50` \| ddp \| (\d+) \|(.*)\|", text)
    assert shares[1] == "16"  # 6 · 4.1 G · 128 / 200 T
    first, *others = (int(share.strip().rstrip("%")) for share in shares[2].split("|"))
    # No network within 8. Beyond, 2 · 102 MB · 15/16 a second: 192 ms, of which 10 are hidden, and a quarter twice.
    assert first == 100 and others[0] in (6, 7) and others == sorted(others, reverse=True)


def test_unknown_model_is_one_sentence(command):
    code, _, err = command("scaling", "--models", "resnet51")
    assert code == 2 and "unknown model 'resnet51'" in err
