"""The native backend for CPUs: C++ with a C interface, one op a file, loaded through ctypes.

Nothing is built or loaded on import: `register()` does it, once for the process.
"""

from qwenkit.kernels.cpu.bind import (
    KernelInfo,
    give_back_freed_memory,
    kernel_info,
    register,
    set_threads,
)

__all__ = ["KernelInfo", "give_back_freed_memory", "kernel_info", "register", "set_threads"]
