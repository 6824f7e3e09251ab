import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tables
from meshes import assert_same, on_one_and_on_eight

from experiments import ssl_baselines
from experiments.harness import launcher
from experiments.harness.settings import SettingsError
from experiments.protocols import masked_modeling, pretraining, siamese, siamese_methods
from jaxlab import evaluation, losses, parallel
from jaxlab.models import masked_autoencoder
from jaxlab.parallel import aot
from jaxlab.training import TrainState, cast_floating, step_keys

TINY = (
  "model={'name': 'vit_tiny_patch16_224', 'patch_size': 8, 'image_size': 16, 'width': 8, 'depth': 1, "
  "'num_heads': 2, 'dynamic_image_size': True}",
  *(f'heads.{name}=8' for name in ('hidden', 'features', 'predictor')),
  "prototypes={'count': 12, 'bottleneck': 4, 'held_epochs': 1, 'teacher_temperature': 0.07}",
  "masking={'ratio': 0.5, 'width': 8, 'depth': 1, 'num_heads': 2}",
  'recipe.batch_size=16',
  'target.queue_size=32',
)
DINO_VIEWS = "views=({}, {'solarize_probability': 0.5}, {'size': 8}, {'size': 8})"


def tiny_config(*changes):
  """Returns the embedded setting with a network that compiles in seconds."""
  return launcher.load('ssl_baselines', 'embedded', [*TINY, *changes])


def random_batch(seed=0):
  rng = np.random.default_rng(seed)
  image = jnp.asarray(rng.integers(0, 256, (16, 16, 16, 1), np.uint8))
  return {'image': image, 'index': jnp.arange(16, dtype=jnp.int32)}


@functools.cache
def compiled(name, *changes):
  """Returns the tiny setting, its program, and the program's compiled functions."""
  config = tiny_config(f'methods={name},', *changes)
  program = ssl_baselines.programs(config)[name].program
  return config, program, jax.jit(program.init), jax.jit(program.step)


