import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_vectors import assert_close, golden

from jaxlab.training import optimizers
from jaxlab.training.optimizers import make_optimizer
from jaxlab.training.schedules import switched


@pytest.fixture(params=['float32', 'float64'])
def rtol(request):
  """Runs a test in both precisions; the tolerance of each."""
  with jax.enable_x64(request.param == 'float64'):
    yield {'float32': 1e-5, 'float64': 1e-9}[request.param]


def trajectory(optimizer, params, gradients):
  """Returns the parameters after each step with the given gradients."""

  @jax.jit
  def step(params, state, gradient):
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  state, history = optimizer.init(params), []
  for gradient in gradients:
    params, state = step(params, state, gradient)
    history.append(params)
  return history


def tree(seed):
  rng = np.random.default_rng(seed)
  shapes = {'encoder': {'kernel': (3, 2), 'bias': (2,)}, 'head': {'kernel': (2, 4), 'bias': (4,)}}
  return jax.tree.map(
    lambda shape: rng.normal(size=shape).astype(np.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


PARAMS, GRADS = tree(0), [tree(1), tree(2), tree(3)]


@golden('ssl_baselines', 'sgd_momentum_weight_decay')
def test_sgd_agrees_with_pytorch(vectors, rtol):
  optimizer = make_optimizer(
    'sgd',
    vectors.param('lr'),
    momentum=vectors.param('momentum'),
    weight_decay=vectors.param('weight_decay'),
  )
  history = trajectory(optimizer, jnp.asarray(vectors['in_w']), jnp.asarray(vectors['in_grads']))
  assert_close(jnp.stack(history), vectors['out_w_sequence'], rtol)


@golden('ssl_baselines', 'lars')
def test_lars_agrees_with_reference(vectors, rtol):
  optimizer = make_optimizer(
    'lars',
    vectors.param('lr'),
    momentum=vectors.param('momentum'),
    weight_decay=vectors.param('weight_decay'),
    trust_coefficient=vectors.param('eta'),
  )
  params = {name: jnp.asarray(vectors[f'in_{name}']) for name in ('w', 'b')}
  steps = zip(jnp.asarray(vectors['in_grads_w']), jnp.asarray(vectors['in_grads_b']))
  history = trajectory(optimizer, params, [{'w': w, 'b': b} for w, b in steps])
  for name in ('w', 'b'):
    stacked = jnp.stack([state[name] for state in history])
    assert_close(stacked, vectors[f'out_{name}_sequence'], rtol)


@pytest.mark.parametrize('name', ['adam', 'adamw'])
def test_adam_and_adamw_follow_their_formulas(name):
  def rate(step):
    return 0.1 / (step + 1)

  w, m, n = PARAMS['head']['kernel'].astype(float), 0.0, 0.0
  expected = []
  for t, grads in enumerate(GRADS, start=1):
    g = grads['head']['kernel'] + (0.3 * w if name == 'adam' else 0)
    m, n = 0.8 * m + 0.2 * g, 0.9 * n + 0.1 * g**2
    moments = (m / (1 - 0.8**t)) / (np.sqrt(n / (1 - 0.9**t)) + 1e-6)
    w = w - rate(t - 1) * (moments + (0.3 * w if name == 'adamw' else 0))
    expected.append(w)
  optimizer = make_optimizer(name, rate, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-6)
  history = trajectory(optimizer, PARAMS, GRADS)
  assert_close([state['head']['kernel'] for state in history], expected, 1e-5)


def test_the_first_beta_of_adam_may_be_a_schedule():
  """As PyTorch's, whose correction of the bias takes the present beta to the power of all steps."""
  w, m, n = PARAMS['head']['kernel'].astype(float), 0.0, 0.0
  expected = []
  for t, grads in enumerate(GRADS, start=1):
    beta, g = (0.9 if t <= 1 else 0.1), grads['head']['kernel']
    m, n = beta * m + (1 - beta) * g, 0.99 * n + 0.01 * g**2
    w = w - 0.1 * (m / (1 - beta**t)) / (np.sqrt(n / (1 - 0.99**t)) + 1e-8)
    expected.append(w)
  optimizer = make_optimizer('adam', 0.1, betas=(switched(0.9, 0.1, 1), 0.99))
  history = trajectory(optimizer, PARAMS, GRADS)
  assert_close([state['head']['kernel'] for state in history], expected, 1e-5)


def test_learning_rate_multiplies_after_the_momentum_buffer():
  def rate(step):
    return jnp.where(step == 0, 0.1, 0.01)

  history = trajectory(make_optimizer('sgd', rate, momentum=0.5), np.float32(1), np.ones(2, 'f'))
  assert_close(history, [0.9, 0.9 - 0.01 * 1.5], 1e-6)


def test_nesterov_looks_ahead():
  optimizer = make_optimizer('sgd', 0.1, momentum=0.5, nesterov=True)
  history = trajectory(optimizer, np.float32(1), np.ones(2, 'f'))
  assert_close(history, [0.85, 0.85 - 0.1 * 1.75], 1e-6)


def test_decay_spares_the_parameters_named():
  zero = jax.tree.map(np.zeros_like, PARAMS)
  optimizer = make_optimizer('sgd', 0.1, weight_decay=0.5, no_decay=['head/kernel', 'ndim<=1'])
  (after,) = trajectory(optimizer, PARAMS, [zero])
  assert_close(after['encoder']['kernel'], 0.95 * PARAMS['encoder']['kernel'], 1e-6)
  for unchanged in (['encoder', 'bias'], ['head', 'kernel'], ['head', 'bias']):
    assert np.array_equal(after[unchanged[0]][unchanged[1]], PARAMS[unchanged[0]][unchanged[1]])


def test_weight_decay_follows_a_schedule():
  optimizer = make_optimizer('sgd', 0.1, momentum=0.0, weight_decay=lambda step: 1.0 * step)
  history = trajectory(optimizer, np.float32(1), np.zeros(3, 'f'))
  assert_close(history, [1, 0.9, 0.9 * 0.8], 1e-6)


def test_learning_rates_are_overridden_and_multiplied_by_path():
  optimizer = make_optimizer(
    'sgd',
    lambda step: 0.1 / (step + 1),
    momentum=0.0,
    lr_overrides=[('head/.*', 0.2)],
    lr_multipliers=[('head/bias', 0.5), ('.*/bias', 0.1)],
  )
  ones = jax.tree.map(np.ones_like, PARAMS)
  start = jax.tree.map(np.zeros_like, PARAMS)
  history = trajectory(optimizer, start, [ones, ones])
  moved = jax.tree.map(lambda w: -float(w.ravel()[0]), history[1])
  assert moved['encoder']['kernel'] == pytest.approx(0.15)
  assert moved['encoder']['bias'] == pytest.approx(0.015)
  assert moved['head']['kernel'] == pytest.approx(0.4)
  assert moved['head']['bias'] == pytest.approx(0.2)


def test_lamb_is_that_of_float64_and_of_optax():
  options = {'weight_decay': 0.1, 'betas': (0.8, 0.95), 'eps': 1e-3}
  history = trajectory(make_optimizer('lamb', 0.1, **options), PARAMS, GRADS)
  theirs = optax.lamb(0.1, 0.8, 0.95, 1e-3, weight_decay=0.1)
  jax.tree.map(
    lambda a, b: assert_close(a, b, 1e-6), history[-1], trajectory(theirs, PARAMS, GRADS)[-1]
  )
  excluded = make_optimizer('lamb', 0.1, no_trust_ratio=['ndim<=1'], no_decay=['.*bias'], **options)
  plain = trajectory(excluded, PARAMS, GRADS)
  for layer, leaf in (('head', 'kernel'), ('head', 'bias')):
    for run, adapts, decay in ((history, True, 0.1), (plain, leaf == 'kernel', 0.1)):
      decay = 0 if run is plain and leaf == 'bias' else decay
      w, m, n = np.float64(PARAMS[layer][leaf]), 0, 0
      for step, grads in enumerate(GRADS, 1):
        g = np.float64(grads[layer][leaf])
        m, n = 0.8 * m + 0.2 * g, 0.95 * n + 0.05 * g**2
        u = m / (1 - 0.8**step) / (np.sqrt(n / (1 - 0.95**step)) + 1e-3) + decay * w
        w = w - 0.1 * u * (np.linalg.norm(w) / np.linalg.norm(u) if adapts else 1)
      assert_close(run[-1][layer][leaf], w, 1e-5)


@pytest.mark.parametrize('name', ['sgd', 'lars', 'adamw', 'lamb'])
def test_frozen_parameters_stay_and_cost_no_state_and_no_share_of_the_norm(name):
  options = {'weight_decay': 0.1, 'clip_global_norm': 0.5}
  frozen = make_optimizer(name, 0.1, frozen=['encoder/.*'], **options)
  after = trajectory(frozen, PARAMS, GRADS)[-1]
  assert np.array_equal(after['encoder']['kernel'], PARAMS['encoder']['kernel'])
  alone = make_optimizer(name, 0.1, **options)
  expected = trajectory(alone, PARAMS['head'], [grads['head'] for grads in GRADS])[-1]
  assert_close(after['head']['kernel'], expected['kernel'], 1e-6)
  assert all(leaf.size in (1, 4, 8) for leaf in jax.tree.leaves(frozen.init(PARAMS)))


def test_global_clipping_scales_all_gradients_by_their_joint_norm():
  grads = {'a': np.full(4, 3.0, np.float32), 'b': np.full(4, 4.0, np.float32)}
  clip = optimizers.clip_by_global_norm(1.0)
  clipped, _ = jax.jit(clip.update)(grads, clip.init(grads))
  assert_close(clipped['a'], grads['a'] / (10 + 1e-6), 1e-6)
  assert_close(clipped['b'], grads['b'] / (10 + 1e-6), 1e-6)


def test_tensor_clipping_scales_each_gradient_by_its_own_norm():
  grads = {'a': np.full(4, 3.0, np.float32), 'b': np.full(4, 0.25, np.float32)}
  clip = optimizers.clip_by_tensor_norm(3.0)
  clipped, _ = jax.jit(clip.update)(grads, clip.init(grads))
  assert_close(clipped['a'], np.full(4, 1.5), 1e-6)
  assert np.array_equal(clipped['b'], grads['b'])


def test_clipping_adds_its_epsilon_to_the_norm():
  grad = np.full(1, 1e-6, np.float32)
  for clip in (optimizers.clip_by_global_norm(1e-6), optimizers.clip_by_tensor_norm(1e-6)):
    clipped, _ = jax.jit(clip.update)(grad, clip.init(grad))
    assert_close(clipped, grad / 2, 1e-5)


def test_zero_gradients_are_clipped_without_nan():
  grads = jax.tree.map(np.zeros_like, PARAMS)
  for options in ({'clip_global_norm': 1.0}, {'clip_per_tensor': 1.0}):
    (after,) = trajectory(make_optimizer('lars', 0.1, **options), PARAMS, [grads])
    assert_close(after['head']['kernel'], PARAMS['head']['kernel'], 0)


def test_updates_do_not_depend_on_how_parameters_are_sharded():
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ('fsdp',))
  sharded = jax.device_put(PARAMS['head'], jax.NamedSharding(mesh, jax.P('fsdp')))
  grads = [grad['head'] for grad in GRADS]
  optimizer = make_optimizer('lars', 0.1, weight_decay=0.1, clip_global_norm=1.0)
  one, many = trajectory(optimizer, PARAMS['head'], grads), trajectory(optimizer, sharded, grads)
  assert_close(many[-1]['kernel'], one[-1]['kernel'], 1e-6)


@pytest.mark.parametrize(
  'options',
  [
    {'no_decay': ['encodr/.*']},
    {'frozen': ['encoder']},
    {'lr_overrides': [('predictor/.*', 0.1)]},
    {'lr_multipliers': [('kernel', 0.1)]},
  ],
)
def test_a_pattern_that_matches_nothing_raises_with_paths(options):
  optimizer = make_optimizer('sgd', 0.1, **options)
  with pytest.raises(ValueError, match=r'no parameter matches .* encoder/'):
    optimizer.init(PARAMS)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (
      lambda: make_optimizer('adan', 0.1),
      "Unknown optimizer 'adan': choose sgd, lars, adam, adamw, lamb",
    ),
    (lambda: make_optimizer('sgd', 0.1, betas=(0.9, 0.95)), "'sgd' has no option betas"),
    (lambda: make_optimizer('sgd', 0.1, decay=0.1), 'no option decay'),
    (lambda: make_optimizer('sgd', -0.1), 'learning_rate must not be negative'),
    (lambda: make_optimizer('sgd', 0.1, weight_decay=-1.0), 'weight_decay must not be'),
    (lambda: make_optimizer('sgd', 0.1, momentum=1.0), r'momentum must be in \[0, 1\)'),
    (lambda: make_optimizer('sgd', 0.1, clip_global_norm=0.0), 'must be positive'),
    (lambda: make_optimizer('sgd', 0.1, clip_global_norm=1.0, clip_per_tensor=1.0), 'not both'),
    (lambda: make_optimizer('sgd', 0.1, frozen='head/.*').init(PARAMS), 'list of patterns'),
  ],
)
def test_bad_arguments_raise(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_gradients_take_the_place_of_parameters_but_for_those_that_are_not_finite():
  optimizer = optimizers.replace_by_gradient()
  value, state = jnp.array([5.0, 6.0]), optimizer.init(jnp.zeros(2))
  expected = ([1, 2], [1, 3], [1, 3], [4, 0])
  for gradient, new in zip(([1, 2], [np.inf, 3], [np.nan, -np.inf], [4, 0]), expected):
    updates, state = optimizer.update(jnp.array(gradient, jnp.float32), state, value)
    value = optax.apply_updates(value, updates)
    np.testing.assert_array_equal(value, new)


def test_a_held_optimizer_does_nothing_and_then_starts_as_if_it_were_new():
  inner = optimizers.make_optimizer('adamw', 0.1, weight_decay=0.5)
  held = optimizers.held(inner, 2)
  params, gradient = {'w': jnp.ones(3)}, {'w': jnp.array([1.0, -2.0, 0.5])}
  state, fresh = held.init(params), inner.init(params)
  for _ in range(2):
    updates, state = held.update({'w': jnp.full(3, 7.0)}, state, params)
    np.testing.assert_array_equal(updates['w'], 0)
  for _ in range(2):
    updates, state = held.update(gradient, state, params)
    expected, fresh = inner.update(gradient, fresh, params)
    np.testing.assert_array_equal(updates['w'], expected['w'])
  with pytest.raises(ValueError, match='steps must not be negative, got -1'):
    optimizers.held(inner, -1)
