"""Calibration is called as the model is, and counts what a mask counts: every method, against plain data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from flax import linen as nn
from flax import traverse_util
from models.random_variables import random_variables

from jaxlab.models import Anatomy, Norm
from jaxlab.quantizers import (
  Rule,
  absmax_ptq,
  activation_qat,
  gptq_ptq,
  lsq,
  percentile_ptq,
  ptq,
  range_qat,
  repq,
  uniform_rules,
)
from jaxlab.quantizers.compensation import NBC, QwT, QwTv2, compensate

BLOCKS = ('block_0', 'block_1')
PARTS = Anatomy(
  ('stem',), BLOCKS, head=('head',), norms=[Norm(f'{b}/norm', readers=[f'{b}/fc1']) for b in BLOCKS]
)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 5, 6)).astype(np.float32)
MASK = np.arange(5) < RNG.integers(1, 6, (12, 1))
FAR = np.where(MASK[..., None], X, 30 * X)  # padding that would be seen in every range


class Block(nn.Module):
  """A residual branch."""

  @nn.compact
  def __call__(self, x):
    y = nn.relu(nn.Dense(10, name='fc1')(nn.LayerNorm(name='norm')(x)))
    return x + nn.Dense(6, name='fc2')(y)


class Network(nn.Module):
  """Works on every position alone; takes a mask, a flag and a gain that it needs to be static."""

  @nn.compact
  def __call__(self, x, mask=None, double=False, gain=1.0):
    x = nn.Dense(6, name='stem')(x)
    for name in BLOCKS:
      x = Block(name=name)(x)
    if mask is not None:
      x = jnp.where(mask[..., None], x, 0)
    return nn.Dense(3, name='head')(gain * (2 * x if double else x))


MODEL = Network()
VARIABLES = random_variables(MODEL, X)


def after(method):
  def run(model, variables, batches, rules, counted=None, **options):
    before = percentile_ptq(model, variables, batches, rules, counted=counted, **options)
    options.pop('anatomy')
    return compensate(before, batches, method, counted=counted, dtype=jnp.float32, **options)

  return run


METHODS = {
  'ptq': (ptq, [*uniform_rules(4), Rule('stem|head|.*/(norm|fc1|fc2)', 'output', 4)]),
  'percentile_ptq': (percentile_ptq, uniform_rules(4, 6)),
  'repq': (repq, uniform_rules(4, 6)),
  'gptq_ptq': (gptq_ptq, uniform_rules(4, 6)),
  'lsq': (lsq, uniform_rules(4, 6, learned=True)),
  'absmax_ptq': (
    absmax_ptq,
    [*uniform_rules(4, 6), Rule('stem|head|.*/(norm|fc1|fc2)', 'output', 6)],
  ),
  'range_qat': (
    range_qat,
    [*uniform_rules(4, 6, learned=True), Rule('.*/norm', 'output', 6, learned=True)],
  ),
  'activation_qat': (
    activation_qat,
    [Rule('stem', 'input', 6, 'tensor', learned=True), *uniform_rules(inputs=6, learned=True)],
  ),
  'QwT': (after(QwT()), uniform_rules(4, 6)),
  'QwTv2': (after(QwTv2()), uniform_rules(4, 6)),
  'QwTv2 held out': (after(QwTv2(held_out=True, recalibrate=False)), uniform_rules(4, 6)),
  'NBC': (after(NBC()), uniform_rules(4, 6)),
  'NBC mean': (after(NBC('mean_abs')), uniform_rules(4, 6)),
  'NBC search': (after(NBC('search', factors=(1.0, 4.0))), uniform_rules(4, 6)),
}
# Each way in which batches are read: in one pass, by their Hessians, through blocks, and once more.
KINDS = ('ptq', 'gptq_ptq', 'QwT', 'QwTv2', 'absmax_ptq', 'range_qat', 'activation_qat')


def quantize(name, batches, **options):
  method, rules = METHODS[name]
  return method(MODEL, VARIABLES, batches, rules, anatomy=PARTS, **options)


@functools.cache
def expected(name, flag=False):
  """The network calibrated on arrays alone."""
  return quantize(name, [X[:8], X[8:]], **({'double': True} if flag else {}))


def assert_equal(found, right, rtol=1e-6, ties=False):
  found, right = (
    traverse_util.flatten_dict(dict(own.variables.tree), sep='/') for own in (found, right)
  )
  assert found.keys() == right.keys()
  for path, leaf in right.items():
    own, leaf = np.squeeze(found[path]), np.squeeze(leaf)
    if ties and path.endswith('kernel'):  # a sum in another order may round a weight the other way
      assert np.mean(np.abs(own - leaf) > rtol) < 0.05, path
    else:
      np.testing.assert_allclose(own, leaf, rtol=rtol, atol=rtol, err_msg=path)


CALLED = [(name, form) for name in KINDS for form in ('keywords', 'tuples')]


@pytest.mark.parametrize(
  ('name', 'form'),
  tables.few(CALLED, ('absmax_ptq', 'keywords'), ('range_qat', 'tuples')),
)
def test_batches_are_arguments_of_the_model(name, form):
  everywhere = np.ones((12, 5), bool)
  if form == 'keywords':  # alphabetically, x is the last one
    batches = [{'x': X[s], 'mask': everywhere[s], 'double': True} for s in (slice(8), slice(8, 12))]
  else:
    batches = [(X[s], everywhere[s], True) for s in (slice(8), slice(8, 12))]
  assert_equal(quantize(name, batches), expected(name, flag=True), 1e-5)


@pytest.mark.parametrize('name', tables.few(KINDS, 'QwT'))
def test_arrays_and_flags_may_be_the_same_for_all_batches(name):
  found = quantize(name, [X[:6], X[6:]], mask=np.ones((6, 5) if 'oin' in name else (1, 5), bool))
  assert_equal(found, quantize(name, [X[:6], X[6:]]), 1e-5)


@pytest.mark.parametrize(
  'name',
  tables.few(METHODS, 'gptq_ptq', 'QwTv2', 'activation_qat'),
)
def test_padding_counts_for_nothing(name):
  # The network works on positions alone: calibrated on those that count, without the others, it is the same.
  batches = [{'x': FAR[s], 'mask': MASK[s]} for s in (slice(8), slice(8, 12))]
  found = quantize(name, batches, counted='mask')
  if name == 'ptq':  # the same in all methods: who counts is read in one place
    assert_equal(found, quantize(name, batches, counted=lambda x, mask: mask), 0)
  if name in (
    'NBC search',
  ):  # holds every fourth example out, which are other ones without padding
    return
  alone = quantize(name, [X[:8][MASK[:8]], X[8:][MASK[8:]]])
  assert_equal(found, alone, 2e-3 if name.startswith(('QwT', 'NBC')) else 1e-4, name == 'gptq_ptq')


@pytest.mark.parametrize(
  'name',
  tables.few((*KINDS, 'percentile_ptq', 'lsq', 'NBC'), 'absmax_ptq', 'NBC'),
)
def test_examples_that_do_not_count_are_as_if_they_were_not_there(name):
  real = np.arange(12) < 9
  filled = np.where(real[:, None, None], X, 50)
  batches = [(filled[:8],), (filled[8:],)]
  found = quantize(name, batches, counted=lambda x: np.abs(x[:, 0, 0]) < 50)
  if name != 'NBC search':
    assert_equal(found, quantize(name, [X[:8], X[8:9]]), 2e-3, name == 'gptq_ptq')


@pytest.mark.parametrize('method', tables.few([QwT(), QwTv2(recalibrate=False), NBC()], QwT()))
def test_a_smaller_last_batch_counts_by_its_images(method):
  before = expected('percentile_ptq')
  found = compensate(before, [X[:5], X[5:10], X[10:]], method, anatomy=PARTS, dtype=jnp.float32)
  whole = compensate(before, [X], method, anatomy=PARTS, dtype=jnp.float32)
  assert_equal(found, whole, 2e-3)
  np.testing.assert_allclose(found.report.error_before, whole.report.error_before, rtol=1e-3)
  np.testing.assert_allclose(found.report.error_after, whole.report.error_after, rtol=1e-3)


def test_what_counts_and_cannot_be_told_is_named():
  run = functools.partial(quantize, 'percentile_ptq')
  with pytest.raises(ValueError, match=r"counted='maks' is none of .* Network: x"):
    run(X, counted='maks')
  with pytest.raises(ValueError, match=r'counted says which positions count, a bool .* float32'):
    run(X, counted='x')
  with pytest.raises(ValueError, match='counted leaves no position'):
    run(X, counted=lambda x: np.zeros((12, 5), bool))
  with pytest.raises(
    ValueError, match=r"'stem': counted says which of \[12, 4\] .* which of \[12, 5, 6\]"
  ):
    run(X, counted=lambda x: np.ones((12, 4), bool))
  with pytest.raises(ValueError, match='not traced'):
    jax.jit(lambda x: run(x, counted=lambda x: x[..., 0] > 0))(X)
  with pytest.raises(ValueError, match='arrays alone differ; batch 1'):
    run([(X, None, True), (X, None, False)])


class Shared(nn.Module):
  """One layer three times, on values of growing size, in and outside of what is computed again."""

  @nn.compact
  def __call__(self, x):
    layer = nn.Dense(6, name='layer')
    y = layer(x)
    y = layer(5 * nn.relu(y))
    return nn.Dense(2, name='head')(layer(3 * y))


@pytest.mark.parametrize(
  'name',
  tables.few(
    ['percentile_ptq', 'absmax_ptq', 'lsq', 'range_qat', 'activation_qat', 'gptq_ptq'],
    'percentile_ptq',
    'lsq',
    'gptq_ptq',
  ),
)
def test_a_layer_is_calibrated_on_all_its_calls(name):
  model = Shared()
  variables = random_variables(model, X)
  layer = variables['params']['layer']
  inputs = [X.reshape(-1, 6)]
  for change in (lambda y: 5 * np.maximum(y, 0), lambda y: 3 * y):
    inputs.append(change(inputs[-1] @ layer['kernel'] + layer['bias']).astype(np.float32))
  rows = np.concatenate(inputs)
  rules = uniform_rules(8, 8, learned=name in ('lsq', 'range_qat'))
  if name == 'percentile_ptq':
    found = percentile_ptq(model, variables, X, rules)
    own = found.variables['quantization']['layer']['input']
    low, high = np.quantile(rows, [0.001, 0.999])  # the widest candidate is a little wider
    assert own['scale'] * 255 > 0.98 * (high - low)
    assert own['scale'] * 255 < 1.05 * (rows.max() - rows.min())
  elif name == 'absmax_ptq':
    found = absmax_ptq(model, variables, X, rules)
    own = found.variables['quantization']['layer']['input']
    np.testing.assert_allclose(127 * own['scale'], np.abs(rows).max(), rtol=1e-5)
  elif name == 'range_qat':
    found = range_qat(model, variables, X, rules)
    own = found.variables['learned_ranges']['layer']['input']
    # Later calls see what the first ranges let through: more than the first inputs, less than in float.
    first, last = (3 * values.std(ddof=1) for values in (inputs[0], rows))
    assert 2 * first < own['upper'] < last
    np.testing.assert_allclose(own['lower'], -own['upper'])
  elif name == 'activation_qat':
    rules = [Rule('layer', 'input', 8, 'tensor', learned=True)]
    found = activation_qat(model, variables, X, rules)
    step = np.abs(np.quantile(rows, [0.01, 0.99])).max() / 127
    np.testing.assert_allclose(
      found.variables['activation_steps']['layer']['input'], step, rtol=1e-5
    )
  elif name == 'lsq':
    found = lsq(model, variables, X, rules)
    step = 2 * np.abs(rows).mean() / np.sqrt(127)
    np.testing.assert_allclose(found.variables['lsq']['layer']['input'], step, rtol=0.06)
  else:
    parts = Anatomy(blocks=('layer',))
    with pytest.raises(ValueError, match="'layer' is called twice"):
      gptq_ptq(model, variables, X, rules, anatomy=parts)
