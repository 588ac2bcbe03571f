"""Attention weights to mixer weights, as a plan that explains itself: expressions first, tensors second."""

from hybridize.transfer.conversion import ConversionPlan, convert, plan_conversion, replace_layer
from hybridize.transfer.expressions import Blend, Constant, Fresh, Stack, Take
from hybridize.transfer.pairing import aligned_order, count_aligned
from hybridize.transfer.plan import Entry, TransferPlan, plan_transfer
from hybridize.transfer.rules import INITS

__all__ = [
    "INITS",
    "Blend",
    "Constant",
    "ConversionPlan",
    "Entry",
    "Fresh",
    "Stack",
    "Take",
    "TransferPlan",
    "aligned_order",
    "convert",
    "count_aligned",
    "plan_conversion",
    "plan_transfer",
    "replace_layer",
]
