"""The contract's checks of what a technique does to a model; each is asked on every variant of :mod:`workers.techniques.contract.models`."""

from __future__ import annotations

import json
import tempfile

import torch

from workers import artefact, models
from workers.techniques.contract.models import build, describe, without_values
from workers.techniques.contract.subject import Check, Subject, layout, require, require_same, require_same_tensors
from workers.techniques.foresight import NotForeseen, finish, foresee
from workers.techniques.record import Applied, make_config


def identity_changes_nothing(subject: Subject) -> None:
    """Identity settings reproduce the logits."""
    if subject.technique.identity is None:
        return
    model = subject.apply(subject.technique.identity).model
    expected = subject.logits(build(subject.variant))
    require_same(subject.logits(model), expected, "with identity settings the logits must stay", 1e-6)


def sample_changes_the_model(subject: Subject) -> None:
    """The sample changes what is computed, names what it changed, and keeps the output's shape and type."""
    applied = subject.apply()
    require(applied.changed, "Applied.changed must name the modules that the sample changed; it is empty")
    out, before = subject.logits(applied.model), subject.logits(build(subject.variant))
    require(out.shape == before.shape, f"logits must stay {tuple(before.shape)}, are {tuple(out.shape)}")
    require(out.dtype == torch.float32, f"logits must stay float32, are {out.dtype}")
    require(out.isfinite().all(), "logits must be finite; some are NaN or infinite")
    require(not torch.equal(out, before), "the sample must change the logits; they are as before")


def tensors_lie_row_by_row(subject: Subject) -> None:
    """What it leaves is contiguous: steps after it, and kernels, read memory as it lies."""
    odd = {n: t for n, t in subject.apply().model.state_dict().items() if not t.is_contiguous()}
    said = "; ".join(f"{name}: {layout(tensor)}" for name, tensor in odd.items())
    require(
        not odd, f"tensors must be contiguous, since kernels read memory as it lies (end with .contiguous()): {said}"
    )


def what_is_saved_comes_back(subject: Subject) -> None:
    """A saved artefact, loaded, has the same tensors and computes the same, bit by bit."""
    _require_reload(subject, subject.apply(), "")


def what_is_finished_comes_back(subject: Subject) -> None:
    """So does one that was finished after a training, which is what ships."""
    if subject.technique.finalise is None:
        return
    applied = subject.apply()
    more = subject.technique.finalise(applied.model, make_config(subject.technique.Config, subject.sample))
    applied.resolved = {**applied.resolved, **more}
    _require_reload(subject, applied, "finished by finalise, ")


def _require_reload(subject: Subject, applied: Applied, when: str) -> None:
    technique, model = subject.technique, applied.model.eval()
    try:
        again = json.loads(json.dumps(applied.resolved))
    except (TypeError, ValueError) as error:
        raise AssertionError(f"{when}resolved must be plain JSON values: {error}") from None
    require(again == applied.resolved, f"{when}resolved must come back from JSON as it is: {applied.resolved}")
    step = {"technique": technique.name, "version": technique.version, "resolved": applied.resolved}
    with tempfile.TemporaryDirectory() as folder:
        artefact.save(model, folder, model_description=describe(subject.variant), steps=[step])
        try:
            loaded = artefact.load(folder, techniques={technique.name: technique})
        except artefact.ArtefactError as error:
            raise AssertionError(f"{when}rebuild must make the structure that apply left: {error}") from error
    require_same_tensors(loaded.state_dict(), model.state_dict(), f"{when}saved and loaded")
    odd = [
        f"{name} (strides {old.stride()}, loaded {new.stride()})"
        for (name, old), new in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True)
        if old.stride() != new.stride()
    ]
    also = f"; tensors lie otherwise in memory: {', '.join(odd)}" if odd else ""
    require_same(subject.logits(loaded), subject.logits(model), f"{when}saved and loaded, the logits{also}")


def what_is_foreseen_happens(subject: Subject) -> None:
    """What it resolves of a model without values, training included, is what it resolves of one with values."""
    technique, config = subject.technique, make_config(subject.technique.Config, subject.sample)
    try:
        told = foresee(technique, build(subject.variant, device="meta"), config, without_values(subject.variant))
        (foreseen,) = finish(told[0], [(technique, config)], [told[1]])
    except NotForeseen:
        return  # weights, images or the training decide, which is nobody's fault
    applied = subject.apply()
    more = {} if technique.finalise is None else technique.finalise(applied.model, config)
    found = {**applied.resolved, **more}
    require(foreseen == found, f"foresee says {foreseen}, apply resolves {found}")


def check_gives_a_reason_or_none(subject: Subject) -> None:
    """``check`` judges defaults and the sample on both kinds of devices, and has nothing against the sample on the CPU."""
    technique = subject.technique
    for device in ("cpu", "cuda"):
        info = models.model_info(build(subject.variant), device)
        for values in ({}, subject.sample):
            reason = technique.check(info, make_config(technique.Config, values))
            require(reason is None or (isinstance(reason, str) and reason), f"check must say why, or None: {reason!r}")
    reason = technique.check(
        models.model_info(build(subject.variant), "cpu"), make_config(technique.Config, subject.sample)
    )
    require(reason is None, f"check must have nothing against the sample on this variant: {reason}")


FACTS = ("depth", "num_tokens", "num_classes", "image_size", "num_text_tokens", "reduces_tokens", "tower_depth")
SIZES = ("embed_dim", "head_dim", "num_heads", "mlp_hidden")


def facts_are_those_of_the_model(subject: Subject) -> None:
    """``info_after`` tells what the changed model is, since later steps are checked against it."""
    config = make_config(subject.technique.Config, subject.sample)
    told = subject.technique.info_after(models.model_info(build(subject.variant), "cpu"), config)
    found = models.model_info(subject.apply().model, "cpu")
    for name in (*FACTS, *(() if subject.sizes_from_data else SIZES)):
        said, true = getattr(told, name), getattr(found, name)
        require(said == true, f"info_after says {name} {said}, the model has {true}")


ON_EVERY_VARIANT: tuple[Check, ...] = (
    identity_changes_nothing,
    sample_changes_the_model,
    tensors_lie_row_by_row,
    what_is_saved_comes_back,
    what_is_finished_comes_back,
    what_is_foreseen_happens,
    check_gives_a_reason_or_none,
    facts_are_those_of_the_model,
)
