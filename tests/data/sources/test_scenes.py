import numpy as np
import pytest
from PIL import Image

from jaxlab import data


def _digits():
  return data.Digits('train', test_size=1500)


def _scenes(**options):
  defaults = {'num_objects': (1, 4), 'canvas': (40, 56), 'side': (10, 18), 'texture': 0.5}
  return data.Scenes(_digits(), **{**defaults, **options})


def test_a_record_depends_on_seed_and_index_alone():
  first, second = _scenes(seed=5), _scenes(seed=5)
  for i in (0, 11, 200):
    a, _ = first[i], first[i + 1]
    b = second[i]
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])
  assert (first[0]['image'] != first[1]['image']).any()
  assert (first[0]['image'] != _scenes(seed=6)[0]['image']).any()


def test_boxes_masks_and_labels_agree():
  scenes = _scenes(length=60)
  counts = set()
  for i in range(len(scenes)):
    r = scenes[i]
    used = r['box_mask']
    counts.add(int(used.sum()))
    assert r['image'].shape == (40, 56, 1) and r['image'].dtype == np.uint8
    assert r['boxes'].shape == (4, 4) and r['masks'].shape == (4, 40, 56)
    assert used[0] and r['box_labels'][0] == r['label']
    assert (r['box_labels'][~used] == -1).all() and not r['boxes'][~used].any()
    present = np.zeros(10)
    present[r['box_labels'][used]] = 1
    np.testing.assert_array_equal(r['multi_label'], present)
    assert r['masks'].sum(axis=0).max() <= 1
    for box, mask in zip(r['boxes'][used], r['masks'][used]):
      y0, x0, y1, x1 = box.astype(int)
      assert 0 <= y0 < y1 <= 40 and 0 <= x0 < x1 <= 56
      inside = np.zeros_like(mask)
      inside[y0:y1, x0:x1] = True
      assert mask.any() and not (mask & ~inside).any()
    y0, x0, y1, x1 = r['boxes'][0].astype(int)
    main = r['masks'][0][y0:y1, x0:x1]  # unhidden: its box is tight
    assert main[0].any() and main[-1].any() and main[:, 0].any() and main[:, -1].any()
    # Glyphs are lighter than the canvas can be (60 % of the texture's strength).
    assert r['image'][r['masks'][0]].mean() > 255 * 0.3
  assert counts == {1, 2, 3, 4}


def test_objects_hardly_overlap():
  scenes = _scenes(num_objects=4, length=40, canvas=40)
  for i in range(len(scenes)):
    r = scenes[i]
    boxes = r['boxes'][r['box_mask']]
    for a in range(len(boxes)):
      for b in range(a):
        low, high = np.maximum(boxes[a], boxes[b])[:2], np.minimum(boxes[a], boxes[b])[2:]
        # A quarter of the smaller square, at most 18 pixels a side.
        assert np.prod(np.clip(high - low, 0, None)) <= 0.25 * 18**2


