import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close

from experiments import tcs
from experiments.harness import launcher
from experiments.harness.settings import SettingsError
from experiments.protocols import coordinate_systems
from jaxlab import losses, models

TINY = (
  "teacher.model={'name': 'mlp', 'hidden': (12,)}",
  "student.model={'name': 'mlp', 'hidden': (5,)}",
  'teacher.augment.kind=none',
  'student.augment.kind=none',
  'teacher.recipe.epochs=2',
  'tutor.epochs=2',
  'student.recipe.epochs=3',
  'student.recipe.optimizer.weight_decay=0.0',
  "student.recipe.schedule={'name': 'constant', 'base': 0.1}",
  'coordinates.count=8',
  'coordinates.keep=3',
  'coordinates.rounds=2',
  'coordinates.end=1.0',
  'bits=21',
  'probed=2,8',
  'claims=()',
)


def tiny_config(*changes):
  return launcher.load('tcs', 'embedded', [*TINY, *changes])


@functools.cache
def found():
  features = np.random.default_rng(0).random((130, 12)).astype(np.float32)
  return features, coordinate_systems.space(tiny_config(), features)


def started(config, name):
  """Returns the program of a row, and what its state starts from."""
  own = tcs.programs(config)[name].program
  state = jax.jit(own.init)(jax.random.key(0))
  begin = tcs.start(config, config.rows[name], found()[1]).get('begin', lambda state: state)
  return own, begin(state)


def test_one_step_is_labels_in_coordinates_and_the_stored_bits_of_the_very_images():
  config, (features, space) = tiny_config(), found()
  own, state = started(config, 'elsh')
  rng = np.random.default_rng(1)
  index = rng.permutation(130)[:32].astype(np.int32)
  batch = {
    'image': jnp.asarray(rng.integers(0, 256, (32, 8, 8, 1), np.uint8)),
    'label': jnp.asarray(rng.integers(0, 10, 32), jnp.int32),
    'index': jnp.asarray(index),
  }
  x, backbone = (
    config.student.task.inputs(batch),
    models.create('mlp', hidden=(5,), num_classes=None),
  )

  def loss(params):
    head = params['head']
    f = backbone.apply({'params': params['backbone']}, x)
    u = f @ head['feat_fc']['kernel'] + head['feat_fc']['bias']
    z = (u - space.mean) @ space.axes['pca'] * head['mask']
    value = jnp.mean(
      losses.cross_entropy(z @ head['fc']['kernel'] + head['fc']['bias'], batch['label'])
    )
    given = space.stored['weight'], space.stored['bias']
    return value + 3.0 * jnp.mean(losses.lsh_loss(u, features[index], *given))

  new, metrics = jax.jit(own.step)(state, {'constants': space.stored}, batch)
  value, gradients = jax.value_and_grad(loss)(state.params)
  assert_close(metrics['loss'], value, 1e-5)
  moved = jax.tree.map(lambda old, now: (old - now) / 0.1, state.params, new.params)
  assert not moved['head'].pop('mask').any()
  mask = gradients['head'].pop('mask')
  for a, b in zip(*map(jax.tree.leaves, (moved, gradients)), strict=True):
    assert_close(a, b, 1e-3, 1e-5)
  assert np.abs(mask).min() > 0
  held = new.model_state['coordinates']['head']
  assert_close(held['mean'], space.mean, 1e-6)
  assert_close(held['components'], space.axes['pca'], 1e-6)


def test_a_space_has_orthonormal_axes_and_bits_that_are_balanced():
  features, space = found()
  for axes in space.axes.values():
    np.testing.assert_allclose(axes.T @ axes, np.eye(8), atol=1e-5)
  values = losses.hash_values(features, space.stored['weight'])
  assert 0.5 < float(jnp.mean(jnp.var(values, 0))) < 2
  bits = np.unpackbits(np.asarray(space.stored['bits']), axis=1, count=21)
  np.testing.assert_allclose(bits.sum(0), np.full(21, 65), atol=1)
  share = coordinate_systems.space(
    tiny_config('coordinates.count=None', 'coordinates.share=0.6'), features
  )
  assert share.axes['pca'].shape[1] == losses.num_components(space.variance, 0.6, 1) < 12


