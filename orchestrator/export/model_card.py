"""The model card of an exported trial: what it is, its numbers with their conditions, where it comes from, how to load it.

The form is that of Hugging Face: Markdown after a YAML header that holds only what is known. A pure function of plain values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orchestrator.export.loading_code import usage
from orchestrator.ledger.schema import metric_of
from orchestrator.words.rows import human
from orchestrator.words.units import format_value
from workers.metrics import ACCURACIES, DEVICE_BOUND, INTERVALS, METRICS, SPEEDS
from workers.trial import without_locations

IMAGES = "image_classification"

_MEASURED = frozenset(METRICS[name].record for name in DEVICE_BOUND)
"""Kinds of records of speed and memory."""

_DOES: Mapping[str, str] = {
    IMAGES: "A vision transformer that sorts",
    "vqa": "A vision-language model that answers questions about",
    "entailment": "A vision-language model that sorts sentences with",
    "nlvr2": "A vision-language model that sorts statements with pairs of",
    "nlvr1": "A vision-language model that sorts statements with",
    "retrieval": "A vision-language model that scores texts against",
}
"""Task to the beginning of what the model does to images."""

_PIPELINES = {IMAGES: "image-classification", "vqa": "visual-question-answering"}
"""Task to its name at Hugging Face, where it has one."""

_FORMATS = {
    "artefact": "its artefact: `model.safetensors` and `manifest.json`",
    "torch-export": "a program of `torch.export`: `model.pt2`",
    "onnx": "ONNX: `model.onnx`",
}


def model_card(
    row: Mapping[str, Any],
    export: Mapping[str, Any],
    measurements: Sequence[Mapping[str, Any]],
    baseline: Mapping[str, Any],
) -> str:
    """Returns the card as Markdown.

    Args:
        row: the accepted attempt of the trial as a row of ``trials``, its JSON columns parsed, ``spec`` included.
        export: what ``export.json`` holds.
        measurements: records of the trial, rows of ``measurements`` with their conditions parsed.
        baseline: ``strong_baseline`` of the conditions of the baseline's row; empty where speeds were not measured.
    """
    sections = (
        _header(row, export),
        _what(row, export),
        _recipe(row),
        _metrics(row, measurements),
        _conditions(measurements, baseline),
        _files(row, export),
        usage(export),
        _origin(row, export),
        _limits(row, export),
    )
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


# --- what it is -------------------------------------------------------------------------------------------------------


def _header(row: Mapping[str, Any], export: Mapping[str, Any]) -> Iterator[str]:
    tags = dict.fromkeys(
        ["vitpareto", *_kind_tags(export), *(step["technique"] for step in row["recipe"]), export["format"]]
    )
    yield "---"
    yield "library_name: vitpareto"
    task = _task(export)
    if task in _PIPELINES:
        yield f"pipeline_tag: {_PIPELINES[task]}"
    yield "tags:"
    yield from (f"- {tag}" for tag in tags)
    yield "metrics:"
    yield "- accuracy"
    yield "---"


def _what(row: Mapping[str, Any], export: Mapping[str, Any]) -> Iterator[str]:
    names = " + ".join(step["technique"] for step in row["recipe"])
    *_, channels, side, _ = export["input"]["shape"]
    kind = "compressed by vitpareto" if names else "as vitpareto's study started from it, not compressed"
    yield f"# {_model_name(row)}{f': {names}' if names else ', uncompressed'}"
    yield ""
    yield (
        f"{_DOES[_task(export)]} images of {side} x {side} pixels ({channels} channel{'s' if channels > 1 else ''})"
        f"{_outputs(export)}, {kind}. This folder holds "
        f"trial `{row['trial_id']}` of the study `{row['study']}` as {_FORMATS[export['format']]}."
    )


def _task(export: Mapping[str, Any]) -> str:
    return str(export["input"]["preprocessing"].get("task", IMAGES))


def _kind_tags(export: Mapping[str, Any]) -> list[str]:
    return ["vision-transformer"] if _task(export) == IMAGES else ["vision-language", _task(export)]


def _outputs(export: Mapping[str, Any]) -> str:
    classes, task = export["output"]["shape"][1], _task(export)
    if task == "retrieval":
        return ""
    if task == "vqa":
        return f" with {classes} answers"
    return f" into {classes} classes"


def _model_name(row: Mapping[str, Any]) -> str:
    return str(row["spec"]["context"]["model"].get("name") or "Vision transformer")


def _recipe(row: Mapping[str, Any]) -> Iterator[str]:
    context = without_locations(row["spec"]["context"])
    yield "## Recipe"
    yield ""
    if not row["recipe"]:
        yield "None: this is the uncompressed baseline."
    for position, step in enumerate(row["recipe"], 1):
        values = ", ".join(f"{k} = {v}" for k, v in step["config"].items())
        yield f"{position}. `{step['technique']}`" + (f": {values}" if values else "")
    yield ""
    model = {k: v for k, v in context["model"].items() if v not in (None, {})}
    yield f"- Model: {_pairs(model)}"
    if context["model"].get("train"):
        yield f"- Training before: {_pairs(context['training']['baseline'])}"
    if any(stage["kind"] == "recovery" for stage in row["stages"] or ()):
        yield f"- Recovery training, all steps together: {_pairs(context['training']['recovery'])}"


# --- numbers ----------------------------------------------------------------------------------------------------------


def _metrics(row: Mapping[str, Any], measurements: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    metrics = row["metrics"]
    yield "## Metrics"
    yield ""
    yield "| metric | value | 95 % interval | against the baseline |"
    yield "|---|---:|---:|---:|"
    for name in [n for n in METRICS if metrics.get(n) is not None]:
        value, interval = human(name, float(metrics[name])), _interval(name, metrics)
        yield f"| {METRICS[name].card} | {value} | {interval} | {_beside(name, row)} |"
        if name in ACCURACIES:
            yield from _report_rows(name, measurements)
    yield ""
    images = (row["conditions"] or {}).get("search_images")
    yield (
        "The search split"
        + (f" ({images} examples)" if images else "")
        + " was seen by the search for recipes, so its accuracy "
        "flatters; the report split was not. An interval of accuracy is over the examples (Wilson's; of VQA accuracy the normal "
        "one), one of a speed the larger of bootstrap and noise; the 95th percentile has none. Size, parameters and multiply-accumulates are exact."
    )
    if row["is_baseline"]:
        yield "The speeds are those of the best uncompressed way to run the model: the unit that compressed ones are measured in."
    yield from _warnings(row)


def _interval(name: str, metrics: Mapping[str, Any]) -> str:
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    if name not in INTERVALS or low is None or high is None:
        return "-"
    return f"{human(name, float(low))} to {human(name, float(high))}"


def _beside(name: str, row: Mapping[str, Any]) -> str:
    if row["is_baseline"]:
        return "-"
    if name in ACCURACIES:
        drop = row.get(f"{name}_drop")
        return "-" if drop is None else f"{0 - drop:+.2f} points"
    ratio = row.get(f"{name}_ratio")
    return "-" if ratio is None else f"{ratio:.3f} times"


def _report_rows(name: str, measurements: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    title = METRICS[name].card.replace("search", "report")
    for m in (m for m in measurements if m["kind"] == "accuracy_report" and metric_of(m["conditions"]) == name):
        c = m["conditions"]
        interval = f"{c['wilson_low_pct']:.2f} % to {c['wilson_high_pct']:.2f} %"
        yield f"| {title} ({c['images']} examples) | {m['value']:.2f} % | {interval} | - |"


def _warnings(row: Mapping[str, Any]) -> Iterator[str]:
    if (row["conditions"] or {}).get("simulated"):
        yield ""
        yield (
            "**Simulated.** Weights are really small, but no kernel multiplies them as they are stored: the speeds are those of "
            "the model with plain layers, and nothing is claimed for what makes them small."
        )
    if row.get("slower_than_baseline"):
        yield ""
        yield (
            "**Slower than the baseline.** The whole interval of a speed above is on the slow side of the best uncompressed way "
            "to run this model on the same device."
        )


def _conditions(measurements: Sequence[Mapping[str, Any]], baseline: Mapping[str, Any]) -> Iterator[str]:
    speeds = [m for m in measurements if m["kind"] in _MEASURED]
    yield "### Conditions"
    yield ""
    if not speeds:
        yield "No speed and no memory was measured for this trial."
        return
    yield "| measured | device | dtype | threads | batch | image | protocol | samples | ratio to the baseline |"
    yield "|---|---|---|---:|---:|---:|---|---:|---:|"
    for m in speeds:
        c = m["conditions"]
        later = "" if m["attempt_id"] else " (again, later)"
        ratio = "-" if m["ratio"] is None else f"{m['ratio']:.3f}"
        if m["ratio_low"] is not None:
            ratio += f" ({m['ratio_low']:.3f} to {m['ratio_high']:.3f})"
        cells = (
            f"{m['kind'].replace('_', ' ')}{later}",
            c.get("device_name", m["device"]),
            c.get("dtype", "-") + (", compiled" if c.get("compiled") is True else ""),
            c.get("threads", "-"),
            m["batch"],
            f"{m['resolution']} px",
            m["protocol"],
            len(m["samples"] or ()) or "-",
            ratio,
        )
        yield "| " + " | ".join(_cell(cell) for cell in cells) + " |"
    yield ""
    for m in (m for m in speeds if "resolution_bytes" in m["conditions"]):
        told = format_value("size_bytes", m["conditions"]["resolution_bytes"])
        yield f"Peak memory: {m['conditions']['method']}; differences below {told} are not told apart."
        yield ""
    yield from _strong(baseline)
    yield (
        "A speed is the ratio to that baseline, timed in turn in one process, times the baseline's value; the ratio's interval "
        "above is the bootstrap's alone."
    )


def _strong(baseline: Mapping[str, Any]) -> Iterator[str]:
    """Yields a line that says what the baseline is: the best uncompressed way that the study found."""
    found = []
    for kind in SPEEDS:
        if kind in baseline:
            b = baseline[kind]
            where = f" at batch {b['batch']}" if b.get("batch") else ""
            found.append(f"{kind} {format_value('', b['value']).strip()} {b['unit']} as {b['way']}{where}")
    if found:
        yield f"The baseline is the fastest uncompressed way to run the model on {baseline['device_name']}: {', '.join(found)}."


# --- files ------------------------------------------------------------------------------------------------------------


def _files(row: Mapping[str, Any], export: Mapping[str, Any]) -> Iterator[str]:
    parity = export["parity"]
    yield "## Files"
    yield ""
    yield "| file | size | SHA-256 |"
    yield "|---|---:|---|"
    for name, file in export["files"].items():
        yield f"| `{name}` | {format_value('size_bytes', file['bytes'])} | `{file['sha256']}` |"
    yield ""
    size = row["metrics"].get("size_bytes")
    if export["format"] != "artefact" and size is not None:
        yield f"The artefact that it was made from has {format_value('size_bytes', size)}; the metrics are the artefact's."
        yield "This file was compared with it and was not timed."
        yield ""
    differ = f"{parity['top1_differing']} of {sum(parity['batches'])} predictions differ"
    how = "bit-exact" if not parity["tolerance"] else f"{parity['tolerance']:g} of the largest logit is allowed"
    yield (
        f"Checked against the artefact after loading it back: largest difference of a logit "
        f"{parity['largest_difference']:.3g} where the largest logit is {parity['largest_logit']:.4g} ({how}), {differ}, over "
        f"batches of {', '.join(map(str, parity['batches']))} images. Inputs: {parity['inputs']}."
    )


# --- origin -----------------------------------------------------------------------------------------------------------


def _origin(row: Mapping[str, Any], export: Mapping[str, Any]) -> Iterator[str]:
    found, spec = row["provenance"] or {}, row["spec"]
    facts = {
        "Study, trial, attempt": f"`{row['study']}`, `{row['trial_id']}`, `{row['attempt_id']}`",
        "Recipe, context": f"`{row['recipe_hash']}`, `{row['context']}` (digests)",
        "Seed": f"{row['seed']}; baseline {spec['context']['training']['baseline'].get('seed', 0)}",
        "Data": f"{spec['context']['data'].get('kind')}, digest `{found.get('data_digest')}`",
        "Measured": f"{row['started_at']:%Y-%m-%d %H:%M} UTC on {spec['context']['device']}",
        "With": _versions(found.get("versions") or {}),
        "Git commit": f"`{found['git_commit']}`" if found.get("git_commit") else "not known",
        "Exported": f"{export['made_at'][:16].replace('T', ' ')} UTC with {_versions(export['versions'])}",
    }
    yield "## Provenance"
    yield ""
    yield from (f"- {name}: {value}" for name, value in facts.items())


def _limits(row: Mapping[str, Any], export: Mapping[str, Any]) -> Iterator[str]:
    yield "## What is not covered"
    yield ""
    yield f"- Trained for one task and one data set ({row['spec']['context']['data'].get('kind')}); nothing else was tried on it."
    yield "- Robustness, fairness and calibration were not looked at; compression can change them where the accuracy stays."
    yield "- Speeds hold for the device and the conditions above."
    if export["format"] != "artefact":
        yield "- The image size is fixed, the batch size is free. Exported and checked on a CPU; no other device was tried."
    yield "- Licences of the original weights and of the data apply; this card does not know them."


def _versions(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _pairs(values: Mapping[str, Any]) -> str:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return ", ".join(f"{k} {v}" for k, v in flat.items())


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
