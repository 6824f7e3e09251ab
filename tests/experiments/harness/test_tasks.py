import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from experiments.harness import data as harness_data
from experiments.harness import supervised
from experiments.harness.data import Augment, Images
from experiments.harness.sections import Recipe, Schedule
from experiments.harness.tasks import BoxTask, ImageTask, MultiLabelTask, SequenceTask, TokenTask
from jaxlab import data
from jaxlab.training import map_batches

KEYS = jax.random.split(jax.random.key(0), 2)


def boxes(outputs, targets):
  miss = jnp.abs(outputs[:, None] - targets['boxes']).sum(-1)
  return {'loss': jnp.sum(jnp.where(targets['valid'], miss, 0), -1)}


IMAGE = {'stored': (8, 8, 3), 'mean': 0.5, 'std': 0.25}
TASKS = {
  'image': ImageTask(**IMAGE, view=(8, 8, 3), dtype='uint8'),
  'labels': MultiLabelTask(**IMAGE, view=(8, 8, 3), dtype='uint8', num_classes=3),
  'token': TokenTask(6),
  'sequence': SequenceTask(5, 3),
  'box': BoxTask(**IMAGE, count=4, scorer=boxes),
}


def records(task, seed=0):
  rng = np.random.default_rng(seed)
  batch = {}
  for name, leaf in task.batch(2).items():
    values = (
      rng.integers(0, 2, leaf.shape) if leaf.dtype != jnp.float32 else rng.normal(size=leaf.shape)
    )
    batch[name] = jnp.asarray(values, leaf.dtype)
  return batch


@pytest.mark.parametrize('name', TASKS)
def test_a_task_is_hashable_and_scores_each_record(name):
  task = TASKS[name]
  assert {task: 1}[task] == 1 and isinstance(task.options, dict)
  batch = records(task)
  assert all(leaf.shape[0] == 2 for leaf in batch.values()) and 'index' in batch
  seen, drawn = task.inputs(batch), task.augmented(KEYS, batch)
  assert jax.tree.map(jnp.shape, seen) == jax.tree.map(jnp.shape, drawn)
  outputs = {
    'image': jnp.ones((2, 3)), 'labels': jnp.ones((2, 3)), 'token': jnp.ones((2, 6, 3)),
    'sequence': jnp.ones((2, 5, 3)), 'box': jnp.ones((2, 4)),
  }[name]  # fmt: skip
  scored = jax.jit(task.score)(outputs, task.targets(batch))
  assert 'loss' in scored and all(value.shape == (2,) for value in scored.values())


def test_several_labels_of_an_image_have_a_loss_each():
  task = TASKS['labels']
  assert set(task.batch(2)) == {'image', 'multi_label', 'index'}
  logits, present = np.array([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]]), np.array([[1, 0, 1], [0, 1, 1]])
  batch = {**records(task), 'multi_label': jnp.asarray(present, jnp.float32)}
  scored = task.score(jnp.asarray(logits), task.targets(batch))
  share = 1 / (1 + np.exp(-logits))
  expected = -np.where(present, np.log(share), np.log(1 - share)).mean(-1)
  np.testing.assert_allclose(scored['loss'], expected, rtol=1e-5)
  np.testing.assert_allclose(scored['correct'], [1, 2 / 3], rtol=1e-5)


def test_images_with_several_labels_are_looked_at_before_they_are_used():
  fields = {'name': 'mine', 'num_classes': 3, 'stored_image': (8, 8, 3), 'multi_label': True}
  own = Images(**fields)
  assert isinstance(ImageTask.of(own), MultiLabelTask) and ImageTask.of(own).num_classes == 3
  assert type(ImageTask.of(Images(**{**fields, 'multi_label': False}))) is ImageTask
  arrays = {
    'image': np.zeros((4, 8, 8, 3), np.uint8),
    'multi_label': np.eye(4, 3, dtype=np.float32),
  }
  harness_data.check_source(own, data.InMemory(arrays, 3))
  for wrong, message in (
    ({'multi_label': 0.5 * arrays['multi_label']}, 'other values than 0 and 1, the first is row 0'),
    ({'multi_label': np.eye(4, 2)}, r'expected \[records, 3\]'),
    ({'multi_label': np.arange(4)}, r'expected \[records, 3\]'),
  ):
    with pytest.raises(ValueError, match=message):
      harness_data.check_source(own, data.InMemory({**arrays, **wrong}, 3))
  with pytest.raises(ValueError, match='expected multi_label'):
    harness_data.check_source(own, data.InMemory({'image': arrays['image']}, 3))


def test_what_is_padded_of_a_sequence_counts_nowhere():
  task = TASKS['sequence']
  batch = records(task)
  batch['valid'] = jnp.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
  logits = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 2)), jnp.float32)
  inputs, mask = task.inputs(batch)
  assert not inputs[0, 2:].any() and inputs[0, :2].any() and mask is batch['valid']

  scored = task.score(logits, task.targets(batch))
  for row, length in ((0, 2), (1, 5)):
    losses = -jax.nn.log_softmax(logits[row])[jnp.arange(length), batch['label'][row, :length]]
    np.testing.assert_allclose(scored['loss'][row], losses.mean(), rtol=1e-6)
    right = logits[row, :length].argmax(-1) == batch['label'][row, :length]
    np.testing.assert_allclose(scored['correct'][row], right.mean(), rtol=1e-6)

  other = {**batch, 'label': batch['label'].at[0, 3].set(-1)}  # no class: must not reach the loss
  other['sequence'] = batch['sequence'].at[0, 4].set(jnp.nan)
  assert not jnp.isnan(task.inputs(other)[0]).any()
  junk = logits.at[0, 2:].set(jnp.nan)
  again = task.score(junk, task.targets(other))
  np.testing.assert_array_equal(again['loss'], scored['loss'])
  gradient = jax.jit(jax.grad(lambda x: task.score(x, task.targets(batch))['loss'].sum()))(logits)
  assert not gradient[0, 2:].any() and jnp.isfinite(gradient).all()


