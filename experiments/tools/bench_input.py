"""Measures how fast photographs come from a folder, and what reading them costs a training step.

The photographs (500x375 JPEGs, as ImageNet's) are parts of scikit-learn's two sample images. `test` is the
rule of evaluation, shorter side to 256 and the central 224x224; `train` is what a host does for training:
ours stores 256x256 and leaves the random resized crop to the device, torchvision crops and flips on the host.
With the Python of an environment that has torch and torchvision, its `ImageFolder` and `DataLoader` read the
same files in a process of their own: to normalized floats as usual, and (`bytes`) to the plain bytes that
ours hands out.
"""

import json
import os
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

BATCH = 32
TORCH = """
import json, sys, time
import torch, torchvision
from torchvision import transforms as T
torch.set_num_threads(1)  # as in its workers: idle threads would spin
root, batch, workers, warm, batches = sys.argv[1], *map(int, sys.argv[2:])
heads = {'test': [T.Resize(256), T.CenterCrop(224)],
         'train': [T.RandomResizedCrop(224), T.RandomHorizontalFlip()]}
tails = {'': [T.ToTensor(), T.Normalize((.485, .456, .406), (.229, .224, .225))],
         '_bytes': [T.PILToTensor()]}
for name, head in heads.items():
  for kind, tail in tails.items():
    source = torchvision.datasets.ImageFolder(root, T.Compose(head + tail))
    source.samples *= -(-(warm + batches + 2 * workers) * batch // len(source.samples))
    loader = iter(torch.utils.data.DataLoader(source, batch, shuffle=True, num_workers=workers))
    for _ in range(warm):
      next(loader)
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(batches):
      next(loader)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    del loader
    print(json.dumps({f'torch_{name}{kind}': [batches * batch / seconds, 1e3 * cpu / batches / batch]}))
"""


