import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden

from jaxlab import losses, models

MARKER = 99  # the authors' code means the maximum by it


def temperature(marked):
  return math.inf if marked == MARKER else float(marked)


def nhwc(features):
  return np.moveaxis(features, 1, -1)


@golden('csra', 'csra_head')
def test_a_head_and_its_gradients_agree_with_official_code(vectors):
  own, lam = temperature(vectors.param('temperature')), vectors.param('lambda')

  def loss(features, weight):
    logits = models.csra_head(features, weight, own, lam)
    return jnp.mean(losses.multi_label_bce(logits, vectors['in_targets'])), logits

  arguments = nhwc(vectors['in_features_nchw']), vectors['param_head_weight']
  (value, logits), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*arguments)
  assert_close(logits, vectors['out_logits'], 5e-6)
  assert_close(value, vectors['out_bce_loss'], 5e-6)
  assert_close(gradients[0], nhwc(vectors['grad_features_nchw']), 2e-5)
  assert_close(gradients[1], vectors['grad_head_weight'], 2e-5)


@golden('csra', 'csra_multihead')
def test_several_heads_agree_with_official_code(vectors):
  weights = vectors['param_head_weights']
  temperatures = tuple(map(temperature, vectors.param('temperatures')))
  assert models.csra_temperatures(len(weights)) == temperatures
  head = models.CSRAMultiHead(weights.shape[1], len(weights), vectors.param('lambda'))

  def loss(features, weights):
    logits = head.apply({'params': {'weight': weights}}, features)
    return jnp.mean(losses.multi_label_bce(logits, vectors['in_targets'])), logits

  arguments = nhwc(vectors['in_features_nchw']), weights
  arguments = [jnp.asarray(x, jnp.float32) for x in arguments]
  (value, logits), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*arguments)
  assert_close(logits, vectors['out_logits'], 5e-6)
  assert_close(value, vectors['out_bce_loss'], 5e-6)
  assert_close(gradients[0], nhwc(vectors['grad_features_nchw']), 2e-5)
  assert_close(gradients[1], vectors['grad_head_weights'], 2e-5)


@pytest.fixture(scope='module')
def case():
  rng = np.random.default_rng(0)
  return rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(6, 5))


def test_logits_are_those_of_class_specific_features(case):
  features, weight = case
  x, unit = features.reshape(2, 12, 5), weight / np.linalg.norm(weight, axis=1, keepdims=True)
  scores = np.einsum('bnd,cd->bnc', x, unit)
  for own in (1.0, 3.0, math.inf):
    if own == math.inf:
      attention = scores == scores.max(1, keepdims=True)
    else:
      attention = np.exp(own * scores) / np.exp(own * scores).sum(1, keepdims=True)
    # A class's feature: the mean of all positions, and of those that its attention chooses.
    specific = x.mean(1)[:, None] + 0.3 * np.einsum('bnc,bnd->bcd', attention, x)
    expected = np.einsum('bcd,cd->bc', specific, unit)
    assert_close(models.csra_head(features, weight, own, 0.3), expected, 1e-5)
    assert_close(models.class_attention(scores, own), attention, 1e-5)
    assert_close(
      jax.jit(models.csra_head, static_argnums=2)(features, weight, own, 0.3), expected, 1e-5
    )
  assert_close(models.csra_scores(x, weight), scores, 1e-5)
  pooled = scores.mean(1)
  assert_close(models.csra_head(features, weight, 1.0, 0.0), pooled, 1e-5)
  # Of any score map, with a bias too, and longer classifiers.
  plain = features @ weight.T + np.arange(6)
  expected = plain.mean((1, 2)) + 0.4 * plain.max((1, 2))
  assert_close(models.max_residual(plain, 0.4), expected, 1e-5)
  mapped = jax.vmap(lambda f: models.csra_head(f[None], weight, 2.0, 0.3)[0])(features)
  assert_close(mapped, models.csra_head(features, weight, 2.0, 0.3), 1e-5)


def test_one_position_is_its_own_attention(case):
  features, weight = case
  one = features[:, :1, :1]
  scores = models.csra_scores(one, weight)[:, 0]
  for own in (2.0, math.inf):
    assert_close(models.csra_head(one, weight, own, 0.5), 1.5 * scores, 1e-5)


