"""The table of mixers: which one stands in for a module, by its class name, and what is particular to its family.

How to add a row: docs/adding_a_layer.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from statecache.models.mixers.base import Mixer
from statecache.models.mixers.block_index import BlockIndex
from statecache.models.mixers.cca import CCA
from statecache.models.mixers.delta import Delta, interleaved, separate
from statecache.models.mixers.kda import KDA
from statecache.models.mixers.lightning import Lightning
from statecache.models.mixers.pooled_index import PooledIndex
from statecache.models.mixers.relative import RelativeAttention, RelativeDistance
from statecache.models.mixers.residual_conv import DynamicConv, ResidualConv
from statecache.models.mixers.rg_lru import RGLRU
from statecache.models.mixers.scan import Scan
from statecache.models.mixers.short_conv import ShortConv
from statecache.models.mixers.ssd import SSD

MIXERS: dict[str, Callable[[nn.Module, Any], Mixer]] = {
    "MambaMixer": Scan,
    "FalconMambaMixer": partial(Scan, normed=True),
    "JambaMambaMixer": partial(Scan, normed=True),
    "ZambaMambaMixer": partial(Scan, groups="n_mamba_heads"),
    "Mamba2Mixer": SSD,
    "BambaMixer": SSD,
    "FalconH1Mixer": partial(SSD, scaled=True, normed="mamba_rms_norm"),
    "GraniteMoeHybridMambaLayer": SSD,
    "NemotronHMamba2Mixer": SSD,
    "Zamba2MambaMixer": SSD,
    "Qwen3NextGatedDeltaNet": partial(Delta, projections=interleaved),
    "Qwen3_5GatedDeltaNet": Delta,
    "Qwen3_5MoeGatedDeltaNet": Delta,
    "LaraMiniGatedDeltaNet": Delta,
    "Qwen4ExpTextGatedDeltaNet": Delta,
    "OlmoHybridGatedDeltaNet": partial(
        Delta, projections=separate, norm="o_norm", out="o_proj", doubled="allow_neg_eigval"
    ),
    "KimiLinearDeltaAttention": KDA,
    "BailingHybridDeltaAttention": partial(KDA, gate=("g_proj",)),
    "Glm5NextTextLinearAttention": KDA,
    "Glm5NextTextIndexer": PooledIndex,
    "Qwen4ExpTextQSAIndexer": BlockIndex,
    "Lfm2ShortConv": ShortConv,
    "Lfm2MoeShortConv": ShortConv,
    "Lfm3ShortConv": ShortConv,
    "InklingAttention": RelativeAttention,
    "InklingShortConvolution": ResidualConv,
    "Inkling2SlidingAttention": RelativeDistance,
    "Inkling2FullAttention": RelativeDistance,
    "Inkling2ShortConvolution": partial(ResidualConv, scaled=True),
    "Inkling2DynamicShortConvolution": DynamicConv,
    "Inkling2LoopSlidingAttention": RelativeDistance,
    "Inkling2LoopFullAttention": RelativeDistance,
    "Inkling2LoopShortConvolution": partial(ResidualConv, scaled=True),
    "Inkling2LoopDynamicShortConvolution": DynamicConv,
    "MiniMaxLightningAttention": Lightning,
    "RecurrentGemmaRecurrentBlock": RGLRU,
    "ZayaCCAProjection": CCA,
}
