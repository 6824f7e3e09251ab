"""A convolutional network with batch norm, momentum and a teacher: small, with all that a state can hold.

As a script it trains in a process of its own, which tests kill or run two of.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from jaxlab.training import Program, TrainState

BATCH, SIDE, CLASSES = 16, 8, 4
CONFIG = {'model': {'width': 16}, 'optimizer': {'learning_rate': 0.05, 'momentum': 0.9}}


class Net(nn.Module):
  width: int = 16

  @nn.compact
  def __call__(self, x, train):
    init = nn.initializers.uniform(0.3)
    x = nn.Conv(self.width, (3, 3), kernel_init=init, name='conv')(x)
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name='bn')(x)
    x = nn.relu(x).mean((1, 2))
    return nn.Dense(CLASSES, kernel_init=init, name='head')(x)


def make_program(rules=(), *, width=16, batch=BATCH, blow_up_at=None, learning_rate=0.05):
  model, optimizer = Net(width), optax.sgd(learning_rate, momentum=0.9)
  image = jax.ShapeDtypeStruct((batch, SIDE, SIDE, 3), jnp.float32)

  def init(key):
    variables = model.init(key, jnp.zeros((1, *image.shape[1:])), train=False)
    params = variables['params']
    return TrainState(
      step=jnp.int32(0),
      params=params,
      opt_state=optimizer.init(params),
      model_state={'batch_stats': variables['batch_stats']},
      extra={'teacher': params, 'queue': jnp.zeros((32, CLASSES))},
    )

  def loss_fn(params, state, batch):
    key = jax.random.fold_in(jax.random.key(7), state.step)
    image = batch['image'] + 0.1 * jax.random.uniform(key, batch['image'].shape)
    logits, new = model.apply(
      {'params': params, **state.model_state}, image, train=True, mutable=['batch_stats']
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']).mean()
    return loss, (new, logits)

  def step(state, frozen, batch):
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (new, logits)), gradients = grad_fn(state.params, state, batch)
    if blow_up_at is not None:
      loss = jnp.where(state.step + 1 == blow_up_at, jnp.nan, loss)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    teacher = optax.incremental_update(params, state.extra['teacher'], 0.1)
    queue = jnp.concatenate([state.extra['queue'], logits])[-state.extra['queue'].shape[0] :]
    state = TrainState(state.step + 1, params, opt_state, new, {'teacher': teacher, 'queue': queue})
    return state, {'loss': loss, 'accuracy': jnp.mean(logits.argmax(-1) == batch['label'])}

  label = jax.ShapeDtypeStruct((batch,), jnp.int32)
  return Program(init=init, step=step, batch={'image': image, 'label': label}, rules=rules)


FSDP_RULES = ((r'conv/kernel', P(None, None, None, 'fsdp')), (r'head/kernel', P('fsdp', None)))


class Data:
  """Batch `n` is drawn from seed `n`; a process takes its rows of it."""

  def __init__(self, *, batch=BATCH, delay=0.0, end=None):
    self.next, self.batch, self.delay, self.end = 0, batch, delay, end

  def __iter__(self):
    return self

  def __next__(self):
    if self.next == self.end:
      raise StopIteration
    time.sleep(self.delay)
    rng = np.random.default_rng(self.next)
    self.next += 1
    label = rng.integers(0, CLASSES, self.batch).astype(np.int32)
    image = rng.normal(size=(self.batch, SIDE, SIDE, 3)) + label[:, None, None, None]
    rows = self.batch // jax.process_count()
    mine = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
    return {'image': image.astype(np.float32)[mine], 'label': label[mine], 'unused': label[mine]}

  def get_state(self):
    return {'next': self.next}

  def set_state(self, state):
    self.next = state['next']


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--workdir')
  parser.add_argument('--num_steps', type=int)
  parser.add_argument('--delay', type=float, default=0.0)
  parser.add_argument('--fsdp', type=int, default=1)
  parser.add_argument('--out')
  arguments = parser.parse_args()
  from jax.experimental import multihost_utils

  from jaxlab.parallel import initialize, is_primary, make_mesh
  from jaxlab.training import fit

  initialize()
  state, _ = fit(
    make_program(FSDP_RULES if arguments.fsdp > 1 else ()),
    Data(delay=arguments.delay),
    num_steps=arguments.num_steps,
    key=jax.random.key(0),
    mesh=make_mesh(fsdp=arguments.fsdp),
    workdir=arguments.workdir,
    config=CONFIG,
    log_every=1,
    checkpoint_every=3,
  )
  if arguments.out:
    state = multihost_utils.process_allgather(state, tiled=True)
    if is_primary():
      np.savez(arguments.out, *jax.tree.leaves(state))


if __name__ == '__main__':
  main()
