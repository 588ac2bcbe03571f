"""Apriel-H1's released checkpoints (arXiv 2511.02651): read into a hybrid's folder, and written from one.

The two formats hold the same tensors and differ in names, in the config, and in what a layer may be. Read there:

* `t` is Mistral's own decoder layer and `m2` the paper's Mamba-1 in the place of its attention; `i` is a layer that is
  left out whole, its MLP too. Here, where an identity replaces attention alone, an `i` becomes an identity whose MLP
  is all zeros, which adds nothing either.
* The step-size bias is added twice. A mixer says so by its `dt_bias_mode`.
* Older checkpoints have the step size's input projection as the last rows of `in_proj`.
"""

from hybridize.models.apriel.conversion import export_apriel, import_apriel

__all__ = ["export_apriel", "import_apriel"]
