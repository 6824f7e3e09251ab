import numpy as np
import pytest

from jaxlab import data

OBJECTS = data.Digits('train')


@pytest.mark.parametrize('task', data.DERIVED_TASKS)
def test_a_task_is_the_same_whenever_it_is_made_and_has_all_its_classes(task):
  found = data.derived_task(OBJECTS, task, length=200, seed=3)
  again = data.derived_task(OBJECTS, task, length=200, seed=3)
  np.testing.assert_array_equal(found.arrays['image'], again.arrays['image'])
  other = data.derived_task(OBJECTS, task, length=200, seed=4)
  assert (found.arrays['image'] != other.arrays['image']).any()
  assert found.arrays['image'].shape == (200, 16, 16, 1) and found.arrays['image'].dtype == np.uint8
  counts = np.bincount(found.arrays['label'], minlength=found.num_classes)
  assert len(counts) == (data.DERIVED_TASKS[task].num_classes or 10) and counts.min() > 5


def whole_objects(canvas=16):
  """Returns objects that are white squares: what lies where can be counted."""
  images = np.full((4, 8, 8, 1), 255, np.uint8)
  return data.InMemory({'image': images, 'label': np.arange(4)}, 4)


def squares(image):
  """Returns the white squares (top, left, side) of an image, row by row."""
  left = np.array(image[..., 0] == 255)
  found = []
  while left.any():
    top, start = np.argwhere(left)[0]
    side = int(np.argmin(np.append(left[top, start:], False)))
    found.append((top, start, side))
    left[top : top + side, start : start + side] = False
  return found


@pytest.mark.parametrize('canvas', [16, 28])
def test_labels_say_what_is_seen(canvas):
  for task in ('quadrant', 'size'):
    found = data.derived_task(whole_objects(), task, canvas=canvas, length=60)
    for image, label in zip(found.arrays['image'], found.arrays['label'], strict=True):
      ((top, left, side),) = squares(image)
      middle = top + side / 2, left + side / 2
      low = canvas * 5 // 16
      expected = {
        'quadrant': 2 * (middle[0] >= canvas / 2) + (middle[1] >= canvas / 2),
        'size': int((side - low) / (canvas + 1 - low) * 4),
      }
      assert label == expected[task]
  found = data.derived_task(whole_objects(), 'count', canvas=canvas, length=60)
  least = (canvas * 5 // 16) ** 2
  for image, label in zip(found.arrays['image'], found.arrays['label'], strict=True):
    white = int((image == 255).sum())
    assert (label + 1) * least <= white <= (label + 1) * (canvas * 7 // 16) ** 2


def test_turned_objects_are_turned_by_their_label():
  marked = np.full((1, 8, 8, 1), 90, np.uint8)
  marked[0, :3, :3] = 255  # above on the left; turned a quarter counterclockwise below on the left
  objects = data.InMemory({'image': marked, 'label': np.zeros(1, int)}, 1)
  found = data.derived_task(objects, 'rotation', length=40)
  corners = {0: (-1, -1), 1: (1, -1), 2: (1, 1), 3: (-1, 1)}
  assert {*found.arrays['label']} == {*corners}
  for image, label in zip(found.arrays['image'][..., 0], found.arrays['label'], strict=True):
    square, corner = np.argwhere(image > 50), np.argwhere(image > 200)
    assert tuple(np.sign(corner.mean(0) - square.mean(0))) == corners[int(label)]


def test_noise_is_dark_on_light():
  plain = data.derived_task(OBJECTS, 'plain', length=50, seed=1)
  noisy = data.derived_task(OBJECTS, 'noise', length=50, seed=1)
  np.testing.assert_array_equal(plain.arrays['label'], noisy.arrays['label'])
  spread = noisy.arrays['image'].astype(int) - (255 - plain.arrays['image'].astype(int))
  inside = (plain.arrays['image'] > 100) & (plain.arrays['image'] < 155)
  assert abs(spread[inside].std() - 40) < 4 and abs(spread[inside].mean()) < 4


@pytest.mark.parametrize(
  ('options', 'message'),
  [({'task': 'color'}, "task='color'"), ({'task': 'size', 'canvas': 8}, 'canvas=8'),
   ({'task': 'size', 'length': 0}, 'length=0')],
)  # fmt: skip
def test_tasks_that_cannot_be_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    data.derived_task(OBJECTS, **options)


def test_tasks_are_loaded_by_name_with_other_images_in_the_test():
  options = {'task': 'plain', 'length': 20}
  train, test = (data.load('digit_tasks', split, **options) for split in ('train', 'test'))
  assert (train.arrays['image'] != test.arrays['image']).any() and len(test) == 20