def test_delicate_values_stay_finite(case):
  features, weight = case
  zero = np.concatenate([np.zeros((1, 5)), weight])

  def total(features, weight):
    return jnp.sum(models.csra_head(features, weight, 7.0, 0.5))

  value, gradients = jax.jit(jax.value_and_grad(total, (0, 1)))(1e4 * features, zero)
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)
  tied = models.class_attention(jnp.array([[[1.0], [1.0], [0.0]]]), math.inf)
  assert tied[0, :, 0].tolist() == [0.5, 0.5, 0.0]
  low = [jnp.asarray(x, jnp.bfloat16) for x in (features, weight)]
  found = models.csra_head(*low, 1.0, 0.5)
  assert found.dtype == jnp.float32
  exact = models.csra_head(features, weight, 1.0, 0.5)
  assert_close(found, exact, 0.03)


def test_classifiers_are_drawn_as_a_convolution_of_pytorch(case):
  head = models.CSRAMultiHead(40, 6, 0.2)
  weight = jax.jit(head.init)(jax.random.key(0), jnp.zeros((1, 2, 2, 100)))['params']['weight']
  assert weight.shape == (6, 40, 100) and head.head_temperatures[-1] == math.inf
  assert 0.0995 < np.abs(weight).max() <= 0.1
  np.testing.assert_allclose(np.std(weight), 0.1 / np.sqrt(3), rtol=0.02)
  own = models.CSRAMultiHead(3, 1, 0.2, temperatures=(math.inf,))
  variables = {'params': {'weight': weight[:1, :3]}}
  features = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 3, 100)))
  expected = models.csra_head(features, weight[0, :3], math.inf, 0.2)
  assert_close(jax.jit(own.apply)(variables, features), expected, 1e-5)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda x, w: models.csra_temperatures(3), 'num_heads is 3, expected one of 1, 2, 4, 6, 8'),
    (lambda x, w: models.CSRAMultiHead(4, 5), 'num_heads is 5'),
    (lambda x, w: models.CSRAMultiHead(0), 'num_classes=0'),
    (
      lambda x, w: models.CSRAMultiHead(4, 2, temperatures=(1.0,)),
      '1 temperatures for num_heads=2',
    ),
    (lambda x, w: models.CSRAMultiHead(4, lam=-0.1), 'lam is -0.1'),
    (lambda x, w: models.CSRAMultiHead(4, temperatures=(0.0,)), 'temperature is 0.0'),
    (lambda x, w: models.csra_head(x, w, 0.0), 'temperature is 0.0'),
    (lambda x, w: models.csra_head(x, w, math.nan), 'temperature is nan'),
    (lambda x, w: models.csra_head(x, w, -1.0), 'temperature is -1.0'),
    (lambda x, w: models.csra_head(x, w, 1.0, -0.2), 'lam is -0.2.*allow_negative'),
    (lambda x, w: models.csra_head(x, w, math.inf, -0.2), 'lam is -0.2'),
    (lambda x, w: models.csra_head(x, w, 1.0, math.nan, allow_negative=True), 'lam is nan'),
    (lambda x, w: models.csra_head(x, w.T), r'weight\s*\[num_classes, dim\]; got \(2, 3, 4, 5\)'),
    (lambda x, w: models.csra_scores(x[0, 0], w), 'Expected features'),
    (lambda x, w: models.csra_scores(x[:, :0], w), 'Expected features'),
    (lambda x, w: models.max_residual(x[0, 0], 0.5), 'Expected scores'),
    (lambda x, w: models.max_residual(x, -0.5), 'lam is -0.5'),
    (lambda x, w: models.csra_logits(x, w[None], (1.0, 2.0), 0.1), '2 temperatures'),
  ],
)
def test_impossible_arguments_are_named(call, message, case):
  with pytest.raises(ValueError, match=message):
    call(*case)


def test_a_negative_weight_is_taken_where_it_is_meant(case):
  x, weight = case
  less, more = (models.csra_head(x, weight, 1.0, lam, allow_negative=True) for lam in (-0.2, 0.2))
  assert_close(less + more, 2 * models.csra_head(x, weight, 1.0, 0.0), 1e-5)
