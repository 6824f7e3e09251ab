"""From a configuration to data, mesh and a trained state: what all experiments do alike."""

from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from jaxlab import data, parallel, training


def mesh(config: ConfigDict) -> jax.sharding.Mesh:
  """Returns the device mesh of `config.mesh` (`data`, `fsdp`, `tensor`; -1 is the rest)."""
  return parallel.make_mesh(**config.mesh)


def load_data(config: ConfigDict, split: str) -> data.Source:
  """Returns the `'train'` or `'test'` split of `config.data`.

  Raises:
    ValueError: if the batch does not divide over the devices, the images are not what the configuration
      says, or the training split has another size (the schedule was made for it).
    FileNotFoundError: if the data are not there; the message says how to get them.
  """
  parallel.check_batch_size(config.batch_size, mesh(config))
  source = data.load(
    config.data.name, config.data[f'{split}_split'], **config.data[f'{split}_options']
  )
  if split == 'train':
    check_size('data.train_size', config.data.train_size, source)
  first = data.epoch_batches(source, 2, transform=reading(config, split)['transform'])
  batch = next(first)
  first.close()
  if 'tokens' in batch:
    data.check_tokens(batch['tokens'], source.num_classes)
    return source
  image_shape = config.data.stored_image if split == 'train' else None
  data.check_batch(batch, num_classes=source.num_classes, image_shape=image_shape)
  return source


def check_size(key: str, size: int, source: data.Source) -> None:
  """Raises ValueError if `source` has not the `size` that the configuration's `key` says."""
  if len(source) != size:
    raise ValueError(
      f'{key}={size}, but {len(source)} records were found: set --config.{key}={len(source)}.'
    )


def reading(config: ConfigDict, split: str) -> dict[str, Any]:
  """Returns how records of a split are read: options of `make_loader`."""
  decode = config.data.get(f'{split}_decode')
  return {
    'transform': data.DecodeImage(**decode) if decode else None,
    'num_threads': config.data.get('num_threads', 0),
    'num_workers': config.data.get('num_workers', 0),
  }


def make_loader(
  config: ConfigDict, source: data.Source, batch_size: int, **options: Any
) -> data.Loader:
  """Returns the shuffled training batches of this process; `options` are further ones of `make_loader`."""
  index, count = data.process_shard(parallel.batch_sharding(mesh(config)), batch_size)
  return data.make_loader(
    source,
    batch_size=batch_size,
    seed=config.seed,
    process_index=index,
    process_count=count,
    **reading(config, 'train'),
    **options,
  )


def train(
  program: training.Program,
  source: data.Source,
  config: ConfigDict,
  workdir: epath.PathLike,
  *,
  num_steps: int,
  description: str,
  begin: Callable[[training.TrainState], training.TrainState] | None = None,
) -> tuple[training.TrainState, list[dict[str, Any]]]:
  """Trains `program` on shuffled batches of `source`, from wherever `workdir` was left.

  Returns the final state and the rows of metrics. Uses `batch_size`, `seed`, `log_every`, `checkpoint_every`,
  `mesh` and `data` of the configuration.

  `begin` is applied to the drawn state; what comes out is saved as the checkpoint of step 0, from which the
  run goes on like any other: other networks' variables are data of the run, not of its program.
  """
  loader = make_loader(config, source, config.batch_size)
  key, settings = jax.random.key(config.seed), {**_trajectory(config), 'num_steps': num_steps}
  settings['run'] = description
  if begin is not None:
    checkpoints = training.Checkpoints(str(workdir), config=settings)
    if not checkpoints.steps:
      init = parallel.shard_program(program, mesh(config)).init
      checkpoints.save(0, begin(init(key)), loader.get_state())
    checkpoints.close()
  say(f'{description}: {num_steps} steps; the first one is compiled')
  try:
    return training.fit(
      program,
      loader,
      num_steps=num_steps,
      key=key,
      mesh=mesh(config),
      workdir=str(workdir),
      config=settings,
      log_every=config.log_every,
      checkpoint_every=config.checkpoint_every,
      description=description,
    )
  finally:
    loader.close()


def say(text: str) -> None:
  """Prints a line, once for all processes."""
  if jax.process_index() == 0:
    print(text, flush=True)


def _trajectory(config: ConfigDict) -> dict[str, Any]:
  """Returns the entries that decide what is trained: a run may be resumed under other values of the rest."""
  rest = {'mesh', 'log_every', 'checkpoint_every', 'eval', 'claims', 'runs', 'paper', 'setting'}
  rest |= {'eval_batch_size', 'quantization', 'gptq', 'edges', 'conv_act_bits', 'blocks'}
  rest |= {'layer_blocks'}
  return {key: value for key, value in config.to_dict().items() if key not in rest}
