import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import assert_same, on_one_and_on_eight

from experiments import idmm
from experiments.harness import launcher
from experiments.harness.settings import SettingsError
from experiments.protocols import fine_tuning_stages
from jaxlab import data, training
from jaxlab.training import step_keys

TINY = (
  "model={'name': 'vit_tiny_patch16_224', 'patch_size': 8, 'image_size': 16, 'width': 8, 'depth': 1, "
  "'num_heads': 2}",
  'recipe.batch_size=16',
  'data.train_size=40',
  'eval.calibration=16',
)


def tiny_config(*changes):
  """Returns the embedded setting with a network that compiles in seconds."""
  return launcher.load('idmm', 'embedded', [*TINY, *changes])


def random_batch(seed=0):
  rng = np.random.default_rng(seed)
  image = jnp.asarray(rng.integers(0, 256, (16, 16, 16, 1), np.uint8))
  return {'image': image, 'index': jnp.asarray(rng.permutation(40)[:16], jnp.int32)}


@functools.cache
def compiled(*changes):
  config = tiny_config(*changes)
  program = idmm.programs(config)['idmm'].program
  return config, program, jax.jit(program.init), jax.jit(program.step)


def log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


TWO_GROUPS = ('instances.crops=(2, 1)', 'instances.scales=((0.3, 1.0), (0.1, 0.4))')


def test_the_loss_is_the_sum_of_the_groups_mixed_cross_entropies():
  config, _, init, step = compiled(*TWO_GROUPS, 'instances.label_smoothing=0.1')
  state, batch = init(jax.random.key(0)), random_batch()
  _, metrics = step(state, {}, batch)
  model = fine_tuning_stages.network(config, config.data, 40)
  keys = step_keys(state)

  @jax.jit
  def outputs(params, batch):
    each = jax.vmap(lambda i: jax.random.fold_in(keys['views'], i))(batch['index'])
    found = []
    for index, x in enumerate(idmm.draw_crops(config, config.instances)(each, batch['image'])):
      key = jax.random.fold_in(keys['mix'], index)
      x, partners, share = data.cutmix(key, x, 0.5, own_half=True)
      found.append((model.apply({'params': params}, x), partners, share))
    return found

  expected, sizes = 0.0, []
  for logits, partners, share in outputs(state.params, batch):
    log_p = log_softmax(np.asarray(logits, np.float64))
    rows = np.arange(len(log_p))
    own = np.repeat(np.asarray(batch['index']), len(log_p) // 16)
    for labels, weight in ((own, float(share)), (own[np.asarray(partners)], 1 - float(share))):
      smooth = 0.9 * log_p[rows, labels] + 0.1 * log_p.mean(-1)
      expected -= weight * smooth.mean()
    sizes.append(len(log_p))
    assert 0.5 <= share <= 1
  assert sizes == [32, 16]
  np.testing.assert_allclose(metrics['loss'], expected, rtol=1e-5)


@pytest.mark.exhaustive
def test_the_average_moves_behind_every_epoch_alone():
  _, _, init, step = compiled()  # epochs of two steps
  state = init(jax.random.key(0))
  average, found = np.asarray(state.params['head']['bias']), []
  for count in range(1, 5):
    state, _ = step(state, {}, random_batch(count))
    new = np.asarray(state.params['head']['bias'])
    if count % 2 == 0:
      share = float(training.warm_decay(0.999, count // 2))
      average = share * average + (1 - share) * new
    found.append(np.any(new != average))
    np.testing.assert_allclose(state.extra['average']['head']['bias'], average, atol=1e-7)
  assert found[-1]


@pytest.mark.exhaustive
def test_a_step_is_the_same_on_one_and_on_eight_devices():
  _, program, *plain = compiled('recipe.optimizer.name=sgd', 'recipe.schedule.warmup_epochs=0')
  batches = [random_batch(seed) for seed in range(2)]
  found = on_one_and_on_eight(program, batches, plain=plain, fsdp_min_size=64)
  one, eight = ((state.params, state.extra, metrics['loss']) for state, metrics in found)
  assert_same(one, eight, 1e-3, 1e-4)


@pytest.mark.exhaustive
def test_mixtures_alternate_between_epochs():
  mix = fine_tuning_stages.mixer('alternate', 0.5, 3)
  images = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8, 8, 1)), jnp.float32)
  for step, own in ((0, data.mixup), (2, data.mixup), (3, data.cutmix), (6, data.mixup)):
    found = mix(jax.random.key(step), images, jnp.int32(step))
    expected = own(jax.random.key(step), images, 0.5, own_half=True)
    for a, b in zip(found, expected, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-6)
  assert fine_tuning_stages.mixer('none', 0.5) is None


def test_dino_is_a_first_stage_with_prototypes_of_its_own():
  config = tiny_config('runs=dino', 'prototypes.count=24', 'prototypes.bottleneck=4')
  run = idmm.first_stages(config)['dino']
  state = jax.eval_shape(run.program.init, jax.random.key(0))
  assert state.extra['center'].shape == (24,)
  assert state.params['encoder']['projector']['last_layer_kernel'].shape == (4, 24)
  assert run.title == 'DINO' and run.decides['prototypes'].count == 24
  other = idmm.first_stages(tiny_config('runs=simclr'))['simclr']
  assert 'prototypes' not in other.decides


