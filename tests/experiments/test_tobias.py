import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import tobias
from experiments.harness import launcher
from experiments.harness.settings import SettingsError
from experiments.protocols import objectness, pretraining
from jaxlab import data, localization, models

NET = "'stem': 'identity', 'stage_sizes': (1, 1, 1), 'widths': (2, 3, 4), 'strides': (1, 2, 2)"
NET = f"{{'name': 'cifar_resnet18', {NET}}}"
TINY = (
  "model={'name': 'cifar_resnet18', 'stage_sizes': (1,), 'width': 4, 'strides': (4,)}",
  'heads.hidden=8',
  'heads.features=8',
  f'localization.net.model={NET}',
  'localization.net.features=layer3_0',
  'localization.networks=1',
  'localization.data.test_options.length=12',
  f'merging.net.model={NET}',
  'merging.net.features=layer3_0',
  'recipe.batch_size=64',
  'target.queue_size=64',
)
PLAIN = (
  *('augment.scale=(1.0, 1.0)', 'augment.contrast=none', 'augment.brightness=none'),
  *('data.mean=0.0', 'data.std=1.0'),
)


def tiny_config(*changes):
  """Returns the embedded setting with networks that compile in seconds."""
  return launcher.load('tobias', 'embedded', [*TINY, *changes])


def batch(seed=0, count=6):
  rng = np.random.default_rng(seed)
  image = jnp.asarray(rng.integers(0, 256, (count, 32, 32, 1), np.uint8))
  score = jnp.asarray(rng.normal(size=(count, 4, 4)), jnp.float32)
  return jax.random.split(jax.random.key(seed), count), image, score


def test_the_first_view_alone_has_another_background():
  keys, image, score = batch()
  always = tiny_config('merging.probability=1.0', *PLAIN)
  first, second = jax.jit(tobias.draw_views(always, 'tobias'))(keys, image, score)
  np.testing.assert_allclose(second, data.to_float(image), atol=1e-6)
  cells = np.asarray(first).reshape(6, 4, 8, 4, 8).swapaxes(2, 3).reshape(6, 16, -1)
  own = np.asarray(second).reshape(6, 4, 8, 4, 8).swapaxes(2, 3).reshape(6, 16, -1)
  stayed = np.abs(cells - own).max(-1) < 1e-5
  best = np.argsort(-np.asarray(score).reshape(6, 16), axis=1)[:, :8]
  assert np.take_along_axis(stayed, best, 1).all()
  assert np.sum(~stayed) > 0 and set(np.sum(~stayed, 1)) <= {*range(9)}


@pytest.mark.parametrize('kind', ['tobias', 'random'])
def test_without_a_change_the_views_are_those_of_the_base_method(kind):
  keys, image, score = batch(1)
  never = tiny_config('merging.probability=0.0')
  expected = jax.jit(pretraining.two_views(never))(keys, image)
  given = (score,) if kind == 'tobias' else ()
  for found, view in zip(
    jax.jit(tobias.draw_views(never, kind))(keys, image, *given), expected, strict=True
  ):
    np.testing.assert_allclose(found, view, rtol=1e-5, atol=1e-5)


@pytest.mark.exhaustive
def test_maps_are_channel_sums_of_a_network_with_the_statistics_it_begins_with():
  own = tiny_config('localization.net.size=16').localization
  scenes = data.in_memory(
    data.Scenes(data.Digits('test', test_size=5), canvas=64, side=20, annotations=False)
  )
  maps = objectness.mapper(tiny_config(), own.net, own.data, localization.channel_sum)
  found = maps(jax.random.key(3), scenes, 'test')
  model = models.create(**own.net.model, num_classes=None)
  variables = jax.jit(model.init)(jax.random.key(3), jnp.zeros((1, 16, 16, 1)))
  x = (scenes.arrays['image'] / 255 - own.data.mean) / own.data.std
  x = jax.image.resize(jnp.asarray(x, jnp.float32), (5, 16, 16, 1), 'bilinear')
  _, features = models.capture(model, variables, ['layer3_0'], x, train=False)
  np.testing.assert_allclose(found, np.sum(features['layer3_0'], -1), rtol=1e-4, atol=1e-5)
  broken = jax.tree.map(lambda leaf: leaf * jnp.nan, variables)
  with pytest.raises(ValueError, match='Features of the test images are NaN'):
    maps(broken, scenes, 'test')


