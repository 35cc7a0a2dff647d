"""Publishing, with a folder in the hub's place."""

import fnmatch
import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard

from companion import share
from companion.cli.main import main
from dms_core.checkpoint import load_gates, load_model, read_settings, save_gates, save_model
from dms_core.storage import update_json

IDS = torch.randint(1, 40, (1, 24), generator=torch.Generator().manual_seed(3))
CARD = {"licence": "apache-2.0", "base_model": "me/base", "base_licence": "apache-2.0"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder that takes what is uploaded."""

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, ignore_patterns, **_):
        for file in sorted(Path(folder_path).rglob("*")):
            name = str(file.relative_to(folder_path))
            allowed, ignored = (any(fnmatch.fnmatch(name, p) for p in x) for x in (allow_patterns, ignore_patterns))
            if file.is_file() and allowed and not ignored:
                (tmp_path / "hub" / repo_id).mkdir(parents=True, exist_ok=True)
                shutil.copy(file, tmp_path / "hub" / repo_id / name)

    def upload_file(self, *, repo_id, path_or_fileobj, path_in_repo, **_):
        (tmp_path / "hub" / repo_id / path_in_repo).write_bytes(path_or_fileobj)

    monkeypatch.setattr(HfApi, "upload_file", upload_file)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: f"https://huggingface.co/{repo_id}")
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return tmp_path / "hub"


@pytest.fixture
def run(tmp_path, tiny_model):
    """The directory of a retrofit: a recipe, gates in cr8, and curves."""
    save_gates(tiny_model(), tmp_path / "run" / "cr8", cr=8.0, step=90)
    (tmp_path / "run" / "retrofit.json").write_text(json.dumps({"dms": {}, "recipe": {"lr": 3e-5}, "log": []}))
    row = {"problems": 30, "chains": 8.0, "accuracy": 50.0}
    found = [("vanilla", 1, 64), ("vanilla", 1, 128), ("dms", 8.0, 64), ("dms", 8.0, 128), ("tova", 8.0, 128)]
    rows = [{"method": m, "cr": cr, "L": length, **row} for m, cr, length in found]
    (tmp_path / "run" / "curves.json").write_text(json.dumps({"task": "aime24", "pass_at_1": rows}))
    return tmp_path / "run"


def test_shared_gates_load_and_their_card_says_what_they_are(run, hub, tiny_model):
    (run / "cr8" / "trainer").mkdir()
    (run / "cr8" / "trainer" / "state.json").write_text("{}")
    (run / "cr8" / "secret.py").touch()
    address = share.share_gates(run / "cr8", "me/tiny-dms-8x", evaluation=run / "curves.json", **CARD)
    assert address == "https://huggingface.co/me/tiny-dms-8x"
    there = hub / "me" / "tiny-dms-8x"
    assert {file.name for file in there.iterdir()} == {"README.md", "dms.json", "dms_gates.safetensors"}
    again = load_gates(tiny_model(gates=False), there)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, tiny_model()(IDS).logits)
    card = ModelCard.load(there / "README.md")
    data = card.data
    assert (data.license, data.base_model, data.library_name) == ("apache-2.0", "me/base", "dms_core")
    assert data.to_dict()["base_model_relation"] == "adapter" and "dms" in data.tags
    (result,) = data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("aime24", "accuracy", 50.0)
    assert "128 tokens, CR 8" in result.metric_name
    for words in (
        "| compression ratio | 8 |",
        "| window | 3 |",
        "| lr | 3e-05 |",
        "| aime24 | vanilla | 1 | 128 | 30 |",
    ):
        assert words in card.text
    assert 'load_gates(load_base("me/base"), "me/tiny-dms-8x")' in card.text and "tova" not in card.text
    assert "base" not in read_settings(there)
    update_json(run / "cr8" / "dms.json", base="/home/me/models/base")
    share.share_gates(run / "cr8", "me/tiny-dms-8x", **CARD)  # a card of ours may be written again
    assert read_settings(there)["base"] == "me/base"
    assert read_settings(run / "cr8")["base"] == "/home/me/models/base"  # what lies here stays as it is


def test_whole_model_is_shared_as_one(tmp_path, hub, tiny_model):
    save_model(tiny_model(), tmp_path / "cr8", cr=8.0)
    share.share_gates(tmp_path / "cr8", "me/whole", **CARD)
    card = ModelCard.load(hub / "me" / "whole" / "README.md")
    assert card.data.to_dict()["base_model_relation"] == "finetune" and 'load_model("me/whole")' in card.text
    with torch.no_grad():
        assert torch.equal(load_model(hub / "me" / "whole")(IDS).logits, tiny_model()(IDS).logits)


@pytest.mark.parametrize("base", ["nvidia/Qwen3-8B-DMS-8x", "local"])
def test_licence_that_contradicts_the_base_models_is_refused_before_anything_is_written(run, hub, base, tmp_path):
    if base == "local":
        base = str(tmp_path / "base")
        Path(base).mkdir()
        (Path(base) / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    with pytest.raises(ValueError, match=r"licence 'mit'.*so it must be non-commercial, too"):
        share.share_gates(run / "cr8", "me/gates", licence="mit", base_model=base)
    assert not (run / "cr8" / "README.md").exists() and not hub.exists()
    share.share_gates(run / "cr8", "me/gates", licence="cc-by-nc-4.0", base_model=base)


@pytest.mark.parametrize("base_licence, text", [(None, "licence is not known"), ("llama3.2", "is 'llama3.2'")])
def test_licence_that_must_be_read_is_warned_of(run, base_licence, text):
    with pytest.warns(UserWarning, match=text):
        share.write_card(
            run / "cr8", "me/gates", licence="mit", base_model="me/out-of-reach", base_licence=base_licence
        )


def test_a_licence_that_the_hub_does_not_list_is_named_beside_other(run):
    card = share.write_card(run / "cr8", "me/gates", **{**CARD, "licence": "My licence"})
    data = ModelCard.load(card).data
    assert (data.license, data.license_name) == ("other", "My licence")


def test_bad_input_is_named_and_a_strange_card_is_kept(run, tmp_path, tiny_model):
    with pytest.raises(ValueError, match="is not a DMS checkpoint"):
        share.write_card(run, "me/gates", **CARD)
    with pytest.raises(ValueError, match="no results of dms at CR 8"):
        (tmp_path / "curves.json").write_text('{"pass_at_1": []}')
        share.write_card(run / "cr8", "me/gates", evaluation=tmp_path / "curves.json", **CARD)
    with pytest.raises(ValueError, match="licence ''"):
        share.write_card(run / "cr8", "me/gates", **{**CARD, "licence": ""})
    with pytest.raises(ValueError, match="me/a/b"):
        share.write_card(run / "cr8", "me/a/b", **CARD)
    (run / "cr8" / "README.md").write_text("# Mine\n")
    with pytest.raises(ValueError, match="somebody else wrote it"):
        share.write_card(run / "cr8", "me/gates", **CARD)
    assert (run / "cr8" / "README.md").read_text() == "# Mine\n"


def test_a_hub_out_of_reach_is_one_line(run):
    with pytest.raises(ValueError, match="me/gates: not uploaded"):
        share.share_gates(run / "cr8", "me/gates", **CARD)


def test_push_prints_where_it_is(run, hub, capsys):
    words = ["push", str(run / "cr8"), "--repo", "me/gates", "--licence", "mit", "--base", "me/base"]
    words += ["--base-licence", "mit"]
    assert main([*words, "--card-only"]) == 0
    assert capsys.readouterr().out == f"{run / 'cr8' / 'README.md'}\n" and not hub.exists()
    assert main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {
        "card": str(run / "cr8" / "README.md"),
        "repo": "me/gates",
        "url": "https://huggingface.co/me/gates",
    }
    assert main([*words[:-4], "--base", "nvidia/Qwen3-8B-DMS-8x"]) == 2
    assert "must be non-commercial" in capsys.readouterr().err
