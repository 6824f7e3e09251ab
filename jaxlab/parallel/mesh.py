"""The device mesh: axes `data`, `fsdp`, `tensor`, and how a batch lies on it."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ('data', 'fsdp', 'tensor')
BATCH_AXES = ('data', 'fsdp')


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Returns a mesh with the axes `data`, `fsdp`, `tensor`, laid out for the devices' network.

  The batch is split over `data` and `fsdp`; parameters are copied along `data`, may be split along
  `fsdp` (each chip keeps a part and gathers the rest when it needs it) and along `tensor`.

  >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
  {'data': 1, 'fsdp': 1, 'tensor': 1}

  Args:
    data: size of the axis; -1 in at most one of the three means "the remaining devices".
    fsdp: size of the axis.
    tensor: size of the axis; it is the innermost, so keep it within a host.
    devices: what to build the mesh of, all devices of all processes if None.

  Raises:
    ValueError: if the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
  for name, size in sizes.items():
    if size != -1 and size < 1:
      raise ValueError(f'make_mesh: {name}={size}, expected a positive size, or -1 for the rest.')
  free = [name for name, size in sizes.items() if size == -1]
  if len(free) > 1:
    raise ValueError(f'make_mesh: only one axis may be -1, got {" and ".join(free)}.')
  known = math.prod(size for size in sizes.values() if size != -1)
  if free and len(devices) % known == 0:
    sizes[free[0]] = len(devices) // known
  if math.prod(sizes.values()) != len(devices):
    raise ValueError(
      f'make_mesh: data={data}, fsdp={fsdp}, tensor={tensor} does not fit {len(devices)} '
      f'device(s): the sizes must multiply to {len(devices)}; -1 takes what remains.'
    )
  return jax.make_mesh(
    tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch: axis 0 over those of `data`, `fsdp` that the mesh has."""
  return NamedSharding(mesh, batch_spec(mesh))


def batch_spec(mesh: Mesh | AbstractMesh) -> PartitionSpec:
  """Returns the spec of a batch, see `batch_sharding`."""
  axes = tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)
  return PartitionSpec(axes or None)


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that keeps a whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, mesh: Mesh, name: str = 'batch_size') -> None:
  """Checks that a global batch splits evenly over the mesh.

  Args:
    batch_size: number of examples in the global batch.
    mesh: from `make_mesh`.
    name: how the caller calls the number, for the message.

  Raises:
    ValueError: if `batch_size` is not a positive multiple of `data * fsdp`.
  """
  parts = mesh.shape['data'] * mesh.shape['fsdp']
  if batch_size < 1 or batch_size % parts:
    below = batch_size // parts * parts
    nearest = [str(size) for size in (below, below + parts) if size > 0]
    raise ValueError(
      f'{name}={batch_size} does not divide over data={mesh.shape["data"]} x '
      f'fsdp={mesh.shape["fsdp"]} = {parts} parts of the mesh; use {" or ".join(nearest)}.'
    )
