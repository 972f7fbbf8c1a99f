"""`mmsa-dist systems`: the list, one system's page, and the drawing of its parts."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from mmsa_dist import anatomy
from mmsa_dist.__main__ import main
from mmsa_dist.config import Strict, switch
from mmsa_dist.label_generators import label_generator_names
from mmsa_dist.recipe import PACKAGED, from_dict, packaged, recipe_file, sourced
from mmsa_dist.systems import DataSpec, Prediction, System, get_system, system_names
from mmsa_dist.systems_cli import built, forward, published_spec, switches
from shards.batch import Batch
from tests.mmsa_dist.batches import build, loss_of, padded, ragged, spec_for
from tests.mmsa_dist.test_registry import third_party as third_party  # a fixture

SYSTEMS = [name for name in system_names() if get_system(name).__module__.startswith("mmsa_dist.")]


class Small(System):
    """Layers over steps, over samples and over all steps in a row, a scale of its own, dropout."""

    Config = Strict
    name = "small"

    def __init__(self, config: Strict, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.audio = nn.LSTM(spec.widths["audio"], 3, batch_first=True)
        self.packed = nn.Linear(spec.widths["audio"], 1, bias=False)
        self.dropout = nn.Dropout(0.5)
        self.heads = nn.ModuleList([nn.Linear(3, 1), nn.Sequential(nn.Linear(3, 2))])
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, batch: Batch) -> Prediction:
        states: Tensor = self.dropout(self.audio(batch.values["audio"][:, ::2])[0])
        self.heads[1](states)
        self.packed(batch.values["audio"].flatten(0, 1))
        return Prediction({"M": self.heads[0](states[:, -1]).squeeze(1)})


def test_parts_say_what_they_give_and_hold() -> None:
    """Numbers by hand: an LSTM of 5 -> 3 has 4 * 3 * (5 + 3 + 2) parameters."""
    tree = anatomy.dissect(Small(Strict(), spec_for(["audio"])))
    found = {line: (part.kind, part.output, part.parameters, part.groups) for line, part in anatomy.lines(tree)}
    assert found == {
        "small": ("Small", "", 120 + 5 + 4 + 8 + 4, ("audio", "rest")),
        "├── audio": ("LSTM", "(B, T/2, 3) (1, B, 3) (1, B, 3)", 120, ("audio",)),
        "├── packed": ("Linear", "(B·T, 1)", 5, ("rest",)),
        "├── heads": ("ModuleList", "", 12, ("rest",)),
        "│   ├── 0": ("Linear", "(B, 1)", 4, ("rest",)),
        "│   └── 1": ("Sequential", "(B, T/2, 2)", 8, ("rest",)),
        "└── scale": ("Parameter", "(4,)", 4, ("rest",)),
    }


class Wide(System):
    """A layer of some width on the steps of audio, and a parameter as wide."""

    Config = Strict

    def __init__(self, width: int) -> None:
        super().__init__(Strict(), spec_for(["audio"]))
        self.audio = nn.Linear(self.spec.widths["audio"], width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, batch: Batch) -> Prediction:
        return Prediction({"M": self.audio(batch.values["audio"]).sum((1, 2))})


@pytest.mark.parametrize(
    "width", sorted({size for trial in anatomy.TRIALS for size in (trial.batch, *trial.steps.values())})
)
def test_a_width_is_no_letter_whatever_its_size(width: int) -> None:
    """Those of the made-up batches and sequences, halves and quarters of which a layer may make."""
    for size in (width, -(-width // 2), -(-width // 4), width * 101):
        found = {part.name: part.output for part in anatomy.dissect(Wide(size)).parts}
        assert found == {"audio": f"(B, T, {size})", "scale": f"({size},)"}


@pytest.mark.parametrize("name", SYSTEMS)
def test_parts_add_up(name: str) -> None:
    system = get_system(name)(get_system(name).Config(), spec_for())
    tree = anatomy.dissect(system)
    assert tree.parameters == sum(parameter.numel() for parameter in system.parameters())
    for _, part in anatomy.lines(tree):
        assert part.parts == [] or sum(child.parameters for child in part.parts) == part.parameters
    assert {"audio", "vision"} <= {part.name for part in tree.parts}


def test_mermaid_has_every_part_and_every_branch() -> None:
    tree = anatomy.dissect(Small(Strict(), spec_for(["audio"])))
    text = anatomy.mermaid(tree)
    assert len(re.findall(r'^  p\d+\["', text, re.MULTILINE)) == 7
    assert len(re.findall(r"-->", text)) == 6
    assert 'p1["<b>audio</b><br/>LSTM<br/>(B, T/2, 3) (1, B, 3) (1, B, 3)<br/>120"]:::audio' in text


def test_a_picture_has_a_box_for_every_part() -> None:
    figure = anatomy.picture(anatomy.dissect(Small(Strict(), spec_for(["audio"]))), "small")
    axes = figure.axes[0]
    assert len(axes.patches) == 7
    boxes = {(*box.get_xy(), box.get_height()) for box in axes.patches}  # type: ignore[attr-defined]
    heights = sorted(round(height + 0.08) for *_, height in boxes)
    assert heights == [1, 1, 1, 1, 1, 2, 5], "a box is as high as its parts together"


# What the page says ------------------------------------------------------------------------------------------------


def test_sources_are_read_from_the_comments(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        "# source: of nothing\nsystem: self_mm\nseed: 3  # source: dice\nmodel:  # source: MMSA, all of it\n"
        "  audio_out: 16\n  vision_out: 32  # source: paper, table 2: # 7\n  text_pooling: cls  # as ever\n"
        "optim:\n  lr: {text: 1.0e-5, audio: 1.0e-3, vision: 1.0e-3, rest: 1.0e-3}  # source: ours\n"
    )
    assert sourced(file) == {
        "system": ("self_mm", ""),
        "seed": (3, "dice"),
        "model.audio_out": (16, "MMSA, all of it"),
        "model.vision_out": (32, "paper, table 2: # 7"),
        "model.text_pooling": ("cls", "MMSA, all of it"),
        "optim.lr": ({"text": 1e-5, "audio": 1e-3, "vision": 1e-3, "rest": 1e-3}, "ours"),
    }


@pytest.mark.parametrize("file", sorted(PACKAGED.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_packaged_value_is_shown_with_its_source(file: Path) -> None:
    found = sourced(file)
    assert [key for key, (_, source) in found.items() if not source] == ["system"]
    recipe = from_dict({key: value for key, (value, _) in found.items() if "." not in key})
    assert {key.partition(".")[0] for key in found} <= {*type(recipe).model_fields}


class Switched(Strict):
    """Fields of every kind."""

    plain: int = 3
    """No ablation."""
    use_it: bool = switch(True, table="5")
    """On."""
    leave_it: bool = switch(False, table="5, 6")
    """Off."""
    layers: int = switch(2, table="7", ge=1, le=4)
    """How many."""


def test_switches_are_fields_like_others_and_name_their_table() -> None:
    found = [(each.flag, each.default, each.table, each.help) for each in switches(Switched)]
    assert found == [
        ("--model.no-use-it", "true", "5", "On."),
        ("--model.leave-it", "false", "5, 6", "Off."),
        ("--model.layers LAYERS", "2", "7", "How many."),
    ]
    with pytest.raises(ValueError, match="less than or equal to 4"):
        Switched(layers=5)


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_switch_is_an_option_of_training(name: str) -> None:
    """Each sets its field to something else than the default."""
    from mmsa_dist.recipe import load_recipe

    default = load_recipe(name, None, []).model.model_dump()
    for each in switches(get_system(name).Config):
        flag, _, values = each.flag.partition(" ")
        field = flag.removeprefix("--model.").removeprefix("no-").replace("-", "_")
        metavar = {"LAYERS": "1", "SUBTASKS": "text"}
        other = metavar.get(values, values.partition("|")[0])
        set_to = load_recipe(name, None, [flag, *filter(None, [other])]).model.model_dump()
        assert {key for key in default if set_to[key] != default[key]} == {field}, each.flag


def test_the_papers_tables_have_their_switches() -> None:
    """Of every system: one that is not named here has none whose table is known."""
    tables = {name: {each.table for each in switches(get_system(name).Config)} - {"-"} for name in SYSTEMS}
    assert {name: found for name, found in tables.items() if found} == {
        "iam": {"5, 6"},
        "tam_ulag": {"6", "7"},
        "ufen_mtfn": {"7", "8", "9"},
    }


def test_the_forward_ends_where_the_open_questions_begin() -> None:
    said = forward(get_system("iam"))
    assert said.startswith("IAM.") and "eq" in said
    assert "leaves open" not in said and said.endswith("(16).")


def test_published_widths() -> None:
    assert published_spec("sims").widths == {"text": 768, "audio": 33, "vision": 709}
    assert published_spec("my.yaml").widths == {"text": 768, "audio": 5, "vision": 20}
    assert published_spec("iemocap").classes == {"neutral": 2, "happy": 2, "sad": 2, "angry": 2}


# The command -------------------------------------------------------------------------------------------------------


def test_the_list_has_them_all(capsys: pytest.CaptureFixture[str], third_party: Path) -> None:
    """A third party's too; one that does not work does not hide the others."""
    assert main(["systems"]) == 0
    table = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if "│" in line]
    rows: dict[str, list[str]] = {}
    row: list[str] = []
    for first, *others in cells:  # where a cell is broken over lines, the next ones begin with nothing
        row = rows.setdefault(first, [""] * len(others)) if first else row
        row[:] = [" ".join(both).strip() for both in zip(row, others, strict=True)]
    for name in SYSTEMS:
        cls = get_system(name)
        system = built(cls, cls.Config(), "mosi")
        tasks = {"pmr": "M, or classes", "mult": "M, or classes", "ufen_mtfn": "M T A V F"}.get(name, "M T A V")
        count = f"{sum(p.numel() for p in system.parameters()):,}"
        assert rows[name] == [cls.paper, tasks, cls.labels, ", ".join(packaged(name)), count]
    table = " ".join(table.split())
    assert "their_system" in table
    assert "broken" in table and "cannot be" in table


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_page_of_one(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    cls = get_system(name)
    assert main(["systems", name]) == 0
    printed = capsys.readouterr().out
    page = " ".join(printed.split())
    assert page.startswith(f"{name}: {cls.paper}")
    assert " ".join(forward(cls).split()) in page
    shown = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in printed.splitlines() if "│" in line}
    for key, (value, source) in sourced(recipe_file(name, "mosi")).items():
        assert key in page or key == "system"
        assert not source or source.split()[0] in page
        if isinstance(value, str | int | float) and key != "system":
            assert shown[key] == (str(value).lower() if isinstance(value, bool | str) else f"{value:g}"), key
    for each in switches(cls.Config):
        assert each.flag in page
    assert ("--labels.generator " + "|".join(label_generator_names()) in page) == (cls.labels != "none")
    assert "├── audio" in page and "(B, T, " in page


