import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from models.random_variables import random_images, random_variables

from experiments import qfd
from experiments.harness import launcher
from experiments.harness.settings import SettingsError
from experiments.harness.supervised import Seen
from experiments.protocols import quantized_training
from experiments.protocols.quantized_training import Trained
from jaxlab import models

IMAGES = random_images((32, 16, 16, 1))
DATA = "{'name': 'digits', 'train_options': {'test_size': 1597}, 'test_options': {'test_size': 100}, 'train_size': 200}"  # noqa: E501

DISTILLED = (
  "{'name': 'vit_tiny_patch4_8', 'width': 8, 'depth': 1, 'num_heads': 2, 'num_classes': 10, "
  "'distilled': True}"
)


def tiny(*changes):
  """Returns the settings of a narrow perceptron and few images."""
  return launcher.load('qfd', 'embedded', [
    f'network.data={DATA}', "network.model={'name': 'mlp', 'hidden': (8, 8, 8), 'num_classes': 10}",
    'network.recipe.epochs=1', 'network.recipe.batch_size=32', 'recipe.epochs=1', 'recipe.batch_size=32',
    'teacher.epochs=1', 'teacher.batch_size=32', 'calibration=32', 'bits=2w2a', 'target.bits=2',
    'timed=0', 'eval_batch_size=64', 'claims=()', *changes,
  ])  # fmt: skip


def test_a_run_has_a_row_for_every_teacher_and_student(tmp_path):
  config = tiny('rows=features', 'weights=2')
  found = launcher.launch(config, tmp_path)
  rows = {item['name']: item['metrics'] for item in found['rows']}
  assert list(rows) == [
    'float', 'teacher, 2-bit features', 'float features distilled', 'QFD', 'QFD, weight 2',
  ]  # fmt: skip
  hits = np.array([own['2w2a_accuracy'] for own in rows.values()])  # of 100 test images
  np.testing.assert_allclose(hits, np.round(hits), atol=1e-6)
  errors = [rows[name]['2w2a_feature_error'] for name in list(rows)[2:]]
  assert min(errors) > 0 and len(set(errors)) == 3
  assert {item['name'] for item in found['rows'] if item['role'] == 'method'} == {'QFD'}
  assert (tmp_path / 'accuracy.png').exists()


def test_feature_errors_are_over_the_variance_of_the_target():
  rng = np.random.default_rng(0)
  features, target = rng.normal(size=(9, 5)), rng.normal(2, 3, size=(9, 5))
  expected = ((features - target) ** 2).sum() / (9 * target.var(0).sum())
  assert qfd.feature_error(features, target) == pytest.approx(expected)
  assert qfd.feature_error(np.tile(target.mean(0), (9, 1)), target) == pytest.approx(1)


def test_teachers_have_few_values_and_may_train_their_ranges_alone(tmp_path):
  config = tiny('target.trained=ranges', 'target.units=scaled')
  nets = Trained(config, qfd.table(config), tmp_path)
  teacher = nets['teacher_2']
  features = nets.outputs(teacher)['features']
  beta = float(teacher.variables['learned_ranges']['relu2']['output']['beta'])
  levels = beta * np.arange(4) / 3
  assert np.abs(features[..., None] - levels).min(-1).max() < 1e-5 * abs(beta)
  ranges = teacher.variables['learned_ranges'], nets.start('teacher_2').variables['learned_ranges']
  assert all(a != b for a, b in zip(*map(jax.tree.leaves, ranges), strict=True))
  params = teacher.variables['params'], nets.loaded.variables['params']
  jax.tree.map(np.testing.assert_array_equal, *params)


@pytest.mark.exhaustive
def test_first_ranges_are_of_a_batch_as_training_normalizes_it():
  config = launcher.load('qfd', 'embedded', ['network.model.width=4'])
  model = models.create(**config.network.model)
  variables = random_variables(model, IMAGES)
  student = jax.jit(lambda v: qfd.quantized_student(config, '2w2a', model, v, IMAGES))(variables)
  assert not student.kwargs
  jax.tree.map(
    np.testing.assert_array_equal, student.variables['batch_stats'], variables['batch_stats']
  )
  # The input of the first quantized layer: ReLU(BN(conv(x))).
  (_, _), found = jax.jit(
    lambda v: models.capture(model, v, ['conv1'], IMAGES, train=True, mutable=['batch_stats'])
  )(variables)
  x, norm = np.asarray(found['conv1'], np.float64), variables['params']['bn1']
  mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  x = np.maximum((x - mean) / np.sqrt(var + 1e-5) * norm['scale'] + norm['bias'], 0)
  ends = student.variables['learned_ranges']['layer1_0']['conv1']['input']
  assert float(ends['lower']) == x.min() == 0
  expected = 3 * x.std(ddof=1) / np.sqrt(1 - 2 / np.pi)
  assert float(ends['upper']) == pytest.approx(expected, rel=1e-4)


