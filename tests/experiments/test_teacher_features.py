"""Features kept in a file: of one network and one data set, and fit for use."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from experiments import feature_mimicking
from experiments.harness import launcher
from experiments.protocols import distillation, teacher_features
from jaxlab import data, models


def pair():
  """Returns a tiny network's section, module and variables."""
  config = launcher.load(
    'feature_mimicking',
    'embedded',
    ["teacher.model={'name': 'mlp', 'hidden': (6,)}", 'eval_batch_size=32'],
  )
  model = distillation.network(config.teacher)
  return config, model, model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))


def source(count=40, changed=False):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (count, 8, 8, 1), np.uint8)
  if changed:
    images[3, 2, 2] ^= 1
  return data.InMemory({'image': images, 'label': np.arange(count) % 10}, 10)


def kept(file, config, model, variables, records, key=None):
  own = config.student
  given = own.data, own.task, model, variables, records, key
  calls = []

  def make():
    calls.append(None)
    return teacher_features.compute(config, *given)

  found = teacher_features.cached(file, teacher_features.fingerprints(*given), make)
  return found, len(calls)


def test_features_are_computed_once_and_are_those_in_front_of_the_classifier(tmp_path):
  config, model, variables = pair()
  file = tmp_path / 'folder' / 'features.npz'
  first, made = kept(file, config, model, variables, source())
  again, remade = kept(file, config, model, variables, source())
  assert (made, remade) == (1, 0) and first.keys() == again.keys()
  for name in first:
    np.testing.assert_array_equal(first[name], again[name])
  kernel, bias = (variables['params']['fc'][name] for name in ('kernel', 'bias'))
  np.testing.assert_allclose(first['features'] @ kernel + bias, first['logits'], atol=1e-5)
  assert not list(file.parent.glob('*.partial'))


@pytest.mark.parametrize(
  ('change', 'message'),
  [('weights', 'of other weights'), ('data', 'other images'), ('inputs', 'augmented otherwise')],
)
def test_a_file_of_another_network_or_of_other_data_is_refused(tmp_path, change, message):
  config, model, variables = pair()
  kept(tmp_path / 'features.npz', config, model, variables, source(), jax.random.key(0))
  if change == 'weights':
    variables = jax.tree.map(lambda leaf: leaf.at[0].add(1e-3), variables)
  key = jax.random.key(int(change == 'inputs'))
  records = source(changed=change == 'data')
  with pytest.raises(ValueError, match=f'features.npz holds features of .*{message}'):
    kept(tmp_path / 'features.npz', config, model, variables, records, key)


def test_networks_of_other_fields_are_others_whatever_their_variables():
  model = models.create(
    'vit_tiny_patch4_16', image_size=16, width=16, depth=2, num_heads=2, num_classes=None
  )
  variables = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
  mark = lambda **fields: teacher_features.network_fingerprint(model.clone(**fields), variables)  # noqa: E731
  assert len({mark(), mark(num_heads=4), mark(epsilon=1e-2), mark(activation='quick_gelu')}) == 4
  assert mark() == mark(remat=True) == mark(name='teacher')
  # A function as a field is told by its name, not by where it lies in memory.
  nets = [models.create('mlp', hidden=(6,)) for _ in range(2)]
  assert len({teacher_features.network_fingerprint(own, {}) for own in nets}) == 1
  kinds = [Activated(own) for own in (nn.relu, jax.nn.relu6, jnp.tanh, jax.nn.tanh)]
  assert len({teacher_features.network_fingerprint(own, {}) for own in kinds}) == 3


class Activated(nn.Module):
  activation: Callable


def test_a_damaged_file_is_written_anew(tmp_path):
  config, model, variables = pair()
  file = tmp_path / 'features.npz'
  found, _ = kept(file, config, model, variables, source())
  file.write_bytes(file.read_bytes()[:200])
  with pytest.warns(UserWarning, match='cannot be read'):
    again, made = kept(file, config, model, variables, source())
  assert made == 1
  np.testing.assert_array_equal(found['features'], again['features'])


def test_a_source_on_disk_is_told_by_its_number_its_labels_and_a_sample_of_its_records():
  class Lazy:
    def __init__(self, records, labels=None):
      self.records, self.num_classes = records, 10
      self.labels = records.arrays['label'] if labels is None else labels

    def __len__(self):
      return len(self.records)

    def __getitem__(self, index):
      return self.records[index]

  mark = teacher_features.source_fingerprint
  assert mark(Lazy(source())) == mark(Lazy(source()))
  others = [Lazy(source(41)), Lazy(source(changed=True)), Lazy(source(), np.zeros(40, np.int32))]
  assert len({mark(own) for own in [Lazy(source()), *others]}) == 4


@pytest.mark.parametrize(
  ('features', 'message'),
  [
    (np.array([[1.0, 2.0], [np.nan, 1.0]]), 'not finite, the first is record 1'),
    (np.zeros((3, 2)), 'all 0'),
    (np.ones((3, 2)), 'the same for all 3 records'),
  ],
)
def test_features_of_no_use_are_refused(tmp_path, features, message):
  with pytest.raises(ValueError, match=message):
    teacher_features.require_features(features)
  marks = {'teacher': 'a', 'data': 'b', 'inputs': 'c'}
  with pytest.raises(ValueError, match=message):
    teacher_features.cached(tmp_path / 'f.npz', marks, lambda: {'features': features})
  assert not list(tmp_path.iterdir())


def test_a_few_features_of_zeros_are_said(capsys):
  teacher_features.require_features(np.array([[0.0, 0.0], [1.0, 0.0]]))
  assert '1 of 2 records have none but zeros' in capsys.readouterr().out


def test_a_run_refuses_a_folder_of_another_teachers_features(tmp_path):
  config, model, variables = pair()
  config = dataclasses.replace(config, features_dir=str(tmp_path / 'shared'))
  given = config, model, variables, source(), tmp_path
  feature_mimicking.taught_features(*given)
  other = jax.tree.map(lambda leaf: -leaf, variables)
  with pytest.raises(ValueError, match='another network'):
    feature_mimicking.taught_features(config, model, other, source(), tmp_path)
