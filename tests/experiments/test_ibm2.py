import functools
import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors import numpy as safetensors_numpy

from experiments import frozen_features, ibm2, launcher
from jaxlab import data, models, parallel

CONFIGS = sorted((launcher.CONFIGS / 'ibm2').glob('[!_]*.py'))
SHORT = {'search_epochs': 2, 'threshold_epochs': 20, 'tolerance': 3.0}


def tiny(**changes):
  """Returns the embedded setting with a search of two iterations."""
  config = launcher.load_config(launcher.CONFIGS / 'ibm2' / 'embedded.py')
  config.search.update(SHORT)
  config.train.epochs = 20
  config.num_copies = 3
  config.eval.num_copies = 2
  config.draws = 2
  config.representations = ('raw',)
  config.shots = (5,)
  config.update(changes)
  return config


def feature_file(path, **changes):
  """Writes features of three classes that are easy to tell apart."""
  rng = np.random.default_rng(0)
  arrays = {}
  for split, count in (('train', 12), ('test', 30)):
    labels = np.arange(count) % 3
    arrays[f'{split}_labels'] = labels
    arrays[f'{split}_features'] = 5 * np.eye(3, 6)[labels] + rng.standard_normal((count, 6))
  arrays.update(changes)
  np.savez(path, **{name: a for name, a in arrays.items() if a is not None})
  return str(path)


@functools.cache
def feature_shape(model, image):
  """Returns the shape of two images' features by the network of a configuration (as JSON)."""
  config = ConfigDict({'model': json.loads(model), 'data': {'mean': 0.0, 'std': 1.0}})
  module = frozen_features.network(config)
  images = jax.ShapeDtypeStruct((2, *image), np.uint8)
  fn = frozen_features.feature_fn(config, module)
  return jax.eval_shape(fn, models.abstract_variables(module, image), images).shape


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_setting_builds_and_traces(path):
  config = launcher.load_config(path)
  ibm2.check(config)
  dim = config.relu.units
  if 'network' in config.representations:
    assert config.data.train_decode == config.data.test_decode
    own = {
      name: v for name, v in config.model.items() if name not in ('weights', 'prefix', 'ignore')
    }
    shape = feature_shape(json.dumps(own, sort_keys=True), tuple(config.data.stored_image))
    assert shape == (2, 2048 if 'resnet' in config.model.name else 384)
    dim = shape[1]
  count = config.data.train_size if 0 in config.shots else config.data.num_classes
  own = ibm2.programs(config, config.data.num_classes, count)
  key = jax.eval_shape(lambda: jax.random.key(0))
  x = jax.ShapeDtypeStruct((count, dim), np.float32)
  y = jax.ShapeDtypeStruct((count,), np.int32)
  found = jax.eval_shape(own.ibm2, key, x, y)
  assert found.search.trace.shape == (8, 4)
  assert found.params['v'].shape == (config.data.num_classes, dim)


def test_a_pods_programs_lower_with_the_copies_split_over_the_mesh():
  config = launcher.load_config(launcher.CONFIGS / 'ibm2' / 'imagenet_msn_vit_small.py')
  with config.unlocked():
    config.model.depth = 1
    config.shots = (1,)
    config.draws = 2
  lowered = ibm2.lower(config, parallel.make_mesh())
  assert set(lowered) == {'features', 'ibm2', 'naive'}
  assert lowered['features'].out_info.shape == (config.eval_batch_size, 384)
  assert lowered['ibm2'].out_info.search.trace.shape == (2, 8, 4)
  assert 'sharding' in lowered['ibm2'].as_text()


def test_a_run_on_own_features_leaves_rows_claims_and_a_picture(tmp_path, capsys):
  config = tiny(features=feature_file(tmp_path / 'own.npz'))
  # Noise of a thousandth is fitted: the range is too small, and the search must say so.
  config.search.update(right=1e-3, tolerance=1e-3, search_epochs=40)
  with config.unlocked():
    claims = launcher.load_config(CONFIGS[0].parent / 'embedded.py').claims
    config.claims = [{**c, 'metric': c['metric'].replace('relu_5shot', 'own_all')} for c in claims]
  found = launcher.launch(ibm2.run, config, tmp_path / 'run')
  rows = {item['name']: item for item in found['rows']}
  assert rows['naive']['role'] == 'baseline' and rows['IbM2']['role'] == 'method'
  own = rows['IbM2']['metrics']
  assert own['own_all_accuracy'] > 90
  assert rows['class means']['metrics']['own_all_accuracy'] > 90
  np.testing.assert_allclose([own['own_all_epsilon'], own['own_all_width']], [7.5e-4, 5e-4])
  np.testing.assert_allclose(
    own['own_all_slack_below'],
    min(100 * a - 100 * t for a, t in zip(*values(found, 'train_accuracy_below'))),
    atol=1e-4,
  )
  assert own['own_all_seconds_ratio'] > 0
  assert np.shape(found['bisection']['own_all']['trace']) == (2, 1, 4)
  kinds = ('width', 'slack_below', 'slack_above', 'accuracy', 'noisy_accuracy')
  assert [c['metric'] for c in found['claims']] == [f'own_all_{kind}' for kind in kinds]
  assert json.loads((tmp_path / 'run' / 'results.json').read_text())['rows'] == found['rows']
  assert (tmp_path / 'run' / 'max_margin.png').stat().st_size > 10_000
  text = capsys.readouterr().out
  assert 'own_all (2 draws of 12, 6 channels)' in text
  assert 'epsilon is at the end of the range; raise search.right' in text


