"""The three types hidden states are stored in, for torch and for HDF5."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import SettingsError

if TYPE_CHECKING:
    import h5py
    import torch

STORAGE_DTYPES = ("bfloat16", "float16", "float32")
"""bfloat16 is the default: middle layers of some LLMs exceed 65504, the largest float16."""


@dataclass(frozen=True)
class StorageDtype:
    """How one value of a hidden state lies on disk, little-endian."""

    name: str
    itemsize: int

    @property
    def torch(self) -> "torch.dtype":
        """The torch dtype of the same name."""
        import torch

        return getattr(torch, self.name)

    @property
    def hdf5(self) -> "h5py.h5t.TypeFloatID":
        """The HDF5 type: a true float, so that any HDF5 tool shows numbers."""
        from h5py import h5t

        if self.name == "float32":
            return h5t.IEEE_F32LE.copy()
        if self.name == "float16":
            return h5t.IEEE_F16LE.copy()
        # The fields are set before the size: HDF5 refuses fields that would not fit the smaller type.
        bfloat16 = h5t.IEEE_F32LE.copy()
        bfloat16.set_fields(15, 7, 8, 0, 7)  # sign at 15, exponent 7..14, mantissa 0..6
        bfloat16.set_size(2)
        bfloat16.set_ebias(127)
        return bfloat16


def storage_dtype(name: str) -> StorageDtype:
    """The storage type of that name.

    Raises:
        SettingsError: for any other name.
    """
    if name not in STORAGE_DTYPES:
        raise SettingsError(f"dtype must be one of {', '.join(STORAGE_DTYPES)}, not {name!r}")
    return StorageDtype(name, 4 if name == "float32" else 2)
