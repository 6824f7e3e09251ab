import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close

from experiments import dldl_v2
from experiments.harness import launcher, runs
from experiments.harness.settings import SettingsError
from experiments.protocols import ordinal
from jaxlab import losses, models

TINY = (
  "model={'name': 'convnet', 'widths': (4,), 'pools': 4, 'hidden': (8,)}", 'recipe.epochs=1',
  'further.epochs=1', 'data.train_size=32', 'data.train_options.length=32', 'data.test_options.length=24',
  'recipe.batch_size=16', 'further.batch_size=16', 'recipe.schedule.milestones=(0.5,)',
  'further.schedule.milestones=(0.5,)',
)  # fmt: skip


def tiny_config(*changes):
  return launcher.load('dldl_v2', 'embedded', [*TINY, *changes])


def test_rows_learn_by_the_losses_that_they_name():
  config = tiny_config()
  rng = np.random.default_rng(0)
  y, labels = jnp.asarray(rng.uniform(-40, 40, 3), jnp.float32), config.data.labels
  targets = {'value': y, 'sigma': jnp.array([1.0, 3.0, 0.5])}
  of = lambda outputs, **own: dldl_v2.objective(config, dldl_v2.Learner(**own))(  # noqa: E731
    outputs, targets, None
  )
  z = jnp.asarray(rng.normal(size=(3, 101)), jnp.float32)
  p = losses.gaussian_label_distribution(y, targets['sigma'], labels)
  divergence = jnp.sum(jax.scipy.special.xlogy(p, p) - p * jax.nn.log_softmax(z), -1)
  error = jnp.abs(jax.nn.softmax(z) @ labels - y)
  assert_close(of(z, loss='dldl', kl_reduction='batch'), divergence, 1e-5)
  assert_close(of(z, weight=0.5, kl_reduction='batch'), divergence + 0.5 * error, 1e-5)
  assert_close(of(z, weight=0.5), divergence / 101 + 0.5 * error, 1e-5)
  assert_close(of(z, loss='expectation', weight=2.0), 2 * error, 1e-5)
  assert_close(of(z, loss='dex'), losses.dex_loss(z, y, labels), 1e-6)
  assert_close(of(z[:, :100], loss='rank'), losses.ranking_loss(z[:, :100], y, labels), 1e-6)
  assert_close(of(z[:, :1], loss='l2'), (jnp.tanh(z[:, 0]) - y / 50) ** 2, 1e-5)


def test_predictions_undo_what_the_losses_ask_for():
  config = tiny_config()
  y = jnp.array([-50.0, -7.0, 0.0, 33.0])
  labels = config.data.labels
  of = lambda loss: dldl_v2.task(config, dldl_v2.Learner(loss=loss))  # noqa: E731
  unit = jnp.arctanh(jnp.clip(losses.to_unit_range(y, labels), -0.9999999, 1))[:, None]
  assert_close(of('l1').predict(unit), y, 1e-5, 1e-4)
  code = 20 * (losses.rank_code(y, labels) - 0.5)
  np.testing.assert_array_equal(of('rank').predict(code), y)
  sharp = jnp.log(losses.gaussian_label_distribution(y, 0.2, labels) + 1e-20)
  assert_close(of('dldl').predict(sharp), y, 1e-4, 1e-3)
  assert [of(loss).num_outputs for loss in ('l1', 'rank', 'dex')] == [1, 100, 101]


def test_the_second_phase_starts_from_the_first_without_the_last_bias():
  config = tiny_config('runs=["DLDL-v2, two phases"]')
  assert config.chosen == ['DLDL', 'DLDL-v2, two phases']
  first, second = dldl_v2.programs(config).values()
  assert second.decides['before'] == first.identity
  state = jax.jit(first.program.init)(jax.random.key(0))
  given = jax.tree.map(lambda leaf: leaf + 1, runs.variables_of(state))
  start = dldl_v2.without_bias(given)
  taken = runs.take_over(jax.jit(second.program.init)(jax.random.key(1)), start)
  assert not np.any(taken.params['fc']['bias'])
  for name in ('fc0', 'conv0'):
    np.testing.assert_array_equal(taken.params[name]['kernel'], given['params'][name]['kernel'])
  np.testing.assert_array_equal(taken.params['fc0']['bias'], given['params']['fc0']['bias'])
  np.testing.assert_array_equal(taken.params['fc']['kernel'], given['params']['fc']['kernel'])


