import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from flax import traverse_util
from models.random_variables import random_images, random_variables

from jaxlab import models
from jaxlab.models import (
  GPT2,
  Anatomy,
  Bloom,
  Classifier,
  Linear,
  Llama,
  Swin,
  ViT,
  stack_blocks,
  weight_pairs,
)

IMAGES = random_images((2, 16, 16, 3))
TOKENS = np.zeros((2, 8), np.int32)
NETWORKS = {
  'vit': (ViT(8, 16, 12, 2, 3, num_classes=3), IMAGES),
  'swin': (Swin(2, 16, 4, 8, (1, 2), (2, 4), num_classes=3), IMAGES),
  'gpt2': (GPT2(11, 8, 12, 2, 3), TOKENS),
}
HEADS = {'vit': [3, 3], 'swin': [2, 4, 4], 'gpt2': [3, 3]}
NAMES = {
  'vit': ('attention/qkv', 'attention/proj', 'mlp/fc1', 'mlp/fc2'),
  'swin': ('attention/qkv', 'attention/proj', 'mlp/fc1', 'mlp/fc2'),
  'gpt2': ('attn/c_attn', 'attn/c_proj', 'mlp/c_fc', 'mlp/c_proj'),
}


def kernels_of(params, block, names):
  for name in names:
    tree = params
    for key in f'{block}/{name}/kernel'.split('/'):
      tree = tree[key]
    yield np.asarray(tree)


@pytest.mark.parametrize('name', NETWORKS)
def test_pairs_are_the_slices_that_the_network_multiplies(name):
  model, x = NETWORKS[name]
  params = random_variables(model, x)['params']
  pairs = {pair.name: pair(params) for pair in weight_pairs(model, ('mlp', 'vo', 'qk'))}
  blocks = models.anatomy(model).block_paths
  assert list(pairs) == [f'{b}/{kind}' for b in blocks for kind in ('mlp', 'vo', 'qk')]
  for block, heads in zip(blocks, HEADS[name], strict=True):
    qkv, proj, fc1, fc2 = kernels_of(params, block, NAMES[name])
    np.testing.assert_array_equal(pairs[f'{block}/mlp'][0], fc1)
    np.testing.assert_array_equal(pairs[f'{block}/mlp'][1], fc2)
    width, size = len(proj), len(proj) // heads
    for kind, second_start in (('vo', None), ('qk', 0)):
      first, second = pairs[f'{block}/{kind}']
      assert first.shape == (heads, width, size) and second.shape == (heads, size, width)
      start = {'vo': 2 * width, 'qk': width}[kind]
      for h in range(heads):
        own = slice(h * size, (h + 1) * size)
        np.testing.assert_array_equal(first[h], qkv[:, start + h * size : start + (h + 1) * size])
        expected = proj[own] if second_start is None else qkv[:, own].T
        np.testing.assert_array_equal(second[h], expected)


@pytest.mark.parametrize('name', NETWORKS)
def test_heads_add_up_to_the_whole_product(name):
  model, x = NETWORKS[name]
  params = random_variables(model, x)['params']
  first, second = weight_pairs(model, ('vo',))[0](params)
  whole = weight_pairs(model, ('vo',), per_head=False)[0](params)
  np.testing.assert_allclose((first @ second).sum(0), whole[0] @ whole[1], rtol=1e-4, atol=1e-5)


def without_biases(params):
  """The products of pairs are all there is between the two matrices."""
  flat = traverse_util.flatten_dict(params)
  return traverse_util.unflatten_dict(
    {path: 0 * leaf if path[-1] == 'bias' else leaf for path, leaf in flat.items()}
  )


def turned(params, pair, kind, rng, second=True):
  """Params with a change of the hidden basis between both matrices, or of the first one alone."""
  kernels, pull_back = jax.vjp(pair, params)  # linear: slices go back in place
  *lead, hidden = kernels[0].shape[:-2] + kernels[0].shape[-1:]
  if kind == 'mlp':  # an activation between them: its order alone is free
    turn = np.eye(hidden)[rng.permutation(hidden)]
  else:
    turn = np.linalg.qr(rng.standard_normal((*lead, hidden, hidden)))[0]
  new = kernels[0] @ turn, np.swapaxes(turn, -1, -2) @ kernels[1] if second else kernels[1]
  change = tuple((n - k).astype(k.dtype) for n, k in zip(new, kernels))
  return jax.tree.map(jnp.add, params, pull_back(change)[0])


@pytest.mark.parametrize('name', tables.few([*NETWORKS, 'scanned vit'], 'gpt2'))
def test_the_network_does_not_see_a_change_of_basis_within_a_pair(name):
  """And sees one of the first matrix alone: the second is what reads it, head by head."""
  model, x = NETWORKS[name.removeprefix('scanned ')]
  params = without_biases(random_variables(model, x)['params'])
  if name.startswith('scanned'):
    model, params = model.clone(scan=True), stack_blocks(params)
  run = jax.jit(lambda params: model.apply({'params': params}, x))
  expected, rng = run(params), np.random.default_rng(0)
  size = np.abs(expected).max()
  for kind in ('mlp', 'vo', 'qk'):
    pairs = weight_pairs(model, (kind,))
    moved = params
    for pair in pairs:
      moved = turned(moved, pair, kind, rng)
      alone = run(turned(params, pair, kind, rng, second=False))
      assert np.abs(alone - expected).max() > 1e-3 * size, pair.name
    assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (moved, params)))) > 0.1
    np.testing.assert_allclose(run(moved), expected, atol=1e-4 * size)


