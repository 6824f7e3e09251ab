import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from flax import linen as nn
from flax import traverse_util
from models.random_variables import run_capture

from jaxlab import models, quantizers
from jaxlab.models import HookPoint, apply
from jaxlab.quantizers import Rule, uniform_rules
from jaxlab.quantizers.networks.rules import decide


class Net(nn.Module):
  """Two dense layers; the hidden ReLU has a path."""

  @nn.compact
  def __call__(self, x):
    x = HookPoint(name='relu')(nn.relu(nn.Dense(16, name='fc1')(x)))
    return nn.Dense(4, name='fc2')(x)


NET = Net()
X = jax.random.normal(jax.random.key(0), (32, 8))
VARIABLES = jax.jit(NET.init)(jax.random.key(1), X)


def rules(bits):
  return [Rule('fc1', 'kernel', 8), Rule('fc.*', 'kernel', bits), Rule('relu', 'output', bits)]


def error(bits):
  quantized = quantizers.ptq(NET, VARIABLES, [X], rules(bits))
  return float(jnp.mean((quantized(X) - NET.apply(VARIABLES, X)) ** 2))


@pytest.mark.exhaustive
def test_more_bits_lose_less():
  errors = [error(bits) for bits in (2, 4, 8)]
  assert errors[0] > 4 * errors[1] > 64 * errors[2] > 0


def test_the_first_rule_that_matches_decides():
  own = [Rule('fc1', 'kernel', None), Rule('relu', 'output', 0), *uniform_rules(3, outputs=4)]
  assert decide(own, 'fc1', 'kernel') is None and decide(own, 'fc2', 'kernel').bits == 3
  assert decide(own, 'relu', 'output') is None and decide(own, 'fc2', 'output').bits == 4
  assert decide(own, 'fc2', 'input') is None
  quantized = quantizers.quantize_weights(VARIABLES['params'], own)
  np.testing.assert_array_equal(quantized['fc1']['kernel'], VARIABLES['params']['fc1']['kernel'])
  assert len(np.unique(quantized['fc2']['kernel'][:, 0])) <= 8
  np.testing.assert_array_equal(quantized['fc2']['bias'], VARIABLES['params']['fc2']['bias'])


def test_rules_that_turn_everything_off_leave_the_network_as_it_is():
  off = [Rule('relu', 'output', 0), Rule('fc1', 'kernel', None), Rule('relu', 'output', 4)]
  quantized = quantizers.ptq(NET, VARIABLES, X, off)
  np.testing.assert_array_equal(quantized(X), NET.apply(VARIABLES, X))
  for function in (quantizers.range_hooks, quantizers.fake_quantize_hooks):
    with pytest.raises(ValueError, match='takes a sequence of rules'):
      function(iter(off))
  with pytest.raises(ValueError, match='quantize_weights takes a sequence of rules'):
    quantizers.quantize_weights(VARIABLES['params'], iter(off))


@pytest.mark.parametrize('degenerate', tables.first(['element', 'tensor']))
def test_stacked_blocks_have_ranges_of_their_own(degenerate):
  options = {'patch_size': 4, 'image_size': 8, 'width': 8, 'depth': 2, 'num_heads': 2}
  plain = models.ViT(**options, num_classes=3)
  params = jax.jit(plain.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))['params']
  params['blocks_1'] = jax.tree.map(lambda a: 10 * a, params['blocks_1'])
  params['blocks_0']['mlp']['fc1']['kernel'] *= 0  # a constant kernel
  own = [Rule('blocks.*', 'kernel', 3)]
  quantize = lambda p: quantizers.quantize_weights(p, own, degenerate=degenerate)  # noqa: E731
  stacked = jax.jit(quantize)(models.stack_blocks(params))
  expected = quantize(params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
    models.unstack_blocks(stacked),
    expected,
  )


def test_a_module_that_is_named_blocks_is_not_taken_for_a_stack():
  params = {'blocks': {'fc': {'kernel': X[:4, :4], 'bias': jnp.zeros(4)}}}
  found = quantizers.quantize_weights(params, uniform_rules(3))['blocks']['fc']['kernel']
  renamed = quantizers.quantize_weights({'other': params['blocks']}, uniform_rules(3))
  np.testing.assert_array_equal(found, renamed['other']['fc']['kernel'])


def test_an_output_that_two_rules_match_is_quantized_once():
  both = [Rule('relu', 'output', 2), Rule('re.*', 'output', 8)]
  outputs = [quantizers.ptq(NET, VARIABLES, X, own)(X) for own in (both, both[:1])]
  np.testing.assert_array_equal(*outputs)


def test_ranges_over_batches_are_those_of_all_data():
  batches = [X[:16], 3 * X[16:]]
  ranges = quantizers.collect_ranges(NET, VARIABLES, batches, rules(4))
  hidden = run_capture(NET, VARIABLES, ['relu'], jnp.concatenate(batches))[1]['relu']
  flat = traverse_util.flatten_dict(ranges, sep='/')
  np.testing.assert_allclose(flat['relu/minimum'].squeeze(), hidden.min())
  np.testing.assert_allclose(flat['relu/maximum'].squeeze(), hidden.max(), rtol=1e-6)


def test_gradients_reach_parameters_through_the_quantized_network():
  ranges = quantizers.collect_ranges(NET, VARIABLES, [X], rules(4))

  def loss(params):
    quantized = quantizers.quantize_weights(params, rules(4), scale_grad=True)
    hooks = quantizers.fake_quantize_hooks(rules(4))
    return jnp.sum(apply(NET, {'params': quantized, 'ranges': ranges}, X, hooks=hooks) ** 2)

  for gradient in jax.tree.leaves(jax.jit(jax.grad(loss))(VARIABLES['params'])):
    assert np.all(np.isfinite(gradient)) and np.any(gradient != 0)


@pytest.mark.parametrize(
  ('make', 'match'),
  [
    (
      lambda: quantizers.ptq(NET, VARIABLES, [X], [Rule('fc3', 'kernel', 4)]),
      "kernel rule 'fc3'. Closest of the 2 paths: fc",
    ),
    (
      lambda: quantizers.ptq(NET, VARIABLES, [X], [Rule('rleu', 'output', 4)]),
      "output rule 'rleu'. Closest of the 3 paths: relu",
    ),
    (lambda: quantizers.ptq(NET, VARIABLES, [], rules(4)), 'batches is empty'),
    (lambda: quantizers.ptq(NET, VARIABLES, [X * jnp.nan], rules(4)), 'non-finite ranges at relu'),
    (
      lambda: apply(NET, VARIABLES, X, hooks=quantizers.fake_quantize_hooks(rules(4))),
      "Module 'relu' has no 'minimum'.*was the model calibrated",
    ),
    (lambda: Rule('fc1', 'kernel', 17), 'got 17'),
    (lambda: Rule(('fc1', 4), 'kernel', 4), r"path is a regular expression .* got \('fc1', 4\)"),
    (lambda: Rule('fc(1', 'kernel', 4), "path 'fc.1' is no regular expression"),
    (lambda: Rule('fc1', 'weight', 4), "operand='weight' .* 'fc1' is none of 'kernel', 'input'"),
    (
      lambda: Rule('fc1', 'kernel', 4, 'row'),
      "granularity='row' .* is none of 'tensor', 'channel'",
    ),
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
