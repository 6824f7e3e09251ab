"""Which part of a pre-trained network is fine-tuned: the classifier over it, its last stage too, or all."""

from typing import Any, Literal, NamedTuple

from flax import linen as nn

from jaxlab import models
from jaxlab.models.resnet import ResNet
from jaxlab.models.wide_resnet import WideResNet

Choice = Literal['classifier', 'last_stage', 'all']


class Part(NamedTuple):
  """What of `{'backbone': ..., 'head': ...}` is trained, and where its frozen beginning can be cut off.

  Attributes:
    patterns: regular expressions of the trained parameters' paths.
    mode: the backbone's argument `train` in training passes.
    hooks: around the backbone in training passes.
    start: the backbone's stage that stored activations can go into; None: it is run from the images.
  """

  patterns: tuple[str, ...]
  mode: Any
  hooks: tuple[models.Hook, ...] = ()
  start: str | None = None


def part(backbone: nn.Module, choice: Choice) -> Part:
  """Returns the part that `choice` names; 'last_stage' includes a final norm.

  Norms and dropout of all that is frozen are in eval mode.

  Raises:
    ValueError: for a backbone that is neither a `WideResNet` nor a `ResNet`.
  """
  if isinstance(backbone, WideResNet):
    stages = {'classifier': (), 'last_stage': backbone.stages[-2:], 'all': backbone.stages}[choice]
    patterns = ('head/.*', *(f'backbone/{stage}/.*' for stage in stages))
    return Part(patterns, stages, start=None if choice == 'all' else (*stages, 'bn1')[0])
  if not isinstance(backbone, ResNet):
    raise ValueError(f'expected a WideResNet or a ResNet, got {type(backbone).__name__}.')
  last = rf'layer{len(backbone.stage_sizes)}_\d+'
  patterns = {'classifier': (), 'last_stage': (f'backbone/{last}/.*',), 'all': ('backbone/.*',)}
  frozen_norms = (rf'(?!{last}/)(.*/)?(bn\d|downsample_1)',) if choice == 'last_stage' else ()
  hooks = models.eval_mode_hooks(frozen_norms)
  return Part(('head/.*', *patterns[choice]), choice != 'classifier', hooks)
