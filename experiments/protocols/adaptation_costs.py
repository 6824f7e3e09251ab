"""What a step of a way to adapt a frozen network costs: numbers that are trained, bytes that are kept."""

import dataclasses

import jax

from experiments.protocols import adaptation
from experiments.protocols.adaptation import Adaptation, Row, Settings
from jaxlab import adapters, parallel
from jaxlab.parallel import aot
from jaxlab.training import step_keys

COSTS = ('trained', 'trained_with_head', 'residual_mb', 'temporary_mb')


def costs(config: Settings, row: Row, name: str) -> dict[str, float]:
  """Returns what a step of a row costs on the first task: `COSTS`.

  Numbers that are trained, without and with the head; megabytes (10^6) of what the backward pass keeps
  (`adapters.residual_bytes`, as if nothing were fused), and of the temporaries of the compiled step on one
  device. Megabytes are those of another network where the settings say so (`accounted`).
  """
  task = config.tasks[0]
  target = config.target[task]
  judged = adaptation.adapted(config, row, config.tuned(name, task), target, target.size)
  params = jax.eval_shape(judged.program.init, jax.random.key(0)).params
  trained = {part: adapters.count_parameters(own) for part, own in params.items()}
  made = accounted(config, row, name)
  program = made.program
  state = jax.eval_shape(program.init, jax.random.key(0))
  given = program.frozen, program.batch, jax.eval_shape(step_keys, state)
  mesh = parallel.make_mesh(devices=jax.local_devices()[:1])
  needs = aot.report(aot.compile_step(program, mesh))['hbm']
  return {
    'trained': trained['tuned'] + trained['network'],
    'trained_with_head': sum(trained.values()),
    'residual_mb': adapters.residual_bytes(made.loss, state.params, *given) / 1e6,
    'temporary_mb': needs['temporaries'] / 1e6,
  }


def accounted(config: Settings, row: Row, name: str) -> Adaptation:
  """Returns a row's training on the first task as its memory is counted."""
  task = config.tasks[0]
  target, fields = config.target[task], dict(config.accounted)
  size = fields.pop('batch_size', config.recipe.batch_size)
  config = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, batch_size=size))
  if 'image_size' in fields:
    sides = (fields['image_size'],) * 2
    images = (*sides, target.data.stored_image[-1])
    own = dataclasses.replace(target.data, stored_image=images, image_size=None)
    target = dataclasses.replace(target, data=own)
  return adaptation.adapted(config, row, config.tuned(name, task), target, target.size, **fields)