def test_plain_pastes_show_the_resized_object_and_nothing_else():
  source = _digits()
  scenes = data.pasted(source, pastes=3, seed=2)
  assert len(scenes) == 3 * len(source)
  sides = set()
  for i in range(60):
    record = scenes[i]
    original = source[i // 3]
    assert set(record) == {'image', 'label', 'index'} and record['label'] == original['label']
    image = record['image'][..., 0]
    found = False
    for side in range(10, 17):
      resized = np.asarray(Image.fromarray(original['image'][..., 0]).resize((side, side), 2))
      for top in range(17 - side):
        for left in range(17 - side):
          canvas = np.zeros((16, 16), np.uint8)
          canvas[top : top + side, left : left + side] = resized
          if (canvas == image).all():
            found = True
            sides.add(side)
    assert found
  assert sides == set(range(10, 17))


def test_texture_strength_scales_the_canvas():
  def ground(texture):
    record = _scenes(texture=texture, num_objects=1)[3]
    return record['image'][0:4, 0:4].astype(float).std(), record['image'].astype(float).mean()

  plain = _scenes(texture=0.0, num_objects=1)[3]
  y0, x0, y1, x1 = plain['boxes'][0].astype(int)
  outside = np.ones((40, 56), bool)
  outside[max(0, y0 - 3) : y1 + 3, max(0, x0 - 3) : x1 + 3] = False
  assert not plain['image'][outside].any()
  means = [ground(texture)[1] for texture in (0.0, 0.3, 1.0)]
  assert means == sorted(means) and means[2] > means[0] + 30


def test_imbalance_is_the_ratio_of_class_frequencies():
  scenes = _scenes(
    imbalance=20.0, length=3000, num_objects=1, canvas=18, texture=0, annotations=False
  )
  counts = np.bincount([scenes[i]['label'] for i in range(3000)], minlength=10)
  expected = 20.0 ** (-np.arange(10) / 9)
  expected *= 3000 / expected.sum()
  assert np.abs(counts - expected).max() < 4 * np.sqrt(expected.max())
  assert counts[0] > 8 * counts[9]
  balanced = _scenes(length=2000, num_objects=1, canvas=18, texture=0, annotations=False)
  counts = np.bincount([balanced[i]['label'] for i in range(2000)], minlength=10)
  assert np.abs(counts - 200).max() < 4 * np.sqrt(200)


def test_color_objects_are_opaque():
  images = np.random.default_rng(0).integers(0, 256, (4, 9, 9, 3), np.uint8)
  source = data.InMemory({'image': images, 'label': np.arange(4)})
  record = data.Scenes(source, canvas=20, side=9, texture=1.0)[1]
  y0, x0, y1, x1 = record['boxes'][0].astype(int)
  assert (y1 - y0, x1 - x0) == (9, 9) and record['masks'][0].sum() == 81
  np.testing.assert_array_equal(record['image'][y0:y1, x0:x1], images[record['label']])


def test_canvases_show_two_objects_by_their_maximum():
  source = _digits()
  canvases = data.canvases(source, length=40, seed=1)
  scenes = data.Scenes(
    source, num_objects=2, canvas=36, side=(15, 19), places=100, blend='lighter', length=40, seed=1
  )
  for i in range(40):
    record, scene = canvases[i], scenes[i]
    assert set(record) == {'image', 'label', 'multi_label', 'index'}
    assert record['image'].shape == (36, 36, 1) and scene['box_mask'].all()
    np.testing.assert_array_equal(record['image'], scene['image'])
    expected = np.isin(np.arange(10), scene['box_labels']).astype(np.float32)
    np.testing.assert_array_equal(record['multi_label'], expected)
  assert (canvases[0]['image'] != data.canvases(source, length=40, seed=2)[0]['image']).any()


def test_the_lighter_of_object_and_canvas_is_seen():
  images = np.random.default_rng(0).integers(0, 256, (3, 9, 9, 1), np.uint8)
  glyphs, ground = (
    data.Scenes(
      data.InMemory({'image': own, 'label': np.arange(3)}),
      canvas=9, side=9, texture=1.0, blend='lighter', annotations=False,
    )
    for own in (images, np.zeros_like(images))
  )  # fmt: skip
  for i in range(3):
    record = glyphs[i]
    expected = np.maximum(images[record['label']], ground[i]['image'])
    np.testing.assert_array_equal(record['image'], expected)
    assert (expected != images[record['label']]).any()


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'side': (10, 41)}, r'side \(10, 41\) does not fit on a canvas of 40x56'),
    ({'side': (12, 10)}, 'side is'),
    ({'num_objects': 0}, 'num_objects is 0'),
    ({'texture': 1.5}, 'texture is 1.5'),
    ({'imbalance': 0.5}, 'imbalance is 0.5'),
    ({'pastes': 2, 'imbalance': 3.0}, 'without imbalance and length'),
    ({'length': 0}, 'length is 0'),
    ({'places': 0}, 'places is 0'),
    ({'blend': 'under'}, 'blend is .under'),
    ({'annotations': ('boxs',)}, "'boxs'. are none of"),
  ],
)
def test_bad_options_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    _scenes(**options)


def test_index_beyond_the_end_is_an_error():
  with pytest.raises(IndexError, match='out of range'):
    _scenes(length=5)[5]


