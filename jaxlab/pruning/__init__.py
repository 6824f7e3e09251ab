"""Making a trained network small: which channels stay, by scores of all of them."""

from jaxlab.pruning.ranking import global_ranking

__all__ = ['global_ranking']
