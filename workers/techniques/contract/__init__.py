"""What every technique must do, whoever wrote it, as checks that a package can run from its own tests.

    import pytest
    from workers.techniques import contract

    @pytest.mark.parametrize("case", contract.cases(TECHNIQUE, {"keep": 0.5}), ids=str)
    def test_contract(case: contract.Case) -> None:
        case()

or, without pytest, ``contract.check(TECHNIQUE, {"keep": 0.5})``. A check that fails raises AssertionError, which says what is
broken and what to do. Models, data and surroundings are small and made on the spot: a few seconds a technique, on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from workers.techniques.contract.models import JOINT, VARIANTS, family_of
from workers.techniques.contract.on_models import ON_EVERY_VARIANT
from workers.techniques.contract.on_records import ON_ONE_VARIANT
from workers.techniques.contract.subject import Check, Subject, require
from workers.techniques.record import Technique


@dataclass(frozen=True)
class Case:
    """One check of one technique on one variant: call it. As text ``tome-rebuild[distil]``."""

    check: Check
    subject: Subject

    def __call__(self) -> None:
        self.check(self.subject)

    def __str__(self) -> str:
        return f"{self.subject.technique.name}-{self.check.__name__}[{self.subject.variant}]"


def cases(
    technique: Technique,
    sample: Mapping[str, Any],
    variants: Iterable[str] | None = None,
    *,
    sizes_from_data: bool = False,
) -> list[Case]:
    """Returns the checks that concern a technique; nothing is built before a case is called.

    Args:
        sample: a config that changes what every variant computes.
        variants: names of :data:`~workers.techniques.contract.models.VARIANTS` and
            :data:`~workers.techniques.contract.models.JOINT`; None for all whose family the technique works on.
        sizes_from_data: see :class:`Subject`.
    """
    chosen = (
        [v for v in (*VARIANTS, *JOINT) if family_of(v) in technique.models] if variants is None else list(variants)
    )
    found = []
    for variant in chosen:
        subject = Subject(technique, sample, variant, sizes_from_data)
        once: tuple[Check, ...] = ON_ONE_VARIANT if variant == chosen[0] else ()
        found += [Case(asked, subject) for asked in (*once, *ON_EVERY_VARIANT)]
    return found


def check(technique: Technique, sample: Mapping[str, Any], **options: Any) -> None:
    """Runs all :func:`cases`.

    Raises:
        AssertionError: one that says every fault.
    """
    faults = []
    for case in cases(technique, sample, **options):
        try:
            case()
        except AssertionError as error:
            faults.append(f"{case}: {error}")
        except Exception as error:  # noqa: BLE001 - whatever a technique raises, the other checks are told too
            faults.append(f"{case}: {type(error).__name__}: {error}")
    require(not faults, "\n".join(faults))
