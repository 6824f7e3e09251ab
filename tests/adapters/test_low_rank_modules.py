"""Low-rank attention, the side network and the edge network of it, against NumPy in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close

from jaxlab import adapters

WIDTH, RANK = 6, 3


def drawn(tree, seed=0):
  """Returns a tree of the same shapes with normal values, scales around 1: nothing is zero."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    noise = 0.5 * rng.standard_normal(leaf.shape)
    return jnp.asarray(noise + (path[-1].key == 'scale'), jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, tree)


def tokens(*shape, seed=1, scale=1.0):
  return scale * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def wide(tree):
  return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def layer_norm(norm, x, epsilon=1e-6):
  x = np.asarray(x, np.float64)
  unit = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
  return unit * norm['scale'] + norm['bias']


def attention(params, x):
  """One image and query after another."""
  n = layer_norm(params['norm'], x)
  q, k, v = (n @ params[name] for name in ('query', 'key', 'value'))
  out = np.zeros_like(n)
  for image in range(len(n)):
    for query in range(n.shape[1]):
      scores = k[image] @ q[image, query] / math.sqrt(q.shape[-1])
      weights = np.exp(scores - scores.max())
      out[image, query] = (weights / weights.sum()) @ v[image] @ params['out']
  return out


def mlp(params, x):
  hidden = layer_norm(params['norm'], x) @ params['down']
  gelu = np.array([h * (1 + math.erf(h / math.sqrt(2))) / 2 for h in hidden.ravel()])
  return gelu.reshape(hidden.shape) @ params['up']


KINDS = {
  'attention': (adapters.low_rank_attention, adapters.init_low_rank_attention, attention),
  'mlp': (adapters.low_rank_mlp, adapters.init_low_rank_mlp, mlp),
}


@pytest.mark.parametrize('kind', KINDS)
def test_modules_agree_with_numpy_and_differences(kind):
  module, init, expected = KINDS[kind]
  params = drawn(init(jax.random.key(0), WIDTH, RANK))
  x = tokens(2, 5, WIDTH)
  assert_close(jax.jit(module)(params, x), expected(wide(params), x), 1e-5)
  direction = drawn(params, seed=7)
  _, tangent = jax.jit(lambda p, d: jax.jvp(lambda own: module(own, x), (p,), (d,)))(
    params, direction
  )
  step = 1e-5

  def at(distance):
    return expected(jax.tree.map(lambda p, d: p + distance * d, wide(params), wide(direction)), x)

  assert_close(tangent, (at(step) - at(-step)) / (2 * step), 1e-4)
  size = adapters.count_parameters(params)
  assert size == 4 * WIDTH * RANK + 2 * WIDTH


def test_new_modules_add_nothing_and_start_within_their_bounds():
  for _, init, _ in KINDS.values():
    own = init(jax.random.key(0), 64, 8)
    zeros = own['out'] if 'out' in own else own['up']
    assert not np.any(zeros) and np.all(own['norm']['scale'] == 1)
  query = np.asarray(adapters.init_low_rank_attention(jax.random.key(0), 64, 8)['query'])
  assert 0.9 / 8 < np.abs(query).max() <= 1 / 8
  assert not np.array_equal(
    query, adapters.init_low_rank_attention(jax.random.key(0), 64, 8)['key']
  )


def test_large_scores_do_not_overflow():
  params = drawn(adapters.init_low_rank_attention(jax.random.key(0), WIDTH, RANK))
  params = {**params, 'query': 1e3 * params['query'], 'key': 1e3 * params['key']}
  x = tokens(2, 5, WIDTH)
  assert_close(adapters.low_rank_attention(params, x), attention(wide(params), x), 1e-3)


@pytest.mark.parametrize('depth', [1, 8])
def test_what_narrow_modules_add_is_summed_in_float32(depth):
  modules = drawn(adapters.init_modules(jax.random.key(0), WIDTH, RANK, depth))
  narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), modules)
  x = jnp.asarray(tokens(2, 5, WIDTH))
  found = adapters.run_modules(narrow, x)
  added = jnp.zeros_like(x)
  for own in narrow.values():
    added = added + adapters.low_rank_attention(own, x + added).astype(jnp.float32)
  assert found.dtype == jnp.float32
  np.testing.assert_array_equal(found, added)


def side_and_features(modules=2, blocks=3, **options):
  init = options.pop('init', adapters.init_low_rank_attention)
  side = adapters.init_attention_side_network(
    jax.random.key(0), WIDTH, blocks, rank=RANK, modules=modules, init=init
  )
  features = tuple(tokens(2, 5, WIDTH, seed=i, scale=1 + i) for i in range(blocks + 1))
  return drawn(side), features


