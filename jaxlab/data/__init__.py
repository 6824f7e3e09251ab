"""Data: random-access sources, composed scenes, seeded and resumable batches, on-device augmentation.

A source is `len(source)` and `source[i] -> {'image', 'label', 'index', ...}`; `make_loader` turns it into
batches and `prefetch_to_device` brings them to the devices. Augmentations are pure functions
`(key, image) -> image` of single float images, for `jax.vmap` inside of the jitted step.
"""

from jaxlab.data.pipeline import (
  Loader,
  check_batch,
  epoch_batches,
  make_loader,
  prefetch_to_device,
  process_shard,
  to_device,
)
from jaxlab.data.protocols.few_shot import (
  Episode,
  few_shot_draws,
  few_shot_split,
  sample_episode,
  sample_episodes,
)
from jaxlab.data.protocols.label_noise import (
  CIFAR10_CONFUSIONS,
  CIFAR100_SUPERCLASSES,
  asymmetric_noise,
  next_class,
  noise_rate,
  symmetric_noise,
)
from jaxlab.data.protocols.long_tail import (
  balanced_subsets,
  class_counts,
  exponential_counts,
  index_groups,
  select_imbalanced,
  shot_groups,
  split_long_tailed,
  step_counts,
  undersample_indices,
)
from jaxlab.data.protocols.open_noise import (
  CIFAR100_LIKE_CIFAR10,
  make_ncifar,
)
from jaxlab.data.protocols.prompt_annotation import (
  WordAnnotation,
  annotate_words,
  filter_annotations,
  mix_instructed,
)
from jaxlab.data.protocols.prompt_examples import (
  annotate_text,
  piece_labels,
  prompt_examples,
  split_words,
)
from jaxlab.data.protocols.samplers import (
  ClassAwareSampler,
  ClassBalancedSampler,
  MixedSampler,
  SquareRootSampler,
  TwoStreamSampler,
)
from jaxlab.data.protocols.subsets import (
  sample_subset,
  sample_tiny_set,
)
from jaxlab.data.protocols.vtab import (
  VTAB_TASKS,
  VtabTask,
  clevr_count_label,
  distance_bin,
  group_means,
  grouped_label,
  split_800_200,
  vtab_group_means,
)
from jaxlab.data.sources.aligned import (
  Aligned,
)
from jaxlab.data.sources.catalogue import (
  Catalogue,
)
from jaxlab.data.sources.completions import (
  Completions,
  Sums,
  decode_arithmetic,
  encode_arithmetic,
  plain_sum,
  read_completions,
  written_sum,
)
from jaxlab.data.sources.crops import (
  Crops,
)
from jaxlab.data.sources.derived_tasks import (
  DERIVED_TASKS,
  derived_task,
)
from jaxlab.data.sources.embedded import (
  Digits,
  FashionMNIST,
)
from jaxlab.data.sources.expanded import (
  Expanded,
)
from jaxlab.data.sources.fact_documents import (
  fact_documents,
  oracle_compress,
)
from jaxlab.data.sources.feature_file import (
  FeatureFile,
  FeatureHeader,
  in_batches,
  write_feature_file,
)
from jaxlab.data.sources.fields import (
  Relabeled,
  WithFields,
)
from jaxlab.data.sources.fine_grained import (
  FINE_GRAINED_DATASETS,
  FineGrainedDataset,
  list_fine_grained,
)
from jaxlab.data.sources.image_folder import (
  ImageFolder,
  class_folders,
)
from jaxlab.data.sources.listed_images import (
  ListedImages,
  read_split_file,
)
from jaxlab.data.sources.load import (
  load,
)
from jaxlab.data.sources.photographs import (
  Photographs,
)
from jaxlab.data.sources.point_clouds import (
  PointClouds,
  digit_points,
  unit_sphere,
)
from jaxlab.data.sources.prompt_records import (
  PromptRecord,
  read_prompts,
  write_prompts,
)
from jaxlab.data.sources.scenes import (
  Scenes,
  canvases,
  pasted,
)
from jaxlab.data.sources.sentences import (
  Sentences,
)
from jaxlab.data.sources.source import (
  InMemory,
  Source,
  as_labels,
  check_images,
  check_labels,
  check_multi_labels,
  in_memory,
  materialize,
  source_labels,
)
from jaxlab.data.sources.subset import (
  class_subset,
  subset,
)
from jaxlab.data.sources.table import (
  EMBEDDED_TABLES,
  load_table,
  read_table,
)
from jaxlab.data.sources.text import (
  ByteText,
  check_tokens,
)
from jaxlab.data.sources.token_file import (
  TokenFile,
)
from jaxlab.data.sources.valued_images import (
  ValuedImages,
  read_values,
  rotated_digits,
  value_grid,
)
from jaxlab.data.sources.vtab_images import (
  VtabImages,
)
from jaxlab.data.sources.wider_attribute import (
  WiderAttribute,
)
from jaxlab.data.transfer import (
  listening,
  parse_address,
  receive_features,
  send_features,
)
from jaxlab.data.transforms.augment import (
  compose,
  deterministic,
  example_keys,
  gaussian_blur,
  grayscale,
  random_apply,
  random_flip,
  random_gaussian_blur,
  random_grayscale,
  random_noise,
  random_rotation,
  random_solarize,
  solarize,
)
from jaxlab.data.transforms.backgrounds import (
  change_backgrounds,
  merge_background,
  split_cells,
)
from jaxlab.data.transforms.color import (
  draw_color_jitter,
  jitter_colors,
  random_color_jitter,
  random_contrast_brightness,
)
from jaxlab.data.transforms.crop import (
  center_crop,
  crop_and_resize,
  draw_erasing,
  draw_resized_crop,
  erase,
  random_crop,
  random_cutout,
  random_erasing,
  random_resized_crop,
)
from jaxlab.data.transforms.cutmix import (
  cutmix,
  cutmix_box,
  paste_box,
)
from jaxlab.data.transforms.decode import (
  DecodeImage,
  decode_image,
)
from jaxlab.data.transforms.expansion import (
  cut_out_share,
  rotate_degrees,
  shuffle_tiles,
)
from jaxlab.data.transforms.image import (
  CIFAR10_MEAN_STD,
  IMAGENET_MEAN_STD,
  normalize,
  to_float,
)
from jaxlab.data.transforms.mix_schedule import (
  mix_with_probability,
  mwh_mix_probability,
)
from jaxlab.data.transforms.mixup import (
  mix_images,
  mixup,
  mixup_loss,
)
from jaxlab.data.transforms.points import (
  random_point_dropout,
  random_scale_shift,
)
from jaxlab.data.transforms.randaugment import (
  rand_augment,
)
from jaxlab.data.transforms.rescale import (
  random_rescale,
)
from jaxlab.data.transforms.views import (
  draw_views,
  resized_crop_augment,
)

