"""Room 5: a model over several devices. Which part goes where, and what carries hidden states over.

The parts are the embedding, each block, the norm and the head: a model is split between blocks and
never inside one.
"""

from qwenkit.parallel.connect import connect
from qwenkit.parallel.device_map import DeviceMap
from qwenkit.parallel.plan import GivenMap, plan_devices, plan_evenly, read_places

__all__ = ["DeviceMap", "GivenMap", "connect", "plan_devices", "plan_evenly", "read_places"]
