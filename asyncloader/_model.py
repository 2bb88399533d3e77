"""What of a model can be loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from .table import HashTable

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["targets"]


def targets(model: nn.Module) -> tuple[dict[str, HashTable], dict[str, Tensor]]:
    """Return the hash tables of a model by their names, and the tensors of its `state_dict()`.

    Both are the model's own, not copies: what is loaded into them is loaded into the model. Values
    of the `state_dict()` that are no tensors are left out.

    ```python
    await Loader(path, *targets(model)).aload()
    ```

    Args:
        model: With tables anywhere below it, or a table itself.

    Raises:
        TypeError: If it is no module.
        ValueError: If two tables have the same name.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    tables: dict[str, HashTable] = {}
    paths: dict[str, str] = {}
    for path, table in _tables(model):
        if table.name in tables:
            raise ValueError(
                f"two tables are named {table.name!r}, {paths[table.name]!r} and {path!r}: "
                "give one of them another name, it is what stands on disk"
            )
        tables[table.name], paths[table.name] = table, path
    values = model.state_dict().items()
    return tables, {name: value for name, value in values if isinstance(value, Tensor)}


def _tables(model: nn.Module) -> Iterator[tuple[str, HashTable]]:
    """Yield each table once, with its path."""
    for path, module in model.named_modules():
        if isinstance(module, HashTable):
            yield path, module