def values(found, name):
  return found['draws']['own_all'][name], found['draws']['own_all']['threshold']


def test_embedded_claims_are_about_the_tasks_of_the_embedded_setting(tmp_path):
  config = launcher.load_config(CONFIGS[0].parent / 'embedded.py')
  tasks = {task.name: task for task in frozen_features.tasks(config, tmp_path)}
  assert {c['metric'].rsplit('_', 2)[0] for c in config.claims} <= {
    prefix for name in tasks for prefix in (name, name.split('_')[0])
  }
  for name, task in tasks.items():
    shots = int(name.split('_')[1].removesuffix('shot'))
    assert task.labels.shape == (4, 10 * shots) and task.num_classes == 10
    np.testing.assert_allclose(np.linalg.norm(task.features, axis=-1), 1, rtol=1e-5)
    assert np.all(np.sort(task.labels, 1) == np.repeat(np.arange(10), shots))
  # The draws differ, and the features of a draw are those of its labels.
  assert not np.array_equal(tasks['raw_1shot'].features[0], tasks['raw_1shot'].features[1])


@pytest.mark.parametrize(
  'arrays, changes, message',
  [
    ({'test_labels': None}, {}, r"lacks \['test_labels'\]"),
    ({'train_labels': np.arange(4) % 3}, {}, r'train_labels \(4,\)'),
    ({'train_features': np.full((12, 6), np.nan)}, {}, 'not finite'),
    (
      {'train_features': np.ones((1, 6)), 'train_labels': np.zeros(1, int)}
      | {'test_labels': np.zeros(30, int)},
      {},
      r'1 training features of 1 class\(es\)',
    ),
    (
      {'train_labels': np.zeros(12, int), 'test_labels': np.zeros(30, int)},
      {},
      r'12 training features of 1 class\(es\)',
    ),
    ({}, {'features_shots': (5,)}, 'has 4 images, fewer than num_shots 5'),
    ({}, {'features_shots': ()}, r'features_shots=\(\): expected different numbers'),
    ({}, {'num_copies': 0}, 'num_copies=0 must be at least 1'),
    ({}, {'search': {**SHORT, 'right': 0.0}}, 'right=0.0 must be positive'),
    ({}, {'search': {**SHORT, 'right': 2.0}}, r'search.tolerance=3 is above search.right=2'),
    (
      {'train_labels': np.arange(12) % 3 * 2},
      {},
      r'own.npz: train_labels: class 1 of 0..4 has no rec',
    ),
    (
      {'test_labels': np.arange(30) % 4},
      {},
      r'own.npz: test_labels: 7 labels are out of range 0..2',
    ),
  ],
)
def test_features_that_make_no_problem_raise(tmp_path, arrays, changes, message):
  config = tiny(features=feature_file(tmp_path / 'own.npz', **arrays))
  with config.unlocked():
    for name, value in changes.items():
      if isinstance(value, dict):
        config[name].update(value)
      else:
        config[name] = value
  with pytest.raises(ValueError, match=message):
    ibm2.run(config, tmp_path)


def test_own_features_need_every_class_in_training_only(tmp_path):
  labels = np.arange(30) % 3
  config = tiny(features=feature_file(tmp_path / 'own.npz', test_labels=np.minimum(labels, 1)))
  (task,) = frozen_features.tasks(config, tmp_path)
  assert task.num_classes == 3 and set(task.test_labels) == {0, 1}


