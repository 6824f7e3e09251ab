"""What every method returns: called, chained, traced, stored; and what is wrong is named."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tables
from flax import linen as nn
from flax import nnx
from models.random_variables import call, random_variables

from jaxlab.models import Anatomy, HookPoint, Norm, apply
from jaxlab.quantizers import (
  Quantized,
  Rule,
  edge_rules,
  gptq_ptq,
  integer_network,
  lsq,
  percentile_ptq,
  ptq,
  repq,
  uniform_rules,
)
from jaxlab.quantizers.compensation import (
  QwT,
  QwTv2,
  compensate,
  compensation_hook,
  fold_compensation,
)


class Block(nn.Module):
  """A residual branch behind a norm."""

  @nn.compact
  def __call__(self, x, scale=1.0):
    y = nn.Dense(8, use_bias=False, name='in')(nn.LayerNorm(name='norm')(x))
    y = HookPoint(name='relu')(nn.relu(y))
    return x + scale * nn.Dense(x.shape[-1], name='out')(y)


class Own(nn.Module):
  """A network of a user, with a list for a field and an argument of its own."""

  names: list

  @nn.compact
  def __call__(self, x, scale=1.0):
    x = nn.Dense(6, name='embed')(x)
    for name in self.names:
      x = Block(name=name)(x, scale=scale)
    return nn.Dense(3, name='logits')(x)


BLOCKS = ['first', 'second']
MODEL = Own(BLOCKS)
PARTS = Anatomy(
  ['embed'], BLOCKS, head=['logits'], norms=[Norm(f'{b}/norm', readers=[f'{b}/in']) for b in BLOCKS]
)
X = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
BATCHES = [X[:32], X[32:]]
VARIABLES = random_variables(MODEL, X)
METHODS = {
  'ptq': (ptq, [*uniform_rules(4), Rule('.*/relu', 'output', 4)]),
  'percentile_ptq': (percentile_ptq, edge_rules(4, 4, edges=PARTS)),
  'repq': (repq, edge_rules(4, 4, edges=PARTS)),
  'gptq_ptq': (gptq_ptq, uniform_rules(4, 8)),
  'lsq': (lsq, uniform_rules(4, 4, learned=True)),
}
WITH_INTEGERS = [name for name in METHODS if name != 'ptq']


@functools.cache
def network(name) -> Quantized:
  method, rules = METHODS[name]
  return method(MODEL, VARIABLES, BATCHES, rules, anatomy=PARTS, scale=0.5)


@functools.cache
def compensated(name) -> Quantized:
  return compensate(network(name), BATCHES, QwT(), dtype=jnp.float32)


def exact():
  return MODEL.apply(VARIABLES, X, 0.5)


@pytest.mark.parametrize('name', tables.few(METHODS, 'lsq'))
def test_a_network_is_called_as_the_model_is_and_differs_from_it_by_its_steps(name):
  quantized = network(name)
  y = quantized(X)
  np.testing.assert_allclose(call(quantized, X), y, rtol=1e-5, atol=1e-5)
  assert 0 < np.std(y - exact()) < 0.5 * np.std(exact())
  np.testing.assert_allclose(quantized.in_float()(X), exact(), rtol=1e-5, atol=1e-5)
  assert np.std(quantized(X, scale=1.0) - y) > 0
  variables, hooks = quantized.unbind()
  np.testing.assert_array_equal(apply(MODEL, variables, X, 0.5, hooks=hooks), y)


@pytest.mark.parametrize('name', tables.few(METHODS, 'percentile_ptq'))
def test_a_compensation_follows_every_method(name):
  found = compensated(name)
  assert found.report.paths == tuple(BLOCKS)
  assert np.all(found.report.error_after < found.report.error_before)
  before, after = (np.std(call(own, X) - exact()) for own in (network(name), found))
  assert after < 1.1 * before  # each block is fitted to its own output
  np.testing.assert_allclose(found.in_float()(X), exact(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', tables.few(WITH_INTEGERS, 'percentile_ptq', 'lsq'))
@pytest.mark.parametrize('make', [network, compensated])
def test_integers_follow_every_method_that_quantizes_inputs(name, make):
  quantized = make(name)
  integers = integer_network(quantized)
  assert not integers.skipped and 'kernel' not in integers.variables['params'].get('embed', {})
  noise = np.std(call(quantized, X) - exact())
  assert np.std(call(integers, X) - call(quantized, X)) < 0.3 * noise + 1e-5
  for function in (lambda: compensate(integers, BATCHES), integers.in_float):
    with pytest.raises(ValueError, match=r'float kernels are gone|compensated already'):
      function()
  with pytest.raises(ValueError, match='in integers already'):
    integer_network(integers)


@pytest.mark.parametrize(
  'name', tables.few(['percentile_ptq', 'repq', 'gptq_ptq', 'lsq'], 'percentile_ptq', 'lsq')
)
def test_scale_and_shift_behind_layers_are_folded_into_them(name):
  found = compensate(network(name), BATCHES, QwTv2())
  folded = fold_compensation(found)
  noise = np.std(call(found, X) - exact())
  assert np.std(call(folded, X) - call(found, X)) < 0.3 * noise
  assert np.all(np.isfinite(call(integer_network(folded), X)))


@pytest.mark.parametrize('name', tables.few(METHODS, 'ptq', 'percentile_ptq', 'lsq'))
def test_networks_are_pytrees_of_their_arrays_each_held_once(name):
  for quantized in (network(name), compensated(name)):
    leaves, treedef = jax.tree.flatten(quantized)
    assert all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves)
    assert len({id(leaf) for leaf in leaves}) == len(leaves)
    again = jax.tree.unflatten(treedef, leaves)
    assert jax.tree.structure(again) == treedef
    assert hash(jax.tree.structure(again)) == hash(treedef)
    np.testing.assert_array_equal(jax.tree.map(lambda a: a, quantized)(X), quantized(X))


@pytest.mark.exhaustive
def test_networks_are_donated_vmapped_and_updated():
  quantized = network('repq')
  copy = jax.tree.map(jnp.array, quantized)
  double = jax.jit(lambda own: jax.tree.map(lambda a: 2 * a, own), donate_argnums=0)(copy)
  assert isinstance(double, Quantized)
  np.testing.assert_array_equal(
    double.variables['params']['logits']['bias'],
    2 * quantized.variables['params']['logits']['bias'],
  )
  both = jax.tree.map(lambda a: jnp.stack([a, a]), quantized)
  y = jax.vmap(lambda own: own(X))(both)
  np.testing.assert_allclose(y[1], quantized(X), rtol=1e-4, atol=1e-5)
  params = jax.tree.map(jnp.zeros_like, quantized.variables['params'])
  zero = quantized.update(params=params)
  assert np.std(call(zero, X), 0).max() == 0
  with pytest.raises(ValueError, match=r"no collection 'param'; it has .*params"):
    quantized.update(param=params)


@pytest.mark.parametrize('name', tables.few([*METHODS, 'integers'], 'lsq', 'integers'))
def test_checkpoints_give_the_same_network_back(name, tmp_path):
  quantized = (
    integer_network(network('percentile_ptq')) if name == 'integers' else compensated(name)
  )
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'network', quantized)
    checkpointer.wait_until_finished()
    again = checkpointer.restore(tmp_path / 'network', quantized)
  assert jax.tree.structure(again) == jax.tree.structure(quantized)
  np.testing.assert_array_equal(again(X), quantized(X))


@pytest.mark.parametrize(
  'name', tables.few(['ptq', 'percentile_ptq', 'repq', 'lsq'], 'ptq', 'percentile_ptq')
)
def test_methods_are_traced_and_bits_may_be(name):
  method, rules = METHODS[name]

  @jax.jit
  def quantize(variables, x, bits):
    own = [Rule(r.path, r.operand, bits, learned=r.learned) for r in rules]
    return method(MODEL, variables, x, own, anatomy=PARTS, scale=0.5)

  expected = method(
    MODEL,
    VARIABLES,
    X,
    [Rule(r.path, r.operand, 5, learned=r.learned) for r in rules],
    anatomy=PARTS,
    scale=0.5,
  )
  found = quantize(VARIABLES, X, jnp.float32(5))
  assert isinstance(found, Quantized)
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  np.testing.assert_allclose(call(found, X), call(expected, X), rtol=1e-3, atol=1e-3)
  shapes = jax.eval_shape(quantize, VARIABLES, X, jnp.float32(5))
  assert jax.eval_shape(lambda own, x: own(x), shapes, X).shape == (64, 3)


@pytest.mark.parametrize('name', tables.few(['percentile_ptq', 'repq', 'lsq'], 'lsq'))
def test_several_arrays_are_one_batch(name):
  method, rules = METHODS[name]
  for batches in (iter(BATCHES), [X], X):
    found = method(MODEL, VARIABLES, batches, rules, anatomy=PARTS, scale=0.5)
    jax.tree.map(np.testing.assert_array_equal, found, network(name))


@pytest.mark.exhaustive
def test_parameters_and_steps_are_learned():
  quantized = network('lsq')

  def loss(params, steps):
    return jnp.mean(jnp.square(quantized.update(params=params, lsq=steps)(X) - exact()))

  own = quantized.variables['params'], quantized.variables['lsq']
  gradients = jax.jit(jax.grad(loss, (0, 1)))(*own)
  for leaf in jax.tree.leaves(gradients[1]):
    assert np.all(np.isfinite(leaf)) and np.any(leaf != 0)
  # The steps need smaller moves than the kernels, whose own error is far below theirs.
  moved = [jax.tree.map(lambda a, g: a - 0.003 * g, a, g) for a, g in zip(own, gradients)]
  assert loss(*moved) < loss(*own)
  trained = quantized.update(params=moved[0], lsq=moved[1])
  integers = integer_network(trained)
  np.testing.assert_allclose(call(integers, X), call(trained, X), rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(
    trained.in_float()(X), MODEL.apply({'params': moved[0]}, X, 0.5), rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize('name', tables.few(METHODS, 'ptq', 'lsq'))
def test_linen_refuses_variables_that_it_would_run_in_float(name):
  for quantized in (network(name), compensated(name)):
    for variables in (quantized.variables, quantized.float_variables):
      with pytest.raises(TypeError, match=r'call the network itself.*quantized\.unbind\(\)'):
        MODEL.apply(variables, X)
    variables, hooks = quantized.unbind()
    for missing in {'quantization', 'compensation'} & set(variables):
      less = {key: tree for key, tree in variables.items() if key != missing}
      with pytest.raises(ValueError, match=f"no collection '{missing}', so nothing would be"):
        apply(MODEL, less, X, hooks=hooks)


def test_hooks_of_a_compensation_refuse_variables_without_it():
  with pytest.raises(ValueError, match="no collection 'compensation'"):
    apply(MODEL, VARIABLES, X, hooks=[compensation_hook()])


@pytest.mark.parametrize(
  ('name', 'rule', 'match'),
  [
    ('ptq', Rule('in', 'input', 4), r"operand 'input'. It accepts kernel \(a tensor or channel\), output"),
    ('percentile_ptq', Rule('in', 'output', 4), r"operand 'output'. It accepts kernel \(a channel\), input"),
    ('repq', Rule('in', 'output', 4), "operand 'output'"),
    ('gptq_ptq', Rule('in', 'output', 4), "operand 'output'"),
    ('lsq', Rule('in', 'output', 4, learned=True), "operand 'output'"),
    ('ptq', Rule('in', 'kernel', 4, 'group'), "granularity 'group'"),
    ('percentile_ptq', Rule('in', 'input', 4, 'channel'), "granularity 'channel'"),
    ('repq', Rule('in', 'kernel', 4, 'tensor'), "granularity 'tensor'"),
    ('gptq_ptq', Rule('in', 'kernel', 4, 'group'), "granularity 'group'"),
    ('lsq', Rule('in', 'kernel', 4, 'tensor', True), "granularity 'tensor'"),
    ('percentile_ptq', Rule('in', 'kernel', 4, learned=True), 'learned=True.* with learned=False'),
    ('lsq', Rule('in', 'kernel', 4), 'learned=False.* with learned=True'),
  ],
)  # fmt: skip
def test_what_a_method_does_not_do_is_named_with_what_it_does(name, rule, match):
  with pytest.raises(
    ValueError, match=rf"^{name} cannot do Rule\('in', '{rule.operand}', 4\): {match}"
  ):
    METHODS[name][0](MODEL, VARIABLES, X, [rule], anatomy=PARTS)


@pytest.mark.parametrize('name', METHODS)
def test_bad_input_is_named_by_every_method(name):
  method, rules = METHODS[name]
  run = functools.partial(method, MODEL, VARIABLES, anatomy=PARTS)
  with pytest.raises(ValueError, match='batches is empty'):
    run([], rules)
  with pytest.raises(ValueError, match=f'{name} takes a sequence of rules'):
    run(X, Rule('.*', 'kernel', 4))
  with pytest.raises(ValueError, match=f"{name} takes a sequence of rules, .* got .*'kernel'"):
    run(X, [('.*', 'kernel', 4)])
  with pytest.raises(ValueError, match=f'{name} takes a sequence of rules, .* got .*iterator'):
    run(X, iter(rules))
  with pytest.raises(ValueError, match=r"kernel rule 'frist/in'. Closest of .*first/in"):
    run(X, [Rule('frist/in', 'kernel', 4, learned=name == 'lsq')])
  with pytest.raises(ValueError, match=r'NNX module, Linear.*to_linen'):
    method(nnx.Linear(5, 3, rngs=nnx.Rngs(0)), {}, X, rules)


@pytest.mark.exhaustive
def test_granularity_is_chosen_by_rules():
  choices = [Rule('.*', 'kernel', 4, 'tensor'), Rule('.*/relu', 'output', 4, 'channel')]
  quantized = ptq(MODEL, VARIABLES, X, choices, anatomy=PARTS)
  assert len(np.unique(quantized.variables['params']['embed']['kernel'])) <= 16
  assert quantized.variables['quantization']['first']['relu']['output']['scale'].shape == (1, 8)
  assert len(np.unique(network('ptq').variables['params']['embed']['kernel'])) > 16


def test_what_a_chain_lacks_is_said():
  with pytest.raises(ValueError, match=r"inputs of layers are not quantized.*rules for 'input'"):
    integer_network(network('ptq'))
  with pytest.raises(ValueError, match=r"inputs of layers are not quantized.*rules for 'input'"):
    integer_network(compensated('ptq'))
  with pytest.raises(ValueError, match='compensated already'):
    compensate(compensated('repq'), BATCHES)
  with pytest.raises(ValueError, match='no compensation: fold_compensation takes'):
    fold_compensation(network('repq'))
  for function in (integer_network, fold_compensation, lambda own: compensate(own, BATCHES)):
    with pytest.raises(ValueError, match=r'takes a Quantized, .* got Own'):
      function(MODEL)


class Perceptron(nnx.Module):
  def __init__(self, rngs):
    self.first = nnx.Linear(5, 8, rngs=rngs)
    self.second = nnx.Linear(8, 3, rngs=rngs)

  def __call__(self, x):
    return self.second(nnx.relu(self.first(x)))


def test_a_bridged_nnx_module_is_quantized():
  trained = Perceptron(nnx.Rngs(0))
  model = nnx.bridge.to_linen(Perceptron)
  variables = {'params': nnx.to_pure_dict(nnx.state(trained, nnx.Param))}
  quantized = ptq(model, variables, X, uniform_rules(8))
  assert 0 < np.abs(quantized(X) - trained(X)).max() < 0.1


@pytest.mark.parametrize('method', [ptq, percentile_ptq, repq, gptq_ptq, lsq])
@pytest.mark.parametrize('given', [{'kernel': 1}, None], ids=['parameters', 'nothing'])
def test_what_are_no_variables_is_refused_by_name(method, given):
  rules = uniform_rules(4, learned=method is lsq)
  with pytest.raises(ValueError, match=r"variables are what `model.init` returns, \{'params'"):
    method(MODEL, given, X, rules)


def test_a_method_is_its_settings():
  with pytest.raises(ValueError, match=r"method is a QwT\(...\), .*; got 'qwt'"):
    compensate(network('percentile_ptq'), X, 'qwt')


def test_it_is_shown_in_a_line():
  assert repr(network('ptq')) == 'Quantized(Own, Collections(params, quantization))'