def side_network(side, features, combine, module):
  """The recurrences of the sheet, and the literal bias correction."""
  u = np.asarray(features[0], np.float64)
  for i, z in enumerate(features[1:]):
    x = u + z if combine == 'before' else u
    for t in range(len(side[f'blocks_{i}'])):
      x = x + module(side[f'blocks_{i}'][f'modules_{t}'], x)
    u = x if combine == 'before' else x + z
  return u, u - np.sum(np.asarray(features[:-1], np.float64), 0)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('combine', ['before', 'after'])
def test_side_networks_agree_with_numpy_in_both_forms(combine, kind):
  module, init, expected = KINDS[kind]
  side, features = side_and_features(init=init)
  last, corrected = side_network(wide(side), features, combine, expected)
  run = jax.jit(
    lambda own, z, correction: adapters.apply_attention_side_network(
      own, z, combine=combine, correction=correction, module=module
    ),
    static_argnums=2,
  )
  assert_close(run(side, features, 'running'), corrected, 1e-5)
  assert_close(run(side, features, 'literal'), corrected, 1e-5)
  assert_close(run(side, features, 'none'), last, 1e-5)
  # What was learned, on top of the last tokens.
  assert np.abs(corrected - features[-1]).max() > 0.1


def test_both_places_of_the_sum_differ():
  side, features = side_and_features()
  before, after = (
    adapters.apply_attention_side_network(side, features, combine=own)
    for own in ('before', 'after')
  )
  assert np.abs(np.asarray(before - after)).max() > 0.1


def test_rematerialized_gradients_are_the_same_and_keep_less():
  side, features = side_and_features(modules=4)

  def loss(own, remat):
    y = adapters.apply_attention_side_network(own, features, remat=remat)
    return jnp.sum(jnp.sin(y))

  plain, less = (jax.jit(jax.grad(lambda own, r=r: loss(own, r)))(side) for r in (False, True))
  jax.tree.map(lambda a, b: assert_close(a, b, 1e-5, 1e-6), less, plain)
  kept = [adapters.residual_bytes(lambda own, r=r: loss(own, r), side) for r in (False, True)]
  assert kept[1] < 0.5 * kept[0]


def test_no_gradient_goes_to_the_features():
  side, features = side_and_features()
  run = lambda z, own: jnp.sum(jnp.sin(adapters.apply_attention_side_network(own, z)))  # noqa: E731
  found = jax.jit(jax.grad(run, argnums=(0, 1)))(features, side)
  assert not any(np.any(leaf) for leaf in found[0])
  assert all(np.any(leaf) for leaf in jax.tree.leaves(found[1]))


def test_a_new_side_network_gives_the_logits_of_the_linear_probe_exactly():
  _, features = side_and_features()
  side = adapters.init_attention_side_network(jax.random.key(0), WIDTH, 3, rank=RANK)
  norm = {'scale': jnp.asarray(1 + tokens(WIDTH) ** 2), 'bias': jnp.asarray(tokens(WIDTH, seed=4))}
  head = adapters.init_head(jax.random.key(1), WIDTH, 4)
  probe = adapters.token_logits(head, norm, features[-1])
  y = adapters.apply_attention_side_network(side, features)
  np.testing.assert_array_equal(adapters.token_logits(head, norm, y), probe)
  literal = adapters.apply_attention_side_network(side, features, correction='literal')
  size = np.abs(np.sum(features, 0)).max()
  assert_close(literal, features[-1], 0, 1e-6 * size)


def test_half_precision_features_are_summed_in_float32():
  # Terms of 30000 overflow a sum in float16; y is close to the last one.
  side = adapters.init_attention_side_network(jax.random.key(0), WIDTH, 3, rank=RANK)
  features = [jnp.full((1, 4, WIDTH), 30000.0, jnp.float16)] * 4
  for correction in ('running', 'literal'):
    y = adapters.apply_attention_side_network(side, features, correction=correction)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, 30000.0)
  narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), drawn(side))
  z = tokens(2, 5, WIDTH)
  found = adapters.low_rank_attention(narrow['blocks_0']['modules_0'], z)
  assert found.dtype == jnp.bfloat16
  expected = attention(wide(drawn(side)['blocks_0']['modules_0']), z)
  assert_close(found.astype(jnp.float32), expected, 0.05)


