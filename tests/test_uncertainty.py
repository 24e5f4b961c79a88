"""Draws, pruning, groups and probabilities against closed forms, SciPy, and themselves without pruning."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from orchestrator import uncertainty
from orchestrator.compare import mcnemar_mid_p
from orchestrator.uncertainty import (
    CERTAIN,
    DRAWS,
    HOPELESS,
    POSSIBLE,
    Drawn,
    Known,
    bootstrapped,
    contenders,
    counted,
    distances,
    floor_width,
    front,
    grouped,
    judged,
    normals,
    rounded,
    shares,
    spreads,
    t975,
)

MONTE_CARLO = 3.5 * 0.5 / math.sqrt(DRAWS)
"""Three and a half standard errors of a probability."""


def exact(*values):
    return Drawn(np.array(values, np.float64)[:, None], np.full(len(values), np.inf))


def speed(log, sigma, names=None, limit=np.inf):
    log, sigma = np.asarray(log, np.float64), np.broadcast_to(sigma, len(log))
    names = names or [f"speed {i}" for i in range(len(log))]
    return Drawn(rounded(log[:, None] + sigma[:, None] * normals(names)), np.full(len(log), limit), timed=True)


def images(total, *wrong):
    """Rows of right and wrong images; each of ``wrong`` lists the wrong ones."""
    rows = np.ones((len(wrong), total), np.float32)
    for row, which in zip(rows, wrong, strict=True):
        row[list(which)] = 0
    return rows


# --- quantiles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 7, 11, 12, 25, 60])
def test_floor_is_that_of_the_studentized_range(count):
    few = stats.norm.ppf(0.975) / stats.t.ppf(0.975, 4)  # what Student's t has widened already
    expected = stats.studentized_range.ppf(0.95, count, 4) * few / math.sqrt(2)
    assert floor_width(count) == pytest.approx(expected, abs=7e-3)


def test_floor_of_a_pair_is_the_usual_test_and_grows():
    assert floor_width(2) == pytest.approx(stats.norm.ppf(0.975), abs=1e-4)
    assert (np.diff(floor_width(np.arange(2, 3000))) > 0).all()


@pytest.mark.parametrize("dof", [1, 2, 5, 14, 15, 16, 40, 1000])
def test_student(dof):
    assert t975(dof) == pytest.approx(stats.t.ppf(0.975, dof), abs=1e-4)


# --- draws ------------------------------------------------------------------------------------------------------------


def test_normals_are_stratified_independent_and_the_same_in_any_company():
    drawn = normals([f"trial {i}" for i in range(200)])
    quantiles = stats.norm.ppf((np.arange(DRAWS) + 0.5) / DRAWS)
    assert np.sort(drawn, axis=1) == pytest.approx(np.tile(quantiles, (200, 1)), abs=1e-9)
    correlation = np.corrcoef(drawn) - np.eye(200)
    assert np.abs(correlation).max() < 5.5 / math.sqrt(DRAWS)
    assert correlation.std() == pytest.approx(1 / math.sqrt(DRAWS), rel=0.1)
    assert (normals(["trial 7", "another"])[0] == drawn[7]).all()


@pytest.mark.parametrize(("right", "total"), [(281, 287), (287, 287), (40, 100), (9_900, 10_000)])
def test_an_accuracy_alone_has_the_posterior_of_a_uniform_prior(right, total):
    drawn = bootstrapped(images(total, range(total - right)))[0] / 100
    expected = stats.beta(right + 1, total - right + 1)
    assert drawn.mean() == pytest.approx(expected.mean(), abs=4 * expected.std() / math.sqrt(DRAWS))
    for share in (0.05, 0.5, 0.95):
        assert (drawn < expected.ppf(share)).mean() == pytest.approx(share, abs=MONTE_CARLO)


@pytest.mark.parametrize(("only_first", "only_second"), [(1, 0), (2, 0), (5, 0), (3, 2), (12, 20), (40, 60)])
@pytest.mark.parametrize("total", [200, 20_000])
def test_which_of_two_is_better_has_jeffreys_prior(only_first, only_second, total):
    both = list(range(180, 190))
    first = bootstrapped(images(total, [*both, *range(100, 100 + only_second)], [*both, *range(only_first)]))
    expected = stats.beta(only_first + 0.5, only_second + 0.5).sf(0.5)
    assert (first[0] > first[1]).mean() == pytest.approx(
        expected, abs=MONTE_CARLO + 0.03
    )  # 64 pseudo-images, not infinite


def test_equal_predictions_have_equal_draws_wherever_they_stand():
    rng = np.random.default_rng(0)
    rows = (rng.random((30, 301)) < 0.9).astype(np.float32)
    rows[[4, 11, 29]] = rows[0]
    drawn = bootstrapped(rows)
    assert (drawn[[4, 11, 29]] == drawn[0]).all()
    assert (bootstrapped(rows[[29, 3]]) == drawn[[29, 3]]).all()
    assert len(np.unique(drawn[:, 0])) == 27


def test_differences_of_accuracies_are_paired():
    rows = images(1000, range(100), [*range(95), *range(100, 110)])
    gap = np.subtract(*bootstrapped(rows))
    alone = bootstrapped(rows[:1])[0].std()
    assert gap.std() == pytest.approx(100 * math.sqrt(16) / 1002, rel=0.1)  # 15 images and 1 of the prior
    assert gap.std() < 0.4 * math.sqrt(2) * alone


# --- probabilities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("z", [-2.5, -1.0, 0.0, 0.5, 1.0, 2.0])
def test_two_points_have_the_analytic_probability(z):
    sigma = np.array([0.03, 0.04])
    found = judged([exact(1.0, 2.0), speed([0.0, -0.05 * z], sigma)])  # the larger is on the frontier if it is faster
    assert found.group.tolist() == [0, 1]
    assert found.probability[0] == 1.0
    assert found.probability[1] == pytest.approx(stats.norm.cdf(z), abs=MONTE_CARLO)


def test_three_in_a_chain_of_one_objective():
    found = judged([exact(3.0, 2.0, 1.0), speed([0.0, 0.0, 0.0], 0.02)])
    assert found.group.tolist() == [0, 1, 2]
    assert found.probability == pytest.approx([1 / 3, 1 / 2, 1], abs=MONTE_CARLO)


def test_equal_predictions_never_part():
    same = Drawn(-bootstrapped(images(287, range(9), range(9), range(9))), np.full(3, np.inf))
    found = judged([same, exact(1.0, 2.0, 1.0)])
    assert found.group.tolist() == [0, 1, 0]
    assert found.probability.tolist() == [1.0, 0.0]


def test_the_mean_of_equal_draws_is_equal_to_them():
    rng = np.random.default_rng(0)
    right = np.tile((rng.random(287) < 0.93).astype(np.float32), (8, 1))
    accuracy = Drawn(-bootstrapped(right), np.full(8, np.inf))
    found = judged([accuracy, exact(*[1.0] * 7, 2.0)])
    assert found.group.tolist() == [0] * 7 + [1]
    assert found.probability.tolist() == [1.0, 0.0]


def test_a_speed_beyond_its_limit_counts_as_the_worst():
    found = judged([exact(1.0, 2.0, 3.0), speed([0.5, 0.3, -0.2], 0.01, limit=0.0)])
    assert found.probability.tolist() == [
        1.0,
        0.0,
        1.0,
    ]  # the second is faster than the first, but slower than the baseline
    free = judged([exact(1.0, 2.0, 3.0), speed([0.5, 0.3, -0.2], 0.01)])
    assert free.probability.tolist() == [1.0, 1.0, 1.0]


def test_what_the_place_rests_on():
    found = judged([exact(1.0, 2.0), speed([0.0, -0.01], 0.02)])
    assert POSSIBLE < found.probability[1] < CERTAIN
    assert found.settled().tolist() == [1.0, 1.0]
    shares_of_draws = found.dominated_by(np.array([1]), np.array([0, 1]))
    assert shares_of_draws.tolist() == [pytest.approx([1 - found.probability[1], 0.0])]
    accuracy = Drawn(-bootstrapped(images(100, range(5), range(1, 5))), np.full(2, np.inf))
    untimed = judged([exact(1.0, 2.0), accuracy])
    assert untimed.settled() is untimed.probability


# --- groups -----------------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(uncertainty, "_ROWS", 3)
    assert distances(draws) == pytest.approx(expected, rel=1e-5)


def test_linkage_is_that_of_a_plain_search_over_all_pairs():
    rng = np.random.default_rng(8)
    for _ in range(20):
        points = rng.normal(0, 2, (25, 2))
        apart = np.abs(points[:, None] - points[None]).max(axis=-1)
        groups = [[i] for i in range(25)]
        while True:
            pairs = [
                (apart[np.ix_(a, b)].max() / floor_width(len(a) + len(b)), a, b)
                for i, a in enumerate(groups)
                for b in groups[i + 1 :]
            ]
            if not pairs or (least := min(pairs, key=lambda p: p[0]))[0] > 1:
                break
            groups = sorted([g for g in groups if g not in least[1:]] + [sorted(least[1] + least[2])])
        label = uncertainty._linked(apart.copy())
        assert sorted(np.flatnonzero(label == first).tolist() for first in np.unique(label)) == groups


# --- pruning ----------------------------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    """Candidates with exact and uncertain objectives, some beyond a limit, with ties."""
    n = draw(st.integers(2, 40))
    grid = st.integers(0, 12).map(lambda v: v / 8)
    columns = [np.array(draw(st.lists(grid, min_size=n, max_size=n))) for _ in range(3)]
    sigma = np.array(draw(st.lists(st.sampled_from([0.0, 0.01, 0.03, 0.1]), min_size=n, max_size=n)))
    limit = draw(st.sampled_from([np.inf, 0.7]))
    return columns, sigma, limit


def drawn_and_known(problem, rows=None):
    (size, first, second), sigma, limit = problem
    rows = np.arange(len(size)) if rows is None else rows
    names = [f"trial {i}" for i in rows.tolist()]
    drawn = [
        exact(*size[rows]),
        speed(first[rows], sigma[rows], [f"{n} first" for n in names], limit),
        speed(second[rows], sigma[rows], [f"{n} second" for n in names]),
    ]
    zero, endless = np.zeros(len(rows)), np.full(len(rows), np.inf)
    known = [
        Known(size[rows], zero, endless),
        Known(first[rows], sigma[rows], np.full(len(rows), limit)),
        Known(second[rows], sigma[rows], endless),
    ]
    return drawn, known


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems())
def test_pruning_changes_nothing(problem):
    drawn, known = drawn_and_known(problem)
    everyone = shares([o.counted() for o in drawn])
    kept = contenders(known, front(known), 1000)
    few, _ = drawn_and_known(problem, kept)
    assert (everyone[np.setdiff1d(np.arange(len(everyone)), kept)] == 0).all()
    assert (shares([o.counted() for o in few]) == everyone[kept]).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems())
def test_shares_are_counted_right(problem):
    drawn, _ = drawn_and_known(problem)
    worlds = np.stack(np.broadcast_arrays(*[o.counted() for o in drawn]), axis=-1)
    as_good = (worlds[:, None] <= worlds[None]).all(axis=-1)
    better = (worlds[:, None] < worlds[None]).any(axis=-1)
    expected = (~(as_good & better).any(axis=0)).mean(axis=-1)
    assert shares([o.counted() for o in drawn]) == pytest.approx(expected)


def test_a_margin_of_five_standard_deviations_of_the_difference():
    for gap, left in [(0.99, 2), (1.01, 1)]:
        step = gap * HOPELESS * math.hypot(0.03, 0.04)
        known = [Known(np.array([0.0, step]), np.array([0.03, 0.04]), np.full(2, np.inf))] * 2
        assert len(contenders(known, front(known), 1000)) == left


def test_of_too_many_the_least_surely_dominated_are_left():
    rng = np.random.default_rng(5)
    n, most = 30_000, 1000
    centre = np.round(rng.random((3, n)), 2)  # with ties, which no margin parts
    known = [Known(c, np.full(n, 0.2), np.full(n, np.inf)) for c in centre]
    rivals = front(known)
    assert len(contenders(known, rivals, n)) == n
    kept = contenders(known, rivals, most)
    assert len(kept) == pytest.approx(most, rel=0.2)  # chosen by a sample of 4,000: 130 of it, give or take 11
    assert np.isin(rivals, kept).all()
    gaps = (centre[:, None, :] - centre[:, rivals, None]) / (0.2 * math.sqrt(2))
    surely = np.where((gaps > 0).any(axis=0), stats.norm.cdf(gaps).prod(axis=0), 0).max(axis=0)
    left = np.isin(np.arange(n), kept)
    assert surely[left].max() <= surely[~left].min() + 0.03  # three objectives, each within 0.01
    order = rng.permutation(n)
    turned = [Known(c[order], known[0].sigma, known[0].limit) for c in centre]
    assert (np.sort(order[contenders(turned, front(turned), most)]) == kept).all()


def test_what_counts_as_the_worst_dominates_nobody_when_too_many_are_left():
    exact_one = Known(np.array([0.0, 1.0, 2.0, 3.0]), np.zeros(4), np.full(4, np.inf))
    timed = Known(np.array([0.0, 1.2, -3.0, 1.4]), np.full(4, 1.0), np.full(4, 1.0))
    assert front([exact_one, timed]).tolist() == [0, 2]
    assert contenders([exact_one, timed], np.array([0, 2]), 4).tolist() == [0, 1, 2, 3]
    assert contenders([exact_one, timed], np.array([0, 2]), 2).tolist() == [0, 2]


def test_a_limit_is_counted_per_candidate():
    values = np.array([[1.0, 2.0], [1.0, 2.0]])
    assert counted(values, np.array([1.5, np.inf])).tolist() == [[1.0, np.inf], [1.0, 2.0]]
    assert np.isposinf(uncertainty.WORST)


# --- truth ------------------------------------------------------------------------------------------------------------


def test_runs_of_the_same_recipes_do_not_contradict_each_other():
    rng = np.random.default_rng(6)
    contradicted = 0
    for _ in range(40):
        n = 24
        strength = rng.random(n)
        size = np.round(1 - 0.9 * strength * rng.random(n), 2)
        log = -0.7 * strength * rng.random(n)
        right = (rng.random((n, 287)) < (0.98 - 0.1 * strength**2)[:, None]).astype(np.float32)
        accuracy = Drawn(-bootstrapped(right), np.full(n, np.inf))
        ends = []
        for run in range(2):
            measured = log + rng.normal(0, 0.02, n)
            found = judged(
                [accuracy, exact(*size), speed(measured, 0.02, [f"{run} {rng.integers(2**60)}"] * 0 or None)]
            )
            ends.append(found.probability[found.group])
        first, second = ends
        contradicted += bool(
            ((first >= CERTAIN) & (second < POSSIBLE)).any() or ((second >= CERTAIN) & (first < POSSIBLE)).any()
        )
    assert contradicted <= 1


def test_certain_members_are_members_and_probabilities_are_calibrated():
    rng = np.random.default_rng(7)
    said, true = [], []
    for _ in range(150):
        n, sigma = 12, 0.03
        size, log = rng.random(n), rng.normal(0, 0.06, n)  # flat about where it was measured, nearly
        truth = log + rng.normal(0, sigma, n)
        names = [f"{rng.integers(2**60)}" for _ in range(n)]
        found = judged([exact(*size), speed(log, sigma, names)])
        said.append(found.probability[found.group])
        true.append(shares([size[:, None], truth[:, None]]))
    said, true = np.concatenate(said), np.concatenate(true)
    for low, high in [(0.0, 0.05), (0.05, 0.3), (0.3, 0.7), (0.7, 0.95), (0.95, 1.01)]:
        inside = (said >= low) & (said < high)
        assert inside.sum() > 20
        error = 3.5 * math.sqrt(0.25 / inside.sum())
        assert true[inside].mean() == pytest.approx(said[inside].mean(), abs=error)


# --- McNemar ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 0), (3, 9), (20, 41), (300, 340)])
def test_mid_p(b, c):
    n = b + c
    coin = stats.binom(n, 0.5)
    expected = 1.0 if b == c else 2 * coin.cdf(min(b, c)) - coin.pmf(min(b, c))
    assert mcnemar_mid_p(b, c) == pytest.approx(expected)