def test_missing_files_unknown_representations_and_features_raise(tmp_path):
  with pytest.raises(ValueError, match='there is no such file'):
    ibm2.run(tiny(features=str(tmp_path / 'none.npz')), tmp_path)
  with pytest.raises(ValueError, match="'fourier' is none of"):
    ibm2.run(tiny(representations=('fourier',)), tmp_path)
  config = launcher.load_config(launcher.CONFIGS / 'ibm2' / 'imagenet_dino_vit_small.py')
  with pytest.raises(ValueError, match=r"model.weights='': .* --config.model.weights=FILE"):
    frozen_features.weights(config, frozen_features.network(config))
  config.model.feature = 'patches'
  with pytest.raises(ValueError, match=r"model.feature='patches' is none of"):
    ibm2.check(config)


class Lazy:
  """A source whose labels are only in its records."""

  def __init__(self, labels):
    self.labels_, self.read = labels, 0
    self.num_classes, self.class_names = 3, tuple('abc')

  def __len__(self):
    return len(self.labels_)

  def __getitem__(self, index):
    self.read += 1
    return {'label': self.labels_[index], 'index': index}


def test_draws_hold_each_class_and_fewer_shots_are_a_part_of_more():
  labels = np.random.default_rng(0).integers(0, 3, 3000)
  for source in (labels, Lazy(labels)):
    order = frozen_features.draw_order(np.random.default_rng(1), source, 4, 3)
    assert order.shape == (3, 4) and len(set(order.reshape(-1))) == 12
    np.testing.assert_array_equal(labels[order], [[c] * 4 for c in range(3)])
    again = frozen_features.draw_order(np.random.default_rng(1), source, 2, 3)
    np.testing.assert_array_equal(again, order[:, :2])
  assert source.read < 200
  with pytest.raises(ValueError, match='1 classes have fewer images, the first is class 2 with 1'):
    frozen_features.draw_order(np.random.default_rng(1), Lazy(np.array([0, 0, 1, 1, 2])), 2, 3)


@pytest.mark.parametrize('feature', ['output', 'token_before_norm'])
def test_a_network_gives_cached_features_of_the_images_drawn(tmp_path, feature):
  config = launcher.load_config(launcher.CONFIGS / 'ibm2' / 'imagenet_msn_vit_small.py')
  small = tiny()
  with config.unlocked():
    config.model.update(
      name='vit_tiny_patch4_8', width=8, depth=1, num_heads=2, feature=feature, prefix='encoder.'
    )
    config.model.weights = str(tmp_path / 'weights.safetensors')
    config.data = {**small.data, 'mean': 0.5, 'std': 0.5}
    config.shots, config.draws, config.eval_batch_size = (1, 2), 2, 8
  model = frozen_features.network(config)
  shapes = models.abstract_variables(model, (8, 8, 1))
  rng = np.random.default_rng(0)
  variables = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32), shapes)
  state = {f'encoder.{name}': value for name, value in models.to_torch(variables).items()}
  state['encoder.fc.weight'], state['teacher.x'] = np.zeros((2, 2)), np.zeros(2)
  safetensors_numpy.save_file(state, config.model.weights)

  tasks = list(frozen_features.tasks(config, tmp_path))
  assert [task.name for task in tasks] == ['network_1shot', 'network_2shot']
  assert tasks[1].features.shape == (2, 20, 8)
  np.testing.assert_allclose(np.linalg.norm(tasks[1].features, axis=-1), 1, rtol=1e-5)
  with np.load(tmp_path / 'features.npz') as file:
    assert len(file['train_features']) <= 40 and len(file['test_features']) == 500

  # By hand: the first image of each class of the second draw.
  source = data.load('digits', 'train')
  order = frozen_features.draw_order(frozen_features.rng(config, 1), source, 2, 10)
  images = source.arrays['image'][order[:, 0]]
  x = data.normalize(data.to_float(images), 0.5, 0.5)
  expected, blocks = models.capture(model, variables, ['blocks_0'], x)
  expected = expected if feature == 'output' else blocks['blocks_0'][:, 0]
  expected = np.asarray(expected / np.linalg.norm(expected, axis=1, keepdims=True))
  np.testing.assert_allclose(tasks[0].features[1], expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(tasks[0].labels[1], np.arange(10))


def test_random_relu_features_are_those_of_the_formula():
  config = tiny()
  sources = {split: data.load('digits', split) for split in ('train', 'test')}
  (train, _), (test, labels) = frozen_features.pixels(config, 'relu', sources)
  assert train.shape == (1297, 256) and test.shape == (500, 256) and len(labels) == 500
  assert 0.3 < np.mean(train == 0) < 0.7  # centered inputs: half of the units are off
  # Before the ReLU: variance |x - mean|^2 / 16 + 0.09.
  flat = sources['train'].arrays['image'].reshape(1297, -1) / 255
  variance = np.mean(np.sum((flat - flat.mean(0)) ** 2, 1)) / 16 + 0.09
  assert abs(np.mean(train**2) / (variance / 2) - 1) < 0.1
