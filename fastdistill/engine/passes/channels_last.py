"""Weights of convolutions in channels-last memory order, so that images flow through both networks in it.

Convolutions hand their weights' order on to their output. Only where numbers lie changes, no number does. It is the
order that tensor cores and the vectorised CPU convolutions want, and tokens of attention are then views.
"""

from __future__ import annotations

import torch

from fastdistill.engine.components import Components
from fastdistill.engine.passes._replace import Tally
from fastdistill.engine.report import PassReport


def apply(components: Components) -> PassReport:
    tally = Tally("channels_last")
    for where, network in components.networks.items():
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
                tally.change(f"convolution in the {where}")
    return tally.report()
