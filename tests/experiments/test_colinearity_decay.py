"""The experiment's own pieces on a tiny network, and a run of all its rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from experiments import colinearity_decay as paper
from experiments.harness import launcher
from experiments.harness.networks import Loaded
from jaxlab import losses, models

TINY = (
  'network.model.width=8', 'network.model.depth=1', 'network.model.num_heads=2',
  'network.model.patch_size=4', 'network.recipe.epochs=1',
  'network.recipe.schedule.warmup_epochs=0', 'eval_batch_size=256',
  'calibration.count=128', 'calibration.batch_size=64', 'bits=4w4a', 'schemes=stream', 'timed=0',
)  # fmt: skip


def tiny(setting='embedded', *changes):
  return launcher.load('colinearity_decay', setting, [*TINY, *changes])


def one_step(config, name):
  """Returns parameters before and after one step of a row's training."""
  program = paper.programs(config)[name].program
  state = jax.jit(program.init)(jax.random.key(0))
  rng = np.random.default_rng(0)
  batch = {
    'image': rng.integers(0, 255, (96, 8, 8, 1)).astype(np.uint8),
    'label': rng.integers(0, 10, 96).astype(np.int32),
    'index': np.arange(96, dtype=np.int32),
  }
  new, _ = jax.jit(program.step)(state, None, batch)
  return state.params, new.params


def test_rows_differ_by_what_their_papers_add():
  """A first step of Adam is the sign of the gradient times the rate; CD is subtracted behind it."""
  config = tiny('embedded', 'runs=plain,cd')
  before, plain = one_step(config, 'plain')
  _, decayed = one_step(config, 'cd')
  rate = float(config.network.recipe.schedule.make(1, 13)(0))
  mlp = before['blocks_0']['mlp']
  first, second = (np.asarray(mlp[name]['kernel'], np.float64) for name in ('fc1', 'fc2'))
  product = first @ second
  for name, slope in (('fc1', product @ second.T), ('fc2', first.T @ product)):
    moved = np.asarray(plain['blocks_0']['mlp'][name]['kernel']) - 0.1 * rate * slope
    np.testing.assert_allclose(decayed['blocks_0']['mlp'][name]['kernel'], moved, atol=1e-5)
  np.testing.assert_array_equal(decayed['head']['kernel'], plain['head']['kernel'])


@pytest.mark.exhaustive
def test_other_rows_decay_the_weights_or_their_largest_singular_values():
  config = tiny('embedded', 'runs=s2d', 'spectral.weight=0.5')
  params = jax.jit(config.model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))['params']
  recipe = config.network.recipe.optimizer
  grads = jax.tree.map(lambda p: jnp.ones_like(p), params)
  own = paper.flatter(config, lambda step: 0.1)
  updates, _ = jax.jit(own.update)(grads, own.init(params), params)
  layers = models.anatomy(config.model).blocks[0].layers

  def penalty(params):
    flat = traverse_util.flatten_dict(params, sep='/')
    return 0.5 * sum(losses.top_singular_loss(flat[f'{path}/kernel']) for path in layers)

  decayed, plain = paper.heavier(config, lambda step: 0.1), recipe.make(lambda step: 0.1)
  shrunk = jax.jit(decayed.update)(grads, decayed.init(params), params)[0]['head']['kernel']
  moved = jax.jit(plain.update)(grads, plain.init(params), params)[0]['head']['kernel']
  np.testing.assert_allclose(shrunk, moved - 0.1 * 0.1 * params['head']['kernel'], rtol=1e-5)
  grads = jax.tree.map(jnp.add, grads, jax.jit(jax.grad(penalty))(params))
  expected, _ = jax.jit(plain.update)(grads, plain.init(params), params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, expected)


def test_gains_and_alignment_are_those_of_the_decayed_pairs():
  config = tiny('embedded')
  params = jax.jit(config.model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))['params']
  network = Loaded(config, config.network, config.model, {'params': params}, None, None)
  block = jax.tree.map(np.float64, params['blocks_0'])
  value = block['attention']['qkv']['kernel'][:, 16:]
  pairs = [
    (block['mlp']['fc1']['kernel'], block['mlp']['fc2']['kernel']),
    (value, block['attention']['proj']['kernel']),
  ]
  gains = [np.linalg.norm(first @ second, axis=0) for first, second in pairs]
  sizes = [np.sum(a**2) * np.sum(b**2) for a, b in pairs]
  index = [a.shape[1] * np.sum(g**2) / size for (a, _), g, size in zip(pairs, gains, sizes)]
  found = paper.measured(config, network, None)
  assert found['gain'] == pytest.approx(max(g.max() for g in gains), rel=1e-5)
  ratios = [g.max() / np.median(g) for g in gains]
  assert found['gain_over_median'] == pytest.approx(max(ratios), rel=1e-5)
  assert found['colinearity'] == pytest.approx(np.mean(index), rel=1e-5)


def test_a_run_leaves_rows_ratios_and_pictures(tmp_path):
  changes = [*TINY, 'runs=plain,cd', 'pipelines=AbsMax', 'variants={}']
  found = launcher.run('colinearity_decay', workdir=tmp_path, overrides=changes)
  rows = {row['name']: row['metrics'] for row in found['rows']}
  assert list(rows) == ['plain', 'CD']
  for name, own in rows.items():
    for measure in paper.RATIOS:
      assert own[f'{measure}_ratio'] == own[measure] / rows['plain'][measure]
    for metric in ('accuracy', '4w4a_accuracy', 'absmax_4w4a_accuracy'):
      assert 0 <= own[metric] <= 100, (name, metric)
  assert rows['CD']['gain'] < rows['plain']['gain']
  assert {path.name for path in tmp_path.glob('*.png')} == {'peaks.png', 'accuracy_over_bits.png'}


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ('pipelines=RepQ + LSQ', r"'RepQ \+ LSQ' is no pipeline: expected one of AbsMax"),
    ('decay.lam=-1', 'decay: lam must not be negative'),
    ('decay.lam=inf', 'decay.lam=inf'),
    ('decay.power=2', 'decay: power must be above 2, got 2'),
    ('decay.ratio=0', 'decay: ratio must be positive'),
    ('spectral.power=0.5', 'spectral.power, count: power must be at least 1'),
    ('spectral.count=0', 'spectral.power, count: count must be a positive whole number'),
    ('spectral.weight=-1', 'spectral.weight=-1'),
    ('weight_decay=-0.1', 'weight_decay=-0.1'),
    ('penalty.tau=-1', 'penalty: tau must be positive'),
    ('variants={tweo: {lam: 0.1}}', "variants: 'tweo' names row and folder"),
    ('variants={a/b: {lam: 0.1}}', "variants: 'a/b' names row and folder"),
    ('pipelines=RepQ,RepQ', 'pipelines=RepQ, RepQ: each may be there once'),
    ('ranges=200', 'ranges=200: expected 1 to calibration.count=128'),
    ('network.model.scan=true', 'network.model.scan: the blocks are stacked'),
    ('decay.every=0', 'every must be a positive whole number'),
    ('runs=plain,dc', "there is no training 'dc'"),
  ],
)
def test_wrong_settings_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    launcher.load_checked('colinearity_decay', 'embedded', [*TINY, change])