def test_the_layers_of_a_label_generator_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """They learn with the system, in the group rest: ULAG's experts are 16 wide, its confidences two layers."""
    assert main(["systems", "tam_ulag"]) == 0
    page = capsys.readouterr().out
    count = 16 * (128 + 64 + 16 + 32) + 3 * (16 * 16 + 16 + 16 + 1)
    assert re.search(rf"── label_layers +│ Confidence +│ \(B,\) \(B,\) \(B,\) +│ +{count:,} │ rest ", page)
    assert "without text encoder, with what ulag learns" in " ".join(page.split())
    assert main(["systems", "self_mm"]) == 0
    assert "label_layers" not in capsys.readouterr().out


def test_recipe_and_drawings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["systems", "iam", "--recipe", "sims"]) == 0
    page = capsys.readouterr().out
    assert "bert" not in page and "recipe sims" in page and "widths of sims" in page
    assert main(["systems", "iam", "--mermaid"]) == 0
    assert capsys.readouterr().out.startswith("flowchart LR\n")
    picture = tmp_path / "new" / "iam.png"
    assert main(["systems", "iam", "--picture", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_third_partys_page(capsys: pytest.CaptureFixture[str], third_party: Path) -> None:
    assert main(["systems", "their_module:Theirs"]) == 0
    page = capsys.readouterr().out
    assert "Linear on the mean of audio." in page
    assert "no packaged recipe" in page and "└── audio" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["iamm"], "unknown system 'iamm'; did you mean 'iam'"),
        (["iam", "--recipe", "mossi"], "neither a file nor a packaged recipe of iam; did you mean 'mosi'"),
        (["iam", "--picture", "iam.txt"], "ends in .png, .svg, .pdf"),
        (["--mermaid"], "are of one system"),
    ],
)
def test_what_is_wrong_is_a_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["systems", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# docs/systems.md ---------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "systems.md").read_text()


def test_the_page_names_every_system() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| `\w+` \| (.*) \|$", PAGE, re.MULTILINE))
    assert set(SYSTEMS) <= set(rows)
    for name in SYSTEMS:
        assert set(rows[name].split(", ")) == set(packaged(name))
        assert re.search(rf"^\| `{name}` .* \| `{get_system(name).labels}` \| ", PAGE, re.MULTILINE)


def test_its_commands_have_options_that_exist() -> None:
    from mmsa_dist.recipe import load_recipe

    commands = re.findall(r"^mmsa-dist train (\w+) --data data/mosi ([^#\n]*)", PAGE, re.MULTILINE)
    assert len(commands) >= 5
    for name, overrides in commands:
        if name in SYSTEMS:
            assert load_recipe(name, "mosi", overrides.split()) != load_recipe(name, "mosi", [])


def test_its_example_is_a_whole_system(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmsa_dist.systems.base import _REGISTRY

    monkeypatch.setattr(_REGISTRY, "_classes", dict(_REGISTRY._classes))
    example = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
    module = ModuleType("my_system")
    monkeypatch.setitem(sys.modules, "my_system", module)  # pydantic looks up annotations there
    path = Path(__file__).with_name("my_system.py")
    exec(compile(example, str(path), "exec"), module.__dict__)
    cls = get_system("mean")
    system = build(cls, spec_for())
    batch = ragged(absent={"audio": [1]})
    loss_of(system, batch).backward()
    assert all(parameter.grad is not None for parameter in system.parameters())
    more = padded(batch, {"text": 3, "audio": 5, "vision": 2}, None)
    torch.testing.assert_close(system(more).tasks["M"], system(batch).tasks["M"], atol=1e-6, rtol=0)
    assert [each.table for each in switches(cls.Config)] == ["2"]
