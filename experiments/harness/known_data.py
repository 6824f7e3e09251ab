"""Constants of public data sets by name, so that a setting need not repeat them."""

from typing import Any

_IMAGENET = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
# Fields of a section of images, those of `jaxlab.data.load` included.
KNOWN: dict[str, dict[str, Any]] = {
  'digits': {'num_classes': 10, 'train_size': 1297, 'stored_image': (8, 8, 1), 'mean': 0.305, 'std': 0.376},
  'pasted_digits': {
    'num_classes': 10, 'train_size': 1297, 'stored_image': (16, 16, 1), 'mean': 0.205, 'std': 0.302,
  },
  'fashion_mnist': {
    'num_classes': 10, 'train_size': 60000, 'stored_image': (28, 28, 1), 'mean': 0.286, 'std': 0.353,
  },
  'cifar10': {
    'num_classes': 10, 'train_size': 50000, 'stored_image': (32, 32, 3), 'num_threads': 8,
    'mean': (0.4914, 0.4822, 0.4465), 'std': (0.2023, 0.1994, 0.2010),
  },
  'svhn_cropped': {
    'num_classes': 10, 'train_size': 73257, 'stored_image': (32, 32, 3), 'num_threads': 8,
    'mean': (0.4377, 0.4438, 0.4728), 'std': (0.1980, 0.2010, 0.1970),
  },
  'imagenet2012': {
    'num_classes': 1000, 'train_size': 1281167, 'stored_image': (256, 256, 3), 'image_size': 224,
    'test_split': 'validation', 'train_options': {'decode': False}, 'test_options': {'decode': False},
    'train_decode': {'size': 256, 'draft': True}, 'test_decode': {'size': 224, 'resize': 256},
    'num_threads': 16, 'num_workers': 16, **_IMAGENET,
  },
  'photographs': {
    'num_classes': 1000, 'train_size': 2048, 'stored_image': (224, 224, 3), 'labeled': False,
    'train_options': {'count': 2048}, 'test_options': {'count': 512}, **_IMAGENET,
  },
}  # fmt: skip
KNOWN |= {
  name: {
    'num_classes': 10, 'multi_label': True, 'train_size': 1500, 'stored_image': (36, 36, 1), 'mean': mean,
    'std': std, 'train_options': {'length': 1500}, 'test_options': {'length': 600},
  }
  for name, mean, std in (('digit_canvases', 0.133, 0.263), ('fashion_canvases', 0.125, 0.257))
}  # fmt: skip
KNOWN |= {
  name: {
    'num_classes': 10,
    'train_size': 1000,
    'stored_image': (side, side, 1),
    'mean': mean,
    'std': std,
  }
  for name, side, mean, std in (
    ('digit_tasks', 16, 0.205, 0.302),
    ('fashion_tasks', 28, 0.205, 0.302),
  )
}
KNOWN['coco/2017'] = {
  **KNOWN['imagenet2012'], 'num_classes': 80, 'multi_label': True, 'train_size': 118287,
  'train_options': {'decode': False, 'labels': 'objects/label'},
  'test_options': {'decode': False, 'labels': 'objects/label'},
}  # fmt: skip
KNOWN['coco/2014'] = {**KNOWN['coco/2017'], 'train_size': 82783}
KNOWN['voc/2007'] = {
  **KNOWN['imagenet2012'], 'num_classes': 20, 'multi_label': True, 'train_size': 5011,
  'train_split': 'train+validation', 'test_split': 'test',
  'train_options': {'decode': False, 'labels': 'labels_no_difficult'},
  'test_options': {'decode': False, 'labels': 'labels_no_difficult', 'unsure': 'labels'},
}  # fmt: skip
KNOWN['wider_attribute'] = {
  'num_classes': 14, 'multi_label': True, 'train_size': 28345, 'stored_image': (224, 224, 3),
  'train_split': 'data/WIDER_Attribute/wider_attribute_trainval.json',
  'test_split': 'data/WIDER_Attribute/wider_attribute_test.json',
  'train_options': {'root': 'data/WIDER_Attribute/Image'},
  'test_options': {'root': 'data/WIDER_Attribute/Image'},
  'train_decode': {'size': 224, 'stretch': True}, 'test_decode': {'size': 224, 'stretch': True},
  'num_threads': 16, 'num_workers': 16, 'mean': 0.5, 'std': 0.5,
}  # fmt: skip
KNOWN['cifar100'] = {**KNOWN['cifar10'], 'num_classes': 100}
KNOWN['imagenet2012_subset/1pct'] = {**KNOWN['imagenet2012'], 'train_size': 12811}
KNOWN |= {
  name: {
    **KNOWN['imagenet2012'], 'num_classes': classes, 'train_size': size, 'test_split': split,
  }
  for name, classes, size, split in (
    ('caltech_birds2011', 200, 5994, 'test'),
    ('cars196', 196, 8144, 'test'),
    ('food101', 101, 75750, 'validation'),
    ('oxford_flowers102', 102, 1020, 'test'),
    ('oxford_iiit_pet', 37, 3680, 'test'),
  )
}  # fmt: skip
