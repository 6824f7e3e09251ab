import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from golden_vectors import assert_close

from experiments import feature_mimicking
from experiments.harness import data as harness_data
from experiments.harness import launcher
from experiments.harness.settings import SettingsError
from experiments.protocols import distillation
from jaxlab import losses, models

TINY = (
  "teacher.model={'name': 'mlp', 'hidden': (12,)}",
  "student.model={'name': 'mlp', 'hidden': (5,)}",
  'teacher.augment.kind=none',
  'student.augment.kind=none',
  'teacher.recipe.epochs=2',
  'student.recipe.epochs=2',
  'student.recipe.batch_size=32',
  'student.recipe.optimizer.weight_decay=0.0',
  "student.recipe.schedule={'name': 'constant', 'base': 0.1}",
  'hashing.bits=24',
  'claims=()',
  'pictured=()',
)


def tiny_config(*changes):
  return launcher.load('feature_mimicking', 'embedded', [*TINY, *changes])


@functools.cache
def given():
  """Returns a tiny teacher's variables, and hyperplanes."""
  config = tiny_config()
  rng = np.random.default_rng(0)
  teacher = distillation.network(config.teacher)
  variables = teacher.init(jax.random.key(3), jnp.zeros((1, 8, 8, 1)))
  hashes = feature_mimicking.draw_hashes(config, 0.3, rng.random((31, 12), np.float32))
  return teacher, variables, hashes


def batch_of(config, count=32):
  rng = np.random.default_rng(1)
  return {
    'image': jnp.asarray(rng.integers(0, 256, (count, 8, 8, 1), np.uint8)),
    'label': jnp.asarray(rng.integers(0, 10, count), jnp.int32),
    'index': jnp.arange(count, dtype=jnp.int32),
  }


@pytest.mark.parametrize('name', tables.few(['kd', 'l2', 'lshl2'], 'lshl2'))
def test_one_step_is_the_papers_loss(name):
  config, (teacher, variables, hashes) = tiny_config(), given()
  own, run = config.methods[name], feature_mimicking.programs(config)[name]
  batch, state = batch_of(config), jax.jit(run.program.init)(jax.random.key(0))
  student = feature_mimicking.network(config, own)
  x, labels = config.student.task.inputs(batch), batch['label']
  logits, found = models.capture(teacher, variables, ['relu0'], x)
  right = jnp.argmax(logits, -1) == labels

  def loss(params):
    own_logits = student.apply({'params': params}, x)
    value = jnp.mean(losses.cross_entropy(own_logits, labels))
    if name == 'kd':
      return value + jnp.mean(losses.distillation_loss(own_logits, logits, 4.0))
    _, parts = models.capture(student, {'params': params}, ['head/feat_fc'], x)
    mine, told = parts['head/feat_fc'], found['relu0']
    each = jnp.mean((mine - told) ** 2, -1)
    if name == 'lshl2':
      h, bit = (f @ hashes['weight'].T + hashes['bias'] for f in (mine, told))
      each += jnp.mean(jax.nn.softplus(h) - (bit > 0) * h, -1)
    return value + own.beta * jnp.sum(each * right) / jnp.sum(right)

  assert 0 < int(right.sum()) < len(labels)
  frozen = {'teacher': variables} | ({'constants': hashes} if own.hashes else {})
  new, metrics = jax.jit(run.program.step)(state, frozen, batch)
  value, gradients = jax.value_and_grad(loss)(state.params)
  assert_close(metrics['loss'], value, 1e-5)
  moved = jax.tree.map(lambda old, now: (old - now) / 0.1, state.params, new.params)
  for a, b in zip(*map(jax.tree.leaves, (moved, gradients)), strict=True):
    assert_close(a, b, 1e-3, 1e-5)


def test_a_student_without_the_layer_before_its_classifier_says_the_same():
  config = tiny_config()
  student = feature_mimicking.network(config, config.methods['lshl2'])
  x = jax.random.normal(jax.random.key(0), (6, 8, 8, 1))
  variables = student.init(jax.random.key(1), x)
  small, found = feature_mimicking.merged(student, variables)
  assert_close(small.apply(found, x), student.apply(variables, x), 1e-5)
  sizes = [sum(leaf.size for leaf in jax.tree.leaves(own)) for own in (found, variables)]
  plain = feature_mimicking.network(config, config.methods['ce'])
  assert sizes[0] == sum(leaf.size for leaf in jax.tree.leaves(plain.init(jax.random.key(1), x)))
  assert sizes[0] < sizes[1]


def test_hyperplanes_halve_the_teachers_features_whatever_their_number():
  config = tiny_config('hashing.bits=1100')  # more than are cut at once
  features = np.random.default_rng(0).random((31, 12), np.float32)
  found = feature_mimicking.draw_hashes(config, 0.2, features)
  assert abs(float(jnp.std(found['weight'])) - 0.2) < 0.01
  # The feature in the middle lies on the hyperplane itself, up to rounding.
  bits = (losses.hash_values(features, **found) > 0).sum(0)
  assert np.all((bits == 15) | (bits == 16))
  zero = feature_mimicking.draw_hashes(tiny_config('hashing.bias=zero'), 0.2, features)
  assert not zero['bias'].any()
  assert feature_mimicking.hash_shape(tiny_config('hashing.bits=None')) == (384, 12)


