"""DPG-Bench: the dependency graph and its two sums, answers made elsewhere, a judge that is a vision-language model."""

import json

import numpy as np
import pytest
import torch
from dpg_table import write_csv
from PIL import Image

from engine import dpg
from engine.errors import UserError
from engine.judge import Judge

QUESTIONS = [  # item, id, dependency, tuple
    ("first", 1, "0", "entity - whole (cat)"),
    ("first", 2, "1", "attribute - color (cat, black)"),
    ("first", 3, "2", "attribute - texture (black fur, long)"),
    ("second", 1, "0", "entity - whole (hat)"),
    ("second", 2, "0", "global - (night)"),
    ("second", 3, "1,2", "relation - spatial (hat, night, in)"),
]


@pytest.fixture
def items(tmp_path):
    return dpg.read(write_csv(tmp_path / "dpg_bench.csv", QUESTIONS))


def yes(*answers):
    return {number: bool(answer) for number, answer in enumerate(answers, 1)}


def test_zeros_cascade(items):
    chain, two_parents = (item["questions"] for item in items)
    assert dpg.zeroed(chain, yes(1, 1, 1)) == {1: 1, 2: 1, 3: 1}
    assert dpg.zeroed(chain, yes(0, 1, 1)) == {1: 0, 2: 0, 3: 0}
    assert dpg.zeroed(chain, yes(1, 0, 1)) == {1: 1, 2: 0, 3: 0}
    assert dpg.zeroed(two_parents, yes(1, 0, 1)) == {1: 1, 2: 0, 3: 0}
    assert dpg.zeroed(two_parents, yes(0, 1, 0)) == {1: 0, 2: 1, 3: 0}


def test_both_sums(items):
    """By hand. As released, the first item loses its first question, on which another depends: it is left out."""
    answers = {"first": [yes(1, 1, 1), yes(0, 1, 1)], "second": [yes(1, 1, 1), yes(1, 0, 1)]}
    found = dpg.scores(items, answers)
    assert found["dpg_items"] == {"first": pytest.approx((1 + 0) / 2), "second": pytest.approx((1 + 1 / 3) / 2)}
    assert found["dpg"] == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)
    assert found["dpg_categories"] == {"attribute": 100, "entity": 75, "global": 50, "relation": 100}  # before zeroing
    assert found["dpg_details"]["entity - whole"] == 75 and found["dpg_details"]["global"] == 50
    released = dpg.scores_as_released(items, answers)
    assert released["dpg_items"] == {"second": pytest.approx(2 / 3)} and released["dpg"] == pytest.approx(200 / 3)
    assert released["dpg_categories"] == {"entity": 100, "global": 0, "relation": 100}  # the last picture's
    other_order = dpg.scores_as_released(items[::-1], answers)
    assert other_order["dpg"] == released["dpg"]


def test_as_released_without_a_dependency_on_the_first_row(tmp_path):
    """The item keeps its place, with a question less; a parent at 0 before the lost one hides the error."""
    items = dpg.read(write_csv(tmp_path / "a.csv", [("x", 1, "0", "a - b (c)"), ("x", 2, "0", "a - d (c)")]))
    assert dpg.scores_as_released(items, {"x": [yes(0, 1)]})["dpg"] == 100
    assert dpg.scores(items, {"x": [yes(0, 1)]})["dpg"] == 50
    rows = [("x", 1, "0", "a - b (c)"), ("x", 2, "0", "a - d (c)"), ("x", 3, "2,1", "a - e (c)")]
    items = dpg.read(write_csv(tmp_path / "b.csv", rows))
    assert dpg.scores_as_released(items, {"x": [yes(1, 0, 1)]})["dpg_items"] == {"x": 0}
    assert dpg.scores_as_released(items, {"x": [yes(1, 1, 1)]})["dpg"] is None