def test_a_position_code_grows_with_the_images():
  config = tiny_config()
  model = fine_tuning_stages.network(config, dataclasses.replace(config.data, image_size=32), 10)
  rng = np.random.default_rng(0)
  params = {'pos_embed': jnp.asarray(rng.standard_normal((1, 5, 8)), jnp.float32), 'w': 1.0}
  found = fine_tuning_stages.enlarged({'params': params}, model)['params']
  assert found['pos_embed'].shape == (1, 17, 8) and found['w'] == 1.0
  np.testing.assert_array_equal(found['pos_embed'][:, 0], params['pos_embed'][:, 0])
  # The mean of all places is that of the four in the middle, by symmetry of the kernel's taps.
  total = np.asarray(found['pos_embed'][:, 1:]).mean(1)
  np.testing.assert_allclose(total, np.asarray(params['pos_embed'][:, 1:]).mean(1), atol=1e-5)


@pytest.mark.exhaustive
def test_the_random_features_of_a_performer_stay():
  config = tiny_config(
    "model={'name': 't2t_vit_7', 'width': 8, 'depth': 1, 'num_heads': 2, 'token_width': 4}",
    'fan_in_scaled=()',
  )
  program = idmm.programs(config)['idmm'].program
  state = jax.jit(program.init)(jax.random.key(0))
  first, step = state, jax.jit(program.step)
  for seed in range(2):  # the first step's learning rate is 0
    state, _ = step(state, {}, random_batch(seed))
  path = lambda state: state.params['tokens']['attention1']  # noqa: E731
  np.testing.assert_array_equal(path(first)['random_features'], path(state)['random_features'])
  assert np.any(path(first)['kqv']['kernel'] != path(state)['kqv']['kernel'])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (('runs=idmn,',), 'idmn'),
    (('runs=()',), 'runs is empty'),
    (('stages={}',), 'stages: expected at least one'),
    (('instances.crops=(0,)',), 'instances.crops'),
    (('instances.crops=(2, 2)',), 'a number and a scale for each group'),
    (('instances.groups=2',), 'instances.groups=2: expected 1 to 1'),
    (('instances.alpha=-1',), 'instances.alpha=-1'),
    (('instances.label_smoothing=2',), 'instances.label_smoothing=2'),
    (('instances.mix=cutmux',), 'instances.mix'),
    (('stages.labels.alpha=-1',), 'stages.labels.alpha=-1'),
    (('runs=moco', 'target.queue_size=33'), 'target.queue_size=33: expected a multiple'),
    (
      ('runs=dino', 'recipe.optimizer.clip_global_norm=1.0', 'prototypes.held_epochs=1'),
      'clip_global_norm: DINO',
    ),
    (('stages.labels.recipe.mixup=0.2',), 'stages.labels.recipe.mixup=0.2'),
    (('stages.labels.recipe.batch_size=48',), 'exceeds data.train_size=40'),
    (("stages.labels.data={'image_sise': 8}",), 'image_sise'),
    (("stages.labels.data={'image_size': 20}",), 'does not divide into patches'),
    (('recipe.microbatches=2',), 'recipe.microbatches: expected 1'),
    (('fan_in_scaled=["qkw/kernel"]',), "fan_in_scaled: No parameter matches pattern 'qkw/kernel'"),
    (('fan_in_scaled=[".*qkv/kernel"]', 'runs=simclr'), 'fan_in_scaled: runs of simclr'),
    (("model={'name': 't2t_vit_7', 'width': 10, 'num_heads': 4}",), 'T2TViT: width=10'),
  ],
)
def test_impossible_settings_are_named(changes, message):
  with pytest.raises(SettingsError, match=message):
    launcher.check(tiny_config(*changes))


@pytest.mark.exhaustive
def test_kernels_start_with_the_deviation_of_pytorch_in_all_trainings_from_drawn_ones():
  config = tiny_config('fan_in_scaled=["blocks_.*/kernel"]')
  stage = fine_tuning_stages.training(config, 'labels', 'from scratch')
  for run in (idmm.instance_training(config, 'idmm'), stage):
    params = jax.jit(run.program.init)(jax.random.key(0)).params
    kernel = params['blocks_0']['attention']['qkv']['kernel']
    np.testing.assert_allclose(np.std(kernel), (3 * len(kernel)) ** -0.5, rtol=0.05)
    assert np.std(params['head']['kernel']) < 0.03


def test_a_run_compares_stages_with_labels_alone(tmp_path):
  changes = ['recipe.epochs=1', 'stages.labels.recipe.epochs=1', 'log_every=1', 'eval.k=5']
  changes += ['data.train_options={"limit": 40}', 'data.test_options={"pastes": 1}']
  changes += ['recipe.schedule.warmup_epochs=0', 'stages.labels.recipe.schedule.warmup_epochs=0']
  changes += ['stages.labels.recipe.batch_size=16', 'runs=scratch,idmm']
  config = tiny_config(*changes)
  launcher.check(config)
  found = idmm.run(config, tmp_path)
  assert [row['name'] for row in found['rows']] == ['untrained', 'from scratch', 'IDMM']
  untrained, scratch, own = (row['metrics'] for row in found['rows'])
  assert 'accuracy' not in untrained and 'knn_fp' not in scratch
  assert 0 <= own['accuracy'] <= 100 and 0 <= own['knn_fp'] <= 100
  assert (tmp_path / 'accuracy_and_neighbors.png').stat().st_size > 1000
  assert (tmp_path / 'curves.png').stat().st_size > 1000