def test_stacked_blocks_keep_their_axis_in_front():
  model, x = NETWORKS['vit']
  params = random_variables(model, x)['params']
  plain = [pair(params) for pair in weight_pairs(model, ('vo', 'mlp'))]
  scanned = [
    pair(stack_blocks(params)) for pair in weight_pairs(model.clone(scan=True), ('vo', 'mlp'))
  ]
  for kind, (first, second) in enumerate(scanned):
    np.testing.assert_array_equal(first, np.stack([p[0] for p in plain[kind::2]]))
    np.testing.assert_array_equal(second, np.stack([p[1] for p in plain[kind::2]]))


def test_a_folded_norm_multiplies_and_gets_no_gradient():
  model, x = NETWORKS['vit']
  params = random_variables(model, x)['params']
  for kind, norm in (('mlp', 'norm2'), ('vo', 'norm1')):
    plain, folded = (
      weight_pairs(model, (kind,), fold_norm=fold, per_head=False)[1] for fold in (False, True)
    )
    scale = params['blocks_1'][norm]['scale']
    np.testing.assert_array_equal(folded(params)[0], plain(params)[0] * scale[:, None])
    grads = jax.grad(lambda params, pair=folded: (pair(params)[0] ** 2).sum())(params)
    assert not np.any(grads['blocks_1'][norm]['scale'])
  key, query = weight_pairs(model, ('qk',), fold_norm=True, per_head=False)[1](params)
  scale = params['blocks_1']['norm1']['scale']
  qkv = params['blocks_1']['attention']['qkv']['kernel'] * scale[:, None]
  np.testing.assert_allclose(key @ query, qkv[:, 12:24] @ qkv[:, :12].T, rtol=1e-4, atol=1e-5)


def test_a_network_within_another_and_one_of_the_users_own():
  backbone = ViT(8, 16, 12, 2, 3)
  wrapped = Classifier(backbone, Linear(3))
  pair = weight_pairs(wrapped)[1]
  assert pair.name == 'backbone/blocks_0/vo' and pair.first.heads == 3
  llama = Llama(width=12, depth=1, num_heads=3, vocab_size=11, max_length=8, hidden=8)
  with pytest.raises(ValueError, match="'layers_0' has no mlp branch of two layers"):
    weight_pairs(llama, ('mlp',))
  parts = models.anatomy(backbone)
  with pytest.raises(ValueError, match='heads of Llama are not known: give num_heads'):
    weight_pairs(llama, anatomy=parts)
  own = weight_pairs(llama, anatomy=parts, num_heads=[2, 3])
  assert [pair.first.heads for pair in own] == [None, 2, None, 3]
  assert [pair.first.heads for pair in weight_pairs(llama, anatomy=parts, per_head=False)] == [
    None
  ] * 4


def test_what_is_wrong_is_named():
  model, x = NETWORKS['vit']
  params = random_variables(model, x)['params']
  bloom = Bloom(11, 8, 1, 2)
  assert [pair.name for pair in weight_pairs(bloom, ('mlp',))] == ['h_0/mlp']
  with pytest.raises(ValueError, match='fused projection is ordered by head'):
    weight_pairs(bloom, num_heads=2)
  with pytest.raises(ValueError, match='1 heads of keys and values serve 2'):
    weight_pairs(GPT2(11, 8, 8, 1, 2, num_kv_heads=1))
  for which in (('mlp', 'ov'), (), 'mlp'):
    with pytest.raises(ValueError, match="which is a sequence of the pairs 'mlp', 'vo', 'qk'"):
      weight_pairs(model, which)
  with pytest.raises(ValueError, match='has no blocks'):
    weight_pairs(model, anatomy=Anatomy())
  with pytest.raises(ValueError, match='num_heads has 1 entries for 2 blocks'):
    weight_pairs(model, num_heads=[3])
  pair = weight_pairs(model)[0]
  missing = dataclasses.replace(
    pair, first=dataclasses.replace(pair.first, path='blocks_0/mlp/fc3/kernel')
  )
  with pytest.raises(
    ValueError, match=r"no 'blocks_0/mlp/fc3/kernel'; some of.*blocks_0/attention/proj"
  ):
    missing(params)
  apart = dataclasses.replace(
    pair, second=dataclasses.replace(pair.second, path='blocks_0/mlp/fc1/kernel')
  )
  with pytest.raises(ValueError, match='fc1/kernel and blocks_0/mlp/fc1/kernel do not chain'):
    apart(params)
  with pytest.raises(ValueError, match='5 heads do not divide the 12 channels'):
    weight_pairs(model, ('vo',), num_heads=5)[0](params)
  padded = Swin(2, 20, 4, 8, (1, 1), (2, 2))
  with pytest.raises(ValueError, match='fold_norm: no normalization'):
    weight_pairs(padded, ('vo',), fold_norm=True)
