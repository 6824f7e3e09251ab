import jax
import numpy as np
import pytest
from golden_vectors import assert_close

from jaxlab import compression, models
from jaxlab.compression import compress_block, dense_cut, frozen_behind

MODEL = models.ViT(
  patch_size=4, image_size=8, width=8, depth=4, num_heads=2, num_classes=3, epsilon=1e-6
)


@pytest.fixture(scope='module')
def variables():
  return jax.device_get(jax.jit(MODEL.init)(jax.random.key(0), np.zeros((1, 8, 8, 3))))


def test_a_compressed_block_is_a_part_of_its_mlp_around_a_shortcut(variables):
  kept = [1, 5, 30]
  model, own = compress_block(MODEL, variables, 2, kept)
  assert set(own['params']['blocks_2']) == {'norm2', 'mlp'}
  x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)

  @jax.jit
  def through(own, x):
    return models.capture(model, own, ['blocks_1', 'blocks_2'], x)[1]

  found, block = through(own, x), variables['params']['blocks_2']
  x, norm, (fc1, fc2) = found['blocks_1'], block['norm2'], (block['mlp'][f'fc{i}'] for i in (1, 2))
  h = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  h = (h * norm['scale'] + norm['bias']) @ fc1['kernel'][:, kept] + fc1['bias'][kept]
  y = x + jax.nn.gelu(h, approximate=False) @ fc2['kernel'][kept] + fc2['bias']
  assert_close(found['blocks_2'], y, 1e-5)


def test_without_neurons_the_block_is_an_identity_and_others_keep_their_numbers(variables):
  model, own = compress_block(MODEL, variables, 1, [])
  model, own = compress_block(model, own, 2, [0, 3])
  assert set(own['params']) >= {'blocks_0', 'blocks_2', 'blocks_3'}
  assert 'blocks_1' not in own['params'] and model.depth == 4
  assert model.attention_widths == (8, 0, 0, 8) and model.hidden_widths == (32, 0, 2, 32)
  dropped = compression.plan(
    MODEL, {'blocks_2/mlp/fc1': [0, 3]}, ['blocks_1', 'blocks_2/attention']
  )
  smaller, same = compression.slice_network(MODEL, variables, dropped)
  x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
  assert_close(jax.jit(model.apply)(own, x), jax.jit(smaller.apply)(same, x), 1e-6)


def test_any_reduction_is_met_by_operations_that_are_there(variables):
  x = jax.ShapeDtypeStruct((1, 8, 8, 3), np.float32)
  whole = compression.multiply_accumulates(MODEL, variables, x)
  macs = sum(compression.block_macs(5, 8, 32))
  for reduction, count in ((0.25, 2), (0.3, None), (0.45, None)):
    cut = dense_cut(MODEL, reduction, num_blocks=count)
    net = MODEL, variables
    for block in range(1, cut.num_blocks + 1):
      net = compress_block(*net, block, range(cut.kept))
    removed = whole - compression.multiply_accumulates(*net, x)
    assert abs(removed / (4 * macs) - reduction) == pytest.approx(cut.off_target, abs=1e-9)
    assert cut.off_target < 0.02  # a neuron is 1.3 % of a block of 32


def test_official_counts_are_shares_of_the_network():
  model = models.create('vit_base_patch16_224')
  macs = compression.block_macs(197, 768, 3072, 'official')
  whole = sum(macs) + 4 * 197 * 768
  size = {'depth': 12, 'patch_size': 16, 'num_classes': 1000, 'counter': 'official'}
  total = compression.vit_macs(197, 768, 3072, **size)
  for dropped, kept in ((1, 2304), (2, 1535), (3, 1151)):
    cut = dense_cut(model, dropped * whole / total, counter='official')
    assert (cut.num_blocks, cut.kept) == (dropped + 1, kept)


def test_what_is_tuned_ends_with_the_block_behind_the_last_compressed_one():
  assert frozen_behind(6, [3, 1]) == ('blocks_5/.*', 'head/.*')
  assert frozen_behind(6, [4]) == frozen_behind(6, [5]) == ('head/.*',)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda v: compress_block(MODEL, v, 4, [0]), 'blocks_4/mlp/fc1'),
    (lambda v: compress_block(MODEL, v, 0, [32]), 'indices from 32'),
    (lambda v: compress_block(*compress_block(MODEL, v, 1, [0]), 1, [0]), 'blocks_1/attention'),
    (lambda v: compress_block(models.PVT(), v, 1, [0]), 'expected a ViT, got PVT'),
    (lambda v: dense_cut(models.PVT(), 0.1), 'expected a plain ViT, got PVT'),
    (lambda v: dense_cut(models.ViT(distilled=True), 0.1), 'expected a plain ViT'),
    (lambda v: dense_cut(MODEL, 0.6), '3 blocks are compressed; of depth=4'),
    (lambda v: dense_cut(MODEL, 0.0), 'expected more than 0'),
    (lambda v: frozen_behind(4, []), r'blocks=\[\]'),
    (lambda v: frozen_behind(4, [4]), 'some of 0 to 3'),
  ],
)
def test_what_cannot_be_is_refused(variables, call, message):
  with pytest.raises(ValueError, match=message):
    call(variables)
