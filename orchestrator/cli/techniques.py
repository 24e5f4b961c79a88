"""The command ``techniques``."""

from __future__ import annotations

from orchestrator.cli.io import Format, FormatOption, reported, say, write_dicts


@reported
def techniques(format_: FormatOption = Format.table) -> None:
    """Lists the techniques with their parameters, ranges and defaults."""
    from orchestrator.sweep.plan import technique_lines, technique_rows
    from workers.techniques import left_out

    for broken in left_out():
        say(str(broken))
    write_dicts(technique_lines() if format_ is Format.table else technique_rows(), format_)
