"""Every method on every network of `awkward_networks`: a result, or an error that names the module.

A result is right if it is as near to the float network as its bits are, and if the ranges of inputs are those
of all calls of a module and of the positions that count, as NumPy finds them.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from flax import linen as nn
from flax import traverse_util
from quantizers.networks.awkward_networks import (
  BEGIN,
  END,
  METHODS,
  NETWORKS,
  REFUSED,
  Network,
  Text,
  table,
)

from jaxlab.quantizers import (
  Quantized,
  Rule,
  absmax_ptq,
  activation_qat,
  gptq_ptq,
  integer_network,
  lsq,
  percentile_ptq,
  ptq,
  range_qat,
  repq,
  uniform_rules,
)
from jaxlab.quantizers.compensation import NBC, QwT, QwTv2, compensate

LAYERS = r'(.*/)?(stem|shared|fc\d?|q|k|v|a\d|b\d|qkv|proj|out|norm)'


@functools.cache
def network(name: str) -> Network:
  return NETWORKS[name]()


def called(own: Network, batch) -> tuple[tuple, dict]:
  return ((), batch) if isinstance(batch, dict) else ((batch,), {})


def mask_of(own: Network, batch):
  return batch['mask'] if own.counted else np.ones(np.shape(jax.tree.leaves(batch)[0])[:1], bool)


@functools.cache
def exact(name: str) -> tuple[np.ndarray, dict[str, list]]:
  """Returns the float network's outputs on all batches, and all inputs of its layers, one array a call."""
  own = network(name)
  inputs: dict[str, list] = {}

  def record(call, args, kwargs, context):
    if context.method_name in ('__call__', 'attend'):
      x = args[0] if args else kwargs.get('inputs', kwargs.get('x'))
      if hasattr(x, 'dtype') and x.dtype.kind == 'i':  # tokens, which a table looks up
        return call(*args, **kwargs)
      inputs.setdefault('/'.join(context.module.path), []).append((x, mask))
    return call(*args, **kwargs)

  outputs = []
  for batch in own.batches:
    args, kwargs = called(own, batch)
    mask = mask_of(own, batch)
    with nn.intercept_methods(record):
      outputs.append(np.asarray(own.reference.apply(own.variables, *args, **kwargs))[mask])
  return np.concatenate(outputs), inputs


def distance(own: Network, quantized: Quantized, name: str) -> float:
  outputs = []
  run = jax.jit(lambda network, args, kwargs: network(*args, **kwargs))
  for batch in own.batches:
    y = np.asarray(run(quantized, *called(own, batch)))
    outputs.append(y[mask_of(own, batch)])
  expected, found = exact(name)[0], np.concatenate(outputs)
  if own.counted:  # the class of padding, which outweighs all others
    expected, found = expected[:, 1:], found[:, 1:]
  return float(np.std(found - expected) / np.std(expected))


def rules(name: str, weights: int = 8, **options):
  found = list(uniform_rules(weights, 8, **options))
  if isinstance(network(name).model, Text):
    # Attention's weights in float: steps of log-sqrt2 are coarse at any bit-width.
    found = [Rule('.*softmax', 'input', None), *found]
    found += [] if options else [Rule('embed', 'embedding', 8)]
  return found


def arguments(name: str) -> tuple:
  own = network(name)
  return (own.model, own.variables, own.batches), {'anatomy': own.anatomy, 'counted': own.counted}


def check_ranges(name: str, quantized: Quantized) -> None:
  """Compares the ranges of inputs with the smallest and largest values of all calls that count."""
  flat = traverse_util.flatten_dict(dict(quantized.variables['quantization']), sep='/')
  paths = [path.removesuffix('/input/scale') for path in flat if path.endswith('/input/scale')]
  assert paths
  for path in paths:
    own = {
      key: np.asarray(flat.get(f'{path}/input/{key}')) for key in ('scale', 'zero_point', 'high')
    }
    if own['zero_point'].dtype == object or own['scale'].size > 1:
      continue  # attention's weights
    calls = [np.asarray(x)[mask] for x, mask in exact(name)[1][path]]
    low, high = min(x.min() for x in calls), max(x.max() for x in calls)
    found = -own['zero_point'] * own['scale'], (own['high'] - own['zero_point']) * own['scale']
    np.testing.assert_allclose(found, (min(low, 0), max(high, 0)), atol=0.12 * (high - low) + 1e-6)


