"""Evaluation, training and a whole trial of vision-language tasks, on the embedded ones."""

from __future__ import annotations

import hashlib
import weakref
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from workers import artefact, evaluation, models, tasks
from workers.evaluation import NotFiniteOutput, evaluate, predict_logits
from workers.measuring.protocols import PROTOCOLS
from workers.metrics import ACCURACIES, METRICS
from workers.run import run_report, run_trial
from workers.tasks.answers import vqa_accuracy
from workers.tasks.examples import Examples
from workers.training.loop import task_loss, train
from workers.trial import Context, Recipe, Step, TrialResult, TrialSpec

KINDS = {"vqa": "digit_vqa", "entailment": "digit_entailment", "nlvr2": "digit_nlvr", "retrieval": "digit_retrieval"}
SETTINGS: dict[str, Any] = {
    "epochs": 1,
    "batch_size": 32,
    "lr": 1e-3,
    "weight_decay": 0.05,
    "warmup_fraction": 0.1,
    "optimizer": "adamw",
    "schedule": "one_cycle",
}
DATA = {"train_limit": 32, "search_limit": 16, "report_limit": 8}


def data(task: str) -> dict[str, Any]:
    return {"kind": KINDS[task], **DATA}


def accuracies_of(task: str) -> list[str]:
    return [name for name in ACCURACIES if task in METRICS[name].tasks]


def model_section(family: str) -> dict[str, Any]:
    return {"family": family, "name": f"{family}_tiny", "train": True, "create": {}}


