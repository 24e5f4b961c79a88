"""What is known of a recipe before it is trained, asked for in the background and kept in the study's folder.

Size, weights and multiply-accumulates follow from a recipe's structure (:mod:`workers.structure`). They are calculated in a process
beside the driver (facts_process.py), so that asking costs the search nothing; what is not calculated yet is merely not known. Whatever
goes wrong there is logged, and costs the study what it would have known.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Self

from orchestrator.sweep.facts_process import start_code
from orchestrator.sweep.marked import MARK
from workers.metrics import EXACT
from workers.node.storage import Storage
from workers.techniques import registry, versions
from workers.trial import Context, Recipe, digest

AT_ONCE = 4
"""Recipes that the process is given before it has answered: enough that it never waits."""

MOST_WANTED = 2000
"""Recipes that wait for an answer; older ones are forgotten, whoever still wants them asks again."""

KEEP_EVERY = 50
"""Answers that are written into one file."""

END_S = 5.0

log = logging.getLogger("vitpareto")


class BackgroundFacts:
    """Facts of the recipes of a study. Close it, or use it as a context manager: it holds a process once it was asked.

    Args:
        context, seeds: of the study's trials; with several seeds facts are means over them, as the search is told.
        storage: of the study; stages that are there tell what was learned.
        study: its name; answers are kept in its folder.
    """

    names = frozenset(EXACT)

    def __init__(self, context: Context, seeds: Sequence[int], storage: Storage, study: str) -> None:
        self.context, self.seeds, self.storage = context, tuple(seeds), storage
        self._folder = f"{study}/facts"
        self._key = digest([context.digest, list(seeds), versions()])
        self._lock = threading.RLock()
        self._known: dict[str, Mapping[str, float]] = self._read_kept()
        self._new: dict[str, Mapping[str, float]] = {}
        self._partly: dict[str, Recipe] = {}
        self._wanted: OrderedDict[str, Recipe] = OrderedDict()
        self._given: dict[str, Recipe] = {}
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- what a search asks -------------------------------------------------------------------------------------------

    def of(self, recipe: Recipe) -> Mapping[str, float] | None:
        """See :class:`orchestrator.sampling.recipe_sampler.Facts`."""
        return self._known.get(recipe.hash)

    def ask_for(self, recipes: Sequence[Recipe]) -> None:
        """See :class:`orchestrator.sampling.recipe_sampler.Facts`. What was asked for last comes first: it is what the search thinks of now."""
        with self._lock:
            if self._closed:
                return
            for recipe in reversed(recipes):
                name = recipe.hash
                if name not in self._known and name not in self._given:
                    self._wanted[name] = recipe
                    self._wanted.move_to_end(name, last=False)
            while len(self._wanted) > MOST_WANTED:
                self._wanted.popitem()
            self._give()

    def learnt(self, recipe: Recipe) -> None:
        """Takes that a recipe was trained: what its surgery has learned tells of all recipes with that surgery, as the baseline's
        weights tell of more than that. They may be asked for again.
        """
        cut = _surgery(recipe)
        with self._lock:
            again = [name for name, other in self._partly.items() if not recipe.steps or _surgery(other) == cut]
            for name in again:
                del self._partly[name], self._known[name]

    def close(self) -> None:
        """Ends the process and keeps what it has found."""
        with self._lock:
            self._closed = True
            self._wanted.clear()
            process, reader = self._process, self._reader
        if process is not None:
            with suppress(OSError):
                assert process.stdin is not None
                process.stdin.close()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if reader is not None:
            reader.join(END_S)
        with self._lock:
            self._keep()

    # --- the process --------------------------------------------------------------------------------------------------

    def _give(self) -> None:
        """Hands the next recipes over, and starts the process for the first one."""
        while self._wanted and len(self._given) < AT_ONCE:
            name, recipe = self._wanted.popitem(last=False)
            try:
                self._tell(recipe.to_json())
            except OSError as error:
                self._stop(f"{type(error).__name__}: {error}")
                return
            self._given[name] = recipe

    def _tell(self, line: str) -> None:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", start_code()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={
                    name: value for name, value in os.environ.items() if name != MARK
                },  # it outlives a Ray that is ended
                process_group=0,  # a terminal's Ctrl-C is the driver's, which closes stdin; of its session, within which nice counts
            )
            request = {
                "path": sys.path,
                "context": asdict(self.context),
                "seeds": self.seeds,
                "storage": self.storage.url,
            }
            self._write(json.dumps(request))
            self._reader = threading.Thread(target=self._listen, args=(self._process,), name="facts", daemon=True)
            self._reader.start()
        self._write(line)

    def _write(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        """Takes answers until the process ends."""
        assert process.stdout is not None
        try:
            with process.stdout as answers:
                for line in answers:
                    answer = json.loads(line)
                    with self._lock:
                        self._take(answer["recipe"], answer.get("facts"), answer.get("error"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.debug("facts: %s: %s", type(error).__name__, error)
        with self._lock:
            if not self._closed:
                self._stop("the process that calculates it has ended")

    def _take(self, name: str, facts: Mapping[str, float] | None, error: str | None) -> None:
        recipe = self._given.pop(name)
        if facts is None:
            log.debug("facts of %s: %s", recipe.label(), error)
        self._known[name] = facts or {}
        if self.names <= self._known[name].keys():
            self._new[name] = self._known[name]
        else:
            self._partly[name] = recipe
        if len(self._new) >= KEEP_EVERY:
            self._keep()
        if not self._closed:
            self._give()

    def _stop(self, reason: str) -> None:
        log.warning(
            "nothing more is known of recipes before they are trained: %s; the study goes on without it", reason
        )
        self._closed = True
        self._wanted.clear()
        self._given.clear()

    # --- what is kept -------------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """Writes what is new into a file of its own: nothing is ever rewritten."""
        if not self._new:
            return
        name = f"{self._folder}/{self._key}-{digest(sorted(self._new))}.json"
        try:
            self.storage.put_atomic(name, json.dumps(self._new).encode())
        except OSError as error:  # calculated again by whoever needs it
            log.debug("facts are not kept: %s", error)
        self._new = {}

    def _read_kept(self) -> dict[str, Mapping[str, float]]:
        found: dict[str, Mapping[str, float]] = {}
        try:
            names = [name for name in self.storage.files(self._folder) if name.startswith(f"{self._key}-")]
            for name in names:
                with suppress(ValueError):  # a damaged one is calculated again
                    found |= _whole(json.loads(self.storage.read(f"{self._folder}/{name}")))
        except OSError as error:
            log.debug("facts kept earlier are not read: %s", error)
        return found


def _whole(kept: object) -> dict[str, Mapping[str, float]]:
    """Returns the facts of a file that have the form in which they were written."""
    pairs: Iterable[tuple[object, object]] = kept.items() if isinstance(kept, dict) else ()
    return {
        str(name): {key: float(facts[key]) for key in EXACT}
        for name, facts in pairs
        if isinstance(facts, dict) and all(isinstance(facts.get(key), int | float) for key in EXACT)
    }


def _surgery(recipe: Recipe) -> Recipe:
    known = registry()
    return Recipe(tuple(step for step in recipe.steps if known[step.technique].stage == "surgery"))