def test_all_layers_of_a_student_but_the_first_and_the_last_are_quantized():
  config = launcher.load('qfd', 'embedded', ['bits=1w32a', 'network.model.width=4'])
  model = models.create(**config.network.model)
  variables = jax.eval_shape(lambda: random_variables(model, IMAGES))
  for bits, own in (('2w3a', {'kernel', 'input'}), ('1w32a', {'kernel'})):
    found = jax.eval_shape(
      lambda v, bits=bits: qfd.quantized_student(config, bits, model, v, IMAGES), variables
    )
    flat = traverse_util.flatten_dict(found.variables['range_bits'], sep='/')
    operands = {}
    for path in flat:
      operands.setdefault(path.rpartition('/')[0], set()).add(path.rpartition('/')[2])
    layers = set(models.anatomy(model).layers)
    assert set(operands) == layers - {'conv1', 'fc'} and 'layer2_0/downsample_0' in operands
    assert all(each - {'signed'} == own for each in operands.values())


def test_losses_are_those_of_the_sheet():
  keys = jax.random.split(jax.random.key(0), 4)
  student, teacher = (jax.random.normal(k, (4, 6)) for k in keys[:2])
  logits, told = (jax.random.normal(k, (4, 3)) for k in keys[2:])
  labels = np.array([0, 1, 2, 0])
  seen = Seen(0, told, {'pool': student}, {'pool': teacher})
  z, t = np.asarray(logits, np.float64), np.asarray(told, np.float64)
  log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
  entropy = -log_p[np.arange(4), labels]
  found = jnp.mean(qfd.features_distilled(0.3, 'pool')(logits, labels, seen))
  distance = np.square(np.asarray(student, np.float64) - np.asarray(teacher, np.float64)).mean()
  np.testing.assert_allclose(found, entropy.mean() + 0.3 * distance, rtol=1e-5)
  soft = [v / 2 - np.log(np.exp(v / 2).sum(-1, keepdims=True)) for v in (z, t)]
  divergence = (np.exp(soft[1]) * (soft[1] - soft[0])).sum(-1)
  found = qfd.logits_distilled(0.3, 2.0)(logits, labels, seen)
  np.testing.assert_allclose(found, entropy + 0.3 * 4 * divergence, rtol=1e-5)


def test_a_students_own_teacher_decides_it_and_others_do_not():
  def decided(*changes):
    config = tiny(*changes)
    own = qfd.table(config)
    return {name: quantized_training.ancestry(config, own, name) for name in own}

  one, two = decided('target.bits=4'), decided('target.bits=4,1')
  assert {name: two[name] for name in one} == one
  assert two['qfd_1_2w2a'] != two['qfd_4_2w2a'] and set(two) - set(one) == {
    'teacher_1',
    'qfd_1_2w2a',
  }
  slow = decided('target.bits=4', 'teacher.schedule.base=1e-4')
  assert {name for name in one if slow[name] != one[name]} == {'teacher_4', 'qfd_4_2w2a'}


def test_ranges_learn_at_a_rate_of_their_own():
  config = tiny('ranges.schedule.base=0.5', 'ranges.schedule.name=constant')
  own = quantized_training.run(config, qfd.table(config), 'baseline_2w2a')
  state = jax.jit(own.program.init)(jax.random.key(0))
  ones = jax.tree.map(jnp.ones_like, state.params)
  optimizer = qfd.optimizer(config, config.recipe)(lambda step: 1e-3)
  updates, _ = optimizer.update(ones, optimizer.init(state.params), state.params)
  for leaf in jax.tree.leaves(updates['learned_ranges']):
    np.testing.assert_allclose(leaf, -0.5, rtol=1e-4)
  for leaf in jax.tree.leaves(updates['params']):
    np.testing.assert_allclose(leaf, -1e-3, rtol=2e-2)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ('bits=0w2a', "'0w2a' is outside of 1 to 16 bits, and 32 of activations"),
    ('bits=2w20a', "'2w20a' is outside of 1 to 16 bits"),
    ('bits=[]', 'bits: expected at least one'),
    ('timed=-1', 'timed=-1: expected a number of repeats'),
    ('target.bits=0', 'expected numbers from 1 to 16'),
    ('target.bits=4,4', r'target.bits=\(4, 4\): expected each once'),
    ('weights=0.5', 'other ones than weight=0.5'),
    ('teacher.batch_size=256', r'teacher.batch_size=256 exceeds the 200 training images'),
    ('weight=-1', 'weight=-1.0: expected a number that is not negative'),
    ('weights=1,-1', 'expected numbers that are not negative'),
    ('delta=-0.1', 'delta=-0.1'),
    ('temperature=0', 'temperature=0.0: expected a positive number'),
    ('network.model.name=gpt2', 'network'),
    (f'network.model={DISTILLED}', 'network.model: a distilled transformer has two'),
    ("network.model={'name': 'mlp', 'hidden': (8,), 'num_classes': 10}", 'no layers but the first'),
  ],
)
def test_settings_that_cannot_be_are_refused(change, message):
  with pytest.raises(SettingsError, match=message):
    launcher.check(tiny(change))
