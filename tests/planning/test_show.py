"""What a plan looks like."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorabooth.planning.choose import plan
from lorabooth.planning.memory_plan import MemoryPlan
from lorabooth.planning.show import fits_text, plan_lines, too_little_text
from lorabooth.planning.title import missing_photos, title
from tests.planning.cases import MIB, arithmetic, case, recipe


@pytest.fixture
def made(tiny_sd: Path) -> MemoryPlan:
    return plan(recipe(tiny_sd), case(tiny_sd, 50 * MIB, predict=arithmetic))


@pytest.mark.parametrize("width", [80, 110])
def test_it_keeps_within_the_terminal_and_marks_one_peak(made: MemoryPlan, width: int) -> None:
    lines = plan_lines(made, "title", width=width)
    assert max(len(line.text) for line in lines) <= width
    marked = [line for line in lines if "◀ peak" in line.text]
    assert [line.look for line in marked] == ["peak"]
    assert marked[0].text.startswith(made.forecast.peak.name)
    assert any("█" in line.text for line in lines) is (width > 100)


def test_columns_add_up(made: MemoryPlan) -> None:
    lines = [line.text for line in plan_lines(made, "title", width=80)]
    head = next(line for line in lines if line.startswith("phase"))
    assert head.split() == ["phase", "denoiser", "text", "enc.", "vae", "adapter", "activations", "GiB"]
    row = next(line for line in lines if line.startswith("class images"))
    assert row.split()[2:] == ["0.78", "-", "0.29", "-", "0.20", "1.27", "◀", "peak"]


def test_without_block_characters_it_is_ascii(made: MemoryPlan) -> None:
    text = "\n".join(line.text for line in plan_lines(made, "title", width=110, blocks=False))
    assert text.isascii()
    assert "< peak" in text


def test_every_technique_has_its_reason_and_its_options(made: MemoryPlan) -> None:
    text = " ".join(" ".join(line.text for line in plan_lines(made, "title", width=80)).split())
    for each in made.chosen:
        assert each.name in text
        assert each.reason in text
        assert each.set_text() in text


def test_the_ends(tiny_sd: Path, made: MemoryPlan) -> None:
    roomy = plan(recipe(tiny_sd), case(tiny_sd, 4096 * MIB, predict=arithmetic))
    assert fits_text(roomy) == "fits 4.0 GiB as it stands: peak 2.6 GiB in class images"
    assert plan_lines(roomy, "title")[-1].look == "good"
    what, fix = too_little_text(made)
    assert what == (
        "class images needs 1.3 GiB with every technique that helps; 50 MiB of 50 MiB can be used "
        "(a card of 50 MiB)."
    )
    assert fix == "Take a larger device, or a smaller base. Even at 32 px it takes 1.1 GiB."
    close = plan(recipe(tiny_sd), case(tiny_sd, 1230 * MIB, predict=arithmetic))
    assert "\n  at 48 px: 1.2 GiB   --set images.resolution=48" in too_little_text(close)[1]


def test_the_title(tiny_sd: Path) -> None:
    here = case(tiny_sd, predict=arithmetic)
    text = title(here.forecast(recipe(tiny_sd, "optim.accumulate=2")).recipe, here.source)
    assert text.startswith("tiny-sd1 (sd1), 64 px, 1 subject + 1 class examples, 2 times a step, rank")
    assert missing_photos(recipe(tiny_sd)) == [str(Path("photos").absolute())]
