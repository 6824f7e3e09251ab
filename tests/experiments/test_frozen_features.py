import jax
import jax.numpy as jnp
import numpy as np
import pytest
from frozen_feature_settings import save_features, tiny
from models.random_variables import run_capture
from safetensors import numpy as safetensors_numpy

from experiments.harness import launcher
from experiments.protocols import draws, frozen_features
from experiments.protocols.draws import Methods
from jaxlab import data, models


def tasks(config, folder):
  return {task.name: task for task in frozen_features.tasks(config, folder)}


def test_tasks_are_representations_times_shots(tmp_path):
  config = launcher.load('ibm2', 'embedded')
  found = tasks(config, tmp_path)
  assert tuple(found) == config.task_names
  assert config.task_names == ('raw_1shot', 'raw_5shot', 'relu_1shot', 'relu_5shot')
  assert {claim.metric.split('shot_')[0] + 'shot' for claim in config.claims} == set(found)
  for name, task in found.items():
    shots = int(name.split('_')[1].removesuffix('shot'))
    assert task.labels.shape == (4, 10 * shots) and task.num_classes == 10
    assert task.facts.test_examples == len(task.test_features) == 500
    np.testing.assert_allclose(np.linalg.norm(task.features, axis=-1), 1, rtol=1e-5)
    assert np.all(np.sort(task.labels, 1) == np.repeat(np.arange(10), shots))
  # The draws differ, and the features of a draw are those of its labels.
  assert not np.array_equal(found['raw_1shot'].features[0], found['raw_1shot'].features[1])
  assert frozen_features.nominal_facts(config)[:3] == found['relu_5shot'].facts[:3]


def test_all_training_images_are_a_task_too(tmp_path):
  found = tasks(tiny(shots=(1, 0)), tmp_path)
  assert found['raw_all'].features.shape == (2, 1297, 64)
  np.testing.assert_array_equal(*found['raw_all'].labels)
  assert found['raw_1shot'].features.shape == (2, 10, 64)


def test_random_relu_features_are_those_of_the_formula():
  sources = {split: data.load('digits', split) for split in ('train', 'test')}
  found = frozen_features.pixels(tiny(), 'relu', sources)
  train = found['train_features']
  assert train.shape == (1297, 256) and found['test_features'].shape == (500, 256)
  assert len(found['test_labels']) == 500
  assert 0.3 < np.mean(train == 0) < 0.7  # centered inputs: half of the units are off
  # Before the ReLU: variance |x - mean|^2 / 16 + 0.09.
  flat = sources['train'].arrays['image'].reshape(1297, -1) / 255
  variance = np.mean(np.sum((flat - flat.mean(0)) ** 2, 1)) / 16 + 0.09
  assert abs(np.mean(train**2) / (variance / 2) - 1) < 0.1


def small_network(folder, feature='output', **model):
  """Returns settings of a small network on digits, its weights' file among others' weights, and variables."""
  fields = {'name': 'vit_tiny_patch4_8', 'width': 8, 'depth': 1, 'num_heads': 2, **model}
  backbone = {
    'model': fields, 'feature': feature, 'prefix': 'encoder.', 'ignore': ('fc.*',),
    'weights': str(folder / 'weights.safetensors'),
  }  # fmt: skip
  config = tiny(
    representations=('network',), backbone=backbone, shots=(1, 2), eval_batch_size=8,
    data__mean=0.5, data__std=0.5,
  )  # fmt: skip
  shapes = models.abstract_variables(config.backbone.make(), (8, 8, 1))
  rng = np.random.default_rng(0)
  variables = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32), shapes)
  state = {f'encoder.{name}': value for name, value in models.to_torch(variables).items()}
  state['encoder.fc.weight'], state['teacher.x'] = np.zeros((2, 2)), np.zeros(2)
  safetensors_numpy.save_file(state, config.backbone.weights)
  return config, variables


