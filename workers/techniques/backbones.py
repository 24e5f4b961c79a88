"""How a technique that works on several backbones finds the half that its model's backbone needs: one mechanism for all.

A technique's own file holds what timm's ViTs need, and names the modules with what other families need; they lie beside it
(``tome.py``, ``tome_joint.py``) and are imported when such a model is there, since their models import transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from importlib import import_module
from typing import Any, TypeVar

from torch import nn

from workers.models import family_of
from workers.techniques.record import LossInputs

F = TypeVar("F", bound=Callable[..., Any])


def half(model: nn.Module, modules: Mapping[str, str]) -> Any:
    """Returns the module of ``modules`` (model family to dotted name) for this model.

    Raises:
        ValueError: there is none for its family.
    """
    family = family_of(model)
    if family not in modules:
        raise ValueError(f"a model of family {family}: must be one of {', '.join(modules)}")
    return import_module(modules[family])


def by_backbone(of_images: F, modules: Mapping[str, str]) -> F:
    """Returns ``of_images`` for timm's models; for others the function of that name, without its underscore, in their module.

    Args:
        of_images: takes the model, or the :class:`LossInputs` that hold it, first.
        modules: model family to the dotted name of the module with that family's half.
    """
    name = of_images.__name__.lstrip("_")

    @wraps(of_images)
    def chosen(subject: Any, *arguments: Any) -> Any:
        model = subject.model if isinstance(subject, LossInputs) else subject
        own = family_of(model) == "timm"
        function = of_images if own else getattr(half(model, modules), name)
        return function(subject, *arguments)

    return chosen  # type: ignore[return-value]
