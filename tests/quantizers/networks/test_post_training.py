import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from jaxlab import models, quantizers
from jaxlab.models import HookPoint, apply
from jaxlab.quantizers import BitPolicy


class Net(nn.Module):
  """Two dense layers; the hidden ReLU has a path."""

  @nn.compact
  def __call__(self, x):
    x = HookPoint(name='relu')(nn.relu(nn.Dense(16, name='fc1')(x)))
    return nn.Dense(4, name='fc2')(x)


NET = Net()
X = jax.random.normal(jax.random.key(0), (32, 8))
VARIABLES = jax.jit(NET.init)(jax.random.key(1), X)


def policy(bits):
  return BitPolicy(weights=[('fc1', 8), ('fc.*', bits)], activations=[('relu', bits)])


def error(bits):
  variables, hooks = quantizers.ptq(NET, VARIABLES, [X], policy(bits))
  return float(jnp.mean((apply(NET, variables, X, hooks=hooks) - NET.apply(VARIABLES, X)) ** 2))


def test_more_bits_lose_less():
  errors = [error(bits) for bits in (2, 4, 8)]
  assert errors[0] > 4 * errors[1] > 64 * errors[2] > 0


def test_the_first_rule_that_matches_decides():
  rules = BitPolicy(weights=[('fc1', None), ('.*', 3)], activations=[('relu', 0), ('.*', 4)])
  assert rules.weight_bits('fc1') is None and rules.weight_bits('fc2') == 3
  assert rules.activation_bits('relu') is None
  quantized = quantizers.quantize_weights(VARIABLES['params'], rules)
  np.testing.assert_array_equal(quantized['fc1']['kernel'], VARIABLES['params']['fc1']['kernel'])
  assert len(np.unique(quantized['fc2']['kernel'][:, 0])) <= 8
  np.testing.assert_array_equal(quantized['fc2']['bias'], VARIABLES['params']['fc2']['bias'])


@pytest.mark.parametrize('degenerate', ['element', 'tensor'])
def test_stacked_blocks_have_ranges_of_their_own(degenerate):
  options = {'patch_size': 4, 'image_size': 8, 'width': 8, 'depth': 2, 'num_heads': 2}
  plain = models.ViT(**options, num_classes=3)
  params = jax.jit(plain.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))['params']
  params['blocks_1'] = jax.tree.map(lambda a: 10 * a, params['blocks_1'])
  params['blocks_0']['mlp']['fc1']['kernel'] *= 0  # a constant kernel
  rules = BitPolicy(weights=[('blocks.*', 3)])
  quantize = lambda p: quantizers.quantize_weights(p, rules, degenerate=degenerate)  # noqa: E731
  stacked = jax.jit(quantize)(models.stack_blocks(params))
  expected = quantize(params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
    models.unstack_blocks(stacked),
    expected,
  )


def test_a_module_that_is_named_blocks_is_not_taken_for_a_stack():
  params = {'blocks': {'fc': {'kernel': X[:4, :4], 'bias': jnp.zeros(4)}}}
  rules = BitPolicy(weights=[('.*', 3)])
  found = quantizers.quantize_weights(params, rules)['blocks']['fc']['kernel']
  renamed = quantizers.quantize_weights({'other': params['blocks']}, rules)
  np.testing.assert_array_equal(found, renamed['other']['fc']['kernel'])


def test_an_output_that_two_rules_match_is_quantized_once():
  both = BitPolicy(activations=[('relu', 2), ('re.*', 8)])
  one = BitPolicy(activations=[('relu', 2)])
  outputs = []
  for rules in (both, one):
    variables, hooks = quantizers.ptq(NET, VARIABLES, [X], rules)
    outputs.append(apply(NET, variables, X, hooks=hooks))
  np.testing.assert_array_equal(*outputs)


def test_ranges_over_batches_are_those_of_all_data():
  batches = [X[:16], 3 * X[16:]]
  ranges = quantizers.collect_ranges(NET, VARIABLES, batches, policy(4))
  hidden = models.capture(NET, VARIABLES, ['relu'], jnp.concatenate(batches))[1]['relu']
  flat = traverse_util.flatten_dict(ranges, sep='/')
  np.testing.assert_allclose(flat['relu/minimum'].squeeze(), hidden.min())
  np.testing.assert_allclose(flat['relu/maximum'].squeeze(), hidden.max(), rtol=1e-6)


def test_gradients_reach_parameters_through_the_quantized_network():
  ranges = quantizers.collect_ranges(NET, VARIABLES, [X], policy(4))

  def loss(params):
    quantized = quantizers.quantize_weights(params, policy(4), scale_grad=True)
    hooks = quantizers.fake_quantize_hooks(policy(4))
    return jnp.sum(apply(NET, {'params': quantized, 'ranges': ranges}, X, hooks=hooks) ** 2)

  for gradient in jax.tree.leaves(jax.jit(jax.grad(loss))(VARIABLES['params'])):
    assert np.all(np.isfinite(gradient)) and np.any(gradient != 0)


@pytest.mark.parametrize(
  ('make', 'match'),
  [
    (
      lambda: quantizers.ptq(NET, VARIABLES, [X], BitPolicy(weights=[('fc3', 4)])),
      "weight pattern 'fc3'. Closest of the 2 paths: fc",
    ),
    (
      lambda: quantizers.ptq(NET, VARIABLES, [X], BitPolicy(activations=[('rleu', 4)])),
      "activation pattern 'rleu'. Closest of the 3 paths: relu",
    ),
    (lambda: quantizers.ptq(NET, VARIABLES, [], policy(4)), 'batches is empty'),
    (lambda: quantizers.ptq(NET, VARIABLES, [X * jnp.nan], policy(4)), 'non-finite ranges at relu'),
    (
      lambda: apply(NET, VARIABLES, X, hooks=quantizers.fake_quantize_hooks(policy(4))),
      "Module 'relu' has no 'minimum'.*was the model calibrated",
    ),
    (lambda: BitPolicy(weights=[('fc1', 17)]), 'got 17'),
    (lambda: BitPolicy(weights=['fc1']), r"rules \(pattern, bits\); got 'fc1'"),
  ],
)
def test_bad_input_is_named(make, match):
  with pytest.raises(ValueError, match=match):
    make()


def test_names_of_bit_widths_are_read():
  assert quantizers.parse_bits('2w4a') == (2, 4) and quantizers.parse_bits('4w16a') == (4, 16)
  for text in ('w4a4', '2w4', '2x4a', '2w4ab', ''):
    with pytest.raises(ValueError, match='named such as 2w4a'):
      quantizers.parse_bits(text)