@pytest.mark.parametrize("family", ["vilt", "meter"])
@pytest.mark.parametrize("task", KINDS)
def test_each_family_trains_and_is_evaluated_on_each_task(task: str, family: str) -> None:
    loaded = tasks.load(data(task))
    torch.manual_seed(0)
    model = models.build(model_section(family), loaded.info)
    report = train(model, loaded.train, SETTINGS, seed=0, device="cpu", validation=loaded.search)
    assert report.steps == -(-len(loaded.train) // 32)
    found = evaluate(model, loaded.search, device="cpu", batch_size=16)
    assert [a.metric for a in found.accuracies] == accuracies_of(task)
    assert all(0 <= a.low_pct <= a.pct <= a.high_pct <= 100 for a in found.accuracies)
    assert found == evaluate(model, loaded.search, device="cpu", batch_size=16)


def test_vqa_accuracy_is_the_mean_score_of_the_chosen_answers() -> None:
    search = cast(Examples, tasks.load(data("vqa")).search)
    torch.manual_seed(0)
    model = models.build(model_section("vilt"), tasks.info(data("vqa"))).eval()
    (found,) = evaluate(model, search, device="cpu").accuracies
    _, inputs, scores = next(search.batches(len(search)))
    with torch.inference_mode():
        chosen = scores[torch.arange(len(search)), model(inputs).argmax(dim=1)]
    assert found.pct == pytest.approx(100 * float(chosen.mean()), abs=1e-4)
    assert [{0: 0, 1: 30, 2: 60, 3: 90, 4: 100}[int(d)] for d in found.levels] == (100 * chosen).round().int().tolist()


class Answering(torch.nn.Module):
    """Gives the rows of a table in turn, and notes how many of its outputs are still held when it is asked for the next."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.rows, self.given, self.held = rows, 0, 0
        self.outputs: list[weakref.ref[torch.Tensor]] = []

    def forward(self, inputs: Any) -> torch.Tensor:
        self.held = max(self.held, sum(output() is not None for output in self.outputs))
        found = self.rows[self.given : self.given + len(inputs)].clone()
        self.given += len(inputs)
        self.outputs.append(weakref.ref(found))
        return found


def test_logits_of_one_batch_are_held_and_name_the_whole_output() -> None:
    search = cast(Examples, tasks.load(data("vqa")).search)
    assert search.answers is not None
    rows = torch.randn(search.answers.shape, generator=torch.Generator().manual_seed(0))
    model = Answering(rows)
    found = evaluate(model, search, device="cpu", batch_size=3)
    assert model.held <= 1  # that of the batch before
    assert found.logits_digest == hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:16]
    assert found.accuracies[0].pct == pytest.approx(100 * vqa_accuracy(rows.numpy(), search.answers))
    model = Answering(rows)
    assert torch.equal(predict_logits(model, search, device="cpu", batch_size=3), rows)
    assert model.held <= 1
    rows[[4, 9], 0] = torch.tensor([float("nan"), float("inf")])
    with pytest.raises(NotFiniteOutput, match=f"those of 2 of {len(rows)} examples are not, first of example 4"):
        evaluate(Answering(rows), search, device="cpu", batch_size=3)


def test_retrieval_scores_every_text_with_every_image() -> None:
    loaded = tasks.load(data("retrieval"))
    search = cast(Examples, loaded.search)
    torch.manual_seed(0)
    model = models.build(model_section("vilt"), loaded.info).eval()
    text, image = evaluate(model, search, device="cpu", batch_size=32).accuracies
    owner = cast(np.ndarray[Any, np.dtype[np.int64]], search.picture_of_text)
    pictures = {int(p): i for i, p in reversed(list(enumerate(search.pictures[:, 0])))}  # an example that shows it
    _, inputs, _ = next(search.batches(len(search)))
    pixels = inputs["pixel_values"]
    ids, mask = torch.from_numpy(search.texts), torch.from_numpy(search.text_mask)
    scores = np.zeros((len(search.images), len(ids)))
    with torch.inference_mode():
        for row in range(len(search.images)):
            batch = {
                "pixel_values": pixels[pictures[row]].expand(len(ids), -1, -1, -1),
                "input_ids": ids,
                "attention_mask": mask,
            }
            scores[row] = model(batch)[:, 0]
    best_text = owner[scores.argmax(axis=1)] == np.arange(len(scores))
    best_image = scores.argmax(axis=0) == owner
    assert (text.correct, text.total) == (best_text.sum(), len(search.images))
    assert (image.correct, image.total) == (best_image.sum(), len(ids))


@pytest.mark.parametrize("padded", [False, True])
def test_a_text_is_encoded_once_a_pass_with_the_same_scores(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tasks.load({**data("retrieval"), "search_limit": 4, **({"max_text_tokens": 16} if padded else {})})
    search = cast(Examples, loaded.search)
    assert search.padded == padded
    torch.manual_seed(0)
    model = cast(Any, models.build(model_section("meter"), loaded.info)).eval()
    calls: list[int] = []
    model.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    once = evaluate(model, search, device="cpu", batch_size=5)
    assert len(search.texts) == 12
    assert len(calls) == 3  # 5, 5 and 2 texts, for the first of four pictures
    monkeypatch.setattr(evaluation, "TEXT_BYTES", 1)
    room_for_five = evaluate(model, search, device="cpu", batch_size=5)
    assert len(calls) == 3 + 1 + 4 * 2
    monkeypatch.setattr(evaluation, "TEXT_BYTES", 0)
    again = evaluate(model, search, device="cpu", batch_size=5)
    assert len(calls) == 12 + 4 * 3
    assert once == room_for_five == again  # the digest of the scores too


def test_losses_of_the_tasks() -> None:
    logits, shares = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 0.3]])
    expected = -(torch.tensor(2.0).sigmoid().log() + 0.3 * torch.tensor(-1.0).sigmoid().log())
    expected = expected - 0.7 * torch.tensor(1.0).sigmoid().log()
    assert task_loss("vqa", logits, shares) == pytest.approx(float(expected), rel=1e-6)
    assert task_loss("retrieval", logits, torch.tensor([0])) == pytest.approx(
        float(torch.log1p(torch.tensor(-3.0).exp())), rel=1e-6
    )


def test_what_changes_images_is_refused_for_texts_that_speak_of_them() -> None:
    loaded = tasks.load(data("vqa"))
    with pytest.raises(ValueError, match="vqa cannot have them"):
        train(torch.nn.Identity(), loaded.train, {**SETTINGS, "augment": "flip_crop"}, seed=0, device="cpu")


def trial(storage: Path, task: str, family: str, *steps: Step) -> TrialResult:
    return run_trial(spec(storage, task, family, *steps))


def spec(storage: Path, task: str, family: str, *steps: Step) -> TrialSpec:
    quick = {k: v for k, v in PROTOCOLS["quick"].items() if k != "remeasure"}
    measurement = {**quick, "protocol": "quick", "threads": 1, "bootstrap": 100, "compile": False}
    measurement |= {"window_s": 0.0, "latency_pairs": 3, "throughput_pairs": 3, "batch_max": 32, "noise_runs": 1}
    context = Context(
        model=model_section(family),
        data={**data(task), "digest": tasks.data_digest(data(task))},
        training={"baseline": SETTINGS, "recovery": SETTINGS},
        measurement=measurement,
        device="cpu",
    )
    return TrialSpec(
        study="vl",
        trial_id="t" + str(len(steps)),
        recipe=Recipe(tuple(steps)),
        seed=0,
        context=context,
        storage=str(storage),
        objectives=(*accuracies_of(task), "size_bytes", "macs", "latency_ms_p50"),
    )


@pytest.mark.parametrize(("task", "family"), [("retrieval", "vilt"), ("nlvr2", "meter")])
def test_a_trial_runs_from_training_to_the_report_split(tmp_path: Path, task: str, family: str) -> None:
    done = trial(tmp_path, task, family)
    assert done.status == "ok", done.failure
    from workers.techniques.quantisation import weight_only
    from workers.techniques.record import defaults
    from workers.techniques.tokens import pumer

    steps = (
        Step("pumer", {**defaults(pumer.Config), "layers": "2"}),
        Step("weight_only", {**defaults(weight_only.Config), "bits": 8}),
    )
    reduced = trial(tmp_path, task, family, *steps)
    assert reduced.status == "ok", reduced.failure
    assert reduced.metrics["macs"] < done.metrics["macs"]
    assert reduced.metrics["size_bytes"] < 0.6 * done.metrics["size_bytes"]
    metrics = accuracies_of(task)
    assert [r.conditions["metric"] for r in reduced.measurements if r.kind == "accuracy_search"] == metrics
    reported = run_report(spec(tmp_path, task, family, *steps))
    assert [r.conditions["metric"] for r in reported] == metrics
    kept = artefact.manifest(tmp_path / str(reduced.artefact))["extra"]["preprocessing"]
    assert kept["task"] == task
    assert "[CLS]" in str(kept["text"])
