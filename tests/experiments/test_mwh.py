import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_vectors import assert_close

from experiments import mwh
from experiments.harness import data as harness_data
from experiments.harness import launcher
from experiments.harness.settings import SettingsError
from jaxlab import data, models
from jaxlab.training import step_keys

TINY = (
  "network.model={'name': 'convnet', 'widths': (4,), 'hidden': (8,)}",
  'network.data.train_size=64',
  "network.data.train_options={'limit': 64}",
  "network.data.test_options={'limit': 48}",
  'network.recipe.batch_size=16',
  'network.recipe.epochs=2',
  'network.recipe.eval_every=4',
  "mixing={'none': {'schedule': 'none'}, 'mwh': {'p': 0.25, 'q': 0.75, 'alpha': 1.0}, 'more': {'p': 0.25,"
  " 'q': 0.75, 'alpha': 2.0}}",
  'claims=()',
  'pictured=()',
)


def tiny_config(*changes):
  """Returns the embedded setting with a network that compiles in seconds; 8 steps."""
  return launcher.load('mwh', 'embedded', [*TINY, *changes])


def batch(seed):
  rng = np.random.default_rng(seed)
  return {
    'image': jnp.asarray(rng.integers(0, 256, (16, 16, 16, 1), np.uint8)),
    'label': jnp.asarray(rng.integers(0, 10, 16), jnp.int32),
    'index': jnp.arange(16, dtype=jnp.int32),
  }


@pytest.mark.exhaustive
def test_one_program_mixes_as_the_stage_of_its_step_says():
  config = tiny_config()
  own = mwh.programs(config)['mwh'].program
  init, step = jax.jit(own.init), jax.jit(own.step)
  state, model = init(jax.random.key(0)), models.create(**config.network.model)
  images = data.normalize(data.to_float(batch(0)['image']), 0.205, 0.302)

  @jax.jit
  def expected(state, key):
    mixed, partners, lam = data.mixup(key, images, 1.0, own_half=True)
    losses = []
    for x, share in ((images, 1.0), (mixed, lam)):
      variables = {'params': state.params, **state.model_state}
      logits, _ = model.apply(variables, x, train=True, mutable=['batch_stats'])
      each = lambda labels: optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()  # noqa: B023, E731
      labels = batch(0)['label']
      losses.append(share * each(labels) + (1 - share) * each(labels[partners]))
    return losses

  # Of 8 steps two mix, then even ones do, and the last two with chances 1 and 1/2.
  chances = [1, 1, 1, 0, 1, 0, 1, 0.5]
  for chance in chances:
    draw, key = jax.random.split(step_keys(state)['mixup'])
    plain, mixed = expected(state, key)
    state, metrics = step(state, {}, batch(0))
    drawn = chance == 1 or (chance > 0 and float(jax.random.uniform(draw)) < chance)
    assert_close(metrics['loss'], mixed if drawn else plain, 1e-5)
    assert abs(plain - mixed) > 1e-4


def test_alpha_0_and_no_schedule_are_plain_training():
  config = tiny_config("mixing={'none': {'schedule': 'none'}, 'zero': {'alpha': 0.0}}")
  assert all(mwh.mixer(config, own) is None for own in config.mixing.values())
  own = config.mixing['none']
  assert not np.any(own.probability(8, 4)(np.arange(8)))


def test_what_a_larger_alpha_loses_is_told_of_rows_that_are_alike_otherwise():
  config = launcher.load('mwh', 'embedded')
  accuracies = {'always_05': 84.0, 'always_2': 82.5, 'mwh_05': 85.0, 'mwh_2': 84.5, 'none': 83.0}
  found = {name: {'accuracy': value} for name, value in accuracies.items()}
  assert mwh.lost(config, found) == {'always_2': 1.5, 'mwh_2': 0.5}


def test_the_papers_settings_count_epochs():
  config = launcher.load('mwh', 'cifar100_preact_resnet18')
  own = config.mixing['mwh_05']
  steps = 390 * np.arange(100) + 17
  found = own.probability(config.total_steps, config.steps_per_epoch)(steps)
  assert found[:60].min() == 1 and found[60:64].tolist() == [1, 0, 1, 0]
  assert_close(found[90:], np.arange(10, 0, -1) / 10, 1e-5)
  rate = config.network.recipe.schedule.make(100, 390)
  assert_close(
    [rate(s) for s in (0, 390 * 50 - 1, 390 * 50, 390 * 75)], [0.1, 0.1, 0.01, 0.001], 1e-5
  )


@pytest.mark.parametrize(
  ('changes', 'messages'),
  [
    (
      (
        "mixing={'a': {'alpha': -1.0, 'title': 'x'}, 'b': {'p': 0.9, 'q': 0.5, 'title': 'x'}}",
        *('runs=c,', 'clean_records=0', 'network.recipe.mixup=0.2', 'network.recipe.batch_size=65'),
      ),
      (
        *('mixing.a.alpha=-1.0', 'mixing.b.p, q: ', 'titles that differ', "runs: ['c']"),
        *('clean_records=0', 'network.recipe.mixup=0.2', 'batch_size=65'),
      ),
    ),
    (('network.recipe=none', 'network.pretrained=resnet18'), ('network.recipe: missing',)),
  ],
)
def test_impossible_settings_are_named_all_at_once(changes, messages):
  with pytest.raises(SettingsError) as caught:
    launcher.check(tiny_config(*changes))
  for message in messages:
    assert message in str(caught.value)


def test_a_run_compares_rows_on_plain_images(tmp_path):
  config = tiny_config('clean_records=20', 'runs=mwh,more')
  launcher.check(config)
  found = mwh.run(config, tmp_path)
  rows = {row['name']: row['metrics'] for row in found['rows']}
  assert list(rows) == ['mwh', 'more']
  assert_close(rows['more']['lost'], rows['mwh']['accuracy'] - rows['more']['accuracy'], 1e-6)
  assert 'lost' not in rows['mwh']
  for name in ('schedules', 'accuracy'):
    assert (tmp_path / f'{name}.png').stat().st_size > 5000
  # The training loss is that of the first records, in evaluation mode.
  source = harness_data.load(config.network.data, 'train')
  trained = mwh.runs.train(mwh.programs(config)['mwh'], source, tmp_path / 'mwh')
  images = data.normalize(data.to_float(jnp.asarray(source.arrays['image'][:20])), 0.205, 0.302)
  logits = jax.jit(models.create(**config.network.model).apply)(trained.variables, images)
  expected = optax.softmax_cross_entropy_with_integer_labels(logits, source.arrays['label'][:20])
  assert_close(rows['mwh']['train_loss'], expected.mean(), 1e-4)
