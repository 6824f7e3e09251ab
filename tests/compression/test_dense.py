import jax
import numpy as np
import pytest
from golden_vectors import assert_close, golden

from jaxlab import models
from jaxlab.compression import (
  BlockMacs,
  block_macs,
  dense_structure,
  kept_hidden,
  kept_neurons,
  multiply_accumulates,
  vit_macs,
)

VIT_B = {'tokens': 197, 'width': 768, 'hidden': 3072}


@golden('dc_vit', 'structure')
def test_structures_agree_with_the_formulas(vectors):
  for index, (tokens, width, hidden, depth) in enumerate(
    zip(*(vectors[f'in_{name}'].tolist() for name in ('tokens', 'dim', 'hidden', 'depth')))
  ):
    macs = block_macs(tokens, width, hidden)
    assert macs == (vectors['out_attention_macs'][index], vectors['out_mlp_macs'][index])
    removed = vectors['in_block_macs_reduction'][index] * depth * sum(macs)
    if removed < macs.attention:
      with pytest.warns(UserWarning, match='less than one attention'):
        found = dense_structure(removed, macs, depth)
    else:
      found = dense_structure(removed, macs, depth)
    assert found.num_blocks == vectors['out_num_blocks'][index]
    assert_close(found.drop_ratio, vectors['out_mlp_drop_ratio'][index], 1e-9)


@pytest.mark.parametrize(('dropped', 'kept'), [(1, 2304), (2, 1535), (3, 1151)])
def test_the_official_counter_gives_the_structures_that_the_code_notes(dropped, kept):
  macs = block_macs(**VIT_B, counter='official')
  whole = sum(macs) + 4 * VIT_B['tokens'] * VIT_B['width']
  total = vit_macs(**VIT_B, depth=12, patch_size=16, num_classes=1000, counter='official')
  assert_close(dropped * whole / total, dropped * 0.0828, 0.005)
  found = dense_structure(dropped * whole, macs, 12)
  assert found.num_blocks == dropped + 1
  assert kept_hidden(found.drop_ratio, 3072) == kept


def test_operations_are_those_of_the_traced_network():
  model = models.create('vit_tiny_patch4_16', width=32, depth=2, num_heads=2, num_classes=10)
  x = jax.ShapeDtypeStruct((1, 16, 16, 3), np.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  expected = vit_macs(17, 32, 128, 2, patch_size=4, num_classes=10)
  assert multiply_accumulates(model, variables, x) == expected


def test_any_size_is_met():
  macs, depth = block_macs(65, 48, 192), 6
  for share in np.linspace(0.1, 1.0, 40):
    removed = share * depth * sum(macs)
    count, ratio = dense_structure(removed, macs, depth)
    dropped = 192 - kept_hidden(ratio, 192)
    reached = count * (macs.attention + dropped / 192 * macs.mlp)
    assert abs(reached - removed) < 0.01 * depth * sum(macs)


def test_at_whole_blocks_one_more_block_removes_the_same():
  macs = block_macs(50, 48, 192)
  assert dense_structure(2 * sum(macs), macs, 6) == (2, 1.0)
  count, ratio = dense_structure(2 * sum(macs), macs, 6, num_blocks=3)
  assert count == 3
  assert_close(ratio, 0.41, 0.02)
  assert_close(count * (macs.attention + ratio * macs.mlp), 2 * sum(macs), 1e-12)


def test_a_target_below_an_attention_is_overshot_with_a_warning():
  with pytest.warns(UserWarning, match='overshot'):
    assert dense_structure(1.0, BlockMacs(4.0, 6.0), 12) == (1, 0.0)


def test_some_neuron_stays_unless_all_are_dropped():
  assert (
    kept_hidden(1.0, 192) == 0 and kept_hidden(0.999, 192) == 1 and kept_hidden(0.0, 192) == 192
  )
  assert kept_hidden(0.999, 192, 8) == 8 and kept_hidden(0.25, 192) == 144


def test_neurons_are_kept_at_random_or_by_size():
  rng = np.random.default_rng(0)
  fc1, fc2, activations = (
    rng.normal(size=(3, 8)),
    rng.normal(size=(8, 3)),
    rng.normal(size=(2, 5, 8)),
  )
  first, again = (kept_neurons(jax.random.key(0), fc1, fc2, 4) for _ in range(2))
  assert first.tolist() == again.tolist() == sorted(set(first.tolist())) and len(first) == 4
  draws = {tuple(kept_neurons(jax.random.key(seed), fc1, fc2, 4)) for seed in range(5)}
  assert len(draws) > 1
  norms = np.linalg.norm(fc1, axis=0) * np.linalg.norm(fc2, axis=1)
  expected = np.sort(np.argsort(norms)[4:])
  np.testing.assert_array_equal(kept_neurons(jax.random.key(0), fc1, fc2, 4, 'norm'), expected)
  expected = np.sort(np.argsort(activations.mean((0, 1)))[4:])
  found = kept_neurons(jax.random.key(0), fc1, fc2, 4, 'gelu', activations)
  np.testing.assert_array_equal(found, expected)


FC = np.ones((3, 8)), np.ones((8, 3))


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: block_macs(0, 48, 192), 'tokens=0'),
    (lambda: block_macs(65, 48, 192, 'paper'), "counter='paper'"),
    (lambda: dense_structure(0.0, BlockMacs(4, 6), 12), 'expected more than 0'),
    (lambda: dense_structure(121.0, BlockMacs(4, 6), 12), 'at most 120, all 12 blocks'),
    (lambda: dense_structure(25.0, BlockMacs(4, 6), 12, 2), 'num_blocks=2: expected 3 to 12'),
    (lambda: dense_structure(25.0, BlockMacs(4, 6), 12, 13), 'num_blocks=13'),
    (lambda: dense_structure(25.0, BlockMacs(4, 6), 12, 8), 'take fewer blocks'),
    (lambda: kept_hidden(1.2, 8), 'drop_ratio=1.2'),
    (lambda: kept_hidden(0.5, 8, 9), 'multiple=9'),
    (lambda: kept_neurons(jax.random.key(0), *FC, 9), 'count=9: expected 1 to 8'),
    (lambda: kept_neurons(jax.random.key(0), FC[0], FC[1][:7], 2), r'fc2 \(7, 3\)'),
    (lambda: kept_neurons(jax.random.key(0), *FC, 2, 'taylor'), "mode='taylor'"),
    (lambda: kept_neurons(jax.random.key(0), *FC, 2, 'gelu'), 'got None'),
  ],
)
def test_what_cannot_be_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()


@pytest.mark.parametrize('depth', [5, 10, 11, 15, 20, 24])
def test_whole_blocks_are_whole_whatever_rounding_says(depth):
  for width in (64, 384, 768, 1024):
    macs = block_macs(197, width, 4 * width)
    for count in range(1, depth + 1):
      found = dense_structure(count / depth * (depth * sum(macs)), macs, depth)
      assert found == (count, 1.0), (width, count)
      assert kept_hidden(found.drop_ratio, 4 * width) == 0
