import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden

from jaxlab import data, losses


@golden('idmm', 'cutmix')
def test_mixed_images_and_share_agree_with_official_code(vectors):
  images = vectors['in_images_nchw'].transpose(0, 2, 3, 1)
  center = [vectors.param('center_dim2'), vectors.param('center_dim3')]
  box, share = data.cutmix_box(vectors.param('lambda_drawn'), jnp.array(center), images.shape[1:3])
  mixed = data.paste_box(images, images[vectors['in_perm']], box)
  np.testing.assert_array_equal(mixed, vectors['out_mixed'].transpose(0, 2, 3, 1))
  assert_close(share, vectors['out_lambda_adjusted'], 1e-6)
  np.testing.assert_array_equal(vectors['in_labels'][vectors['in_perm']], vectors['out_labels_b'])


@golden('up_vits', 'finetune_pieces')
def test_a_box_and_its_mixture_agree_with_official_code(vectors):
  images = vectors['in_images_nchw'].transpose(0, 2, 3, 1)
  x0, y0, x1, y1 = vectors.param('box')
  corners = jnp.array([x0, y0, x1 - x0, y1 - y0])
  # The center that was drawn is not stored; of an inner box the middle is one that gives it.
  center = jnp.array([(x0 + x1) // 2, (y0 + y1) // 2])
  box, share = data.cutmix_box(vectors.param('lambda_sampled'), center, images.shape[1:3])
  np.testing.assert_array_equal(box, corners)
  assert_close(share, vectors['out_lambda'], 1e-6)
  mixed = data.paste_box(images, images[vectors['in_permutation']], box)
  assert_close(mixed, vectors['out_mixed_images_nchw'].transpose(0, 2, 3, 1), 1e-6)


@golden('idmm', 'mixed_instance_loss')
def test_the_loss_of_mixtures_agrees_with_official_code(vectors):
  a, b, share = vectors['in_labels_a'], vectors['in_labels_b'], vectors.param('lambda')
  smooth = functools.partial(
    losses.label_smoothing_cross_entropy, smoothing=vectors.param('smoothing')
  )
  for name, loss in (('ce', losses.cross_entropy), ('label_smoothing', smooth)):

    def mixed(logits, loss=loss):
      return jnp.mean(share * loss(logits, a) + (1 - share) * loss(logits, b))

    value, gradient = jax.jit(jax.value_and_grad(mixed))(vectors['in_logits'])
    assert_close(value, vectors[f'out_{name}_loss'], 5e-6)
    assert_close(gradient, vectors[f'grad_{name}_logits'], 5e-6)


@golden('idmm', 'instance_classifier')
def test_a_classifier_of_instances_agrees_with_official_code(vectors):
  def loss(features, weight, bias):
    logits = features @ weight.T + bias
    return jnp.mean(losses.cross_entropy(logits, vectors['in_instance_ids']))

  arrays = vectors['in_features'], vectors['param_weight'], vectors['param_bias']
  value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*map(jnp.asarray, arrays))
  assert_close(value, vectors['out_loss'], 5e-6)
  for name, gradient in zip(('features', 'weight', 'bias'), gradients):
    assert_close(gradient, vectors[f'grad_{name}'], 5e-6)


def test_a_box_covers_what_the_share_says():
  images = jnp.stack([jnp.full((9, 12, 2), i, jnp.float32) for i in range(4)])
  draw = jax.jit(jax.vmap(lambda key: data.cutmix(key, images, 0.5, own_half=True)))
  mixed, permutation, share = draw(jax.random.split(jax.random.key(0), 200))
  expected = share[:, None] * np.arange(4) + (1 - share[:, None]) * permutation
  np.testing.assert_allclose(mixed.mean((2, 3, 4)), expected, rtol=1e-5, atol=1e-6)
  assert share.min() >= 0.5 and share.max() <= 1 and np.std(share) > 0.05


def test_without_alpha_the_images_stay():
  images = jax.random.normal(jax.random.key(0), (3, 4, 4, 1))
  mixed, permutation, share = data.cutmix(jax.random.key(1), images, 0)
  np.testing.assert_array_equal(mixed, images)
  assert sorted(permutation.tolist()) == [0, 1, 2] and float(share) == 1


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: data.cutmix(jax.random.key(0), jnp.ones((2, 4, 4, 1)), -1), 'alpha must not be nega'),
    (lambda: data.cutmix(jax.random.key(0), jnp.ones((4, 4, 1))), 'images must be'),
  ],
)
def test_impossible_arguments_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
