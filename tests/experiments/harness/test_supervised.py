import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models.random_variables import call, run_capture

from experiments.harness import runs, supervised
from experiments.harness.data import Augment
from experiments.harness.sections import Optimizer, Recipe, Schedule
from experiments.harness.tasks import ImageTask
from jaxlab import models, quantizers
from jaxlab.models import Hook
from jaxlab.training import by_path, replace_by_gradient, warm_decay_per_epoch

TASK = ImageTask((4, 4, 1), (4, 4, 1), 'uint8', 0.0, 1.0)
MODEL = models.create('mlp', hidden=(6, 5), num_classes=3)
RECIPE = Recipe(epochs=1, batch_size=4, schedule=Schedule(0.1))


@pytest.fixture
def batch():
  images = np.random.default_rng(0).integers(0, 255, (4, 4, 4, 1), np.uint8)
  return {'image': images, 'label': np.array([0, 1, 2, 0]), 'index': np.arange(4)}


def step(batch, loss, **options):
  program = supervised.program(MODEL, TASK, RECIPE, 10, loss=loss, **options)
  state = jax.jit(program.init)(jax.random.key(0))
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


def test_learned_steps_are_trained_next_to_the_parameters(batch):
  variables = jax.jit(MODEL.init)(jax.random.key(1), TASK.inputs(batch))
  rules = quantizers.uniform_rules(3, 3, path='fc[01]', learned=True)
  network = quantizers.lsq(MODEL, variables, TASK.inputs(batch), rules)
  start = {name: network.variables[name] for name in ('params', 'lsq')}
  before, (after, metrics) = step(
    batch,
    supervised.cross_entropy,
    prepare=lambda _: start,
    unbind=lambda trained: network.update(**trained).unbind()[0],
    hooks=network.hooks,
    captured=['fc1'],
  )
  expected = supervised.cross_entropy(
    call(network, TASK.inputs(batch)), batch['label'], None
  ).mean()
  np.testing.assert_allclose(metrics['loss'], expected, rtol=1e-5)
  moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before.params, dict(after.params))
  assert all(jax.tree.leaves(moved['lsq'])) and moved['params']['fc0']['kernel']


