"""Soft scores of ten annotators, VQA accuracy, recall: against examples worked by hand."""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from workers.tasks import TaskError, answers
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


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("a.txt", "Yes\nNo.\nAT&T\n2:50 p.m."),
        ("a.json", ["Yes", "No.", "AT&T", "2:50 p.m."]),
        ("a.json", {"No.": 1, "2:50 p.m.": 3, "Yes": 0, "AT&T": 2}),  # as published code writes it
        ("a.json", {"1": "No.", "0": "Yes", "3": "2:50 p.m.", "2": "AT&T"}),  # a model's id2label
    ],
)
def test_names_of_a_vocabulary_are_compared_as_answers_are(name: str, given: Any, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(given if isinstance(given, str) else json.dumps(given))
    names = answers.read_vocabulary(file, answers.vocabulary_digest(file))
    assert names == ("yes", "no", "at t", "2:50 pm")
    scores = SoftScores.of([agreement(["No"] * 7 + ["AT&T"] * 3)], names)
    assert np.asarray(scores)[0].tolist() == pytest.approx([0, 1, 0.9, 0])


def test_the_empty_answer_of_the_published_vocabulary_is_a_class_that_no_answer_is(tmp_path: Path) -> None:
    file = tmp_path / "answers.json"
    file.write_text(json.dumps({"": 0, "woods": 1}))
    names = answers.read_vocabulary(file)
    assert names == ("", "woods")
    assert np.asarray(SoftScores.of([agreement(["", "?", "woods"])], names))[0].tolist() == pytest.approx([0, 0.3])


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("a.txt", "Yes\nNo.\nyes\n", r"each answer once, line 1 'Yes' and line 3 'yes' are the same \('yes'\)"),
        ("a.json", '["no", "2", "two"]', r"class 1 '2' and class 2 'two' are the same"),
        ("a.txt", "yes\n\nno\n", "line 2 must hold an answer, is blank"),
        ("a.txt", "", "must be a list of texts that is not empty"),
        ("a.json", '["yes", 3]', "must be a list of texts"),
        ("a.json", '"yes"', "must be a list of texts"),
        ("a.json", '{"yes": 1, "no": 2}', "must give the 2 answers the classes 0 to 1, each once"),
        ("a.json", '{"yes": 0, "no": 0}', "must give the 2 answers the classes 0 to 1, each once"),
        ("a.json", '{"first": "yes"}', "must give the 1 answers the classes 0 to 0"),
        ("a.json", "yes", "must be a JSON list of answers, or a text with one a line"),
    ],
)
def test_broken_vocabularies(name: str, given: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(given)
    with pytest.raises(TaskError, match=message):
        answers.read_vocabulary(tmp_path / name)


def test_another_vocabulary_than_the_studys_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "answers.txt"
    file.write_text("yes\nno\n")
    digest = answers.vocabulary_digest(file)
    assert answers.read_vocabulary(file, digest) == ("yes", "no")
    file.write_text("no\nyes\n")
    with pytest.raises(TaskError, match=f"content must be the study's .digest {digest}"):
        answers.read_vocabulary(file, digest)


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
    assert answers.vqa_levels(logits[1:3], scores, first=1).tolist() == [1, 3]
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
