"""Which entry of a bank each name of a model comes from: values only, no checkpoint on disk."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncloader._checkpoint.index import Catalog, Place, Places
from asyncloader._planning.bank import Bank
from asyncloader._planning.names import WORDS, ModelNames, SourceNames
from asyncloader._planning.resolution import Resolving

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from asyncloader._planning.bank import Entry
    from asyncloader._planning.origins import Resolution

FIELDS = st.sampled_from(["path", "load", "exclude", "oname", "skip", "ignore_error", "user"])
OPTIM = "recis.dense.optim."
SLOTS = ("id", "embedding", "sparse_adamw_exp_avg", "sparse_adamw_exp_avg_sq")
TABLES = {"user": SLOTS, "shop": SLOTS, "item": (*SLOTS, "step_filter")}
TOWER = [f"tower.{n}.{what}" for n in range(3) for what in ("weight", "bias")]
SCALARS = ["sparse_adamw_beta1", "sparse_adamw_step"]
MODEL = ModelNames.of(TABLES, dict.fromkeys([*SCALARS, *TOWER]).keys())


@dataclass(frozen=True, kw_only=True, eq=False)
class Source(SourceNames):
    """A checkpoint, with the plain values that it has."""

    words: Collection[str]


def source(
    path: str,
    tables: Mapping[str, Sequence[str]] = TABLES,
    tensors: Collection[str] = (*SCALARS, *TOWER),
    words: Collection[str] = ("global_step", OPTIM),
) -> Source:
    """Return the names of a checkpoint whose dotted tensors stand in `model.pt`."""
    places = {name: Place(name, "model.pt" if "." in name else "shard") for name in tensors}
    held = {table: dict.fromkeys(slots, ()) for table, slots in tables.items()}
    catalog = Catalog(Places.of(places), held)
    return Source(path=path, catalog=catalog, words=frozenset(words))


FULL = {path: source(path) for path in ("c20", "c30")}


def found(
    entries: Sequence[Mapping[str, Any] | str],
    sources: Mapping[str, Source] = FULL,
    model: ModelNames = MODEL,
    **bank: Any,  # noqa: ANN401  # of `Bank.of`
) -> Resolution:
    known = Bank.of(entries, **bank).entries
    return resolve(model, [(one, None if one.skip else sources[one.path]) for one in known])


def resolve(model: ModelNames, sources: Sequence[tuple[Entry, Source | None]]) -> Resolution:
    resolving = Resolving(model, sources)
    for entry, names in reversed(sources):
        if names is not None:
            words = resolving.words_of(entry)
            resolving.take_words(entry, names, words, names.words)
    return resolving.result()


def origins(resolution: Resolution) -> dict[str, str]:
    assert not resolution.problems
    return {name: origin.path for name, origin in resolution.origins.items()}


def taken(resolution: Resolution, path: str) -> set[str]:
    return {name for name, of in origins(resolution).items() if of == path}


ALL = {*MODEL.slots, *MODEL.tensors, "global_step", OPTIM}
USER = {f"user@{slot}" for slot in SLOTS}
AVG = {"user@sparse_adamw_exp_avg", "user@sparse_adamw_exp_avg_sq"}


def load(path: str, *patterns: str, **more: object) -> dict[str, object]:
    return {"path": path, "load": list(patterns), **more}


@pytest.mark.parametrize(
    ("entries", "from_30"),
    [
        ([load("c20", "*"), load("c30", "user*")], USER),
        ([load("c20", "user*"), load("c30", "*")], ALL),
        (
            [load("c20", "*"), load("c30", "*", exclude=["user@*avg*", "tower*"])],
            ALL - AVG - {*TOWER},
        ),
        (
            [load("c20", "*"), load("c30", "*", exclude=["user@*avg*", "tower*", OPTIM])],
            ALL - AVG - {*TOWER, OPTIM},
        ),
        (
            [load("c30", "tower.?.bias*", "[us]*@id*")],
            {*TOWER[1::2], "user@id", "shop@id", OPTIM},
        ),
        ([load("c20", "*"), load("c30", "item")], {f"item@{slot}" for slot in TABLES["item"]}),
        (["c20", load("c30", "recis.dense.optim")], {OPTIM}),
        ([{"path": "c30"}, load("c20", "*", skip=True)], ALL),
        ([load("c20", "*"), load("c30", "tower.0.bias", exclude=[OPTIM])], {"tower.0.bias"}),
        ([load("c20", "*"), load("c30", "sparse_adamw_step")], {"sparse_adamw_step"}),
        ([load("c20", "*"), load("c30", "*", exclude=[""])], ALL),
        ([load("c20", *[f"user@{slot}" for slot in SLOTS]), ("c30")], ALL),
    ],
)
def test_a_name_goes_to_the_last_entry_that_loads_it(
    entries: list[Mapping[str, object] | str], from_30: set[str]
) -> None:
    resolution = found(entries)
    assert taken(resolution, "c30") == from_30
    if entries[0] in ({"path": "c20", "load": ["*"]}, "c20"):
        assert taken(resolution, "c20") == ALL - from_30


def test_no_entries_give_nothing_and_are_no_error() -> None:
    resolution = found([])
    assert (resolution.origins, resolution.missing, resolution.warnings) == ({}, (), ())


def renamed(resolution: Resolution) -> dict[str, str]:
    assert not resolution.problems
    return {n: o.name for n, o in resolution.origins.items() if o.name != n}


def test_onames_swap_two_tables_in_two_dicts_or_in_one() -> None:
    """RecIS takes only the first pair of a dict."""
    swapped = {f"user@{slot}": f"shop@{slot}" for slot in SLOTS}
    swapped |= {theirs: ours for ours, theirs in swapped.items()}
    pairs = [{"user*": "shop*"}, {"shop*": "user*"}]
    for oname in (pairs, pairs[0] | pairs[1], [{"user": "shop"}, {"shop": "user"}]):
        assert renamed(found([{"path": "c30", "oname": oname}])) == swapped


def test_an_oname_of_tensors_carries_over_what_its_stars_matched() -> None:
    model = ModelNames.of({}, {f"net.{n}.weight": 0 for n in range(3)}.keys())
    resolution = found([{"path": "c30", "oname": {"net.*.weight": "tower.*.weight"}}], model=model)
    assert renamed(resolution) == {f"net.{n}.weight": f"tower.{n}.weight" for n in range(3)}


def test_a_star_of_an_oname_matches_what_regular_expressions_give_a_meaning() -> None:
    model = ModelNames.of({}, {"a+b": 0, "aab": 0}.keys())
    sources = {"c": source("c", {}, ["x", "aab"])}
    assert renamed(found([{"path": "c", "oname": {"a+b": "x"}}], sources, model)) == {"a+b": "x"}


def test_an_oname_needs_no_counterpart_for_the_slots_that_the_model_lacks() -> None:
    """RecIS counts the names that match on both sides, and refuses."""
    model = ModelNames.of({"new": ("id", "embedding")}, {}.keys())
    resolution = found([{"path": "c30", "oname": {"new*": "user*"}}], model=model)
    assert renamed(resolution) == {"new@id": "user@id", "new@embedding": "user@embedding"}


def test_an_oname_for_one_slot_counts_for_its_table() -> None:
    names = renamed(found([{"path": "c30", "oname": {"user@embedding": "shop@embedding"}}]))
    assert names == {f"user@{slot}": f"shop@{slot}" for slot in SLOTS}


def test_what_an_entry_lacks_falls_through_to_the_entries_before_it() -> None:
    sources = FULL | {"c30": source("c30", {"user": ("id", "embedding")}, [], ["train_epoch"])}
    resolution = found(["c20", "c30"], sources)
    assert taken(resolution, "c30") == {"user@id", "user@embedding", "train_epoch"}
    assert not resolution.missing


def test_what_no_entry_has_is_missing_a_table_by_its_name() -> None:
    sources = {"c": source("c", {"user": ("id",), "item": TABLES["item"]}, TOWER)}
    missing = found(["c"], sources).missing
    assert missing == (*(f"user@{slot}" for slot in SLOTS[1:]), "shop", *SCALARS)


def test_names_that_only_some_checkpoint_has_are_unexpected() -> None:
    sources = {"c": source("c", TABLES | {"old": SLOTS[:1]}, [*SCALARS, *TOWER, "gone"])}
    assert found(["c"], sources).unexpected == ("c: gone", "c: old@id")


def test_what_is_named_and_not_there_is_a_problem_or_with_ignore_error_a_warning() -> None:
    sources = {"c": source("c", {"user": SLOTS}, TOWER)}
    entry = load("c", "shop", "item@embedding", "sparse_adamw_step", "user@*")
    strict, lenient = found([entry], sources), found([entry | {"ignore_error": True}], sources)
    assert strict.problems == (
        (
            "entry 0 (c): has no 'item@embedding', which its load names "
            "(did you mean 'user@embedding'?)"
        ),
        (
            "entry 0 (c): has no 'sparse_adamw_step', which its load names "
            "(did you mean 'user@sparse_adamw_exp_avg'?)"
        ),
        "entry 0 (c): has no 'shop', which its load names",
    )
    assert (lenient.problems, lenient.warnings) == ((), strict.problems)


def test_names_that_the_model_lacks_are_problems_of_every_entry_at_once() -> None:
    problems = found(
        [
            load("c20", "usr", ignore_error=True),
            load("c30", "tower.9.bias", skip=True),
            {"path": "c30", "oname": {"net": "x", "user@embedding": "shop@other"}},
        ]
    ).problems
    assert problems == (
        "entry 0 (c20): the model has no 'usr', which load names (did you mean 'user'?)",
        (
            "entry 1 (c30): the model has no 'tower.9.bias', which load names "
            "(did you mean 'tower.2.bias'?)"
        ),
        "entry 2 (c30): the model has no 'net', which oname renames",
        (
            "entry 2 (c30): oname makes 'shop@other' of 'user@embedding': tables can be renamed, "
            "slots cannot"
        ),
    )


def test_a_pattern_that_matches_no_name_is_a_warning() -> None:
    resolution = found([load("c30", "usr*", exclude=["x"])])
    assert resolution.warnings == (
        "entry 0 (c30): load 'usr*' matches no name of the model",
        "entry 0 (c30): exclude 'x' matches no name of the model",
    )


def test_a_name_that_holds_brackets_means_itself() -> None:
    model = ModelNames.of({}, {"w[0]": 0, "w0": 0}.keys())
    sources = {"c": source("c", {}, ["w[0]", "w0"])}
    assert set(found([load("c", "w[0]")], sources, model).origins) == {"w[0]"}


def test_io_state_and_tables_stand_for_all_of_their_names() -> None:
    words = ("train_io", "eval_io", "train_epoch", "global_step", "train_window_io")
    sources = {"c": source("c", {}, [], words)}
    assert set(found([load("c", "io_state")], sources).origins) == {*words} - {"global_step"}
    rest = found([load("c", "*", exclude=["io_state"])], sources)
    assert set(rest.origins) == {"global_step"}


def test_the_ids_entry_decides_whether_a_table_is_cleared() -> None:
    entries = [load("c20", "*"), load("c30", "user@embedding", "item", hashtable_clear=False)]
    assert found(entries).cleared == ("user", "shop")


@pytest.mark.parametrize(
    ("conf", "names"),
    [
        ({}, ALL),
        ({"load": ["dense"]}, {*TOWER}),
        ({"load": ["sparse_opt"]}, {n for n in ALL if "sparse_" in n}),
        ({"exclude": ["sparse", "sparse_opt"]}, {*TOWER, "global_step", OPTIM}),
        ({"load": ["extra"]}, {"global_step", OPTIM}),
        ({"load": ["*"], "exclude": ["*"]}, set()),
    ],
)
def test_the_switches_of_a_load_conf_choose_kinds_of_names(
    conf: Mapping[str, object], names: set[str]
) -> None:
    assert set(found(["c20"], load_conf=conf).origins) == names


def test_a_strict_load_conf_wants_all_dense_tensors() -> None:
    sources = {"c": source("c", TABLES, [*SCALARS, *TOWER[1:]])}
    [problem] = found(["c"], sources, load_conf={}).problems
    assert problem.startswith("entry 0 (c): has no 'tower.0.weight'")
    lenient = found(["c"], sources, load_conf={"strict": False})
    assert (lenient.problems, lenient.missing) == ((), ("tower.0.weight",))


def test_an_entrys_own_patterns_come_before_the_load_conf() -> None:
    resolution = found([load("c30", "user")], load_conf={"load": ["dense"]})
    assert set(resolution.origins) == USER


def test_all_that_is_wrong_with_entries_is_listed_at_once() -> None:
    entries = [
        {"path": " ", "load": "user", "onam": {}},
        3,
        {"load": [""], "skip": 1},
        {"path": "c", "oname": {"a*": "b"}, "exclude": [2]},
    ]
    with pytest.raises(ValueError, match="11 problems in the bank") as error:
        Bank.of(entries, load_conf={"load": ["sparce"], "mode": 1})
    for text in (
        "load_conf has no field 'mode'",
        "load_conf: load has 'sparce', which is none of sparse, dense, ",
        "entry 0: load is a list of patterns, got 'user'",
        "entry 0: there is no field 'onam' (did you mean 'oname'?)",
        "entry 0: path is blank: ' '",
        "entry 1 is 3, not a dict with a path",
        "entry 2: load has the empty pattern ''",
        "entry 2: skip is True or False, got 1",
        "entry 2: path must be a path, got None",
        "entry 3: oname 'a*': 'b' has not as many * on both sides",
        "entry 3: exclude is a list of patterns, got 2 in it",
    ):
        assert text in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=4),
    max_leaves=12,
)


@given(st.lists(JSON, max_size=3))
def test_any_json_is_a_bank_or_an_error_that_says_what_is_wrong_with_it(value: list[Any]) -> None:
    try:
        bank = Bank.of(value)
    except ValueError as error:
        assert "in the bank:" in str(error)  # noqa: PT017  # most values are none
    else:
        resolve(MODEL, [(entry, source(entry.path)) for entry in bank.entries])


def test_a_bank_that_is_no_list_is_refused() -> None:
    with pytest.raises(TypeError, match="a bank is a list of entries"):
        Bank.of({"path": "c"})


def test_a_bank_comes_with_all_that_goes_with_it() -> None:
    bank = Bank.of(["c"], resume="run", rank=2)
    assert Bank.of(bank) is bank
    more: list[dict[str, Any]] = [{"resume": "run"}, {"rank": 1}, {"load_conf": {}}]
    for arguments in more:
        with pytest.raises(TypeError, match="leave them out"):
            Bank.of(bank, **arguments)


def test_names_that_all_lack_a_prefix_get_one_hint_each() -> None:
    model = ModelNames.of({}, {f"w.{n}": 0 for n in range(2000)}.keys())
    sources = {"c": source("c", {}, [f"net.w.{n}" for n in range(2000)])}
    problems = found([load("c", *model.tensors)], sources, model).problems
    assert len(problems) == 2000
    assert "(it is there as 'net.w.1999', as others are with 'net.'" in problems[1999]
    assert "rename them with oname" in problems[1999]


def test_the_text_shows_a_line_for_names_that_come_from_one_place() -> None:
    sources = FULL | {"c20": source("c20", words=["global_step"])}
    entries = [load("c20", "*"), load("c30", "user@id", "shop@*", oname={"shop": "item"})]
    model = ModelNames.of(TABLES, {"w": 0, **dict.fromkeys(TOWER)}.keys())
    text = str(found(entries, sources, model))
    assert text.splitlines() == [
        "0: c20",
        "1: c30",
        "user@id                       1",
        "user@embedding                0",
        "user@sparse_adamw_exp_avg     0",
        "user@sparse_adamw_exp_avg_sq  0",
        "shop@* (4)                    1  item@*",
        "item@* (5)                    0",
        "tower.* (6)                   0",
        "global_step                   0",
        "w                                keeps its values: no entry has it",
    ]


# Random entries, against a model of the rules: one name at a time.

NAMES = ("a@id", "a@v", "ab@id", "ab@v", "a", "ab", "w.a", "global_step", OPTIM)
SMALL = ModelNames.of({"a": ("id", "v"), "ab": ("id", "v")}, {"w.a": 0, "b.v": 0}.keys())
PATTERNS = st.sampled_from([*NAMES, "*", "a*", "?@id", "*@v", "[aw]*", "b.v", "*.*", "io_state"])
RENAMES = st.sampled_from([{"a": "ab"}, {"ab": "a"}, {"a*": "a*"}, {"w.a": "b.v"}, {"*.v": "w.*"}])


@st.composite
def banks(draw: st.DrawFn) -> tuple[list[dict[str, Any]], dict[str, Source]]:
    entries: list[dict[str, Any]] = []
    sources = {}
    for number in range(draw(st.integers(0, 4))):
        path = f"c{number}"
        tables = {t: draw(st.sets(st.sampled_from(["id", "v"]))) for t in ("a", "ab")}
        sources[path] = source(
            path,
            {table: sorted(slots) for table, slots in tables.items()},
            sorted(draw(st.sets(st.sampled_from(["w.a", "b.v"])))),
            draw(st.sets(st.sampled_from(WORDS))),
        )
        entry = {
            "path": path,
            "load": draw(st.lists(PATTERNS, max_size=3)),
            "exclude": draw(st.lists(PATTERNS, max_size=2)),
            "oname": draw(st.lists(RENAMES, max_size=1)),
            "ignore_error": True,
            "skip": draw(st.booleans()) and draw(st.booleans()),
        }
        entries.append(entry)
    return entries, sources


def fits(name: str, pattern: str) -> bool:
    if pattern == "io_state":
        return name in WORDS and (name.endswith("_io") or name == "train_epoch")
    if pattern in {"a", "ab"}:
        return name in {f"{pattern}@id", f"{pattern}@v"}
    return fnmatch.fnmatchcase(name, pattern)


def source_name(name: str, pairs: Sequence[Mapping[str, str]]) -> str:
    for pair in pairs:
        [(ours, theirs)] = pair.items()
        if ours in {"a", "ab"} and name.startswith(f"{ours}@"):
            return f"{theirs}{name.removeprefix(ours)}"
        if ours == "*.v" and name.endswith(".v"):
            return f"w.{name.removesuffix('.v')}"
        if ours == name:
            return theirs
    return name


def holds(known: Source, name: str) -> bool:
    table, at, slot = name.partition("@")
    if at:
        return slot in known.catalog.tables.get(table, {})
    return name in known.words or name in known.catalog.tensors


@given(banks())
def test_names_go_where_a_plain_model_of_the_rules_sends_them(
    bank: tuple[list[dict[str, Any]], dict[str, Source]],
) -> None:
    entries, sources = bank
    expected: dict[str, tuple[str, str]] = {}
    for name in SMALL:
        for entry in reversed([] if name == OPTIM else entries):
            theirs = source_name(name, entry["oname"])
            loads = any(fits(name, pattern) for pattern in entry["load"])
            excludes = any(fits(name, pattern) for pattern in entry["exclude"])
            there = holds(sources[entry["path"]], theirs) and not entry["skip"]
            if loads and there and not excludes:
                expected[name] = entry["path"], theirs
                break
    for entry in reversed(entries):
        loads = any(fits(OPTIM, pattern) for pattern in entry["load"])
        dense = any(at[0] == entry["path"] and "." in at[1] for at in expected.values())
        excludes = any(fits(OPTIM, pattern) for pattern in entry["exclude"])
        there = holds(sources[entry["path"]], OPTIM) and not entry["skip"]
        if OPTIM not in expected and (loads or dense) and there and not excludes:
            expected[OPTIM] = entry["path"], OPTIM
    resolution = found(entries, sources, SMALL)
    assert {n: (o.path, o.name) for n, o in resolution.origins.items()} == expected
