"""Our side of the comparison, as a process of its own: a network's training step and forward pass.

python -m experiments.tools.bench_models --network=resnet18 --size=64 --batch=32 --steps=5 --started=0
"""

import time
from collections.abc import Sequence
from typing import Any

from experiments.tools import bench_side


def make_program(network: str, size: int, batch: int) -> tuple[Any, Any]:
  """Returns `(model, program)`: the network, and its training by SGD with momentum on mean cross-entropy.

  Batches are `{'inputs', 'labels'}`: float images `[batch, size, size, 3]` and classes, or for a decoder
  tokens `[batch, size]` and the tokens that follow.
  """
  import jax
  import jax.numpy as jnp
  import optax

  from jaxlab import models, training

  model = models.create(network)
  optimizer = training.make_optimizer('sgd', 0.01, momentum=0.9)
  tokens = isinstance(model, models.GPT2)
  inputs = jax.ShapeDtypeStruct(
    (batch, size) if tokens else (batch, size, size, 3), jnp.int32 if tokens else jnp.float32
  )
  labels = jax.ShapeDtypeStruct((batch, size) if tokens else (batch,), jnp.int32)

  def init(key: jax.Array) -> training.Initial:
    variables = dict(model.init(key, jnp.zeros((1, *inputs.shape[1:]), inputs.dtype)))
    return training.Initial(variables.pop('params'), variables)

  def loss(params, state, batch, key):
    train = {'train': True, 'mutable': list(state.model_state)}
    variables = {'params': params, **state.model_state}
    logits, model_state = model.apply(variables, batch['inputs'], **train)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['labels'])
    return losses.mean(), training.Out(model_state)

  shapes = {'inputs': inputs, 'labels': labels}
  return model, training.make_program(init, loss, optimizer, shapes)


def random_batch(program: Any) -> dict[str, Any]:
  """Returns normal images of the classes 0 to 9, or random tokens followed by the next ones."""
  import numpy as np

  rng = np.random.default_rng(0)
  inputs, labels = program.batch['inputs'], program.batch['labels']
  if np.issubdtype(inputs.dtype, np.integer):
    tokens = rng.integers(0, 50257, inputs.shape).astype(np.int32)
    return {'inputs': tokens, 'labels': np.roll(tokens, -1, 1)}
  images = rng.normal(size=inputs.shape).astype(np.float32)
  return {'inputs': images, 'labels': np.arange(len(images), dtype=labels.dtype) % 10}


def main(arguments: Sequence[str] | None = None) -> None:
  """Measures the training step, then the forward pass, and prints the figures."""
  options = bench_side.parse(arguments)
  bench_side.use_threads(options.threads)
  import flax
  import jax

  from jaxlab import parallel
  from jaxlab.parallel import shard_program

  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  model, program = make_program(options.network, options.size, options.batch)
  sharded = shard_program(program, mesh)
  batch = jax.device_put(random_batch(program), parallel.batch_sharding(mesh))
  state = sharded.init(jax.random.key(0))
  start = time.perf_counter()
  train = sharded.step.lower(state, {}, batch).compile()
  figures: dict[str, Any] = {'compile': {'wall': time.perf_counter() - start}}

  def step():
    nonlocal state
    state, metrics = train(state, {}, batch)
    jax.block_until_ready(metrics)

  step()
  figures['first_step'] = {'wall': time.time() - options.started}
  figures['step'] = bench_side.least(step, options.steps)
  variables = {'params': state.params, **state.model_state}
  apply = jax.jit(model.apply)

  def forward():
    jax.block_until_ready(apply(variables, batch['inputs']))

  figures['forward'] = bench_side.least(forward, options.steps)
  bench_side.say(
    {
      'figures': figures,
      'parameters': sum(leaf.size for leaf in jax.tree.leaves(state.params)),
      'versions': {'jax': jax.__version__, 'flax': flax.__version__},
      'threads': bench_side.cpu_count(),
    }
  )


if __name__ == '__main__':
  main()