@pytest.mark.exhaustive
def test_a_quantized_network_is_trained_by_its_own_preparation_and_carried_constants(batch):
  variables = MODEL.init(jax.random.key(1), TASK.inputs(batch))
  rules = quantizers.uniform_rules(3, 3, path='fc[01]', learned=True)
  network = quantizers.lsq(MODEL, variables, TASK.inputs(batch), rules)
  start = {name: network.variables[name] for name in ('params', 'lsq')}
  before, (after, metrics) = step(
    batch,
    supervised.cross_entropy,
    prepare=lambda _: start,
    unbind=dict,
    collections={'lsq_codes': network.variables['lsq_codes']},
    before_call=network.prepare,
    options={'train': False},
    hooks=network.hooks,
  )
  expected = supervised.cross_entropy(
    call(network, TASK.inputs(batch)), batch['label'], None
  ).mean()
  np.testing.assert_allclose(metrics['loss'], expected, rtol=1e-5)
  # What the preparation takes away is carried on all the same.
  for a, b in zip(*map(jax.tree.leaves, (before.model_state, after.model_state)), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.exhaustive
def test_a_quantized_teacher_hands_on_quantized_features_and_constants_are_read(batch):
  variables = jax.jit(MODEL.init)(jax.random.key(1), TASK.inputs(batch))
  rules = [quantizers.Rule('fc1', 'output', 2, learned=True)]
  teacher = quantizers.range_qat(MODEL, variables, TASK.inputs(batch), rules)
  shapes = jax.eval_shape(lambda: teacher)  # the program needs no values

  def loss(outputs, targets, seen):
    del outputs, targets
    return jnp.mean((seen.taught['fc1'] - seen.constants) ** 2)

  options = {'taught': ['fc1'], 'constants': jax.ShapeDtypeStruct((5,), jnp.float32)}
  program = supervised.program(MODEL, TASK, RECIPE, 10, loss=loss, teacher=shapes, **options)
  state = jax.jit(program.init)(jax.random.key(0))
  frozen = {'teacher': teacher.variables.tree, 'constants': jnp.arange(5.0)}
  _, metrics = jax.jit(program.step)(state, frozen, batch)
  _, found = run_capture(MODEL, variables, ['fc1'], TASK.inputs(batch))
  ends = teacher.variables['learned_ranges']['fc1']['output']
  quantized = quantizers.quantize_feature(found['fc1'], ends['lower'], ends['upper'], 2)
  expected = jnp.mean((quantized - jnp.arange(5.0)) ** 2)
  np.testing.assert_allclose(metrics['loss'], expected, rtol=1e-5)
  assert np.any(quantized != found['fc1'])


def test_collections_are_carried_from_step_to_step(batch):
  def count(site, y):
    site.write('calls', site.read('calls') + 1)
    return y

  hooks = [Hook('fc0', output=count, collection='counts')]
  options = {'collections': {'counts': {'fc0': {'calls': jnp.int32(4)}}}, 'hooks': hooks}
  _, (after, _) = step(batch, supervised.cross_entropy, **options)
  assert after.model_state['counts']['fc0']['calls'] == 5


def test_an_optimizer_of_its_own_takes_the_recipes_schedule(batch):
  seen = []

  def optimizer(schedule):
    seen.append(float(schedule(0)))
    groups = [('fc1/.*', optax.set_to_zero()), ('.*', RECIPE.optimizer.make(schedule))]
    return by_path(groups)

  before, (after, _) = step(batch, supervised.cross_entropy, optimizer=optimizer)
  assert seen == [pytest.approx(0.1)]
  moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before.params, dict(after.params))
  assert moved['fc0']['kernel'] and not moved['fc1']['kernel']
  with pytest.raises(ValueError, match='belongs to the optimizer'):
    step(batch, supervised.cross_entropy, optimizer=optimizer, frozen=['fc0/.*'])


def test_a_decoupled_transformation_goes_before_the_learning_rate(batch):
  twice = optax.stateless(lambda updates, params: jax.tree.map(lambda u, p: u + p, updates, params))

  def optimizer(schedule):
    return RECIPE.optimizer.make(schedule, decoupled=twice)

  before, (after, _) = step(batch, lambda *_: jnp.float32(0), optimizer=optimizer)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(b, 0.9 * a, rtol=1e-5),
    before.params,
    dict(after.params),
  )


def test_settings_choose_lamb_whose_steps_are_as_long_as_the_rate_says(batch):
  optimizer = Optimizer('lamb', weight_decay=0.1, betas=(0.8, 0.9))
  assert list(optimizer.check()) == []
  assert any('betas' in problem for problem in Optimizer('lars', betas=(0.8, 0.9)).check())
  recipe = Recipe(epochs=1, batch_size=4, schedule=Schedule(0.1), optimizer=optimizer)
  program = supervised.program(MODEL, TASK, recipe, 10, loss=supervised.cross_entropy)
  before = jax.jit(program.init)(jax.random.key(0))
  after, _ = jax.jit(program.step)(before, {}, batch)
  for layer in ('fc0', 'fc1', 'fc'):
    old, new = (state.params[layer]['kernel'] for state in (before, after))
    ratio = jnp.linalg.norm(new - old) / jnp.linalg.norm(old)
    np.testing.assert_allclose(ratio, 0.1, rtol=1e-4)


