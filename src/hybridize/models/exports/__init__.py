"""Hybrids written as architectures that vLLM ships itself, to be served without the plugin.

Two of vLLM's hybrid architectures can hold one of ours exactly, in some cases:

* `GraniteMoeHybridForCausalLM`: attention like Llama's, and Mamba-2;
* `Qwen3_5ForCausalLM`: attention like Qwen 3's, and gated delta nets.

Whether they hold a given hybrid is decided from its config alone (`obstacles`), with the layer and the property that
prevent it. The tensors are then rearranged so that the same numbers are computed: heads that share keys and values get
copies of them, places that the architecture has in excess are filled with zeros, and factors that must move from one
tensor to another are powers of two. The other hybrids in vLLM differ from ours in what no weights make up for: Jamba,
Nemotron-H and Kimi Linear have no rotary embedding, Falcon-H1 runs both mixers in every layer, OLMo Hybrid normalises
before its mixers and after its attention, Zamba 2 shares one attention block.
"""

from hybridize.models.exports.conversion import FORMATS, export_native
from hybridize.models.exports.formats import Format

__all__ = ["FORMATS", "Format", "export_native"]