def changed(before, after):
  moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)
  return {
    '/'.join(key.key for key in path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(moved)
  }


def log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize(
  'name', tables.few(sorted({*ssl_baselines.TITLES} - {'dino'}), 'moco', 'mae')
)
def test_a_step_moves_every_parameter_that_learns(name):
  _, _, init, step = compiled(name)
  state = init(jax.random.key(0))
  first = state
  for seed in range(2):  # the first step's learning rate is 0
    state, metrics = step(state, {}, random_batch(seed))
  moved = changed(first.params, state.params)
  still = {path for path, flag in moved.items() if not flag}
  assert still == ({'encoder/backbone/pos_embed'} if name == 'mae' else set())
  assert np.isfinite(metrics['loss']) and 0 < metrics['z_std'] <= 1


@pytest.mark.exhaustive
def test_dino_holds_its_prototypes_for_an_epoch_and_then_catches_up():
  config, _, init, step = compiled('dino', DINO_VIEWS, 'data.train_size=32')
  state = init(jax.random.key(0))
  path = 'encoder/projector/last_layer_kernel'
  for expected in (False, False, True):  # an epoch of 2 steps
    before = state
    state, _ = step(state, {}, random_batch(int(state.step)))
    moved = changed(before.params, state.params)
    assert moved[path] is expected, int(state.step)
    others = [flag for name, flag in moved.items() if name != path]
    assert all(others) or int(state.step) == 1  # with a learning rate of 0
  assert config.prototypes.held_epochs == 1


@pytest.mark.exhaustive
def test_dinos_center_is_the_moving_average_of_the_teachers_logits():
  config, _, init, _ = compiled('dino', DINO_VIEWS, 'data.train_size=32')
  state = init(jax.random.key(0))
  nets, targets = ssl_baselines.method(config, 'dino')
  views = [jax.random.normal(jax.random.key(i), (4, 16, 16, 1)) for i in range(2)]
  views.append(jax.random.normal(jax.random.key(2), (4, 8, 8, 1)))
  seen = targets.see(nets.encoder, state.extra, views, jax.random.key(0), jnp.int32(0))
  logits = jax.jit(nets.encoder.apply)(state.extra['target'], jnp.concatenate(views[:2]))
  np.testing.assert_allclose(seen.extra['center'], 0.1 * np.mean(logits, 0), rtol=1e-4, atol=1e-6)
  assert [view.shape for view in seen.views] == [(8, 16, 16, 1), (4, 8, 8, 1)]
  predictions = [jax.jit(nets.encoder.apply)(state.extra['target'], view) for view in seen.views]
  # In NumPy: both softmaxes at their temperatures, all pairs of different views.
  teacher = log_softmax(np.asarray(logits, np.float64).reshape(2, 4, -1) / 0.07)
  student = [np.asarray(p, np.float64) for p in predictions]  # rows are image by image
  student = np.stack([student[0][::2], student[0][1::2], student[1]])
  student = log_softmax(student / 0.1)
  pairs = [
    -(np.exp(teacher[i]) * student[v]).sum(-1).mean() for i in (0, 1) for v in (0, 1, 2) if v != i
  ]
  np.testing.assert_allclose(seen.loss(predictions, seen.targets), np.mean(pairs), rtol=1e-5)


@pytest.mark.parametrize('name', tables.few(['moco', 'dino'], 'moco'))
def test_queue_and_center_are_the_same_on_one_and_on_eight_devices(name):
  # Adam would turn rounding of a vanishing gradient into a step.
  changes = ('recipe.optimizer.name=sgd', 'recipe.schedule.warmup_epochs=0', 'data.train_size=32')
  changes += (DINO_VIEWS,) * (name == 'dino')
  _, program, *plain = compiled(name, *changes)
  batches = [random_batch(seed) for seed in range(2)]
  found = on_one_and_on_eight(program, batches, plain=plain, fsdp_min_size=64)
  one, eight = ((state.params, state.extra, metrics['loss']) for state, metrics in found)
  assert_same(one, eight, 2e-3, 2e-3)


GROUPED = "model={'name': 'cifar_resnet18', 'stage_sizes': (1,), 'width': 8, 'norm_groups': 2}"


@pytest.mark.parametrize(
  ('name', 'changes'),
  tables.few(
    [
      *((name, ()) for name in sorted(siamese_methods.TITLES)),
      ('dino', (DINO_VIEWS,)),
      ('moco', (GROUPED,)),
    ],
    ('dino', (DINO_VIEWS,)),
    ('moco', (GROUPED,)),
  ),
)
def test_each_of_eight_devices_does_an_eighth_of_the_work(name, changes):
  program = ssl_baselines.programs(tiny_config(f'methods={name},', *changes))[name].program
  one, eight = (
    aot.report(aot.compile_step(program, parallel.make_mesh(devices=jax.devices()[:count])))
    for count in (1, 8)
  )
  assert one['flops'] / eight['flops'] > 6
  # Features travel, images do not, but for MoCo's shuffling in front of norms with groups.
  if changes != (GROUPED,):
    kinds = ('all-gather', 'all-to-all', 'collective-permute')
    moved = [eight['collectives'].get(kind, {'bytes': 0})['bytes'] for kind in kinds]
    assert sum(moved) < 16 * 16 * 16 * 4


def test_views_differ_as_the_setting_says():
  plain = "'scale': (1.0, 1.0), 'rotation': 0.0, 'contrast': None, 'brightness': None"
  views = (
    f"views=({{{plain}}}, {{{plain}, 'solarize_probability': 1.0}}, {{'size': 8}}, {{'size': 8}})"
  )
  config = tiny_config(views, 'methods=dino,', 'data.mean=0.0', 'data.std=1.0')
  keys = jax.random.split(jax.random.key(0), 5)
  images = jnp.full((5, 16, 16, 1), 0.9)
  found = jax.jit(ssl_baselines.draw_views(config))(keys, images)
  assert [view.shape[1] for view in found] == [16, 16, 8, 8]
  np.testing.assert_allclose(found[0], 0.9, atol=1e-5)
  np.testing.assert_allclose(found[1], 0.1, atol=1e-5)
  assert not np.array_equal(found[2], found[3])


def test_a_momentum_encoder_follows_by_the_schedule_of_the_finished_step():
  share = siamese_methods.Momentum(0.9, final=1.0).schedule(10)
  after = siamese.follow(share)
  for step in (0, 5, 9):
    params, target = {'encoder': {'w': jnp.float32(3.0)}}, {'params': {'w': jnp.float32(1.0)}}
    state = TrainState(jnp.int32(step + 1), params, {}, {}, {'target': target})
    kept = 1.0 + (0.9 - 1.0) * (1 + np.cos(np.pi * step / 10)) / 2
    expected = kept * 1.0 + (1 - kept) * 3.0
    np.testing.assert_allclose(after(state).extra['target']['params']['w'], expected, rtol=1e-5)


@pytest.mark.parametrize('name', tables.few(['moco', 'byol', 'mae', 'dino'], 'moco'))
def test_blocks_are_dropped_of_the_trained_network_alone(name):
  drop = TINY[0].replace("'dynamic", "'drop_path': 0.5, 'dynamic")
  config = tiny_config(drop, f'methods={name},')
  found = ssl_baselines.programs(config)[name].program
  state = jax.eval_shape(found.init, jax.random.key(0))
  jax.eval_shape(found.step, state, {}, random_batch())


@pytest.mark.parametrize('standardized', tables.few([True, False], True))
def test_maes_loss_is_the_error_of_hidden_pixels_in_float32(standardized):
  changes = (f'masking.norm_pix_loss={standardized}', 'recipe.precision=bfloat16')
  config, _, init, step = compiled('mae', *changes)
  state = init(jax.random.key(0))
  _, metrics = step(state, {}, random_batch())
  # The same by hand, from the views and the mask that this step draws.
  vit, decoder = masked_modeling.parts(config, config.masking)
  draw = ssl_baselines.draw_views(dataclasses.replace(config, views=({},)))

  @jax.jit
  def predict(params, keys, image):
    each = jax.vmap(lambda i: jax.random.fold_in(keys['views'], i))(jnp.arange(16))
    (images,) = draw(each, image)
    noise = jax.random.uniform(keys['mask'], (16, 4))
    keep, mask, restore = masked_autoencoder.random_masking(noise, 0.5)
    variables = {'params': params['encoder']['backbone']}
    half = images.astype(jnp.bfloat16)
    tokens = masked_autoencoder.encode_visible(vit, variables, half, keep)
    pixels = decoder.apply({'params': params['decoder']}, tokens, restore)
    return pixels, masked_autoencoder.patchify(images, 8), mask

  params = cast_floating(state.params, jnp.bfloat16)
  found = predict(params, step_keys(state), random_batch()['image'])
  pixels, target, mask = (np.asarray(array, np.float64) for array in found)
  if standardized:
    spread = target.var(-1, ddof=1, keepdims=True)
    target = (target - target.mean(-1, keepdims=True)) / np.sqrt(spread + 1e-6)
  errors = np.mean((pixels - target) ** 2, -1)
  expected = np.sum(errors * mask) / np.sum(mask)
  np.testing.assert_allclose(metrics['loss'], expected, rtol=2e-3)


@pytest.mark.exhaustive
def test_without_stop_gradient_and_predictor_all_images_get_one_feature():
  config = tiny_config('methods=simsiam,')
  nets, _ = ssl_baselines.method(config, 'simsiam')
  nets = nets._replace(predictor=None)

  def cosine(predictions, targets):
    a, b = map(losses.normalize, predictions)
    return -jnp.mean(jnp.sum(a * b, -1))

  targets = siamese_methods.own_projections(cosine)
  start = siamese.init(nets, targets, jnp.zeros((2, 16, 16, 1)))(jax.random.key(0))
  optimizer, draw = optax.adam(1e-2), ssl_baselines.draw_views(config)
  image = random_batch()['image']

  @jax.jit
  def advance(carry, key):
    params, stats, opt_state = carry

    def loss(params):
      online = siamese.online_pass(nets, params, stats, draw(jax.random.split(key, 16), image))
      value = cosine(online.projections, None)
      return value, (online.batch_stats, evaluation.feature_std(online.projections[0]))

    (value, (stats, z_std)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return (optax.apply_updates(params, updates), stats, opt_state), (value, z_std)

  carry = start.params, start.model_state['batch_stats'], optimizer.init(start.params)
  _, (value, z_std) = jax.lax.scan(advance, carry, jax.random.split(jax.random.key(1), 150))
  assert value[-1] < -0.99 and z_std[-1] < 0.1 < pretraining.COLLAPSED < z_std[0]


@pytest.mark.exhaustive
def test_dinos_last_layer_has_the_options_that_name_it():
  changes = (
    DINO_VIEWS,
    'data.train_size=32',
    "recipe.optimizer.no_decay=('ndim<=1',)",
    "recipe.optimizer.lr_multipliers=(('encoder/backbone/.*', 0.5), ('.*/last_layer_kernel', 2.0))",
    'prototypes.norm_last_layer=False',
    'final_weight_decay=0.4',
  )
  config = tiny_config('methods=dino,', *changes)
  program = ssl_baselines.programs(config)['dino'].program
  state = jax.eval_shape(program.init, jax.random.key(0))
  params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), state.params)
  made = ssl_baselines.optimizer(config, 'dino')(optax.constant_schedule(0.1))
  optimizer_state, zero = made.init(params), jax.tree.map(jnp.zeros_like, params)
  for _ in range(3):  # gradients of 0: what moves is decay; the last layer in the third step
    updates, optimizer_state = made.update(zero, optimizer_state, params)
  last = updates['encoder']['projector']
  steps = 32 // 16 * config.recipe.epochs
  decay = 0.4 + (1e-3 - 0.4) * (1 + np.cos(np.pi * 2 / steps)) / 2
  np.testing.assert_allclose(last['last_layer_kernel'], -0.1 * 2 * decay, rtol=1e-3)
  np.testing.assert_array_equal(last['last_layer_scale'], 0)


