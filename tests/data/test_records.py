from __future__ import annotations

import os
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabooth.data.records import (
    MAX_CAPTION_BYTES,
    CaptionError,
    CaptionsError,
    Scan,
    natural_key,
    read_caption,
    record_id,
    scan,
)
from lorabooth.errors import DataError
from lorabooth.types import Record, Role


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")


def look(folder: Path, *, captions: bool = False) -> Scan:
    return scan(
        folder,
        role=Role.INSTANCE,
        subject="sks dog",
        prompt="a photo of a {token} {noun}",
        captions=captions,
        placeholders={"token": "sks", "noun": "dog"},
    )


def names(found: Scan) -> list[str]:
    return [record.path.name for record in found.records]


def reasons(found: Scan) -> dict[str, str]:
    return {skip.path.name: skip.reason for skip in found.skipped}


def test_photos_come_in_natural_order_and_the_rest_is_named_with_a_reason(tmp_path: Path) -> None:
    touch(tmp_path, "10.jpg", "2.PNG", "1.webp", "B.jpeg", "a.tiff")
    touch(tmp_path, ".hidden.jpg", "Thumbs.db", "readme", "me.HEIC", "2.txt", "._2.PNG")
    touch(tmp_path / "more.jpg", "inside.jpg")
    found = look(tmp_path)
    assert names(found) == ["1.webp", "2.PNG", "10.jpg", "a.tiff", "B.jpeg"]
    assert {record.caption for record in found.records} == {"a photo of a sks dog"}
    assert {(record.role, record.subject) for record in found.records} == {(Role.INSTANCE, "sks dog")}
    why = reasons(found)
    assert why.keys() == {".hidden.jpg", "._2.PNG", "Thumbs.db", "readme", "me.HEIC", "2.txt", "more.jpg"}
    assert why[".hidden.jpg"] == "hidden"
    assert "convert" in why["me.HEIC"]
    assert "captions are off" in why["2.txt"]
    assert "folder" in why["more.jpg"]
    assert found.summary().startswith("used 5 of 12 files\n")
    assert all(name in found.summary() for name in why)