def test_few_images_have_few_axes_and_a_warning(capsys):
  config = tiny_config('coordinates.count=None')
  features = found()[0]
  assert coordinate_systems.space(config, features[:9]).axes['pca'].shape == (12, 8)
  assert 'poor estimates' in capsys.readouterr().out
  with pytest.raises(ValueError, match='the features have 6 axes'):
    coordinate_systems.space(tiny_config(), features[:7])
  with pytest.raises(ValueError, match='all 0'):
    coordinate_systems.space(config, np.zeros((9, 12)))


@pytest.mark.parametrize('width', [5, 12])
def test_a_student_at_its_original_size_says_the_same(width):
  config = tiny_config(f"student.model={{'name': 'mlp', 'hidden': ({width},)}}")
  student = tcs.network(config, config.rows['tcs'], 8)
  assert student.head.adapted == (width == 5)
  x = jax.random.normal(jax.random.key(0), (6, 8, 8, 1))
  variables = student.init(jax.random.key(1), x)
  space = found()[1]
  axes = {'mean': space.mean, 'components': space.axes['pca']}
  variables['coordinates'] = {'head': {k: jnp.asarray(v, jnp.float32) for k, v in axes.items()}}
  variables['params']['head']['mask'] = jnp.arange(8.0) % 2
  small, merged = tcs.merged(student, variables)
  assert merged.keys() == {'params'}
  assert_close(small.apply(merged, x), student.apply(variables, x), 1e-5)


def test_a_run_compares_rows_keeps_axes_and_leaves_pictures(tmp_path):
  config = tiny_config('runs=ce,kd,random,elsh')
  results = launcher.launch(config, tmp_path)
  rows = {row['name']: row['metrics'] for row in results['rows']}
  assert list(rows) == ['teacher', 'CE', 'KD', 'random axes', 'TCS + eLSH']
  assert rows['TCS + eLSH']['axes'] == rows['random axes']['axes'] == 3
  assert 0 < rows['TCS + eLSH']['variance'] < 100 and 'variance' not in rows['random axes']
  for name in ('coordinates', 'accuracy'):
    assert (tmp_path / f'{name}.png').stat().st_size > 5000
  stored = np.load(tmp_path / 'mlp-train-digits-seed0.npz')
  assert stored['features'].shape == (130, 12) and stored['logits'].shape == (130, 5)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ('coordinates.count=13', 'coordinates.count=13: expected at most 12'),
    ('coordinates.keep=9', 'coordinates.keep=9: expected at most the 8 axes'),
    ('coordinates.share=0.5', 'expected one of the two'),
    ('coordinates.end=0.05', 'in this order'),
    ('coordinates.rounds=60', 'are too few'),
    ('rows.ce.beta=1.0', "axes='none' does not have"),
    ('bits=0', 'bits=0'),
    ('tutor=None', 'tutor: missing'),
    ('teacher.groups=0,1', 'a group for each of 10 classes'),
    ('student.recipe.mixup=0.5', 'not of mixtures'),
    ('student.data.std=0.1', 'expected the same'),
    ('runs=tsc,', 'tsc'),
    ('probed=1,200', r'\[200\] are not 1 to 12'),
  ],
)
def test_settings_that_cannot_be_are_refused(change, message):
  with pytest.raises(SettingsError, match=message):
    launcher.check(tiny_config(change))


def test_another_teacher_is_another_run():
  first = tcs.programs(tiny_config())
  groups = 'teacher.groups=(0, 1, 2, 3, 4, 0, 1, 2, 3, 4)'
  other = tcs.programs(tiny_config(groups))
  assert other.keys() == first.keys() and {'teacher', 'tutor'} <= first.keys()
  for name in ('teacher', 'tutor'):
    assert other[name].identity != first[name].identity, name