@pytest.mark.parametrize('feature', ['output', 'token_before_norm'])
def test_a_network_gives_cached_features_of_the_images_drawn(tmp_path, feature):
  config, variables = small_network(tmp_path, feature)
  launcher.check(config)
  found = tasks(config, tmp_path)
  assert list(found) == ['network_1shot', 'network_2shot']
  assert found['network_2shot'].features.shape == (2, 20, 8)
  assert frozen_features.dimension(config) == 8
  norms = np.linalg.norm(found['network_2shot'].features, axis=-1)
  np.testing.assert_allclose(norms, 1, rtol=1e-5)
  with np.load(tmp_path / 'features.npz') as file:
    assert len(file['train_features']) <= 40 and len(file['test_features']) == 500

  # By hand: the first image of each class of the second draw.
  source = data.load('digits', 'train')
  order = data.few_shot_draws(config.seed, source, 2, 2, 10)[1]
  images = source.arrays['image'][order[:, 0]]
  x = data.normalize(data.to_float(images), 0.5, 0.5)
  expected, blocks = run_capture(config.backbone.make(), variables, ['blocks_0'], x)
  expected = expected if feature == 'output' else blocks['blocks_0'][:, 0]
  expected = np.asarray(expected / np.linalg.norm(expected, axis=1, keepdims=True))
  np.testing.assert_allclose(found['network_1shot'].features[1], expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(found['network_1shot'].labels[1], np.arange(10))


@pytest.mark.exhaustive
def test_the_token_before_the_norm_is_that_of_the_last_of_scanned_blocks(tmp_path):
  images = jnp.asarray(np.random.default_rng(1).integers(0, 256, (8, 8, 8, 1)), jnp.uint8)
  config, variables = small_network(tmp_path, 'token_before_norm', depth=2)
  scanned, _ = small_network(tmp_path, 'token_before_norm', depth=2, scan=True)
  stacked = {'params': models.stack_blocks(variables['params'])}
  found = []
  for own, given in ((config, variables), (scanned, stacked)):
    function, (_, batch) = frozen_features.programs(own)['features'].make(own.mesh.make())
    assert batch['image'].shape == images.shape
    found.append(function(given, {'image': images}))
  np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)


def test_what_is_missing_is_said_before_anything_is_computed(tmp_path, monkeypatch):
  config, _ = small_network(tmp_path)
  (tmp_path / 'weights.safetensors').unlink()
  monkeypatch.setattr(frozen_features, 'pixels', lambda *_: pytest.fail('pixels are computed'))
  found = tiny(
    representations=('raw', 'network'), backbone__model={'name': 'resnet18'},
    backbone__published='example.org',
  )  # fmt: skip
  message = r"backbone.weights='': .* resnet18 needs --config.backbone.weights=FILE .*: example.org"
  for own, text in ((config, 'weights.safetensors.: there is no such file'), (found, message)):
    with pytest.raises(ValueError, match=text):
      next(frozen_features.tasks(own, tmp_path))


def test_all_problems_of_settings_are_told_with_their_names():
  pairs = [
    'shots=(1,1)', 'features_shots=()', 'draws=0', 'relu.units=0', 'representations=(raw,raw,network)',
    'data.num_classes=1',
  ]  # fmt: skip
  with pytest.raises(ValueError) as caught:
    launcher.check(launcher.load('ibm2', 'embedded', pairs))
  for text in (
    'shots=(1, 1): expected different numbers', 'features_shots=(): expected', 'draws=0: expected',
    'relu.units=0: expected', 'representations=', 'data.num_classes=1: expected', 'backbone: missing',
  ):  # fmt: skip
    assert f'\n  {text}' in str(caught.value), text
  with pytest.raises(
    ValueError, match=r'shots=200 of each of 10 classes exceed data.train_size=1297'
  ):
    launcher.check(tiny(shots=(200,)))
  with pytest.raises(ValueError, match=r"representations=\('fourier',\): expected .*'raw', 'relu'"):
    tiny(representations=('fourier',))


