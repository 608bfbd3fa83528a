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


def saved(folder: Path, network: Any, targets: list[str] = TARGETS, **options: Any) -> Any:
    model: Any = opt(layers=3)
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


@pytest.mark.parametrize("known", [True, False])
def test_sites_cut_into_squares_are_counted_by_squares(known: bool, tmp_path: Path) -> None:
    config = saved(tmp_path, "fact_tt")
    report = explain_folder(tmp_path, model=config if known else None)
    assert [(p.projection, p.sites, p.out, p.inp) for p in report.places] == [
        ("q_proj", 3, 32, 32),
        ("v_proj", 3, 32, 32),
        ("fc1", 6, 32, 32),
    ]


def test_shapes_come_from_the_file_where_it_tells_them(tmp_path: Path) -> None:
    saved(tmp_path, "lora")
    assert [(p.out, p.inp) for p in explain_folder(tmp_path).places] == [(32, 32), (32, 32), (64, 32)]


def test_a_projection_is_found_by_more_than_the_last_name_of_a_path(tmp_path: Path) -> None:
    config = tnpeft.TensorNetworkConfig(network="lora", target_modules=["attn.c_proj", "mlp.c_proj"])
    peft.get_peft_model(gpt2(), config).save_pretrained(str(tmp_path))
    shapes = {place.projection: (place.sites, place.out, place.inp) for place in explain_folder(tmp_path).places}
    assert shapes == {"attn_c_proj": (2, 32, 32), "mlp_c_proj": (2, 32, 128)}


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
