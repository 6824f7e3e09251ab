import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close

from experiments import curl
from experiments.harness import launcher
from experiments.harness.settings import SettingsError
from jaxlab import compression, data, losses

TINY = (
  "network.model={'name': 'cifar_resnet50', 'stage_sizes': (1, 1), 'strides': (2, 2), 'width': 4, 'widths': "
  "(4, 4), 'trunk_widths': (8, 8), 'num_classes': 10}",
  'network.data.train_size=64',
  "network.data.train_options={'limit': 64}",
  "network.data.test_options={'limit': 48}",
  'network.recipe.batch_size=32',
  'network.recipe.epochs=2',
  'limited.total=32',
  'proxy=16',
  "protected=('stem', 'layer2')",
  'shares=(0.6,)',
  "rankings=('curl',)",
  'recipe.batch_size=16',
  'recipe.epochs=2',
  'recipe.schedule.warmup_epochs=0',
  'refinement.recipe.batch_size=16',
  'refinement.recipe.epochs=1',
  "quantized=('8w8a',)",
  'claims=()',
  'pictured=()',
)


def tiny_config(*changes):
  return launcher.load('curl', 'embedded', [*TINY, *changes])


@pytest.fixture(scope='module')
def ran(tmp_path_factory):
  """Returns a whole run of the smallest setting, and its folder."""
  config, folder = tiny_config(), tmp_path_factory.mktemp('curl')
  launcher.check(config)
  return config, folder, curl.run(config, folder)


def test_run_ranks_prunes_and_trains(ran):
  config, folder, found = ran
  rows = {row['name']: row['metrics'] for row in found['rows']}
  assert set(rows) == {
    'whole',
    "CURL's ranking",
    'mixup and distillation',
    'label refinement',
  }
  assert set(rows["CURL's ranking"]) == {'pruned_to_60', 'macs', 'trained'}
  for name in ('whole', 'label refinement'):
    assert 'quantized_8w8a' in rows[name]
  # The nearest entry of the list below the target.
  assert 40 < rows["CURL's ranking"]['macs'] <= 60
  plan = compression.Plan.load(folder / 'plan_curl_60.json')
  assert plan.sizes == compression.structure(curl.whole_network(config)).sizes
  assert not {'stem', 'layer2'} & set(plan.keep)
  assert (folder / 'accuracy_over_operations.png').stat().st_size > 1000


def test_labels_are_refined_by_the_closed_form():
  config = tiny_config('refinement.rate=0.5')
  plan = curl.pruned(config, curl.random_scores(config), 0.6)
  run = curl.training(config, 'refined', 'curl', plan)
  rng = np.random.default_rng(0)
  table = rng.normal(size=(32 * 6, 10)).astype(np.float32)
  batch = {
    'image': rng.integers(0, 256, (16, 16, 16, 1), np.uint8),
    'label': rng.integers(0, 10, 16).astype(np.int32),
    'index': rng.permutation(192)[:16].astype(np.int32),
  }
  state = jax.jit(run.program.init)(jax.random.key(0))
  # With an empty classifier every class is predicted with 1/10, whatever the images.
  blank = jax.tree.map(jnp.zeros_like, state.params['fc'])
  state = curl.begin(table)(state.replace(params={**state.params, 'fc': blank}))
  new, _ = jax.jit(run.program.step)(state, {}, batch)
  moved = np.asarray(new.extra['table']['logits'])[:192]
  seen = batch['index']
  untouched = np.setdiff1d(np.arange(192), seen)
  np.testing.assert_array_equal(moved[untouched], table[untouched])
  expected = table[seen] - 0.5 * 0.7 / 16 * (np.asarray(jax.nn.softmax(table[seen])) - 0.1)
  assert_close(moved[seen], expected, 1e-6)


def test_distillation_of_mixed_images_is_the_sheets_loss():
  rng = np.random.default_rng(0)
  student, teacher = (jnp.asarray(rng.normal(size=(4, 5)), jnp.float32) for _ in range(2))
  a, b, share = jnp.array([0, 1, 2, 3]), jnp.array([3, 2, 1, 0]), 0.3

  def one(labels):
    return losses.mixup_distillation_loss(student, teacher, labels, labels, 1.0)

  # The harness weighs the loss of both labels by their shares.
  expected = losses.mixup_distillation_loss(student, teacher, a, b, share)
  assert_close(share * one(a) + (1 - share) * one(b), expected, 1e-6)


def test_the_search_finds_the_first_list_that_is_short_enough():
  scores = {'a': np.arange(10.0), 'b': np.arange(10.0) + 0.5}
  cost = lambda keep: sum(own.sum() for own in keep.values())  # noqa: E731
  count = compression.search_num_remove(scores, cost, 12)
  keep = compression.global_ranking(scores, count)
  before = compression.global_ranking(scores, count - 1)
  assert cost(keep) <= 12 < cost(before)
  with pytest.raises(ValueError, match='target=1: 4 is the least'):
    compression.search_num_remove(scores, cost, 1)
  # Lists that would empty a small group are not looked at.
  small = {'a': np.zeros(3), 'b': np.arange(20.0) + 1}
  assert (
    cost(compression.global_ranking(small, compression.search_num_remove(small, cost, 21))) == 21
  )


def test_a_set_is_expanded_the_same_way_each_time():
  image = np.arange(2 * 9 * 8 * 3, dtype=np.uint8).reshape(2, 9, 8, 3)
  source = data.InMemory({'image': image, 'label': np.array([4, 7])}, num_classes=10)
  found = data.Expanded(source, seed=3)
  assert len(found) == 12 and found.num_classes == 10
  np.testing.assert_array_equal(found[1]['image'], image[1])
  for index in range(12):
    record = found[index]
    assert record['image'].shape == (9, 8, 3) and record['image'].dtype == np.uint8
    assert int(record['label']) == (4, 7)[index % 2] and int(record['index']) == index
    np.testing.assert_array_equal(record['image'], data.Expanded(source, seed=3)[index]['image'])
  tiles = found[2]['image']
  assert sorted(tiles.ravel().tolist()) == sorted(image[0].ravel().tolist())
  np.testing.assert_array_equal(tiles[8:], image[0, 8:])  # behind the last whole tile
  assert (found[8]['image'] == 0).sum() > 0
  with pytest.raises(IndexError):
    found[12]


def test_a_turn_by_a_quarter_is_exact():
  image = np.arange(16, dtype=np.uint8).reshape(4, 4, 1)
  np.testing.assert_array_equal(data.rotate_degrees(image, 90), np.rot90(image))
  with pytest.raises(ValueError, match='grid=5'):
    data.shuffle_tiles(np.random.default_rng(0), image, 5)
  with pytest.raises(ValueError, match='expected shares'):
    data.cut_out_share(np.random.default_rng(0), image, 0.6, 0.5)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ('proxy=64', 'proxy=64 exceeds the 32 images'),
    ('shares=(0.5, 0.8)', 'expected falling shares'),
    ('shares=(0.01,)', 'is the least that min_ratio=0.3'),
    ("protected=('layer9',)", "no group matches 'layer9'"),
    ("rankings=('l1',)", "'curl' is the method"),
    ('recipe.mixup=1', r'distillation\.mixup=1\.0 is one'),
    ("network.model={'name': 'cnn13'}", 'What can be cut out of CNN13 is not known'),
  ],
)
def test_settings_that_cannot_be_are_refused(change, message):
  with pytest.raises(SettingsError, match=message):
    launcher.check(tiny_config(change))