def test_variants_change_the_network_or_its_map():
  own = launcher.load('tobias', 'cub200').localization
  nets = own.nets
  assert nets['random CNN'] == own.net
  assert nets['random CNN, arctan'].model['activation'] == 'arctan'
  assert nets['random CNN, arctan'].init == 'kaiming_tanh'
  assert nets['random CNN, conv1-2'].features == 'layer1_2'
  assert nets['random CNN, conv1-2'].model == own.net.model


@pytest.mark.parametrize('name', objectness.INITIALIZERS)
def test_kernels_are_drawn_with_the_deviation_of_their_rule(name):
  kernel = objectness.INITIALIZERS[name](jax.random.key(0), (3, 3, 40, 60), jnp.float32)
  fan_in, fan_out = 9 * 40, 9 * 60
  variance = {
    'kaiming_normal': 2 / fan_out,
    'kaiming_uniform': 2 / fan_out,
    'kaiming_tanh': (5 / 3) ** 2 / fan_out,
    'xavier_normal': 2 / (fan_in + fan_out),
    'xavier_uniform': 2 / (fan_in + fan_out),
    'normal': 0.01,
    'uniform': 0.2**2 / 12,
  }[name]
  np.testing.assert_allclose(np.var(kernel), variance, rtol=0.05)
  limit = np.abs(kernel).max() / np.sqrt(3 * variance)
  assert limit <= 1 if name.endswith('uniform') else limit > 1.5


@pytest.mark.parametrize(
  ('changes', 'messages'),
  [
    (
      (
        *('runs=base,tobia', 'merging.probability=1.5', 'merging.pooling=max'),
        *('localization.threshold=1.0', 'localization.networks=0', 'target.queue_size=65'),
        "localization.variants={'elu': {'activation': 'elu'}}",
      ),
      (
        *('tobia', 'probability=1.5', 'make no grid of 4', 'threshold=1.0', 'networks=0', 'elu'),
        'target.queue_size=65: expected a multiple',
      ),
    ),
    (
      ('localization=none', 'runs=()', 'merging.grid=3', 'recipe.batch_size=1'),
      ('nothing is done', '9 cells have no half', 'no grid of 3', 'batch_size of 2 or more'),
    ),
    (
      ('localization=none', 'merging.net.features=layer9', 'merging.num_foreground=16'),
      ('layer9', 'num_foreground=16'),
    ),
    (('localization=none', 'merging.net.features=avgpool'), ('is no map of features',)),
  ],
)
def test_impossible_settings_are_named_all_at_once(changes, messages):
  with pytest.raises(SettingsError) as caught:
    launcher.check(tiny_config(*changes, 'claims=()'))
  for message in messages:
    assert message in str(caught.value)


def test_a_run_boxes_objects_and_pretrains_with_scores_of_every_image(tmp_path):
  changes = (
    *(
      'recipe.epochs=1',
      'recipe.schedule.warmup_epochs=0',
      'runs=tobias,',
      'eval.k=5',
      'log_every=1',
    ),
    *('data.train_size=128', 'data.train_options.pastes=none', 'data.train_options.length=128'),
    *(
      'data.test_options.pastes=none',
      'data.test_options.length=64',
      'merging.net.size=none',
      'eval.calibration=64',
    ),
  )
  config = tiny_config(*changes, 'localization.variants={}', 'eval_batch_size=64', 'claims=()')
  launcher.check(config)
  found = tobias.run(config, tmp_path)
  rows = {row['name']: row['metrics'] for row in found['rows']}
  assert list(rows) == [
    *('any half of the cells', 'center box', 'raw pixels', 'random CNN', 'untrained'),
    'MoCo v2, Tobias',
  ]
  assert 0 <= rows['random CNN']['corloc'] <= 100 and 0 < rows['random CNN']['inside'] < 100
  # In NumPy: the box in the middle against the squares that were pasted.
  scenes = data.load('digit_scenes', 'test', **config.localization.data.test_options)
  boxes = np.stack([scenes[i]['boxes'][0] for i in range(12)]).astype(float)
  side = 64 * np.sqrt(0.5)
  low, high = (64 - side) / 2, (64 + side) / 2
  sides = np.minimum(boxes[:, 2:], high) - np.maximum(boxes[:, :2], low)
  shared = np.prod(np.maximum(sides, 0), 1)
  iou = shared / (np.prod(boxes[:, 2:] - boxes[:, :2], 1) + side**2 - shared)
  np.testing.assert_allclose(rows['center box']['iou'], iou.mean(), rtol=1e-5)
  np.testing.assert_allclose(rows['center box']['corloc'], 100 * np.mean(iou > 0.5))
  assert (tmp_path / 'localization.png').stat().st_size > 10000
  assert (tmp_path / 'curves.png').stat().st_size > 1000
