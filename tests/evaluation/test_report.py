import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from lorabooth.errors import RecipeError
from lorabooth.evaluation.curves import Curves
from lorabooth.evaluation.report import (
    Chosen,
    Pair,
    Picture,
    ReportData,
    StepSamples,
    embed_picture,
    render_report,
    write_report,
)

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects what a browser would follow, and checks that all tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.images: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for key, value in attrs:
            if key in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
                (self.images if tag == "img" else self.links).append(value)
            if tag == "section" and key == "id":
                self.ids.append(value)
            assert not key.startswith("on"), key
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop() == tag


@pytest.fixture
def full(photos: Path, tmp_path: Path) -> ReportData:
    paths = sorted(photos.iterdir())
    for name in ("a.png", "b.png"):
        Image.effect_noise((64, 64), 60).convert("RGB").save(tmp_path / name)
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    shots = (Picture(a, "a sks dog", 0), Picture(b, "a sks dog in the snow", 1))
    return ReportData(
        subject="sks dog",
        base="tiny",
        steps=20,
        seconds=83.4,
        facts=(("rank", "4"),),
        photos=tuple(Picture(path) for path in paths),
        curves=Curves((1, 2, 3), (0.3, 0.2, 0.1), (0.1, 0.2, 0.1)),
        samples=(StepSamples(0, shots[:1]), StepSamples(10, shots), StepSamples(20, shots)),
        comparisons=(Pair("a sks dog", 0, a, b),),
        class_check=(Pair("a dog", 0, b, a),),
        recipe_toml='[model]\nbase = "tiny"\n',
        choices=(Chosen("adapter.rank", "4", "default of sd1"),),
        timings_s=(("caching", 1.5), ("training", 4000.0)),
        peak_memory_bytes=(("CPU", 3 * 2**30),),
        versions=(("torch", "2.13"),),
        warnings=("02.png is small",),
    )


def test_everything_is_there_and_in_one_file(full: ReportData, tmp_path: Path) -> None:
    path = write_report(tmp_path, full)
    assert path == tmp_path / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.ids == ["photos", "comparison", "class", "samples", "loss", "choices", "recipe", "machine"]
    assert len(page.images) == 3 + 2 + 2 + 5
    assert all(re.match(r"data:image/(png|webp);base64,", uri) for uri in page.images)
    assert all(link.startswith("#") for link in page.links)
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import", text)
    for words in (
        "sks dog",
        "1 min 23 s",
        "1 h 06 min",
        "3.0 GiB",
        "02.png is small",
        "default of sd1",
        "step 10",
    ):
        assert words in text
    assert not list(tmp_path.glob(".report*"))


def test_missing_pieces_are_left_out() -> None:
    text = render_report(ReportData("sks dog", "tiny", 0))
    page = Page(text)
    assert page.ids == []
    assert page.images == []
    assert "None" not in text


def test_an_unreadable_picture_is_a_grey_square(tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    data = ReportData("x", "y", 1, photos=(Picture(tmp_path / "torn.png"), Picture(tmp_path / "absent.jpg")))
    text = render_report(data)
    assert text.count('class="missing"') == 2
    assert Page(text).images == []


def test_texts_are_escaped_everywhere(full: ReportData, photos: Path) -> None:
    evil = '<script>alert("x")</script>"\' onload=x {{ 7*7 }}'
    photo = next(photos.iterdir())
    data = ReportData(
        subject=evil,
        base=evil,
        steps=1,
        facts=((evil, evil),),
        photos=(Picture(photo, evil),),
        samples=(StepSamples(1, (Picture(photo, evil, 0),)),),
        comparisons=(Pair(evil, 0, photo, photo),),
        recipe_toml=evil,
        choices=(Chosen(evil, evil, evil),),
        timings_s=((evil, 1.0),),
        versions=((evil, evil),),
        warnings=(evil,),
    )
    text = render_report(data)
    assert "script" not in Page(text).tags
    assert "<script" not in text
    assert "{{ 7*7 }}" in text


def test_pictures_are_small_upright_and_carry_no_metadata(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    exif[0x010F] = "Secret Camera"
    Image.effect_noise((900, 600), 50).convert("RGB").save(tmp_path / "photo.jpg", exif=exif)
    raw = base64.b64decode(embed_picture(tmp_path / "photo.jpg").split(",")[1])
    image = Image.open(io.BytesIO(raw))
    assert image.size[1] > image.size[0]
    assert max(image.size) <= 512
    assert not dict(image.getexif())
    assert b"Secret" not in raw


def test_alpha_is_put_on_white_and_small_images_stay_exact(tmp_path: Path) -> None:
    Image.new("RGBA", (10, 10), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    image = Image.open(io.BytesIO(base64.b64decode(embed_picture(tmp_path / "clear.png").split(",")[1])))
    assert image.format == "PNG"
    assert image.convert("RGB").getpixel((5, 5)) == (255, 255, 255)


def test_the_home_folder_is_not_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    text = render_report(ReportData("x", "y", 1, recipe_toml=f'images = "{tmp_path}/photos"'))
    assert str(tmp_path) not in text
    assert "~/photos" in text


def test_long_runs_show_the_first_and_last_of_at_most_twelve_steps(photos: Path) -> None:
    photo = Picture(next(photos.iterdir()), "p", 0)
    data = ReportData("x", "y", 1, samples=tuple(StepSamples(step, (photo,)) for step in range(0, 4000, 100)))
    columns = re.findall(r'<th scope="col">(.*?)</th>', render_report(data))
    assert len(columns) == 12
    assert (columns[0], columns[-1]) == ("before", "step 3900")


def test_an_old_report_stays_if_writing_fails(tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        write_report(tmp_path / "absent", ReportData("x", "y", 1))
