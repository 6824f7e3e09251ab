"""Retrieval on CUB-200-2011 with ResNet-50: trained on the first 100 classes, the last 100 search each other.

5864 and 5924 photographs. Normalized softmax over what is pooled, at 224 pixels; 40 epochs of SGD with a
learning rate of 1e-3 [inferred: the survey compares published numbers and trains nothing]. Prepare the data
once:
`tfds build caltech_birds2011 --file_format=array_record`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.model = dict(name='resnet50', strides=(1, 2, 2, 1))
  config.pretrained = 'resnet50.tv_in1k'
  config.heads = dict(
    isqrt=dict(title='iSQRT-COV', pooling='isqrt_cov', reduction=256, iterations=5)
  )

  config.retrieval = dict(
    data=dict(
      name='caltech_birds2011',
      num_classes=100,
      train_size=5864,
      train_split='train+test',
      test_split='train+test',
      train_options=dict(decode=False, classes=tuple(range(100))),
      test_options=dict(decode=False, classes=tuple(range(100, 200))),
    ),
    augment=dict(kind='resized_crop', scale=(0.2, 1.0), flip_probability=0.5),
    recipe=dict(
      epochs=40,
      batch_size=64,
      optimizer=dict(name='sgd', momentum=0.9, weight_decay=1e-4),
      schedule=dict(name='cosine', base=1e-3),
    ),
    ks=(1, 2, 4, 8),
  )
  config.log_every = 50
  config.checkpoint_every = 910
  config.eval_batch_size = 64
  return config
