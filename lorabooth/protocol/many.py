"""The protocol over many subjects: each is trained, drawn and measured; one table.

A subject that is done is not touched again, one that was begun goes on where it was, one that failed is kept
with its reason, tried again by the next command, and keeps no other from its turn.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from lorabooth import api, durable
from lorabooth.errors import (
    BaseModelError,
    DataError,
    InterruptedRunError,
    LoraboothError,
    OutOfMemoryError,
    first_line,
    is_out_of_memory,
)
from lorabooth.evaluation.backbones import open_backbones
from lorabooth.progress import Reporter, Silent
from lorabooth.protocol.contact_sheet import write_sheet
from lorabooth.protocol.cost import Cost, Estimating, count
from lorabooth.protocol.jobs import Asked, Job, read_job, write_job
from lorabooth.protocol.run import evaluate
from lorabooth.protocol.standing import Standing
from lorabooth.protocol.subjects import photos_digest
from lorabooth.protocol.summary import ProtocolResult, gather
from lorabooth.protocol.summary import write as write_table
from lorabooth.protocol.workers import Position, start_workers, taken, wait

ALONE = Position(0, 1)
AGAIN = "The same command goes on from here."
_FOLDERS = re.compile(r"(?<![\w.~:/])(?:[A-Za-z]:)?(?:[\\/][^\\/\s'\":]+)*[\\/](?=[^\\/\s'\":])")
"""The folders of an absolute path."""


def run_protocol(
    job: Job,
    *,
    processes: int = 1,
    position: Position = ALONE,
    reporter: Reporter | None = None,
) -> ProtocolResult:
    """Train, draw and measure all subjects that are not done yet, and write the table.

    Args:
        job: see `make_job`.
        processes: workers on this machine that share the subjects; 1 works in this process.
        position: of this process, where a launcher has started several of it: they share the subjects, and
            the first one writes the table.
        reporter: hears of cost and progress.

    Returns:
        The table; subjects that failed are in it with their reasons.

    Raises:
        RecipeError, BaseModelError: nothing can be trained or measured this way.
        InterruptedRunError: Ctrl-C; what was done is kept.
    """
    say = reporter or Silent()
    since_s = time.time()
    is_main = position.index == 0
    if is_main:
        pending = [one for one in job.todo if not Standing(job, since_s).is_settled(one)]
        # Whether it can be done at all comes first: what cannot leaves the folder free.
        say.say(estimate(job, say).text())
        write_job(job)
        processes = max(1, min(processes, len(pending)))
    try:
        if processes > 1:
            _say_shared(say, processes)
            words = ["evaluate", "protocol-worker", str(job.out), "--since", repr(since_s)]
            words += ["--number", "{worker}", "--workers", str(processes)]
            words += [word for name in job.wanted for word in ("--only", name)]
            with _interruptible():
                codes = start_workers(words, processes)
            _require_settled(job, since_s, codes)
        else:
            work(job, since_s=since_s, position=position, reporter=say)
    finally:
        if is_main:
            write_table(table(job))
    result = table(job)
    if is_main:
        write_sheet(result)
    return result


def estimate(job: Job, reporter: Reporter) -> Cost:
    """What is still to do; on the way, whether it can be done at all. Nothing is written.

    Raises:
        RecipeError: the recipe cannot be trained.
        BaseModelError: the base is absent or broken, or nothing can be measured.
    """
    standing = Standing(job, time.time())
    pending = [one for one in job.todo if not standing.is_settled(one)]
    steps = 0
    for one in pending:
        recipe = job.recipe_for(one.subject)
        try:
            # Not the subject's own folder: what may be wrong with that is told when its turn comes.
            plan = api.train(recipe, out=job.state / "none", dry_run=True)
        except DataError:
            continue  # likewise
        steps = int(plan.recipe.optim.steps)
        break
    if pending:
        own = job.recipe.evaluation
        found = open_backbones(
            own.dino, own.clip, own.lpips, base=job.recipe.model.base, reporter=reporter, strict=True
        )
        if not found.metrics():
            raise BaseModelError(
                "\n".join(["nothing can be measured: no backbone is there.", *map(str, found.notes)]),
                "Give --dino FOLDER or --clip FOLDER, or download them where the hub can be reached.",
            )
        for note in found.notes:
            reporter.warn(note)
    return count(job, pending, steps)


def require_all(result: ProtocolResult) -> None:
    """Whether no subject failed.

    Raises:
        LoraboothError: some have; with the exit code of the first one's error.
    """
    if failed := result.failed:
        lines = [f"{len(failed)} of {len(result.subjects)} subjects failed:"]
        lines += [
            f"  {one.name}: {one.reason.splitlines()[0] if one.reason else 'unknown'}" for one in failed
        ]
        error = LoraboothError(
            "\n".join(lines), "The same command tries them again; the others are done and stay as they are."
        )
        error.exit_code = failed[0].exit_code
        raise error


def table(job: Job) -> ProtocolResult:
    """The table of what is on the disk now, of all subjects that the folder is about."""
    standing = Standing(job, 0.0)
    return gather(job, [standing.result(one) for one in job.asked])


def worker(
    out: Path, *, only: tuple[str, ...], since_s: float, position: Position, reporter: Reporter
) -> None:
    """One of several processes at the protocol of a folder.

    Args:
        out: folder of the protocol.
        only: names of the subjects to share; what is done is left.
        since_s: when the command began; what failed before may be tried again.
        position: of this worker.
        reporter: hears of progress.
    """
    job = read_job(out)
    if job is None:
        raise DataError(f"{out} holds no protocol")
    wanted = tuple(name for name in job.wanted if name in only)
    shared = Job(job.out, job.recipe, job.asked, wanted, job.settings)
    work(shared, since_s=since_s, position=position, reporter=reporter)


def work(job: Job, *, since_s: float, position: Position, reporter: Reporter) -> None:
    """Take free subjects until all are done or have failed.

    Raises:
        InterruptedRunError: Ctrl-C; what was done is kept.
        BaseModelError: no subject can be trained.
    """
    standing = Standing(job, since_s)
    told = Estimating(reporter, position.count if position.count > 1 else 1)
    while pending := [one for one in job.todo if not standing.is_settled(one)]:
        if not any(_turn(standing, one, told, position) for one in pending):
            with _interruptible():
                wait()
        elif position.index == 0:
            write_table(table(job))


def _turn(standing: Standing, asked: Asked, told: Estimating, position: Position) -> bool:
    """Do one subject, if nobody else is at it; whether it was done."""
    job, name = standing.job, asked.subject.name
    with contextlib.ExitStack() as held:
        with durable.user_errors(job.state):
            durable.make_folder(job.state / "locks")
            mine = held.enter_context(taken(job.state / "locks" / f"{name}.lock"))
        if not mine or standing.is_settled(asked):
            return False
        told.others = sum(not standing.is_settled(one) for one in job.todo) - 1
        done = len(job.todo) - told.others
        told.prefix = f"[{name}] " if position.count > 1 else ""
        told.inner.say(f"--- {name}: a {asked.subject.noun}; {done} of {len(job.todo)} ---")
        is_new = not job.run_folder(asked.subject).exists()
        began_s = time.perf_counter()
        try:
            with _interruptible():
                digest = _learn(job, asked, told)
                standing.end(asked, {"status": "done", "photos": digest, "worker": position.index})
        except (BaseModelError, InterruptedRunError):
            raise  # no other subject would fare better
        except LoraboothError as error:
            _failed(standing, asked, error, told)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            _failed(standing, asked, OutOfMemoryError(f"memory ran out: {first_line(error)}"), told)
        else:
            if is_new:
                told.subject_done(time.perf_counter() - began_s)
    return True


def _learn(job: Job, asked: Asked, reporter: Reporter) -> str:
    """Train, draw and measure one subject; returns the digest of its photos."""
    settings, subject = job.settings, asked.subject
    digest = photos_digest(subject.photos)
    out = job.run_folder(subject)
    api.train(job.recipe_for(subject), out=out, reporter=reporter)
    _free_memory()
    evaluate(
        out,
        prompts=job.prompts_for(asked),
        images_per_prompt=settings.images_per_prompt,
        class_images=settings.class_images,
        unrelated_images=settings.unrelated_images,
        device=settings.device,
        # Subjects of one class share the base's images; all share what is unrelated to any.
        base_images=job.state / "base",
        reporter=reporter,
    )
    _free_memory()
    return digest


def _failed(standing: Standing, asked: Asked, error: LoraboothError, reporter: Reporter) -> None:
    """Tell and keep it; the reason that is kept names what lies elsewhere by its last name alone."""
    reporter.warn(f"{asked.subject.name} failed: {error}")
    reason = str(error)
    for place in (asked.subject.photos.absolute().parent, standing.job.out.absolute(), standing.job.out):
        reason = reason.replace(f"{place}{os.sep}", "")
    reason = _FOLDERS.sub("", reason)
    standing.end(asked, {"status": "failed", "reason": reason, "exit_code": error.exit_code})


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError("interrupted; what is done is kept.", AGAIN) from None
    except InterruptedRunError as error:
        # The message of a part would send the user to that part's own command.
        raise InterruptedRunError(error.what, AGAIN) from None


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def _require_settled(job: Job, since_s: float, codes: Sequence[int]) -> None:
    """Whether the workers left nothing undone: what one that was killed had begun, another has finished.

    Raises:
        LoraboothError: they did; with a worker's exit code.
    """
    standing = Standing(job, since_s)
    if all(standing.is_settled(one) for one in job.todo):
        return
    code = next((code for code in codes if code), 1)
    if code == 130:
        raise InterruptedRunError("a worker was interrupted; what is done is kept.", AGAIN)
    why = f"was ended by signal {-code}, perhaps for lack of memory" if code < 0 else "stopped; it said why"
    error = LoraboothError(f"a worker {why}; what is done is kept.", AGAIN)
    error.exit_code = code if code > 0 else OutOfMemoryError.exit_code if code == -9 else 1
    raise error


def _say_shared(reporter: Reporter, processes: int) -> None:
    gpus = torch.cuda.device_count()
    where = f"{gpus} GPUs" if gpus > 1 else "one GPU" if gpus else "the CPU"
    reporter.say(f"{processes} processes share the subjects, on {where}")
