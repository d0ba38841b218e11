"""The device to compute on."""

from typing import TYPE_CHECKING

from .errors import SettingsError

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda", "mps")


def pick_device(device: str) -> "torch.device":
    """cuda (or cuda:N), mps or cpu; auto takes the first of these that is there.

    Raises:
        SettingsError: if it is unknown, or not there.
    """
    import torch

    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(name for name, present in here.items() if present))
    kind, _, number = device.partition(":")
    numbers = {"": True, **{str(index): True for index in range(torch.cuda.device_count() if kind == "cuda" else 1)}}
    if not here.get(kind) or number not in numbers:
        raise SettingsError(f"the device {device!r} is not available here; it may be one of {', '.join(DEVICES)}")
    return torch.device(device)
