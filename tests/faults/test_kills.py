"""SIGKILL at writes and at random moments, again and again: the end is the end of the run nobody killed."""

from __future__ import annotations

import random
import sys

import pytest

from tests.faults.harness import Bench, Story, differences, last_checkpoint, left_behind
from tests.faults.moments import Moment, one_of_each, places, site

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; needs fork and SIGKILL"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def faults(stories: dict[str, Story]) -> dict[str, list[str]]:
    """Of each run that has any."""
    found = {name: [*story.torn, *story.left, *story.differences] for name, story in stories.items()}
    return {name: [f"killed at {stories[name].kills}", *lines] for name, lines in found.items() if lines}


def test_a_forked_process_does_what_a_started_one_does(forked: Bench) -> None:
    ended = forked.attempt("forked")
    assert ended.code == 0, ended.said
    assert [site(change) for change in ended.changes] == [site(change) for change in forked.changes]
    assert not differences(forked.folder / "reference", forked.folder / "forked")
    assert not left_behind(forked.folder / "reference", forked.folder / "forked")


@pytest.mark.slow
def test_killed_at_changes_of_every_kind(forked: Bench, chance: random.Random) -> None:
    """Runs of three kills each, one of every kind in turn; which of a kind, and the rest, is drawn."""
    numbers = one_of_each(forked.changes, chance)
    assert len(numbers) > 40
    first = numbers[::10]
    stories = {}
    for turn, number in enumerate(first):
        chain = [Moment(number), Moment(chance.choice(numbers)), Moment(chance.choice(numbers), 0.1)]
        stories[f"kind-{turn}"] = forked.torture(f"kind-{turn}", chain)
    assert not faults(stories)
    kills = [kill for story in stories.values() for kill in story.kills]
    assert len(kills) >= 2 * len(first), kills
    assert len({site(kill) for kill in kills}) > len(first)


def test_killed_again_and_again_before_anything_is_done(forked: Bench) -> None:
    """A machine that dies four times as the run is starting leaves nothing of that behind."""
    changes = [site(change) for change in forked.changes]
    story = forked.torture("stubborn", [Moment(changes.index("rename run/run.json") + 1)] * 4)
    assert len(story.kills) == 4
    assert not faults({"stubborn": story})


@pytest.mark.parametrize(
    ("last", "later"),
    [
        ("rename run/checkpoints/step-#", 1),
        ("rename run/adapter.safetensors", 0),
        ("rename run/run.json", 1),
        ("write run/.report.html.#.tmp", 0),
    ],
    ids=["before old checkpoints go", "before the result", "after it is finished", "in the report"],
)
def test_killed_when_all_steps_are_done(forked: Bench, last: str, later: int) -> None:
    """Nothing is left to train, and what comes after it is made up for all the same."""
    changes = [site(change) for change in forked.changes]
    moment = Moment(max(n for n, change in enumerate(changes, start=1) if change == last) + later)
    name = f"end-{moment.change}"
    story = forked.torture(name, [moment])
    assert len(story.kills) == 1
    assert last_checkpoint(forked.folder / name / "run") == 6
    assert not faults({name: story})


@pytest.mark.slow
def test_real_processes_lose_no_more_than_since_the_last_checkpoint(
    bench: Bench, chance: random.Random
) -> None:
    """Started as a user starts them; killed in the middle of the steps, and while the result is written."""
    written = [n for n in places(bench.changes, chance) if bench.changes[n - 1].startswith("write ")]
    steps = [n for n in written if bench.changes[n - 1].endswith("metrics.jsonl")]
    story = bench.torture("real", [Moment(steps[4], 0.02)])
    assert len(story.kills) == 1, story
    assert not faults({"real": story})
    assert last_checkpoint(bench.folder / "real" / "run") == 6
    assert (bench.folder / "real" / "run" / "report.html").is_file()
