from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from lorabooth.protocol.contact_sheet import render_sheet, tile
from lorabooth.protocol.jobs import Asked, Job, Settings
from lorabooth.protocol.subjects import ProtocolSubject
from lorabooth.protocol.summary import SubjectResult, gather
from lorabooth.recipe import Recipe, SubjectSection
from tests.tiny import make_photos


def _opened(uri: str) -> np.ndarray:
    kind, data = uri.split(",", 1)
    assert kind == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"), np.int16)


def test_a_tile_holds_its_images_in_order_and_what_is_gone_stays_grey(tmp_path: Path) -> None:
    colours = [(250, 10, 10), (10, 250, 10), (10, 10, 250)]
    paths = [tmp_path / f"{index}.png" for index in range(4)]
    for path, colour in zip((paths[0], paths[1], paths[3]), colours, strict=True):
        Image.new("RGB", (64, 64), colour).save(path)
    paths[2].write_bytes(b"torn")
    pixels = _opened(tile(paths))
    assert pixels.shape == (128, 128, 3)
    expected = [colours[0], colours[1], (128, 128, 128), colours[2]]
    for index, colour in enumerate(expected):
        middle = pixels[32 + 64 * (index // 2), 32 + 64 * (index % 2)]
        assert np.abs(middle - colour).max() < 25, index


def test_large_images_are_shrunk_and_no_image_is_no_tile(tmp_path: Path) -> None:
    Image.new("RGB", (512, 512)).save(tmp_path / "a.png")
    assert _opened(tile([tmp_path / "a.png"])).shape == (96, 96, 3)
    assert tile([]) == ""


def test_subjects_without_numbers_are_on_the_sheet_with_their_reason(tmp_path: Path) -> None:
    make_photos(tmp_path / "<b>rex", 2)
    asked = Asked(ProtocolSubject("<b>rex", "dog", True, tmp_path / "<b>rex"), ("a {token} {noun}",))
    recipe = Recipe(subjects=(SubjectSection(images="x", noun="dog"),))
    job = Job(tmp_path / "out", recipe, (asked,), ("<b>rex",), Settings(title="A & B"))
    text = render_sheet(gather(job, [SubjectResult(asked, "failed", "01.png: torn", 3)]))
    assert "failed: 01.png: torn" in text
    assert "&lt;b&gt;rex" in text
    assert "<b>rex" not in text
    assert "A &amp; B" in text
    assert text.count('src="data:image/') == 2
    assert "0 of 1" in text
    assert "do not compare" in text
