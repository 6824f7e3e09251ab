import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.harness import supervised
from experiments.harness.sections import Recipe, Schedule
from experiments.harness.tasks import ImageTask
from jaxlab import models

TASK = ImageTask((4, 4, 1), (4, 4, 1), 'uint8', 0.0, 1.0)
MODEL = models.create('mlp', hidden=(6, 5), num_classes=3)
RECIPE = Recipe(epochs=1, batch_size=4, schedule=Schedule(0.1))


@pytest.fixture
def batch():
  images = np.random.default_rng(0).integers(0, 255, (4, 4, 4, 1), np.uint8)
  return {'image': images, 'label': np.array([0, 1, 2, 0]), 'index': np.arange(4)}


def step(batch, loss, **options):
  program = supervised.program(MODEL, TASK, RECIPE, 10, loss=loss, **options)
  state = program.init(jax.random.key(0))
  frozen = {'teacher': {'params': state.params}} if 'teacher' in options else {}
  return state, jax.jit(program.step)(state, frozen, batch)


def test_a_loss_reads_what_captured_modules_hand_on(batch):
  def loss(outputs, targets, seen):
    del outputs, targets
    assert set(seen.captured) == {'fc0', 'fc1'}
    return jnp.mean(seen.captured['fc0'] ** 2) + 0 * jnp.mean(seen.captured['fc1'])

  before, (after, metrics) = step(batch, loss, captured=['fc[01]'])
  own = before.params['fc0']
  found = TASK.inputs(batch).reshape(4, -1) @ own['kernel'] + own['bias']
  np.testing.assert_allclose(metrics['loss'], jnp.mean(found**2), rtol=1e-5)
  moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before.params, dict(after.params))
  assert moved['fc0']['kernel'] and not moved['fc1']['kernel']


def test_a_loss_reads_what_modules_of_the_teacher_hand_on(batch):
  def loss(outputs, targets, seen):
    del outputs, targets
    return jnp.mean(jnp.abs(seen.captured['fc1'] - seen.taught['fc1']))

  _, (_, metrics) = step(batch, loss, teacher=MODEL, captured=['fc1'], taught=['fc1'])
  assert metrics['loss'] == 0


def test_a_pattern_that_names_no_module_is_refused(batch):
  with pytest.raises(ValueError, match='fc7'):
    step(batch, supervised.cross_entropy, captured=['fc7'])
