import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from matplotlib.image import imread
from meshes import assert_same, on_one_and_on_eight

from experiments import efficient_ssl
from experiments.harness import launcher
from experiments.harness.settings import SettingsError
from experiments.protocols import pretraining, siamese
from jaxlab import data, losses
from jaxlab.training import step_keys

TINY = (
  "model={'name': 'cifar_resnet18', 'stage_sizes': (1,), 'width': 4, 'strides': (2,)}",
  'head.hidden=8',
  'head.features=8',
  *(f'heads.{name}=8' for name in ('hidden', 'features', 'predictor')),
  'recipe.batch_size=16',
  'target.queue_size=32',
)
SMALL = 'data.train_size=40'


def tiny_config(*changes):
  """Returns the embedded setting with a network that compiles in seconds."""
  return launcher.load('efficient_ssl', 'embedded', [*TINY, *changes])


def random_batch(seed=0, size=40):
  rng = np.random.default_rng(seed)
  image = jnp.asarray(rng.integers(0, 256, (16, 16, 16, 1), np.uint8))
  return {'image': image, 'index': jnp.asarray(rng.permutation(size)[:16], jnp.int32)}


@functools.cache
def compiled(name, *changes):
  config = tiny_config(SMALL, *changes)
  program = efficient_ssl.programs(config)[name].program
  return config, program, jax.jit(program.init), jax.jit(program.step)


def embed(config, mix=lambda x: x):
  """Returns `(params, statistics, key, batch) -> (features of a view, statistics)`, compiled."""

  @jax.jit
  def fn(params, stats, key, batch):
    each = jax.vmap(functools.partial(jax.random.fold_in, key))(batch['index'])
    (x,) = efficient_ssl.one_view(config)(each, batch['image'])
    online = siamese.online_pass(efficient_ssl.encoder(config), params, stats, [mix(x)])
    return online.projections[0], online.batch_stats

  return fn


def log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize(
  ('name', 'changes'),
  tables.first(
    [
      ('single_branch', ()),
      ('npid', ()),
      ('single_branch', ('bank.negatives=12', 'bank.cutmix=0.5')),
      ('gradient', ('runs=gradient,',)),
    ],
    2,
  ),
)
def test_a_step_is_that_of_the_paper(name, changes):
  config, _, init, step = compiled(name, *changes)
  state = init(jax.random.key(0))
  batch, own = random_batch(), config.bank
  new, metrics = step(state, {}, batch)
  # The same in NumPy, from the features of the view that this step draws.
  keys, ids = step_keys(state), np.asarray(batch['index'])
  partners, share, mix = np.arange(16), 1.0, lambda x: x
  if own.cutmix:
    blank = jnp.zeros((16, 16, 16, 1))
    _, partners, share = data.cutmix(keys['cutmix'], blank, own.cutmix, own_half=True)
    mix = lambda x: data.cutmix(keys['cutmix'], x, own.cutmix, own_half=True)[0]  # noqa: E731
  stats = state.model_state['batch_stats']
  features, _ = embed(config, mix)(state.params, stats, keys['views'], batch)
  z = unit(np.asarray(features, np.float64))
  count = 40 if own.negatives is None else own.negatives
  columns, where = losses.sample_columns(keys['columns'], batch['index'], count, 40)
  rows = np.asarray(columns)[np.asarray(where)]
  assert len(rows) == 40 if own.negatives is None else 16 <= len(rows) <= 28
  bank = np.asarray(state.extra['bank'], np.float64)
  s = z @ bank[rows].T
  log_p, n, share = log_softmax(s / 0.2), np.arange(16), float(share)
  loss = -np.mean(share * log_p[n, n] + (1 - share) * log_p[n, np.asarray(partners)])
  log_q = log_softmax(s)
  kl = np.mean(np.sum(np.exp(log_q) * (log_q - log_softmax(0.5 * log_q)), -1))
  expected = loss + (0 if name == 'npid' else 20) * kl
  np.testing.assert_allclose(metrics['loss'], expected, rtol=1e-5)
  moved = bank.copy()
  pull = np.eye(16, len(rows))
  if name == 'gradient':
    pull = pull - np.exp(log_p)
    moved[rows] = unit(0.5 * bank[rows] + 0.5 * pull.T @ z)
  else:
    moved[ids] = unit(0.5 * bank[ids] + 0.5 * z)
  np.testing.assert_allclose(new.extra['bank'], moved, atol=2e-6)
  norms = np.linalg.norm(new.extra['bank'], axis=1)
  np.testing.assert_allclose(norms, np.arange(256) < 40, atol=1e-6)


