"""What a protocol costs: counted before it starts, and in time as soon as something was measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from lorabooth.progress import Reporter, Task, duration
from lorabooth.protocol.jobs import Asked, Job
from lorabooth.protocol.measuring import Album, Counts
from lorabooth.training.eta import MEASURED_STEPS, SETTLING_STEPS


@dataclass(frozen=True, slots=True)
class Cost:
    """What is still to do; what is on the disk of a subject that was begun is not taken off.

    Attributes:
        trainings: runs.
        steps: optimizer steps of each.
        class_images: for prior preservation, of all classes together.
        images: to measure by.
        finished: subjects that are done already.
    """

    trainings: int
    steps: int
    class_images: int
    images: int
    finished: int = 0

    def text(self) -> str:
        """In a line or two."""
        if not self.trainings:
            return f"all {self.finished} subjects are done already"
        before = f"; {self.finished} done already" if self.finished else ""
        lines = [
            f"to do: {self.trainings} training{'s' * (self.trainings != 1)} of {self.steps:,} steps = "
            f"{self.trainings * self.steps:,} steps{before}"
        ]
        classes = f"{self.class_images:,} class images (those of an earlier run are found again), "
        lines.append(f"       {classes if self.class_images else ''}{self.images:,} images to measure by")
        return "\n".join(lines)


def count(job: Job, open_subjects: Sequence[Asked], steps: int) -> Cost:
    """What these subjects cost.

    Args:
        job: the protocol.
        open_subjects: those that are not done.
        steps: of a training.
    """
    prior = job.recipe.prior
    classes = {one.subject.noun for one in open_subjects} if prior.mode == "generated" else set()
    return Cost(
        trainings=len(open_subjects),
        steps=steps,
        class_images=len(classes) * prior.count,
        images=sum(images_of(job, one) for one in open_subjects),
        finished=len(job.todo) - len(open_subjects),
    )


def images_of(job: Job, asked: Asked) -> int:
    """Images of one subject's evaluation, with the adapter on and off."""
    s = job.settings
    counts = Counts(s.images_per_prompt, s.class_images, s.unrelated_images)
    album = Album.of("token", asked.subject.noun, job.prompts_for(asked), counts)
    return 2 * len(album.shots)


@dataclass
class Estimating:
    """A reporter that says, once each, what all trainings will take, and what all subjects will.

    Attributes:
        inner: where everything goes.
        workers: processes that share the work.
        others: subjects that are still to do besides the one under way, when asked.
        prefix: before every line.
    """

    inner: Reporter
    workers: int
    others: int = 0
    prefix: str = ""
    _told_steps: bool = field(default=False, init=False)
    _told_subject: bool = field(default=False, init=False)

    @contextmanager
    def task(self, label: str, total: int, unit: str = "it", start: int = 0) -> Iterator[Task]:
        """Hand on, and listen to the steps."""
        with self.inner.task(f"{self.prefix}{label}", total, unit, start) as task:
            if unit != "step" or self._told_steps:
                yield task
            else:
                yield _Listening(task, lambda step_s: self.steps_measured(step_s, total))

    def say(self, message: str) -> None:
        """Hand on."""
        self.inner.say(f"{self.prefix}{message}")

    def warn(self, message: str) -> None:
        """Hand on."""
        self.inner.warn(f"{self.prefix}{message}")

    def subject_done(self, seconds: float) -> None:
        """The first subject that was done from its beginning tells what the others will take."""
        if self._told_subject or not self.others:
            return
        self._told_subject = True
        rest = duration(seconds * self.others / min(self.workers, self.others))
        self.inner.say(f"a subject takes {duration(seconds)}: about {rest} for the other {self.others}")

    def steps_measured(self, step_s: float, steps: int) -> None:
        """A step takes so long."""
        if self._told_steps:
            return
        self._told_steps = True
        all_s = step_s * steps * (self.others + 1) / min(self.workers, self.others + 1)
        self.inner.say(
            f"a step takes {step_s:.2f} s: about {duration(all_s)} of training for "
            f"{self.others + 1} subjects, and the images on top of it"
        )


@dataclass
class _Listening:
    """A task that times the first steps after those in which a process settles."""

    task: Task
    tell: Callable[[float], None]
    _seen: int = 0
    _began_s: float = 0.0

    def advance(self, count: int = 1, **fields: str) -> None:
        """Hand on."""
        self.task.advance(count, **fields)
        self._seen += count
        if self._seen == SETTLING_STEPS:
            self._began_s = time.perf_counter()
        elif self._seen == SETTLING_STEPS + MEASURED_STEPS and self._began_s:
            self.tell((time.perf_counter() - self._began_s) / MEASURED_STEPS)
