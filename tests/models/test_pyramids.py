import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rule_weights import rule_tensor

from jaxlab.models import PVT, T2TViT, abstract_variables, anatomy, create, from_torch, to_torch
from jaxlab.models.t2t import TokenAttention, orthogonal_features, sinusoid, soft_split


# First logits of timm 1.0.31's PyramidVisionTransformerV2 (embed_dims 8, 16) under the rule weights.
@pytest.mark.parametrize(
  'image_size, depths, reductions, expected',
  [
    ((64, 96), (1, 2), (4, 2), (-0.488322, 0.371763, 0.088384, 0.854568)),
    ((32, 32), (1, 1), (2, 1), (0.277555, 0.258844, -0.005681, 0.247737)),
  ],
)
def test_small_pyramids_agree_with_timm(image_size, depths, reductions, expected):
  model = PVT((8, 16), depths, (1, 2), (2, 4), reductions, num_classes=10)
  blank = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), abstract_variables(model))
  state_dict = {name: rule_tensor(name, a.shape) for name, a in to_torch(blank).items()}
  x = np.random.default_rng(3).standard_normal((2, 3, *image_size)).astype(np.float32)
  run = jax.jit(model.apply)
  logits = run(from_torch(model, state_dict), jnp.asarray(x.transpose(0, 2, 3, 1)))
  np.testing.assert_allclose(logits[0, :4], expected, atol=2e-5)


def layer_norm(x, own):
  x = x - x.mean(-1, keepdims=True)
  scale, bias = np.asarray(own['scale']), np.asarray(own['bias'])
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


@pytest.mark.parametrize('performer', [True, False])
def test_attention_of_the_stem_is_that_of_its_formula(performer):
  model = TokenAttention(6, performer)
  x = np.random.default_rng(0).standard_normal((2, 5, 9)).astype(np.float32)
  params = jax.jit(model.init)(jax.random.key(0), x)['params']
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(1)
  params = jax.tree.unflatten(tree, [0.5 * rng.standard_normal(a.shape) for a in leaves])
  found = jax.jit(model.apply)({'params': jax.tree.map(jnp.float32, params)}, x)

  def dense(x, own):
    return x @ own['kernel'] + own.get('bias', 0)

  y = layer_norm(x, params['norm1'])
  if performer:
    key, query, value = np.split(dense(y, params['kqv']), 3, -1)
    drawn = params['random_features']
    key, query = (
      np.exp(a @ drawn.T - (a**2).sum(-1, keepdims=True) / 2) / np.sqrt(3) for a in (key, query)
    )
    weights = np.einsum('bqm,bkm->bqk', query, key)
    weights /= weights.sum(-1, keepdims=True) + 1e-8
  else:
    query, key, value = np.split(dense(y, params['qkv']), 3, -1)
    weights = np.exp(
      np.einsum('bqc,bkc->bqk', query, key) / 3
    )  # the root of the input's 9 channels
    weights /= weights.sum(-1, keepdims=True)
  y = value + dense(weights @ value, params['proj'])
  hidden = np.asarray(
    jax.nn.gelu(dense(layer_norm(y, params['norm2']), params['mlp']['fc1']), False)
  )
  expected = y + dense(hidden, params['mlp']['fc2'])
  np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-4)


def test_positive_random_features_approximate_the_softmax():
  # Their mean over many draws is the exponential of the product.
  rng = np.random.default_rng(0)
  a, b = 0.5 * rng.standard_normal((2, 6))

  def product(key):
    w = orthogonal_features(key, (3, 6))
    feature = lambda x: jnp.exp(w @ x - x @ x / 2) / jnp.sqrt(3.0)  # noqa: E731
    return feature(a) @ feature(b)

  drawn = jax.vmap(product)(jax.random.split(jax.random.key(0), 4000))
  w = orthogonal_features(jax.random.key(0), (3, 6))
  np.testing.assert_allclose(w @ w.T, 3 * np.eye(3), atol=1e-5)
  # Rows of length sqrt(3) in place of a Gaussian's sqrt(6), as the official code draws them: the mean is
  # that of directions at this length, which is the product's share at small arguments.
  assert (
    abs(float(drawn.mean()) - float(np.exp(-(a @ a + b @ b) / 2) * (1 + (a + b) @ (a + b) / 4)))
    < 0.03
  )


def test_random_features_get_no_gradient():
  model = TokenAttention(4)
  x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 5)), jnp.float32)
  params = jax.jit(model.init)(jax.random.key(0), x)['params']
  gradient = jax.jit(jax.grad(lambda p: jnp.sum(model.apply({'params': p}, x) ** 2)))(params)
  assert not np.any(gradient['random_features']) and np.any(gradient['kqv']['kernel'])


def test_soft_splits_overlap_in_the_order_of_unfold():
  x = np.random.default_rng(0).standard_normal((1, 6, 6, 2)).astype(np.float32)
  found = soft_split(x, 3, 2, 1)
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  assert found.shape == (1, 3, 3, 18)
  for row, column in ((0, 0), (2, 1)):
    patch = padded[0, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
    np.testing.assert_allclose(found[0, row, column], patch.transpose(2, 0, 1).ravel(), rtol=1e-6)


def test_the_code_of_positions_is_sines_and_cosines():
  code = sinusoid(5, 4)
  np.testing.assert_allclose(code[3], [np.sin(3), np.cos(3), np.sin(0.03), np.cos(0.03)], rtol=1e-5)
  assert code.shape == (5, 4)


@pytest.mark.parametrize(
  'name, millions', [('t2t_vit_7', 4.3), ('t2t_vit_14', 21.5), ('t2t_vit_t_14', 21.5)]
)
def test_token_to_token_networks_have_as_many_parameters_as_published(name, millions):
  tree = abstract_variables(create(name))['params']
  assert round(sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6, 1) == millions


@pytest.mark.parametrize('name', ['pvt_v2_b0', 't2t_vit_7', 't2t_vit_t_14'])
def test_anatomies_name_modules_that_are_called(name):
  model = create(name) if name == 'pvt_v2_b0' else create(name, depth=1)
  anatomy(model).check(model, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: PVT((8, 16)), 'one entry a stage'),
    (lambda: PVT(num_heads=(1, 2, 3, 8)), 'do not divide'),
    (lambda: T2TViT(width=10), 'not divisible by num_heads'),
    (lambda: T2TViT(drop_path=1.0), 'drop_path'),
    (lambda: abstract(T2TViT(), 40), 'multiples of 16'),
    (lambda: abstract(PVT(), 16), 'too small'),
  ],
)
def test_impossible_networks_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def abstract(model, side):
  x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), x)
