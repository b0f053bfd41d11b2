"""What lets autograd and autocast work on tensors of a GPU that is not there: tools.memory_table, and tests."""

from types import SimpleNamespace

import torch


def accelerator_without_devices(name="none", manual_seed_all=lambda seed: None):
    """Register a third device, without devices: as long as it is "the accelerator", autograd asks no CUDA driver for
    streams. Before the process's first backward pass, which starts a thread for each device.

    Args:
        name: of the device; manual_seed_all: what torch.manual_seed calls of its module.
    Returns:
        what torch does not keep itself and the caller must.
    """
    class Hooks(torch._C._acc.PrivateUse1Hooks):
        def is_available(self):
            return False

        def is_built(self):
            return True

        def has_primary_context(self, index):
            return False

    class Guard(torch._C._acc.DeviceGuard):
        def type_(self):
            return torch._C._autograd.DeviceType.PrivateUse1
    torch._C._ensureCUDADeviceGuardSet()
    torch.utils.rename_privateuse1_backend(name)
    torch._register_device_module(name, SimpleNamespace(
        is_available=lambda: False, device_count=lambda: 0, _is_in_bad_fork=lambda: False,
        manual_seed_all=manual_seed_all))
    kept = Hooks(), Guard()
    torch._C._acc.register_python_privateuseone_hook(kept[0])
    torch._C._acc.register_python_privateuseone_device_guard(kept[1])
    return kept
