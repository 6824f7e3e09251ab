"""From a program to a trained state: the loop, its checkpoints and metrics, optimizers and schedules.

A run is a `Program` of pure functions over a `TrainState`; `fit` drives it on any mesh, saves it so that
nothing is lost, and goes on where it was left.
"""

from jaxlab.training.accumulate import accumulate_gradients
from jaxlab.training.averaging import (
  average_pytrees,
  running_average,
  warm_decay,
  warm_decay_per_epoch,
)
from jaxlab.training.batch_statistics import recompute_batch_stats
from jaxlab.training.checkpoints import Checkpoints
from jaxlab.training.colinearity_decay import (
  ColinearityDecayState,
  colinearity_decay,
  colinearity_penalty,
)
from jaxlab.training.copies import copy_at, optimizer_of_copies, stack_copies
from jaxlab.training.example_table import (
  blank_rows,
  pad_rows,
  padded_rows,
  read_rows,
  row_rules,
  step_rows,
  write_rows,
)
from jaxlab.training.feed import DataIterator
from jaxlab.training.fit import fit
from jaxlab.training.gate_selection import GateState, remove_least, select_gates
from jaxlab.training.group_regularizer import group_decays, group_regularizer, group_slope
from jaxlab.training.inference import map_batches
from jaxlab.training.lock import locked
from jaxlab.training.metrics import MetricWriter, Progress, read_metrics
from jaxlab.training.optimizers import by_path, held, make_optimizer, replace_by_gradient
from jaxlab.training.precision import cast_floating
from jaxlab.training.schedules import make_schedule
from jaxlab.training.state import Program, TrainState
from jaxlab.training.step import Initial, LossState, Out, apply_gradients, make_program, step_keys
from jaxlab.training.stopping import Stopping, catch_signals

__all__ = [
  'Checkpoints',
  'ColinearityDecayState',
  'DataIterator',
  'GateState',
  'Initial',
  'LossState',
  'MetricWriter',
  'Out',
  'Program',
  'Progress',
  'Stopping',
  'TrainState',
  'accumulate_gradients',
  'apply_gradients',
  'average_pytrees',
  'blank_rows',
  'by_path',
  'cast_floating',
  'catch_signals',
  'colinearity_decay',
  'colinearity_penalty',
  'copy_at',
  'fit',
  'group_decays',
  'group_regularizer',
  'group_slope',
  'held',
  'locked',
  'make_optimizer',
  'make_program',
  'make_schedule',
  'map_batches',
  'optimizer_of_copies',
  'pad_rows',
  'padded_rows',
  'read_metrics',
  'read_rows',
  'recompute_batch_stats',
  'remove_least',
  'replace_by_gradient',
  'row_rules',
  'running_average',
  'select_gates',
  'stack_copies',
  'step_keys',
  'step_rows',
  'warm_decay',
  'warm_decay_per_epoch',
  'write_rows',
]
