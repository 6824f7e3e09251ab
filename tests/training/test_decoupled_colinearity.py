import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tables
from jax.sharding import NamedSharding, PartitionSpec
from models.random_variables import random_images, random_variables

from jaxlab import models
from jaxlab.models import GPT2, Swin, ViT, stack_blocks, weight_pairs
from jaxlab.parallel import fsdp_shardings, make_mesh
from jaxlab.training import colinearity_decay, colinearity_penalty, make_optimizer

IMAGES = random_images((2, 16, 16, 3))
TOKENS = np.zeros((2, 8), np.int32)
NETWORKS = {
  'vit': (ViT(8, 16, 16, 2, 2, num_classes=3), IMAGES),
  'swin': (Swin(2, 16, 4, 8, (1, 1), (2, 4), num_classes=3), IMAGES),
  'gpt2': (GPT2(11, 8, 16, 2, 2), TOKENS),
}


def network(name='vit', **changes):
  model, x = NETWORKS[name]
  params = jax.tree.map(jnp.asarray, random_variables(model, x)['params'])
  return model.clone(**changes), params


def noise(params, seed=1):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)


def one_step(optimizer, grads, params):
  @jax.jit
  def step(grads, params):
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    return optax.apply_updates(params, updates), state

  return step(grads, params)


@pytest.mark.parametrize('per_head', [True, False])
@pytest.mark.parametrize('name', tables.few(NETWORKS, 'gpt2'))
def test_a_step_is_adamw_minus_the_decoupled_decay(name, per_head):
  """By float64 NumPy: B^T (B A) and (B A) A^T of each head, back in their slices."""
  model, params = network(name)
  pairs = weight_pairs(model, per_head=per_head)
  plain = optax.chain(
    optax.scale_by_adam(), optax.add_decayed_weights(0.05), optax.scale_by_learning_rate(0.03)
  )
  decayed = optax.chain(
    optax.scale_by_adam(),
    optax.add_decayed_weights(0.05),
    colinearity_decay(pairs, 0.2),
    optax.scale_by_learning_rate(0.03),
  )
  grads = noise(params)
  without, _ = one_step(plain, grads, params)
  got, _ = one_step(decayed, grads, params)
  expected = jax.tree.map(lambda p: np.zeros(p.shape), params)
  for pair in pairs:
    matrices = [np.asarray(kernel, np.float64) for kernel in pair(params)]
    first, second = (m if m.ndim == 3 else m[None] for m in matrices)
    product = first @ second
    slopes = product @ np.swapaxes(second, 1, 2), np.swapaxes(first, 1, 2) @ product
    for factor, slope in zip((pair.first, pair.second), slopes, strict=True):
      *path, last = factor.path.split('/')
      tree = expected
      for key in path:
        tree = tree[key]
      if factor.hidden == 'out':  # heads are columns
        own = np.concatenate(list(slope), 1)
        start = factor.part[0] * own.shape[1] if factor.part[1] > 1 else 0
        tree[last][:, start : start + own.shape[1]] += own
      else:
        tree[last] += np.concatenate(list(slope), 0)
  jax.tree.map(
    lambda g, w, e: np.testing.assert_allclose(w - g, 0.03 * 0.2 * e, rtol=2e-4, atol=3e-6),
    got,
    without,
    expected,
  )


def test_nothing_changes_at_zero_bit_for_bit():
  model, params = network()
  grads = noise(params)
  plain = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(0.03))
  decay = colinearity_decay(weight_pairs(model), 0.0)
  decayed = optax.chain(optax.scale_by_adam(), decay, optax.scale_by_learning_rate(0.03))
  for got, expected in zip(
    *(jax.tree.leaves(one_step(o, grads, params)[0]) for o in (decayed, plain)), strict=True
  ):
    np.testing.assert_array_equal(got, expected)
  negative = jax.tree.map(lambda p: jnp.full_like(p, -0.0), params)
  updates, state = decay.update(negative, decay.init(params), params)
  assert updates is negative and state.count == 1


@pytest.mark.exhaustive
@pytest.mark.parametrize('every', [1, 2])
def test_a_traced_zero_changes_no_bit_either(every):
  model, params = network()
  signed = jax.tree.map(lambda g: jnp.where(g > 1, g, -0.0), noise(params))

  @jax.jit
  def step(lam):
    decay = colinearity_decay(weight_pairs(model), lam, every=every, learning_rate=0.1)
    return decay.update(signed, decay.init(params), params)[0]

  for got, expected in zip(*map(jax.tree.leaves, (step(0.0), signed)), strict=True):
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(expected))
  # What is in no pair passes as it is at any weight.
  bias = step(0.1)['head']['bias']
  np.testing.assert_array_equal(np.signbit(bias), np.signbit(signed['head']['bias']))


