import numpy as np
import pytest
from golden_vectors import golden

from jaxlab.compression import global_ranking


@golden('curl', 'global_ranking')
def test_what_stays_agrees_with_official_code(vectors):
  scores = dict(sorted(vectors.tree('in_scores_').items()))
  protected = [list(scores)[vectors.param('protected_group')]]
  keep = global_ranking(
    scores, vectors.param('num_remove'), min_ratio=vectors.param('min_ratio'), protected=protected
  )
  for name, own in keep.items():
    np.testing.assert_array_equal(own, vectors[f'out_keep_{name}'])


@pytest.mark.parametrize('size', [10, 64, 256])
def test_a_group_keeps_the_floor_less_one(size):
  keep = global_ranking({'a': np.arange(size), 'b': np.full(3, 1e9)}, size, min_ratio=0.3)
  assert keep['a'].sum() == np.ceil(0.3 * size) - 1 and keep['b'].all()


def test_ties_are_decided_by_group_and_channel():
  keep = global_ranking({'a': np.ones(4), 'b': np.ones(4)}, 3)
  assert keep['a'].tolist() == [False, False, False, True] and keep['b'].all()


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'num_remove': 9}, 'expected 0 to 6'),
    ({'min_ratio': 0.0}, 'min_ratio=0.0'),
    ({'protected': ('c',)}, r"protected: \['c'\]"),
    ({'scores': {'a': np.array([1.0, np.nan])}}, r"scores\['a'\]"),
    (
      {'scores': {'a': np.ones(1), 'b': 2 * np.ones(5)}, 'num_remove': 1},
      'nothing would be left of a',
    ),
  ],
)
def test_what_cannot_be_ranked_is_refused(change, message):
  given = {'scores': {'a': np.ones(3), 'b': np.ones(3)}, 'num_remove': 2, **change}
  with pytest.raises(ValueError, match=message):
    global_ranking(**given)
