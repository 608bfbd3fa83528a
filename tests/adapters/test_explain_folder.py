"""A folder explained without its model says what the attached adapter is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from adapter_models import gpt2, opt
from typer.testing import CliRunner

import tnpeft
from tnpeft.adapters.storage.folder_report import explain_folder
from tnpeft.cli import app
from tnpeft.layout import layout
from tnpeft.models.cards import sites

TARGETS = ["q_proj", "v_proj", "fc1"]


def saved(folder: Path, network: Any, targets: list[str] = TARGETS, model: Any = None, **options: Any) -> Any:
    model = opt(layers=3) if model is None else model
    config = tnpeft.TensorNetworkConfig(network=network, target_modules=targets, **options)
    peft.get_peft_model(model, config).save_pretrained(str(folder))
    return model.config.to_dict()


@pytest.mark.parametrize(
    ("network", "options"),
    [
        ("lora", {}),
        ("cp", {}),
        ("vera", {"ranks": {"r": 8}}),
        ("vera", {"ranks": {"r": 8}, "save_frozen": True}),
        ("lotr", {"ranks": {"a": 4, "b": 4}}),
        ("lorta", {}),
        ("ia3", {}),
        ("randlora", {}),
    ],
)
def test_a_folder_says_what_the_layout_says(network: str, options: dict[str, Any], tmp_path: Path) -> None:
    targets = TARGETS if network != "lorta" else ["q_proj", "v_proj"]
    config = saved(tmp_path, network, targets, **options)
    report = explain_folder(tmp_path, model=config)
    f = tnpeft.TensorNetworkConfig(network=network, **options).factorization
    placed = layout(f, sites(config, targets))
    assert report.parameters == placed.count()
    assert report.bytes == (tmp_path / "adapter_model.safetensors").stat().st_size
    assert (report.layers, report.scale, dict(report.ranks)) == (3, f.scale, dict(f.ranks))
    assert [place.projection for place in report.places] == targets
    for place in report.places:
        shape = next(s for s in placed.site_layouts if s.site.proj == place.projection)
        assert (place.sites, place.out, place.inp) == (3, shape.site.out, shape.site.inp)
        net = shape.line.network
        sizes = {**shape.sizes, "layer": 1, "proj": 1}
        assert place.rank_bound == tnpeft.rank_bound(net, sizes)
        best = tnpeft.plan(net, sizes, tokens=2048)
        assert (place.macs, place.saved) == (best.macs / 2048, best.saved / 2048)


@pytest.mark.parametrize(
    ("network", "targets", "known", "places"),
    [
        *(("fact_tt", TARGETS, known, [(3, 32, 32), (3, 32, 32), (6, 32, 32)]) for known in (True, False)),  # squares
        ("lora", TARGETS, False, [(3, 32, 32), (3, 32, 32), (3, 64, 32)]),  # the file tells
        ("lora", ["attn.c_proj", "mlp.c_proj"], False, [(2, 32, 32), (2, 32, 128)]),  # more than a path's last name
    ],
)
def test_sites_and_their_shapes(network: str, targets: list[str], known: bool, places: Any, tmp_path: Path) -> None:
    model: Any = opt(layers=3) if targets == TARGETS else gpt2()
    config = saved(tmp_path, network, targets, model)
    found = explain_folder(tmp_path, model=config if known else None).places
    assert [place.projection for place in found] == [name.replace(".", "_") for name in targets]
    assert [(place.sites, place.out, place.inp) for place in found] == places


def test_what_the_file_does_not_tell_is_left_out(tmp_path: Path) -> None:
    saved(tmp_path, "lotr", ranks={"a": 4, "b": 4})
    report = explain_folder(tmp_path)
    assert [place.rank_bound for place in report.places] == [None] * 3
    assert "-" in str(report)
    assert "<table>" in report._repr_html_()


def test_a_damaged_or_foreign_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(tnpeft.AdapterFileError, match=r"no adapter_config\.json"):
        explain_folder(tmp_path)
    saved(tmp_path, "lora")
    file = tmp_path / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    with pytest.raises(tnpeft.AdapterFileError, match="damaged"):
        explain_folder(tmp_path)
    file.unlink()
    with pytest.raises(tnpeft.AdapterFileError, match=r"no adapter_model\.safetensors"):
        explain_folder(tmp_path)
    peft.get_peft_model(opt(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(str(tmp_path / "lora"))
    with pytest.raises(tnpeft.AdapterFileError, match="is a LORA"):
        explain_folder(tmp_path / "lora")


def test_at_the_shell(tmp_path: Path) -> None:
    saved(tmp_path, "cp")
    done = CliRunner().invoke(app, ["explain", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "q_proj" in done.stdout
    data = json.loads(CliRunner().invoke(app, ["explain", str(tmp_path), "--json"]).stdout)
    assert data["parameters"] == explain_folder(tmp_path).parameters
    bad = CliRunner().invoke(app, ["explain", str(tmp_path / "no")])
    assert bad.exit_code == 2
    assert bad.stderr.startswith("error: no adapter_config.json")


@pytest.mark.parametrize("name", ["/dev/zero", "x" * 5000, "a\0b", "/"])
def test_a_recorded_name_is_read_only_where_it_is_a_configuration(name: str, tmp_path: Path) -> None:
    saved(tmp_path, tnpeft.families.vera(rank=2))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": name}))
    assert explain_folder(tmp_path).places
