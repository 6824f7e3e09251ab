"""Data sets of fine-grained image analysis as data: sizes, classes, annotations, splits, where to load them.

The tables of Wei et al., Fine-Grained Image Analysis with Deep Learning: A Survey, TPAMI 2022
(https://arxiv.org/abs/2111.06119), with the splits that results are usually given for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

TASKS = ('recognition', 'retrieval', 'sketch_retrieval', 'attributes', 'web_recognition')
ANNOTATIONS = ('boxes', 'parts', 'attributes', 'hierarchy', 'text', 'noisy_labels')


class Split(NamedTuple):
  """A standard split.

  Attributes:
    images: number of images, of sketch retrieval of pairs.
    classes: number of classes in it; None: all of the data set.
  """

  images: int
  classes: int | None = None


@dataclasses.dataclass(frozen=True)
class FineGrainedDataset:
  """What is known of a data set.

  Attributes:
    name: as papers write it.
    year: of its publication.
    meta_class: what all of its classes are.
    num_images: in all; None: not known.
    num_classes: in all; None: not by classes.
    annotations: some of `ANNOTATIONS`, besides the class of each image.
    splits: by name; of retrieval 'retrieval_train' and 'retrieval_test' of disjoint classes, or 'query' and
      'gallery'.
    tasks: some of `TASKS`.
    tfds: its name in the TFDS catalogue (`jaxlab.data.load`); None: it is not there.
  """

  name: str
  year: int
  meta_class: str
  num_images: int | None
  num_classes: int | None
  annotations: tuple[str, ...] = ()
  splits: Mapping[str, Split] = dataclasses.field(default_factory=dict)
  tasks: tuple[str, ...] = ('recognition',)
  tfds: str | None = None


def _splits(**splits: int | tuple[int, int]) -> dict[str, Split]:
  return {n: Split(*v) if isinstance(v, tuple) else Split(v) for n, v in splits.items()}


_BIRD_LABELS = ('boxes', 'parts', 'attributes', 'text')
_BOTH = ('recognition', 'retrieval')

FINE_GRAINED_DATASETS: dict[str, FineGrainedDataset] = {
  'flowers102': FineGrainedDataset(
    'Oxford Flowers-102', 2008, 'flowers', 8_189, 102,
    splits=_splits(train=1_020, validation=1_020, test=6_149), tfds='oxford_flowers102',
  ),
  'cub200': FineGrainedDataset(
    'CUB-200-2011', 2011, 'birds', 11_788, 200, _BIRD_LABELS,
    _splits(train=5_994, test=5_794, retrieval_train=(5_864, 100), retrieval_test=(5_924, 100)),
    _BOTH, 'caltech_birds2011',
  ),
  'stanford_dogs': FineGrainedDataset(
    'Stanford Dogs', 2011, 'dogs', 20_580, 120, ('boxes',), _splits(train=12_000, test=8_580),
    tfds='stanford_dogs',
  ),
  'stanford_cars': FineGrainedDataset(
    'Stanford Cars', 2013, 'cars', 16_185, 196, ('boxes',),
    _splits(train=8_144, test=8_041, retrieval_train=(8_054, 98), retrieval_test=(8_131, 98)),
    _BOTH, 'cars196',
  ),
  'fgvc_aircraft': FineGrainedDataset(
    'FGVC Aircraft', 2013, 'aircraft', 10_000, 100, ('boxes', 'hierarchy'),
    _splits(train=6_667, test=3_333),
  ),
  'birdsnap': FineGrainedDataset(
    'Birdsnap', 2014, 'birds', 49_829, 500, ('boxes', 'parts', 'attributes'),
    _splits(train=47_386, test=2_443),
  ),
  'food101': FineGrainedDataset(
    'Food-101', 2014, 'food', 101_000, 101, splits=_splits(train=75_750, test=25_250), tfds='food101',
  ),
  'nabirds': FineGrainedDataset(
    'NABirds', 2015, 'birds', 48_562, 555, ('boxes', 'parts', 'hierarchy'),
    _splits(train=23_929, test=24_633),
  ),
  'food975': FineGrainedDataset('Food-975', 2016, 'food', 37_885, 975),
  'deepfashion': FineGrainedDataset(
    'DeepFashion', 2016, 'clothes', 800_000, 1_050, ('boxes', 'parts', 'attributes'),
    tasks=('retrieval', 'attributes'),
  ),
  'deepfashion_inshop': FineGrainedDataset(
    'DeepFashion, in-shop', 2016, 'clothes', 52_712, 7_982, ('boxes', 'parts', 'attributes'),
    _splits(retrieval_train=(25_882, 3_997), query=(14_218, 3_985), gallery=(12_612, 3_985)),
    ('retrieval',),
  ),
  'online_products': FineGrainedDataset(
    'Stanford Online Products', 2016, 'products', 120_053, 22_634,
    splits=_splits(retrieval_train=(59_551, 11_318), retrieval_test=(60_502, 11_316)),
    tasks=('retrieval',), tfds='stanford_online_products',
  ),
  'qmul_shoe': FineGrainedDataset(
    'QMUL Shoe', 2016, 'shoes', 419, None, splits=_splits(train=304, test=115),
    tasks=('sketch_retrieval',),
  ),
  'qmul_chair': FineGrainedDataset(
    'QMUL Chair', 2016, 'chairs', 297, None, splits=_splits(train=200, test=97),
    tasks=('sketch_retrieval',),
  ),
  'fru92': FineGrainedDataset('Fru92', 2017, 'fruits', 69_614, 92, ('hierarchy',)),
  'veg200': FineGrainedDataset('Veg200', 2017, 'vegetables', 91_117, 200, ('hierarchy',)),
  'inaturalist2017': FineGrainedDataset(
    'iNaturalist 2017', 2017, 'plants and animals', 857_877, 5_089, ('boxes', 'hierarchy'),
    _splits(train=579_184, validation=95_986), tfds='i_naturalist2017',
  ),
  'dogs_in_the_wild': FineGrainedDataset('Dogs-in-the-Wild', 2018, 'dogs', 299_458, 362),
  'rpc': FineGrainedDataset('RPC', 2019, 'retail products', 83_739, 200, ('boxes', 'hierarchy')),
  'products10k': FineGrainedDataset('Products-10K', 2020, 'retail products', 150_000, 10_000, ('boxes',)),
  'inaturalist2021': FineGrainedDataset(
    'iNaturalist 2021', 2021, 'plants and animals', 3_286_843, 10_000, ('hierarchy',),
    _splits(train=2_686_843, validation=100_000), tfds='i_naturalist2021',
  ),
  'webfg496': FineGrainedDataset(
    'WebFG-496', 2021, 'birds, aircraft and cars', 53_339, 496, ('noisy_labels',),
    _splits(train=53_339), ('web_recognition',),
  ),
}  # fmt: skip


def list_fine_grained(
  task: str | None = None, annotation: str | None = None, *, catalogued: bool = False
) -> list[str]:
  """Returns the keys of `FINE_GRAINED_DATASETS` that serve a task and have an annotation, oldest first.

  Args:
    task: one of 'recognition', 'retrieval', 'sketch_retrieval', 'attributes', 'web_recognition'; None: any.
    annotation: one of 'boxes', 'parts', 'attributes', 'hierarchy', 'text', 'noisy_labels'; None: any.
    catalogued: whether to leave out what the TFDS catalogue does not have.

  Raises:
    ValueError: for a task or an annotation that does not exist.

  >>> list_fine_grained('retrieval', catalogued=True)
  ['cub200', 'stanford_cars', 'online_products']
  >>> list_fine_grained(annotation='text')
  ['cub200']
  """
  for name, value, known in (('task', task, TASKS), ('annotation', annotation, ANNOTATIONS)):
    if value is not None and value not in known:
      raise ValueError(f'{name}={value!r}: expected one of {", ".join(known)}.')
  chosen = [
    key
    for key, own in FINE_GRAINED_DATASETS.items()
    if (task is None or task in own.tasks)
    and (annotation is None or annotation in own.annotations)
    and (own.tfds or not catalogued)
  ]
  return sorted(chosen, key=lambda key: FINE_GRAINED_DATASETS[key].year)
