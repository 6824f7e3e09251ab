"""Feature mimicking on VOC2007, several classes an image: ResNet-101 to ResNet-50 at 448 pixels (code).

  python -m experiments.feature_mimicking --config=voc2007_resnet50 --workdir=gs://...

Two stages of 60 epochs: the layer before the classifier alone, then everything. Both networks start from
ImageNet; how the teacher is trained is not told: as the student is [inferred]. Difficult objects count in
training and are left out of the test. With 2048 features both networks have one width, and the layer is
there by `two_layers` [inferred]. MobileNetV2: `--config.student.model.name=mobilenetv2_100
--config.student.pretrained=mobilenetv2_100.ra_in1k`. ResNet-34 to ResNet-18, with 2048 bits for the teacher's
512 features: `--config.teacher.model.name=resnet34 --config.teacher.pretrained=resnet34.tv_in1k
--config.student.model.name=resnet18 --config.student.pretrained=resnet18.tv_in1k --config.hashing.bits=2048`.
Prepare the data once: `tfds build voc/2007 --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.feature_mimicking import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.teacher = learner('resnet101')
  config.student = learner('resnet50')
  config.align = recipe()
  config.hashing = dict(bits=8192, bias='median')
  config.methods = methods(beta=0.5)
  config.runs = ('ce', 'l2', 'lshl2')
  config.protocol = 'voc07'
  config.eval_batch_size = 64
  config.log_every = 50
  config.checkpoint_every = 313
  config.reported = (
    'VOC2007: ResNet-101 93.27 mAP, ResNet-50 93.17 and MobileNetV2 90.14 with LSH-L2.'
  )
  return config


def learner(name: str) -> dict:
  """Returns a network that starts from ImageNet, and its images, which are stretched to one size."""
  options = dict(decode=False, labels='labels')
  return dict(
    data=dict(
      name='voc/2007',
      train_options=options,
      stored_image=(448, 448, 3),
      image_size=448,
      train_decode=dict(size=448, stretch=True, draft=True),
      test_decode=dict(size=448, stretch=True),
    ),
    # The whole image, in jittered colors.
    augment=dict(kind='resized_crop', scale=(1.0, 1.0), jitter=(0.3, 0.3, 0.3, 0.0)),
    model=dict(name=name),
    pretrained=f'{name}.tv_in1k',
    recipe=recipe(),
  )


def methods(beta: float) -> dict:
  """Returns the rows: where features are mimicked, with the layer before the classifier at any width."""
  rows = embedded.methods(beta=beta, where_right=False)
  rows['kd'] |= dict(alpha=0.001)
  for name in ('l2', 'lsh', 'lshl2'):
    rows[name] |= dict(two_layers=True)
  return rows


def recipe() -> dict:
  """Returns the recipe of both stages."""
  return dict(
    epochs=60,
    batch_size=16,
    optimizer=dict(name='sgd', momentum=0.9, weight_decay=1e-5),
    schedule=dict(name='cosine', base=0.01),
  )