def check_magnitudes(name: str, quantized: Quantized) -> None:
  """Compares the scales of inputs with the largest magnitude of all calls that count."""
  flat = traverse_util.flatten_dict(dict(quantized.variables['quantization']), sep='/')
  paths = [path.removesuffix('/input/scale') for path in flat if path.endswith('/input/scale')]
  assert paths
  for path in paths:
    largest = max(np.abs(np.asarray(x)[mask]).max() for x, mask in exact(name)[1][path])
    np.testing.assert_allclose(127 * flat[f'{path}/input/scale'], largest, rtol=1e-4, err_msg=path)


@functools.cache
def base(name: str, weights: int = 8) -> Quantized:
  args, options = arguments(name)
  return percentile_ptq(*args, rules(name, weights), **options)


def run_ptq(name):
  args, options = arguments(name)
  return ptq(*args, [Rule('.*', 'kernel', 8), Rule(LAYERS, 'output', 8)], **options)


def run_percentile_ptq(name):
  found = base(name)
  check_ranges(name, found)
  return found


def run_absmax_ptq(name):
  args, options = arguments(name)
  own = [*uniform_rules(8, 8), Rule(LAYERS.replace('|norm', ''), 'output', 8)]
  tables = isinstance(network(name).model, Text)  # padding is far out in them: a scale a row
  own += [Rule('embed', 'embedding', 8, 'channel')] if tables else []
  found = absmax_ptq(*args, own, **options)
  check_magnitudes(name, found)
  return found


def run_range_qat(name):
  args, options = arguments(name)
  return range_qat(*args, [*uniform_rules(8, 8, learned=True)], **options)


def run_activation_qat(name):
  args, options = arguments(name)
  return activation_qat(*args, uniform_rules(inputs=8, learned=True), **options)


def run_repq(name):
  args, options = arguments(name)
  return repq(*args, rules(name), **options)


def run_gptq_ptq(name):
  args, options = arguments(name)
  return gptq_ptq(*args, rules(name), **options)


def run_lsq(name):
  args, options = arguments(name)
  return lsq(*args, rules(name, learned=True), **options)


def run_compensate(method, name):
  own, before = network(name), base(name, 3)
  found = compensate(
    before, own.batches, method, anatomy=own.anatomy, counted=own.counted, dtype=jnp.float32
  )
  errors = distance(own, before, name), distance(own, found, name)
  assert errors[1] < errors[0], errors
  return found


def run_integer_network(name):
  return integer_network(base(name))


RUN = {
  'ptq': run_ptq,
  'absmax_ptq': run_absmax_ptq,
  'percentile_ptq': run_percentile_ptq,
  'repq': run_repq,
  'gptq_ptq': run_gptq_ptq,
  'lsq': run_lsq,
  'range_qat': run_range_qat,
  'activation_qat': run_activation_qat,
  'QwT': functools.partial(run_compensate, QwT()),
  'QwTv2': functools.partial(run_compensate, QwTv2()),
  'NBC': functools.partial(run_compensate, NBC()),
  'integer_network': run_integer_network,
}
BOUNDS = {
  'ptq': 0.1,
  'absmax_ptq': 0.1,
  'lsq': 0.4,
  'range_qat': 0.4,
  'activation_qat': 0.1,
  'QwT': 0.8,
  'QwTv2': 0.8,
  'NBC': 0.8,
}


@pytest.mark.parametrize(('method', 'name'), tables.cells(METHODS, list(NETWORKS), len(METHODS)))
def test_a_network_is_quantized_right_or_refused_by_name(method, name):
  if (method, name) in REFUSED:
    match, _ = REFUSED[method, name]
    with pytest.raises(ValueError, match=match):
      RUN[method](name)
    return
  found = RUN[method](name)
  assert distance(network(name), found, name) < BOUNDS.get(method, 0.05)


def test_the_page_shows_what_was_tested():
  page = Path(__file__).parents[3] / 'mlcollections_configs/qwt/README.md'
  shown = page.read_text().partition(BEGIN)[2].partition(END)[0]
  assert shown.strip() == table().strip(), 'put write_table(page) on the page'
