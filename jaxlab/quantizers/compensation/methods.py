"""The settings of QwT, QwT-v2 and NBC."""

import dataclasses
from typing import Literal

from jaxlab.quantizers.compensation.bipolar_scales import SCALE_FACTORS

Kind = Literal['auto', 'linear', 'conv']


@dataclasses.dataclass(frozen=True)
class QwT:
  """Linear map from the block's input (QwT, arXiv 2411.13918).

  Attributes:
    ridge: absolute penalty; None: 0 for the linear form, 1e-3 for the convolutional one, as in the code.
    relative: the ridge counts in units of the scatter of an input channel about its mean, the average over
      channels, and the bias is not penalized; of the linear form. GPLQ takes 1e-4 here.
    kind: `'conv'` is a grouped convolution, for blocks of convolutions; `'auto'` decides by the kernels.
    kernel_size: of the convolution, odd.
    channels_per_group: of its input; None for about 64, by a number of groups that divides the channels.
  """

  ridge: float | None = None
  kind: Kind = 'auto'
  kernel_size: int = 1
  channels_per_group: int | None = None
  relative: bool = False

  def __post_init__(self):
    if self.ridge is not None and not self.ridge >= 0:
      raise ValueError(f'ridge={self.ridge}: expected a number of at least 0, or None.')
    if self.relative and (self.ridge is None or self.kind == 'conv'):
      raise ValueError(
        f'relative=True is about a ridge of the linear form; got ridge={self.ridge}, kind={self.kind!r}.'
      )


@dataclasses.dataclass(frozen=True)
class QwTv2:
  """Scale and shift of each output channel (QwT-v2, arXiv 2505.20932).

  A convolution followed by a batch norm is compensated at its own output: the norm is affine in each channel,
  so the fit is the same.

  Attributes:
    granularity: `'linear'`: every layer with a kernel inside the blocks; `'branch'`: the last of each
      residual branch, as the network's anatomy names them; `'block'`: the block's output, which cannot be
      folded.
    modules: regular expression over the paths seen from the block, in place of the granularity's choice.
    eps: relative variance below which a channel is constant.
    clip: keep |gamma| in [1/16, 16].
    held_out: leave channels alone that get worse on every second batch when fitted on the others.
    recalibrate: find the range of every quantized input in a block anew, on the first batch, when all before
      it is compensated: gamma and beta change what flows. Without effect on networks that keep no constants
      in the collection `'quantization'`.
  """

  granularity: Literal['linear', 'branch', 'block'] = 'linear'
  modules: str | None = None
  eps: float = 1e-12
  clip: bool = False
  held_out: bool = False
  recalibrate: bool = True

  def __post_init__(self):
    if self.granularity not in ('linear', 'branch', 'block'):
      raise ValueError(f"granularity={self.granularity!r}; choose 'linear', 'branch' or 'block'.")


@dataclasses.dataclass(frozen=True)
class NBC:
  """Linear map between bipolar logarithms of input and error (NBC, arXiv 2605.16423).

  Attributes:
    scale_rule: scale of both transforms: a number, `'mean_abs'` or `'max_abs'` of inputs and of errors, or
      `'search'` over `factors` times the mean magnitudes on a held-out quarter of the images.
    ridge: relative penalty on the weight.
    debiased: fit a factor for each channel in the original space.
    factors: candidates of the search.
    kind: as for `QwT`.
    kernel_size: as for `QwT`.
    channels_per_group: as for `QwT`.
  """

  scale_rule: float | Literal['mean_abs', 'max_abs', 'search'] = 1.0
  ridge: float = 1e-6
  debiased: bool = True
  factors: tuple[float, ...] = SCALE_FACTORS
  kind: Kind = 'auto'
  kernel_size: int = 1
  channels_per_group: int | None = None

  def __post_init__(self):
    rule = self.scale_rule
    if not self.ridge >= 0:
      raise ValueError(f'ridge={self.ridge}: expected a number of at least 0.')
    if isinstance(rule, str):
      if rule not in ('mean_abs', 'max_abs', 'search'):
        raise ValueError(
          f"scale_rule={rule!r}; choose 'mean_abs', 'max_abs', 'search' or a number."
        )
    elif not rule > 0:
      raise ValueError(f'scale_rule={rule}: a scale must be positive.')


Method = QwT | QwTv2 | NBC
