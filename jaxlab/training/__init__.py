"""From a program to a trained state: the loop, its checkpoints and metrics, optimizers and schedules.

A run is a `Program` of pure functions over a `TrainState`; `fit` drives it on any mesh, saves it so that
nothing is lost, and goes on where it was left.
"""

from jaxlab.training.accumulate import accumulate_gradients
from jaxlab.training.averaging import average_pytrees, running_average
from jaxlab.training.batch_statistics import recompute_batch_stats
from jaxlab.training.checkpoints import Checkpoints
from jaxlab.training.feed import DataIterator
from jaxlab.training.fit import fit
from jaxlab.training.inference import map_batches
from jaxlab.training.metrics import MetricWriter, Progress, read_metrics
from jaxlab.training.optimizers import by_path, make_optimizer
from jaxlab.training.precision import cast_floating
from jaxlab.training.schedules import make_schedule
from jaxlab.training.state import Program, TrainState
from jaxlab.training.step import Initial, LossState, Out, apply_gradients, make_program, step_keys

__all__ = [
  'Checkpoints',
  'DataIterator',
  'Initial',
  'LossState',
  'MetricWriter',
  'Out',
  'Program',
  'Progress',
  'TrainState',
  'accumulate_gradients',
  'apply_gradients',
  'average_pytrees',
  'by_path',
  'cast_floating',
  'fit',
  'make_optimizer',
  'make_program',
  'make_schedule',
  'map_batches',
  'read_metrics',
  'recompute_batch_stats',
  'running_average',
  'step_keys',
]
