import numpy as np
import pytest
from golden_vectors import golden

from jaxlab.compression import highest_channels, highest_channels_by_head


@golden('up_vits', 'submodel')
def test_what_is_removed_agrees_with_official_code(vectors):
  width, heads, hidden = (vectors.param(f'new_{name}') for name in ('embed', 'heads', 'hidden'))
  kept = {'neck': highest_channels(vectors['out_kl_neck'], width)}
  for block in ('block0', 'block1'):
    kept[f'ffn_{block}'] = highest_channels(vectors[f'out_kl_ffn_{block}'], hidden)
    scores = vectors[f'out_kl_attn_{block}']
    kept[f'attn_{block}'] = highest_channels_by_head(scores, width, heads)
  for name, own in kept.items():
    removed = np.sort(vectors[f'out_remove_{name}'])
    assert np.all(np.diff(own) > 0) and not set(own) & set(removed)
    both = np.sort(np.concatenate([own, removed]))
    np.testing.assert_array_equal(both, np.arange(len(both)))


def test_of_equal_scores_the_first_are_removed():
  assert highest_channels(np.ones(5), 2).tolist() == [3, 4]
  assert highest_channels_by_head(np.ones(6), 2, 2).tolist() == [2, 5]


def test_a_new_head_is_made_of_neighboring_channels():
  scores = np.random.default_rng(0).normal(size=24)
  kept = highest_channels_by_head(scores, 12, 3)
  assert np.bincount(kept // 8).tolist() == [4, 4, 4]
  for head in range(3):
    own = scores[head * 8 : head * 8 + 8]
    np.testing.assert_array_equal(kept[4 * head : 4 * head + 4] % 8, highest_channels(own, 4))


@pytest.mark.parametrize(
  ('function', 'args', 'message'),
  [
    (highest_channels, (np.ones(3), 4), 'count=4: expected 1 to 3'),
    (highest_channels, (np.ones(3), 0), 'count=0'),
    (highest_channels, (np.ones((2, 3)), 1), r'got shape \(2, 3\)'),
    (highest_channels, (np.array([1.0, np.nan]), 1), 'some that are not'),
    (highest_channels_by_head, (np.ones(12), 14, 2), 'width=14: expected 1 to 12'),
    (highest_channels_by_head, (np.ones(12), 10, 5), '12 channels, of which 2 are removed'),
    (highest_channels_by_head, (np.ones(12), 7, 3), 'of which 5 are removed.*num_heads=3'),
  ],
)
def test_what_cannot_be_selected_is_refused(function, args, message):
  with pytest.raises(ValueError, match=message):
    function(*args)