@pytest.mark.parametrize('name', tables.few(NETWORKS, 'gpt2'))
def test_sharded_and_unsharded_updates_agree(name):
  model, params = network(name)
  optimizer = optax.chain(
    colinearity_decay(weight_pairs(model, ('mlp', 'vo', 'qk')), 0.3, learning_rate=0.1),
    optax.scale_by_learning_rate(0.1),
  )
  grads = noise(params)
  expected, _ = one_step(optimizer, grads, params)
  shardings = fsdp_shardings(params, make_mesh(data=2, fsdp=4), fsdp_min_size=1)
  split = {s.spec for s in jax.tree.leaves(shardings)}
  assert PartitionSpec(None, 'fsdp') in split or PartitionSpec('fsdp') in split
  placed = jax.device_put((grads, params), (shardings, shardings))
  got, _ = one_step(optimizer, *placed)
  jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-6), got, expected)
  replicated = NamedSharding(make_mesh(), PartitionSpec())
  again, _ = one_step(optimizer, *jax.device_put((grads, params), replicated))
  jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-6), again, expected)


def test_scanned_blocks_get_the_update_of_plain_ones():
  model, params = network()
  optimizer = colinearity_decay(weight_pairs(model), 0.2, 'excess', ratio=1.1)
  expected, _ = one_step(optimizer, noise(params), params)
  scanned = colinearity_decay(weight_pairs(model.clone(scan=True)), 0.2, 'excess', ratio=1.1)
  got, _ = one_step(scanned, stack_blocks(noise(params)), stack_blocks(params))
  jax.tree.map(
    lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-6), got, stack_blocks(expected)
  )


@pytest.mark.parametrize('kind', tables.few(['product', 'row_power', 'excess', 'cosine'], 'excess'))
def test_every_kind_adds_the_gradient_of_the_penalty_and_lowers_it(kind):
  model, params = network()
  pairs = weight_pairs(model)
  penalty = lambda params: colinearity_penalty(params, pairs, kind, ratio=1.1)  # noqa: E731
  zeros = jax.tree.map(jnp.zeros_like, params)
  decay = colinearity_decay(pairs, 0.2, kind, ratio=1.1)
  updates, _ = decay.update(zeros, decay.init(params), params)
  expected = jax.jit(jax.grad(penalty))(params)
  jax.tree.map(
    lambda u, e: np.testing.assert_allclose(u, 0.2 * e, rtol=1e-4, atol=1e-6), updates, expected
  )
  moved = jax.tree.map(lambda p, u: p - 1e-3 * u, params, updates)
  assert penalty(moved) < penalty(params)
  assert not np.any(updates['head']['kernel']) and not np.any(
    updates['blocks_0']['mlp']['fc1']['bias']
  )


def test_a_kernel_in_two_pairs_gets_the_sum():
  model, params = network()
  pairs = weight_pairs(model)
  zeros = jax.tree.map(jnp.zeros_like, params)
  once, twice = (
    colinearity_decay(given, 0.1).update(zeros, colinearity_decay(given, 0.1).init(params), params)[
      0
    ]
    for given in (pairs, pairs * 2)
  )
  jax.tree.map(lambda t, o: np.testing.assert_allclose(t, 2 * o, rtol=1e-5), twice, once)


def test_every_third_step_takes_three_steps_at_once():
  model, params = network()
  pairs = weight_pairs(model)
  zeros = jax.tree.map(jnp.zeros_like, params)
  always, third = colinearity_decay(pairs, 0.1), colinearity_decay(pairs, 0.1, every=3)
  expected, _ = always.update(zeros, always.init(params), params)
  state, update = third.init(params), jax.jit(third.update)
  for step in range(5):
    updates, state = update(zeros, state, params)
    factor = 3 if step % 3 == 0 else 0
    jax.tree.map(
      lambda u, e, f=factor: np.testing.assert_allclose(u, f * e, rtol=1e-5, atol=1e-7),
      updates,
      expected,
    )


