"""Measures the loop against the bare step, quantized against plain steps, and calibration, as ratios.

Times are the minimum over repeats that alternate between the two sides, so that a busy machine disturbs
both alike.
"""

import functools
import time
from typing import Any

SIZES = ('embedded', 'resnet18', 'calibration')
STEPS = {'embedded': 20, 'resnet18': 2}


def configuration(size: str) -> Any:
  """Returns the settings of a size: the embedded ones, or CIFAR ResNet-18 on 32x32 noise."""
  from experiments.harness import launcher

  if size == 'resnet18':
    return launcher.load('ssql', 'cifar10_resnet18', ['recipe.batch_size=128'])
  return launcher.load('ssql', 'embedded')


def source(config: Any) -> Any:
  """Returns random images of the size that `config` asks for."""
  import numpy as np

  from jaxlab import data

  shape = (8 * config.recipe.batch_size, *config.data.stored_image)
  images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  return data.InMemory({'image': images, 'label': np.zeros(len(images), np.int32)}, 10)


def measure_calibration(repeats: int, batches: tuple[int, int] = (2, 10)) -> dict[str, Any]:
  """Returns what calibration costs, in float forward passes, on a ViT of six blocks of 65 tokens x 192.

  Costs are those of an image: the difference between many and few calibration batches of 32, so that
  tracing, the same for any number, does not enter.
  """
  import jax

  from experiments.harness.costs import alternate
  from jaxlab import models, quantizers
  from jaxlab.quantizers import compensation

  model = models.create('vit_tiny_patch4_32', depth=6, num_classes=10)
  key = jax.random.key(0)
  variables = model.init(key, jax.numpy.zeros((1, 32, 32, 3)))
  few, many = batches
  images = list(jax.random.normal(key, (many, 32, 32, 32, 3)))
  quantized = quantizers.repq(model, variables, images[0], quantizers.edge_rules(4, 4))
  forward = jax.jit(model.apply)
  runs = {'forward': lambda: jax.block_until_ready([forward(variables, x) for x in images])}
  methods = {
    'qwt': compensation.QwT(),
    'qwt_v2': compensation.QwTv2(),
    'qwt_v2_blocks': compensation.QwTv2(granularity='block'),
    'nbc': compensation.NBC(),
  }
  programs = compensation.Programs()
  for name, method in methods.items():
    for count in batches:
      runs[f'{name}_{count}'] = functools.partial(
        compensation.compensate, quantized, images[:count], method, programs=programs
      )
  for run in runs.values():
    run()
  times = alternate(runs, repeats)
  figures = {'forward_seconds_per_image': times['forward'] / (32 * many)}
  for name in methods:
    marginal = (times[f'{name}_{many}'] - times[f'{name}_{few}']) / (many - few)
    figures[f'{name}_over_forward'] = marginal * many / times['forward']
  return figures


def measure(size: str, repeats: int) -> dict[str, Any]:
  """Returns the figures of one size."""
  if size == 'calibration':
    return measure_calibration(repeats)
  import jax

  from experiments import ssql
  from experiments.harness.costs import alternate
  from jaxlab import data, parallel
  from jaxlab.parallel import shard_program

  config = configuration(size)
  mesh = config.mesh.make()
  images, steps = source(config), STEPS[size]
  loader = data.make_loader(images, batch_size=config.recipe.batch_size, seed=0)
  feed = data.prefetch_to_device(
    ({'image': b['image'], 'index': b['index']} for b in loader), parallel.batch_sharding(mesh)
  )
  resident, _ = next(feed)
  figures: dict[str, Any] = {'batch_size': config.recipe.batch_size}
  programs, states, runs = {}, {}, {}
  for variant in ('base', 'ssql'):
    programs[variant] = shard_program(ssql.training(config, variant).program, mesh)
    states[variant] = programs[variant].init(jax.random.key(0))
    start = time.perf_counter()
    states[variant], metrics = programs[variant].step(states[variant], {}, resident)
    jax.block_until_ready(metrics)
    figures[f'first_step_seconds_{variant}'] = time.perf_counter() - start

    def bare(variant=variant):
      for _ in range(steps):
        states[variant], metrics = programs[variant].step(states[variant], {}, resident)
      jax.block_until_ready(metrics)

    runs[f'bare_{variant}'] = bare

  def loop():
    for _ in range(steps):
      batch, _ = next(feed)
      states['ssql'], metrics = programs['ssql'].step(states['ssql'], {}, batch)
    jax.block_until_ready(metrics)

  times = alternate(runs | {'loop_ssql': loop}, repeats)
  figures |= {f'{name}_seconds_per_step': value / steps for name, value in times.items()}
  figures['loop_over_bare'] = times['loop_ssql'] / times['bare_ssql']
  figures['quantized_over_plain'] = times['bare_ssql'] / times['bare_base']
  figures['recompilations'] = programs['ssql'].step._cache_size() - 1
  return figures