def test_the_published_folder(tmp_path):
    """Prompts are those of the text files, stripped; without a csv pictures can be drawn, not scored."""
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "first.txt").write_text("A cat.  \n")
    (tmp_path / "prompts" / "third.txt").write_text("A dog.\n")
    assert [i["prompt"] for i in dpg.read(tmp_path, questions=False)] == ["A cat.", "A dog."]
    with pytest.raises(UserError, match="dpg_bench.csv"):
        dpg.read(tmp_path)
    write_csv(tmp_path / "dpg_bench.csv", QUESTIONS)
    assert [i["prompt"] for i in dpg.read(tmp_path)] == ["A cat.", "the second,\nso to say"]
    assert [q["text"] for q in dpg.read(tmp_path)[1]["questions"]][1] == "Is it global - (night)?"


@pytest.mark.parametrize(
    "rows, why",
    [
        ([("x", 1, "0", "a"), ("x", 3, "2", "b")], "item x depends on question 2"),
        ([("x", 1, "0", "a"), ("x", 1, "0", "b")], "item x has a question twice"),
        ([("x", "one", "0", "a")], "row 1 of item x"),
        ([("../x", 1, "0", "a")], "cannot name a file"),
    ],
)
def test_a_wrong_table_is_named(rows, why, tmp_path):
    with pytest.raises(UserError, match=why):
        dpg.read(write_csv(tmp_path / "dpg_bench.csv", rows))
    (tmp_path / "dpg_bench.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="lacks the column item_id"):
        dpg.read(tmp_path / "dpg_bench.csv")


def test_answers_made_elsewhere(items, tmp_path):
    """Only "yes" is yes; a number is a probability; what is missing is named."""
    path = tmp_path / "answers.json"
    given = {"first": [{"1": "yes", "2": "Yes", "3": "yes."}], "second": [{"1": 0.51, "2": 0.5, "3": True}]}
    path.write_text(json.dumps(given))
    judge, answers = dpg.read_answers(path, items, 1)
    assert judge == "answers of answers.json"
    assert answers == {"first": [yes(1, 0, 0)], "second": [yes(1, 0, 1)]}
    path.write_text(json.dumps({"judge": "mPLUG-large", "answers": given}))
    assert dpg.read_answers(path, items, 1) == ("mPLUG-large", answers)
    with pytest.raises(UserError, match="item second has not all"):
        dpg.scores(items, {"first": answers["first"]})
    del given["second"][0]["2"]
    for wrong, why in [(given, "item second lacks the answer to question 2"), ({}, "no answers"), ([1], "expected")]:
        path.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=why):
            dpg.read_answers(path, items, 1)


def test_judge(vlm):
    """In batches, left-padded, as one by one; P(yes) as by the whole softmax over the vocabulary."""
    judge = Judge(vlm, batch=2)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    questions = ["Is it a cat?", "Are the green leaves of the cabbages crinkled?", "Is it?"]
    together = judge(image, questions)
    alone = [judge(image, [question])[0] for question in questions]
    assert np.allclose(together, alone, atol=1e-4) and np.std(alone) > 1e-3
    inputs = judge.processor(text=[judge.prompt(questions[0])], images=[[image]], return_tensors="pt")
    with torch.no_grad():
        p = judge.model(**inputs).logits[0, -1].softmax(-1)
    tokens = judge.tokenizer.convert_tokens_to_ids
    yes_, no = (
        sum(p[tokens(word)].item() for word in words)
        for words in (("yes", "Yes", "Ġyes", "ĠYes"), ("no", "No", "Ġno", "ĠNo"))
    )
    assert alone[0] == pytest.approx(yes_ / (yes_ + no), abs=1e-5)
    assert judge.prompt("Is it a cat?").endswith("Is it a cat? Answer yes or no.<|im_end|>\n<|im_start|>assistant\n")
    other = Image.new("RGB", (64, 48), "white")
    assert abs(judge(other, questions[:1])[0] - alone[0]) > 1e-4  # the picture is seen


def test_no_judge():
    with pytest.raises(UserError, match="toy/clip"):
        Judge("toy/clip")