@pytest.mark.parametrize(
  ('changes', 'hashed'), [(['hashing.bias=zero'], True), (['runs=ce,kd,l2'], False)]
)
def test_the_teacher_sees_training_images_only_where_a_bias_is_to_be_found(
  changes, hashed, tmp_path
):
  teacher, variables, _ = given()
  config = tiny_config(*changes)
  source = harness_data.load(config.student.data, 'train')
  hashes = feature_mimicking.hyperplanes(config, teacher, variables, source, tmp_path)
  assert not list(tmp_path.iterdir())
  assert (hashes is not None) == hashed
  found = feature_mimicking.closeness(np.eye(12), np.eye(12), hashes)
  assert ('bit_agreement' in found) == hashed


def test_a_layer_stands_before_the_classifier_where_widths_or_settings_ask_for_it():
  config = tiny_config("student.model={'name': 'mlp', 'hidden': (12,)}")
  adapted = {name: feature_mimicking.adapted(config, own) for name, own in config.methods.items()}
  assert [name for name, own in adapted.items() if own] == ['ce_two']
  other = tiny_config()
  adapted = {name: feature_mimicking.adapted(other, own) for name, own in other.methods.items()}
  assert [name for name, own in adapted.items() if not own] == ['ce', 'kd']


@pytest.mark.parametrize('setting', ['voc2007_resnet50', 'coco_mobilenetv2'])
def test_on_several_classes_the_layer_is_there_at_equal_widths_too(setting):
  student = ['student.model.name=resnet50', 'student.pretrained=resnet50.tv_in1k']
  config = launcher.load('feature_mimicking', setting, student)
  layered = [name for name, own in config.methods.items() if feature_mimicking.aligned(config, own)]
  assert layered == ['l2', 'lsh', 'lshl2'] and feature_mimicking.same_width(config)
  assert config.methods['kd'].alpha == 0.001


def test_a_run_compares_rows_and_leaves_pictures_and_the_teachers_features(tmp_path):
  config = tiny_config('runs=ce,l2,lshl2')
  found = launcher.launch(config, tmp_path)
  rows = {row['name']: row['metrics'] for row in found['rows']}
  assert list(rows) == ['teacher', 'CE', 'L2', 'LSH-L2']
  assert rows['CE'].keys() == {'accuracy'}
  assert {*feature_mimicking.METRICS, 'accuracy'} == rows['LSH-L2'].keys()
  stored = np.load(tmp_path / 'mlp-digits-seed0.npz')
  assert stored['features'].shape == (130, 12)
  assert {*stored} == {'features', 'fingerprints'}
  for name in ('directions', 'accuracy'):
    assert (tmp_path / f'{name}.png').stat().st_size > 5000


@pytest.mark.exhaustive
def test_where_images_show_several_classes_the_layer_learns_first_and_alone(tmp_path):
  config = launcher.load(
    'feature_mimicking',
    'canvases',
    [
      "teacher.model={'name': 'mlp', 'hidden': (12,)}",
      "student.model={'name': 'convnet', 'widths': (4,), 'pools': 4, 'hidden': (5,)}",
      *(
        f'{name}.data.{option}'
        for name in ('teacher', 'student')
        for option in ('train_size=48', 'train_options.length=48', 'test_options.length=40')
      ),
      *(f'{name}.batch_size=16' for name in ('teacher.recipe', 'student.recipe', 'align')),
      *(f'{name}.epochs=2' for name in ('teacher.recipe', 'student.recipe', 'align')),
      'hashing.bits=24',
      'runs=ce,lshl2',
    ],
  )
  plan = feature_mimicking.programs(config)
  assert list(plan) == ['teacher', 'ce', 'lshl2_align', 'lshl2']
  own = plan['lshl2_align'].program
  state = jax.jit(own.init)(jax.random.key(0))
  frozen = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), own.frozen)
  batch = {name: jnp.ones(leaf.shape, leaf.dtype) for name, leaf in own.batch.items()}
  new, _ = jax.jit(own.step)(state, frozen, batch)
  moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state.params, new.params)
  assert all(jax.tree.leaves(moved['head']['feat_fc']))
  assert not any(jax.tree.leaves([moved['backbone'], moved['head']['fc']]))
  assert jnp.any(state.model_state['batch_stats']['backbone']['bn0']['mean'] !=
                 new.model_state['batch_stats']['backbone']['bn0']['mean'])  # fmt: skip
  found = launcher.launch(config, tmp_path)
  assert [row['name'] for row in found['rows']] == ['teacher', 'CE', 'LSH-L2']
  assert all('mAP' in row['metrics'] for row in found['rows'])


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ('hashing.bits=0', 'bits=0'),
    ('hashing.std=-1.0', 'std=-1.0'),
    ('hashing.bias=mode', 'mode'),
    ('methods.l2.beta=0.0', 'expected both, or neither'),
    ('methods.kd.temperature=0.0', 'temperature=0.0'),
    ('runs=lshl3,', 'lshl3'),
    ('student.data.mean=0.1', 'student.data.mean=0.1: expected the same'),
    ('student.recipe=None', 'recipe: missing'),
    ('student.recipe.batch_size=131', 'exceeds the 130 training images'),
    ('student.recipe.microbatches=2', 'expected microbatches=1'),
    ('methods.l2.title=LSH', 'titles that differ'),
    ('teacher.weights=file', 'give the name of the weights'),
  ],
)
def test_settings_that_cannot_be_are_refused(change, message):
  with pytest.raises(SettingsError, match=message):
    launcher.check(tiny_config(change))
