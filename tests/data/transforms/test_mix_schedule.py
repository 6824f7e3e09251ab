import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from golden_vectors import assert_close, golden

from jaxlab import data
from jaxlab.training import make_schedule


@golden('mwh', 'schedule_epochwise')
def test_probabilities_by_epoch_agree_with_official_code(vectors):
  epochs, p, q = (vectors.param(name) for name in ('num_epochs', 'p', 'q'))
  steps = 3
  schedule = functools.partial(
    data.mwh_mix_probability, total_steps=steps * epochs, p=p, q=q, granularity='epoch',
    steps_per_epoch=steps,
  )  # fmt: skip
  for offset in range(steps):
    found = jax.jit(schedule)(steps * jnp.asarray(vectors['in_epoch']) + offset)
    assert_close(found, vectors['out_mixup_probability'], 1e-6)
  # Batches are counted as epochs are, one a batch.
  by_batch = data.mwh_mix_probability(jnp.asarray(vectors['in_epoch']), epochs, p, q)
  assert_close(by_batch, vectors['out_mixup_probability'], 1e-6)


@golden('mwh', 'lr')
def test_learning_rates_agree_with_official_code(vectors):
  base, epochs = vectors.param('base_lr'), len(vectors['in_epoch'])
  warmup = {'warmup_epochs': 10, 'warmup_start': 0.1} if base > 0.1 else {}
  schedule = make_schedule(
    'multistep', base, epochs=epochs, steps_per_epoch=1, milestones=(50, 75), **warmup
  )
  assert_close([schedule(epoch) for epoch in vectors['in_epoch']], vectors['out_lr'], 1e-6)


@golden('mwh', 'mixup_step')
def test_a_mixed_step_agrees_with_official_code(vectors):
  permutation, lam = vectors['in_permutation'], vectors.param('lambda_used')
  assert lam >= 0.5  # the larger of the two shares
  with jax.enable_x64(True):
    images = jnp.asarray(vectors['in_images'].transpose(0, 2, 3, 1))
    mix = lambda key, x: (data.mix_images(x, permutation, lam), permutation, lam)  # noqa: E731
    mixed, partners, share = data.mix_with_probability(jax.random.key(0), images, 1.0, mix)
    assert_close(mixed, vectors['out_mixed_images'].transpose(0, 2, 3, 1), 1e-9)

    def loss(logits):
      import optax

      each = optax.softmax_cross_entropy_with_integer_labels
      return jnp.mean(data.mixup_loss(each, logits, vectors['in_labels'], partners, share))

    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(vectors['in_logits']))
    assert_close(value, vectors['out_loss'], 1e-9)
    assert_close(gradient, vectors['grad_logits'], 1e-9)


@pytest.mark.parametrize(
  ('p', 'q'), [(0.6, 0.9), (0.0, 0.5), (0.5, 0.5), (0.3, 1.0), (1.0, 1.0), (0.0, 0.0)]
)
def test_stages_begin_where_they_should(p, q):
  steps = np.arange(40)
  found = np.asarray(data.mwh_mix_probability(steps, 40, p, q))
  first, second = round(40 * p), round(40 * q)
  np.testing.assert_array_equal(found[:first], 1)
  np.testing.assert_array_equal(found[first:second], steps[first:second] % 2 == 0)
  fading = (40 - steps[second:]) / (40 - second) if second < 40 else []
  np.testing.assert_allclose(found[second:], fading, rtol=1e-5)
  if second < 40:
    assert found[second] == 1 and found[-1] > 0
  backwards = data.mwh_mix_probability(steps, 40, p, q, reverse=True)
  np.testing.assert_array_equal(backwards, found[::-1])
  assert found.dtype == np.float32


@pytest.mark.parametrize('mix', tables.first([data.cutmix, data.mixup]))
def test_a_batch_is_mixed_as_a_whole_or_stays(mix):
  images = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8, 8, 1)), jnp.float32)
  mix = functools.partial(mix, alpha=1.0)
  run = jax.jit(jax.vmap(lambda key, p: data.mix_with_probability(key, images, p, mix), (0, None)))
  keys = jax.random.split(jax.random.key(1), 200)
  mixed, partners, share = run(keys, 0.3)
  same = np.all(np.asarray(mixed) == images, (1, 2, 3, 4))
  # A cut box may be empty, a share 1 within rounding.
  assert np.all(share[same] >= 0.99) and np.all(np.asarray(share)[~same] < 1)
  assert abs(np.mean(~same) - 0.3) < 0.12
  assert np.all(np.sort(partners, 1) == np.arange(6))
  for probability, expected in ((0.0, True), (1.0, False)):
    mixed, _, share = run(keys[:20], probability)
    stays = np.all(np.asarray(mixed) == images, (1, 2, 3, 4))
    assert stays.all() if expected else stays.mean() < 0.3
    assert np.all(share == 1) if expected else np.any(share < 1)


@pytest.mark.exhaustive
def test_delicate_shares_and_batches_stay_finite():
  images = jnp.ones((1, 4, 4, 1))
  for alpha in (1e-6, 1e-3, 1e3):
    mix = functools.partial(data.mixup, alpha=alpha, own_half=True)
    keys = jax.random.split(jax.random.key(0), 50)
    run = functools.partial(data.mix_with_probability, images=images, probability=1.0, mix=mix)
    mixed, partners, share = jax.vmap(run)(keys)
    assert np.all((share >= 0.5) & (share <= 1)) and not np.any(partners)
    np.testing.assert_allclose(mixed, 1, rtol=1e-6)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: data.mwh_mix_probability(0, 10, 0.7, 0.6), 'p=0.7 and q=0.6'),
    (lambda: data.mwh_mix_probability(0, 10, -0.1, 0.6), 'p=-0.1'),
    (lambda: data.mwh_mix_probability(0, 10, 0.1, 1.1), 'q=1.1'),
    (lambda: data.mwh_mix_probability(0, 0), 'total_steps is 0'),
    (lambda: data.mwh_mix_probability(0, 10, granularity='step'), "granularity is 'step'"),
    (lambda: data.mwh_mix_probability(0, 10, granularity='epoch'), 'steps_per_epoch is None'),
    (
      lambda: data.mwh_mix_probability(0, 10, granularity='epoch', steps_per_epoch=3),
      'steps_per_epoch is 3, expected a divisor',
    ),
    (
      lambda: data.mix_with_probability(jax.random.key(0), jnp.ones((0, 4)), 1.0, data.mixup),
      'not empty',
    ),
  ],
)
def test_impossible_arguments_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
