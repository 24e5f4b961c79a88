"""The command ``export``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.io import STORAGE, NameArgument, StorageOption, UsageError, reported, say
from workers.artefact.export_formats import ExportFailed, ExportFormat, ExportRefused


@reported
def export(
    name: NameArgument,
    trial: Annotated[str, typer.Argument(metavar="TRIAL", help="Trial id, or the start of it.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    format_: Annotated[ExportFormat, typer.Option("--format", help="What to write.")] = ExportFormat.artefact,
    storage: StorageOption = STORAGE,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replaces an earlier export in OUT.")] = False,
) -> None:
    """Writes a trial's model into a folder with a model card, after checking that it computes what the artefact does."""
    from orchestrator.export.folder import export_trial

    try:
        done = export_trial(name, trial, out, format=format_, storage=storage, overwrite=overwrite)
    except (ExportRefused, LookupError) as error:
        raise UsageError(str(error)) from None
    except ExportFailed as error:
        for line in str(error).splitlines():
            say(line)
        raise typer.Exit(1) from None
    if done.data_fault:
        say(f"compared on noise: the study's data cannot be read here: {done.data_fault}")
    parity = done.record["parity"]
    print(
        f"checked on {parity['inputs']}, batches of {', '.join(map(str, parity['batches']))}: logits differ by "
        f"{parity['largest_difference']:.3g} at most (largest logit {parity['largest_logit']:.4g}), "
        f"{parity['top1_differing']} of {sum(parity['batches'])} predictions differ",
        file=sys.stderr,
    )
    for file in sorted(done.folder.iterdir()):
        print(file)
