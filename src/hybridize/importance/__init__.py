"""Which attention layers matter: a scorer takes a model and gives a ranking, its controls beside it.

`METHODS` is the one table of scorers. Imports no torch until a model is scored, so that a plan can name the
cost at once.
"""

from hybridize.importance.correlation import rank_correlation
from hybridize.importance.cost import rank_cost
from hybridize.importance.methods import METHODS, Method, rank_layers
from hybridize.importance.ranking import FORMAT, LayerOrder, Ranking, load_ranking, save_ranking

__all__ = [
    "FORMAT",
    "METHODS",
    "LayerOrder",
    "Method",
    "Ranking",
    "load_ranking",
    "rank_correlation",
    "rank_cost",
    "rank_layers",
    "save_ranking",
]
