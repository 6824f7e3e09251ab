"""Few-shot settings that train in seconds, for the tests of the experiments."""

import functools

import jax
import jax.numpy as jnp

from experiments.harness import launcher
from experiments.protocols import episodes, few_shot_data
from jaxlab import parallel


def tiny(**changes):
  """Returns the embedded setting with two small stages and short episodes; `changes` are values by key."""
  values = {
    'model.stage_sizes': (1, 1), 'model.widths': (2, 4), 'model.strides': (1, 2), 'model.stem_width': 2,
    'model.conv': 'direct', 'recipe.epochs': 1, 'recipe.batch_size': 128,
    'episodes.count': 10, 'episodes.num_ways': 3, 'episodes.num_queries': 2, 'episodes.per_call': 8,
    'fine_tuning.steps': 2, 'fine_tuning.dropout': 0.0, 'fine_tuning.at_once': None,
    'base.batch_size': 4, 'base.judged': 8, 'eval_batch_size': 128, 'members': 2,
  }  # fmt: skip
  values |= {key.replace('__', '.'): value for key, value in changes.items()}
  return launcher.load('acsr', 'embedded', [f'{key}={value}' for key, value in values.items()])


def one_device():
  """Returns a mesh of one device."""
  return parallel.make_mesh(devices=jax.devices()[:1])


def fresh(backbone):
  """Returns initial variables for digits."""
  return dict(jax.jit(backbone.init)(jax.random.key(0), jnp.zeros((2, 8, 8, 1))))


@functools.cache
def given(trained='last_stage'):
  """Returns initial variables, the pools, the sources and eight drawn episodes of digits."""
  config = tiny(fine_tuning__trained=trained, episodes__count=8)
  variables, sources = fresh(config.backbone), few_shot_data.load(config.data)
  novel, drawn = episodes.draw(config, sources.novel)
  sources = sources._replace(novel=novel)
  pools = jax.device_get(episodes.make_pools(config, variables, sources))
  return variables, pools, sources, drawn


def compiled(config, method, mesh):
  """Returns `episodes.program` as a function of variables, pools and tasks."""
  return jax.jit(episodes.program(config, method).make(mesh)[0])
