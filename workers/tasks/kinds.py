"""The kinds of data: a record each, from which the study's schema, its faults and the loaders derive. Standard library only.

What a kind is for is its task, a key of ``workers.models.vision_language.TASKS`` or :data:`IMAGES`; what a task asks of
model, accuracies and training is the task's matter, and stands with those.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from workers.tasks.task_info import IMAGES, TaskError

PathRule = Literal["needed", "named", "fetched", "forbidden", "unused"]
"""``data.path`` must say where the data lies; or that, or ``owner/name`` of the Hugging Face hub; or where it is downloaded to if
it does not lie there; or must be left out; or may be given and is not read."""


HUB_NAME = re.compile(r"(?!\.)([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
"""Owner and name of a data set of the Hugging Face hub, and a revision where one is meant."""


@dataclass(frozen=True)
class DataKind:
    """One value of ``data.kind``.

    Attributes:
        name: the value.
        task: what the data is for; decides which models see it and which accuracies are measured.
        opener: ``module:function``, imported when data is opened. The function gets the data section, its path given
            where the rule asks for one, and returns a ``workers.tasks.pictures.Source`` of images, or of images with
            texts a ``workers.tasks.corpus.Corpus``. It raises ``workers.tasks.TaskError`` for what is missing or broken.
        path: what the section says of the place.
        path_remedy: what to do, for who broke that rule.
        white: the largest value of a pixel, in the units of ``data.mean`` and ``data.std``.
        randaugment: whether RandAugment can work on the images, which it does on 8-bit pictures, where the task allows it.
    """

    name: str
    task: str
    opener: str
    path: PathRule
    path_remedy: str = "name the folder or file with the images"
    randaugment: bool = True
    white: float = 1.0

    @property
    def needs_path(self) -> bool:
        """Whether a study must say where the data lies."""
        return self.path in ("needed", "named", "fetched")

    def is_name(self, path: object) -> bool:
        """Returns whether a path that is none here may be the name of a data set of the hub."""
        return self.path == "named" and isinstance(path, str) and HUB_NAME.fullmatch(path) is not None

    def open(self, data: Mapping[str, Any]) -> Any:
        """Opens the data of a section of this kind; see :attr:`opener`."""
        module, _, function = self.opener.partition(":")
        return getattr(import_module(module), function)(data)


_SHIPPED = "the digits come with scikit-learn"

KINDS: Mapping[str, DataKind] = {
    kind.name: kind
    for kind in (
        DataKind(
            "digits", IMAGES, "workers.tasks.image_sources:open_digits", "unused", _SHIPPED, randaugment=False, white=16
        ),
        DataKind("cifar10", IMAGES, "workers.tasks.image_sources:open_cifar10", "fetched"),
        DataKind("cifar100", IMAGES, "workers.tasks.image_sources:open_cifar100", "fetched"),
        DataKind("imagefolder", IMAGES, "workers.tasks.image_folder:open_folder", "needed"),
        DataKind("parquet", IMAGES, "workers.tasks.image_tables:open_parquet", "needed"),
        DataKind("huggingface", IMAGES, "workers.tasks.hugging_face:open_dataset", "named"),
        DataKind("digit_vqa", "vqa", "workers.tasks.digit_tasks:open_vqa", "forbidden", _SHIPPED),
        DataKind("digit_entailment", "entailment", "workers.tasks.digit_tasks:open_entailment", "forbidden", _SHIPPED),
        DataKind("digit_nlvr", "nlvr2", "workers.tasks.digit_tasks:open_nlvr", "forbidden", _SHIPPED),
        DataKind("digit_retrieval", "retrieval", "workers.tasks.digit_tasks:open_retrieval", "forbidden", _SHIPPED),
        DataKind("vqa", "vqa", "workers.tasks.published_layouts:open_vqa", "needed"),
        DataKind("entailment", "entailment", "workers.tasks.published_layouts:open_snli_ve", "needed"),
        DataKind("nlvr2", "nlvr2", "workers.tasks.published_layouts:open_nlvr", "needed"),
        DataKind("nlvr1", "nlvr1", "workers.tasks.published_layouts:open_nlvr", "needed"),
        DataKind("retrieval", "retrieval", "workers.tasks.published_layouts:open_captions", "needed"),
    )
}
"""Value of ``data.kind`` to its record, in the order in which messages list them."""

TEXT_DEFAULTS: Mapping[str, Any] = {
    "max_text_tokens": None,
    "truncation": False,
    "tokenizer": None,
    "answers": 3129,
    "candidates": 4,
}
"""Keys that the data sections of vision-language tasks have besides; 3,129 answers is what models of VQAv2 have.

``answers`` may also be the path of a file of answers, or ``{path, digest}``; see :mod:`workers.tasks.answers`.
"""


def kind_of(data: Mapping[str, Any]) -> DataKind:
    """Returns the kind of a data section.

    Raises:
        TaskError: there is none of that name.
    """
    if data["kind"] not in KINDS:
        raise TaskError(f"data.kind must be one of {', '.join(KINDS)}, got {data['kind']!r}")
    return KINDS[data["kind"]]
