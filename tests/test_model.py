"""What of a model can be loaded."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from asyncloader import HashTable, Loader, PlanError, Saver, targets
from tests.oracle import write_checkpoint
from tests.support import data, rows_in, rows_on_disk, table_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CONTENT = data([1, -2, 3])


class Tower(nn.Module):
    """A model in the making: tables, parameters, buffers, and other state."""

    def __init__(self, *tables: HashTable) -> None:
        super().__init__()
        self.tables = nn.ModuleList(tables)
        self.dense = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("forgotten", torch.zeros(1), persistent=False)

    def get_extra_state(self) -> object:
        return {"step": 3}

    def set_extra_state(self, state: object) -> None:
        pass


def test_a_models_tables_go_by_their_names_and_its_tensors_as_in_its_state_dict() -> None:
    t, u = HashTable([2], name="t"), HashTable([2], name="u")
    model = nn.ModuleDict({"tower": Tower(t, u)})
    tables, tensors = targets(model)
    assert tables == {"t": t, "u": u}
    assert set(tensors) == model.state_dict().keys() - {"tower._extra_state"}
    assert {"tower.dense.weight", "tower.norm.running_mean"} <= set(tensors)


async def test_what_is_loaded_into_them_is_in_the_model(tmp_path: Path) -> None:
    model = Tower(table_for(CONTENT))
    stored = {
        name: torch.full_like(value, 3)
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor)
    }
    write_checkpoint(tmp_path, {"t": CONTENT}, stored)

    await Loader(tmp_path, *targets(model), strict=True).aload()

    assert isinstance(model.tables[0], HashTable)
    assert rows_in(model.tables[0]) == rows_on_disk(CONTENT)
    assert model.dense.weight.eq(3).all()
    assert model.dense.weight.requires_grad
    assert model.norm.num_batches_tracked == 3


def test_a_table_is_a_model_too() -> None:
    table = HashTable([2], name="t")
    assert targets(table) == ({"t": table}, {})


def test_a_model_without_tables_has_tensors_only() -> None:
    tables, tensors = targets(nn.Linear(2, 2, bias=False))
    assert tables == {}
    assert list(tensors) == ["weight"]


def test_a_table_that_is_reached_twice_is_one() -> None:
    table = HashTable([2], name="t")
    assert targets(nn.ModuleDict({"one": Tower(table), "other": Tower(table)}))[0] == {"t": table}


def test_two_tables_of_one_name_are_refused() -> None:
    """On disk they would be one: what is loaded into which?"""
    model = nn.ModuleDict({"one": HashTable([2], name="t"), "other": HashTable([2], name="t")})
    with pytest.raises(ValueError, match="named 't', 'one' and 'other'"):
        targets(model)


def test_a_tied_tensor_has_both_its_names(tmp_path: Path) -> None:
    one, other = nn.Linear(2, 2, bias=False), nn.Linear(2, 2)
    other.weight = one.weight
    model = nn.ModuleDict({"one": one, "other": other})
    write_checkpoint(tmp_path, {}, {"one.weight": torch.ones(2, 2), "other.bias": torch.ones(2)})
    report = Loader(tmp_path, *targets(model)).load()
    assert report.missing == ()
    assert report.tensors["other.weight"] == "shared with 'one.weight'"
    assert other.weight.eq(1).all()


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match="dict"):
        targets({"w": torch.ones(1)})  # type: ignore[arg-type]  # the very thing


# --- wrapped models


def of_torch(name: str, child: str) -> Callable[[nn.Module], nn.Module]:
    """Make a wrapper as torch has one, without what takes seconds to import, or a process group."""

    def wrap(self: nn.Module, module: nn.Module) -> None:
        nn.Module.__init__(self)
        setattr(self, child, module)

    kind = type(name, (nn.Module,), {"__init__": wrap, "__module__": "torch.distributed"})
    return cast("Callable[[nn.Module], nn.Module]", kind)


Compiled = of_torch("OptimizedModule", "_orig_mod")
Sharded = of_torch("FullyShardedDataParallel", "_fsdp_wrapped_module")


def wrapped_within() -> nn.Module:
    """Make a model whose parts are wrapped, one of them twice."""
    parts = {"0": nn.DataParallel(Compiled(nn.Linear(2, 2))), "1": Sharded(nn.Linear(2, 2))}
    return nn.Sequential(*parts.values())


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "bare": lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
    "compiled": lambda: Compiled(WRAPPED["bare"]()),
    "data parallel": lambda: nn.DataParallel(WRAPPED["bare"]()),
    "compiled and parallel": lambda: Compiled(nn.DataParallel(WRAPPED["bare"]())),
    "sharded": lambda: Sharded(WRAPPED["bare"]()),
    "within": wrapped_within,
    # These take their own part of a name off, by a hook.
    "compiled in checkpointed": lambda: nn.Sequential(
        checkpoint_wrapper(Compiled(nn.Linear(2, 2))), nn.Linear(2, 2)
    ),
    "checkpointed in compiled": lambda: Compiled(
        nn.Sequential(Compiled(checkpoint_wrapper(nn.Linear(2, 2))), nn.Linear(2, 2))
    ),
}


@pytest.mark.parametrize("saved", WRAPPED)
@pytest.mark.parametrize("loaded", ["bare", "within", "compiled and parallel"])
async def test_a_wrapped_model_has_the_names_of_the_bare_one(
    tmp_path: Path, saved: str, loaded: str
) -> None:
    source, destination = WRAPPED[saved](), WRAPPED[loaded]()
    tables, tensors = targets(source)
    assert set(tensors) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    await Saver(path=tmp_path / "c", hashtables=tables, tensors=tensors).asave()

    await Loader(tmp_path / "c", *targets(destination), strict=True).aload()

    for one, other in zip(source.parameters(), destination.parameters(), strict=True):
        assert torch.equal(one, other)


def test_that_names_of_wrappers_are_taken_off_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "asyncloader"):
        targets(WRAPPED["bare"]())
        assert not caplog.messages
        targets(WRAPPED["data parallel"]())
    assert "without wrappers: taken off were ['module.']" in caplog.text


@pytest.mark.parametrize(
    "saved", sorted(WRAPPED.keys() - {"within"})
)  # its `module` may be anything
@pytest.mark.parametrize("loaded", ["bare", "within"])
def test_what_was_saved_under_the_names_of_a_wrapped_model_is_found(
    tmp_path: Path, saved: str, loaded: str
) -> None:
    source, destination = WRAPPED[saved](), WRAPPED[loaded]()
    save_file(source.state_dict(), tmp_path / "model.safetensors")

    report = Loader(tmp_path, *targets(destination), strict=True).load()

    for one, other in zip(source.parameters(), destination.parameters(), strict=True):
        assert torch.equal(one, other)
    assert report.unexpected == ()
    renamed = [warning for warning in report.warnings if "names of a wrapped model" in warning]
    assert len(renamed) == (source.state_dict().keys() != WRAPPED["bare"]().state_dict().keys())


def test_a_name_that_two_wrapped_ones_have_is_missing(tmp_path: Path) -> None:
    names = ["_orig_mod.a", "_fsdp_wrapped_module.a", "_orig_mod.b"]
    write_checkpoint(tmp_path, {}, {name: torch.ones(1) for name in names})
    report = Loader(tmp_path, tensors={"a": torch.zeros(1), "b": torch.zeros(1)}).load()
    assert report.missing == ("a",)
    assert set(report.unexpected) == set(names[:2])


def test_what_is_called_as_in_a_wrapper_is_no_wrapper() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._orig_mod = nn.Linear(1, 1, bias=False)

    assert list(targets(Own())[1]) == ["_orig_mod.weight"]


def test_a_model_may_have_a_part_called_module() -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    assert set(targets(model)[1]) == {"module.weight", "module.bias"}


@pytest.mark.parametrize(
    ("there", "wanted", "says"),
    [
        ("net.", "", "it is there as 'net.a.weight', as others are with 'net.'"),
        ("", "module.", "it is there as 'a.weight', as others without 'module.'"),
    ],
)
def test_names_that_differ_by_a_prefix_are_hinted_at(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, there: str, wanted: str, says: str
) -> None:
    names = ["a.weight", "a.bias", "b.weight"]
    write_checkpoint(tmp_path, {}, {there + name: torch.ones(2) for name in names})
    tensors = {wanted + name: torch.zeros(2) for name in [*names, "new"]}

    with pytest.raises(PlanError, match="rename them with filter_func") as caught:
        Loader(tmp_path, tensors=tensors, strict=True).load()
    assert says in str(caught.value)
    Loader(tmp_path, tensors=tensors).load()
    assert says in caplog.text
    one = Loader(tmp_path, tensors={wanted + "b.weight": torch.zeros(2)}, strict=True)
    with pytest.raises(PlanError, match=f"did you mean '{there}b.weight'"):
        one.load()


def test_a_tensor_of_each_wrapper_and_of_the_bare_name_are_told_apart() -> None:
    odd = Compiled(nn.Linear(1, 1))
    odd.register_parameter("weight", nn.Parameter(torch.zeros(1)))

    with pytest.raises(ValueError, match="two tensors are named 'weight'"):
        targets(odd)


# --- tensors that are no memory of the model


class Counting(nn.Module):
    """A module whose state beside its parameters is a tensor."""

    def __init__(self, state: Callable[[], object]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.state = state

    def get_extra_state(self) -> object:
        return self.state()

    def set_extra_state(self, state: object) -> None:
        pass


def test_extra_state_that_is_made_anew_is_left_out_and_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It would be loaded into a copy, and be reported as loaded."""
    model = nn.ModuleDict({"part": Counting(lambda: torch.tensor(5))})

    assert list(targets(model)[1]) == ["part.weight"]

    assert "left out" in caplog.text
    assert "part._extra_state" in caplog.text


def test_extra_state_that_the_model_keeps_is_loaded(tmp_path: Path) -> None:
    step = torch.tensor(5)
    Saver.to(tmp_path / "c", *targets(Counting(lambda: step))).save()
    kept = torch.tensor(0)

    Loader(tmp_path / "c", *targets(Counting(lambda: kept)), strict=True).load()

    assert kept == 5


def test_copies_of_a_models_tensors_are_refused() -> None:
    """What FSDP gathers for its state_dict() is the model no more."""

    def gather(_: nn.Module, state: dict[str, torch.Tensor], __: str, ___: object) -> None:
        state.update({name: value.clone() for name, value in state.items()})

    model = nn.Linear(2, 2)
    model.register_state_dict_post_hook(gather)  # type: ignore[no-untyped-call]

    with pytest.raises(ValueError, match=r"copies of weight, bias: .* state_dict\(\) itself to"):
        targets(model)
