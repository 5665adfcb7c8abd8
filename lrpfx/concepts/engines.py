"""Who does the parts of a scan: this process, several of this machine, or actors of Ray."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Mapping, Sequence
from multiprocessing import connection
from typing import Any, cast

import torch

from lrpfx.concepts.store import Store
from lrpfx.concepts.work import Tell, Work
from lrpfx.errors import InputError

#: What went wrong, where, and what to do.
_Problem = tuple[str, Sequence[str], str]


def in_processes(work: Work, store: Store, workers: int, tell: Tell) -> None:
    """Parts in processes of their own, which share the model as it is in memory."""
    _refuse_streams(work)
    if work.device.type != "cpu":
        raise InputError(
            f"workers={workers} share a model on the CPU, and this one is on {work.device}.",
            fix="start one process per device by torchrun, with workers=1.",
        )
    context, missing, parent = multiprocessing.get_context("fork"), store.missing, os.getpid()
    readers: list[Any] = []
    running = []
    for w in range(min(workers, len(missing))):
        reader, sender = context.Pipe(duplex=False)
        readers.append(reader)
        args = (work, store, missing[w::workers], sender, parent)
        running.append(context.Process(target=_worker, args=args))
        running[-1].start()
        sender.close()
    problems: list[_Problem] = []
    try:
        while readers:
            for ready in [*connection.wait(readers)]:
                try:
                    word = cast(Any, ready).recv()
                except EOFError:
                    readers.remove(ready)
                    continue
                if isinstance(word, int):
                    tell(word)
                else:
                    problems.append(word)
    except BaseException:
        for process in running:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGINT)  # it stores what it has done
        raise
    finally:
        for process in running:
            process.join()
    if lost := [process.exitcode for process in running if process.exitcode]:
        problems.append((f"a worker ended with code {lost[0]}.", (), "scan again: it goes on."))
    _raise_first(problems)


def _worker(work: Work, store: Store, parts: Sequence[int], sender: Any, parent: int) -> None:
    # What a library's threads hold in the parent is held for good in a copy of it.
    torch.set_num_threads(1)

    def tell(count: int) -> None:
        if os.getppid() != parent:  # it was killed, and another may have taken its place
            os._exit(1)
        sender.send(count)

    try:
        for part in parts:
            work.run(part, store, tell)
    except Exception as error:  # whatever it is, the process that waits has to know
        sender.send(_problem(error))
    except KeyboardInterrupt:
        pass
    os._exit(0)  # what the parent does at its end is not done here


def on_ray(work: Work, store: Store, workers: int, tell: Tell) -> None:
    """Parts by actors of Ray Data, each of which makes the Explainer anew.

    Raises:
        InputError: Ray is not installed, or a part failed.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError('engine="ray" needs Ray.', fix="pip install 'lrpfx[ray]'.") from error
    _refuse_streams(work)
    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            stack.callback(ray.shutdown)
        context = ray.data.DataContext.get_current()
        stack.callback(setattr, context, "enable_progress_bars", context.enable_progress_bars)
        context.enable_progress_bars = False
        # Were all CPUs reserved by actors, Ray Data had none left to read with, and would wait.
        share = min(1.0, max(ray.cluster_resources().get("CPU", 1) - 1, 0.5) / workers)
        missing = store.missing
        done = ray.data.from_items([{"part": part} for part in missing])
        done = done.repartition(len(missing)).map_batches(
            _Actor,
            fn_constructor_args=(ray.put(work), store.folder.resolve()),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(missing))),
            num_cpus=share,
        )
        problems: list[_Problem] = []
        for row in done.iter_rows():
            tell(int(row["count"]))
            if row["what"]:
                problems.append((row["what"], list(row["where"]), row["fix"]))
        _raise_first(problems)


class _Actor:
    """Does parts on Ray, and says how many samples that were, or what went wrong."""

    def __init__(self, work: Any, folder: Any) -> None:
        import ray

        torch.set_num_threads(1)
        self._work: Work = ray.get(work) if isinstance(work, ray.ObjectRef) else work
        # Refuses where the model is captured otherwise here, or another version is installed.
        self._store = Store(folder, self._work.facts(), ())

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        part, counts = int(batch["part"][0]), [0]
        problem: _Problem = "", (), ""
        try:
            self._work.run(part, self._store, counts.append)
        except Exception as error:  # likewise
            problem = _problem(error)
        what, where, fix = problem
        # As Arrow has no type for empty lists of nothing, there is always one word.
        return {"count": [sum(counts)], "what": [what], "where": [[*where, ""]], "fix": [fix]}


def _problem(error: Exception) -> _Problem:
    if isinstance(error, InputError):
        return error.what, error.where, error.fix
    return f"a worker failed: {type(error).__name__}: {error}", (), "scan again with workers=1."


def _raise_first(problems: Sequence[_Problem]) -> None:
    if problems:
        what, where, fix = problems[0]
        raise InputError(what, where=[place for place in where if place], fix=fix)


def _refuse_streams(work: Work) -> None:
    if not work.samples.numbered:
        raise InputError("an iterable data set is read by one process.", fix="scan with workers=1.")