def test_the_guard_shortens_steps_that_would_diverge():
  """Rank-one factors: sigma is their norm, and the guarded step is half of the way to zero."""
  u, v, w = (jnp.asarray(x) for x in ([3.0, 4.0], [0.0, 1.0, 0.0], [6.0, 8.0]))
  params = {'a': jnp.outer(u, v), 'b': jnp.outer(v, w), 'c': jnp.float32(0)}
  pair = lambda params: (params['a'], params['b'])  # noqa: E731
  zeros = jax.tree.map(jnp.zeros_like, params)

  def step(rate, **options):
    decay = colinearity_decay([pair], 0.1, **options)
    return jax.jit(decay.update)(zeros, decay.init(params), params)[0]

  plain, calm = step(0.05), step(0.05, learning_rate=0.05)
  jax.tree.map(np.testing.assert_array_equal, calm, plain)
  # 1 * 0.1 * 10^2 = 10 >= 1: scaled by 0.5 / 10, so that learning rate times update is half of `a`.
  guarded = step(1.0, learning_rate=lambda count: 1.0 + count)
  np.testing.assert_allclose(guarded['a'], params['a'] / 2, rtol=1e-5)
  np.testing.assert_allclose(guarded['a'], plain['a'] / 20, rtol=1e-5)
  np.testing.assert_allclose(guarded['b'], plain['b'] / 20, rtol=1e-5)


def rayleigh(first, second, gamma):
  """Curvatures along both gradients in float64: of |diag(gamma) first second|^2 / 2 in each kernel."""
  first, second, gamma = (np.asarray(x, np.float64) for x in (first, second, gamma))
  folded = gamma[:, None] * first
  product = folded @ second
  slopes = gamma[:, None] * product @ second.T, folded.T @ product
  changes = gamma[:, None] * slopes[0] @ second, folded @ slopes[1]
  return [np.sum(c**2) / np.sum(s**2) for c, s in zip(changes, slopes)], slopes


@pytest.mark.parametrize('gamma', [[3.0, 3.0, 3.0, 3.0], [0.1, 1.0, 5.0, 0.0]])
def test_the_guard_counts_the_scale_of_a_folded_norm(gamma):
  rng = np.random.default_rng(0)
  params = {
    'gamma': jnp.array(gamma),
    'a': jnp.asarray(rng.standard_normal((4, 3)), jnp.float32),
    'b': jnp.asarray(rng.standard_normal((3, 6)), jnp.float32),
  }

  def pair(params):
    return jax.lax.stop_gradient(params['gamma'])[:, None] * params['a'], params['b']

  curvatures, slopes = rayleigh(params['a'], params['b'], params['gamma'])
  rate = 2 / max(curvatures)
  decay = colinearity_decay([pair], 0.1, learning_rate=10 * rate)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = jax.jit(decay.update)(zeros, decay.init(params), params)
  # 0.1 * 10 rate * curvature = 2 >= 1: scaled by 0.5 / 2.
  for name, slope in zip('ab', slopes):
    np.testing.assert_allclose(updates[name], 0.1 * 0.25 * slope, rtol=1e-4, atol=1e-6)
  # Alone, the step of either kernel lowers the loss. Without the scale's square it rises.
  loss = lambda params: colinearity_penalty(params, [pair])  # noqa: E731
  for name in 'ab':
    moved = {**params, name: params[name] - 10 * rate * updates[name]}
    assert loss(moved) < loss(params)
  assert not np.any(updates['gamma'])


def test_a_pair_that_is_not_finite_is_left_out_and_counted():
  model, params = network()
  params['blocks_1']['mlp']['fc1']['kernel'] = (
    params['blocks_1']['mlp']['fc1']['kernel'].at[0, 0].set(1e30)
  )
  decay = colinearity_decay(weight_pairs(model), 0.1)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, state = jax.jit(decay.update)(zeros, decay.init(params), params)
  assert state.skipped == 1
  assert not np.any(updates['blocks_1']['mlp']['fc1']['kernel'])
  assert np.any(updates['blocks_1']['attention']['proj']['kernel'])
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(updates))


@pytest.mark.exhaustive
def test_half_precision_parameters_are_computed_in_float32():
  model, params = network()
  half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
  wide = jax.tree.map(lambda p: p.astype(jnp.float32), half)
  decay = colinearity_decay(weight_pairs(model), 0.1)
  got, expected = (
    decay.update(jax.tree.map(jnp.zeros_like, p), decay.init(p), p)[0] for p in (half, wide)
  )
  assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
  jax.tree.map(
    lambda g, e: np.testing.assert_allclose(g.astype(jnp.float32), e, rtol=1e-2, atol=1e-6),
    got,
    expected,
  )