@pytest.mark.exhaustive
def test_the_bank_is_the_same_on_one_and_on_eight_devices():
  _, program, *plain = compiled('single_branch', 'bank.negatives=12', 'bank.cutmix=0.5')
  batches = [random_batch(seed) for seed in range(3)]
  found = on_one_and_on_eight(program, batches, plain=plain)
  assert found[1][0].extra['bank'].addressable_shards[0].data.shape == (
    32,
    8,
  )  # 256 rows on 8 devices
  one, eight = ((state.params, state.extra, metrics['loss']) for state, metrics in found)
  assert_same(one, eight, 1e-3, 1e-4)


@pytest.mark.parametrize('drop_last', tables.few([False, True], True))
def test_a_bank_begins_with_what_the_drawn_network_says(drop_last):
  config = tiny_config('data.train_size=40', f'bank.drop_last={drop_last}', 'recipe.batch_size=16')
  rng = np.random.default_rng(0)
  arrays = {'image': rng.integers(0, 256, (40, 16, 16, 1), np.uint8), 'label': np.zeros(40, int)}
  source = data.InMemory(arrays, 10)
  _, _, init, _ = compiled('single_branch')
  drawn = init(jax.random.key(0))
  state = efficient_ssl.calibrated(config, 'single_branch', source, drawn)
  bank = np.asarray(state.extra['bank'])
  written = np.linalg.norm(bank, axis=1) > 0.5
  assert written.sum() == (32 if drop_last else 40) and not written[40:].any()
  # By hand: all batches in their order, the statistics going along.
  fn, stats = embed(config), drawn.model_state['batch_stats']
  order = efficient_ssl.filled_order(40, 16, config.seed, 0)
  if drop_last:
    feed = data.make_loader(source, batch_size=16, seed=config.seed, num_epochs=1)
    order = np.concatenate([batch['index'] for batch in feed])
  assert len(order) == len(set(order)) == 32 if drop_last else len(order) == 48
  expected = np.zeros_like(bank)
  for ids in order.reshape(-1, 16):
    batch = {'image': arrays['image'][ids], 'index': ids}
    z, stats = fn(drawn.params, stats, step_keys(drawn)['start'], batch)
    expected[ids] = unit(np.asarray(z))
  np.testing.assert_allclose(bank, expected, atol=2e-5)
  left, right = (jax.tree.leaves(tree) for tree in (state.model_state['batch_stats'], stats))
  for a, b in zip(left, right, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_random_bank_stays_as_drawn():
  _, _, init, _ = compiled('npid')
  state = init(jax.random.key(0))
  assert efficient_ssl.calibrated(tiny_config(SMALL), 'npid', None, state) is state


@pytest.mark.exhaustive
def test_a_step_costs_half_of_one_on_two_views():
  wide = TINY[0].replace("'width': 4", "'width': 16")  # heads and bank weigh little
  config = tiny_config(wide, 'runs=single_branch,simsiam', 'timed=1', 'data.train_size=64')
  found = efficient_ssl.relative_costs(config, efficient_ssl.programs(config))
  assert found['simsiam']['relative_flops'] == 1
  assert 0.45 < found['single_branch']['relative_flops'] < 0.6
  assert found['single_branch']['milliseconds'] > 0


def test_two_view_methods_have_rates_of_their_own():
  def moved(*changes):
    _, _, init, step = compiled('simsiam', *changes)
    state = init(jax.random.key(0))
    new, metrics = step(state, None, random_batch())
    change = jax.tree.map(lambda a, b: np.asarray(a - b), new.params, state.params)
    return float(metrics['learning_rate']), change

  constant = (
    'recipe.schedule.name=constant',
    'recipe.optimizer.weight_decay=0',
    'recipe.schedule.base=0.5',
  )
  rate, plain = moved(*constant)
  own_rate, own = moved(*constant, 'two_views.base=0.1', 'two_views.predictor_rate=0.25')
  assert (rate, own_rate) == pytest.approx((0.5, 0.1))
  for name, share in (('encoder', 0.2), ('predictor', 0.5)):
    for a, b in zip(*(jax.tree.leaves(parts[name]) for parts in (own, plain)), strict=True):
      np.testing.assert_allclose(a, share * b, rtol=1e-4, atol=1e-7)


def test_a_data_set_larger_than_the_bank_is_refused(tmp_path):
  config = tiny_config('data.train_size=100', 'runs=single_branch,')
  with pytest.raises(ValueError, match='train_size=100, but 1297 records'):
    efficient_ssl.run(config, tmp_path)


def test_a_collapse_is_said(capsys):
  history = [{'step': 1, 'z_std': 0.9}, {'step': 2, 'z_std': 0.1}, {'step': 2, 'knn_fp': 1.0}]
  assert pretraining.say_collapse('some method', history) == 0.1
  assert 'some method has collapsed: z_std=0.100' in capsys.readouterr().out
  assert pretraining.say_collapse('some method', history[:1]) == 0.9
  assert capsys.readouterr().out == ''


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (('runs=npid,simsia',), 'simsia'),
    (('runs=()',), 'runs is empty'),
    (('recipe.batch_size=1',), 'recipe.batch_size=1: expected at least 2, for batch norm'),
    ((TINY[0].replace("'width'", "'norm_groups': 16, 'width'"),), 'at least 32, for batch norms'),
    (('recipe.microbatches=2',), 'recipe.microbatches: expected 1'),
    (('bank.negatives=2000',), 'bank.negatives=2000: expected at most data.train_size=1297'),
    (('bank.negatives=0',), 'bank.negatives=0: expected at least 1'),
    (('two_views.base=0',), 'two_views.base=0.0: expected a positive number'),
    (('bank.momentum=1.5',), 'bank.momentum=1.5'),
    (('bank.temperature=0',), 'bank.temperature=0'),
    (('bank.power=0',), 'bank.power=0'),
    (('bank.kl_weight=-1',), 'bank.kl_weight=-1'),
    (('bank.cutmix=-1',), 'bank.cutmix=-1'),
    (('bank.update=sgd',), 'bank.update'),
    (('head.layers=0',), 'head.layers=0'),
    (('head.features=0',), 'model: MLPHead'),
    (('timed=-1',), 'timed=-1'),
    (('runs=moco,', 'target.queue_size=33'), 'target.queue_size=33'),
    (('eval.k=0',), 'eval.k=0'),
  ],
)
def test_impossible_settings_are_named(changes, message):
  with pytest.raises(SettingsError, match=message):
    launcher.check(tiny_config(*changes))