def test_captions_follow_their_photo_and_placeholders_are_literal(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg", "2.jpg", "3.jpg", "4.jpg")
    (tmp_path / "1.txt").write_text("a {token} {noun}\n in {the} {0} snow ", encoding="utf-8")
    (tmp_path / "3.TXT").write_text("%s {token.__class__} {{noun}}", encoding="utf-8")
    (tmp_path / "4.txt").write_text("no placeholder", encoding="utf-8")
    (tmp_path / "9.txt").write_text("orphan", encoding="utf-8")
    found = look(tmp_path, captions=True)
    assert [record.caption for record in found.records] == [
        "a sks dog in {the} {0} snow",
        "a photo of a sks dog",
        "%s {token.__class__} {dog}",
        "no placeholder",
    ]
    assert reasons(found) == {"9.txt": "no photo has this name"}
    assert len(found.notes) == 1
    assert "2.jpg" in found.notes[0]
    assert "a photo of a sks dog" in found.notes[0]


def test_a_value_that_looks_like_a_placeholder_stays(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg")
    found = scan(
        tmp_path,
        role=Role.CLASS,
        subject="s",
        prompt="{token}|{noun}",
        captions=False,
        placeholders={"token": "{noun}", "noun": "dog"},
    )
    assert found.records[0].caption == "{noun}|dog"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_that_are_read(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "1.txt"
    path.write_text("ein Hündchen 子犬 🐶", encoding=encoding)
    assert read_caption(path) == "ein Hündchen 子犬 🐶"


def test_big_endian_utf_16(tmp_path: Path) -> None:
    path = tmp_path / "1.txt"
    path.write_bytes(b"\xfe\xff" + "Hündchen".encode("utf-16-be"))
    assert read_caption(path) == "Hündchen"


@pytest.mark.parametrize(
    ("data", "offset"),
    [
        ("a good Hündchen".encode("latin-1"), 8),
        (b"\xef\xbb\xbfabc\xffd", 6),
        ("ab".encode("utf-16-le"), 1),
        (b"\xff\xfe" + "ab".encode("utf-16-le") + b"\x00", 6),
        (b"\xff\xfea\x00\x00\xdcb\x00", 4),
        ("ab".encode("utf-32"), 0),
        (b"PK\x03\x04\x14\x00\x06\x00", 5),
    ],
)
def test_other_encodings_name_the_file_and_the_byte(tmp_path: Path, data: bytes, offset: int) -> None:
    path = tmp_path / "häßlich 1.txt"
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"byte {offset}\b") as caught:
        read_caption(path)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 3


def test_all_bad_captions_are_named_in_one_error(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    (tmp_path / "1.txt").write_bytes(b" \n\t ")
    (tmp_path / "2.txt").write_bytes(b"\xe4\xf6")
    (tmp_path / "3.txt").write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(DataError) as caught:
        look(tmp_path, captions=True)
    text = str(caught.value)
    assert all(str(tmp_path / name) in text for name in ("1.txt", "2.txt", "3.txt"))
    assert text.count("the caption is empty") == 2
    assert "delete it to use the prompt" in text
    assert len(look(tmp_path).records) == 3  # captions off: they are not read


def test_bad_captions_come_with_the_folder_as_it_would_be_without_them(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg", "2.jpg", "x.md")
    (tmp_path / "1.txt").write_text("a good one")
    (tmp_path / "2.txt").write_text(" ")
    with pytest.raises(CaptionsError) as caught:
        look(tmp_path, captions=True)
    assert [(skip.path.name, skip.reason) for skip in caught.value.problems] == [
        ("2.txt", "the caption is empty")
    ]
    assert [record.caption for record in caught.value.scan.records] == ["a good one", "a photo of a sks dog"]
    assert list(reasons(caught.value.scan)) == ["x.md"]


def test_a_caption_has_a_largest_size(tmp_path: Path) -> None:
    path = tmp_path / "1.txt"
    path.write_bytes(b"a" * MAX_CAPTION_BYTES)
    assert len(read_caption(path)) == MAX_CAPTION_BYTES
    path.write_bytes(b"a" * (MAX_CAPTION_BYTES + 1))
    with pytest.raises(CaptionError, match="larger than 64 KiB"):
        read_caption(path)
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole: reading it all would take a TiB of memory
    with pytest.raises(CaptionError, match="larger than 64 KiB"):
        read_caption(path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such names")
def test_names_with_control_characters_are_shown_escaped_everywhere(tmp_path: Path) -> None:
    folder = tmp_path / "in\x1b[1m"
    touch(folder, "a\nb.jpg", "c\x1b.jpg", "d\x1b[2J.md")
    (folder / "a\nb.txt").write_bytes(b"\xff")
    with pytest.raises(CaptionsError) as caught:
        look(folder, captions=True)
    found = caught.value.scan
    with pytest.raises(DataError) as absent:
        look(folder / "no\x1b[1m")
    with pytest.raises(DataError) as is_file:
        look(folder / "a\nb.jpg")
    (tmp_path / "\x07 empty").mkdir()
    touch(tmp_path / "\x07 empty", "\x1b.md")
    with pytest.raises(DataError) as no_photos:
        look(tmp_path / "\x07 empty")
    named = [record_id(record) for record in found.records]
    assert named == [r"in\x1b[1m/a\nb.jpg", r"in\x1b[1m/c\x1b.jpg"]
    for error in (caught, absent, is_file, no_photos):
        assert "\x1b" not in str(error.value)
        assert "\x07" not in str(error.value)
    assert r"a\nb.txt: not a caption" in str(caught.value)
    assert r"\x1b.md: not a photo" in str(no_photos.value)
    assert r"d\x1b[2J.md: not a photo" in found.summary()
    assert r"no caption file for c\x1b.jpg" in found.summary()
    assert "\x1b" not in found.summary()
    # The paths themselves stay as they are.
    assert names(look(folder)) == ["a\nb.jpg", "c\x1b.jpg"]


def test_a_folder_that_cannot_be_looked_at_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be opened: File name too long"):
        look(tmp_path / ("a" * 300))
    touch(tmp_path, "file.jpg")
    with pytest.raises(DataError, match="no such folder"):
        look(tmp_path / "file.jpg" / "inside")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(DataError, match="cannot be opened"):
        look(tmp_path / "loop")


def test_folders_that_cannot_serve(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        look(tmp_path / "absent")
    touch(tmp_path, "file.jpg")
    with pytest.raises(DataError, match="is a file"):
        look(tmp_path / "file.jpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no photos[^$]*\.png"):
        look(tmp_path / "empty")
    touch(tmp_path / "iphone", "1.heic", "2.heic")
    with pytest.raises(DataError, match=r"1\.heic: \.heic is not read"):
        look(tmp_path / "iphone")


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")
def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "secret", "x.jpg", "x.txt")
    inside = tmp_path / "photos"
    touch(inside, "1.jpg", "2.jpg")
    (inside / "out.jpg").symlink_to(tmp_path / "secret" / "x.jpg")
    (inside / "2.txt").symlink_to(tmp_path / "secret" / "x.txt")
    (inside / "gone.jpg").symlink_to(inside / "nothing.jpg")
    (inside / "loop.jpg").symlink_to(inside / "loop.jpg")
    (inside / "alias.jpg").symlink_to(inside / "1.jpg")
    os.mkfifo(inside / "pipe.jpg")
    found = look(inside, captions=True)
    assert names(found) == ["1.jpg", "2.jpg", "alias.jpg"]
    why = reasons(found)
    assert "leads out" in why["out.jpg"]
    assert "leads out" in why["2.txt"]
    assert "leads nowhere" in why["gone.jpg"]
    assert "leads nowhere" in why["loop.jpg"]
    assert "not a regular file" in why["pipe.jpg"]
    linked = tmp_path / "linked"
    linked.symlink_to(inside)  # the folder itself may be a link
    assert len(look(linked).records) == 3


def test_names_with_spaces_and_letters_of_any_script(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "größe 1")
    touch(tmp_path / "mein ordner ü", decomposed + ".jpg", "子犬 2.jpg")
    (tmp_path / "mein ordner ü" / (unicodedata.normalize("NFC", decomposed) + ".txt")).write_text("ok")
    found = look(tmp_path / "mein ordner ü", captions=True)
    assert found.records[0].caption == "ok"
    assert record_id(found.records[1]) == "mein ordner ü/子犬 2.jpg"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such names")
def test_a_name_that_is_not_unicode_is_reported_in_printable_form(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg")
    raw = os.fsencode(tmp_path) + b"/\xff.jpg"
    with open(raw, "wb") as file:  # noqa: PTH123
        file.write(b"x")
    found = look(tmp_path)
    assert names(found) == ["1.jpg"]
    assert "not valid Unicode" in found.summary().encode("utf-8").decode()


def test_record_id_never_shows_where_the_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "1.jpg", Path("1.jpg"), Path("./1.jpg")):
        record = Record(path, "", Role.CLASS, "")
        assert record_id(record) == f"{tmp_path.name}/1.jpg"


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), unique=True))
def test_order_is_total_and_does_not_depend_on_the_listing(found: list[str]) -> None:
    listed_otherwise = found[::-1]
    assert sorted(found, key=natural_key) == sorted(listed_otherwise, key=natural_key)


def test_numbers_sort_by_value() -> None:
    assert sorted(["a10b", "a2b", "A3B", "a02b"], key=natural_key) == ["a02b", "a2b", "A3B", "a10b"]
