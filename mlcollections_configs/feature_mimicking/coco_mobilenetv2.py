"""Feature mimicking on MS-COCO 2014, several classes an image: ResNet-101 to MobileNetV2 (code).

  python -m experiments.feature_mimicking --config=coco_mobilenetv2 --workdir=gs://...

As `voc2007_resnet50`, in batches of 32 with beta 3 and 2048 bits; KD has the weight that it has there
[inferred]. ResNet-50: `--config.student.model.name=resnet50 --config.student.pretrained=resnet50.tv_in1k`.
Prepare the data once: `tfds build coco/2014 --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.feature_mimicking import voc2007_resnet50


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = voc2007_resnet50.get_config()
  for learner in (config.teacher, config.student):
    learner.data.name = 'coco/2014'
    learner.data.train_options.labels = 'objects/label'
  config.student.model.name = 'mobilenetv2_100'
  config.student.pretrained = 'mobilenetv2_100.ra_in1k'
  for own in (config.teacher.recipe, config.student.recipe, config.align):
    own.update(batch_size=32)
    own.optimizer.weight_decay = 1e-4
  config.hashing.bits = 2048
  config.methods = voc2007_resnet50.methods(beta=3.0)
  config.protocol = 'coco'
  config.log_every = 200
  config.checkpoint_every = 2586
  config.reported = (
    'MS-COCO: ResNet-101 77.67 mAP, ResNet-50 77.16 and MobileNetV2 73.73 with LSH-L2.'
  )
  return config
