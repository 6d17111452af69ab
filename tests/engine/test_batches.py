"""Many prompts: answers in the order asked, each as soon as its turn has come, the same as alone."""

from soli.engine.batches import generate_many
from soli.engine.generate import generate
from tests.engine.tiny import tiny_model

PROMPTS = [[9] * 8, [4], [5, 6, 7], [8] * 12, [10, 11], [12] * 5]


def test_order_and_content():
    model = tiny_model()
    found = [one.ids for one in generate_many(model, PROMPTS, max_new_tokens=5, batch_size=2)]
    assert found == [generate(model, [prompt], max_new_tokens=5)[0].ids for prompt in PROMPTS]


def test_an_answer_does_not_wait_for_later_questions():
    finished: list[int] = []
    answers = generate_many(tiny_model(), PROMPTS[1:], max_new_tokens=2, batch_size=2, on_batch=finished.append)
    next(answers)
    assert finished == [2], "the shortest prompts make the first batch, and the first question is among them"
    assert len(list(answers)) == 4 and finished == [2, 2, 1]
