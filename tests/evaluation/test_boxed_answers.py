import pytest

from jaxlab import evaluation

TEXT = (
  r'Try \boxed{17}. Then \boxed {\frac{a}{\sqrt{2}}} and \fbox{3}, at last \boxed{\boxed{204}}.'
)


def test_answers_are_what_stands_in_boxes_with_their_braces():
  assert evaluation.boxed_answers(TEXT) == ['17', r'\frac{a}{\sqrt{2}}', r'\boxed{204}', '204']
  assert evaluation.boxed_answers('no box') == []
  assert evaluation.boxed_answers(r'cut off \boxed{\frac{1}{2') == []
  assert evaluation.boxed_answers(r'\boxed{}') == ['']


@pytest.mark.parametrize(
  ('answer', 'right'),
  [('17', True), (' 204 ', True), ('20', True), ('3', False), ('205', False), ('2', True)],
)
def test_an_answer_counts_where_any_box_contains_it(answer, right):
  assert evaluation.aime_correct(TEXT, answer) is right


def test_an_empty_answer_is_refused():
  with pytest.raises(ValueError, match='answer must not be empty'):
    evaluation.aime_correct(TEXT, ' ')
