"""Groups that noise cannot tell apart, against a plain search over all pairs and against what they claim."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from orchestrator.frontier import indistinguishable
from orchestrator.frontier.draws import DRAWS, bootstrapped, normals
from orchestrator.frontier.indistinguishable import distances, grouped, spreads
from orchestrator.frontier.membership import CERTAIN, Drawn, judged
from orchestrator.frontier.quantiles import floor_width
from tests.drawn import exact, images, speed


def copies(rng, count, sigma=0.02):
    """Speeds of one artefact under ``count`` names, each measured once; four A/A runs told how well."""
    told = sigma * math.sqrt(rng.chisquare(4) / 4) * stats.t.ppf(0.975, 4) / stats.norm.ppf(0.975)
    return speed(rng.normal(0, sigma, count), told, [f"copy {rng.integers(2**60)}" for _ in range(count)])


@pytest.mark.parametrize("count", [2, 12])
def test_copies_of_one_artefact_are_one_group(count):
    rng, alone = np.random.default_rng(0), 0
    same = Drawn(np.tile(-bootstrapped(images(287, range(9))), (count, 1)), np.full(count, np.inf))
    for _ in range(120):
        found = judged([same, exact(*[1.0] * count), copies(rng, count)])
        alone += found.group.tolist() == [0] * count
        assert found.probability.max() >= CERTAIN / 2
    # One group with probability 0.95 a run, for either count: nearly never as few or as many as these.
    assert stats.binom(120, 0.95).ppf(0.001) <= alone <= stats.binom(120, 0.95).ppf(0.999)


def test_two_things_that_differ_are_told_apart_among_many_others():
    rng = np.random.default_rng(1)
    logs = np.concatenate(
        [[0.0, 0.1], rng.uniform(1, 60, 300)]
    )  # 3.5 standard deviations apart, where the floor is 1.96
    group = judged([exact(*[1.0] * 302), speed(logs, 0.02)]).group
    assert group[0] != group[1]


def test_grouping_is_complete_linkage_within_the_floor_of_its_size():
    rng = np.random.default_rng(2)
    draws = [rng.normal(0, 0.1, 60)[:, None] + 0.02 * normals([f"{o} {i}" for i in range(60)]) for o in "ab"]
    group = grouped(draws, np.zeros(60, np.int64))
    apart = distances(draws)
    for number in range(group.max() + 1):
        members = np.flatnonzero(group == number)
        if len(members) > 1:
            assert apart[np.ix_(members, members)].max() <= floor_width(len(members))
    for first in range(group.max() + 1):
        for second in range(first):
            members = np.flatnonzero((group == first) | (group == second))
            assert apart[np.ix_(members, members)].max() > floor_width(len(members))
    assert 3 < group.max() < 59


def test_groups_are_within_blocks_and_do_not_depend_on_the_order():
    rng = np.random.default_rng(3)
    names = [f"trial {i}" for i in range(50)]
    values = rng.normal(0, 0.05, 50)[:, None] + 0.02 * normals(names)
    blocks = rng.integers(0, 3, 50)
    group = grouped([values], blocks)
    assert all(len(set(blocks[group == g])) == 1 for g in range(group.max() + 1))
    order = rng.permutation(50)
    other = grouped([values[order]], blocks[order])
    pairs = group[:, None] == group[None, :]
    assert (pairs[np.ix_(order, order)] == (other[:, None] == other[None, :])).all()


def test_spreads_are_those_of_the_differences():
    values = np.random.default_rng(4).normal(size=(6, DRAWS)).cumsum(axis=0)
    expected = (values[[1, 3], None] - values[None]).std(axis=-1)
    centred = values - values.mean(axis=1)[:, None]
    assert spreads(centred[[1, 3]], centred) == pytest.approx(expected, abs=1e-6)


def test_distances_are_in_the_objective_that_parts_most_in_whatever_pieces(monkeypatch):
    draws = [np.random.default_rng(seed).normal(size=(7, DRAWS)) + np.arange(7)[:, None] * seed for seed in (0, 1)]
    draws[1][4] = draws[1][2]
    gaps = [d[:, None] - d[None] for d in draws]
    apart = [np.abs(gap.mean(axis=-1)) / np.maximum(gap.std(axis=-1), 1e-300) for gap in gaps]  # 0 / 1e-300 where equal
    expected = np.maximum(*apart)
    monkeypatch.setattr(indistinguishable, "_ROWS", 3)
    assert distances(draws) == pytest.approx(expected, rel=1e-5)


def test_linkage_is_that_of_a_plain_search_over_all_pairs():
    rng = np.random.default_rng(8)
    for _ in range(20):
        points = rng.normal(0, 2, (25, 2))
        apart = np.abs(points[:, None] - points[None]).max(axis=-1)
        plain = [[i] for i in range(25)]
        while True:
            pairs = [
                (apart[np.ix_(a, b)].max() / floor_width(len(a) + len(b)), a, b)
                for i, a in enumerate(plain)
                for b in plain[i + 1 :]
            ]
            if not pairs or (least := min(pairs, key=lambda p: p[0]))[0] > 1:
                break
            plain = sorted([g for g in plain if g not in least[1:]] + [sorted(least[1] + least[2])])
        label = indistinguishable._linked(apart.copy())
        assert sorted(np.flatnonzero(label == first).tolist() for first in np.unique(label)) == plain
