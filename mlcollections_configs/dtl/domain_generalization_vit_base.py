"""DTL on ViT-B/16, trained on 16 images a class of ImageNet, tested on it and on four sets of other origin.

  python -m experiments.dtl --config=domain_generalization_vit_base --seeds=0,1,2 --workdir=DIR

ImageNet-V2, Sketch, A and R; all 1000 classes may be answered. DTL's learning rate is that of the test set,
as in the official scripts: four rates, four trainings. LoRA and the linear probe have one rate, and so one
training that is judged on all five.
"""

from ml_collections import ConfigDict

from mlcollections_configs import adaptation
from mlcollections_configs.dtl import few_shot_vit_base

RATES = dict(imagenet=1e-4, v2=1e-4, sketch=5e-5, a=8e-5, r=3e-5)


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = few_shot_vit_base.get_config()
  config.target = adaptation.shifted_targets()
  config.tasks = tuple(config.target)
  images = config.target['imagenet']['data'].to_dict()
  config.network = adaptation.public_network(adaptation.VIT_BASE, images)
  each = dict(tasks={task: dict(rates=(rate,)) for task, rate in RATES.items()})
  config.tuning = dict(config.tuning, dtl=each, dtl_plus=each)
  config.reported = 'Above LoRA, VPT, Adapter and NOAH on average over the five test sets.'
  return config