def test_a_gap_lies_between_the_squares_of_objects():
  scenes = _scenes(num_objects=3, canvas=64, side=(10, 14), gap=5, boxes='square', length=40)
  counts = []
  for i in range(len(scenes)):
    boxes = scenes[i]['boxes'][scenes[i]['box_mask']]
    counts.append(len(boxes))
    for a, b in ((a, b) for k, a in enumerate(boxes) for b in boxes[:k]):
      between = np.maximum(a[:2], b[:2]) - np.minimum(a[2:], b[2:])
      assert between.max() >= 5
  assert np.mean(counts) > 2.5


def test_a_box_is_the_pasted_square_where_asked_for():
  square, glyph = (_scenes(boxes=kind, seed=2) for kind in ('square', 'glyph'))
  for i in range(20):
    a, b = square[i], glyph[i]
    np.testing.assert_array_equal(a['image'], b['image'])
    sides = a['boxes'][:, 2:] - a['boxes'][:, :2]
    used = a['box_mask']
    assert (sides[used, 0] == sides[used, 1]).all() and (sides[used] >= 10).all()
    assert (a['boxes'][:, :2] <= b['boxes'][:, :2]).all()
    assert (a['boxes'][:, 2:] >= b['boxes'][:, 2:]).all()


def test_noise_is_smooth_but_for_its_pixels_and_objects_are_lighter():
  options = {'canvas': 64, 'num_objects': 1, 'side': (20, 30), 'ground': 'noise', 'boxes': 'square'}
  scenes = _scenes(**options, texture=1.0, blend='lighter', seed=1)
  plain = _scenes(**options, texture=0.0, blend='lighter', seed=1)
  levels = []
  for i in range(30):
    record, alone = scenes[i], plain[i]
    image, glyph = record['image'].astype(float), alone['image'].astype(float)
    y0, x0, y1, x1 = record['boxes'][0].astype(int)
    np.testing.assert_array_equal(record['boxes'], alone['boxes'])
    assert (image >= glyph).all()
    light = glyph > 0.46 * 255  # above all that the ground can be
    np.testing.assert_array_equal(image[light], glyph[light])
    image[y0:y1, x0:x1] = np.nan
    levels.append(image)
  levels = np.stack(levels) / 255
  # Means of uniform numbers: 0.45 / 2. Far apart, pixels share nothing; side by side, the smooth part.
  np.testing.assert_allclose(np.nanmean(levels), 0.225, atol=0.01)
  assert np.nanmax(levels) <= 0.45 + 1 / 255
  near = np.nanstd(levels[:, :, 1:] - levels[:, :, :-1])
  far = np.nanstd(levels[:, :, 12:] - levels[:, :, :-12])
  assert near < 0.6 * far


@pytest.mark.parametrize('wrong', [{'ground': 'sea'}, {'blend': 'x'}, {'boxes': 'x'}, {'gap': -1}])
def test_unknown_grounds_blends_boxes_and_gaps_are_refused(wrong):
  (name,) = wrong
  with pytest.raises(ValueError, match=name):
    _scenes(**wrong)


def test_canvases_may_have_a_ground_and_objects_on_each_other():
  options = {'num_objects': (1, 4), 'canvas': 24, 'side': 12, 'length': 60, 'seed': 3}
  free = {**options, 'texture': 1.0, 'ground': 'noise', 'max_overlap': 1.0}
  canvases = data.canvases(_digits(), **free)
  scenes = data.Scenes(_digits(), places=100, blend='lighter', **free)
  counts, covered = set(), 0.0
  for i in range(60):
    record, scene = canvases[i], scenes[i]
    np.testing.assert_array_equal(record['image'], scene['image'])
    counts.add(int(scene['box_mask'].sum()))
    assert record['image'].min() < 40 and len(np.unique(record['image'][:4, :4])) > 3
    boxes = scene['boxes'][scene['box_mask']]
    for a in range(len(boxes)):
      for b in range(a):
        low, high = np.maximum(boxes[a], boxes[b])[:2], np.minimum(boxes[a], boxes[b])[2:]
        covered = max(covered, np.prod(np.clip(high - low, 0, None)) / 144)
  assert counts == {1, 2, 3, 4} and covered > 0.5
  with pytest.raises(ValueError, match='max_overlap is'):
    data.canvases(_digits(), max_overlap=1.5)