@pytest.mark.parametrize(
  ('pair', 'message'),
  [
    ("backbone.feature='patches'", "expected one of 'output', 'token_before_norm'"),
    ('backbone.model.name=vit_smal', 'backbone.model: '),
    ('backbone.model.name=resnet50', r'ResNet has no class token'),
    ('backbone.ignore=["(fc"]', 'backbone.ignore: .* is no regular expression'),
    ('data.image_size=192', r'the network sees all images alike'),
    ('data.train_decode.resize=224', r'the network sees all images alike'),
  ],
)
def test_networks_without_such_features_are_refused(pair, message):
  with pytest.raises(ValueError, match=message):
    launcher.check(launcher.load('ibm2', 'imagenet_msn_vit_small', [pair]))


@pytest.mark.parametrize(
  ('arrays', 'shots', 'message'),
  [
    ({'test_labels': None}, (0,), r"own.npz lacks \['test_labels'\]"),
    ({'train_labels': np.arange(4) % 3}, (0,), r'own.npz: .* train_labels \(4,\)'),
    ({'train_features': np.full((12, 6), np.nan)}, (0,), 'train_features holds .* not finite'),
    (
      {'train_features': np.ones((1, 6)), 'train_labels': np.zeros(1, int)}
      | {'test_labels': np.zeros(30, int)},
      (0,),
      r'own_all: 1 training features of 1 class\(es\)',
    ),
    (
      {'train_labels': np.zeros(12, int), 'test_labels': np.zeros(30, int)},
      (0,),
      r'own_all: 12 training features of 1 class\(es\)',
    ),
    ({}, (5,), r'features_shots=\(5,\): class 0 has 4 images, fewer than num_shots 5'),
    ({'train_labels': np.arange(12) % 3 * 2}, (0,), r'train_labels: class 1 of 0..4 has no rec'),
    ({'test_labels': np.arange(30) % 4}, (0,), r'test_labels: 7 labels are out of range 0..2'),
  ],
)
def test_features_that_make_no_problem_raise(tmp_path, arrays, shots, message):
  path = save_features(tmp_path / 'own.npz', **arrays)
  with pytest.raises(ValueError, match=message):
    next(frozen_features.tasks(tiny(features=path, features_shots=shots), tmp_path))


def test_own_features_need_every_class_in_training_only(tmp_path):
  labels = np.arange(30) % 3
  path = save_features(tmp_path / 'own.npz', test_labels=np.minimum(labels, 1))
  (task,) = frozen_features.tasks(tiny(features=path), tmp_path)
  assert task.name == 'own_all'
  assert task.num_classes == 3 and set(task.test_labels) == {0, 1}


def test_methods_are_fitted_on_all_draws_and_judged_together(tmp_path):
  path = save_features(tmp_path / 'own.npz')
  config = tiny(features=path, features_shots=(2,), draws=3)
  (task,) = frozen_features.tasks(config, tmp_path)

  def last(mesh, key, x, y):
    assert mesh.size == 8
    return x[-1], jax.random.normal(key)

  def judge(mesh, key, train, test, fitted):
    assert train[0].shape == (6, 6) and test[0].shape == (30, 6) and test[1].shape == (30,)
    end, drawn = fitted['last']
    return {'end': end, 'label': train[1][-1], 'drawn': drawn, 'scale': jnp.sum(fitted['sum'])}

  methods = Methods({'last': last, 'sum': lambda mesh, key, x, y: jnp.sum(x)}, judge)
  solved = draws.solve(config, methods, task, jax.random.key(1))
  np.testing.assert_array_equal(solved.metrics['end'], task.features[:, -1])
  np.testing.assert_array_equal(solved.metrics['label'], task.labels[:, -1])
  assert len(set(solved.metrics['drawn'].tolist())) == 3 and set(solved.seconds) == {'last', 'sum'}
  np.testing.assert_allclose(solved.fitted['sum'], task.features.sum((1, 2)), rtol=1e-5)
  found = draws.spread('scale', solved.metrics['scale'])
  assert found == {
    'scale': np.mean(solved.metrics['scale']), 'scale_std': np.std(solved.metrics['scale'])
  }  # fmt: skip