def photographs(root: str | os.PathLike, count: int = 256, classes: int = 4) -> None:
  """Writes `count` JPEGs of 500x375 pixels (every fourth upright) below `root`, a folder a class."""
  import numpy as np
  from PIL import Image
  from sklearn.datasets import load_sample_images

  originals = [Image.fromarray(image) for image in load_sample_images().images]
  rng = np.random.default_rng(0)
  for i in range(count):
    original = originals[i % len(originals)]
    width = int(rng.integers(400, original.width))
    height = min(width * 3 // 4, original.height)
    left, top = rng.integers(0, (original.width - width + 1, original.height - height + 1))
    size = (375, 500) if i // classes % 4 == 3 else (500, 375)
    folder = pathlib.Path(root, f'class{i % classes}')
    folder.mkdir(parents=True, exist_ok=True)
    box = (left, top, left + width, top + height)
    original.resize(size, Image.Resampling.BICUBIC, box=box).save(
      folder / f'{i:05d}.jpg', quality=95
    )


def rate(batches: Iterator[Any], warm: int, count: int) -> tuple[float, float]:
  """Returns images a second and this process's CPU milliseconds an image, of `count` batches.

  The `warm` batches before them empty what was read ahead.
  """
  for _ in range(warm):
    next(batches)
  start, cpu = time.perf_counter(), time.process_time()
  for _ in range(count):
    next(batches)
  seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
  return count * BATCH / seconds, 1e3 * cpu / (count * BATCH)


def torch_rates(
  python: str, root: str | os.PathLike, workers: int, warm: int, count: int
) -> dict[str, tuple[float, float]]:
  """Returns what `rate` says of torchvision, `torch_{test,train}[_bytes]`, in the Python at `python`."""
  numbers = map(str, (BATCH, workers, warm, count))
  done = subprocess.run(
    [python, '-c', TORCH, os.fspath(root), *numbers], capture_output=True, text=True
  )
  if done.returncode:
    raise RuntimeError(f'torch_python={python!r} did not measure: {done.stderr[-2000:]}')
  return {k: tuple(v) for line in done.stdout.splitlines() for k, v in json.loads(line).items()}


def measure(
  num_workers: int,
  *,
  torch_python: str | None = None,
  root: str | os.PathLike | None = None,
  batches: int = 8,
  repeats: int = 2,
) -> dict[str, float]:
  """Returns images a second with `num_workers` processes, the most of `repeats` taken in turns.

  Args:
    num_workers: worker processes; 0: all in the main process.
    torch_python: Python with torchvision, measured too; None: ours alone.
    root: a folder of photographs, one folder a class; None: `photographs` in a temporary folder.
    batches: how many of 32 a measurement takes.
    repeats: measurements of each side.

  Returns:
    `test`, `train`; with workers also `test_threads`, `train_threads`, the same number of threads instead of
    processes; with `torch_python` also `torch_test`, `torch_train`, each also as `..._bytes`, and
    `test_over_torch`, `train_over_torch`, each also as `..._bytes` (above 1: ours is faster). Without workers
    also `..._cpu_milliseconds` of each, the CPU time an image, which a busy machine disturbs less.
  """
  from jaxlab import data

  if root is None:
    with tempfile.TemporaryDirectory() as folder:
      photographs(folder)
      return measure(
        num_workers, torch_python=torch_python, root=folder, batches=batches, repeats=repeats
      )
  source = data.ImageFolder(root, decode=False)
  transforms = {'test': data.DecodeImage(224, 256), 'train': data.DecodeImage(256, draft=True)}
  readers: dict[str, dict[str, int]] = {'': {'num_workers': num_workers}}
  if num_workers:
    readers['_threads'] = {'num_threads': num_workers}
  warm = 4 * num_workers or 1
  best: dict[str, float] = {}
  for _ in range(repeats):
    figures = {}
    for name, transform in transforms.items():
      for kind, reader in readers.items():
        loader = data.make_loader(source, batch_size=BATCH, transform=transform, **reader)
        try:
          figures[name + kind] = rate(loader, warm, batches)
        finally:
          loader.close()
    if torch_python:
      figures |= torch_rates(torch_python, root, num_workers, warm, batches)
    for name, (speed, cpu) in figures.items():
      best[name] = max(speed, best.get(name, 0))
      if not num_workers:  # else it is the workers' time that counts
        name += '_cpu_milliseconds'
        best[name] = min(cpu, best.get(name, cpu))
  if torch_python:
    for name in transforms:
      for kind in ('', '_bytes'):
        best[f'{name}_over_torch{kind}'] = best[name] / best[f'torch_{name}{kind}']
  return best


def measure_step(
  step: Callable[[Any, dict[str, Any]], tuple[Any, Any]],
  state: Any,
  *,
  batch_size: int,
  num_threads: int = 1,
  num_workers: int = 0,
  steps: int = 4,
  repeats: int = 3,
  root: str | os.PathLike | None = None,
) -> dict[str, float]:
  """Returns what reading photographs costs a training step of 224x224 images.

  Args:
    step: `(state, batch) -> (state, metrics)`, compiled or not, may donate the state; the batch holds `image`
      (uint8 `[batch_size, 224, 224, 3]`), `label` and `index` (int32 `[batch_size]`).
    state: the first.
    batch_size: of `step`.
    num_threads: of the loader.
    num_workers: of the loader.
    steps: of a measurement.
    repeats: measurements of each side, in turns; the shortest counts.
    root: as in `measure`.

  Returns:
    `bare_seconds` a step on one batch that lies on the device, `loop_seconds` with the batches of the loader,
    `loop_over_bare`.
  """
  import jax

  from experiments.harness import costs
  from jaxlab import data

  if root is None:
    with tempfile.TemporaryDirectory() as folder:
      photographs(folder)
      return measure_step(
        step, state, batch_size=batch_size, num_threads=num_threads, num_workers=num_workers,
        steps=steps, repeats=repeats, root=folder,
      )  # fmt: skip
  loader = data.make_loader(
    data.ImageFolder(root, decode=False), batch_size=batch_size, num_threads=num_threads,
    num_workers=num_workers, transform=data.DecodeImage(224, 256),
  )  # fmt: skip
  try:
    feed = data.prefetch_to_device(loader)
    resident, _ = next(feed)

    def run(batches: Callable[[], Any]) -> None:
      nonlocal state
      for _ in range(steps):
        state, metrics = step(state, batches())
      jax.block_until_ready((state, metrics))

    run(lambda: resident)
    sides = {'bare': lambda: run(lambda: resident), 'loop': lambda: run(lambda: next(feed)[0])}
    times = costs.alternate(sides, repeats)
  finally:
    loader.close()
  figures = {f'{name}_seconds': seconds / steps for name, seconds in times.items()}
  return {**figures, 'loop_over_bare': times['loop'] / times['bare']}
