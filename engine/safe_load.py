"""Reads torch.distributed.checkpoint's files without running the code that a pickle can contain.

The folders of --resume, --init and --judge may be other people's.
"""

import pickle
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING


class Metadata(pickle.Unpickler):
    """Unpickles a checkpoint's table of contents, from the classes that such a table needs and no others."""

    names = {
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.distributed.checkpoint.metadata": {
            *("Metadata", "MetadataIndex", "ChunkStorageMetadata", "TensorStorageMetadata", "TensorProperties"),
            *("BytesStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING"),
        },
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
        "pathlib": {"PosixPath", "WindowsPath"},
        "pathlib._local": {"PosixPath", "WindowsPath"},
    }

    def find_class(self, module, name):
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11.2 and before pickle an enum's member
            return _encoding
        if name not in self.names.get(module, ()):
            raise pickle.UnpicklingError(f"its .metadata names {module}.{name}, which no checkpoint of ours does")
        return super().find_class(module, name)


def _encoding(kind, name):
    if kind is not _MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"its .metadata asks for {kind}.{name}")
    return kind[name]


class Reader(dcp.FileSystemReader):
    def read_metadata(self, *args, **kwargs):
        for path in Path(self.path).glob("*.metadata"):  # one for all ranks, or one per rank
            with path.open("rb") as file:
                Metadata(file).load()
        return super().read_metadata(*args, **kwargs)


class Planner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item, value):
        torch.load(value, weights_only=True)  # raises for what is more than numbers
        value.seek(0)
        super().load_bytes(read_item, value)
