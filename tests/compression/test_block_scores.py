import pytest

from jaxlab.compression import pruning_scores, saved_share, select_blocks


def test_the_cheapest_blocks_go_first():
  saved = {name: saved_share(10.0, 10.0 - own) for name, own in {'a': 1, 'b': 2, 'c': 4}.items()}
  scores = pruning_scores({'a': 0.3, 'b': 0.4, 'c': 2.0}, saved)
  assert scores == pytest.approx({'a': 3.0, 'b': 2.0, 'c': 5.0})
  assert select_blocks(scores, 2) == ('b', 'a')
  assert select_blocks({'a': 1.0, 'b': 1.0}, 1) == ('a',)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: pruning_scores({'a': 1.0}, {'a': 0.0}), r'saved by a \(0\): .*multiply-accumulates'),
    (lambda: pruning_scores({'a': 1.0}, {'a': -0.01}), r'saved by a \(-0.01\)'),
    (lambda: pruning_scores({'a': float('nan')}, {'a': 0.1}), 'recoverability of a: expected'),
    (lambda: pruning_scores({'a': 1.0}, {'b': 0.1}), 'has blocks a; saved has b'),
    (lambda: pruning_scores({}, {}), 'has blocks'),
    (lambda: select_blocks({'a': 1.0}, 2), 'count=2: expected 1 to 1'),
    (lambda: select_blocks({'a': 1.0}, 0), 'count=0'),
    (lambda: saved_share(0.0, 1.0), 'whole=0.0'),
  ],
)
def test_what_has_no_price_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
