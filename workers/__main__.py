"""``python -m workers SPEC.json``: runs one trial without a cluster and prints its result as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from workers.run import run_trial
from workers.trial import TrialSpec


def main() -> int:
    """Reads a trial spec, runs it here, prints the TrialResult; exit status 0 for ok, 1 for any failure, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m workers", description=main.__doc__)
    parser.add_argument("spec", type=Path, help="JSON file of a TrialSpec, as `vitpareto show NAME TRIAL` prints it")
    arguments = parser.parse_args()
    try:
        values = json.loads(arguments.spec.read_text())
        spec = TrialSpec.from_dict(values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{arguments.spec}: not a trial spec: {error}", file=sys.stderr)
        return 2
    result = run_trial(spec)
    json.dump(result.to_dict(), sys.stdout, indent=2)
    print()
    if result.failure:
        print(result.failure, file=sys.stderr)
    return 0 if result.status in ("ok", "stopped") else 1


if __name__ == "__main__":
    sys.exit(main())
