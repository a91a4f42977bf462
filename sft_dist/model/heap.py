"""The heap of the C library, from which tensors on the CPU come."""

import ctypes
from contextlib import suppress


def trim() -> None:
    """Give free pages back to the kernel, also those between blocks in use; only glibc can.

    glibc cuts blocks below 32 MiB from one heap and returns only its end, so gradients and activations of other sizes
    in every step leave more and more holes: https://man7.org/linux/man-pages/man3/malloc_trim.3.html
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