@pytest.mark.parametrize('microbatches', [1, 2])
def test_training_in_float8_is_a_program_with_a_collection_and_probes(batch, microbatches):
  variables = jax.jit(MODEL.init)(jax.random.key(1), TASK.inputs(batch))
  float8, probes = quantizers.init_float8(MODEL, variables, TASK.inputs(batch))
  groups = (quantizers.PROBES, replace_by_gradient())
  program = supervised.program(
    MODEL,
    TASK,
    dataclasses.replace(RECIPE, microbatches=microbatches),
    10,
    prepare=lambda params: quantizers.merge_probes(params, probes),
    collections={'float8': float8},
    hooks=quantizers.float8_hooks(),
    optimizer=lambda schedule: by_path([groups, ('.*', RECIPE.optimizer.make(schedule))]),
  )
  state, step = jax.jit(program.init)(jax.random.key(0)), jax.jit(program.step)
  seen = []
  for _ in range(3):
    state, _ = step(state, {}, batch)
    seen.append(float(state.params['fc']['float8_gradient']))
  own = state.model_state['float8']['fc']
  # The last step's maximum is still on its way into the history.
  pushed = own['gradient']['history']
  np.testing.assert_allclose(
    pushed[:2][::microbatches], [seen[1], seen[0]][::microbatches], rtol=1e-5
  )
  assert own['gradient']['scale'] == pytest.approx(57344 / max(seen[:2]), rel=1e-5)
  assert own['kernel']['scale'] > 1 and np.count_nonzero(own['x']['history']) == 3 * microbatches


def test_watched_values_are_metrics_and_their_maxima_are_carried(batch):
  watched = {'largest': lambda seen: jnp.max(jnp.abs(seen.captured['fc1']))}
  options = {'captured': ['fc1'], 'watched': watched}
  program = supervised.program(MODEL, TASK, RECIPE, 10, **options)
  state, values, maxima = jax.jit(program.init)(jax.random.key(0)), [], []
  blank = {**batch, 'image': 0 * batch['image']}
  for own in (batch, blank, batch):
    state, metrics = jax.jit(program.step)(state, {}, own)
    values.append(float(metrics['largest']))
    maxima.append(float(state.extra['largest']))
  assert values[1] < values[0]
  assert maxima == [max(values[: i + 1]) for i in range(3)]
  halves = dataclasses.replace(RECIPE, microbatches=2)
  program = supervised.program(MODEL, TASK, halves, 10, **options)
  state, metrics = jax.jit(program.step)(jax.jit(program.init)(jax.random.key(0)), {}, batch)
  assert float(state.extra['largest']) == pytest.approx(maxima[0])
  assert float(metrics['largest']) <= maxima[0]


@pytest.mark.parametrize('microbatches', [1, 2])
def test_an_average_starts_with_what_the_training_starts_with_and_moves_by_its_share(
  batch, microbatches
):
  recipe = dataclasses.replace(RECIPE, microbatches=microbatches)
  average = warm_decay_per_epoch(0.999, 2)
  program = supervised.program(MODEL, TASK, recipe, 2, average=average)
  state = jax.jit(program.init)(jax.random.key(0))
  start = {'params': jax.tree.map(lambda leaf: leaf + 1, state.params)}
  state, step, seen = runs.take_over(state, start), jax.jit(program.step), []
  for _ in range(4):
    seen.append((state.extra['average'], state.params))
    state, _ = step(state, {}, batch)
  seen.append((state.extra['average'], state.params))
  kernel = lambda tree: np.asarray(tree['fc1']['kernel'])  # noqa: E731
  averages, params = (list(map(kernel, own)) for own in zip(*seen, strict=True))
  np.testing.assert_array_equal(averages[0], params[0])
  np.testing.assert_array_equal(averages[1], averages[0])
  first = 2 / 11 * averages[0] + 9 / 11 * params[2]
  np.testing.assert_allclose(averages[2], first, rtol=1e-5)
  np.testing.assert_array_equal(averages[3], averages[2])
  np.testing.assert_allclose(averages[4], 3 / 12 * first + 9 / 12 * params[4], rtol=1e-5)


def test_shapes_of_variables_are_those_for_what_an_augmentation_cuts_out():
  task = dataclasses.replace(TASK, stored=(6, 6, 1), augment=Augment(kind='resized_crop'))
  model = models.create('vit_tiny_patch2_8', image_size=4, depth=1, width=8, num_heads=2)
  shapes = supervised.abstract_variables(model, task)
  assert shapes['params']['pos_embed'].shape == (1, 5, 8)
