"""TCS on ImageNet: ResNet-18 in the coordinates of DINOv2's ViT-S at 224 pixels.

  python -m experiments.tcs --config=imagenet_resnet18 --workdir=gs://...

100 epochs of SGD, as in the benchmark OFA-KD (from memory). The paper's numbers of axes and bits and the
weight of the bits are not known: all 384 axes, half of them left, 2048 bits, beta 3 [inferred]. Larger
teachers: `--config.teacher.model.name=vit_base_patch14_dinov2
--config.teacher.pretrained=vit_base_patch14_dinov2.lvd142m`. Prepare the data once: `tfds build imagenet2012
--file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.tcs import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  data = dict(name='imagenet2012')
  config = ConfigDict()
  config.teacher = teacher('small', data)
  config.student = dict(
    data=data,
    augment=dict(kind='resized_crop'),
    model=dict(name='resnet18'),
    recipe=dict(
      epochs=100,
      batch_size=256,
      optimizer=dict(name='sgd', momentum=0.9, weight_decay=1e-4),
      schedule=dict(name='multistep', base=0.1, milestones=(30, 60, 90), staircase=True),
    ),
  )
  config.rows = embedded.rows(beta=3.0)
  del config.rows['kd']
  config.runs = ('ce', 'tcs', 'elsh')
  config.probed = (16, 64, 256)
  config.eval_batch_size = 1024
  config.log_every = 200
  config.checkpoint_every = 5004
  return config


def teacher(size: str, data: dict) -> dict:
  """Returns DINOv2 at 224 pixels, as it is."""
  name = f'vit_{size}_patch14_dinov2'
  return dict(data=data, model=dict(name=name, image_size=224), pretrained=f'{name}.lvd142m')
