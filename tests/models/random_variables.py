"""Random values for a model's variables, and applications compiled as one program: fast tests."""

import jax
import numpy as np

from jaxlab.models import capture


def random_variables(model, x, *args, seed=0):
  """Normal values for each variable of `model` at input `x`; scales and variances around 1."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), x, *args)
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    noise = rng.standard_normal(leaf.shape)
    name = path[-1].key
    if name in ('scale', 'var'):
      noise = 1 + 0.2 * np.abs(noise)
    elif name == 'kernel':
      noise = noise / np.sqrt(np.prod(leaf.shape[:-1]))
    else:
      noise = 0.3 * noise
    return np.asarray(noise, leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def random_images(shape=(3, 8, 8, 3), seed=0):
  """Standard normal float32 images."""
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run(model, variables, x, train=False):
  """Jitted `model.apply`; in training the pair of output and new `batch_stats`."""
  mutable = ['batch_stats'] if train else False
  return jax.jit(lambda v, x: model.apply(v, x, train, mutable=mutable))(variables, x)


def run_capture(model, variables, patterns, x):
  """Jitted `capture`."""
  return jax.jit(lambda v, x: capture(model, v, patterns, x))(variables, x)


@jax.jit
def call(network, *args):
  """Jitted call of a quantized network; its variables are arguments, so that like networks share it."""
  return network(*args)
