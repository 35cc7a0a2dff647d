"""The package's public names: imported on first use, known to tools, each with an example that runs."""

import ast
import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import dms_core


def test_import_loads_no_torch():
    code = (
        "import sys, dms_core; assert not {'torch', 'transformers'} & set(sys.modules), 'torch'; print(dir(dms_core))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert set(dms_core.__all__) <= set(eval(said))


def test_star_import_gives_every_public_name():
    names = {}
    exec("from dms_core import *", names)
    assert set(dms_core.__all__) <= set(names)


def test_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="module 'dms_core' has no attribute 'atach'"):
        dms_core.atach  # noqa: B018


def test_names_for_static_tools_equal_the_lazy_ones():
    tree = ast.parse(Path(dms_core.__file__).read_text())
    imported = [node for block in tree.body if isinstance(block, ast.If) for node in block.body]
    assert {alias.name: node.module for node in imported for alias in node.names} == {
        name: f"dms_core.{home}" for name, home in dms_core._HOME.items()
    }


@pytest.fixture
def names(tiny_model):
    """What the examples may use: the public names, torch, Path, a model without gates and a tokenizer."""
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", *"abcdefgh"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "<pad>")), pad_token="<pad>", eos_token="<eos>"
    )
    public = {name: getattr(dms_core, name) for name in dms_core.__all__}
    return {**public, "torch": torch, "Path": Path, "model": tiny_model(gates=False), "tokenizer": tokenizer}


@pytest.mark.parametrize("name", dms_core.__all__)
def test_docstring_has_an_example_that_runs(name, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = doctest.DocTestFinder(recurse=False).find(names[name], name, globs=names)
    examples = [test for test in found if test.examples]
    assert examples, f"{name} has no example"
    for test in examples:
        said = []
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
        assert not result.failed, "".join(said)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dms_core.DMSConfig(window=True), "window True: must be an integer >= 0"),
        (lambda: dms_core.DMSConfig(window=-1), "window -1: must be >= 0"),
        (lambda: dms_core.DMSConfig(scale="a"), "scale 'a': must be a finite number > 0"),
        (lambda: dms_core.DMSConfig(scale=float("inf")), "scale inf: must be a finite number"),
        (lambda: dms_core.DMSConfig(offset=float("nan")), "offset nan: must be a finite number"),
        (lambda: dms_core.RetrofitConfig(batch=2.5), "batch 2.5: must be an integer >= 1"),
        (lambda: dms_core.RetrofitConfig(lr=float("inf")), "lr inf: must be a finite number"),
        (lambda: dms_core.RetrofitConfig(lr="x"), "lr 'x': must be a finite number >= 0"),
        (lambda: dms_core.SamplingConfig("8"), "max_new_tokens '8': must be an integer >= 1"),
        (lambda: dms_core.SamplingConfig(8, top_p=1.5), "top_p 1.5: must lie in"),
    ],
)
def test_bad_setting_is_named_with_what_is_allowed(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