@pytest.mark.parametrize('name', list(ssl_baselines.TITLES))
def test_a_run_is_decided_by_what_its_method_reads(name):
  changes = {
    'masking.width=16': {'mae'},
    'target.momentum=0.5': {'simclr', 'moco', 'byol', 'dino'},
    'redundancy_weight=0.1': {'barlow'},
    'predictor_rate=0.1': {'simsiam'},
    'prototypes.warmup_epochs=2': {'dino'},
    'heads.features=4': {*ssl_baselines.TITLES} - {'mae'},
    'final_weight_decay=0.2': {*ssl_baselines.TITLES},
  }
  first = ssl_baselines.decides(tiny_config(), name)
  for change, methods in changes.items():
    assert (ssl_baselines.decides(tiny_config(change), name) != first) == (name in methods), change


def test_simsiams_predictor_keeps_its_rate_and_weight_decay_follows_a_cosine():
  changes = ('predictor_rate=0.25', 'final_weight_decay=0.4', 'heads.style=own')
  short = ('recipe.epochs=1', 'recipe.schedule.warmup_epochs=0', 'data.train_size=64')
  config = tiny_config(
    'methods=simsiam,', *changes, 'recipe.optimizer={"name": "sgd", "weight_decay": 0.1}', *short
  )
  params = jax.eval_shape(ssl_baselines.programs(config)['simsiam'].program.init, jax.random.key(0))
  ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), params.params)
  made = ssl_baselines.optimizer(config, 'simsiam')(lambda count: 0.1 / (1 + count))
  state, zero = made.init(ones), jax.tree.map(jnp.zeros_like, ones)
  decay, velocity = [], 0.0
  for _ in range(2):
    updates, state = made.update(zero, state, ones)
  steps = config.data.train_size // config.recipe.batch_size * config.recipe.epochs
  assert steps == 4
  for step in range(2):  # velocity is what weight decay put in
    decay.append(0.4 - 0.3 * (1 + np.cos(np.pi * step / steps)) / 2)
    velocity = 0.9 * velocity + decay[-1]
  predictor = jax.tree.leaves(updates['predictor'])[0]
  np.testing.assert_allclose(predictor, -0.25 * velocity, rtol=1e-3)
  kernel = updates['encoder']['backbone']['patch_embed']['proj']['kernel']
  np.testing.assert_allclose(kernel, -0.05 * velocity, rtol=1e-3)
  assert not np.any(updates['encoder']['projector']['fc2']['bias'])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (('methods=simclr,mocco',), 'mocco'),
    (('views=({},)',), 'at least 2'),
    (('target.queue_size=33',), 'target.queue_size=33: expected a multiple of'),
    ((DINO_VIEWS,), 'are for DINO; barlow, byol'),
    (("views=({}, {'siz': 4})",), 'siz'),
    (('masking.ratio=1.0',), 'ratio=1.0'),
    (('target.temperature=0',), 'temperature=0'),
    (('methods=()',), 'methods is empty'),
    (('methods=dino,', "views=({}, {'size': 8})"), 'the first two have one size'),
    (('methods=mae,', 'masking.ratio=0.9'), 'keeps none of 4 patches'),
    (('methods=mae,', 'views=()'), 'at least 1'),
    (('recipe.batch_size=1', 'target.queue_size=3'), 'recipe.batch_size=1: expected at least 2'),
    (('recipe.microbatches=2',), 'recipe.microbatches: expected 1'),
    (('redundancy_weight=-1',), 'redundancy_weight=-1'),
    (('predictor_rate=-1',), 'predictor_rate=-1'),
    (('final_weight_decay=-1',), 'final_weight_decay=-1'),
    (
      ("fine_tuning={'recipe': {'epochs': 1, 'batch_size': 2000, 'schedule': {'base': 1}}}",),
      '2000',
    ),
    (('methods=dino,', 'recipe.optimizer.clip_global_norm=1.0'), 'clip_per_tensor'),
    ((TINY[0].replace("'dynamic", "'embed_prefix': False, 'dynamic"), 'methods=mae,'), 'ViT'),
    ((TINY[0].replace("'dynamic", "'scan': True, 'dynamic"), 'methods=mae,'), 'scan=False'),
    (("model={'name': 'cifar_resnet18', 'stage_sizes': (1,), 'width': 8}", 'methods=mae,'), 'ViT'),
  ],
)
def test_impossible_settings_are_named(changes, message):
  with pytest.raises(SettingsError, match=message):
    launcher.check(tiny_config(*changes))


def test_a_run_compares_methods_with_the_network_as_drawn(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(pretraining, 'COLLAPSED', 1.1)
  schedule = "'schedule': {'base': 1e-3, 'name': 'constant'}"
  changes = [
    'recipe.epochs=1',
    'recipe.schedule.warmup_epochs=0',
    'recipe.batch_size=256',
    'target.queue_size=256',
    'log_every=1',
    'methods=simclr,mae',
    'data.test_options={"pastes": 1}',
    'eval.k=5',
    f"fine_tuning={{'recipe': {{'epochs': 1, 'batch_size': 256, {schedule}}}, 'layer_decay': 0.5}}",
  ]
  config = tiny_config(*changes)
  launcher.check(config)
  found = ssl_baselines.run(config, tmp_path)
  assert [row['name'] for row in found['rows']] == ['untrained', 'SimCLR', 'MAE']
  for row in found['rows']:
    assert all(0 <= row['metrics'][name] <= 100 for name in ('knn_fp', 'fine_tuned'))
  assert (tmp_path / 'accuracy_and_spread.png').stat().st_size > 1000
  assert (tmp_path / 'curves.png').stat().st_size > 1000
  assert 'SimCLR has collapsed' in capsys.readouterr().out