__all__ = [
  'CIFAR10_CONFUSIONS',
  'CIFAR10_MEAN_STD',
  'CIFAR100_LIKE_CIFAR10',
  'CIFAR100_SUPERCLASSES',
  'DERIVED_TASKS',
  'EMBEDDED_TABLES',
  'FINE_GRAINED_DATASETS',
  'IMAGENET_MEAN_STD',
  'VTAB_TASKS',
  'Aligned',
  'ByteText',
  'Catalogue',
  'ClassAwareSampler',
  'ClassBalancedSampler',
  'Completions',
  'Crops',
  'DecodeImage',
  'Digits',
  'Episode',
  'Expanded',
  'FashionMNIST',
  'FeatureFile',
  'FeatureHeader',
  'FineGrainedDataset',
  'ImageFolder',
  'InMemory',
  'ListedImages',
  'Loader',
  'MixedSampler',
  'Photographs',
  'PointClouds',
  'PromptRecord',
  'Relabeled',
  'Scenes',
  'Sentences',
  'Source',
  'SquareRootSampler',
  'Sums',
  'TokenFile',
  'TwoStreamSampler',
  'ValuedImages',
  'VtabImages',
  'VtabTask',
  'WiderAttribute',
  'WithFields',
  'WordAnnotation',
  'annotate_text',
  'annotate_words',
  'as_labels',
  'asymmetric_noise',
  'balanced_subsets',
  'canvases',
  'center_crop',
  'change_backgrounds',
  'check_batch',
  'check_images',
  'check_labels',
  'check_multi_labels',
  'check_tokens',
  'class_counts',
  'class_folders',
  'class_subset',
  'clevr_count_label',
  'compose',
  'crop_and_resize',
  'cut_out_share',
  'cutmix',
  'cutmix_box',
  'decode_arithmetic',
  'decode_image',
  'derived_task',
  'deterministic',
  'digit_points',
  'distance_bin',
  'draw_color_jitter',
  'draw_erasing',
  'draw_resized_crop',
  'draw_views',
  'encode_arithmetic',
  'epoch_batches',
  'erase',
  'example_keys',
  'exponential_counts',
  'fact_documents',
  'few_shot_draws',
  'few_shot_split',
  'filter_annotations',
  'gaussian_blur',
  'grayscale',
  'group_means',
  'grouped_label',
  'in_batches',
  'in_memory',
  'index_groups',
  'jitter_colors',
  'list_fine_grained',
  'listening',
  'load',
  'load_table',
  'make_loader',
  'make_ncifar',
  'materialize',
  'merge_background',
  'mix_images',
  'mix_instructed',
  'mix_with_probability',
  'mixup',
  'mixup_loss',
  'mwh_mix_probability',
  'next_class',
  'noise_rate',
  'normalize',
  'oracle_compress',
  'parse_address',
  'paste_box',
  'pasted',
  'piece_labels',
  'plain_sum',
  'prefetch_to_device',
  'process_shard',
  'prompt_examples',
  'rand_augment',
  'random_apply',
  'random_color_jitter',
  'random_contrast_brightness',
  'random_crop',
  'random_cutout',
  'random_erasing',
  'random_flip',
  'random_gaussian_blur',
  'random_grayscale',
  'random_noise',
  'random_point_dropout',
  'random_rescale',
  'random_resized_crop',
  'random_rotation',
  'random_scale_shift',
  'random_solarize',
  'read_completions',
  'read_prompts',
  'read_split_file',
  'read_table',
  'read_values',
  'receive_features',
  'resized_crop_augment',
  'rotate_degrees',
  'rotated_digits',
  'sample_episode',
  'sample_episodes',
  'sample_subset',
  'sample_tiny_set',
  'select_imbalanced',
  'send_features',
  'shot_groups',
  'shuffle_tiles',
  'solarize',
  'source_labels',
  'split_800_200',
  'split_cells',
  'split_long_tailed',
  'split_words',
  'step_counts',
  'subset',
  'symmetric_noise',
  'to_device',
  'to_float',
  'undersample_indices',
  'unit_sphere',
  'value_grid',
  'vtab_group_means',
  'write_feature_file',
  'write_prompts',
  'written_sum',
]