def test_costs_that_were_not_measured_have_no_panel(tmp_path):
  config, widths = tiny_config(SMALL), []
  curves = {'single branch': [{'step': 2, 'knn_fp': 20.0}]}
  for own in ({}, {'gigaflops': 1.0}):
    rows = [{'name': name, 'metrics': {'knn_fp': 10.0, 'probe_fp': 30.0}} for name in 'ab']
    rows[1]['metrics'] |= own
    efficient_ssl.draw(config, rows, curves, tmp_path / 'drawn.png')
    widths.append(imread(tmp_path / 'drawn.png').shape[1])
  assert widths[1] == 2 * widths[0]


def test_a_run_compares_one_view_with_two(tmp_path):
  changes = ['recipe.epochs=1', 'recipe.batch_size=256', 'recipe.eval_every=5', 'log_every=5']
  changes += ['runs=single_branch,simsiam', 'data.test_options={"pastes": 1}', 'timed=0']
  config = tiny_config(*changes)
  launcher.check(config)
  found = efficient_ssl.run(config, tmp_path)
  assert [row['name'] for row in found['rows']] == ['untrained', 'single branch', 'SimSiam']
  assert all(0 <= row['metrics']['knn_early'] <= 100 for row in found['rows'][1:])
  assert (tmp_path / 'neighbors_and_costs.png').stat().st_size > 1000
  assert (tmp_path / 'curves.png').stat().st_size > 1000
  again = dataclasses.replace(config, bank=dataclasses.replace(config.bank, momentum=0.6))
  with pytest.raises(ValueError, match=r'bank\.momentum'):
    efficient_ssl.run(again, tmp_path)
