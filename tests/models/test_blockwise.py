import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from flax import linen as nn
from golden_vectors import assert_close
from models.random_variables import random_images, random_variables

from jaxlab.models import Anatomy, Hook, ResNet, Swin, ViT, apply
from jaxlab.models.block_stream import Stream
from jaxlab.models.blockwise import (
  Part,
  Programs,
  Skeleton,
  find_blocks,
  find_parts,
  park,
  reach,
  restore,
  slice_variables,
)
from jaxlab.models.main_arrays import array_leaves
from jaxlab.quantizers import percentile_ptq, uniform_rules
from jaxlab.quantizers.compensation import QwTv2, compensate

X = random_images((4, 8, 8, 3))


class Pairs(nn.Module):
  """Blocks called by keyword that return a pair, with something computed between them."""

  @nn.compact
  def __call__(self, x, scale: float = 1.0):
    x = nn.Dense(4, name='embed')(x)
    side = {'mask': x[..., :1] > 0, 'name': 'side'}
    for i in range(3):
      x, side = PairBlock(name=f'part{i}')(x=x, side=side, scale=scale)
      if i == 1:
        x = 2 * x
    return nn.Dense(2, name='head')(x)


class PairBlock(nn.Module):
  @nn.compact
  def __call__(self, *, x, side, scale):
    assert side['name'] == 'side'  # what is no array stays what it is
    return x + scale * nn.Dense(4, name='fc')(x) * side['mask'], side


PAIRS = Anatomy(['embed'], [f'part{i}' for i in range(3)], head=['head'])
NETWORKS = {
  'resnet': (ResNet((1, 1), width=4, stem='cifar', num_classes=3), (X,), {'train': False}, None),
  'vit': (ViT(4, 8, 8, 2, 2, num_classes=3), (X,), {}, None),
  'swin': (Swin(2, 8, 2, 4, (1, 2), (1, 1), num_classes=3), (X,), {}, None),
  'pairs': (Pairs(), (X, 0.5), {}, PAIRS),
}


@pytest.mark.parametrize('name', tables.few(NETWORKS, 'vit', 'resnet'))
def test_blocks_that_run_alone_make_up_the_network(name):
  model, args, kwargs, anatomy = NETWORKS[name]
  variables = random_variables(model, *args)
  hooks = [Hook('.*(bn1|norm1|fc)', output=lambda site, y: 1.5 * y)]
  root, parts = find_blocks(model, variables, args, kwargs, hooks, anatomy=anatomy)
  expected = jax.jit(lambda v: apply(model, v, *args, hooks=hooks, **kwargs))(variables)

  @jax.jit
  def by_blocks(variables):
    images, outputs = array_leaves((args, kwargs)), {}
    for index, part in enumerate(parts):
      leaves = reach(root, parts, index, variables, images, outputs, hooks)
      own = slice_variables(variables, part.path)
      outputs = {index: array_leaves(part.run(own, leaves, hooks))}
    return reach(root, parts, len(parts), variables, images, outputs, hooks)

  (y,) = by_blocks(variables)
  assert_close(y, expected, 1e-5)


@pytest.mark.parametrize('name', tables.few(['vit', 'swin', 'pairs'], 'vit'))
def test_batches_stream_from_block_to_block(name):
  model, args, kwargs, anatomy = NETWORKS[name]
  variables = random_variables(model, *args)
  root, parts = find_blocks(model, variables, args, kwargs, (), anatomy=anatomy)
  inputs = [args, (2 * X, *args[1:])]
  stream = Stream(root, parts, variables, (), [(own, kwargs) for own in inputs], Programs())
  for index, part in enumerate(parts):
    stream.advance(index)
    own = slice_variables(variables, part.path)
    run = jax.jit(lambda v, leaves, part=part: array_leaves(part.run(v, leaves, ())))
    stream.outputs = [park(run(own, restore(leaves))) for leaves in stream.leaves]
  finish = jax.jit(
    lambda images, known: reach(
      root, parts, len(parts), variables, images, {len(parts) - 1: known}, ()
    )
  )
  for batch, known in zip(inputs, stream.outputs, strict=True):
    (y,) = finish(array_leaves((batch, kwargs)), restore(known))
    assert_close(y, jax.jit(lambda x, b=batch: model.apply(variables, x, *b[1:]))(batch[0]), 1e-5)


def test_an_output_that_is_missing_shows():
  model, args, kwargs, _ = NETWORKS['vit']
  variables = random_variables(model, *args)
  root, parts = find_blocks(model, variables, args, kwargs, ())
  (x,) = reach(root, parts, 1, variables, [X], {}, ())
  assert np.all(np.isnan(x))


