"""Calculates what is known of recipes before they are trained, in a process of its own: one thread, the lowest priority.

It reads lines of JSON from stdin: first what to ask about, then a recipe each; it answers each on stdout. When stdin closes, because
its driver has ended or was killed, it ends at once.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from workers.trial import Context, Recipe


def main(request: Mapping[str, Any]) -> None:
    """Answers until stdin closes.

    Args:
        request: ``context`` and ``seeds`` of the study, ``storage`` that holds its stages; plain values.
    """
    os.nice(19)
    asked: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(asked,), name="driver", daemon=True).start()
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer

    import torch  # after the reader, which must see the driver's end while this takes its seconds

    from workers.node.storage import open_storage  # imports torch's users
    from workers.structure import Structures  # imports torch and timm

    torch.set_num_threads(1)
    structures = Structures(Context(**request["context"]), open_storage(request["storage"]))
    while True:
        recipe = Recipe.from_json(asked.get())
        answer: dict[str, Any] = {"recipe": recipe.hash}
        try:
            answer["facts"] = mean([structures.facts(recipe, seed) for seed in request["seeds"]])
        except Exception as error:  # noqa: BLE001 - one recipe that cannot be told must not cost the others
            answer["error"] = f"{type(error).__name__}: {error}"
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def mean(facts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns of each metric that is known under every seed the mean, which is what the search is told of a trial."""
    names = [name for name in facts[0] if all(name in found for found in facts)]
    return {name: sum(found[name] for found in facts) / len(facts) for name in names}


def _read(asked: queue.Queue[str]) -> None:
    for line in sys.stdin:
        asked.put(line)
    os._exit(0)  # in the middle of whatever is calculated: nobody waits for it


def start_code() -> str:
    """Returns the program of the process: the driver's import path comes first, then everything else."""
    return (
        "import json, sys; request = json.loads(sys.stdin.readline()); sys.path[:] = request['path']; "
        f"from {__name__} import main; main(request)"
    )