def test_an_empty_sequence_has_no_loss():
  task = TASKS['sequence']
  batch = {**records(task), 'valid': jnp.zeros((2, 5), bool)}
  scored = task.score(jnp.ones((2, 5, 2)), task.targets(batch))
  np.testing.assert_array_equal(scored['loss'], [0, 0])
  np.testing.assert_array_equal(scored['correct'], [0, 0])


def test_a_program_learns_labels_of_ragged_sequences():
  class Tagger(nn.Module):
    @nn.compact
    def __call__(self, inputs, train=False):
      x, mask = inputs
      return nn.Dense(2)(x) * mask[..., None]

  task, recipe = TASKS['sequence'], Recipe(epochs=1, batch_size=2, schedule=Schedule(0.5))

  def loss(outputs, targets, seen):
    del seen
    return task.score(outputs, targets)['loss']

  program = supervised.program(Tagger(), task, recipe, 40, loss=loss)
  state, batch = jax.jit(program.init)(jax.random.key(0)), records(task)
  batch['label'] = jnp.asarray(batch['sequence'][..., 0] > 0, jnp.int32)
  batch['valid'] = jnp.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
  values = []
  for _ in range(20):
    state, metrics = jax.jit(program.step)(state, program.frozen, batch)
    values.append(float(metrics['loss']))
  assert values[-1] < 0.5 * values[0]


def test_boxes_are_judged_by_the_detector_and_padding_is_handed_on():
  task = TASKS['box']
  batch = records(task)
  targets = task.targets(batch)
  assert set(targets) == {'boxes', 'label', 'valid'}
  images = task.inputs(batch)
  np.testing.assert_allclose(images, (np.asarray(batch['image']) / 255 - 0.5) / 0.25, rtol=1e-5)
  np.testing.assert_array_equal(task.augmented(KEYS, batch), images)
  outputs = jnp.zeros((2, 4))
  expected = (np.abs(batch['boxes']).sum(-1) * np.asarray(batch['valid'])).sum(-1)
  np.testing.assert_allclose(task.score(outputs, targets)['loss'], expected, rtol=1e-5)


def test_tokens_are_asked_for_the_next_one():
  task = TASKS['token']
  batch = {'tokens': jnp.arange(14).reshape(2, 7), 'index': jnp.arange(2)}
  np.testing.assert_array_equal(task.targets(batch), task.inputs(batch) + 1)
  logits = jax.nn.one_hot(task.targets(batch), 20) * 100
  np.testing.assert_array_equal(task.score(logits, task.targets(batch))['correct'], [1, 1])


def test_images_are_augmented_by_their_keys():
  task = ImageTask(
    **IMAGE, view=(8, 8, 3), dtype='uint8', augment=Augment(kind='pad_crop', padding=2)
  )
  batch = records(task)
  batch['image'] = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)), jnp.uint8)
  one, same = task.augmented(KEYS, batch), task.augmented(KEYS, batch)
  np.testing.assert_array_equal(one, same)
  assert not np.array_equal(one, task.augmented(KEYS[::-1], batch))
  assert task == ImageTask(**IMAGE, view=(8, 8, 3), dtype='uint8')  # it judges alike


def test_a_crop_of_the_networks_size_is_a_part_of_the_stored_image():
  augment = Augment(kind='pad_crop', padding=0, flip=False)
  task = ImageTask(**IMAGE, view=(5, 5, 3), dtype='uint8', augment=augment)
  batch = records(task)
  batch['image'] = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)), jnp.uint8)
  stored = np.asarray(task.inputs(batch))
  for image, whole in zip(np.asarray(task.augmented(KEYS, batch)), stored, strict=True):
    parts = [whole[i : i + 5, j : j + 5] for i in range(4) for j in range(4)]
    assert any(np.allclose(image, part, atol=1e-6) for part in parts)


def test_a_crop_may_be_filled_with_the_mirrored_image_and_lose_a_square_behind_the_normalization():
  fields = {'kind': 'pad_crop', 'padding': 2, 'fill': 'reflect', 'flip': False}
  batch = {'image': jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)), jnp.uint8)}
  plain, cut = (
    np.asarray(
      ImageTask(**IMAGE, view=(8, 8, 3), dtype='uint8', augment=own).augmented(KEYS, batch)
    )
    for own in (Augment(**fields), Augment(**fields, cutout=4))
  )
  stored = np.asarray(ImageTask(**IMAGE, view=(8, 8, 3), dtype='uint8').inputs(batch))
  for image, whole in zip(plain, stored, strict=True):
    mirrored = np.pad(whole, ((2, 2), (2, 2), (0, 0)), mode='reflect')
    parts = [mirrored[i : i + 8, j : j + 8] for i in range(5) for j in range(5)]
    assert any(np.allclose(image, part, atol=1e-6) for part in parts)
  changed = (cut != plain).any(-1)
  assert (cut[changed] == 0).all() and (changed.sum((1, 2)) >= 4).all()
  assert (changed.sum((1, 2)) <= 16).all()
  assert list(Augment(cutout=4).check()) and not list(Augment(**fields, cutout=4).check())


@pytest.mark.parametrize('name', ['sequence', 'box'])
def test_records_of_a_last_batch_that_is_not_full_are_judged(name):
  task = TASKS[name]
  source = [{k: np.asarray(v[0]) for k, v in records(task).items()}] * 3
  found = map_batches(lambda batch: task.targets(batch), source, batch_size=8)
  assert all(len(leaf) == 3 for leaf in jax.tree.leaves(found))