def test_sources_say_where_arguments_come_from():
  model, args, kwargs, anatomy = NETWORKS['pairs']
  variables = random_variables(model, *args)
  _, parts = find_blocks(model, variables, args, kwargs, (), anatomy=anatomy)
  # Arguments in order: the mask within `side`, then x; the block returns x, then the mask.
  assert parts[1].sources == (('out', 1), ('out', 0))
  assert parts[2].sources == (('out', 1), None)


def test_parts_that_do_not_run_in_a_row_are_refused():
  model, args, kwargs, _ = NETWORKS['pairs']
  variables = random_variables(model, *args)
  root = Part('', model, Skeleton.of((args, kwargs)))
  find = lambda pattern: find_parts(root, variables, array_leaves((args, kwargs)), (), pattern)  # noqa: E731
  with pytest.raises(ValueError, match="'part0/fc' lies inside 'part0'"):
    find('part0.*')
  assert find('nothing') == []
  with pytest.raises(ValueError, match='parts of Pairs are not known'):
    find_blocks(model, variables, args, kwargs, ())
  with pytest.raises(ValueError, match="block pattern 'part7'"):
    find_blocks(model, variables, args, kwargs, (), anatomy=Anatomy(blocks=['part0', 'part7']))
  with pytest.raises(ValueError, match="block pattern 'h_0'"):
    find_blocks(model, variables, args, kwargs, (), blocks='h_0')


def test_functions_that_differ_in_arguments_they_do_not_read_are_kept_apart():
  programs = Programs()

  def block(size):
    def run(variables, x):
      assert variables['kernel'].shape == (size, size)  # as Linen checks its parameters
      return x + 1

    return run

  def make(size, dtype=np.float32):
    args = ({'kernel': np.zeros((size, size), dtype)}, np.ones(2, np.float32))
    return programs(block(size), *args), args

  (three, of_three), (five, of_five), (again, _) = make(3), make(5), make(3)
  assert five is not three and again is three
  assert make(3, np.int32)[0] is not three
  np.testing.assert_array_equal(three(*of_three), 2)
  np.testing.assert_array_equal(five(*of_five), 2)


class Sizes(nn.Module):
  """Blocks of one shape whose second kernels differ in size: programs of the first do not read them."""

  @nn.compact
  def __call__(self, x):
    for i, size in enumerate((3, 5)):
      x = SizeBlock(size, name=f'part{i}')(x)
    return x


class SizeBlock(nn.Module):
  size: int

  @nn.compact
  def __call__(self, x):
    y = nn.relu(nn.Conv(x.shape[-1], (1, 1), name='first')(x))
    return x + nn.Conv(x.shape[-1], (self.size, self.size), name='second')(y)


@pytest.mark.parametrize(
  ('method', 'count'),
  tables.few([(QwTv2(), 4), (QwTv2(modules='first'), 2)], (QwTv2(modules='first'), 2)),
  ids=['ranges', 'first'],
)
def test_blocks_with_kernels_of_other_sizes_are_compensated(method, count):
  """Ranges found anew for the first layer, and its input, do not depend on the second kernel."""
  model = Sizes()
  variables = random_variables(model, X)
  quantized = percentile_ptq(model, variables, X, uniform_rules(3, 4))
  batches = list(X.reshape(2, 2, 8, 8, 3))
  own = Anatomy(blocks=['part0', 'part1'])
  found = compensate(quantized, batches, method, anatomy=own, dtype=jnp.float32)
  assert len(found.report.paths) == count
  assert np.all(found.report.error_after <= found.report.error_before * (1 + 1e-5))


def test_functions_that_read_different_arguments_are_kept_apart():
  programs = Programs()
  args = (np.float32(1), np.float32(2))
  first, second = programs(lambda a, b: -a, *args), programs(lambda a, b: -b, *args)
  assert (first(*args), second(*args)) == (-1, -2)
  assert programs(lambda c, d: -d, *args) is second


class TwoAlike(nn.Module):
  """A block with two layers of one shape."""

  @nn.compact
  def __call__(self, x):
    y = nn.relu(nn.Dense(x.shape[-1], name='first')(x))
    return x + nn.Dense(x.shape[-1], name='second')(y)


@pytest.mark.exhaustive
@pytest.mark.parametrize('target', tables.few(['local', 'global'], 'local'))
def test_layers_of_one_shape_in_a_block_are_compensated_each_by_its_own_statistics(target):
  model = nn.Sequential([TwoAlike(name='part0'), TwoAlike(name='part1')])
  variables = random_variables(model, X)
  quantized = percentile_ptq(model, variables, X, uniform_rules(4, 8))
  own = Anatomy(blocks=['layers_0', 'layers_1'])
  found = compensate(quantized, X, QwTv2(), anatomy=own, dtype=jnp.float32, target=target)
  assert np.all(found.report.error_after <= found.report.error_before * (1 + 1e-5))
  exact = jax.jit(model.apply)(variables, X)
  errors = [float(jnp.mean((network(X) - exact) ** 2)) for network in (quantized, found)]
  assert errors[1] < errors[0]
