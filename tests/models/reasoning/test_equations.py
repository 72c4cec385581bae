"""The judge of equations: each fault by hand, and texts that must not be judged down."""

import pytest

from smcscale.models.reasoning.equations import EquationJudge

QUESTION = (
    "Tom has 4 boxes with 3 pens in each. He gives away 5 pens. Twice, Ana asks. How many are left?"
)


@pytest.mark.parametrize(
    ("text", "factor"),
    [
        ("", 1.0),
        ("4 * 3 = 12\n", 1.0),
        ("4 * 3 = 12\n12 - 5 = 7\nAnswer: 7\n", 1.0),
        ("Tom has 4 x 3 = 12 pens.\nThen 12 - 5 = 7.\nThe answer is 7.\n", 1.0),
        ("12 / 2 = 6\n", 0.2),  # 12 comes from nowhere; the 2 is "twice"
        ("4 * 3 = 13\n", 0.05),
        ("4 * 3 = 12\n12 - 6 = 6\n", 0.2),
        ("4 * 3 = 12\n4 + 5 = 9\n", 0.5),
        ("Let us think.\n4 * 3 = 12\n", 0.7),
        ("4 * 3 = 12\n12 - 5 = 7\nAnswer: 12\n", 1.0),  # a wrong plan is not seen
        ("4 * 3 = 12\nAnswer: 8\n", 0.05 * 0.5),  # nobody asked where the 5 pens went
        ("4 * 3 = 12\nAnswer: 12\n", 0.5),
        (
            "5 * 5 = 25\nAnswer: 25\n",
            0.5 * 0.5**2,
        ),  # the second 5 comes from nowhere, 4 and 3 go nowhere
        ("3 / 0 = 3\n", 0.05 * 0.2),
        ("4 * 3 - 5 = 7\n", 1.0),
        ("4 + 3 + 5 = 12\nAnswer: 12", 1.0),
        ("5 + 4 * 3 = 17\n", 1.0),
        ("5 + 4 * 3 = 27\n", 0.05),
        ("So $4 * $3 = $12.\n", 1.0),
        ("(4 * 3) - 5 + 4 = 11\n", 0.7),  # nor is what comes after them
        ("4 * 3 / 5 - (3 - 4) + 2 = 5\n", 0.7),
        ("- 4 * 3 = 12\n- 12 - 5 = 7\nAnswer: 7\n", 1.0),  # a list
        ("4 * 3 = 12\nAnswer: 12 - 5 = 7\n", 1.0),
        ("Answer: 4 + 3 = 7\n", 0.5),  # the 5 is not used
        ("4 * 3 = 12\nAnswer: 7, for 12 - 5 = 7\n", 1.0),
        ("(4 + 5) / 3 = 3\n", 0.7),  # brackets are not read, and nothing inside is either
        ("4 * 3 = 13\n13 - 5 = 9\nAnswer: 9\n", 0.05**2),
    ],
)
def test_faults_by_hand(text, factor):
    assert EquationJudge(QUESTION).score(text) == pytest.approx(0.99 * factor)


def test_the_answer_of_a_line_that_reckons_is_its_result():
    judge = EquationJudge(QUESTION)
    assert judge.said("Answer: 12 - 5 = 7")[1] == "7"
    assert judge.said("Answer: 7")[1] == "7"
    assert judge.said("12 - 5 = 7") is None


def test_thousands_and_words():
    judge = EquationJudge("A shop has 1,200 cups and sells twelve boxes of 100.")
    assert judge.score("12 * 100 = 1,200\n1,200 - 1,200 = 0\n") == pytest.approx(0.99)


def test_many_texts_at_once():
    scores = EquationJudge(QUESTION)(None, ["4 * 3 = 12", "4 * 3 = 11"])
    assert scores.shape == (2,) and scores[0] > scores[1] > 0
