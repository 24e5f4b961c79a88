"""Soft scores of ten annotators, VQA accuracy, recall: against examples worked by hand."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from workers.tasks import answers
from workers.tasks.answers import SoftScores, agreement, normalise


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("Yes.", "yes"),
        ("The  red ball", "red ball"),
        ("a seven", "7"),
        ("None", "0"),
        ("ten", "10"),
        ("100,978", "100978"),
        ("red, white", "red white"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("2:50 p.m.", "2:50 pm"),
        ("dont", "don't"),
        ("girl's", "girl's"),
        ("black-and-white", "black and white"),
        ("what?!", "what"),
        ("\n blue\t", "blue"),
        ("...", ""),
    ],
)
def test_answers_are_normalised_as_the_evaluation_describes(given: str, wanted: str) -> None:
    assert normalise(given) == wanted


def test_an_answer_is_worth_the_mean_over_all_but_one_annotator() -> None:
    assert answers.SCORES.tolist() == pytest.approx([0, 0.3, 0.6, 0.9, 1.0])
    for agreeing in range(11):
        gave = [True] * agreeing + [False] * (10 - agreeing)
        sets = list(combinations(gave, 9))
        slow = sum(min(1, sum(one) / 3) for one in sets) / len(sets)
        assert answers.soft_score(agreeing) == pytest.approx(slow)


def test_consensus_is_the_most_given_answer_and_then_the_first_by_alphabet() -> None:
    found = agreement(["two", "2", "The two", "three", "3", "3", "", "?", "red", "Red."])
    assert found == Counter({"2": 3, "3": 3, "red": 2})
    assert answers.consensus(found) == "2"
    assert answers.consensus(Counter()) is None


def test_the_vocabulary_holds_the_most_frequent_consensus_answers() -> None:
    questions = [Counter(a=9, b=1), Counter(b=6, a=4), Counter(b=5), Counter(c=10), Counter(d=1), Counter()]
    assert answers.vocabulary(questions, 3) == ("b", "a", "c")


def test_soft_scores_are_the_dense_matrix() -> None:
    questions = [Counter({"yes": 8, "no": 1, "maybe": 1}), Counter({"2": 3, "3": 2, "no": 5}), Counter({"blue": 10})]
    scores = SoftScores.of(questions, ("no", "yes", "2", "3"))
    dense = [[0.3, 1.0, 0, 0], [1.0, 0, 0.9, 0.6], [0, 0, 0, 0]]
    assert scores.shape == (3, 4)
    np.testing.assert_allclose(np.asarray(scores), dense, atol=1e-7)
    np.testing.assert_allclose(scores[1], dense[1], atol=1e-7)
    np.testing.assert_allclose(scores[np.array([2, 0])], [dense[2], dense[0]], atol=1e-7)
    np.testing.assert_allclose(scores[np.array([0, 1, 1]), np.array([0, 2, 3])], [0.3, 0.9, 0.6], atol=1e-7)
    assert scores.classes[0].tolist()[:3] == [1, 0, -1]


def test_vqa_accuracy_by_hand() -> None:
    questions = [Counter(yes=8, no=2), Counter(yes=1, no=9), Counter(yes=3, no=7), Counter(green=10)]
    scores = SoftScores.of(questions, ("yes", "no"))
    logits = np.array([[2.0, 1.0], [0.1, 0.0], [5.0, -5.0], [0.0, 1.0]])  # yes, yes, yes, no
    assert answers.vqa_levels(logits, scores).tolist() == [4, 1, 3, 0]
    assert answers.vqa_accuracy(logits, scores) == pytest.approx((1.0 + 0.3 + 0.9 + 0) / 4)


SCORES = np.array(  # three images; texts 0 and 1 are of image 0, text 2 of image 1, texts 3 and 4 of image 2
    [
        [0.9, 0.1, 0.8, 0.3, 0.2],
        [0.5, 0.4, 0.6, 0.7, 0.6],
        [0.9, 0.8, 0.7, 0.1, 0.6],
    ]
)
PICTURES = np.array([0, 0, 1, 2, 2])


def test_recall_by_hand() -> None:
    # image 0: its text 0 is best. Image 1: .6 behind text 3's .7 and equal with text 4. Image 2: .6 behind .9, .8, .7
    assert answers.text_ranks(SCORES, PICTURES).tolist() == [0, 2, 3]
    # text 0 is equal with image 2, text 1 behind both, text 2 behind both, text 3 behind both, text 4 equal with image 1
    assert answers.image_ranks(SCORES, PICTURES).tolist() == [1, 2, 2, 2, 1]
    ranks = answers.image_ranks(SCORES, PICTURES)
    assert [answers.recall_at(ranks, k) for k in (1, 2, 3)] == pytest.approx([0, 0.4, 1.0])
    assert answers.recall_at(answers.text_ranks(SCORES, PICTURES), 1) == pytest.approx(1 / 3)


def test_scores_that_tell_nothing_recall_nothing() -> None:
    same = np.zeros((4, 8))
    pictures = np.arange(8) // 2
    assert answers.recall_at(answers.text_ranks(same, pictures), 5) == 0
    assert answers.recall_at(answers.image_ranks(same, pictures), 3) == 0
    perfect = (pictures == np.arange(4)[:, None]).astype(float)
    assert answers.recall_at(answers.text_ranks(perfect, pictures), 1) == 1
    assert answers.recall_at(answers.image_ranks(perfect, pictures), 1) == 1