def test_pooling_reads_patches_or_the_class_token():
  x = tokens(2, 6, WIDTH)
  norm, head = {'scale': 1 + tokens(WIDTH), 'bias': tokens(WIDTH, seed=3)}, {}
  head = {'kernel': tokens(WIDTH, 4, seed=5), 'bias': tokens(4, seed=6)}
  for pool, prefix, pooled in (
    ('mean_patches', 2, x[:, 2:].mean(1)),
    ('mean_patches', 0, x.mean(1)),
    ('cls', 1, x[:, 0]),
  ):
    expected = layer_norm(wide(norm), pooled) @ head['kernel'] + head['bias']
    found = adapters.token_logits(head, norm, x, pool=pool, num_prefix_tokens=prefix)
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_edge_networks_agree_with_numpy(kind):
  module, init, expected = KINDS[kind]
  edge = drawn(
    adapters.init_edge_network(jax.random.key(0), WIDTH, 4, rank=RANK, depth=2, init=init)
  )
  s = tokens(2, 5, WIDTH, scale=10)
  x, own = np.asarray(s, np.float64), wide(edge)
  for t in range(2):
    x = x + expected(own['modules'][f'modules_{t}'], x)
  logits = layer_norm(own['norm'], x[:, 1:].mean(1)) @ own['head']['kernel'] + own['head']['bias']
  run = jax.jit(lambda e, s: adapters.apply_edge_network(e, s, module=module))
  assert_close(run(edge, s), logits, 1e-5)


def test_a_new_edge_network_is_a_linear_probe():
  s = tokens(2, 5, WIDTH, scale=10)
  probe, edge = (
    adapters.init_edge_network(jax.random.key(0), WIDTH, 4, depth=depth) for depth in (0, 3)
  )
  np.testing.assert_array_equal(
    adapters.apply_edge_network(edge, s), adapters.apply_edge_network(probe, s)
  )
  sizes = [adapters.count_parameters(own['modules']) for own in (probe, edge)]
  assert sizes == [0, 3 * (4 * WIDTH * 16 + 2 * WIDTH)]


def test_sizes_are_those_of_the_papers():
  side = jax.eval_shape(
    lambda key: adapters.init_attention_side_network(key, 768, 12), jax.random.key(0)
  )
  assert adapters.count_parameters(side) == 663_552
  edge = jax.eval_shape(lambda key: adapters.init_edge_network(key, 768, 5), jax.random.key(0))
  assert adapters.count_parameters(edge['modules']) == 202_752
  grouped = adapters.init_attention_side_network(jax.random.key(0), 8, 12, gap=3, modules=2)
  assert list(grouped) == [f'blocks_{i}' for i in range(4)] and len(grouped['blocks_0']) == 2


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda s, z: adapters.apply_attention_side_network(s, z[:-1]), '3 features for 3 blocks'),
    (lambda s, z: adapters.apply_attention_side_network(s, z, combine='x'), "combine='x'"),
    (
      lambda s, z: adapters.apply_attention_side_network(s, z, correction='x'), "correction='x'",
    ),
    (
      lambda s, z: adapters.apply_attention_side_network(s, (*z[:-1], z[-1][:, :4])),
      r'\(2, 5, 6\), \(2, 4, 6\): expected some, all of one shape',
    ),
    (
      lambda s, z: adapters.init_attention_side_network(jax.random.key(0), 6, 12, gap=5),
      'gap=5 does not divide the depth=12',
    ),
    (lambda s, z: adapters.init_attention_side_network(jax.random.key(0), 6, 2, rank=0), 'rank=0'),
    (
      lambda s, z: adapters.init_attention_side_network(jax.random.key(0), 6, 2, modules=0),
      'depth=0',
    ),
    (lambda s, z: adapters.init_low_rank_mlp(jax.random.key(0), 6, 0), 'rank=0'),
    (lambda s, z: adapters.init_edge_network(jax.random.key(0), 6, 0), 'num_classes=0'),
    (lambda s, z: adapters.init_edge_network(jax.random.key(0), 6, 2, depth=-1), 'depth=-1'),
    (lambda s, z: adapters.token_logits({}, {}, z[0], pool='max'), "pool='max'"),
    (lambda s, z: adapters.token_logits({}, {}, z[0], num_prefix_tokens=5), 'of 5 tokens no patch'),
    (
      lambda s, z: adapters.token_logits({}, {}, z[0], pool='cls', num_prefix_tokens=0),
      'no class token',
    ),
  ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make(*side_and_features())
