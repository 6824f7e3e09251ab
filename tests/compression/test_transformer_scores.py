"""Scores of a transformer's channels and the network that is cut out of it, against official code."""

import functools

import jax
import numpy as np
import pytest
from golden_vectors import assert_close, golden

from jaxlab import compression, models

KL = functools.partial(compression.prediction_divergence, direction='original_to_pruned')
KINDS = {
  'neck': 'neck',
  'attn_block{}': 'blocks_{}/attention/qkv',
  'ffn_block{}': 'blocks_{}/mlp/fc1',
}


@pytest.fixture(autouse=True)
def in_float64():
  with jax.enable_x64(True):
    yield


def network(vectors):
  """Returns the official network and its variables."""
  names = vectors.tree('param_')
  depth = sum(name.endswith('norm1_weight') for name in names)
  hidden, width = names['blocks_0_mlp_fc1_weight'].shape
  patch, images = vectors.param('patch'), vectors['in_images_nchw']
  model = models.ViT(
    patch_size=patch, image_size=images.shape[-1], width=width, depth=depth,
    num_heads=vectors.param('num_heads'), mlp_ratio=hidden / width, num_classes=len(names['head_bias']),
  )  # fmt: skip
  return model, variables(model, names), images.transpose(0, 2, 3, 1)


def variables(model, arrays):
  """Returns arrays by their official names, dots as underscores, as variables."""
  shape = (1, model.image_size, model.image_size, 3)
  blank = jax.eval_shape(model.init, jax.random.key(0), np.zeros(shape))
  kinds = {'kernel': 'weight', 'scale': 'weight'}

  def own(path, leaf):
    *parts, kind = (key.key for key in path[1:])
    name = '_'.join([*parts, kinds.get(kind, kind)]).replace('attention', 'attn')
    array = arrays[name]
    if kind == 'kernel':
      array = (
        np.moveaxis(array, (0, 1), (-1, -2)) if array.ndim == 2 else array.transpose(2, 3, 1, 0)
      )
    assert array.shape == leaf.shape, name
    return array.astype(np.float64)

  return jax.tree_util.tree_map_with_path(own, dict(blank))


def of_groups(vectors, prefix, depth):
  """Returns official arrays by the names of groups."""
  found = {KINDS['neck']: vectors[f'{prefix}neck']}
  for kind, path in list(KINDS.items())[1:]:
    found |= {path.format(i): vectors[prefix + kind.format(i)] for i in range(depth)}
  return found


@golden('up_vits', 'kl_scores')
def test_scores_of_channels_agree_with_official_code(vectors):
  model, own, images = network(vectors)
  expected = of_groups(vectors, 'out_kl_', model.depth)
  score = jax.jit(
    lambda own: compression.removal_scores(model, own, images, names=list(expected), score=KL)
  )
  found = score(own)
  for name, values in expected.items():
    assert_close(found[name], values, 1e-7)


@golden('up_vits', 'kl_scores')
def test_scores_of_blocks_and_halves_agree_with_official_code(vectors):
  model, own, images = network(vectors)
  logits, parts = vectors['out_logits'], compression.structure(model).parts
  predict = jax.jit(lambda masks: compression.masked_apply(model, own, masks, images))
  assert_close(predict(dict.fromkeys(parts, np.float64(1))), logits, 1e-8)
  for index, expected in zip(
    vectors['in_block_delete_index'], vectors['out_kl_block'], strict=True
  ):
    gone = compression.half_block(int(index), model.depth)
    masks = {part: np.float64(part not in gone) for part in parts}
    assert_close(KL(predict(masks), logits).sum(), expected, 1e-7)


@golden('up_vits', 'submodel')
def test_the_network_that_is_cut_out_agrees_with_official_code(vectors):
  model, own, images = network(vectors)
  width, heads, hidden = (vectors.param(f'new_{name}') for name in ('embed', 'heads', 'hidden'))
  scores, keep, regrouped = of_groups(vectors, 'out_kl_', model.depth), {}, {}
  for name, values in scores.items():
    if name.endswith('qkv'):
      keep[name], regrouped[name] = (
        compression.highest_channels_by_head(values, width, heads),
        heads,
      )
    else:
      keep[name] = compression.highest_channels(values, hidden if name.endswith('fc1') else width)
  plan = compression.plan(model, keep, heads=regrouped)
  cutting = functools.partial(compression.slice_network, model, plan=plan, same_scores=False)
  cut = jax.jit(lambda own: cutting(own)[1])(own)
  ordinary = model.clone(width=width, num_heads=heads, mlp_ratio=hidden / width)
  expected = variables(ordinary, vectors.tree('out_sub_'))
  assert jax.tree.structure(cut) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, cut, expected)
  assert_close(jax.jit(ordinary.apply)(cut, images), vectors['out_sub_logits'], 1e-8)


def test_half_blocks_are_those_of_the_rule():
  found = [compression.half_block(index, 2) for index in range(-1, 4)]
  assert found == [
    ('blocks_0/attention',),
    ('blocks_0',),
    ('blocks_0/mlp', 'blocks_1/attention'),
    ('blocks_1',),
    ('blocks_1/mlp',),
  ]
  for index in (-2, 4):
    with pytest.raises(ValueError, match=f'index={index}: expected -1 to 3'):
      compression.half_block(index, 2)