def test_the_optimizer_from_settings_takes_it_before_the_learning_rate():
  model, params = network()
  decay = colinearity_decay(weight_pairs(model), 0.1)
  frozen = {'frozen': ['patch_embed/.*', 'pos_embed', 'cls_token']}
  made = make_optimizer('adamw', 0.03, weight_decay=0.05, decoupled=decay, **frozen)
  plain = make_optimizer('adamw', 0.03, weight_decay=0.05, **frozen)
  grads = noise(params)
  got, without = (one_step(o, grads, params)[0] for o in (made, plain))
  slopes, _ = decay.update(jax.tree.map(jnp.zeros_like, params), decay.init(params), params)
  jax.tree.map(
    lambda g, w, s: np.testing.assert_allclose(w - g, 0.03 * s, rtol=1e-3, atol=1e-6),
    got,
    without,
    slopes,
  )


def test_decay_lowers_index_and_gain_of_a_trained_pair():
  """Weights that are aligned on purpose: a hundred steps without any loss."""
  from jaxlab.evaluation import channel_gains, colinearity_index

  model, params = network()
  pair = weight_pairs(model, ('mlp',))[0]
  fc1 = params['blocks_0']['mlp']['fc1']['kernel']
  params['blocks_0']['mlp']['fc2']['kernel'] = (
    params['blocks_0']['mlp']['fc2']['kernel'].at[:, 3].set(3 * fc1[0])
  )
  optimizer = optax.chain(colinearity_decay([pair], 0.1), optax.scale_by_learning_rate(0.1))

  def step(carry, _):
    params, state = carry
    updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
    return (optax.apply_updates(params, updates), state), None

  run = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), length=200)[0][0])
  trained = run(params)
  gains = [channel_gains(*pair(p)).max() for p in (params, trained)]
  indices = [colinearity_index(*pair(p)) for p in (params, trained)]
  assert gains[1] < gains[0] / 3 and indices[1] < indices[0]


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'pairs': []}, 'pairs is empty'),
    ({'lam': -0.1}, 'lam must not be negative, got -0.1'),
    ({'lam': None, 'kind': 'cosine'}, "give it for 'cosine'"),
    ({'kind': 'cubic'}, "kind='cubic'"),
    ({'every': 0}, 'every must be a positive whole number, got 0'),
    ({'kind': 'excess', 'learning_rate': 0.1}, 'guard by learning_rate is for kind product'),
    ({'kind': 'row_power', 'power': 2}, 'power must be above 2, got 2'),
    ({'kind': 'excess', 'ratio': 0}, 'ratio must be positive, got 0'),
  ],
)
def test_bad_arguments_are_named(change, message):
  model, _ = network()
  with pytest.raises(ValueError, match=message):
    colinearity_decay(**{'pairs': weight_pairs(model), 'lam': 0.1, **change})


def test_pairs_that_the_parameters_do_not_hold_are_named_at_the_start():
  model, params = network()
  deeper = models.ViT(8, 16, 16, 3, 2)
  with pytest.raises(ValueError, match="no 'blocks_2/mlp/fc1/kernel'"):
    colinearity_decay(weight_pairs(deeper)).init(params)
  decay = colinearity_decay(weight_pairs(model))
  with pytest.raises(ValueError, match='needs the parameters'):
    decay.update(params, decay.init(params))
  assert colinearity_decay(weight_pairs(model), None).init(params).count == 0
  with pytest.raises(ValueError, match='pairs is empty'):
    colinearity_penalty(params, [])


@pytest.mark.exhaustive
def test_of_stacked_blocks_only_the_one_that_is_not_finite_is_left_out():
  model, params = network()
  stacked = stack_blocks(params)
  kernel = stacked['blocks']['mlp']['fc1']['kernel']
  stacked['blocks']['mlp']['fc1']['kernel'] = kernel.at[1, 0, 0].set(jnp.inf)
  decay = colinearity_decay(weight_pairs(model.clone(scan=True), ('mlp',)), 0.2)
  zeros = jax.tree.map(jnp.zeros_like, stacked)
  updates, state = decay.update(zeros, decay.init(stacked), stacked)
  moved = np.any(np.asarray(updates['blocks']['mlp']['fc1']['kernel']) != 0, (1, 2))
  np.testing.assert_array_equal(moved, np.arange(len(kernel)) != 1)
  assert state.skipped == 1