def test_a_run_compares_errors_and_draws_them(tmp_path):
  rows = ('DLDL', 'DLDL-v2, two phases')
  config = tiny_config(f'runs={list(rows[1:])}', 'mirror=True', 'claims=()', 'pictured=()')
  found = launcher.launch(config, tmp_path)
  assert [row['name'] for row in found['rows']] == list(rows)
  for row in found['rows']:
    metrics = row['metrics']
    assert 0 < metrics['mae'] <= metrics['rmse'] <= 100
    assert 0 <= metrics['epsilon_error'] <= 1 and 0 <= metrics['cs3'] <= metrics['cs8'] <= 100
  assert (tmp_path / 'predictions.png').stat().st_size > 1000


def test_a_prediction_is_the_mean_of_image_and_mirror_image():
  config = tiny_config()
  own = config.learners['DLDL']
  model, task = dldl_v2.network(config, own), dldl_v2.task(config, own)
  source = dldl_v2.harness_data.load(config.data, 'test')
  images = task.inputs({'image': source.arrays['image']})
  variables = jax.jit(model.init)(jax.random.key(0), images)
  predict = functools.partial(ordinal.predict, config, config.data, model, task, source, variables)
  plain, both = predict(), predict(mirror=True)
  other = task.predict(jax.jit(model.apply)(variables, images[:, :, ::-1]))
  assert_close(both['value'], (plain['value'] + other) / 2, 1e-4, 1e-4)
  np.testing.assert_array_equal(plain['truth'], source.arrays['value'])
  found = ordinal.measures(plain)
  assert_close(found['mae'], np.abs(plain['value'] - plain['truth']).mean(), 1e-6)


@pytest.mark.exhaustive
def test_faces_are_changed_in_the_order_of_the_official_code():
  own = ordinal.Augment(flip=0.5, grayscale=0.5, rescale=12, rotation=15.0, jitter=0.4)
  image = jnp.asarray(np.random.default_rng(0).random((16, 16, 3)), jnp.float32)
  keys = jax.random.split(jax.random.key(0), 40)
  found = jax.jit(jax.vmap(lambda key: own.apply(key, image)))(keys)
  assert found.shape == (40, 16, 16, 3) and np.all((found >= 0) & (found <= 1))
  gray = np.ptp(found, axis=-1).max((1, 2)) < 1e-4
  assert 8 < gray.sum() < 32
  np.testing.assert_array_equal(jax.jit(ordinal.Augment().apply)(keys[0], image), image)
  flipped = jax.vmap(lambda key: ordinal.Augment(flip=0.5).apply(key, image))(keys)
  mirrored = np.all(flipped == image[:, ::-1], (1, 2, 3))
  assert np.all(mirrored | np.all(flipped == image, (1, 2, 3))) and 8 < mirrored.sum() < 32


@pytest.mark.parametrize(('name', 'millions'), [('thin_agenet', 3.71), ('tiny_agenet', 0.93)])
def test_slim_networks_have_the_published_size(name, millions):
  image = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
  tree = jax.eval_shape(models.create(name).init, jax.random.key(0), image)['params']
  assert round(sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6, 2) == millions


def test_weights_of_another_network_are_taken_over_but_for_the_last_layer(tmp_path):
  small = {'name': 'tiny_agenet', 'widths': (4, 4, 4, 4, 4)}
  changes = [f'model={small}', f'weights={tmp_path}/faces.npz', 'runs=DLDL,']
  config = launcher.load('dldl_v2', 'chalearn15', changes)
  model = models.create(**{**small, 'num_classes': 7})
  variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  np.savez(tmp_path / 'faces.npz', **models.to_torch(variables))
  start = dldl_v2.beginning(config)
  assert 'head' not in start['params']
  for name in ('conv1', 'blocks_4_2'):
    own, given = (jax.tree.leaves(tree['params'][name]) for tree in (start, variables))
    for a, b in zip(own, given, strict=True):
      np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (('learners={}',), 'learners is empty'),
    (('runs=DLDL,GAN',), 'GAN'),
    (("learners={'a': {'after': 'b'}}",), "learners.a: after='b': expected another row"),
    (("learners={'a': {'after': 'b'}, 'b': {'after': 'a'}}",), 'no circle'),
    (("learners={'a': {'after': 'b'}, 'b': {'loss': 'l1'}}",), 'other outputs'),
    (("learners={'a': {'weight': -1.0}}",), 'learners.a.weight=-1.0'),
    (("learners={'a': {'kl_reduction': 'sum'}}",), 'kl_reduction'),
    (('data.grid=(0.0, 1.0, 0.3)',), 'steps from one end'),
    (('augment.flip=2',), 'augment.flip=2.0'),
    (('augment.rotation=-1',), 'rotation=-1.0'),
    (('recipe.batch_size=64',), 'exceeds data.train_size=32'),
    (("model={'name': 'thin_agenet'}",), '32'),
  ],
)
def test_impossible_settings_are_named(changes, message):
  with pytest.raises(SettingsError, match=message):
    launcher.check(tiny_config(*changes))
