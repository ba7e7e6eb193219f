"""Progress: bars on a terminal, few plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import io

import pytest

from lorabooth.cli.console import LINE_INTERVAL_S, Bars, Lines, Quiet, duration_text, rate_text, reporter_for


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_the_stream_decides() -> None:
    assert isinstance(reporter_for(quiet=False, stream=Terminal()), Bars)
    assert isinstance(reporter_for(quiet=False, stream=io.StringIO()), Lines)
    assert isinstance(reporter_for(quiet=True, stream=Terminal()), Quiet)


def test_plain_lines_are_few_and_hold_what_matters() -> None:
    stream, clock = io.StringIO(), Clock()
    lines = Lines(stream, clock)
    with lines.task("training", 100, "step", start=40) as task:
        for step in range(60):
            clock.now_s += 0.2
            task.advance(loss=f"{step / 100:.2f}", lr="1e-4")
    text = stream.getvalue().splitlines()
    assert len(text) == 12 // LINE_INTERVAL_S + 1
    assert text[0] == "training  65/100  loss 0.24  lr 1e-4  5.00 step/s  ETA 0:07"
    assert text[-1] == "training: 100 steps in 0:12  5.00 step/s  loss 0.59  lr 1e-4"


def test_plain_messages() -> None:
    stream = io.StringIO()
    lines = Lines(stream)
    lines.say("the identifier is [bold]qzx")
    lines.warn("slow")
    assert stream.getvalue() == "the identifier is [bold]qzx\nwarning: slow\n"


def test_bars_leave_one_line_a_task_and_take_markup_as_text() -> None:
    stream = Terminal()
    bars = Bars(stream)
    with bars.task("class [images]", 3, "image") as outer:
        outer.advance(2)
        with bars.task("inner", 1) as inner:
            inner.advance(loss="0.5")
        bars.say("half [way]")
        outer.advance(1, kept="3")
    bars.warn("done")
    text = stream.getvalue()
    for expected in (
        "class [images]: 3 images in",
        "inner: 1 it in",
        "half [way]",
        "warning: done",
        "kept 3",
    ):
        assert expected in text


def test_a_task_that_fails_takes_its_bar_down_and_claims_nothing() -> None:
    stream = Terminal()
    bars = Bars(stream)
    with pytest.raises(ValueError, match="no"), bars.task("training", 3):
        raise ValueError("no")
    assert "training: 3" not in stream.getvalue()
    with bars.task("again", 1) as task:  # and the next one works
        task.advance()
    assert "again: 1 it" in stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["lines", "bars"])
def test_secrets_are_shown_nowhere(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_" + "QwErTyUiOpAsDfGhJkLzXcVbNm"
    key = "0123456789abcdef0123"
    monkeypatch.setenv("WANDB_API_KEY", key)
    reporter = reporter_for(quiet=False, stream=stream)
    for secret in (token, key):
        reporter.say(f"said {secret} here")
        reporter.warn(f"warned of {secret} there")
        with reporter.task(f"fetching {secret}", 1) as task:
            task.advance(source=f"https://me:{secret}@host/x")
    shown = stream.getvalue()
    assert token not in shown
    assert key not in shown
    for expected in ("said *** here", "warning: warned of *** there", "fetching ***", "https://me:***@host"):
        assert shown.count(expected) >= 2


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = Quiet()
    with quiet.task("training", 3) as task:
        task.advance(loss="1")
    quiet.say("a")
    quiet.warn("b")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3600, "1:00:00"), (-3, "0:00")])
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("count", "seconds", "text"), [(10, 2, "5.00 it/s"), (1, 4, "4.0 s/it"), (0, 4, ""), (1, 0, "")]
)
def test_rates(count: int, seconds: float, text: str) -> None:
    assert rate_text(count, seconds, "it") == text
