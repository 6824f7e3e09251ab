"""Outputs of modules that rules name: which there are, and which are arrays that can be quantized."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxlab.models.intercept import Site
from jaxlab.quantizers.networks.batches import Call, trace_calls
from jaxlab.quantizers.networks.rules import Rules, check_matches, decide

PyTree = Any

NOT_CARRIED = 'it runs under nn.scan or nn.vmap, which carry no ranges of outputs'


def why_no_output(y: Any) -> str | None:
  """Returns why what a module returns is not quantized; None: it is an array of floats."""
  if not hasattr(y, 'dtype'):
    return f'it returns a {type(y).__name__}'
  return None if jnp.issubdtype(y.dtype, jnp.floating) else f'it returns {y.dtype.name}'


def look_at_outputs(
  model: nn.Module, variables: Mapping[str, PyTree], call: Call, rules: Rules
) -> dict[str, str | None]:
  """Returns the modules whose output rules name, by path, and why an output is not quantized, or None.

  Traces abstractly: no computation.

  Raises:
    ValueError: if a rule for outputs names no module.
  """
  paths: dict[str, None] = {}
  found: dict[str, str | None] = {}

  def visit(site: Site, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    y = call(*args, **kwargs)
    paths.setdefault(site.path)
    if decide(rules, site.path, 'output') is not None:
      found.setdefault(site.path, why_no_output(y))
    return y

  trace_calls(model, variables, call, visit)
  check_matches(rules, 'output', [path for path in paths if path])
  return found
